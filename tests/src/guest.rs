//! Guests of the harness: kernels of a few bytes that do one thing each.

use std::num::NonZeroU32;

/// Where the harness's kernels are loaded.
const LOAD_ADDRESS: u32 = 0x10_0000;
/// File offset of the note that names the PVH entry (Xen's `include/public/elfnote.h`).
const NOTE_OFFSET: u64 = 64 + 2 * 56;
const NOTE_LEN: u64 = 20;
const CODE_OFFSET: u64 = 0x1000;

/// 32-bit code for the PVH entry: protected mode, paging off, flat segments.
pub mod code {
    /// Prints `ok` on COM1, then halts for good with interrupts off.
    pub const PRINT_AND_HALT: &[u8] = &[
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'o', 0xee, // mov al, 'o'; out dx, al
        0xb0, b'k', 0xee, // mov al, 'k'; out dx, al
        0xfa, 0xf4, // cli; hlt
        0xeb, 0xfd, // jmp -3
    ];
    /// Pulses the reset line of the i8042.
    pub const RESET: &[u8] = &[
        0xb0, 0xfe, 0xe6, 0x64, // mov al, 0xfe; out 0x64, al
        0xf4, 0xeb, 0xfd, // hlt; jmp -3
    ];
    /// An undefined instruction with no interrupt table: a triple fault.
    pub const TRIPLE_FAULT: &[u8] = &[
        0x0f, 0x01, 0x1d, 0x0a, 0x00, 0x10, 0x00, // lidt [0x10000a]: zeroes, a limit of 0
        0x0f, 0x0b, // ud2
        0xf4, // hlt
        0, 0, 0, 0, 0, 0,
    ];
}

/// A kernel that misuses its devices in an order that `seed` decides; see `guest/chaos.s`. It says
/// `.` on COM1 now and then.
#[must_use]
pub fn chaos(seed: NonZeroU32) -> Vec<u8> {
    /// Where the image wants its seed: behind the jump, aligned.
    const SEED_AT: usize = 4;
    let mut code = include_bytes!(concat!(env!("OUT_DIR"), "/chaos")).to_vec();
    code[SEED_AT..SEED_AT + 4].copy_from_slice(&seed.get().to_le_bytes());
    kernel(&code)
}

/// A kernel that writes `text` on COM1, `times` over, then pulses the reset line of the i8042.
#[must_use]
pub fn writer(text: &[u8], times: u32) -> Vec<u8> {
    const TEXT_AT: u32 = 40;
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let mut code = vec![0xfc, 0xbb]; // cld; mov ebx, times
    code.extend(times.to_le_bytes());
    code.push(0xbe); // mov esi, text
    code.extend((LOAD_ADDRESS + TEXT_AT).to_le_bytes());
    code.push(0xb9); // mov ecx, length
    code.extend(len.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xf3, 0x6e]); // rep outsb
    code.extend([0x4b, 0x75, 0xed]); // dec ebx; jnz, to where esi is set
    code.extend(code::RESET);
    code.resize(usize::try_from(TEXT_AT).unwrap_or(0), 0);
    code.extend_from_slice(text);
    kernel(&code)
}

/// An ELF kernel that a PVH loader enters at the first byte of `code`.
#[must_use]
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let code_len = u64::try_from(code.len()).unwrap_or(u64::MAX);
    let load = u64::from(LOAD_ADDRESS);
    let mut file = Vec::new();
    // The ELF header: 64-bit, little-endian, executable, x86-64 (ELF specification, figure 1-3).
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend_from_slice(&load.to_le_bytes());
    file.extend_from_slice(&64_u64.to_le_bytes());
    file.extend_from_slice(&[0; 12]);
    for half in [64_u16, 56, 2, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    // PT_LOAD, readable and executable; PT_NOTE.
    segment(
        &mut file,
        1,
        5,
        [CODE_OFFSET, load, load, code_len, code_len, 0x1000],
    );
    segment(&mut file, 4, 4, [NOTE_OFFSET, 0, 0, NOTE_LEN, NOTE_LEN, 4]);
    for word in [4_u32, 4, 18] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(b"Xen\0");
    file.extend_from_slice(&LOAD_ADDRESS.to_le_bytes());
    file.resize(usize::try_from(CODE_OFFSET).unwrap_or(0), 0);
    file.extend_from_slice(code);
    file
}

/// One program header.
fn segment(file: &mut Vec<u8>, kind: u32, flags: u32, fields: [u64; 6]) {
    file.extend_from_slice(&kind.to_le_bytes());
    file.extend_from_slice(&flags.to_le_bytes());
    for field in fields {
        file.extend_from_slice(&field.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_end_where_the_note_begins() {
        let file = kernel(code::RESET);
        let note = usize::try_from(NOTE_OFFSET).unwrap();
        assert_eq!(file[note..note + 4], 4_u32.to_le_bytes());
        assert_eq!(&file[note + 12..note + 16], b"Xen\0");
        assert_eq!(&file[0x1000..], code::RESET);
    }
}
