//! A TCP connection, plain or with TLS, whose reads end at a deadline. The client and the server
//! both use it: with rustls' own stream a peer could send a record byte by byte, and each byte
//! would start the socket's timeout anew.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::ops::DerefMut;
use std::sync::Arc;
use std::time::Instant;

use rustls::{ConnectionCommon, SideData};

/// Bytes read from the socket at once; rustls alone would ask for 4 KiB.
const TLS_READ_BYTES: usize = 64 * 1024;

/// See the module's description. `C` is rustls' client or server connection.
pub(crate) enum Transport<C> {
    Plain(Socket),
    Tls(Box<Tls<C>>),
}

/// A socket that somebody else can shut down meanwhile.
pub(crate) struct Socket(Arc<TcpStream>);

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buf)
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (&*self.0).write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self.0).flush()
    }
}

/// A connection with TLS.
pub(crate) struct Tls<C> {
    session: C,
    socket: BufReader<Socket>,
}

impl<C, S> Transport<C>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    pub(crate) fn plain(socket: Arc<TcpStream>) -> Transport<C> {
        Transport::Plain(Socket(socket))
    }

    pub(crate) fn tls(session: C, socket: Arc<TcpStream>) -> Transport<C> {
        let socket = BufReader::with_capacity(TLS_READ_BYTES, Socket(socket));
        Transport::Tls(Box::new(Tls { session, socket }))
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Transport::Plain(socket) => &socket.0,
            Transport::Tls(tls) => &tls.socket.get_ref().0,
        }
    }

    /// Completes the TLS handshake, if there is to be one.
    ///
    /// # Errors
    /// The socket's, `TimedOut` at the deadline, `UnexpectedEof`, or a wrapped [`rustls::Error`].
    pub(crate) fn shake_hands(&mut self, end: Instant) -> io::Result<()> {
        if let Transport::Tls(tls) = self {
            tls.flush()?;
            while tls.session.is_handshaking() {
                tls.receive(end)?;
                tls.flush()?;
            }
        }
        Ok(())
    }

    /// Reads at least one byte, or none at the end of the connection.
    ///
    /// # Errors
    /// As [`Transport::shake_hands`]; the end without TLS' good-bye is `UnexpectedEof`.
    pub(crate) fn read(&mut self, buf: &mut [u8], end: Instant) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => loop {
                set_deadline(&socket.0, end)?;
                match socket.read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => return other,
                }
            },
            Transport::Tls(tls) => loop {
                match tls.session.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                tls.flush()?;
                tls.receive(end)?;
            },
        }
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Transport::Plain(socket) => socket.write_all(bytes),
            Transport::Tls(tls) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let count = tls.session.writer().write(rest)?;
                    rest = &rest[count..];
                    tls.flush()?;
                }
                Ok(())
            }
        }
    }

    /// Says good-bye, as TLS asks for.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if let Transport::Tls(tls) = self {
            tls.session.send_close_notify();
            tls.flush()?;
        }
        Ok(())
    }
}

impl<C, S> Tls<C>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(self.socket.get_mut())?;
        }
        Ok(())
    }

    /// Takes in what the peer sent.
    fn receive(&mut self, end: Instant) -> io::Result<()> {
        loop {
            if self.socket.buffer().is_empty() {
                set_deadline(&self.socket.get_ref().0, end)?;
            }
            match self.socket.fill_buf() {
                Ok([]) if self.session.is_handshaking() => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            self.session.read_tls(&mut self.socket)?;
            break;
        }
        match self.session.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => {
                // The alert says why; whether it arrives changes nothing here.
                let _ = self.flush();
                Err(io::Error::new(io::ErrorKind::InvalidData, error))
            }
        }
    }
}

/// Has the next read end at `end`.
fn set_deadline(socket: &TcpStream, end: Instant) -> io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    socket.set_read_timeout(Some(left))
}
