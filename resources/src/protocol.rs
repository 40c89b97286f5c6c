//! The control protocol of the guest: what it is asked over vsock port [`PORT`], and what it answers.
//!
//! ```text
//! client                                  guest
//!   | -- frame: status|load|call|verify --> |
//!   | <-- frame: ok | error --------------- |
//!   | -- frame: install, then image, data > |   raw bytes, as many as the frame announced
//!   | <-- frame: ok | error --------------- |
//! ```
//!
//! One request at a time on a connection, answered in order. A frame is 16 bytes (magic, kind,
//! version, two zero bytes, length of the text, length of the attachment; little-endian), then the
//! text, then the attachment. Every length is checked against a limit before memory is taken for it.
//! A frame of another version is an error: client and guest come from the same build.
//!
//! Used by the host and, by path, by the guest: nothing but `core` and `alloc` may enter.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// The vsock port the guest listens on.
pub const PORT: u32 = 1024;
/// The version of the protocol.
pub const VERSION: u8 = 1;
/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 16;
/// Most bytes of a frame's text.
pub const TEXT_MAX: usize = 64 << 10;
/// Most bytes of a frame's attachment.
pub const BLOB_MAX: usize = 4 << 20;
/// Most bytes of an application image.
pub const IMAGE_MAX: u64 = 16 << 20;
/// Most bytes of an application's data.
pub const DATA_MAX: u64 = 1 << 30;
/// Most bytes of an application's name.
pub const NAME_MAX: usize = 64;
/// Most bytes of an application's parameters.
pub const PARAMS_MAX: usize = 1024;

const MAGIC: [u8; 4] = *b"CLP1";
const INSTALL_LEN: usize = 32;

/// What a frame asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// How are you? Answered with a JSON object as text.
    Status,
    /// Take an application: see [`Install`]; image and data follow the frame.
    Install,
    /// Load and start the application that was installed on the disk.
    Load,
    /// A request to the application: words as text, an optional attachment.
    Call,
    /// Check all of the application's state.
    Verify,
    /// Done; the answer is in text and attachment.
    Ok,
    /// Not done; the text says why.
    Error,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Status => 1,
            Kind::Install => 2,
            Kind::Load => 3,
            Kind::Call => 4,
            Kind::Verify => 5,
            Kind::Ok => 0x80,
            Kind::Error => 0x81,
        }
    }

    fn from_code(code: u8) -> Option<Kind> {
        [
            Kind::Status,
            Kind::Install,
            Kind::Load,
            Kind::Call,
            Kind::Verify,
            Kind::Ok,
            Kind::Error,
        ]
        .into_iter()
        .find(|kind| kind.code() == code)
    }
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The first bytes are not a frame's.
    Magic,
    /// A frame of this other version.
    Version(u8),
    /// No kind has this code.
    Kind(u8),
    /// The reserved bytes are not zero.
    Reserved,
    /// The text would have this many bytes.
    TextLength(u32),
    /// The attachment would have this many bytes.
    BlobLength(u32),
    /// The text is not UTF-8.
    TextEncoding,
    /// An install frame whose attachment, name or parameters are out of bounds.
    Install,
    /// There is no memory for the frame.
    Memory,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Magic => write!(f, "not a frame of the guest's protocol"),
            FrameError::Version(v) => write!(f, "protocol version {v}, not {VERSION}"),
            FrameError::Kind(code) => write!(f, "unknown frame kind {code:#x}"),
            FrameError::Reserved => write!(f, "reserved bytes of a frame are not zero"),
            FrameError::TextLength(n) => write!(f, "{n} bytes of text, more than {TEXT_MAX}"),
            FrameError::BlobLength(n) => write!(f, "{n} bytes attached, more than {BLOB_MAX}"),
            FrameError::TextEncoding => write!(f, "the text of a frame is not UTF-8"),
            FrameError::Install => write!(f, "an install frame is out of bounds"),
            FrameError::Memory => write!(f, "no memory for a frame"),
        }
    }
}

impl core::error::Error for FrameError {}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    text_len: u32,
    blob_len: u32,
}

impl Header {
    /// The header of a frame with so many bytes.
    ///
    /// # Errors
    /// When either is over its limit.
    pub fn new(kind: Kind, text_len: usize, blob_len: usize) -> Result<Header, FrameError> {
        let text = u32::try_from(text_len).unwrap_or(u32::MAX);
        let blob = u32::try_from(blob_len).unwrap_or(u32::MAX);
        Header {
            kind,
            text_len: text,
            blob_len: blob,
        }
        .checked()
    }

    fn checked(self) -> Result<Header, FrameError> {
        if self.text_len() > TEXT_MAX {
            return Err(FrameError::TextLength(self.text_len));
        }
        if self.blob_len() > BLOB_MAX {
            return Err(FrameError::BlobLength(self.blob_len));
        }
        Ok(self)
    }

    /// Bytes of text that follow the header.
    #[must_use]
    pub fn text_len(&self) -> usize {
        self.text_len as usize
    }

    /// Bytes of attachment that follow the text.
    #[must_use]
    pub fn blob_len(&self) -> usize {
        self.blob_len as usize
    }

    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        b[0..4].copy_from_slice(&MAGIC);
        b[4] = self.kind.code();
        b[5] = VERSION;
        b[8..12].copy_from_slice(&self.text_len.to_le_bytes());
        b[12..16].copy_from_slice(&self.blob_len.to_le_bytes());
        b
    }

    /// Reads a header.
    ///
    /// # Errors
    /// When it is not one, or announces more than the limits.
    pub fn decode(b: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        if b[0..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        if b[5] != VERSION {
            return Err(FrameError::Version(b[5]));
        }
        if b[6..8] != [0, 0] {
            return Err(FrameError::Reserved);
        }
        let kind = Kind::from_code(b[4]).ok_or(FrameError::Kind(b[4]))?;
        let text_len = u32::from_le_bytes([b[8], b[9], b[10], b[11]]);
        let blob_len = u32::from_le_bytes([b[12], b[13], b[14], b[15]]);
        Header {
            kind,
            text_len,
            blob_len,
        }
        .checked()
    }
}

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it asks or answers.
    pub kind: Kind,
    /// Its text.
    pub text: String,
    /// Its attachment; empty if there is none.
    pub blob: Vec<u8>,
}

impl Frame {
    /// The frame as bytes.
    ///
    /// # Errors
    /// When text or attachment are over their limits.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let header = Header::new(self.kind, self.text.len(), self.blob.len())?;
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.text.len() + self.blob.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(self.text.as_bytes());
        bytes.extend_from_slice(&self.blob);
        Ok(bytes)
    }
}

/// What an install frame announces: text is the name, a line feed, the parameters; the attachment is
/// four numbers. `image_len` bytes of image and `data_len` bytes of data follow the frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Install {
    /// The application's name.
    pub name: String,
    /// `key=value` words for the application.
    pub params: String,
    /// Bytes of the image.
    pub image_len: u64,
    /// Bytes of the data.
    pub data_len: u64,
    /// [`crate::hash::hash`] of the image.
    pub image_hash: u64,
    /// [`crate::hash::hash`] of the data.
    pub data_hash: u64,
}

impl Install {
    /// The frame that announces it.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut text = self.name.clone();
        text.push('\n');
        text.push_str(&self.params);
        let mut blob = Vec::with_capacity(INSTALL_LEN);
        for number in [
            self.image_len,
            self.data_len,
            self.image_hash,
            self.data_hash,
        ] {
            blob.extend_from_slice(&number.to_le_bytes());
        }
        Frame {
            kind: Kind::Install,
            text,
            blob,
        }
    }

    /// Reads the announcement.
    ///
    /// # Errors
    /// When name, parameters or lengths are out of bounds.
    pub fn from_frame(frame: &Frame) -> Result<Install, FrameError> {
        let (name, params) = frame.text.split_once('\n').ok_or(FrameError::Install)?;
        if frame.blob.len() != INSTALL_LEN {
            return Err(FrameError::Install);
        }
        let mut numbers = [0u64; 4];
        for (number, bytes) in numbers.iter_mut().zip(frame.blob.chunks_exact(8)) {
            for (i, byte) in bytes.iter().enumerate() {
                *number |= u64::from(*byte) << (8 * i);
            }
        }
        let [image_len, data_len, image_hash, data_hash] = numbers;
        let good = (1..=NAME_MAX).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && params.len() <= PARAMS_MAX
            && (1..=IMAGE_MAX).contains(&image_len)
            && data_len <= DATA_MAX;
        if !good {
            return Err(FrameError::Install);
        }
        Ok(Install {
            name: name.into(),
            params: params.into(),
            image_len,
            data_len,
            image_hash,
            data_hash,
        })
    }
}

/// Puts a frame together from bytes as they come.
#[derive(Debug, Default)]
pub struct Incoming {
    head: [u8; HEADER_LEN],
    head_len: usize,
    header: Option<Header>,
    body: Vec<u8>,
}

impl Incoming {
    /// Takes bytes up to the end of the frame under way. Returns how many it took, and the frame if
    /// it is whole.
    ///
    /// # Errors
    /// When the bytes are no frame; nothing sensible can follow on that connection.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(usize, Option<Frame>), FrameError> {
        let mut taken = 0;
        let header = match self.header {
            Some(header) => header,
            None => {
                taken = bytes.len().min(HEADER_LEN - self.head_len);
                self.head[self.head_len..self.head_len + taken].copy_from_slice(&bytes[..taken]);
                self.head_len += taken;
                if self.head_len < HEADER_LEN {
                    return Ok((taken, None));
                }
                let header = Header::decode(&self.head)?;
                let len = header.text_len() + header.blob_len();
                self.body
                    .try_reserve_exact(len)
                    .map_err(|_| FrameError::Memory)?;
                *self.header.insert(header)
            }
        };
        let whole = header.text_len() + header.blob_len();
        let more = (bytes.len() - taken).min(whole - self.body.len());
        self.body.extend_from_slice(&bytes[taken..taken + more]);
        taken += more;
        if self.body.len() < whole {
            return Ok((taken, None));
        }
        let mut text = core::mem::take(&mut self.body);
        *self = Incoming::default();
        let mut blob = Vec::new();
        if header.blob_len() > 0 {
            blob.try_reserve_exact(header.blob_len())
                .map_err(|_| FrameError::Memory)?;
            blob.extend_from_slice(&text[header.text_len()..]);
        }
        text.truncate(header.text_len());
        let text = String::from_utf8(text).map_err(|_| FrameError::TextEncoding)?;
        Ok((
            taken,
            Some(Frame {
                kind: header.kind,
                text,
                blob,
            }),
        ))
    }
}

/// Reads one frame from the start of `bytes`: how many it took, and the frame, if all of it is there.
///
/// # Errors
/// When the bytes are no frame.
pub fn parse(bytes: &[u8]) -> Result<(usize, Option<Frame>), FrameError> {
    Incoming::default().feed(bytes)
}
