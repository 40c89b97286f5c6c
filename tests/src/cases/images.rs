//! Bootable images: directories that `run --image` boots, and the recipe's errors.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use cloudlet_resources::{GUEST_ELF, GUEST_READY};
use serde_json::json;

use super::{Case, Needs};
use crate::ensure;
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::process::{Process, children_of, is_alive};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "images_run_boots_kernel_initrd_and_root",
        run: boots,
        needs: Needs::GUEST,
    },
    Case {
        name: "images_a_damaged_one_is_refused",
        run: damaged,
        needs: Needs::NO_GUEST,
    },
    Case {
        name: "images_import_makes_bootable_ones",
        run: imports,
        needs: Needs::GUEST,
    },
    Case {
        name: "images_a_killed_build_leaves_nothing",
        run: killed_build,
        needs: Needs::NO_GUEST.with_programs(&["unshare"]).as_root(),
    },
    Case {
        name: "images_import_says_what_it_leaves_out",
        run: left_out,
        needs: Needs::NO_GUEST.with_programs(&["tar"]),
    },
    Case {
        name: "images_build_says_what_is_missing",
        run: missing,
        needs: Needs::NO_GUEST,
    },
];

/// A tar archive of one file becomes a root file system, and boots with the embedded guest as kernel.
fn imports(host: &Host) -> Outcome {
    let tree = host.path("tree");
    fs::create_dir_all(tree.join("etc"))?;
    fs::write(tree.join("etc/motd"), "hello\n")?;
    symlink("/nowhere/outside", tree.join("dangling"))?;
    let archive = host.path("root.tar.gz");
    let packed = Process::spawn(
        std::process::Command::new("tar").args(["-C", text(&tree)?, "-czf", text(&archive)?, "."]),
        Stdio::null(),
    )?;
    packed
        .wait(host.limit(Duration::from_secs(20)))?
        .expect_code(0)?;
    let kernel = host.path("kernel");
    fs::write(&kernel, GUEST_ELF)?;
    fs::write(host.path("initrd"), b"initrd")?;
    for (source, out) in [(&tree, "a"), (&archive, "b")] {
        let source = text(source)?;
        let boot = ["--kernel", "kernel", "--initrd", "initrd", "--size", "64"];
        host.ok(&[&["image", "import", source, out], &boot[..]].concat())?;
        let stderr = host.fails(&[&["image", "import", source, out], &boot[..]].concat(), 1)?;
        ensure!(stderr.contains("exists"), "an image was replaced: {stderr}");
        host.ok(&["run", "--image", out, "--name", out, "--detach"])?;
        host.wait_for_console(out, GUEST_READY)?;
        host.ok(&["stop", out])?;
    }
    let stderr = host.fails(&["image", "import", text(&tree)?, "c"], 1)?;
    ensure!(stderr.contains("--kernel-from"), "no advice: {stderr}");
    ensure!(!host.path("c").exists(), "a failed import left an image");
    Ok(())
}

const ROOT_LEN: usize = 1 << 20;

/// An image whose kernel is the embedded guest, and whose root has no more of ext4 than its magic
/// number: the embedded guest asks for neither initial RAM disk nor file system.
fn image(host: &Host) -> Outcome<PathBuf> {
    let dir = host.path("image");
    fs::create_dir(&dir)?;
    let mut root = vec![0; ROOT_LEN];
    root[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
    fs::write(dir.join("vmlinuz"), GUEST_ELF)?;
    fs::write(dir.join("initrd.img"), b"initrd")?;
    fs::write(dir.join("root.ext4"), &root)?;
    let digest = |bytes: usize| json!({ "bytes": bytes, "sha256": "" });
    let manifest = json!({
        "format": 1,
        "source": "the embedded guest",
        "cmdline": "image-word",
        "files": {
            "vmlinuz": digest(GUEST_ELF.len()),
            "initrd.img": digest(6),
            "root.ext4": digest(ROOT_LEN),
        },
    });
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    Ok(dir)
}

fn boots(host: &Host) -> Outcome {
    let dir = image(host)?;
    let image = text(&dir)?;
    host.ok(&["run", "--image", image, "--name", "vm", "--detach"])?;
    host.wait_for_console("vm", GUEST_READY)?;
    let status = host.status("vm")?;
    ensure!(
        status["disks"] == 1 && status["memory_mib"] == 512,
        "the VM is not as the image and the defaults say: {status}"
    );
    host.ok(&["stop", "vm"])?;
    let stderr = host.fails(&["run", "--image", image, "--kernel", "k"], 2)?;
    ensure!(stderr.contains("--kernel"), "unexpected: {stderr}");
    Ok(())
}

fn damaged(host: &Host) -> Outcome {
    let dir = image(host)?;
    let root = fs::File::options()
        .write(true)
        .open(dir.join("root.ext4"))?;
    root.set_len(ROOT_LEN as u64 - 512)?;
    let stderr = host.fails(&["run", "--image", text(&dir)?], 1)?;
    ensure!(
        stderr.contains("root.ext4") && stderr.contains("should have 1048576"),
        "the message does not say what is wrong: {stderr}"
    );
    Ok(())
}

/// With a PATH that has only what the recipe begins with, it names what is not installed, and
/// leaves nothing.
fn missing(host: &Host) -> Outcome {
    let bin = host.path("bin");
    fs::create_dir(&bin)?;
    for tool in ["bash", "setpriv", "dirname", "uname"] {
        symlink(which(tool)?, bin.join(tool))?;
    }
    let mut command = host.command(&["image", "build", "debian", "out"]);
    command.env("PATH", &bin);
    let stderr = Process::spawn(&mut command, Stdio::null())?
        .wait(host.limit(Duration::from_secs(20)))?
        .expect_code(1)?
        .stderr;
    ensure!(
        stderr.contains("apt-get install mmdebstrap"),
        "the message does not say what to install: {stderr}"
    );
    let left: Vec<_> = fs::read_dir(host.path(""))?
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .filter(|name| !["bin", "data", "run"].iter().any(|known| name == known))
        .collect();
    ensure!(left.is_empty(), "something is left: {left:?}");
    Ok(())
}

/// A build whose mmdebstrap never ends: with the command, killed outright, everything goes that it has
/// started and made, beside the image and among temporary files.
fn killed_build(host: &Host) -> Outcome {
    let (bin, out, temporary) = (host.path("bin"), host.path("out"), host.path("tmp"));
    for dir in [&bin, &out, &temporary] {
        fs::create_dir(dir)?;
    }
    let own = [
        "bash", "setpriv", "unshare", "dirname", "uname", "id", "mkdir", "cat", "chmod", "sort",
        "sleep", "rm", "sed",
    ];
    for tool in own {
        symlink(which(tool)?, bin.join(tool))?;
    }
    for tool in [
        "mke2fs",
        "debugfs",
        "busybox",
        "cpio",
        "depmod",
        "zstd",
        "apt-get",
        "apt-config",
    ] {
        symlink(which("true")?, bin.join(tool))?;
    }
    let started = host.path("started");
    let script = format!(
        "#!/bin/bash\necho >$TMPDIR/mmdebstrap.root\nsleep 1000 &\necho >{}\nsleep 1000\n",
        text(&started)?
    );
    let fake = bin.join("mmdebstrap");
    fs::write(&fake, script)?;
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755))?;
    let mut command = host.command(&["image", "build", "debian", "out/image"]);
    command.env("PATH", &bin).env("TMPDIR", &temporary);
    let build = Process::spawn(&mut command, Stdio::null())?;
    let limit = Duration::from_secs(20);
    host.wait_until("the build to begin", limit, || {
        started.exists().then_some(())
    })?;
    let is_empty = |dir: &Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    ensure!(
        !is_empty(&out) && !is_empty(&temporary),
        "the build has nothing under way"
    );
    let pids = descendants(build.id());
    ensure!(pids.len() >= 4, "the build has started {pids:?} alone");
    build.signal(9)?;
    host.wait_until("all that the build has started to end", limit, || {
        let alive = pids.iter().any(|&pid| is_alive(pid));
        (!alive).then_some(())
    })?;
    host.wait_until("all that the build has made to go", limit, || {
        (is_empty(&out) && is_empty(&temporary)).then_some(())
    })
}

/// A process's children, theirs, and so on.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = children_of(pid);
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        found.extend(children_of(pid));
        next += 1;
    }
    found
}

/// Attributes in an archive: users' own are kept, lists are counted.
fn left_out(host: &Host) -> Outcome {
    fs::write(host.path("file"), "x")?;
    fs::write(host.path("kernel"), GUEST_ELF)?;
    let pax = "--pax-option=SCHILY.xattr.user.note:=yes,SCHILY.acl.access:=user";
    let mut tar = std::process::Command::new("tar");
    tar.current_dir(host.path(""))
        .args(["--format=pax", pax, "-cf", "root.tar", "file"]);
    Process::spawn(&mut tar, Stdio::null())?
        .wait(host.limit(Duration::from_secs(20)))?
        .expect_code(0)?;
    let boot = ["--kernel", "kernel", "--initrd", "file"];
    let arguments = [&["image", "import", "root.tar", "out"], &boot[..]].concat();
    let value = host.json(&arguments)?;
    ensure!(
        value["left_out"] == json!({ "system.posix_acl_access": 1 }),
        "unexpected: {value}"
    );
    let again = [
        &["image", "import", "root.tar", "again", "--size", "64"],
        &boot[..],
    ]
    .concat();
    let said = host.run(&again)?.expect_code(0)?.stderr;
    ensure!(
        said.contains("left out: system.posix_acl_access of 1"),
        "unexpected: {said}"
    );
    let len = fs::metadata(host.path("out/root.ext4"))?.len();
    ensure!(len == 2 << 30, "the root file system has {len} bytes");
    Ok(())
}

/// Where a program is.
pub(super) fn which(tool: &str) -> Outcome<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(tool))
        .find(|file| file.is_file())
        .ok_or_else(|| Failure::new(format!("{tool} is not installed")))
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str()
        .ok_or_else(|| Failure::new("the temporary directory's name is not UTF-8"))
}
