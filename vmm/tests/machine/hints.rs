//! A guest that hints its free pages when it is asked, some of which it uses again: what is given
//! back when the machine is paused, and what is not.

use std::time::{Duration, Instant};

use cloudlet_vmm::boot::Image;
use cloudlet_vmm::config::BootProtocol;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::{Machine, VIRTIO_BASE};
use cloudlet_vmm::memory::{PAGE, PAGE_BYTES, RamPage};
use vm_memory::{Bytes, GuestAddress};

use crate::common::{
    HALT, Sink, backends, config, filters, fresh_ram, kernel, power_off, run_to_end, turn_until,
};

/// The balloon is the second device.
const BALLOON: u64 = VIRTIO_BASE + 0x1000;
const TABLE: u64 = 0x20_0000;
const RING: u64 = 0x21_0000;
const AVAILABLE: u64 = RING + 0x1000;
const USED: u64 = RING + 0x2000;
const WORDS: u64 = RING + 0x3000;
/// Pages that are hinted: untouched since, written since, cleared since. The next one is not.
const CLEAN: u64 = 0x30_0000;
const WRITTEN: u64 = CLEAN + PAGE_BYTES;
const CLEARED: u64 = CLEAN + 2 * PAGE_BYTES;
const OTHER: u64 = CLEAN + 3 * PAGE_BYTES;

fn half(value: u64) -> u32 {
    u32::try_from(value).unwrap()
}

/// `mov dword [address], value`
fn store(address: u64, value: u32) -> Vec<u8> {
    [
        &[0xc7, 0x05][..],
        &half(address).to_le_bytes(),
        &value.to_le_bytes(),
    ]
    .concat()
}

/// Reads the hint command until it is `value`: mov eax, [...]; cmp eax, value; jne back
fn await_command(value: u8) -> Vec<u8> {
    let address = half(BALLOON + 0x108).to_le_bytes();
    [&[0xa1][..], &address, &[0x83, 0xf8, value, 0x75, 0xf6]].concat()
}

/// Register writes that bring the hint queue and the driver up.
fn table() -> Vec<u8> {
    let registers: [(u64, u64); 20] = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 0),
        (0x20, 1 << 3), // hinting
        (0x24, 1),
        (0x20, 1), // virtio 1
        (0x70, 11),
        (0x30, 3),
        (0x38, 8),
        (0x80, RING),
        (0x84, 0),
        (0x90, AVAILABLE),
        (0x94, 0),
        (0xa0, USED),
        (0xa4, 0),
        (0x44, 1),
        (0x70, 15),
        (0x108, 7), // not the driver's
        (0x104, 5), // actual
    ];
    let mut bytes = Vec::new();
    for (register, value) in registers {
        bytes.extend(half(BALLOON + register).to_le_bytes());
        bytes.extend(half(value).to_le_bytes());
    }
    bytes.extend([0; 8]);
    bytes
}

/// Carries out the table.
fn set_up() -> Vec<u8> {
    let mut code = vec![0xbe]; // mov esi, TABLE
    code.extend(half(TABLE).to_le_bytes());
    code.extend([
        0x8b, 0x3e, // next: mov edi, [esi]
        0x85, 0xff, // test edi, edi
        0x74, 0x0a, // jz done
        0x8b, 0x46, 0x04, // mov eax, [esi + 4]
        0x89, 0x07, // mov [edi], eax
        0x83, 0xc6, 0x08, // add esi, 8
        0xeb, 0xf0, // jmp next
    ]);
    code
}

/// Boots `code` with the table, the ring and its chains in memory.
fn boot(code: &[u8]) -> Machine {
    let config = config(BootProtocol::Pvh);
    let ram = fresh_ram(&config);
    let guest = ram.guest().clone();
    let image = kernel(code, true);
    let (kernel, sink) = (Image::Bytes(&image), Sink::default());
    let mut machine = Machine::boot(config, ram, &kernel, None, backends(&sink)).unwrap();
    let put = |at: u64, bytes: &[u8]| guest.write_slice(bytes, GuestAddress(at)).unwrap();
    put(TABLE, &table());
    // The command, the three pages as one range, the end.
    put(WORDS, &2u32.to_le_bytes());
    put(WORDS + 4, &0u32.to_le_bytes());
    let chains = [(WORDS, 4u32, 0u16), (CLEAN, 3 * 4096, 2), (WORDS + 4, 4, 0)];
    for (index, (address, len, flags)) in (0u16..).zip(chains) {
        let descriptor = RING + 16 * u64::from(index);
        put(descriptor, &address.to_le_bytes());
        put(descriptor + 8, &len.to_le_bytes());
        put(descriptor + 12, &flags.to_le_bytes());
        put(AVAILABLE + 4 + 2 * u64::from(index), &index.to_le_bytes());
    }
    for page in [CLEAN, WRITTEN, OTHER] {
        put(page, &[7; PAGE]);
    }
    put(CLEARED + 8, &[7]);
    machine.start(&filters()).unwrap();
    machine.resume().unwrap();
    turn_until(&mut machine, |machine| {
        machine.balloon().unwrap().status().actual_pages == 5
    });
    machine
}

#[test]
fn hinted_pages_that_were_not_written_since_are_given_back() {
    let code = [
        set_up(),
        await_command(2),
        store(WRITTEN, 0x0101_0101),
        store(CLEARED + 8, 0),
        store(AVAILABLE, 3 << 16),
        store(BALLOON + 0x50, 3),
        await_command(1),
        power_off(),
    ]
    .concat();
    let mut machine = boot(&code);
    let asked = Instant::now();
    let hinted = machine
        .pause_without_free_pages(Duration::from_secs(20))
        .unwrap();
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "it waited for nothing"
    );
    assert_eq!((hinted.asked, hinted.pages, hinted.discarded), (true, 3, 2));
    assert!(!machine.is_running());
    let byte = |at: u64| -> u8 { machine.ram().guest().read_obj(GuestAddress(at)).unwrap() };
    let own = machine.ram().private_pages().unwrap();
    let has = |at: u64| own.contains(RamPage(at / PAGE_BYTES));
    assert_eq!(
        [CLEAN, WRITTEN, CLEARED, OTHER].map(has),
        [false, true, false, true]
    );
    assert_eq!([CLEAN, WRITTEN, WRITTEN + 4, OTHER].map(byte), [0, 1, 7, 7]);
    assert_eq!(machine.balloon().unwrap().status().hinted_pages, 3);

    // Paused already: nobody is asked.
    let again = machine.pause_without_free_pages(Duration::from_secs(20));
    assert!(!again.unwrap().asked);
    machine.save().unwrap();
    machine.resume().unwrap();
    // The guest goes on when it sees that hinting is done.
    assert_eq!(run_to_end(&mut machine), ExitReason::Shutdown);
}

#[test]
fn a_guest_that_does_not_answer_is_paused_all_the_same() {
    let mut machine = boot(&[set_up(), HALT.to_vec()].concat());
    let hinted = machine
        .pause_without_free_pages(Duration::from_millis(100))
        .unwrap();
    assert_eq!((hinted.asked, hinted.pages, hinted.discarded), (true, 0, 0));
    assert!(!machine.is_running());
    machine.resume().unwrap();
    assert!(machine.is_running());
}
