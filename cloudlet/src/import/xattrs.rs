//! Which extended attributes of a source are kept: file capabilities, without which a program that has
//! them does not work, and those of users. What belongs to the host that they come from is left out, and
//! counted: access control lists, the labels of its security modules, marks of its overlay file systems.

use std::collections::BTreeMap;

use cloudlet_agent::tree::capability;

use super::tree::Kind;

/// An extended attribute: its name, with what it begins with, and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A file's capabilities.
pub const CAPABILITY: &[u8] = capability::NAME.as_bytes();
/// What names of users' own begin with.
const USER: &[u8] = b"user.";
/// Longest name (`XATTR_NAME_MAX` of linux/limits.h).
const NAME_LEN_MAX: usize = 255;
/// What one takes in a block beside its name and value at the most: its head, and padding of both.
const HEAD_LEN: usize = 16 + 3 + 3;
/// What all of a file may take: a block without its own head and end.
const ROOM: usize = 4096 - 32 - 4;
/// Most names of what is left out that are told apart.
const NAMES_MAX: usize = 16;

/// How many files had an attribute that is left out, by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftOut(BTreeMap<String, u64>);

impl LeftOut {
    fn count(&mut self, name: &[u8]) {
        let plain = |byte: &u8| char::from(if byte.is_ascii_graphic() { *byte } else { b'?' });
        let name: String = name.iter().take(64).map(plain).collect();
        let is_known = self.0.contains_key(&name) || self.0.len() < NAMES_MAX;
        let name = if is_known { name } else { "others".into() };
        *self.0.entry(name).or_default() += 1;
    }

    /// Names of attributes, fit to be shown, and how many files had each.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }
}

/// Keeps what is kept of a file's attributes and fits into one block, in the order of their names; what
/// is not kept is counted.
#[must_use]
pub fn keep(kind: &Kind, mut xattrs: Vec<Xattr>, left_out: &mut LeftOut) -> Vec<Xattr> {
    xattrs.sort();
    xattrs.dedup_by(|(name, _), (before, _)| name == before);
    let mut room = ROOM;
    xattrs.retain(|(name, value)| {
        let needed = HEAD_LEN + name.len() + value.len();
        let is_kept = is_known(kind, name, value) && needed <= room;
        if is_kept {
            room -= needed;
        } else {
            left_out.count(name);
        }
        is_kept
    });
    xattrs
}

/// Whether an attribute is one of those that are kept, on a file that can have it.
fn is_known(kind: &Kind, name: &[u8], value: &[u8]) -> bool {
    if name == CAPABILITY {
        return matches!(kind, Kind::File(_)) && capability::is_one(value);
    }
    let is_name = name.len() <= NAME_LEN_MAX && name.iter().all(u8::is_ascii_graphic);
    let is_users = name.strip_prefix(USER).is_some_and(|rest| !rest.is_empty());
    is_name && is_users && matches!(kind, Kind::File(_) | Kind::Directory(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &[u8], len: usize) -> Xattr {
        (name.to_vec(), vec![1; len])
    }

    #[test]
    fn capabilities_and_users_own_are_kept_and_the_rest_is_counted() {
        let directory = Kind::Directory(BTreeMap::new());
        let mut left_out = LeftOut::default();
        let all = vec![
            one(b"user.note", 3),
            one(b"security.selinux", 9),
            one(b"system.posix_acl_access", 9),
            one(CAPABILITY, 20),
            one(b"user.", 1),
            one(b"user.\xff\x1b", 1),
            one(b"user.long", 4040),
        ];
        let kept = keep(&directory, all, &mut left_out);
        assert_eq!(kept, [one(b"user.note", 3)]);
        assert_eq!(keep(&Kind::Fifo, kept, &mut left_out), []);
        let counted: Vec<_> = left_out.iter().collect();
        assert_eq!(
            counted,
            [
                ("security.capability", 1),
                ("security.selinux", 1),
                ("system.posix_acl_access", 1),
                ("user.", 1),
                ("user.??", 1),
                ("user.long", 1),
                ("user.note", 1),
            ]
        );
    }

    #[test]
    fn there_is_an_end_of_names() {
        let mut left_out = LeftOut::default();
        for number in 0..1000 {
            let name = format!("trusted.{number}");
            let _ = keep(&Kind::Fifo, vec![one(name.as_bytes(), 1)], &mut left_out);
        }
        assert!(left_out.iter().count() <= NAMES_MAX + 1);
        assert_eq!(left_out.iter().map(|(_, count)| count).sum::<u64>(), 1000);
    }
}
