//! The unikernel's runtime. Everything but boot.s runs in CPL 3, so at the processor's own speed on
//! every kind of KVM. This file: the way in, the way out, and the order of things at boot.
#![no_std]
#![no_main]

extern crate alloc;

use core::arch::global_asm;
use core::panic::PanicInfo;

mod bootinfo;
mod console;
mod cpu;
#[path = "../shared/heap.rs"]
mod heap;
mod irq;
#[path = "../shared/mem.rs"]
mod mem;

global_asm!(include_str!("boot.s"));

/// Applications are linked here.
const APP_BASE: u64 = 0x100_0000;

#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();

/// CPL 3 starts here; `linux` and `info` are as boot.s found them.
#[unsafe(no_mangle)]
extern "C" fn user_start(linux: u32, info: u64) -> ! {
    say!("cloudlet-guest {} starting", env!("GUEST_VERSION"));
    // SAFETY: boot.s passes on what the loader gave it.
    let boot = unsafe { bootinfo::BootInfo::read(linux != 0, info) };
    let mut clock = irq::Clock::start();
    let top = boot
        .ranges()
        .iter()
        .find(|r| r.start <= 0x10_0000 && r.end > 0x20_0000);
    let Some(top) = top else {
        panic!("no memory at 2 MiB")
    };
    // SAFETY: RAM above the image and below the application's place; the loader's structures have
    // been read.
    unsafe {
        HEAP.add(
            0x20_0000,
            usize::try_from(top.end.min(APP_BASE)).unwrap_or(0),
        )
    };
    say!("heap {} bytes", HEAP.usage().1);
    for device in bootinfo::mmio_devices(boot.cmdline()) {
        irq::enable_pin(device.pin);
        say!("device {:#x} pin {}", device.base, device.pin);
    }
    say!("cloudlet-guest: ready");
    loop {
        cpu::clear_seen();
        cpu::wait();
        say!("tick {} {}", cpu::ticks(), clock.now());
    }
}

/// A fault, reported by the path that boot.s prepares; then the machine ends.
#[unsafe(no_mangle)]
extern "C" fn user_fault() -> ! {
    let f = cpu::fault();
    say!(
        "cloudlet-guest: fault: vector {} error {:#x} rip {:#x} cs {:#x} rsp {:#x} cr2 {:#x}",
        f.vector,
        f.error,
        f.rip,
        f.cs,
        f.rsp,
        f.cr2
    );
    cpu::reset()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    say!("cloudlet-guest: {info}");
    cpu::reset()
}
