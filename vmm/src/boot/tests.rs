//! Kernels that are right, and kernels that are not, loaded into memory without KVM.

use proptest::prelude::*;

use super::*;
use crate::memory::Ram;

const LOAD_ADDRESS: u64 = 0x10_0000;

struct KernelSpec {
    at: u64,
    memory_bytes: u64,
    entry: u64,
    note: Option<Vec<u8>>,
    note_align: u64,
}

impl Default for KernelSpec {
    fn default() -> Self {
        KernelSpec {
            at: LOAD_ADDRESS,
            memory_bytes: 0x3000,
            entry: LOAD_ADDRESS,
            note: None,
            note_align: 4,
        }
    }
}

fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
    let mut note = [len(name), len(descriptor), kind.to_le_bytes()].concat();
    note.extend(name);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(descriptor);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

fn kernel(spec: &KernelSpec) -> Vec<u8> {
    let mut elf = vec![0; 64 + 2 * 56];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let put = |elf: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        elf[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(&mut elf, 16, &2u16.to_le_bytes());
    put(&mut elf, 18, &62u16.to_le_bytes());
    put(&mut elf, 24, &spec.entry.to_le_bytes());
    put(&mut elf, 32, &64u64.to_le_bytes());
    put(&mut elf, 54, &56u16.to_le_bytes());
    put(&mut elf, 56, &2u16.to_le_bytes());
    let note_bytes = spec.note.clone().unwrap_or_default();
    let note_len = u64::try_from(note_bytes.len()).unwrap();
    let header = |kind: u32, fields: [u64; 6]| {
        let mut bytes = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
        fields
            .iter()
            .for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes
    };
    let code_at = 176 + note_len;
    let load = header(1, [code_at, spec.at, spec.at, 16, spec.memory_bytes, 4096]);
    let kind = if spec.note.is_some() { 4 } else { 0 };
    let notes = header(kind, [176, 0, 0, note_len, note_len, spec.note_align]);
    put(&mut elf, 64, &load);
    put(&mut elf, 120, &notes);
    elf.extend(note_bytes);
    elf.extend([0x90; 16]);
    elf
}

fn ram(mib: u64) -> Ram {
    Ram::anonymous(&RamLayout::new(mib << 20).unwrap()).unwrap()
}

fn load_into(ram: &Ram, elf: &[u8], protocol: BootProtocol) -> Result<Entry, BootError> {
    load_with(ram, &Image::Bytes(elf), None, "console=ttyS0", protocol)
}

fn load_with(
    ram: &Ram,
    kernel: &Image<'_>,
    initrd: Option<&Image<'_>>,
    cmdline: &str,
    protocol: BootProtocol,
) -> Result<Entry, BootError> {
    let given = Given {
        initrd,
        cmdline,
        protocol,
        acpi: None,
    };
    load(ram.guest(), ram.layout(), &Kernel::open(kernel)?, given)
}

fn bytes_at(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.guest()
        .read_slice(&mut bytes, GuestAddress(at))
        .unwrap();
    bytes
}

fn word_at(ram: &Ram, at: u64) -> u64 {
    u64::from_le_bytes(bytes_at(ram, at, 8).try_into().unwrap())
}

#[test]
fn the_note_is_found_among_others() {
    let xen = note(b"Xen\0", 18, &0x10_0040u32.to_le_bytes());
    let others = [
        note(b"GNU\0", 3, &[7; 20]),
        note(b"Xen\0", 5, b"linux\0"),
        note(b"Xenon\0", 18, &[1; 4]),
        xen.clone(),
        note(b"Xen\0", 18, &[9; 4]),
    ];
    for (note, found) in [
        (others.concat(), true),
        (xen, true),
        (note(b"Xen\0", 18, &[1, 2]), false),
        (vec![0xff; 40], false),
        (Vec::new(), false),
    ] {
        let spec = KernelSpec {
            note: Some(note),
            ..KernelSpec::default()
        };
        let entry = load_into(&ram(16), &kernel(&spec), BootProtocol::Auto).unwrap();
        if found {
            assert_eq!(
                (entry.protocol, entry.regs.rip),
                (BootProtocol::Pvh, 0x10_0040)
            );
        } else {
            assert_eq!(
                (entry.protocol, entry.regs.rip),
                (BootProtocol::Linux64, LOAD_ADDRESS)
            );
        }
    }
}

#[test]
fn pvh_structures_say_what_is_there() {
    let ram = ram(4096);
    let spec = KernelSpec {
        note: Some(note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes())),
        ..KernelSpec::default()
    };
    let elf = kernel(&spec);
    let initrd = [0xabu8; 5000];
    let entry = load_with(
        &ram,
        &Image::Bytes(&elf),
        Some(&Image::Bytes(&initrd)),
        "a=b",
        BootProtocol::Pvh,
    )
    .unwrap();
    assert_eq!(entry.regs.rbx, layout::PVH_START_INFO);
    let info = layout::PVH_START_INFO;
    assert_eq!(word_at(&ram, info), 0x0000_0001_336e_c578);
    assert_eq!(word_at(&ram, info + 8) >> 32, 1, "one module");
    assert_eq!(bytes_at(&ram, word_at(&ram, info + 24), 4), b"a=b\0");
    let module = word_at(&ram, info + 16);
    let (at, bytes) = (word_at(&ram, module), word_at(&ram, module + 8));
    assert_eq!((bytes, at % 4096), (5000, 0));
    assert!(at + bytes <= 3 << 30 && at + bytes > (3 << 30) - 8192);
    assert_eq!(bytes_at(&ram, at, 5000), initrd);
    let map = word_at(&ram, info + 40);
    assert_eq!(word_at(&ram, info + 48), 4);
    let ranges: Vec<(u64, u64, u64)> = (0..4)
        .map(|i| map + i * 24)
        .map(|at| {
            (
                word_at(&ram, at),
                word_at(&ram, at + 8),
                word_at(&ram, at + 16),
            )
        })
        .collect();
    assert_eq!(
        ranges,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (1 << 20, (3 << 30) - (1 << 20), 1),
            (4 << 30, 1 << 30, 1)
        ]
    );
    let mut sregs = kvm_sregs::default();
    entry.apply(&mut sregs);
    assert_eq!((sregs.cr0 & (1 << 31), sregs.cs.db, sregs.cs.l), (0, 1, 0));
}

#[test]
fn linux_structures_say_what_is_there() {
    let ram = ram(16);
    let entry = load_into(&ram, &kernel(&KernelSpec::default()), BootProtocol::Linux64).unwrap();
    assert_eq!(
        (entry.regs.rip, entry.regs.rsi),
        (LOAD_ADDRESS, layout::ZERO_PAGE)
    );
    let zero_page = bytes_at(&ram, layout::ZERO_PAGE, 4096);
    assert_eq!(zero_page[0x1fe..0x200], [0x55, 0xaa]);
    assert_eq!(&zero_page[0x202..0x206], b"HdrS");
    assert_eq!(zero_page[0x228..0x22c], 0x2_0000u32.to_le_bytes());
    assert_eq!(zero_page[0x1e8], 3);
    assert_eq!(
        zero_page[0x2d0 + 40..0x2d0 + 48],
        (1u64 << 20).to_le_bytes()
    );
    assert_eq!(
        zero_page[0x2d0 + 48..0x2d0 + 56],
        (15u64 << 20).to_le_bytes()
    );
    // Walk the page tables to the last byte below 4 GiB.
    let pdpt = word_at(&ram, layout::PML4) & !0xfff;
    let directory = word_at(&ram, pdpt + 3 * 8) & !0xfff;
    assert_eq!(word_at(&ram, directory + 511 * 8), 0xffe0_0083);
    let mut sregs = kvm_sregs::default();
    entry.apply(&mut sregs);
    assert_eq!(
        (sregs.cs.selector, sregs.cs.l, sregs.ds.selector),
        (0x10, 1, 0x18)
    );
    // What the segment registers say is what the table says.
    assert_eq!(word_at(&ram, layout::GDT + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(word_at(&ram, layout::GDT + 0x18), 0x00cf_9300_0000_ffff);
}

#[test]
fn kernels_from_files_load_like_embedded_ones() {
    use std::io::Write;
    let elf = kernel(&KernelSpec::default());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    let ram = ram(16);
    load_with(&ram, &Image::File(&file), None, "", BootProtocol::Auto).unwrap();
    assert_eq!(bytes_at(&ram, LOAD_ADDRESS, 16), [0x90; 16]);
}

#[test]
fn impossible_kernels_are_refused() {
    let place = |at, memory_bytes| KernelSpec {
        at,
        memory_bytes,
        entry: at,
        ..Default::default()
    };
    for spec in [
        place(0, 0x1000),
        place(layout::PML4, 0x1000),
        place(layout::CMDLINE, 0x1000),
        place(0x9_f000, 0x1000),
        place(0xf_f000, 0x2000),
        place(16 << 20, 0x1000),
        place((16 << 20) - 0x1000, 0x2000),
        place(u64::MAX - 0x1000, 0x2000),
        place(LOAD_ADDRESS, 8),
        place(LOAD_ADDRESS, 0),
        KernelSpec {
            entry: 5,
            ..Default::default()
        },
    ] {
        let result = load_into(&ram(16), &kernel(&spec), BootProtocol::Auto);
        assert!(matches!(result, Err(BootError::Elf(_))), "{:#x}", spec.at);
    }
    let pvh = load_into(&ram(16), &kernel(&KernelSpec::default()), BootProtocol::Pvh);
    assert!(matches!(pvh, Err(BootError::NoPvhNote)));
}

#[test]
fn what_does_not_fit_is_refused() {
    let elf = kernel(&KernelSpec::default());
    let ram = ram(16);
    let initrd = vec![0; 15 << 20];
    let (kernel, initrd) = (Image::Bytes(&elf), Image::Bytes(&initrd));
    let auto = BootProtocol::Auto;
    let result = load_with(&ram, &kernel, Some(&initrd), "", auto);
    assert!(matches!(result, Err(BootError::InitrdSpace { .. })));
    let long = "x".repeat(4096);
    let result = load_with(&ram, &kernel, None, &long, auto);
    assert!(matches!(
        result,
        Err(BootError::Cmdline { bytes: 4096, .. })
    ));
}

proptest! {
    #[test]
    fn no_damage_makes_a_kernel_panic(
        at in 0usize..220,
        byte in any::<u8>(),
        cut in 0usize..240,
    ) {
        let spec = KernelSpec {
            note: Some(note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes())),
            ..KernelSpec::default()
        };
        let mut elf = kernel(&spec);
        if let Some(slot) = elf.get_mut(at) {
            *slot = byte;
        }
        let ram = ram(16);
        // Either it loads or it says why not.
        let _ = load_into(&ram, &elf, BootProtocol::Auto);
        elf.truncate(cut);
        let _ = load_into(&ram, &elf, BootProtocol::Auto);
    }
}
