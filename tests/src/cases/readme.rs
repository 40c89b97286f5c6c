//! The commands that README gives for Linux guests, as they are written there, and the network that they
//! find: each card asks by DHCP, also in a network that the guest has not seen before.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::net::with_route;
use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::{self, DEBIAN};
use crate::process::{Finished, Process};
use crate::{ensure, ensure_eq, namespace};

pub(super) const CASES: &[Case] = &[Case {
    name: "debian_does_what_readme_says",
    run: readme,
    needs: Needs::linux(&[DEBIAN])
        .as_root()
        .with_programs(&["passt", "curl"])
        .with_memory_mib(2048)
        .within(180),
}];

const README: &str = include_str!("../../../README.md");
/// What the commands come after.
const SECTION: &str = "\nWith Linux, ";
/// How long one command may take, in lane 1's time.
const COMMAND: Duration = Duration::from_secs(60);
/// How long a guest may take to ask by DHCP.
const LEASE: Duration = Duration::from_secs(20);
/// The host's name servers, as passt finds and passes them on.
const RESOLV_CONF: &str = "search lane.example\nnameserver 10.9.0.53\n";

/// The section's indented lines without their remarks.
fn commands() -> Outcome<Vec<String>> {
    let section = README.split_once(SECTION).map(|(_, section)| section);
    let section = section.ok_or_else(|| Failure::new("README has no section about Linux"))?;
    let lines = section
        .lines()
        .skip(1)
        .take_while(|line| !line.starts_with('#'));
    let commands = lines.filter_map(|line| line.strip_prefix("    "));
    let bare = commands.map(|line| {
        line.split(" # ")
            .next()
            .unwrap_or(line)
            .trim_end()
            .to_owned()
    });
    Ok(bare.collect())
}

/// Starts a command line in the host's directory, where `cloudlet` is the program under test.
fn start(host: &Host, line: &str) -> Outcome<Process> {
    let mut command = Command::new("sh");
    let program = host.command(&[""; 0]);
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let path = std::env::var("PATH").unwrap_or_default();
    command
        .args(["-ec", line])
        .current_dir(host.path(""))
        .env("PATH", format!("{}:{path}", host.path("bin").display()));
    Process::spawn(&mut command, Stdio::piped())
}

fn shell(host: &Host, line: &str) -> Outcome<Finished> {
    let mut process = start(host, line)?;
    drop(process.stdin());
    process.wait(host.limit(COMMAND))
}

/// As a user at the terminal, who types when there is a prompt.
fn at_the_prompt(host: &Host, line: &str) -> Outcome<Finished> {
    let mut process = start(host, line)?;
    let input = process.stdin();
    process.wait_for_output("root@cloudlet", host.limit(COMMAND))?;
    if let Some(mut input) = input {
        input.write_all(b"echo \"it is $(uname -n)\"; poweroff\n")?;
    }
    process.wait(host.limit(COMMAND))
}

fn readme(host: &Host) -> Outcome {
    with_route("10.9.0")?;
    namespace::private_mounts()?;
    fs::write(host.path("resolv.conf"), RESOLV_CONF)?;
    namespace::bind(&host.path("resolv.conf"), "/etc/resolv.conf".as_ref())?;
    fs::create_dir_all(host.path("bin"))?;
    symlink(host.program(), host.path("bin/cloudlet"))?;
    fs::create_dir_all(host.path("site"))?;
    fs::write(host.path("site/page"), "a page\n")?;
    let commands = commands()?;
    let mut seen = [false; 4];
    for line in &commands {
        // `tests/linux/debian` has run this one, where the packages are.
        if line.starts_with("cloudlet image build debian deb") {
            symlink(linux::dir(DEBIAN)?, host.path("deb"))?;
            seen[0] = true;
            continue;
        }
        let attached = line.starts_with("cloudlet run ") && !line.contains("--detach");
        let run = if attached { at_the_prompt } else { shell };
        let said = run(host, line)?
            .expect_code(0)
            .map_err(|failure| Failure::new(format!("{line}: {failure}{}", host.evidence())))?
            .stdout;
        let (at, expected) = match line {
            _ if attached => (1, "it is cloudlet"),
            line if line.ends_with("ls /srv") => (2, "page"),
            line if line.starts_with("curl ") => (3, "hello"),
            _ => continue,
        };
        ensure!(said.contains(expected), "{line}: no {expected:?} in {said}");
        seen[at] = true;
    }
    ensure_eq!(
        seen,
        [true; 4],
        "what README has of each kind: {commands:?}"
    );
    elsewhere(host)
}

/// The published VM has what DHCP said, and in another network what it says there.
fn elsewhere(host: &Host) -> Outcome {
    let ask = |vm: &str, what: &str| host.ok(&["exec", vm, "--", "sh", "-c", what]);
    let address = ask("www", "busybox ip -4 -o addr show dev eth0")?;
    ensure!(
        address.contains("10.9.0.1/24"),
        "no address of the host's: {address}"
    );
    let resolv = ask("www", "cat /etc/resolv.conf")?;
    ensure!(
        resolv.contains("nameserver 10.9.0.53"),
        "no name server: {resolv}"
    );
    host.ok(&["snapshot", "www", "snap"])?;
    host.ok(&["stop", "www"])?;

    with_route("10.8.0")?;
    fs::write(
        host.path("resolv.conf"),
        RESOLV_CONF.replace("10.9", "10.8"),
    )?;
    let net = ["--net", "user", "--publish", "8080:80"];
    host.ok(&[&["restore", "snap", "--name", "again"], &net[..]].concat())?;
    let look = "busybox ip -4 -o addr show dev eth0; cat /etc/resolv.conf";
    host.wait_until("an address of the other network", LEASE, || {
        let said = ask("again", look).ok()?;
        let moved = said.contains("10.8.0.1/24") && said.contains("nameserver 10.8.0.53");
        (moved && !said.contains("10.9.0.")).then_some(())
    })?;
    host.wait_until("the published port", LEASE, || {
        let said = shell(host, "curl --silent --max-time 5 localhost:8080").ok()?;
        said.stdout.contains("hello").then_some(())
    })
}
