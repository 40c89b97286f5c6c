//! `--net` and `--publish`: what the user says of network cards.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;

use anyhow::{Context, Result, anyhow, bail};
use cloudlet::launch::{NetLink, NetSource, Protocol, Publish};
use cloudlet_vmm::config::NETS_MAX;
use cloudlet_vmm::devices::rate::Rate;

use crate::cli::NewVm;

/// Bytes a second of 1 Mbit/s.
const MBIT_BYTES: u64 = 1_000_000 / 8;
/// Most published ports of a VM: passt has a socket open for each, and a program has 1024 by default.
const PUBLISHED_MAX: u32 = 512;

/// The network cards that `options` ask for.
pub(super) fn parse_all(options: &NewVm) -> Result<Vec<NetSource>> {
    if options.nets.len() > NETS_MAX {
        bail!(
            "--net is given {} times; a VM has at most {NETS_MAX} network cards",
            options.nets.len()
        );
    }
    let mut nets = options
        .nets
        .iter()
        .map(|text| parse(text).with_context(|| format!("--net {text}")))
        .collect::<Result<Vec<_>>>()?;
    let published = options
        .publish
        .iter()
        .map(|text| parse_publish(text).with_context(|| format!("--publish {text}")))
        .collect::<Result<Vec<_>>>()?;
    if published.is_empty() {
        return Ok(nets);
    }
    check_published(&published)?;
    let mut users = nets.iter_mut().filter_map(|net| match &mut net.link {
        NetLink::User { publish } => Some(publish),
        NetLink::Tap { .. } => None,
    });
    match (users.next(), users.next()) {
        (Some(publish), None) => *publish = published,
        (None, _) => bail!("--publish needs a `--net user`, whose ports it forwards"),
        (Some(_), Some(_)) => {
            bail!("--publish does not know which `--net user` is meant: give one")
        }
    }
    Ok(nets)
}

/// Refuses what two clones cannot both have.
pub(super) fn check_clones(nets: &[NetSource]) -> Result<()> {
    for net in nets {
        match &net.link {
            NetLink::Tap { name } => bail!(
                "the interface {name} serves one VM: restore the clones one by one, each with its \
                 own --net tap=NAME, or give them --net user"
            ),
            NetLink::User { publish } if !publish.is_empty() => bail!(
                "a port of the host can be forwarded to one VM: restore the clones one by one, each \
                 with its own --publish"
            ),
            NetLink::User { .. } => {}
        }
    }
    Ok(())
}

/// Reads `tap=NAME[,OPTION]...` or `user[,OPTION]...`.
fn parse(text: &str) -> Result<NetSource> {
    let mut words = text.split(',');
    let kind = words.next().unwrap_or_default();
    let link = match kind.split_once('=') {
        Some(("tap", name)) if !name.is_empty() => NetLink::Tap {
            name: name.to_owned(),
        },
        None if kind == "user" => NetLink::User {
            publish: Vec::new(),
        },
        _ => bail!("a network card is tap=NAME or user, with options after commas"),
    };
    let mut net = NetSource {
        link,
        mac: None,
        limits: Default::default(),
    };
    for word in words {
        match word.split_once('=') {
            Some(("mac", value)) => net.mac = Some(value.parse()?),
            Some(("bandwidth", value)) => {
                net.limits.bytes = Some(Rate::new(positive(value, "Mbit/s", MBIT_BYTES)?));
            }
            Some(("packets", value)) => {
                net.limits.operations = Some(Rate::new(positive(value, "packets a second", 1)?));
            }
            _ => bail!("`{word}` is no option; there are mac=, bandwidth= and packets="),
        }
    }
    Ok(net)
}

/// A number above zero, times `scale`.
fn positive(text: &str, what: &str, scale: u64) -> Result<NonZeroU64> {
    let number: Option<u64> = text.parse().ok();
    number
        .and_then(|number| number.checked_mul(scale))
        .and_then(NonZeroU64::new)
        .ok_or_else(|| anyhow!("`{text}` is no number of {what}"))
}

/// Reads `[ADDRESS:]HOST[-LAST]:GUEST[-LAST][/tcp|/udp]`.
fn parse_publish(text: &str) -> Result<Publish> {
    let form = || {
        anyhow!(
            "published ports are [ADDRESS:]HOST[-LAST]:GUEST[-LAST][/tcp|/udp], such as 8080:80 or \
             8000-8010:8000-8010/udp"
        )
    };
    let (ports, protocol) = match text.split_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((_, other)) => bail!("`{other}` is no protocol: there are tcp and udp"),
    };
    let (host, guest) = ports.rsplit_once(':').ok_or_else(form)?;
    let (guest_port, guest_count) = parse_ports(guest).ok_or_else(form)?;
    let (address, host) = match host.rsplit_once(':') {
        None => (IpAddr::V4(Ipv4Addr::LOCALHOST), host),
        Some((address, host)) => (parse_address(address).ok_or_else(form)?, host),
    };
    let (host_port, count) = parse_ports(host).ok_or_else(form)?;
    if count != guest_count {
        bail!("{count} ports of the host cannot lead to {guest_count} of the guest's");
    }
    Ok(Publish {
        protocol,
        address,
        host_port,
        guest_port,
        count,
    })
}

/// An address as it stands before a port: one of version 6 is in brackets.
fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

/// Reads `FIRST` or `FIRST-LAST`: the first port, and how many there are.
fn parse_ports(text: &str) -> Option<(u16, u16)> {
    let port = |text: &str| {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse()
            .ok()
            .filter(|&port: &u16| is_plain && port != 0)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    // Neither is 0, so the sum fits.
    Some((first, last.checked_sub(first)? + 1))
}

/// Refuses more ports than passt should open, and what would be two at one place.
fn check_published(all: &[Publish]) -> Result<()> {
    let count: u32 = all.iter().map(|ports| u32::from(ports.count)).sum();
    if count > PUBLISHED_MAX {
        bail!("--publish names {count} ports; a VM has at most {PUBLISHED_MAX}");
    }
    for (at, ports) in all.iter().enumerate() {
        let range = |ports: &Publish| {
            let first = u32::from(ports.host_port);
            first..first + u32::from(ports.count)
        };
        let is_taken = |other: &&Publish| {
            let (mine, theirs) = (range(ports), range(other));
            let same_address = other.address == ports.address
                || other.address.is_unspecified()
                || ports.address.is_unspecified();
            other.protocol == ports.protocol
                && same_address
                && mine.start < theirs.end
                && theirs.start < mine.end
        };
        if let Some(other) = all.iter().take(at).find(is_taken) {
            let port = ports.host_port.max(other.host_port);
            bail!("--publish names port {port} of the host twice");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(nets: &[&str], publish: &[&str]) -> NewVm {
        let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        NewVm {
            nets: owned(nets),
            publish: owned(publish),
            ..NewVm::default()
        }
    }

    #[test]
    fn network_cards_read_as_documented() {
        let text = "tap=t0,mac=02:00:00:00:00:0a,bandwidth=8,packets=500";
        let nets = parse_all(&options(&[text, "user"], &[])).unwrap();
        assert_eq!(nets[0].link, NetLink::Tap { name: "t0".into() });
        assert_eq!(nets[0].mac.unwrap().to_string(), "02:00:00:00:00:0a");
        assert_eq!(nets[0].limits.bytes.unwrap().per_second.get(), 1_000_000);
        assert_eq!(nets[0].limits.operations.unwrap().burst.get(), 500);
        assert_eq!((nets[1].mac, nets[1].limits), (None, Default::default()));
        for bad in [
            "",
            "tap",
            "tap=",
            "user=x",
            "bridge=b0",
            "user,",
            "user,mac=1",
            "user,mac=ff:ff:ff:ff:ff:ff",
            "user,bandwidth=0",
            "user,bandwidth=-1",
            "user,bandwidth=18446744073709551615",
            "user,packets=",
            "user,colour=red",
        ] {
            assert!(parse_all(&options(&[bad], &[])).is_err(), "{bad}");
        }
        assert!(parse_all(&options(&["user"; 5], &[])).is_err());
    }

    #[test]
    fn ports_read_as_documented_and_belong_to_one_card() {
        let ports = [
            "8080:80",
            "0.0.0.0:2222:22/tcp",
            "[::1]:53:5353",
            "53:53/udp",
            "10.0.0.1:8000-8010:9000-9010/udp",
            "65535-65535:1-1",
        ];
        let nets = parse_all(&options(&["tap=t0", "user"], &ports)).unwrap();
        let NetLink::User { publish } = &nets[1].link else {
            panic!("{nets:?}");
        };
        let shown: Vec<_> = publish
            .iter()
            .map(|all| {
                let Publish {
                    protocol,
                    address,
                    host_port,
                    guest_port,
                    count,
                } = all;
                format!("{protocol:?} {address} {host_port} {guest_port} {count}")
            })
            .collect();
        assert_eq!(
            shown,
            [
                "Tcp 127.0.0.1 8080 80 1",
                "Tcp 0.0.0.0 2222 22 1",
                "Tcp ::1 53 5353 1",
                "Udp 127.0.0.1 53 53 1",
                "Udp 10.0.0.1 8000 9000 11",
                "Tcp 127.0.0.1 65535 1 1",
            ]
        );
        for bad in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:0",
            "x:1:2",
            "1.2.3.4:0:80",
            "65536:1",
            "::1:8:9",
            "::1:8",
            "[1.2.3.4]:8:9",
            "80:80/",
            "80:80/sctp",
            "80:80/tcp/tcp",
            "80:80/udp/tcp",
            "80-:80",
            "80-81:80",
            "81-80:81-80",
            "+80:80",
            "80-82:80-81",
            "1-513:1-513",
            "65535-65536:1-2",
        ] {
            assert!(parse_all(&options(&["user"], &[bad])).is_err(), "{bad}");
        }
        let said = |ports: &[&str]| {
            let refused = parse_all(&options(&["user"], ports)).unwrap_err();
            format!("{refused:#}")
        };
        assert!(said(&["1-513:1-513"]).contains("at most 512"));
        assert!(said(&["80-82:80-81"]).contains("3 ports of the host cannot lead to 2"));
        assert!(said(&["8000-8010:1-11", "8005:80"]).contains("port 8005 of the host twice"));
        assert!(said(&["1.2.3.4:80:80", "0.0.0.0:79-80:1-2"]).contains("port 80"));
        for fine in [["80:80", "80:80/udp"], ["1.2.3.4:80:80", "1.2.3.5:80:80"]] {
            parse_all(&options(&["user"], &fine)).unwrap();
        }
        assert!(parse_all(&options(&["tap=t0"], &["1:2"])).is_err());
        assert!(parse_all(&options(&["user", "user"], &["1:2"])).is_err());
    }

    #[test]
    fn clones_share_no_interface_and_no_port() {
        let check = |nets: &[&str], publish: &[&str]| {
            check_clones(&parse_all(&options(nets, publish)).unwrap())
        };
        assert!(check(&["user"], &[]).is_ok());
        assert!(check(&["user", "tap=t0"], &[]).is_err());
        assert!(check(&["user"], &["1:2"]).is_err());
    }
}
