//! `--net` and `--publish`: what the user says of network cards.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;

use anyhow::{Context, Result, anyhow, bail};
use cloudlet::launch::{NetLink, NetSource, Publish};
use cloudlet_vmm::config::NETS_MAX;
use cloudlet_vmm::devices::rate::Rate;

use crate::cli::NewVm;

/// Bytes a second of 1 Mbit/s.
const MBIT_BYTES: u64 = 1_000_000 / 8;

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

/// Reads `[ADDRESS:]HOST:GUEST`.
fn parse_publish(text: &str) -> Result<Publish> {
    let form = || anyhow!("a published port is [ADDRESS:]HOST:GUEST, such as 8080:80");
    let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port != 0);
    let (host, guest) = text.rsplit_once(':').ok_or_else(form)?;
    let guest_port = port(guest).ok_or_else(form)?;
    if let Some(host_port) = port(host) {
        return Ok(Publish {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            host_port,
            guest_port,
        });
    }
    let host: SocketAddr = host.parse().map_err(|_| form())?;
    if host.port() == 0 {
        return Err(form());
    }
    Ok(Publish {
        address: host.ip(),
        host_port: host.port(),
        guest_port,
    })
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
        let ports = ["8080:80", "0.0.0.0:2222:22", "[::1]:53:5353"];
        let nets = parse_all(&options(&["tap=t0", "user"], &ports)).unwrap();
        let NetLink::User { publish } = &nets[1].link else {
            panic!("{nets:?}");
        };
        let shown: Vec<_> = publish
            .iter()
            .map(|port| format!("{} {} {}", port.address, port.host_port, port.guest_port))
            .collect();
        assert_eq!(
            shown,
            ["127.0.0.1 8080 80", "0.0.0.0 2222 22", "::1 53 5353"]
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
        ] {
            assert!(parse_all(&options(&["user"], &[bad])).is_err(), "{bad}");
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
