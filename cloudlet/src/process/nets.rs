//! Network cards: opening what is behind them, and what is said of them.
//!
//! `--net user` is passt, a program that carries the guest's traffic as the user's own. It is started
//! here, before this process is confined, with one end of a socket pair, and ends when the other is
//! closed: with the VM, however that ends.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cloudlet_vmm::config::{MachineConfig, NetConfig};
use cloudlet_vmm::devices::virtio::net::{MacAddr, NetBackend, StreamBackend, Tap, TapError};
use cloudlet_vmm::machine::Machine;
use serde_json::{Value, json};

use super::Failure;
use crate::launch::{NetLink, NetSource, Protocol, Publish};

/// The largest packets that passt tells the guest to send: without segmentation offload, fewer and
/// larger ones are what makes it fast.
const MTU: &str = "65520";
/// How long an interface or a port is waited for whose VM has just ended: that VM's name is free a
/// moment before its descriptors are closed.
const PATIENCE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);
/// Most bytes shown of what passt says when it fails.
const WORDS_LEN_MAX: u64 = 4096;

/// The cards of a new VM.
pub(super) fn configs(sources: &[NetSource]) -> Result<Vec<NetConfig>, Failure> {
    sources
        .iter()
        .map(|source| {
            let mac = source.mac.map_or_else(random_mac, Ok)?;
            Ok(NetConfig { mac })
        })
        .collect()
}

fn random_mac() -> Result<MacAddr, Failure> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(MacAddr::local(bytes))
}

/// Refuses what does not fit the cards of a saved VM.
pub(super) fn check_saved(sources: &[NetSource], state: &[u8]) -> Result<(), Failure> {
    if sources.is_empty() {
        return Ok(());
    }
    let saved = Machine::saved_config(state)?;
    fits(sources, &saved)
}

fn fits(sources: &[NetSource], saved: &MachineConfig) -> Result<(), Failure> {
    if sources.len() > saved.nets.len() {
        return Err(format!(
            "--net is given {} times, and the saved VM's network cards are {}",
            sources.len(),
            saved.nets.len()
        )
        .into());
    }
    for (at, (source, card)) in sources.iter().zip(&saved.nets).enumerate() {
        if source.mac.is_some_and(|mac| mac != card.mac) {
            return Err(format!(
                "network card {at} was saved with the address {} and keeps it: leave mac= out",
                card.mac
            )
            .into());
        }
    }
    Ok(())
}

/// Opens what is behind the cards.
pub(super) fn open(sources: &[NetSource], scratch: &Path) -> Result<Vec<NetBackend>, Failure> {
    sources
        .iter()
        .map(|source| {
            Ok(NetBackend {
                backend: match &source.link {
                    NetLink::Tap { name } => Box::new(patiently(
                        || Tap::open(name),
                        |error| matches!(error, TapError::Busy(_)),
                    )?),
                    NetLink::User { publish } => Box::new(patiently(
                        || passt(publish, scratch),
                        |_| !publish.is_empty(),
                    )?),
                },
                limits: source.limits,
            })
        })
        .collect()
}

/// Tries until it works, fails in a way that `may_pass` says no to, or has failed for long enough.
fn patiently<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    may_pass: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && begin.elapsed() < PATIENCE => {
                std::thread::sleep(POLL);
            }
            result => return result,
        }
    }
}

/// Starts passt. When this returns, the ports are open.
fn passt(publish: &[Publish], scratch: &Path) -> Result<StreamBackend, Failure> {
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    // The one descriptor that a child gets besides the standard ones. No other is started here.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
    let mut words = tempfile::tempfile_in(scratch)?;
    let fd = theirs.as_raw_fd().to_string();
    // Without --no-map-gw the guest reaches what listens on the host's loopback interface only.
    let mut command = Command::new("passt");
    command
        .args(["--quiet", "--no-map-gw", "--mtu", MTU, "--fd", &fd])
        .args(publish.iter().flat_map(forward))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(words.try_clone()?);
    // It goes into the background by itself once it is ready.
    let status = command.status().map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            "--net user needs the program passt, which is not installed (Debian: apt install passt)"
                .to_owned()
        }
        _ => format!("cannot start passt: {error}"),
    })?;
    if !status.success() {
        words.rewind()?;
        let mut said = Vec::new();
        words.take(WORDS_LEN_MAX).read_to_end(&mut said)?;
        return Err(format!("passt does not start ({status}): {}", last_line(&said)).into());
    }
    Ok(StreamBackend::new(ours, "user")?)
}

/// passt's arguments for ports.
fn forward(ports: &Publish) -> [String; 2] {
    let range = |first: u16| match ports.count {
        0 | 1 => first.to_string(),
        count => format!("{first}-{}", first.saturating_add(count - 1)),
    };
    let (address, host, guest) = (
        ports.address,
        range(ports.host_port),
        range(ports.guest_port),
    );
    let option = match ports.protocol {
        Protocol::Tcp => "--tcp-ports",
        Protocol::Udp => "--udp-ports",
    };
    [option.to_owned(), format!("{address}/{host}:{guest}")]
}

fn last_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let line = said.lines().rfind(|line| !line.trim().is_empty());
    line.unwrap_or("it does not say why").trim().to_owned()
}

/// What `status` says of the cards: one object each, `net0` and so on.
pub(super) fn status(machine: &Machine) -> impl Iterator<Item = (String, Value)> {
    let cards = machine.config().nets.iter().zip(machine.nets());
    cards.enumerate().map(|(at, (config, stats))| {
        let card = json!({
            "mac": config.mac.to_string(),
            "backend": stats.backend(),
            "link": if stats.is_link_up() { "up" } else { "down" },
            "received": stats.received(),
            "sent": stats.sent(),
            "dropped": stats.dropped(),
        });
        (format!("net{at}"), card)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(mac: Option<&str>) -> NetSource {
        NetSource {
            link: NetLink::Tap { name: "t0".into() },
            mac: mac.map(|mac| mac.parse().unwrap()),
            limits: Default::default(),
        }
    }

    #[test]
    fn addresses_are_kept_or_made_up() {
        let given = "02:00:00:00:00:01";
        let cards = configs(&[source(Some(given)), source(None), source(None)]).unwrap();
        assert_eq!(cards[0].mac.to_string(), given);
        assert_ne!(cards[1], cards[2]);
        let saved = MachineConfig {
            nets: cards,
            ..MachineConfig::default()
        };
        assert!(fits(&[source(Some(given)), source(None)], &saved).is_ok());
        assert!(fits(&[source(None), source(Some(given))], &saved).is_err());
        let four = [source(None), source(None), source(None), source(None)];
        assert!(fits(&four, &saved).is_err());
        assert!(fits(&four[..3], &saved).is_ok());
    }

    #[test]
    fn ports_are_told_to_passt_as_it_reads_them() {
        let port = Publish {
            protocol: Protocol::Tcp,
            address: "127.0.0.1".parse().unwrap(),
            host_port: 8080,
            guest_port: 80,
            count: 1,
        };
        assert_eq!(forward(&port), ["--tcp-ports", "127.0.0.1/8080:80"]);
        let range = Publish {
            protocol: Protocol::Udp,
            count: 3,
            ..port
        };
        assert_eq!(
            forward(&range),
            ["--udp-ports", "127.0.0.1/8080-8082:80-82"]
        );
        assert_eq!(last_line(b"one\ntwo \n\n"), "two");
        assert_eq!(last_line(b""), "it does not say why");
    }
}
