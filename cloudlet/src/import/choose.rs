//! Which image of several is taken: by its name, by the kind of machine, and by what this machine's CPU
//! has.

use std::arch::is_x86_feature_detected;

use super::oci::{Descriptor, Error};

/// What the kernels here run.
pub const OS: &str = "linux";
/// The kind of machine.
pub const ARCHITECTURE: &str = "amd64";
/// Annotations that name an image: the format's own, and one that engines set, with all of the name.
const NAME: &str = "org.opencontainers.image.ref.name";
const LONG_NAME: &str = "io.containerd.image.name";
/// What people leave away of a long name.
const DEFAULT_PLACES: [&str; 2] = ["docker.io/library/", "docker.io/"];
/// Most names in an error.
const NAMES_MAX: usize = 20;

/// The level of x86-64 that this machine's CPU has, from 1 to 4, as the psABI counts them.
#[must_use]
pub fn level_of_host() -> u8 {
    let second = is_x86_feature_detected!("cmpxchg16b")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("sse4.2")
        && is_x86_feature_detected!("ssse3");
    let third = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("movbe");
    let fourth = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (second, third, fourth) {
        (true, true, true) => 4,
        (true, true, false) => 3,
        (true, false, _) => 2,
        (false, ..) => 1,
    }
}

/// The one entry of an index that fits: those for other machines do not count, of variants the best
/// that has no more than `level` does, and entries that lead to the same are one.
///
/// # Errors
/// There is none of that name or for this kind of machine, or there are several.
pub fn pick<'a>(
    entries: &'a [Descriptor],
    name: Option<&str>,
    level: u8,
) -> Result<&'a Descriptor, Error> {
    let named: Vec<_> = entries
        .iter()
        .filter(|entry| name.is_none_or(|name| has_name(entry, name)))
        .collect();
    let level_of = |entry: &Descriptor| level_of(entry).filter(|needed| *needed <= level);
    let best = |of: &[&'a Descriptor]| {
        let best = of.iter().filter_map(|entry| level_of(entry)).max();
        let best = of.iter().filter(move |entry| level_of(entry) == best);
        best.copied().collect::<Vec<_>>()
    };
    let mut fitting: Vec<&Descriptor> = Vec::new();
    // Variants are of one image, which has one name.
    let mut names: Vec<_> = named.iter().map(|entry| first_name(entry)).collect();
    names.sort_unstable();
    names.dedup();
    let fits: Vec<_> = named
        .iter()
        .copied()
        .filter(|entry| level_of(entry).is_some())
        .collect();
    for name in names {
        let of: Vec<_> = fits
            .iter()
            .copied()
            .filter(|entry| first_name(entry) == name)
            .collect();
        fitting.extend(best(&of));
    }
    let (Some(first), rest) = (fitting.first(), fitting.iter().skip(1)) else {
        return Err(match name {
            Some(_) if named.is_empty() => Error::Name {
                names: names_of(entries.iter().filter_map(first_name)),
            },
            _ if entries.is_empty() => Error::Count(0),
            _ => Error::Platform,
        });
    };
    if rest.clone().all(|entry| entry.digest == first.digest) {
        return Ok(first);
    }
    match names_of(fitting.iter().filter_map(|entry| first_name(entry))) {
        names if names.is_empty() || name.is_some() => Err(Error::Count(fitting.len())),
        names => Err(Error::Several {
            count: fitting.len(),
            names,
        }),
    }
}

/// Names for people to choose from.
pub fn names_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    let more = names.len().saturating_sub(NAMES_MAX);
    names.truncate(NAMES_MAX);
    let short = |name: &&str| name.chars().take(100).collect::<String>();
    let text = names.iter().map(short).collect::<Vec<_>>().join(", ");
    match more {
        0 => text,
        _ => format!("{text} and {more} more"),
    }
}

/// What an entry asks of the CPU; nothing if it is for another kind of machine.
fn level_of(entry: &Descriptor) -> Option<u8> {
    let Some(platform) = &entry.platform else {
        return Some(1);
    };
    if platform.os != OS || platform.architecture != ARCHITECTURE {
        return None;
    }
    match platform.variant.as_deref() {
        None | Some("" | "v1") => Some(1),
        Some("v2") => Some(2),
        Some("v3") => Some(3),
        Some("v4") => Some(4),
        Some(_) => None,
    }
}

fn first_name(entry: &Descriptor) -> Option<&str> {
    let find = |key| entry.annotations.as_ref()?.get(key);
    find(LONG_NAME)
        .map(|name| short(name))
        .or_else(|| find(NAME).map(String::as_str))
}

fn has_name(entry: &Descriptor, name: &str) -> bool {
    let Some(annotations) = &entry.annotations else {
        return false;
    };
    let said = |key| annotations.get(key).map(String::as_str);
    said(NAME) == Some(name) || said(LONG_NAME).is_some_and(|long| is_name(long, name))
}

/// Whether a full name is what `name` means: the registry that is meant without one may be left away,
/// and the tag `latest`.
#[must_use]
pub fn is_name(full: &str, name: &str) -> bool {
    let is = |name: &str| full == name || short(full) == short(name);
    is(name) || is(&format!("{name}:latest"))
}

fn short(name: &str) -> &str {
    let found = DEFAULT_PLACES
        .iter()
        .find_map(|place| name.strip_prefix(place));
    found.unwrap_or(name)
}

#[cfg(test)]
#[path = "choose_tests.rs"]
mod tests;
