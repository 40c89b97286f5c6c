//! The agent of Linux guests: commands, files, and what a snapshot need not hold.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cloudlet_resources::AGENT_ELF;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::LinuxGuest;
use crate::process::Process;
use crate::terminal::Terminal;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_guest_without_an_agent_is_told_apart",
        run: no_agent,
        needs: Needs::GUEST,
    },
    Case {
        name: "linux_agent_runs_commands",
        run: commands,
        needs: Needs::linux(&["6.1"]),
    },
    Case {
        name: "linux_agent_copies_both_ways",
        run: copies,
        needs: Needs::linux(&["6.1"]),
    },
    Case {
        name: "linux_agent_gives_disk_blocks_back_and_outlives_a_restore",
        run: sync_and_restore,
        needs: Needs::linux(&["6.1"]).with_memory_mib(1024),
    },
];

/// The code of `cloudlet exec` when it fails itself.
const EXEC_FAILED: i32 = 125;
/// A time that everything here fits in.
const LIMIT: Duration = Duration::from_secs(20);

fn no_agent(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    let exec = |name| host.fails(&["exec", name, "--", "true"], EXEC_FAILED);
    let said = exec("web")?;
    ensure!(said.contains("no agent answers"), "{said}");
    let said = host.fails(&["cp", "web:/etc/passwd", "."], 1)?;
    ensure!(said.contains("no agent answers"), "{said}");
    ensure!(!host.path("passwd").exists(), "a file came of it");
    let said = host.fails(&["sync", "web"], 1)?;
    ensure!(said.contains("no agent answers"), "{said}");
    host.ok(&["pause", "web"])?;
    let said = exec("web")?;
    ensure!(said.contains("web is paused"), "{said}");
    let said = exec("none")?;
    ensure!(said.contains("no VM named none"), "{said}");
    for (from, to) in [("a", "b"), ("web:a", "web:b")] {
        let said = host.fails(&["cp", from, to], 1)?;
        ensure_eq!(said.lines().count(), 1, "sentences in {said:?}");
    }
    // The guest took no harm.
    host.ok(&["resume", "web"])?;
    host.install_fluid("web")
}

/// A Linux guest called `vm` with the agent running.
fn boot(host: &Host, options: &[&str]) -> Outcome {
    let modules = [
        "virtio_mmio",
        "virtio_blk",
        "crc32c_generic",
        "ext4",
        "vmw_vsock_virtio_transport",
    ];
    let script = "/case/cloudlet-agent & sleep 1000000";
    let programs = [("cloudlet-agent", AGENT_ELF)];
    let guest = LinuxGuest::with_programs(host, "6.1", &modules, script, &programs)?;
    guest.boot(host, "vm", options)?;
    host.wait_until("the agent", LIMIT, || {
        host.ok(&["exec", "vm", "--", "true"]).ok().map(drop)
    })
}

/// Runs `script` in the guest, which must succeed, and returns its output.
#[track_caller]
fn shell(host: &Host, name: &str, script: &str) -> Outcome<String> {
    host.ok(&["exec", name, "--", "sh", "-c", script])
}

fn commands(host: &Host) -> Outcome {
    boot(host, &[])?;
    let ends = [("exit 7", 7), ("kill -9 $$", 137), ("no-such-command", 127)];
    for (script, code) in ends {
        host.fails(&["exec", "vm", "--", "sh", "-c", script], code)?;
    }
    let said = host.fails(&["exec", "vm", "--", "no-such-command"], 127)?;
    ensure!(said.contains("no-such-command"), "{said}");
    let both = host.run(&["exec", "vm", "--", "sh", "-c", "echo out; echo err >&2"])?;
    ensure_eq!(
        (both.stdout.as_str(), both.stderr.as_str()),
        ("out\n", "err\n"),
        "outputs"
    );
    let seen = host.ok(&[
        "exec",
        "vm",
        "--cwd",
        "/proc",
        "--env",
        "A=b c",
        "--",
        "sh",
        "-c",
        "pwd; echo $A",
    ])?;
    ensure_eq!(seen, "/proc\nb c\n", "directory and environment");
    let seen = host.ok(&["exec", "-t", "vm", "--", "tty"])?;
    ensure_eq!(seen, "/dev/pts/0\r\n", "terminal");

    // A mebibyte and a half there and back.
    let text: String = (0..200_000).map(|line| format!("{line}\n")).collect();
    let mut cat = Process::spawn(
        &mut host.command(&["exec", "vm", "--", "cat"]),
        Stdio::piped(),
    )?;
    let mut input = cat.stdin().ok_or_else(|| Failure::new("no input"))?;
    input.write_all(text.as_bytes())?;
    drop(input);
    let came_back = cat.wait(host.limit(LIMIT))?.expect_code(0)?.stdout;
    ensure!(came_back == text, "{} bytes came back", came_back.len());

    // Nothing of ours is read where that is not wanted.
    let mut nothing = Process::spawn(
        &mut host.command(&["exec", "-n", "vm", "--", "cat"]),
        Stdio::piped(),
    )?;
    let input = nothing.stdin();
    let seen = nothing.wait(host.limit(LIMIT))?.expect_code(0)?.stdout;
    drop(input);
    ensure_eq!(seen, "", "what came of an input that was left alone");

    let script = "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let waiting = host.spawn(&["exec", "vm", "--", "sh", "-c", script])?;
    waiting.wait_for_output("ready", host.limit(LIMIT))?;
    waiting.signal(libc::SIGINT)?;
    let ended = waiting.wait(host.limit(LIMIT))?.expect_code(9)?;
    ensure_eq!(ended.stdout, "ready\ngot\n", "what it said");

    terminals(host)?;

    // One whose host is gone is ended.
    let script = "echo ready; exec sleep 54321";
    let orphan = host.spawn(&["exec", "vm", "--", "sh", "-c", script])?;
    orphan.wait_for_output("ready", host.limit(LIMIT))?;
    ensure!(is_running(host, "vm")?, "the command does not run");
    orphan.signal(libc::SIGKILL)?;
    host.wait_until("the end of the command", LIMIT, || {
        (!is_running(host, "vm").ok()?).then_some(())
    })
}

/// The guest's console has the terminal's size, and the terminal is afterwards what it was.
fn terminals(host: &Host) -> Outcome {
    let terminal = Terminal::new()?;
    terminal.resize(47, 132)?;
    let is_size = |wanted: &str| {
        let size = || shell(host, "vm", "stty size </dev/ttyS0").ok();
        host.wait_until(&format!("a console of {wanted}"), LIMIT, || {
            (size()?.trim() == wanted).then_some(())
        })
    };
    let console = terminal.spawn(&mut host.command(&["console", "vm"]))?;
    is_size("47 132")?;
    terminal.resize(50, 100)?;
    is_size("50 100")?;
    console.signal(libc::SIGTERM)?;
    console.wait(host.limit(LIMIT))?.expect_code(143)?;
    ensure!(!terminal.is_raw()?, "console left the terminal raw");

    let terminal = Terminal::new()?;
    terminal.resize(47, 132)?;
    // The command does not heed the signal: it is for the one in front of the terminal.
    let script = "trap '' TERM; stty size; sleep 54321; exit 1";
    let command = ["exec", "-t", "vm", "--", "sh", "-c", script];
    let exec = terminal.spawn(&mut host.command(&command))?;
    exec.wait_for_output("47 132", host.limit(LIMIT))?;
    ensure!(terminal.is_raw()?, "the terminal handles keys itself");
    exec.signal(libc::SIGTERM)?;
    exec.wait(host.limit(LIMIT))?.expect_code(143)?;
    ensure!(!terminal.is_raw()?, "exec left the terminal raw");
    host.wait_until("the end of the command", LIMIT, || {
        (!is_running(host, "vm").ok()?).then_some(())
    })
}

/// Whether the guest runs `sleep 54321`.
fn is_running(host: &Host, name: &str) -> Outcome<bool> {
    // The brackets keep the pattern from matching the shell that has it in its own arguments.
    let found = shell(host, name, "ps | grep -c 'sleep 5432[1]' || true")?;
    Ok(found.trim() != "0")
}

fn copies(host: &Host) -> Outcome {
    boot(host, &[])?;
    let tree = host.path("tree");
    fs::create_dir_all(tree.join("a/b"))?;
    let text: String = (0..400_000).map(|line| format!("{line}\n")).collect();
    fs::write(tree.join("a/b/large"), &text)?;
    fs::write(tree.join("empty"), "")?;
    std::os::unix::fs::symlink("a/b", tree.join("link"))?;
    let tree = tree.to_string_lossy().into_owned();
    host.ok(&["cp", &tree, "vm:/tmp"])?;
    let sums = "cd tree && find . -type f | sort | xargs sha256sum && readlink link";
    let ours = Command::new("sh")
        .args(["-c", sums])
        .current_dir(host.path("."))
        .output()?;
    let theirs = shell(host, "vm", &format!("cd /tmp; {sums}"))?;
    ensure_eq!(theirs, String::from_utf8_lossy(&ours.stdout), "checksums");
    ensure_eq!(theirs.lines().count(), 3, "lines in {theirs:?}");

    let back = host.path("back").to_string_lossy().into_owned();
    host.ok(&["cp", "vm:/tmp/tree", &back])?;
    ensure!(
        fs::read_to_string(Path::new(&back).join("a/b/large"))? == text,
        "the file is not as it was"
    );
    ensure_eq!(
        fs::read_link(Path::new(&back).join("link"))?,
        Path::new("a/b"),
        "link"
    );
    let said = host.fails(&["cp", "vm:/no/such", &back], 1)?;
    ensure!(said.contains("/no/such"), "{said}");
    let said = host.fails(&["cp", &tree, "vm:/proc/1/x"], 1)?;
    ensure!(said.contains("/proc/1/x"), "{said}");
    Ok(())
}

/// What the guest writes and deletes, in MiB, and the least of it that must be gone from the disk.
const WRITTEN_MIB: u64 = 24;
const GONE_MIB_MIN: u64 = 20;

fn sync_and_restore(host: &Host) -> Outcome {
    boot(host, &["--disk", "empty:64"])?;
    shell(
        host,
        "vm",
        &format!(
            "mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt && echo kept >/mnt/kept &&
             dd if=/dev/urandom of=/mnt/large bs=1M count={WRITTEN_MIB} 2>/dev/null && sync"
        ),
    )?;
    let before = snapshot(host, "before")?;
    shell(host, "vm", "rm /mnt/large")?;
    let said = host.json(&["sync", "vm"])?;
    ensure!(
        said["trimmed_bytes"].as_u64() >= Some(GONE_MIB_MIN << 20),
        "{said}"
    );
    ensure_eq!(said["file_systems"][0]["path"], "/mnt", "what was trimmed");

    // A command runs across the snapshot: it goes on here, and not in the restored VM, whose host's
    // side of the connection does not exist.
    let running = host.spawn(&[
        "exec",
        "vm",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 54321",
    ])?;
    running.wait_for_output("ready", host.limit(LIMIT))?;
    let after = snapshot(host, "after")?;
    ensure!(
        before >= after + (GONE_MIB_MIN << 20),
        "the disk has {after} bytes in the snapshot, {before} before"
    );
    ensure!(
        is_running(host, "vm")?,
        "the command was ended by a snapshot"
    );
    host.ok(&[
        "restore",
        &host.path("after").to_string_lossy(),
        "--name",
        "again",
    ])?;
    ensure_eq!(
        shell(host, "again", "cat /mnt/kept")?,
        "kept\n",
        "the disk after the restore"
    );
    host.wait_until("the end of the command", LIMIT, || {
        (!is_running(host, "again").ok()?).then_some(())
    })?;
    ensure!(
        is_running(host, "vm")?,
        "the command was ended by a restore"
    );
    Ok(())
}

/// Snapshots `vm`, and says how many bytes its disk takes there.
fn snapshot(host: &Host, name: &str) -> Outcome<u64> {
    let dir = host.path(name);
    host.ok(&["snapshot", "vm", &dir.to_string_lossy()])?;
    Ok(fs::metadata(dir.join("disk0"))?.blocks() * 512)
}
