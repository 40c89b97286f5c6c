//! Filling a request with random bytes.

use std::io;

use vm_memory::bitmap::Bitmap;

use crate::devices::virtio::buffers::{Buffers, slice};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{DeviceError, DeviceIo, GuestRam};

/// The one queue, where the driver puts buffers to fill.
pub(super) const REQUEST_QUEUE: usize = 0;
/// Bytes given for one request at most; the driver asks again for more. A chain of overlapping
/// buffers could ask for 4 GiB.
pub(super) const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    chain: Chain,
}

impl Rng {
    /// A device that draws from the host's kernel.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers up to `chains_max` requests; false if there may be more.
    pub(super) fn serve(
        &mut self,
        io: &mut DeviceIo<'_>,
        chains_max: u32,
    ) -> Result<bool, DeviceError> {
        let Some(queue) = io.queues.get_mut(REQUEST_QUEUE) else {
            return Ok(true);
        };
        let broken = DeviceError::queue;
        for _ in 0..chains_max {
            if !queue
                .pop(io.guest, &mut self.chain)
                .map_err(broken(REQUEST_QUEUE))?
            {
                return Ok(true);
            }
            let filled =
                fill(io.guest, &self.chain.writable).map_err(DeviceError::host("getrandom"))?;
            queue
                .push_used(io.guest, &self.chain, filled)
                .map_err(broken(REQUEST_QUEUE))?;
        }
        Ok(false)
    }
}

/// Puts random bytes into the first [`REQUEST_BYTES_MAX`] bytes of `buffers`.
fn fill(guest: &GuestRam, buffers: &Buffers) -> io::Result<usize> {
    let mut filled = 0;
    for piece in buffers.range(0, REQUEST_BYTES_MAX) {
        let slice = slice(guest, piece).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut done = 0;
        while done < slice.len() {
            let rest = slice
                .offset(done)
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: `rest` is a part of a slice that vm-memory checked to lie in one mapped
            // region, whose mapping outlives the borrow of `guest`; no Rust reference into guest
            // RAM exists, and the kernel may write to it as the guest itself may.
            let result =
                unsafe { libc::getrandom(rest.ptr_guard_mut().as_ptr().cast(), rest.len(), 0) };
            match usize::try_from(result) {
                Ok(count) => {
                    rest.bitmap().mark_dirty(0, count);
                    done += count;
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        filled += done;
    }
    Ok(filled)
}
