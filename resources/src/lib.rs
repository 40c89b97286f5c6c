//! What the product embeds: the unikernel guest, its applications, what they speak, and the agent of
//! Linux guests.
//!
//! Nothing here is prebuilt: `build.rs` compiles the guest programs from `guest/`, and the agent from
//! the workspace.
#![forbid(unsafe_code)]

extern crate alloc;

pub mod client;
pub mod digits;
pub mod hash;
pub mod linux;
pub mod protocol;

/// The unikernel: an ELF image that boots by its PVH note or by the 64-bit Linux boot protocol.
///
/// Its first output on COM1 begins with [`GUEST_BANNER`]; [`GUEST_READY`] follows when it waits for
/// work. Devices are found from `virtio_mmio.device=SIZE@BASE:IRQ` words on its command line.
pub const GUEST_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/runtime"));

/// The first words the guest prints.
pub const GUEST_BANNER: &str = "cloudlet-guest ";

/// The line the guest prints when it is up and waits for requests.
pub const GUEST_READY: &str = "cloudlet-guest: ready";

/// `fluid`: many tanks of liquid. Parameters `tanks= particles= rate_hz= dirty= warmup= seed=`;
/// requests `poke TANK X Y FORCE [W H]`, `frame TANK [W H]`, `advance TANK STEPS`, `stats`. A picture
/// comes as an attachment of W x H RGB pixels, its size in the text.
pub const APP_FLUID: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fluid"));

/// `object`: a recogniser of handwritten digits. Parameters `mib= probes=`; its data are training
/// records ([`digits::training`]); requests `recognise` with 64 pixel bytes attached, `stats`.
pub const APP_OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/object"));

/// `fluid` as a static program for Linux guests: `serve SOCKET [PARAMETERS...]`, `ask SOCKET REQUEST...`,
/// with parameters and requests as above; no timer advances it.
pub const FLUID_LINUX_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fluid-linux"));

/// The agent of Linux guests: a static program for any x86-64 Linux from 4.19 on.
pub const AGENT_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cloudlet-agent"));

/// Where the agent belongs in a guest, mode 0755; [`AGENT_SERVICE`] starts it there.
pub const AGENT_PATH: &str = "/usr/lib/cloudlet/cloudlet-agent";

/// The agent's unit for systemd, as `cloudlet-agent.service`. Elsewhere the agent needs nothing but to
/// be started as root: it waits for its vsock to appear.
pub const AGENT_SERVICE: &str = include_str!("../linux/cloudlet-agent.service");
