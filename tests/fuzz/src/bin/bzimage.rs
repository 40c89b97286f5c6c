//! Kernels, bzImage and ELF: loaded inside RAM and entered inside RAM, or refused.
//!
//! The input is the kernel file; once more with the words of a setup header that the loader looks
//! at first, so that what is behind them is reached.

#![no_main]

use cloudlet_vmm::boot::{Given, Image, Kernel, load};
use cloudlet_vmm::config::BootProtocol;
use cloudlet_vmm::memory::{Ram, RamLayout};
use libfuzzer_sys::fuzz_target;

const RAM_BYTES: u64 = 24 << 20;

thread_local! {
    static RAM: Ram = {
        let layout = RamLayout::new(RAM_BYTES).expect("a good size");
        Ram::anonymous(&layout).expect("memory")
    };
}

fuzz_target!(|data: &[u8]| {
    try_kernel(data);
    let mut kernel = data.to_vec();
    if kernel.len() >= 0x290 {
        kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        kernel[0x207] = 2;
        kernel[0x211] |= 1;
        kernel[0x236] |= 1;
        try_kernel(&kernel);
    }
});

fn try_kernel(bytes: &[u8]) {
    let image = Image::Bytes(bytes);
    let Ok(kernel) = Kernel::open(&image) else {
        return;
    };
    let given = Given {
        initrd: Some(&Image::Bytes(&[1; 100])),
        cmdline: "quiet",
        protocol: BootProtocol::Auto,
        acpi: None,
    };
    RAM.with(|ram| {
        if let Ok(entry) = load(ram.guest(), ram.layout(), &kernel, given) {
            assert!((0x1000..RAM_BYTES).contains(&entry.regs.rip));
        }
    });
}
