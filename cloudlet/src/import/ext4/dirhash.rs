//! The hash that orders the names of large directories: the kernel's `half_md4` in its unsigned form
//! (fs/ext4/hash.c, lib/halfmd4 in older kernels).

/// Bytes of a name that are taken in at a time.
const CHUNK_LEN: usize = 32;
/// Constants of the second and of the third round.
const K2: u32 = 0x5a82_7999;
const K3: u32 = 0x6ed9_eba1;
/// `EXT4_HTREE_EOF_32BIT`: readers take it for the end.
const END: u32 = 0x7fff_ffff;

/// The hash of a name and, for names that share it, the lesser one.
pub(super) fn half_md4(name: &[u8], seed: &[u8; 16]) -> (u32, u32) {
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| seed[4 * at + byte]));
    let mut state = [0, 1, 2, 3].map(word);
    let mut rest = name;
    while !rest.is_empty() {
        transform(&mut state, &words(rest));
        rest = rest.get(CHUNK_LEN..).unwrap_or_default();
    }
    let hash = state[1] & !1;
    let hash = if hash == END << 1 {
        (END - 1) << 1
    } else {
        hash
    };
    (hash, state[2])
}

/// `str2hashbuf_unsigned`: the first 32 bytes as eight numbers, padded with the length.
fn words(rest: &[u8]) -> [u32; 8] {
    // A name has at most 255 bytes.
    let len = rest.len() as u32;
    let pad = len | len << 8;
    let pad = pad | pad << 16;
    let mut words = [pad; 8];
    let chunk = &rest[..rest.len().min(CHUNK_LEN)];
    for (word, bytes) in words.iter_mut().zip(chunk.chunks(4)) {
        *word = bytes
            .iter()
            .fold(pad, |word, &byte| u32::from(byte).wrapping_add(word << 8));
    }
    words
}

fn transform(state: &mut [u32; 4], input: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    let rounds: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (
            |x, y, z| z ^ (x & (y ^ z)),
            0,
            [0, 1, 2, 3, 4, 5, 6, 7],
            [3, 7, 11, 19],
        ),
        (
            |x, y, z| (x & y).wrapping_add((x ^ y) & z),
            K2,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            |x, y, z| x ^ y ^ z,
            K3,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in rounds {
        for (step, at) in order.into_iter().enumerate() {
            let sum = a
                .wrapping_add(mix(b, c, d))
                .wrapping_add(input[at])
                .wrapping_add(constant);
            // What was mixed is the second of the next step.
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, more) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(more);
    }
}
