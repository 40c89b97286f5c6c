//! The host's side of the control protocol, over any byte stream.

use std::io::{self, Read, Write};

use crate::hash::hash;
use crate::protocol::{Frame, FrameError, HEADER_LEN, Header, Install, Kind};

/// Longest line of the vsock handshake.
const HANDSHAKE_MAX: usize = 64;

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The stream failed, or ended too early.
    #[error("the connection to the guest failed")]
    Io(#[from] io::Error),
    /// A frame was wrong or over a limit.
    #[error("the guest's protocol was not kept")]
    Frame(#[from] FrameError),
    /// The guest answered with an error: its words.
    #[error("the guest refused: {0}")]
    Refused(String),
    /// The guest answered with something that is no answer.
    #[error("the guest answered with a {0:?} frame")]
    Unexpected(Kind),
    /// The VM's socket did not connect us to the guest: what it said.
    #[error("the VM's vsock socket answered {0:?} to a connect")]
    Handshake(String),
}

/// Asks a VM's vsock socket for a connection to the guest's `port`; afterwards `stream` is that.
///
/// # Errors
/// When the stream fails or the other side does not say `OK`. Where nobody listens in the guest it
/// says nothing.
pub fn shake_hands(stream: &mut (impl Read + Write), port: u32) -> Result<(), ClientError> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') && line.len() < HANDSHAKE_MAX {
        // Byte by byte: what follows the line belongs to the connection.
        if stream.read(&mut byte)? == 0 {
            break;
        }
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line);
    if line.starts_with("OK ") && line.ends_with('\n') {
        Ok(())
    } else {
        Err(ClientError::Handshake(line.into_owned()))
    }
}

/// An answer of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// The attachment; empty if there is none.
    pub blob: Vec<u8>,
}

/// A connection to the guest.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
}

impl<S: Read + Write> Client<S> {
    /// A client over a stream that already leads to the guest's port.
    pub fn new(stream: S) -> Client<S> {
        Client { stream }
    }

    /// A client over a VM's vsock socket: asks for a connection to the guest's `port` first.
    ///
    /// # Errors
    /// When the stream fails or the other side does not say `OK`.
    pub fn connect(mut stream: S, port: u32) -> Result<Client<S>, ClientError> {
        shake_hands(&mut stream, port)?;
        Ok(Client { stream })
    }

    /// The stream underneath.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    fn send(&mut self, frame: &Frame) -> Result<(), ClientError> {
        Ok(self.stream.write_all(&frame.encode()?)?)
    }

    fn receive(&mut self) -> Result<Answer, ClientError> {
        let mut head = [0; HEADER_LEN];
        self.stream.read_exact(&mut head)?;
        let header = Header::decode(&head)?;
        let mut text = vec![0; header.text_len()];
        self.stream.read_exact(&mut text)?;
        let mut blob = vec![0; header.blob_len()];
        self.stream.read_exact(&mut blob)?;
        let text = String::from_utf8(text).map_err(|_| FrameError::TextEncoding)?;
        match header.kind {
            Kind::Ok => Ok(Answer { text, blob }),
            Kind::Error => Err(ClientError::Refused(text)),
            kind => Err(ClientError::Unexpected(kind)),
        }
    }

    fn ask(&mut self, kind: Kind, text: &str, blob: &[u8]) -> Result<Answer, ClientError> {
        self.send(&Frame {
            kind,
            text: text.into(),
            blob: blob.into(),
        })?;
        self.receive()
    }

    /// The guest's status, a JSON object.
    ///
    /// # Errors
    /// See [`ClientError`]; so for all requests.
    pub fn status(&mut self) -> Result<String, ClientError> {
        Ok(self.ask(Kind::Status, "", &[])?.text)
    }

    /// Installs, starts and warms up an application. Returns the application's words.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn install(
        &mut self,
        name: &str,
        params: &str,
        image: &[u8],
        data: &[u8],
    ) -> Result<String, ClientError> {
        let install = Install {
            name: name.into(),
            params: params.into(),
            image_len: image.len() as u64,
            data_len: data.len() as u64,
            image_hash: hash(image),
            data_hash: hash(data),
        };
        let frame = install.to_frame();
        Install::from_frame(&frame)?; // what the guest would refuse is not sent
        self.send(&frame)?;
        self.stream.write_all(image)?;
        self.stream.write_all(data)?;
        Ok(self.receive()?.text)
    }

    /// Loads and starts the application that the guest's disk holds.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn load(&mut self) -> Result<String, ClientError> {
        Ok(self.ask(Kind::Load, "", &[])?.text)
    }

    /// A request to the application.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn call(&mut self, text: &str, blob: &[u8]) -> Result<Answer, ClientError> {
        self.ask(Kind::Call, text, blob)
    }

    /// Has the application check all of its state; returns its words, or an error that names what is
    /// damaged.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn verify(&mut self) -> Result<String, ClientError> {
        Ok(self.ask(Kind::Verify, "", &[])?.text)
    }
}
