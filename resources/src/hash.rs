//! A fast 64-bit hash for noticing damage: lost, stale or doubled pages, torn transfers. Four lanes
//! of multiply and rotate, so that it runs at memory speed without SIMD. It is no defence against an
//! adversary, who can forge it; the delta format has BLAKE3 for that.
//!
//! Used by the host and, by path, by the guest: no dependencies, no allocation.

const MULTIPLIERS: [u64; 4] = [
    0x9e37_79b9_7f4a_7c15,
    0xc2b2_ae3d_27d4_eb4f,
    0x1656_67b1_9e37_79f9,
    0xd6e8_feb8_6659_fd93,
];

/// A hash under way.
#[derive(Clone, Debug)]
pub struct Hash {
    lanes: [u64; 4],
    words: u64,
    /// Bytes short of a block of 32, and how many they are.
    rest: [u8; 32],
    rest_len: usize,
}

impl Hash {
    /// Starts a hash; different seeds give unrelated hashes.
    #[must_use]
    pub const fn new(seed: u64) -> Hash {
        let [a, b, c, d] = MULTIPLIERS;
        let lanes = [
            seed ^ a,
            seed.rotate_left(16) ^ b,
            seed.rotate_left(32) ^ c,
            !seed ^ d,
        ];
        Hash {
            lanes,
            words: 0,
            rest: [0; 32],
            rest_len: 0,
        }
    }

    fn block(lanes: &mut [u64; 4], words: [u64; 4]) {
        for i in 0..4 {
            lanes[i] = (lanes[i] ^ words[i])
                .wrapping_mul(MULTIPLIERS[i])
                .rotate_left(29);
        }
    }

    fn block_of(bytes: &[u8]) -> [u64; 4] {
        let mut words = [0; 4];
        for (word, part) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes([
                part[0], part[1], part[2], part[3], part[4], part[5], part[6], part[7],
            ]);
        }
        words
    }

    /// Adds bytes. How they are cut into calls makes no difference.
    pub fn bytes(&mut self, mut bytes: &[u8]) {
        if self.rest_len > 0 {
            let take = bytes.len().min(32 - self.rest_len);
            self.rest[self.rest_len..self.rest_len + take].copy_from_slice(&bytes[..take]);
            self.rest_len += take;
            bytes = &bytes[take..];
            if self.rest_len < 32 {
                return;
            }
            Self::block(&mut self.lanes, Self::block_of(&self.rest));
            self.words += 4;
            self.rest_len = 0;
        }
        let mut lanes = self.lanes;
        let blocks = bytes.chunks_exact(32);
        let tail = blocks.remainder();
        for block in blocks {
            Self::block(&mut lanes, Self::block_of(block));
            self.words += 4;
        }
        self.lanes = lanes;
        self.rest[..tail.len()].copy_from_slice(tail);
        self.rest_len = tail.len();
    }

    /// Adds numbers, by their bits: the same as their little-endian bytes.
    pub fn floats(&mut self, floats: &[f32]) {
        let pair = |a: f32, b: f32| u64::from(b.to_bits()) << 32 | u64::from(a.to_bits());
        if self.rest_len > 0 {
            for f in floats {
                self.bytes(&f.to_le_bytes());
            }
            return;
        }
        let mut lanes = self.lanes;
        let blocks = floats.chunks_exact(8);
        let tail = blocks.remainder();
        for b in blocks {
            let words = [
                pair(b[0], b[1]),
                pair(b[2], b[3]),
                pair(b[4], b[5]),
                pair(b[6], b[7]),
            ];
            Self::block(&mut lanes, words);
            self.words += 4;
        }
        self.lanes = lanes;
        for f in tail {
            self.bytes(&f.to_le_bytes());
        }
    }

    /// Adds one number.
    pub fn word(&mut self, word: u64) {
        self.bytes(&word.to_le_bytes());
    }

    /// The hash of everything added so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        let mut lanes = self.lanes;
        let mut last = [0; 32];
        last[..self.rest_len].copy_from_slice(&self.rest[..self.rest_len]);
        Self::block(&mut lanes, Self::block_of(&last));
        let total = self.words * 8 + self.rest_len as u64;
        let mut h = total.wrapping_mul(MULTIPLIERS[0]);
        for lane in lanes {
            h = (h ^ lane).wrapping_mul(MULTIPLIERS[1]);
            h ^= h >> 32;
        }
        h
    }
}

/// The hash of one run of bytes.
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    let mut h = Hash::new(0);
    h.bytes(bytes);
    h.finish()
}
