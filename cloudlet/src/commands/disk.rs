//! What `--disk` says.
//!
//! A raw disk and a qcow2 image cannot be told apart by what is in them: a guest that had the raw
//! one may have written the header of a qcow2 image to its beginning, which names other files of
//! the host. So the format is what the user says, or what the file's name ends with, which no guest
//! has chosen; a file that looks like qcow2 without either is refused (`process/disks.rs`).

use std::num::NonZeroU64;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cloudlet::launch::{DiskFormat, DiskSource};
use cloudlet_vmm::config::DISK_ID_BYTES_MAX;
use cloudlet_vmm::devices::rate::{Limits, Rate};

use super::{absolute, existing};

/// Most disks that can be limited: more than a VM has.
const DISKS_MAX: usize = 64;
/// Highest limits: 1 TiB and a thousand million requests a second.
const BANDWIDTH_MIB_MAX: u64 = 1 << 20;
const IOPS_MAX: u64 = 1_000_000_000;
/// Largest empty disk: 1 TiB.
const EMPTY_MIB_MAX: u64 = 1 << 20;

/// Reads all `--disk` of a command line.
pub(super) fn parse_all(texts: &[String]) -> Result<(Vec<DiskSource>, Vec<Limits>)> {
    let disks = texts
        .iter()
        .map(|text| parse(text).with_context(|| format!("cannot use --disk {text}")))
        .collect::<Result<Vec<_>>>()?;
    let (disks, limits): (Vec<_>, Vec<_>) = disks.into_iter().unzip();
    for (at, disk) in disks.iter().enumerate() {
        let before = disks.iter().take(at);
        if !disk.serial.is_empty() && before.clone().any(|other| other.serial == disk.serial) {
            bail!("two disks have the serial number {}", disk.serial);
        }
        if let Some(layer) = &disk.layer
            && before
                .clone()
                .any(|other| other.layer.as_ref() == Some(layer))
        {
            bail!("two disks have the layer {}", layer.display());
        }
    }
    Ok((disks, limits))
}

/// Reads all `--disk-limit` of a command line, `N[,bandwidth=MIB][,iops=N]` each.
pub(super) fn parse_limits(texts: &[String]) -> Result<Vec<Limits>> {
    let mut all: Vec<Limits> = Vec::new();
    for text in texts {
        let (number, limits) =
            parse_limit(text).with_context(|| format!("cannot use --disk-limit {text}"))?;
        if all.len() <= number {
            all.resize(number + 1, Limits::default());
        }
        match all.get_mut(number) {
            Some(slot) if *slot == Limits::default() => *slot = limits,
            _ => bail!("disk {number} is limited twice"),
        }
    }
    Ok(all)
}

fn parse_limit(text: &str) -> Result<(usize, Limits)> {
    let (number, options) = text.split_once(',').context("it has no limit")?;
    let number = number
        .parse()
        .ok()
        .filter(|number| *number < DISKS_MAX)
        .with_context(|| format!("{number:?} is no number of a disk"))?;
    let mut limits = Limits::default();
    for option in options.split(',') {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let slot = limit_slot(&mut limits, key)
            .with_context(|| format!("there is no limit `{key}`: there are bandwidth and iops"))?;
        if slot.replace(parse_rate(key, value)?).is_some() {
            bail!("{key} is there twice");
        }
    }
    Ok((number, limits))
}

/// The limit that is called `key`.
fn limit_slot<'a>(limits: &'a mut Limits, key: &str) -> Option<&'a mut Option<Rate>> {
    match key {
        "bandwidth" => Some(&mut limits.bytes),
        "iops" => Some(&mut limits.operations),
        _ => None,
    }
}

fn parse_rate(key: &str, value: &str) -> Result<Rate> {
    let (unit, most, what) = match key {
        "bandwidth" => (1 << 20, BANDWIDTH_MIB_MAX, "MiB"),
        _ => (1, IOPS_MAX, "requests"),
    };
    let number = value.parse().ok().filter(|number| *number <= most);
    let rate = number.and_then(|number: u64| NonZeroU64::new(number * unit));
    match rate {
        Some(rate) => Ok(Rate::new(rate)),
        None => bail!("{key}= takes 1 to {most} {what} a second, not {value:?}"),
    }
}

/// Reads `FILE` or `empty:MIB`, and options behind commas. A comma in a file's name is doubled.
fn parse(text: &str) -> Result<(DiskSource, Limits)> {
    let words = split(text);
    let (first, options) = words.split_first().context("it names no file")?;
    let (mut disk, mut limits) = (DiskSource::default(), Limits::default());
    match first.strip_prefix("empty:") {
        Some(size) => disk.empty_len = parse_empty(size)?,
        None => {
            disk.image = Some(existing(first.as_ref(), "disk image")?);
            disk.format = first.ends_with(".qcow2").then_some(DiskFormat::Qcow2);
        }
    }
    let mut seen: Vec<&str> = Vec::new();
    for option in options {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option.as_str(), None),
        };
        if seen.contains(&key) {
            bail!("{key} is there twice");
        }
        match (limit_slot(&mut limits, key), value) {
            (Some(slot), Some(value)) => *slot = Some(parse_rate(key, value)?),
            _ => apply(&mut disk, key, value)?,
        }
        seen.push(key);
    }
    if disk.image.is_none() && disk.read_only {
        bail!("an empty disk cannot be read-only");
    }
    if disk.image.is_none() && disk.format.is_some() {
        bail!("an empty disk has no format");
    }
    if disk.layer.is_some() && disk.read_only {
        bail!("a read-only disk has no layer: `ro` and `layer` exclude each other");
    }
    Ok((disk, limits))
}

fn apply(disk: &mut DiskSource, key: &str, value: Option<&str>) -> Result<()> {
    match (key, value) {
        ("ro", None) => disk.read_only = true,
        ("serial", Some(text)) => disk.serial = parse_serial(text)?,
        ("layer", Some("")) => bail!("layer= takes a file's name"),
        ("layer", Some(path)) => disk.layer = Some(layer_path(path)?),
        ("format", Some("raw")) => disk.format = Some(DiskFormat::Raw),
        ("format", Some("qcow2")) => disk.format = Some(DiskFormat::Qcow2),
        ("format", Some(other)) => bail!("format= takes raw or qcow2, not {other:?}"),
        ("ro", Some(_)) => bail!("`ro` takes no value"),
        ("format" | "serial" | "layer" | "bandwidth" | "iops", None) => {
            bail!("`{key}` takes a value, as in {key}=...")
        }
        _ => bail!(
            "there is no option `{key}`: there are ro, format=raw|qcow2, serial=TEXT, layer=FILE, \
             bandwidth=MIB and iops=N (a comma in a file's name is written twice)"
        ),
    }
    Ok(())
}

/// The parts between single commas, with each doubled one as one.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(character);
        }
    }
    words
}

fn parse_empty(size: &str) -> Result<u64> {
    let mib: u64 = size
        .parse()
        .with_context(|| format!("{size:?} is no size in MiB"))?;
    if !(1..=EMPTY_MIB_MAX).contains(&mib) {
        bail!("an empty disk has 1 to {EMPTY_MIB_MAX} MiB");
    }
    Ok(mib << 20)
}

/// The guest's system makes a file name of it: `/dev/disk/by-id/virtio-TEXT`.
fn parse_serial(text: &str) -> Result<String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if text.is_empty() || text.len() > DISK_ID_BYTES_MAX || !text.chars().all(is_plain) {
        bail!("serial= takes 1 to {DISK_ID_BYTES_MAX} letters, digits and `._-`, not {text:?}");
    }
    Ok(text.to_owned())
}

/// The file may be there or not; its directory must be.
fn layer_path(text: &str) -> Result<PathBuf> {
    let path = absolute(text.as_ref())?;
    match std::fs::metadata(&path) {
        Ok(meta) if meta.is_file() => existing(&path, "layer"),
        Ok(_) => bail!("{text} is no file"),
        Err(_) => {
            let name = path.file_name().context("layer= takes a file's name")?;
            let parent = path.parent().context("layer= takes a file's name")?;
            Ok(existing(parent, "directory of the layer")?.join(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        format!("{:#}", parse_all(&[text.to_owned()]).unwrap_err())
    }

    #[test]
    fn disks_read_as_documented() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let image = dir.join("d,1.img");
        std::fs::write(&image, "x").unwrap();
        let text = dir.join("d,,1.img").to_str().unwrap().to_owned();
        let parse = |text: &str| parse(text).unwrap().0;
        let plain = parse(&text);
        assert_eq!(
            plain,
            DiskSource {
                image: Some(image),
                ..DiskSource::default()
            }
        );
        let read_only = parse(&format!("{text},serial=a.B_9-,ro"));
        assert!(read_only.read_only);
        assert_eq!(read_only.serial, "a.B_9-");
        assert_eq!(parse("empty:3").empty_len, 3 << 20);
        assert_eq!(plain.format, None);
        let format = |text: &str| parse(text).format;
        assert_eq!(format(&format!("{text},format=raw")), Some(DiskFormat::Raw));
        std::fs::write(dir.join("d.qcow2"), "x").unwrap();
        let text = dir.join("d.qcow2").to_str().unwrap().to_owned();
        assert_eq!(format(&text), Some(DiskFormat::Qcow2));
        assert_eq!(format(&format!("{text},format=raw")), Some(DiskFormat::Raw));
        let layer = dir.join("new");
        let layered = parse(&format!("empty:1,layer={}", layer.display()));
        assert_eq!(layered.layer, Some(layer));
    }

    #[test]
    fn limits_read_as_documented() {
        let rate = |number| NonZeroU64::new(number).map(Rate::new);
        let both = Limits {
            bytes: rate(3 << 20),
            operations: rate(70),
        };
        let disks = ["empty:1", "empty:1,iops=70,bandwidth=3"].map(str::to_owned);
        let (_, limits) = parse_all(&disks).unwrap();
        assert_eq!(limits, [Limits::default(), both]);
        let texts = ["1,bandwidth=3,iops=70"].map(str::to_owned);
        assert_eq!(parse_limits(&texts).unwrap(), limits);
        for (bad, why) in [
            ("1", "has no limit"),
            ("x,iops=1", "no number of a disk"),
            ("64,iops=1", "no number of a disk"),
            ("0,iops", "takes 1 to 1000000000 requests"),
            ("0,iops=0", "takes 1 to"),
            ("0,bandwidth=1048577", "1 to 1048576 MiB"),
            ("0,iops=1,iops=1", "twice"),
            ("0,speed=1", "there are bandwidth and iops"),
        ] {
            let said = format!("{:#}", parse_limits(&[bad.to_owned()]).unwrap_err());
            assert!(said.contains(why), "{bad}: {said}");
        }
        let twice = ["0,iops=1", "0,bandwidth=1"].map(str::to_owned);
        assert!(parse_limits(&twice).is_err());
    }

    #[test]
    fn what_is_wrong_with_a_disk_is_said() {
        for (text, why) in [
            ("empty:", "no size in MiB"),
            ("empty:0", "1 to 1048576 MiB"),
            ("empty:99999999", "1 to 1048576 MiB"),
            ("/no/such/file", "cannot find the disk image"),
            ("", "cannot find the disk image"),
            ("empty:1,ro", "cannot be read-only"),
            ("empty:1,", "no option ``"),
            ("empty:1,rw", "there are ro, format=raw|qcow2, serial=TEXT"),
            ("empty:1,format=raw", "has no format"),
            ("/dev/null,format=vmdk", "takes raw or qcow2"),
            ("/dev/null,format", "takes a value"),
            ("empty:1,iops", "takes a value"),
            ("empty:1,bandwidth=0", "1 to 1048576 MiB"),
            ("empty:1,iops=1,iops=1", "iops is there twice"),
            ("empty:1,serial", "takes a value"),
            ("empty:1,serial=", "1 to 20 letters"),
            ("empty:1,serial=a b", "1 to 20 letters"),
            ("empty:1,serial=a/b", "1 to 20 letters"),
            ("empty:1,serial=123456789012345678901", "1 to 20 letters"),
            ("empty:1,serial=a,serial=a", "serial is there twice"),
            ("empty:1,layer=", "takes a file's name"),
            ("empty:1,layer=/no/such/dir/l", "directory of the layer"),
            ("empty:1,layer=/dev", "is no file"),
            ("/dev/null,ro,layer=l", "exclude each other"),
            ("/dev/null,ro=1", "takes no value"),
        ] {
            let said = refused(text);
            assert!(said.contains(why), "{text}: {said}");
        }
        let twice = ["empty:1,serial=a", "empty:1,serial=a"].map(str::to_owned);
        assert!(parse_all(&twice).is_err());
        let twice = ["empty:1,layer=l", "empty:1,layer=./l"].map(str::to_owned);
        assert!(parse_all(&twice).is_err());
    }
}
