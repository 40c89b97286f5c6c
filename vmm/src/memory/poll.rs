//! Waiting for file descriptors without spinning: a safe face for `poll`.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// A file descriptor to wait for.
#[derive(Debug)]
#[repr(transparent)]
pub(super) struct Wait(libc::pollfd);

impl Wait {
    /// Waits until there is something to read.
    pub(super) fn readable(fd: RawFd) -> Self {
        Self(libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
    }

    /// Whether there is something to read.
    pub(super) fn is_readable(&self) -> bool {
        self.0.revents & libc::POLLIN != 0
    }

    /// Whether the file descriptor is broken.
    pub(super) fn is_broken(&self) -> bool {
        self.0.revents & (libc::POLLERR | libc::POLLNVAL) != 0
    }
}

/// Waits until one of the file descriptors is ready or the time is over (none: no end). A signal
/// ends the wait early, with nothing ready.
pub(super) fn wait(waits: &mut [Wait], timeout: Option<Duration>) -> io::Result<()> {
    let timeout_ms = timeout.map_or(-1, |timeout| {
        let rounded = timeout.saturating_add(Duration::from_micros(999));
        libc::c_int::try_from(rounded.as_millis()).unwrap_or(libc::c_int::MAX)
    });
    let count = libc::nfds_t::try_from(waits.len())
        .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: `Wait` is transparent over `pollfd`, so this is an array of `count` of them, ours
    // for the call.
    let ready = unsafe { libc::poll(waits.as_mut_ptr().cast(), count, timeout_ms) };
    if ready >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted {
        waits.iter_mut().for_each(|wait| wait.0.revents = 0);
        return Ok(());
    }
    Err(error)
}
