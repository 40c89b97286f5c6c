//! What a VM is made of, as numbers and names: the part of the machine's description that does
//! not change while it runs and that travels inside its saved state. Host resources (files,
//! sockets, threads) are no part of it; they come as `Backends`.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::devices::virtio::net::MacAddr;

/// Most virtual CPUs a VM may have.
pub const CPUS_MAX: u8 = 8;

/// Least guest memory, in bytes: the boot structures and a small kernel fit in it.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;

/// Most disks a VM may have: rng, vsock and balloon take three of the nineteen IOAPIC pins that
/// virtio devices may use.
pub const DISKS_MAX: usize = 16;

/// Most network cards a VM may have.
pub const NETS_MAX: usize = 4;

/// Most disks and network cards together: they share the pins that are left.
pub const DISKS_AND_NETS_MAX: usize = DISKS_MAX;

/// Most bytes of a kernel command line, without the terminating zero. Linux' own limit on x86 is
/// `COMMAND_LINE_SIZE` = 2048 with the zero.
pub const CMDLINE_BYTES_MAX: usize = 2047;

/// Most bytes of a disk's identity, which is what `VIRTIO_BLK_T_GET_ID` can carry.
pub const DISK_ID_BYTES_MAX: usize = 20;

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The number of vCPUs is outside its range.
    #[error("{0} vCPUs asked for; a VM has 1 to {CPUS_MAX}")]
    Cpus(u8),
    /// Less memory than the minimum, or a size that is no whole number of pages.
    #[error("{0} bytes of memory asked for; it takes whole 4 KiB pages and at least 16 MiB")]
    Memory(u64),
    /// The command line is too long.
    #[error("the command line has {0} bytes; the limit is {CMDLINE_BYTES_MAX}")]
    CmdlineLong(usize),
    /// The command line has a byte that no kernel would read as text.
    #[error("the command line has the byte {byte:#04x} at {at}; only printable ASCII may be there")]
    CmdlineByte {
        /// The byte.
        byte: u8,
        /// Its position.
        at: usize,
    },
    /// A vsock context id that is reserved or too large.
    #[error("{0} is no context id for a guest; they go from 3 to 4294967294")]
    VsockCid(u64),
    /// Too many disks.
    #[error("{0} disks asked for; the limit is {DISKS_MAX}")]
    Disks(usize),
    /// A disk's identity is too long or not printable ASCII.
    #[error("disk {0} has an identity that is longer than {DISK_ID_BYTES_MAX} bytes or not ASCII")]
    DiskId(usize),
    /// Too many network cards.
    #[error("{0} network cards asked for; the limit is {NETS_MAX}")]
    Nets(usize),
    /// Too many disks and network cards together.
    #[error("{0} disks and network cards asked for; the limit is {DISKS_AND_NETS_MAX} together")]
    DisksAndNets(usize),
    /// An address that no network card has, or that two of them have.
    #[error("network card {at} cannot have the address {mac}: it is a group's or another card's")]
    Mac {
        /// Which card.
        at: usize,
        /// Its address.
        mac: MacAddr,
    },
}

/// Which CPU the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CpuModel {
    /// Everything that the host's KVM supports.
    #[default]
    Host,
    /// The psABI level x86-64-v2 and what KVM itself emulates; nothing else.
    V2,
    /// The psABI level x86-64-v3 and what KVM itself emulates; nothing else.
    V3,
}

impl CpuModel {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::Host => "host",
            CpuModel::V2 => "x86-64-v2",
            CpuModel::V3 => "x86-64-v3",
        }
    }
}

impl std::fmt::Display for CpuModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for CpuModel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [CpuModel::Host, CpuModel::V2, CpuModel::V3]
            .into_iter()
            .find(|model| model.name() == name)
            .ok_or_else(|| {
                format!("`{name}` is no CPU model; there are host, x86-64-v2, x86-64-v3")
            })
    }
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum BootProtocol {
    /// PVH if the kernel has its note, otherwise the 64-bit Linux boot protocol.
    #[default]
    Auto,
    /// PVH; a kernel without the note is refused.
    Pvh,
    /// The 64-bit Linux boot protocol, whatever notes there are.
    Linux64,
}

/// How the guest learns of its devices. The two ways exclude each other: a Linux that takes both
/// would find every device twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Discovery {
    /// ACPI for a Linux kernel that is not told `acpi=off`, the command line for anything else.
    #[default]
    Auto,
    /// ACPI tables; nothing is added to the command line.
    Acpi,
    /// `virtio_mmio.device=` on the command line; there are no ACPI tables.
    CommandLine,
}

impl Discovery {
    /// The name used on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Discovery::Auto => "auto",
            Discovery::Acpi => "acpi",
            Discovery::CommandLine => "cmdline",
        }
    }

    /// What `Auto` means for a kernel and its command line.
    #[must_use]
    pub fn resolve(self, is_linux: bool, cmdline: &str) -> Discovery {
        let is_off = || {
            cmdline
                .split_ascii_whitespace()
                .any(|word| word == "acpi=off")
        };
        match self {
            Discovery::Auto if is_linux && !is_off() => Discovery::Acpi,
            Discovery::Auto => Discovery::CommandLine,
            chosen => chosen,
        }
    }
}

impl std::str::FromStr for Discovery {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        [Discovery::Auto, Discovery::Acpi, Discovery::CommandLine]
            .into_iter()
            .find(|way| way.name() == name)
            .ok_or_else(|| {
                format!("`{name}` is no way of discovery; there are auto, acpi, cmdline")
            })
    }
}

impl BootProtocol {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            BootProtocol::Auto => "auto",
            BootProtocol::Pvh => "pvh",
            BootProtocol::Linux64 => "linux64",
        }
    }
}

/// One disk, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Writes are refused.
    pub read_only: bool,
    /// What the guest reads as the disk's identity (at most [`DISK_ID_BYTES_MAX`] ASCII bytes).
    pub id: String,
}

/// One network card, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address.
    pub mac: MacAddr,
}

/// The description of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Virtual CPUs, 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// Guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The CPU the guest sees.
    pub cpu_model: CpuModel,
    /// The kernel command line without what the VMM appends for its devices.
    pub cmdline: String,
    /// How the kernel is entered; in a machine, how it was.
    pub boot_protocol: BootProtocol,
    /// How the guest learns of its devices; in a machine, what became of [`Discovery::Auto`].
    pub discovery: Discovery,
    /// Disks in their order.
    pub disks: Vec<DiskConfig>,
    /// The VM has a vsock device; its context id.
    pub vsock_cid: Option<u64>,
    /// The VM has a memory balloon.
    pub balloon: bool,
    /// Network cards in their order.
    pub nets: Vec<NetConfig>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            cpus: 1,
            memory_bytes: 128 << 20,
            cpu_model: CpuModel::Host,
            cmdline: String::new(),
            boot_protocol: BootProtocol::Auto,
            discovery: Discovery::Auto,
            disks: Vec::new(),
            vsock_cid: None,
            balloon: true,
            nets: Vec::new(),
        }
    }
}

impl MachineConfig {
    /// Check every limit, before anything is allocated or opened for this VM.
    ///
    /// # Errors
    /// The first field that is outside its limits.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.cpus == 0 || self.cpus > CPUS_MAX {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.memory_bytes < MEMORY_BYTES_MIN || !self.memory_bytes.is_multiple_of(4096) {
            return Err(ConfigError::Memory(self.memory_bytes));
        }
        if self.cmdline.len() > CMDLINE_BYTES_MAX {
            return Err(ConfigError::CmdlineLong(self.cmdline.len()));
        }
        if let Some((at, byte)) = self
            .cmdline
            .bytes()
            .enumerate()
            .find(|(_, byte)| !(0x20..0x7f).contains(byte))
        {
            return Err(ConfigError::CmdlineByte { byte, at });
        }
        if let Some(cid) = self
            .vsock_cid
            .filter(|cid| !(3..u64::from(u32::MAX)).contains(cid))
        {
            return Err(ConfigError::VsockCid(cid));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(ConfigError::Disks(self.disks.len()));
        }
        if let Some(at) = self
            .disks
            .iter()
            .position(|disk| disk.id.len() > DISK_ID_BYTES_MAX || !disk.id.is_ascii())
        {
            return Err(ConfigError::DiskId(at));
        }
        self.validate_nets()
    }

    fn validate_nets(&self) -> Result<(), ConfigError> {
        if self.nets.len() > NETS_MAX {
            return Err(ConfigError::Nets(self.nets.len()));
        }
        let together = self.disks.len() + self.nets.len();
        if together > DISKS_AND_NETS_MAX {
            return Err(ConfigError::DisksAndNets(together));
        }
        let mut seen = HashSet::new();
        for (at, NetConfig { mac }) in self.nets.iter().enumerate() {
            if !mac.is_unicast() || !seen.insert(*mac) {
                return Err(ConfigError::Mac { at, mac: *mac });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked() {
        let good = MachineConfig::default();
        assert_eq!(good.validate(), Ok(()));
        for cpus in [0, CPUS_MAX + 1, u8::MAX] {
            let bad = MachineConfig {
                cpus,
                ..good.clone()
            };
            assert_eq!(bad.validate(), Err(ConfigError::Cpus(cpus)));
        }
        for memory_bytes in [0, MEMORY_BYTES_MIN - 4096, MEMORY_BYTES_MIN + 1] {
            let bad = MachineConfig {
                memory_bytes,
                ..good.clone()
            };
            assert_eq!(bad.validate(), Err(ConfigError::Memory(memory_bytes)));
        }
        let bad = MachineConfig {
            cmdline: "x".repeat(CMDLINE_BYTES_MAX + 1),
            ..good.clone()
        };
        assert_eq!(
            bad.validate(),
            Err(ConfigError::CmdlineLong(CMDLINE_BYTES_MAX + 1))
        );
        let bad = MachineConfig {
            cmdline: "a\0b".into(),
            ..good.clone()
        };
        assert_eq!(
            bad.validate(),
            Err(ConfigError::CmdlineByte { byte: 0, at: 1 })
        );
        let bad = MachineConfig {
            disks: vec![DiskConfig::default(); DISKS_MAX + 1],
            ..good.clone()
        };
        assert_eq!(bad.validate(), Err(ConfigError::Disks(DISKS_MAX + 1)));
    }

    #[test]
    fn discovery_depends_on_the_kernel_unless_it_is_said() {
        use Discovery::{Acpi, Auto, CommandLine};
        assert_eq!(Auto.resolve(true, "console=ttyS0"), Acpi);
        assert_eq!(Auto.resolve(true, "quiet acpi=off"), CommandLine);
        assert_eq!(Auto.resolve(true, "xacpi=off acpi=offx"), Acpi);
        assert_eq!(Auto.resolve(false, ""), CommandLine);
        for (is_linux, cmdline) in [(true, "acpi=off"), (false, "")] {
            assert_eq!(Acpi.resolve(is_linux, cmdline), Acpi);
            assert_eq!(CommandLine.resolve(is_linux, cmdline), CommandLine);
        }
        for way in [Auto, Acpi, CommandLine] {
            assert_eq!(way.name().parse(), Ok(way));
        }
        assert!("pci".parse::<Discovery>().is_err());
    }

    #[test]
    fn network_cards_are_few_and_have_addresses_of_their_own() {
        let nets = |count: u8| -> Vec<NetConfig> {
            let net = |id| NetConfig {
                mac: MacAddr::local([2, 0, 0, 0, 0, id]),
            };
            (0..count).map(net).collect()
        };
        let config = |disks, nets| MachineConfig {
            disks: vec![DiskConfig::default(); disks],
            nets,
            ..MachineConfig::default()
        };
        assert_eq!(config(0, nets(4)).validate(), Ok(()));
        assert_eq!(config(0, nets(5)).validate(), Err(ConfigError::Nets(5)));
        let most = DISKS_AND_NETS_MAX;
        assert_eq!(config(most - 4, nets(4)).validate(), Ok(()));
        assert_eq!(
            config(most - 3, nets(4)).validate(),
            Err(ConfigError::DisksAndNets(most + 1))
        );
        let twice = [nets(2), nets(1)].concat();
        let mac = twice[0].mac;
        assert_eq!(
            config(0, twice).validate(),
            Err(ConfigError::Mac { at: 2, mac })
        );
    }

    #[test]
    fn cpu_models_are_read_back_by_name() {
        for model in [CpuModel::Host, CpuModel::V2, CpuModel::V3] {
            assert_eq!(model.name().parse(), Ok(model));
        }
        assert!("x86-64-v9".parse::<CpuModel>().is_err());
    }
}
