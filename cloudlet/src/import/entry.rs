//! An OCI image's process: user, directory, environment and words as the image has them, in the file that
//! the guest's agent starts it from (`agent/src/entry.rs`). Names are looked up in the image's own tables,
//! as engines do (runc's `libcontainer/user`).

use cloudlet_agent::entry::{self, Entry, GROUPS_MAX, ID_MAX};

use super::oci::Config;
use super::spool::Spool;
use super::tree::{Kind, Tree};

/// Longest table of users or groups.
const TABLE_LEN_MAX: u64 = 4 << 20;
/// Where programs are looked for if the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why an image's process cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be said.
    #[error(transparent)]
    Entry(#[from] entry::Error),
    /// A variable has no name.
    #[error("{0:?} is no variable")]
    Variable(String),
    /// The user is not in the image's tables, and not a number either.
    #[error("the image's user {0:?} is not in its /etc/passwd or /etc/group")]
    User(String),
    /// The directory is something else in the image.
    #[error("the image's directory {0:?} is no directory")]
    Directory(String),
}

/// The file for the agent, if the image has a process.
///
/// # Errors
/// The image says what cannot be done.
pub fn file(config: &Config, tree: &Tree, spool: &dyn Spool) -> Result<Option<Vec<u8>>, Error> {
    let list = |words: &Option<Vec<String>>| words.clone().unwrap_or_default();
    let command = [list(&config.entrypoint), list(&config.cmd)].concat();
    if command.is_empty() {
        return Ok(None);
    }
    let mut variables = list(&config.env);
    if let Some(bad) = variables
        .iter()
        .find(|word| word.find('=').unwrap_or(0) == 0)
    {
        return Err(Error::Variable(start_of(bad)));
    }
    let user = user(config.user.as_deref().unwrap_or(""), tree, spool)?;
    if !variables.iter().any(|word| word.starts_with("PATH=")) {
        variables.insert(0, PATH.into());
    }
    if !variables.iter().any(|word| word.starts_with("HOME=")) {
        variables.push(format!("HOME={}", user.home));
    }
    let directory = directory(config.working_dir.as_deref().unwrap_or(""));
    if let Some(id) = tree.find(directory.as_bytes())
        && !matches!(tree.node(id).kind, Kind::Directory(_))
    {
        return Err(Error::Directory(start_of(&directory)));
    }
    let bytes = |words: Vec<String>| words.into_iter().map(String::into_bytes).collect();
    let entry = Entry {
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
        directory: directory.into_bytes(),
        environment: bytes(variables),
        arguments: bytes(command),
    };
    Ok(Some(entry.encode()?))
}

/// The beginning of a text for people.
fn start_of(text: &str) -> String {
    text.chars().take(100).collect()
}

/// A directory without `.` and `..`: engines leave them out before they look at any link.
fn directory(text: &str) -> String {
    let mut names = Vec::new();
    for name in text.split('/') {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    format!("/{}", names.join("/"))
}

struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

/// `USER[:GROUP]`, each a number or a name of the image's tables; 0 if there is none. What is a number
/// need not be in a table. A user of the table is in the groups that name it, unless a group is given.
fn user(text: &str, tree: &Tree, spool: &dyn Spool) -> Result<User, Error> {
    let unknown = || Error::User(start_of(text));
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let user = if user.is_empty() { "0" } else { user };
    let users = table(b"/etc/passwd", tree, spool);
    let named = id(user);
    let row = rows(&users).find(|row| {
        row.len() >= 6
            && match named {
                Some(uid) => id(row[2]) == Some(uid),
                None => row[0] == user,
            }
    });
    let row_id = |at: usize| row.as_ref().and_then(|row| id(row[at]));
    let uid = named.or_else(|| row_id(2)).ok_or_else(unknown)?;
    let all = table(b"/etc/group", tree, spool);
    let mut groups = Vec::new();
    let gid = match (group, &row) {
        ("", None) => 0,
        ("", Some(row)) => {
            let is_member = |group: &Vec<&str>| {
                let members = group.get(3).copied().unwrap_or("");
                members.split(',').any(|member| member.trim() == row[0])
            };
            let members = rows(&all).filter(is_member);
            groups.extend(members.filter_map(|group| id(group[2])).take(GROUPS_MAX));
            row_id(3).ok_or_else(unknown)?
        }
        (group, _) => id(group)
            .or_else(|| {
                let mut named = rows(&all).filter(|row| row.len() >= 3 && row[0] == group);
                named.find_map(|row| id(row[2]))
            })
            .ok_or_else(unknown)?,
    };
    let home = row.map(|row| row[5]).filter(|home| !home.is_empty());
    Ok(User {
        uid,
        gid,
        groups,
        home: home.unwrap_or("/").to_owned(),
    })
}

/// A user's or group's number.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_MAX)
}

fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    table.lines().map(|line| line.split(':').collect())
}

/// A table as text; empty where there is none that can be read.
fn table(path: &[u8], tree: &Tree, spool: &dyn Spool) -> String {
    let blob = tree.find(path).and_then(|id| match tree.node(id).kind {
        Kind::File(blob) => Some(blob),
        _ => None,
    });
    let bytes = blob.and_then(|blob| spool.load(blob, TABLE_LEN_MAX).ok());
    String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::spool::MemorySpool;
    use super::super::tree::Attributes;
    use super::*;

    fn words(text: &[&str]) -> Option<Vec<String>> {
        Some(text.iter().map(|&word| word.to_owned()).collect())
    }

    fn tree_with(tables: &[(&str, &str)]) -> (Tree, MemorySpool) {
        let (mut tree, mut spool) = (Tree::new(), MemorySpool::new(1 << 20));
        for (path, text) in tables {
            let blob = spool
                .store(&mut text.as_bytes(), text.len() as u64)
                .unwrap();
            tree.put(
                path.as_bytes(),
                Attributes::default(),
                Kind::File(blob),
                &mut spool,
            )
            .unwrap();
        }
        (tree, spool)
    }

    fn entry(config: &Config, (tree, spool): &(Tree, MemorySpool)) -> Result<Entry, Error> {
        let bytes = file(config, tree, spool)?.unwrap();
        Ok(Entry::decode(&bytes).unwrap())
    }

    fn text_of(word: &[u8]) -> String {
        String::from_utf8(word.to_vec()).unwrap()
    }

    #[test]
    fn words_are_told_as_they_are() {
        let config = Config {
            env: words(&["A=it's $HOME `id`\n\"", "HOME=/h"]),
            entrypoint: words(&["/bin/sh", "-c"]),
            cmd: words(&["echo \"$A\""]),
            working_dir: Some("srv/../opt//app/.".into()),
            user: None,
        };
        let entry = entry(&config, &tree_with(&[])).unwrap();
        let told = |words: &[Vec<u8>]| words.iter().map(|word| text_of(word)).collect::<Vec<_>>();
        let expected = [PATH, "A=it's $HOME `id`\n\"", "HOME=/h"];
        assert_eq!(told(&entry.environment), expected);
        let expected = ["/bin/sh", "-c", "echo \"$A\""];
        assert_eq!(told(&entry.arguments), expected);
        assert_eq!(entry.directory, b"/opt/app");
        assert_eq!((entry.uid, entry.gid), (0, 0));
    }

    #[test]
    fn users_are_numbers_or_names_of_the_tables() {
        let tables = [
            (
                "/etc/passwd",
                "root:x:0:0::/root:/bin/sh\nweb:x:33:44:Web:/srv:/bin/sh\n1002:x:34:45::/odd:/\n",
            ),
            (
                "/etc/group",
                "staff:x:50:\nadm:x:4:root,web\nwww:x:60:web,www\nweb:x:44:\nshort:x\n",
            ),
        ];
        let image = tree_with(&tables);
        for (text, uid, gid, groups, home) in [
            ("", 0, 0, &[4][..], "/root"),
            ("root", 0, 0, &[4], "/root"),
            ("web", 33, 44, &[4, 60], "/srv"),
            ("33", 33, 44, &[4, 60], "/srv"),
            ("web:", 33, 44, &[4, 60], "/srv"),
            ("web:staff", 33, 50, &[], "/srv"),
            ("web:1234", 33, 1234, &[], "/srv"),
            ("1000:7", 1000, 7, &[], "/"),
            ("1000", 1000, 0, &[], "/"),
            // A number is a number, whatever somebody is called.
            ("1002", 1002, 0, &[], "/"),
            (":staff", 0, 50, &[], "/root"),
        ] {
            let config = Config {
                cmd: words(&["x"]),
                user: Some(text.into()),
                ..Config::default()
            };
            let entry = entry(&config, &image).unwrap();
            assert_eq!((entry.uid, entry.gid), (uid, gid), "{text}");
            assert_eq!(entry.groups, groups, "{text}");
            let home = format!("HOME={home}").into_bytes();
            assert!(entry.environment.contains(&home), "{text}");
        }
        let (tree, spool) = image;
        for bad in [
            "nobody",
            "web:nogroup",
            "-1",
            "1;2",
            "4294967295",
            "1:2147483648",
            "web:short",
        ] {
            assert!(
                matches!(user(bad, &tree, &spool), Err(Error::User(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_cannot_be_said_is_refused() {
        let image = tree_with(&[("/srv/file", "")]);
        let config = |env: &[&str], cmd: &[&str], dir: &str| Config {
            env: words(env),
            cmd: words(cmd),
            working_dir: Some(dir.to_owned()),
            ..Config::default()
        };
        let none = file(&config(&["A=b"], &[], ""), &image.0, &image.1);
        assert!(none.unwrap().is_none());
        for bad in [
            config(&["A"], &["x"], ""),
            config(&["=b"], &["x"], ""),
            config(&[], &["x\0"], ""),
            config(&[], &vec!["x"; entry::WORDS_MAX + 1], ""),
            config(&[], &["x"], "/srv/file"),
            config(&[], &["x"], "/srv\0"),
        ] {
            assert!(entry(&bad, &image).is_err(), "{:?}", bad.env);
        }
        // One that is not there is made when the process starts.
        entry(&config(&[], &["x"], "/srv/new"), &image).unwrap();
    }
}
