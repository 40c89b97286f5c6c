//! The unikernel's runtime. Everything but boot.s runs in CPL 3, so at the processor's own speed on
//! every kind of KVM. This file: the way in, the way out, and the order of things at boot.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::arch::global_asm;
use core::panic::PanicInfo;

use shared::abi::Services;
use shared::heap::Heap;
use shared::protocol::PORT;

mod app;
mod block;
mod bootinfo;
mod console;
mod cpu;
mod host;
mod irq;
mod memory;
mod peers;
mod rng;
mod server;
mod store;
mod virtio;
mod vsock;

global_asm!(include_str!("boot.s"));

#[global_allocator]
static HEAP: Heap = Heap::new();

static mut SERVICES: Services = host::services();

const DEVICE_BLOCK: u32 = 2;
const DEVICE_RNG: u32 = 4;
const DEVICE_VSOCK: u32 = 19;

/// CPL 3 starts here; `linux` and `info` are as boot.s found them.
#[unsafe(no_mangle)]
extern "C" fn user_start(linux: u32, info: u64) -> ! {
    say!("cloudlet-guest {}", env!("GUEST_VERSION"));
    // SAFETY: boot.s passes on what the loader gave it.
    let boot = unsafe { bootinfo::BootInfo::read(linux != 0, info) };
    let Some(plan) = memory::plan(boot.ranges()) else {
        panic!("no memory above 2 MiB")
    };
    // SAFETY: RAM above the image and below applications; the loader's structures have been copied.
    unsafe { HEAP.add(plan.heap.start, plan.heap.end) };
    memory::map_high(plan.space.high);
    let clock = irq::Clock::start();

    let (mut rng, mut vsock, mut disks) = (None, None, Vec::new());
    for place in bootinfo::mmio_devices(boot.cmdline()) {
        let Some(device) = virtio::Device::probe(place) else {
            continue;
        };
        match device.id {
            DEVICE_RNG if rng.is_none() => rng = Some(rng::Rng::new(device)),
            DEVICE_VSOCK if vsock.is_none() => vsock = Some(vsock::Vsock::new(device, PORT)),
            DEVICE_BLOCK => disks.push(block::Disk::new(device)),
            id => say!("cloudlet-guest: no driver for virtio device {id}"),
        }
    }
    let found = (rng.is_some(), vsock.is_some(), disks.len());
    host::set_up(clock, rng);
    say!(
        "cloudlet-guest: {} MiB, rng {}, vsock {}, disks {}",
        plan.total >> 20,
        found.0,
        found.1,
        found.2
    );
    // SAFETY: the only reference to it, made once.
    let services = unsafe { &mut *(&raw mut SERVICES) };
    let server = server::Server::new(vsock, disks, plan.space, plan.total, services);
    say!("cloudlet-guest: ready");
    server.run()
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
