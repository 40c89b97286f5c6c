//! What the loader left in memory: the command line and the memory map, from the PVH start info or
//! the Linux boot_params page. Read once, before the heap is handed out.

/// At most this many RAM ranges are used.
pub const RANGES_MAX: usize = 8;
const CMDLINE_MAX: usize = 2048;
const PVH_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;

/// A range of RAM, `start` to `end` exclusive.
#[derive(Clone, Copy, Default)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

/// The loader's information, copied out.
pub struct BootInfo {
    cmdline: [u8; CMDLINE_MAX],
    cmdline_len: usize,
    ranges: [Range; RANGES_MAX],
    count: usize,
}

/// # Safety
/// `address` is readable memory for a `T`.
unsafe fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's promise.
    unsafe { (address as *const T).read_unaligned() }
}

impl BootInfo {
    /// Reads the loader's structures. `linux` tells which of the two protocols was used.
    ///
    /// # Safety
    /// `info` is what the loader passed in the register that the protocol names.
    pub unsafe fn read(linux: bool, info: u64) -> BootInfo {
        let mut boot = BootInfo {
            cmdline: [0; CMDLINE_MAX],
            cmdline_len: 0,
            ranges: [Range::default(); RANGES_MAX],
            count: 0,
        };
        // SAFETY: offsets of struct hvm_start_info (xen/interface/hvm/start_info.h) and of struct
        // boot_params (asm/bootparam.h); the loader filled them in.
        unsafe {
            let cmdline = if linux {
                for i in 0..u64::from(peek::<u8>(info + 0x1e8)) {
                    let entry = info + 0x2d0 + i * 20;
                    boot.add(peek(entry), peek(entry + 8), peek(entry + 16));
                }
                u64::from(peek::<u32>(info + 0x228))
            } else if peek::<u32>(info) == PVH_MAGIC {
                if peek::<u32>(info + 4) >= 1 {
                    let table: u64 = peek(info + 40);
                    for i in 0..u64::from(peek::<u32>(info + 48)) {
                        let entry = table + i * 24;
                        boot.add(peek(entry), peek(entry + 8), peek(entry + 16));
                    }
                }
                peek(info + 24)
            } else {
                0
            };
            if cmdline != 0 {
                while boot.cmdline_len < CMDLINE_MAX {
                    let byte: u8 = peek(cmdline + boot.cmdline_len as u64);
                    if byte == 0 {
                        break;
                    }
                    boot.cmdline[boot.cmdline_len] = byte;
                    boot.cmdline_len += 1;
                }
            }
        }
        boot
    }

    fn add(&mut self, start: u64, len: u64, kind: u32) {
        if kind == E820_RAM && self.count < RANGES_MAX && len > 0 {
            self.ranges[self.count] = Range {
                start,
                end: start.saturating_add(len),
            };
            self.count += 1;
        }
    }

    /// The command line; empty if there is none or it is not text.
    pub fn cmdline(&self) -> &str {
        core::str::from_utf8(&self.cmdline[..self.cmdline_len]).unwrap_or("")
    }

    /// The RAM ranges of the memory map.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges[..self.count]
    }
}

/// Parses a decimal or 0x number.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// A virtio-mmio device named on the command line.
#[derive(Clone, Copy)]
pub struct MmioDevice {
    pub base: usize,
    pub pin: u32,
}

/// The devices of `virtio_mmio.device=SIZE@BASE:IRQ[:ID]` words, in order.
pub fn mmio_devices(cmdline: &str) -> impl Iterator<Item = MmioDevice> {
    cmdline.split_ascii_whitespace().filter_map(|word| {
        let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?;
        let mut parts = place.split(':');
        let base = usize::try_from(number(parts.next()?)?).ok()?;
        let pin = u32::try_from(number(parts.next()?)?).ok()?;
        (base % 4 == 0 && base < 0x1_0000_0000 && pin < 24).then_some(MmioDevice { base, pin })
    })
}
