//! virtio-rng (virtio 1.2, section 5.4): random bytes from the host, asked for when they are needed.

use alloc::boxed::Box;

use crate::virtio::{Device, Part, Queue};

const CHUNK: usize = 64;

/// The entropy device.
pub struct Rng {
    device: Device,
    queue: Queue,
    buffer: Box<[u8; CHUNK]>,
}

impl Rng {
    /// Takes over the device.
    pub fn new(device: Device) -> Rng {
        device.negotiate(0);
        let queue = device.queue(0);
        device.start();
        Rng {
            device,
            queue,
            buffer: Box::new([0; CHUNK]),
        }
    }

    /// Fills `out` with random bytes. Those that were on their way when the machine was saved are not
    /// used: each of its clones got the same.
    pub fn fill(&mut self, mut out: &mut [u8]) {
        while !out.is_empty() {
            let machine = self.device.generation();
            let want = out.len().min(CHUNK);
            self.queue
                .push(&[Part::write(self.buffer.as_mut_ptr(), want)]);
            self.queue.kick();
            let (_, got) = self.queue.wait(&self.device);
            let moved = self.device.generation() != machine;
            let got = if moved { 0 } else { got.min(want) };
            out[..got].copy_from_slice(&self.buffer[..got]);
            self.buffer.fill(0);
            out = &mut out[got..];
        }
    }
}
