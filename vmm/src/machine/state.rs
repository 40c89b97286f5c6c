//! The machine's saved state: which sections it has and how each is written and read back.
//!
//! | section | content |
//! | --- | --- |
//! | `config` | [`crate::config::MachineConfig`] |
//! | `vcpu0`... | [`crate::cpu::state::VcpuState`], one for each vCPU |
//! | `vm` | interrupt controllers, timer, clock |
//! | `serial` | the serial port |
//! | `virtio0`... | one for each virtio device in the order of their addresses |
//!
//! Content is postcard. Reading is strict: what a section decodes to must encode to the same bytes
//! again, so nothing in it is skipped, cut or filled up.

use cloudlet_snapshot::{Reader, Writer};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::MachineError;

/// Version of every section so far.
const VERSION: u32 = 5;

pub(super) const CONFIG: &str = "config";
pub(super) const VM: &str = "vm";
pub(super) const SERIAL: &str = "serial";

pub(super) fn vcpu_section(id: u8) -> String {
    format!("vcpu{id}")
}

pub(super) fn virtio_section(index: usize) -> String {
    format!("virtio{index}")
}

/// Add a section.
pub(super) fn put<T: Serialize>(
    writer: &mut Writer,
    name: &str,
    value: &T,
) -> Result<(), MachineError> {
    let encoded = postcard::to_stdvec(value).map_err(|source| MachineError::Encode {
        section: name.to_owned(),
        source,
    })?;
    writer.section(name, VERSION, encoded)?;
    Ok(())
}

/// Take a section.
pub(super) fn take<T: Serialize + DeserializeOwned>(
    reader: &mut Reader<'_>,
    name: &str,
) -> Result<T, MachineError> {
    let (_, content) = reader.take_version(name, VERSION..=VERSION)?;
    let value: T = postcard::from_bytes(content).map_err(|source| MachineError::Decode {
        section: name.to_owned(),
        source,
    })?;
    let again = postcard::to_stdvec(&value).map_err(|source| MachineError::Encode {
        section: name.to_owned(),
        source,
    })?;
    if again != content {
        let why = "bytes that its content does not account for";
        return Err(MachineError::State {
            section: name.to_owned(),
            why,
        });
    }
    Ok(value)
}
