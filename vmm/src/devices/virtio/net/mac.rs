//! MAC addresses of guests' network cards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MacAddr([u8; 6]);

/// Why a text is no MAC address for a network card.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MacError {
    /// Not six bytes.
    #[error("`{0}` is no MAC address such as 02:00:00:00:00:01")]
    Form(String),
    /// A group's address, or nobody's.
    #[error(
        "`{0}` is no address of a single network card: its first byte must be even, and not all zero"
    )]
    NotUnicast(String),
}

impl MacAddr {
    /// `bytes`, if they are a unicast address.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// A locally administered address out of `random` bytes.
    pub fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [b, c, d, e, f] = rest;
        Self([first & 0xfc | 2, b, c, d, e, f])
    }

    /// Its bytes in the order of the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether it is an address that a card can have; one that was decoded need not be.
    pub fn is_unicast(self) -> bool {
        Self::new(self.0).is_some()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || MacError::Form(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(form)?;
            let is_hex = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = is_hex
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
                .ok_or_else(form)?;
        }
        if parts.next().is_some() {
            return Err(form());
        }
        Self::new(bytes).ok_or_else(|| MacError::NotUnicast(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_back_as_written() {
        let text = "02:00:5e:10:Ff:01";
        let address: MacAddr = text.parse().unwrap();
        assert_eq!(address.bytes(), [2, 0, 0x5e, 0x10, 0xff, 1]);
        assert_eq!(address.to_string(), text.to_lowercase());
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02:00:00:00:00:0g",
            "02:00:00:00:00:+1",
            "02-00-00-00-00-01",
        ] {
            assert!(
                matches!(bad.parse::<MacAddr>(), Err(MacError::Form(_))),
                "{bad}"
            );
        }
        for bad in [
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(
                matches!(bad.parse::<MacAddr>(), Err(MacError::NotUnicast(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn random_addresses_are_local_and_single() {
        for byte in 0..=255 {
            let address = MacAddr::local([byte; 6]);
            assert!(address.is_unicast());
            assert_eq!(address.bytes()[0] & 3, 2);
            assert_eq!(address.bytes()[5], byte);
        }
    }
}
