//! Frames over a socket.
//!
//! All sockets are handled as [`UnixStream`], also those of vsock: what is done with them is what any
//! stream socket does, and the standard library asks for no address of theirs.
//!
//! [`UnixStream`]: std::os::unix::net::UnixStream

use std::io::{self, Read, Write};

use crate::protocol::{self, Decoder, Frame, Reply, Request};

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The other side closed it.
    #[error("the connection ended")]
    Ended,
    /// The other side sent nonsense.
    #[error("the agent's protocol was not kept")]
    Protocol(#[from] protocol::Error),
}

/// Frames that come in.
#[derive(Debug)]
pub struct Incoming<R> {
    source: R,
    decoder: Decoder,
}

impl<R: Read> Incoming<R> {
    /// Frames from `source`.
    pub fn new(source: R) -> Self {
        let decoder = Decoder::default();
        Self { source, decoder }
    }

    /// Source and decoder, which may hold bytes already.
    pub fn into_parts(self) -> (R, Decoder) {
        (self.source, self.decoder)
    }

    /// The source, for what comes before the first frame.
    pub fn source(&mut self) -> &mut R {
        &mut self.source
    }

    /// The next frame; waits for it.
    ///
    /// # Errors
    /// When the source fails or ends, or sends what is no frame.
    pub fn frame(&mut self) -> Result<Frame<'_>, Error> {
        while !self.decoder.has_frame()? {
            match self.decoder.fill(&mut self.source) {
                Ok(0) => return Err(Error::Ended),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.decoder.next_frame()?.expect("it was just looked for"))
    }

    /// The next frame as a request.
    ///
    /// # Errors
    /// As [`Incoming::frame`]; or when it is none.
    pub fn request(&mut self) -> Result<Request<'_>, Error> {
        Ok(Request::decode(self.frame()?)?)
    }

    /// The next frame as a reply.
    ///
    /// # Errors
    /// As [`Incoming::frame`]; or when it is none.
    pub fn reply(&mut self) -> Result<Reply<'_>, Error> {
        Ok(Reply::decode(self.frame()?)?)
    }
}

/// Frames that go out, each written whole.
#[derive(Debug)]
pub struct Outgoing<W> {
    sink: W,
    bytes: Vec<u8>,
}

impl<W: Write> Outgoing<W> {
    /// Frames to `sink`.
    pub fn new(sink: W) -> Self {
        let bytes = Vec::new();
        Self { sink, bytes }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When it is too long, or the sink fails.
    pub fn request(&mut self, request: &Request<'_>) -> Result<(), Error> {
        self.bytes.clear();
        request.encode(&mut self.bytes)?;
        Ok(self.sink.write_all(&self.bytes)?)
    }

    /// Sends a reply.
    ///
    /// # Errors
    /// When it is too long, or the sink fails.
    pub fn reply(&mut self, reply: &Reply<'_>) -> Result<(), Error> {
        self.bytes.clear();
        reply.encode(&mut self.bytes)?;
        Ok(self.sink.write_all(&self.bytes)?)
    }
}
