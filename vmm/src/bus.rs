//! The bus: which device answers at which port or guest physical address.
//!
//! Two of these exist in a machine, one for port I/O and one for MMIO. vCPU threads call
//! [`Bus::read`] and [`Bus::write`] for each exit; devices are put on it while the machine is
//! built and stay for its life. Nothing here trusts an address: an access that no device claims is
//! answered as an empty bus would (all ones, writes dropped) and counted. On the MMIO bus a device
//! claims what lies wholly inside its range. On the port bus it claims by the first port alone: the
//! bytes of a string instruction's exit (`rep outsb`) all belong to that one port.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

/// What can be put on a bus. Offsets are relative to the start of the device's range.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`; the device fills all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on the bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// A range of no bytes, or one that ends beyond the address space.
    #[error("the range of {len:#x} bytes at {base:#x} is empty or wraps around")]
    BadRange {
        /// First address of the refused range.
        base: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Part of the range is another device's.
    #[error("the range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Its length in bytes.
        len: u64,
        /// First address of the device that is there already.
        other: u64,
    },
}

/// A device as the bus holds it.
pub type SharedBusDevice = Arc<Mutex<dyn BusDevice>>;

struct Entry {
    base: u64,
    len: u64,
    device: SharedBusDevice,
}

/// Address ranges and their devices, in address order.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
    first_byte_claims: bool,
    unclaimed: AtomicU64,
}

impl Bus {
    /// An MMIO bus without devices.
    pub fn mmio() -> Self {
        Self::default()
    }

    /// A port I/O bus without devices.
    pub fn ports() -> Self {
        Self {
            first_byte_claims: true,
            ..Self::default()
        }
    }

    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// [`BusError::BadRange`] and [`BusError::Overlap`].
    pub fn insert(&mut self, base: u64, len: u64, device: SharedBusDevice) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|above| base.checked_add(above))
            .ok_or(BusError::BadRange { base, len })?;
        let at = self.entries.partition_point(|entry| entry.base <= last);
        if let Some(before) = at.checked_sub(1).and_then(|index| self.entries.get(index))
            && before.base + (before.len - 1) >= base
        {
            return Err(BusError::Overlap {
                base,
                len,
                other: before.base,
            });
        }
        self.entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    /// Reads for the guest. Returns whether a device answered; otherwise `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((offset, entry)) = self.find(address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        lock(&entry.device).read(offset, data);
        true
    }

    /// Writes for the guest. Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, entry)) = self.find(address, data.len()) else {
            return false;
        };
        lock(&entry.device).write(offset, data);
        true
    }

    /// How many accesses no device claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// The entry that claims `len` bytes at `address`, and the offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &Entry)> {
        let found = self.lookup(address, len);
        if found.is_none() {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    fn lookup(&self, address: u64, len: usize) -> Option<(u64, &Entry)> {
        let at = self
            .entries
            .partition_point(|entry| entry.base <= address)
            .checked_sub(1)?;
        let entry = self.entries.get(at)?;
        let offset = address - entry.base;
        let claimed = if self.first_byte_claims {
            1
        } else {
            u64::try_from(len).ok()?
        };
        (offset.checked_add(claimed)? <= entry.len).then_some((offset, entry))
    }
}

/// Locks a device. A panic in a device ends the process in a release build, so a poisoned lock is
/// only ever seen by tests, where the state it guards is still of use.
fn lock(device: &SharedBusDevice) -> MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Remembers its last write and reads back its own tag.
    struct Probe {
        tag: u8,
        last: Option<(u64, Vec<u8>)>,
    }

    impl Probe {
        fn shared(tag: u8) -> Arc<Mutex<Self>> {
            Arc::new(Mutex::new(Self { tag, last: None }))
        }
    }

    impl BusDevice for Probe {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(self.tag);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.last = Some((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_holds_all_of_it() {
        let mut bus = Bus::mmio();
        let low = Probe::shared(1);
        let high = Probe::shared(2);
        bus.insert(0x1010, 0x10, high.clone()).unwrap();
        bus.insert(0x1000, 0x10, low.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x100c, &mut data));
        assert_eq!(data, [1; 4]);
        assert!(bus.write(0x1010, &[7, 8]));
        assert_eq!(high.lock().unwrap().last, Some((0, vec![7, 8])));
        assert_eq!(bus.unclaimed(), 0);
        // One that straddles two devices belongs to neither.
        assert!(!bus.read(0x100e, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0x101f, &[1, 2]));
        assert_eq!(bus.unclaimed(), 2);
        assert!(low.lock().unwrap().last.is_none());
    }

    #[test]
    fn on_the_port_bus_the_first_port_decides() {
        let mut bus = Bus::ports();
        let serial = Probe::shared(3);
        bus.insert(0x3f8, 8, serial.clone()).unwrap();
        assert!(bus.write(0x3f8, &[b'x'; 100]));
        assert_eq!(serial.lock().unwrap().last, Some((0, vec![b'x'; 100])));
        assert!(!bus.write(0x3f7, &[0; 4]));
    }

    #[test]
    fn empty_wrapping_and_overlapping_ranges_are_refused() {
        let mut bus = Bus::mmio();
        assert!(matches!(
            bus.insert(5, 0, Probe::shared(0)),
            Err(BusError::BadRange { .. })
        ));
        assert!(matches!(
            bus.insert(u64::MAX, 2, Probe::shared(0)),
            Err(BusError::BadRange { .. })
        ));
        bus.insert(0x100, 0x100, Probe::shared(0)).unwrap();
        bus.insert(u64::MAX, 1, Probe::shared(0)).unwrap();
        for (base, len) in [
            (0x100, 0x100),
            (0x80, 0x81),
            (0x1ff, 1),
            (0x150, 2),
            (0, u64::MAX),
        ] {
            assert!(
                matches!(
                    bus.insert(base, len, Probe::shared(0)),
                    Err(BusError::Overlap { .. })
                ),
                "{base:#x}+{len:#x}"
            );
        }
        bus.insert(0x80, 0x80, Probe::shared(0)).unwrap();
        bus.insert(0x200, 1, Probe::shared(0)).unwrap();
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_a_linear_search(
            ranges in prop::collection::vec((0_u64..400, 1_u64..40), 0..12),
            address in 0_u64..500,
            len in 1_usize..9,
        ) {
            let mut bus = Bus::mmio();
            let mut kept: Vec<(u64, u64, u8)> = Vec::new();
            for (index, (base, range)) in ranges.into_iter().enumerate() {
                let tag = u8::try_from(index).unwrap();
                let clash = kept.iter().any(|(b, l, _)| *b < base + range && base < b + l);
                prop_assert_eq!(bus.insert(base, range, Probe::shared(tag)).is_err(), clash);
                if !clash {
                    kept.push((base, range, tag));
                }
            }
            let mut data = vec![0xaa; len];
            let end = address + len as u64;
            let expected = kept.iter().find(|(b, l, _)| *b <= address && end <= b + l);
            prop_assert_eq!(bus.read(address, &mut data), expected.is_some());
            prop_assert_eq!(data[0], expected.map_or(0xff, |found| found.2));
        }
    }
}
