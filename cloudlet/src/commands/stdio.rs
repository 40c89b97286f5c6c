//! The standard streams, unbuffered and patient: whoever shares them with us may have made them
//! non-blocking, and a terminal or pipe that has no room for now is waited for like any other.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// One of the standard streams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stdio(BorrowedFd<'static>);

/// Standard input.
pub(crate) fn stdin() -> Stdio {
    Stdio(rustix::stdio::stdin())
}

/// Standard output.
pub(crate) fn stdout() -> Stdio {
    Stdio(rustix::stdio::stdout())
}

/// Standard error.
pub(crate) fn stderr() -> Stdio {
    Stdio(rustix::stdio::stderr())
}

impl Stdio {
    /// Does `what` until it neither has to wait nor was interrupted.
    fn patiently(
        self,
        ready: PollFlags,
        mut what: impl FnMut(BorrowedFd<'static>) -> Result<usize, Errno>,
    ) -> io::Result<usize> {
        loop {
            match what(self.0) {
                Err(Errno::AGAIN) => {
                    let mut wanted = [PollFd::from_borrowed_fd(self.0, ready)];
                    match poll(&mut wanted, None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    /// Waits until there is something to be read from `source`, or it has ended. An error if this
    /// stream, an output, takes nothing more: its reader has left.
    pub(crate) fn wait_beside(self, source: BorrowedFd<'_>) -> io::Result<()> {
        loop {
            let mut wanted = [
                PollFd::from_borrowed_fd(source, PollFlags::IN),
                PollFd::from_borrowed_fd(self.0, PollFlags::empty()),
            ];
            match poll(&mut wanted, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if wanted[1]
                .revents()
                .intersects(PollFlags::ERR | PollFlags::HUP)
            {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if !wanted[0].revents().is_empty() {
                return Ok(());
            }
        }
    }
}

impl Read for Stdio {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(PollFlags::IN, |stream| {
            rustix::io::read(stream, &mut *buffer)
        })
    }
}

impl Write for Stdio {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.patiently(PollFlags::OUT, |stream| rustix::io::write(stream, bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn leaked(stream: UnixStream) -> Stdio {
        stream.set_nonblocking(true).unwrap();
        let stream: &'static UnixStream = Box::leak(Box::new(stream));
        Stdio(stream.as_fd())
    }

    #[test]
    fn non_blocking_streams_are_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ours = leaked(ours);
        let writer = std::thread::spawn(move || {
            ours.write_all(&vec![b'x'; 4 << 20]).unwrap();
            let mut byte = [0];
            ours.read(&mut byte).unwrap()
        });
        let mut bytes = vec![0; 4 << 20];
        theirs.read_exact(&mut bytes).unwrap();
        theirs.write_all(b"y").unwrap();
        assert_eq!(writer.join().unwrap(), 1);
    }

    #[test]
    fn a_reader_that_leaves_is_noticed_in_silence() {
        let (reader, writer) = io::pipe().unwrap();
        let writer: &'static io::PipeWriter = Box::leak(Box::new(writer));
        let output = Stdio(writer.as_fd());
        let (source, mut other) = UnixStream::pair().unwrap();
        other.write_all(b"x").unwrap();
        output.wait_beside(source.as_fd()).unwrap();
        (&source).read_exact(&mut [0]).unwrap();
        drop(reader);
        let error = output.wait_beside(source.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
