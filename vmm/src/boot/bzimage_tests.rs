//! bzImages that are right, and bzImages that are not, loaded into memory without KVM.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::super::{BootError, Given, Kernel, layout, load};
use super::*;
use crate::config::BootProtocol;
use crate::memory::{Ram, RamLayout};

const PREFERRED: u64 = 16 << 20;
const INIT_BYTES: u32 = 4 << 20;
const KERNEL_BYTES: usize = 0x2000;

/// A kernel of two setup sectors, with `fields` (offset and bytes) put over its header.
fn file(fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut file = vec![0; 3 * 512 + KERNEL_BYTES];
    file[3 * 512..].fill(0x90);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[2]);
    put(0x1f4, &0x200u32.to_le_bytes()); // syssize, in 16 bytes
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]); // loaded high
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &[0x3f, 0]); // xloadflags
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &PREFERRED.to_le_bytes());
    put(0x260, &INIT_BYTES.to_le_bytes());
    for (at, bytes) in fields {
        put(*at, bytes);
    }
    file
}

fn ram(mib: u64) -> Ram {
    Ram::anonymous(&RamLayout::new(mib << 20).unwrap()).unwrap()
}

fn given(cmdline: &str) -> Given<'_> {
    Given {
        initrd: None,
        cmdline,
        protocol: BootProtocol::Auto,
        acpi: None,
    }
}

fn boot(file: &[u8], ram: &Ram, given: Given<'_>) -> Result<u64, BootError> {
    let image = Image::Bytes(file);
    let kernel = Kernel::open(&image)?;
    let entry = load(ram.guest(), ram.layout(), &kernel, given)?;
    assert_eq!(entry.protocol, BootProtocol::Linux64);
    Ok(entry.regs.rip)
}

fn bytes_at(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.guest()
        .read_slice(&mut bytes, GuestAddress(at))
        .unwrap();
    bytes
}

#[test]
fn a_kernel_goes_where_it_prefers_and_finds_its_header() {
    let ram = ram(32);
    let kernel = file(&[]);
    assert_eq!(
        boot(&kernel, &ram, given("a=b")).unwrap(),
        PREFERRED + 0x200
    );
    assert_eq!(
        bytes_at(&ram, PREFERRED, KERNEL_BYTES),
        [0x90; KERNEL_BYTES]
    );
    let zero_page = bytes_at(&ram, layout::ZERO_PAGE, 4096);
    // The loader's fields are ours, the others are the file's, and nothing else is there.
    assert_eq!(zero_page[0x210], 0xff);
    assert_eq!(zero_page[0x228..0x22c], 0x2_0000u32.to_le_bytes());
    for range in [0x1f1..0x210, 0x211..0x218, 0x22c..0x26c] {
        assert_eq!(zero_page[range.clone()], kernel[range]);
    }
    assert!(zero_page[..0x1e8].iter().all(|byte| *byte == 0));
    assert!(zero_page[0x26c..0x2d0].iter().all(|byte| *byte == 0));
}

#[test]
fn a_small_machine_gets_a_relocatable_kernel_lower() {
    let low = boot(&file(&[]), &ram(16), given("")).unwrap();
    assert_eq!(low, (2 << 20) + 0x200);
    let fixed = file(&[(0x234, &[0])]);
    let refused = boot(&fixed, &ram(16), given(""));
    assert!(matches!(
        refused,
        Err(BootError::BzImage(BzImageError::Memory { .. }))
    ));
    let large = file(&[(0x260, &u32::MAX.to_le_bytes())]);
    let refused = boot(&large, &ram(64), given(""));
    assert!(matches!(
        refused,
        Err(BootError::BzImage(BzImageError::Memory { .. }))
    ));
}

#[test]
fn an_initrd_stays_below_what_the_header_allows() {
    let limit = (40u32 << 20) - 1;
    let kernel = file(&[(0x22c, &limit.to_le_bytes())]);
    let ram = ram(64);
    let initrd = Image::Bytes(&[0xab; 5000]);
    let with = Given {
        initrd: Some(&initrd),
        ..given("")
    };
    boot(&kernel, &ram, with).unwrap();
    let zero_page = bytes_at(&ram, layout::ZERO_PAGE, 4096);
    let at = u32::from_le_bytes(zero_page[0x218..0x21c].try_into().unwrap());
    assert_eq!(at, (40 << 20) - 8192);
    assert_eq!(bytes_at(&ram, at.into(), 5000), [0xab; 5000]);
    // None is put over memory that the kernel unpacks itself to.
    let low = file(&[(0x22c, &((16u32 << 20) + 9000).to_le_bytes())]);
    let refused = boot(&low, &ram, with);
    assert!(matches!(refused, Err(BootError::InitrdSpace { .. })));
}

#[test]
fn a_longer_command_line_than_the_kernels_is_refused() {
    let short = file(&[(0x238, &5u32.to_le_bytes())]);
    assert!(boot(&short, &ram(32), given("12345")).is_ok());
    let refused = boot(&short, &ram(32), given("123456"));
    assert!(matches!(
        refused,
        Err(BootError::Cmdline { bytes: 6, limit: 6 })
    ));
}

#[test]
fn pvh_is_not_pretended() {
    let wanted = Given {
        protocol: BootProtocol::Pvh,
        ..given("")
    };
    let refused = boot(&file(&[]), &ram(32), wanted);
    assert!(matches!(refused, Err(BootError::NoPvhNote)));
}

#[test]
fn impossible_headers_are_refused() {
    let refused: [(&str, Vec<u8>); 8] = [
        ("protocol", file(&[(0x206, &[0x0b, 0x02])])),
        ("64-bit", file(&[(0x236, &[0x3e, 0])])),
        ("LOADED_HIGH", file(&[(0x211, &[0])])),
        ("power of two", file(&[(0x230, &[0; 4])])),
        (
            "power of two",
            file(&[(0x230, &0x30_0000u32.to_le_bytes())]),
        ),
        ("init_size", file(&[(0x260, &0x1fffu32.to_le_bytes())])),
        ("64-bit entry", file(&[(0x1f4, &0x20u32.to_le_bytes())])),
        ("kernel proper", file(&[(0x1f4, &0x201u32.to_le_bytes())])),
    ];
    for (why, kernel) in refused {
        match boot(&kernel, &ram(32), given("")) {
            Err(BootError::BzImage(error)) => {
                assert!(error.to_string().contains(why), "{why}: {error}");
            }
            other => panic!("{why}: {other:?}"),
        }
    }
    let mut cut = file(&[]);
    cut.truncate(cut.len() - 16);
    assert!(boot(&cut, &ram(32), given("")).is_err());
    cut.truncate(0x280);
    assert!(boot(&cut, &ram(32), given("")).is_err());
}

#[test]
fn a_header_of_an_older_protocol_has_no_more_than_it_says() {
    // The header ends before `handover_offset`; what lies there is code.
    let kernel = file(&[(0x201, &[0x62]), (0x264, &[0xcc; 8])]);
    let ram = ram(32);
    boot(&kernel, &ram, given("")).unwrap();
    let zero_page = bytes_at(&ram, layout::ZERO_PAGE, 4096);
    assert_eq!(zero_page[0x264..0x26c], [0; 8]);
}

proptest! {
    #[test]
    fn no_header_breaks_the_loader(
        changes in prop::collection::vec((0x1f0usize..0x270, any::<u8>()), 0..12),
        cut in 0usize..3 * 512 + KERNEL_BYTES + 1,
    ) {
        let mut kernel = file(&[]);
        for (at, byte) in changes {
            kernel[at] = byte;
        }
        kernel.truncate(cut.max(0x300));
        let ram = ram(24);
        // Either it loads, inside RAM, or it says why not.
        if let Ok(entry) = boot(&kernel, &ram, given("quiet"))
            && kernel[0x1fe..0x200] == [0x55, 0xaa]
            && &kernel[0x202..0x206] == b"HdrS"
        {
            prop_assert!(((1 << 20) + 0x200..24 << 20).contains(&entry));
        }
    }
}
