//! The tables, parsed back.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{Ram, RamLayout};

fn hardware(virtio: u32) -> Hardware {
    Hardware {
        cpus: 3,
        serial: SerialPort {
            port: 0x3f8,
            ports: 8,
            gsi: 4,
        },
        virtio: (0..virtio)
            .map(|number| VirtioMmio {
                base: 0xd000_0000 + number * 0x1000,
                bytes: 0x1000,
                gsi: 5 + number,
            })
            .collect(),
        sleep_port: 0x606,
        sleep_type_off: 5,
        reset: (0x64, 0xfe),
        button_gsi: 1,
        generation_at: 0xcfff_f000,
        generation_gsi: 3,
    }
}

fn ram() -> Ram {
    Ram::anonymous(&RamLayout::new(16 << 20).unwrap()).unwrap()
}

fn bytes_at(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.guest()
        .read_slice(&mut bytes, GuestAddress(at))
        .unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u64_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().unwrap())
}

/// The whole table at `at`, whose checksum holds.
fn table(ram: &Ram, at: u64, signature: &[u8; 4]) -> Vec<u8> {
    let header = bytes_at(ram, at, 36);
    assert_eq!(&header[..4], signature);
    let len = u32::from_le_bytes(header[4..8].try_into().unwrap());
    let table = bytes_at(ram, at, usize::try_from(len).unwrap());
    assert_eq!(sum(&table), 0, "checksum");
    assert_eq!(&table[10..16], b"CLDLET");
    table
}

/// FADT, MADT and DSDT, found as a kernel finds them.
fn tables(ram: &Ram, rsdp: u64) -> [Vec<u8>; 3] {
    let root = bytes_at(ram, rsdp, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!((sum(&root[..20]), sum(&root), root[15]), (0, 0, 2));
    let xsdt = table(ram, u64_of(&root[24..32]), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table(ram, u64_of(&xsdt[36..44]), b"FACP");
    let madt = table(ram, u64_of(&xsdt[44..52]), b"APIC");
    let dsdt = table(ram, u64_of(&fadt[140..148]), b"DSDT");
    [fadt, madt, dsdt]
}

#[test]
fn tables_are_found_and_say_what_is_there() {
    let ram = ram();
    let rsdp = write_tables(ram.guest(), &hardware(2)).unwrap();
    assert_eq!(rsdp, 0xe_0000);
    let [fadt, madt, _] = tables(&ram, rsdp);
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    // Generic addresses: I/O space, 8 bits, byte access, the port.
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], 0xfe);
    assert_eq!(fadt[244..256], [1, 8, 0, 1, 6, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[256..268], [1, 8, 0, 1, 7, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(madt[36..40], 0xfee0_0000_u32.to_le_bytes());
    for cpu in 0..3 {
        let at = 44 + usize::from(cpu) * 8;
        assert_eq!(madt[at..at + 8], [0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    assert_eq!(madt[68..80], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(madt.len(), 80);
}

/// The resources of a device: a fixed range of memory and one edge-triggered interrupt.
fn resources(base: u32, gsi: u8) -> Vec<u8> {
    let mut bytes = vec![0x86, 9, 0, 1];
    bytes.extend(base.to_le_bytes());
    bytes.extend(0x1000_u32.to_le_bytes());
    bytes.extend([0x89, 6, 0, 3, 1, gsi, 0, 0, 0]);
    bytes
}

fn count(table: &[u8], part: &[u8]) -> usize {
    table.windows(part.len()).filter(|at| *at == part).count()
}

#[test]
fn the_dsdt_has_every_device_once() {
    for virtio in [0, 1, 19] {
        let ram = ram();
        let rsdp = write_tables(ram.guest(), &hardware(virtio)).unwrap();
        let [_, _, dsdt] = tables(&ram, rsdp);
        assert_eq!(
            count(&dsdt, b"LNRO0005\0"),
            usize::try_from(virtio).unwrap()
        );
        for number in 0..virtio {
            let gsi = u8::try_from(5 + number).unwrap();
            let part = resources(0xd000_0000 + number * 0x1000, gsi);
            assert_eq!(count(&dsdt, &part), 1, "{number}");
        }
        // PNP0501 and PNP0C0C as EISA ids, and the devices that have names.
        assert_eq!(count(&dsdt, &[0x0c, 0x41, 0xd0, 0x05, 0x01]), 1);
        assert_eq!(count(&dsdt, &[0x0c, 0x41, 0xd0, 0x0c, 0x0c]), 1);
        assert_eq!(count(&dsdt, b"ACPI0013\0"), 1);
        assert_eq!(count(&dsdt, b"_CID\x0dVM_Gen_Counter\0"), 1);
        // Where the generation id is, as two double words.
        assert_eq!(count(&dsdt, &[0x0c, 0, 0xf0, 0xff, 0xcf]), 1);
        // _S5_ with the sleep type.
        assert_eq!(count(&dsdt, b"\x08\\_S5_\x12\x07\x04\x0a\x05"), 1);
    }
}

#[test]
fn the_reset_vector_resets() {
    let ram = ram();
    write_tables(ram.guest(), &hardware(1)).unwrap();
    let mut code = [0; 16];
    let at = GuestAddress(0xf_fff0);
    ram.guest().read_slice(&mut code, at).unwrap();
    assert_eq!(code[..9], *b"\xb0\xfe\xba\x64\x00\xee\xf4\xeb\xfd");
}

#[test]
fn more_than_there_is_room_for_is_refused() {
    let refused = write_tables(ram().guest(), &hardware(4000));
    assert!(matches!(refused, Err(BootError::AcpiSpace(_))));
}
