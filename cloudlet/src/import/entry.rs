//! An OCI image's process as a script: environment, directory, user, program and arguments as the
//! image has them. `resources/linux/init` runs it with busybox's path as its argument.

use super::oci::Config;
use super::spool::Spool;
use super::tree::{Kind, Tree};

/// Most words and variables together.
const WORDS_MAX: usize = 4096;
/// Longest of them.
const WORD_LEN_MAX: usize = 128 << 10;
/// Longest table of users or groups.
const TABLE_LEN_MAX: u64 = 4 << 20;
/// Where programs are looked for if the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why an image's process cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something in it is too long, or cannot be said.
    #[error("the image's {0} is too long, or has a zero byte")]
    Words(&'static str),
    /// A variable has no name.
    #[error("{0:?} is no variable")]
    Variable(String),
    /// The user is not in the image's tables.
    #[error("the image's user {0:?} is not in its /etc/passwd or /etc/group")]
    User(String),
}

/// The script, if the image has a process.
///
/// # Errors
/// The image says what cannot be done.
pub fn script(config: &Config, tree: &Tree, spool: &dyn Spool) -> Result<Option<String>, Error> {
    let list = |words: &Option<Vec<String>>| words.clone().unwrap_or_default();
    let command = [list(&config.entrypoint), list(&config.cmd)].concat();
    if command.is_empty() {
        return Ok(None);
    }
    let mut variables = list(&config.env);
    if variables.len() + command.len() > WORDS_MAX {
        return Err(Error::Words("command"));
    }
    if let Some(bad) = variables
        .iter()
        .find(|word| word.find('=').unwrap_or(0) == 0)
    {
        return Err(Error::Variable(bad.chars().take(100).collect()));
    }
    if !variables.iter().any(|word| word.starts_with("PATH=")) {
        variables.insert(0, PATH.into());
    }
    let user = match config.user.as_deref().unwrap_or("") {
        "" => None,
        text => Some(user(text, tree, spool)?),
    };
    let home = user.as_ref().map_or("/root", |user| &user.home);
    if !variables.iter().any(|word| word.starts_with("HOME=")) {
        variables.push(format!("HOME={home}"));
    }
    let dir = config.working_dir.as_deref().filter(|dir| !dir.is_empty());
    let mut text = String::from("#!/bin/sh\n# The image's process; the argument is busybox.\n");
    text += &format!("cd {} || exit 126\n", quoted(dir.unwrap_or("/"))?);
    // With a process id file that is not there, none is found to run already.
    let start = match &user {
        Some(User { uid, gid, .. }) => format!(
            "exec \"$1\" start-stop-daemon -S -p /run/cloudlet-none -c {uid}:{gid} -a \"$1\" -- env -i"
        ),
        None => "exec \"$1\" env -i".to_owned(),
    };
    text += &start;
    for word in variables.iter().chain(&command) {
        text += " ";
        text += &quoted(word)?;
    }
    text += "\n";
    Ok(Some(text))
}

/// A word that the shell takes as it is.
fn quoted(word: &str) -> Result<String, Error> {
    if word.len() > WORD_LEN_MAX || word.contains('\0') {
        return Err(Error::Words("command"));
    }
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

struct User {
    uid: u32,
    gid: u32,
    home: String,
}

/// `USER[:GROUP]`, each a name of the image's tables or a number.
fn user(text: &str, tree: &Tree, spool: &dyn Spool) -> Result<User, Error> {
    let unknown = || Error::User(text.chars().take(100).collect());
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let users = table(b"/etc/passwd", tree, spool);
    let row = users
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|row| row.len() >= 6 && (row[0] == user || row[2] == user));
    let number = |text: &str| text.parse::<u32>().ok();
    let uid = match &row {
        Some(row) => number(row[2]),
        None => number(user),
    };
    let gid = match (group, &row) {
        (Some(group), _) => group_number(group, &table(b"/etc/group", tree, spool)),
        (None, Some(row)) => number(row[3]),
        (None, None) => Some(0),
    };
    Ok(User {
        uid: uid.ok_or_else(unknown)?,
        gid: gid.ok_or_else(unknown)?,
        home: row.map_or_else(|| "/".to_owned(), |row| row[5].to_owned()),
    })
}

fn group_number(group: &str, groups: &str) -> Option<u32> {
    let named = groups
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|row| row.len() >= 3 && row[0] == group)
        .and_then(|row| row[2].parse().ok());
    named.or_else(|| group.parse().ok())
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

    #[test]
    fn words_reach_the_program_as_they_are() {
        let (tree, spool) = tree_with(&[]);
        let config = Config {
            env: words(&["A=it's $HOME `id`\n\"", "HOME=/h"]),
            entrypoint: words(&["/bin/sh", "-c"]),
            cmd: words(&["echo \"$A\"; pwd; echo \"$HOME\"; echo \"${UNSET-none}\""]),
            working_dir: Some("/tmp".into()),
            user: None,
        };
        let script = script(&config, &tree, &spool).unwrap().unwrap();
        let output = std::process::Command::new("sh")
            .args(["-c", &script, "entrypoint", "nice"])
            .env("UNSET", "set")
            .output()
            .unwrap();
        // `nice env …` runs `env …`, as busybox does.
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said, "it's $HOME `id`\n\"\n/tmp\n/h\nnone\n", "{script}");
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let (tree, spool) = tree_with(&[
            (
                "/etc/passwd",
                "root:x:0:0::/root:/bin/sh\nweb:x:33:44:Web:/srv:/bin/sh\n",
            ),
            ("/etc/group", "staff:x:50:\n"),
        ]);
        for (text, uid, gid, home) in [
            ("web", 33, 44, "/srv"),
            ("33", 33, 44, "/srv"),
            ("web:staff", 33, 50, "/srv"),
            ("1000:7", 1000, 7, "/"),
            ("1000", 1000, 0, "/"),
        ] {
            let user = user(text, &tree, &spool).unwrap();
            assert_eq!(
                (user.uid, user.gid, user.home.as_str()),
                (uid, gid, home),
                "{text}"
            );
        }
        for bad in ["nobody", "web:nogroup", "-1", "1;2"] {
            assert!(
                matches!(user(bad, &tree, &spool), Err(Error::User(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn what_cannot_be_said_is_refused() {
        let (tree, spool) = tree_with(&[]);
        let config = |env: &[&str], cmd: &[&str]| Config {
            env: words(env),
            cmd: words(cmd),
            ..Config::default()
        };
        assert!(
            script(&config(&["A=b"], &[]), &tree, &spool)
                .unwrap()
                .is_none()
        );
        assert!(script(&config(&["A"], &["x"]), &tree, &spool).is_err());
        assert!(script(&config(&["=b"], &["x"]), &tree, &spool).is_err());
        assert!(script(&config(&[], &["x\0"]), &tree, &spool).is_err());
        let many = vec!["x"; WORDS_MAX + 1];
        assert!(script(&config(&[], &many), &tree, &spool).is_err());
    }
}
