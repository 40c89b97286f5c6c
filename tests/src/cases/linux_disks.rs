//! Disks of a real Linux: what it writes, discards and zeroes, and what it has synced when its VM is
//! killed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::LinuxGuest;
use crate::process::{self, Process};
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "linux_uses_its_disks_as_it_should",
        run: uses,
        needs: Needs::linux(&["6.1"]),
    },
    Case {
        name: "linux_killed_while_it_writes_keeps_what_it_synced",
        run: power_cut,
        needs: Needs::linux(&["6.1"]).within(150),
    },
];

const MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "ext4", "crc32c_generic"];
/// Room of a guest; what it writes must not all stay in its page cache unseen.
const MEMORY: &str = "192";

/// A program of a few bytes that makes the second MiB of /dev/vda zero (BLKZEROOUT of linux/fs.h),
/// as octal escapes for the guest's `printf`. It exits with the error number.
fn zeroout_program() -> String {
    const CODE: &[u8] = &[
        0xb8, 2, 0, 0, 0, // mov eax, 2 (open)
        0x48, 0x8d, 0x3d, 0x29, 0, 0, 0, // lea rdi, [rip + path]
        0xbe, 2, 0, 0, 0, // mov esi, O_RDWR
        0x0f, 0x05, // syscall
        0x89, 0xc7, // mov edi, eax
        0xbe, 0x7f, 0x12, 0, 0, // mov esi, BLKZEROOUT
        0x48, 0x8d, 0x15, 0x1d, 0, 0, 0, // lea rdx, [rip + range]
        0xb8, 16, 0, 0, 0, // mov eax, 16 (ioctl)
        0x0f, 0x05, // syscall
        0x89, 0xc7, // mov edi, eax
        0xf7, 0xdf, // neg edi
        0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
        0x0f, 0x05, // syscall
        0x0f, 0x0b, // ud2
    ];
    const LOAD: u64 = 0x40_0000;
    let mut file = Vec::new();
    // The ELF header: 64-bit, little-endian, executable, x86-64, one program header.
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [LOAD + 0x78, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let path = b"/dev/vda\0";
    let len = (0x78 + CODE.len() + path.len() + 16) as u64;
    // PT_LOAD, readable and executable.
    file.extend_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, LOAD, LOAD, len, len, 0x1000] {
        file.extend_from_slice(&u64::to_le_bytes(word));
    }
    file.extend_from_slice(CODE);
    file.extend_from_slice(path);
    for word in [1_u64 << 20, 1 << 20] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.iter().map(|byte| format!("\\{byte:03o}")).collect()
}

/// Looks at both disks, writes a pattern to the first and reads it from the device again, then
/// discards its third MiB and zeroes its second. `synced` lines are for the host to look at the layer.
const USE: &str = "
    look() { dd if=/dev/vda bs=64k skip=$1 count=$2 2>/dev/null; }
    forget() { echo 3 >/proc/sys/vm/drop_caches; }
    for disk in vda vdb; do
        echo \"$disk: serial=$(cat /sys/block/$disk/serial) ro=$(cat /sys/block/$disk/ro)\" \\
            \"size=$(cat /sys/block/$disk/size) cache=$(cat /sys/block/$disk/queue/write_cache)\"
    done
    echo \"second: $(head -c 6 /dev/vdb)\"
    dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null
    echo \"write to the second: $?\"
    seq 1000000 | head -c 4194304 >/tmp/pattern
    dd if=/tmp/pattern of=/dev/vda bs=64k conv=fsync 2>/dev/null
    forget
    look 0 64 | cmp - /tmp/pattern && echo 'pattern: same'
    echo 'written: synced'
    read -r go
    blkdiscard -o 2097152 -l 1048576 /dev/vda
    echo \"discard: $?\"
    printf 'PROGRAM' >/tmp/zeroout
    chmod +x /tmp/zeroout
    /tmp/zeroout
    echo \"zeroes: $?\"
    sync
    forget
    look 16 32 | tr -d '\\000' | wc -c | sed 's/^/not zero: /'
    { look 0 16; dd if=/dev/zero bs=64k count=32; look 48 16; } 2>/dev/null >/tmp/now
    { dd if=/tmp/pattern bs=64k count=16; dd if=/dev/zero bs=64k count=32
      dd if=/tmp/pattern bs=64k skip=48; } 2>/dev/null | cmp - /tmp/now && echo 'rest: same'
    echo 'given back: synced'
    sleep 1000
";

fn uses(host: &Host) -> Outcome {
    let second = host.path("second.img");
    fs::write(&second, [&b"second"[..], &[0; 1 << 20]].concat())?;
    File::options()
        .write(true)
        .open(&second)?
        .set_len(1 << 20)?;
    let layer = host.path("layer");
    let first = format!("empty:16,serial=first-1,layer={}", layer.display());
    let second = format!("{},ro,serial=second.2", second.display());
    let script = USE.replace("PROGRAM", &zeroout_program());
    let guest = LinuxGuest::new(host, "6.1", MODULES, &script)?;
    let disks = ["--disk", &first, "--disk", &second, "--memory", MEMORY];
    guest.boot(host, "vm", &disks)?;
    let console = guest.wait_for(host, "vm", "written: synced")?;
    for line in [
        "vda: serial=first-1 ro=0 size=32768 cache=write back",
        "vdb: serial=second.2 ro=1 size=2048 cache=",
        "second: second",
        "write to the second: 1",
        "pattern: same",
    ] {
        ensure!(console.contains(line), "no {line:?} in\n{console}");
    }
    let held = fs::metadata(&layer)?.blocks() * 512;
    ensure!(held >= 4 << 20, "{held} bytes in the layer");
    say(host, "go")?;
    let console = guest.wait_for(host, "vm", "given back: synced")?;
    for line in ["discard: 0", "zeroes: 0", "not zero: 0", "rest: same"] {
        ensure!(console.contains(line), "no {line:?} in\n{console}");
    }
    // Two of the four MiB take no room any more.
    let left = fs::metadata(&layer)?.blocks() * 512;
    ensure!(held - left >= 2 << 20, "{held} bytes became {left}");
    Ok(())
}

/// Types a line at the guest's console.
fn say(host: &Host, line: &str) -> Outcome {
    use std::io::Write;
    let socket = host.vm_dir("vm").join("console.sock");
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    Ok(stream.write_all(format!("{line}\n").as_bytes())?)
}

/// Says what is there, then writes files and syncs each, while somebody else writes without.
const WRITE: &str = "
    mount -t ext4 /dev/vda /mnt || exit
    for file in /mnt/f*; do
        [ -e \"$file\" ] && echo \"found ${file#/mnt/} $(md5sum <\"$file\" | cut -c 1-32) .\"
    done
    echo 'looked at all'
    [ -e /case/stop ] && umount /mnt && echo unmounted && sleep 1000
    while true; do
        dd if=/dev/urandom of=/mnt/noise bs=64k count=24 2>/dev/null
        rm /mnt/noise
    done &
    number=ROUND000
    while true; do
        number=$((number + 1))
        head -c $((number % 7 * 9000 + 500)) /dev/urandom >/tmp/new
        dd if=/tmp/new of=/mnt/f$number bs=4k conv=fsync 2>/dev/null &&
            echo \"synced f$number $(md5sum </tmp/new | cut -c 1-32) .\"
    done
";

/// Files and checksums of all whole lines `WORD FILE SUM .` on the console.
fn files(console: &str, word: &str) -> HashMap<String, String> {
    let parse = |line: &str| {
        let mut words = line.trim().split(' ');
        let found = (words.next()?, words.next()?, words.next()?, words.next()?);
        (found.0 == word && found.3 == ".").then(|| (found.1.to_owned(), found.2.to_owned()))
    };
    console.lines().filter_map(parse).collect()
}

/// Runs a tool of e2fsprogs.
fn tool(host: &Host, name: &str, args: &[&str], disk: &Path) -> Outcome<process::Finished> {
    let mut command = Command::new(name);
    command.args(args).arg(disk);
    Process::spawn(&mut command, Stdio::null())?.wait(host.limit(Duration::from_secs(20)))
}

fn power_cut(host: &Host) -> Outcome {
    let image = host.path("ext4.img");
    File::create(&image)?.set_len(48 << 20)?;
    tool(host, "mkfs.ext4", &["-q", "-F"], &image)?.expect_code(0)?;
    let layer = host.path("layer");
    let disk = format!("{},layer={}", image.display(), layer.display());
    let options = ["--disk", disk.as_str(), "--memory", MEMORY];
    let mut synced = HashMap::new();
    for round in 1..=3 {
        let script = WRITE.replace("ROUND", &round.to_string());
        let guest = LinuxGuest::new(host, "6.1", MODULES, &script)?;
        let pid = guest.boot(host, "vm", &options)?;
        let console = guest.wait_for(host, "vm", "looked at all")?;
        check(&synced, &files(&console, "found"))?;
        guest.wait_for(host, "vm", &format!("synced f{}", round * 1000 + 5 * round))?;
        process::signal_pid(pid, libc::SIGKILL)?;
        host.wait_for_end(pid)?;
        synced.extend(files(&host.console("vm"), "synced"));
    }
    // The last line of each round may not have been whole.
    ensure!(synced.len() >= 27, "{} files", synced.len());

    // The disk as the last kill left it: the journal is replayed, then there is nothing to mend.
    let script = "echo at hand; sleep 1000";
    let idle = LinuxGuest::new(host, "6.1", MODULES, script)?;
    idle.boot(host, "idle", &options)?;
    let dir = host.path("snap");
    host.ok(&["snapshot", "idle", &dir.to_string_lossy()])?;
    host.ok(&["stop", "idle"])?;
    let replayed = tool(host, "e2fsck", &["-f", "-p"], &dir.join("disk0"))?;
    ensure!(replayed.code() <= 1, "e2fsck -p: {}", replayed.stdout);
    let clean = tool(host, "e2fsck", &["-f", "-n"], &dir.join("disk0"))?;
    ensure_eq!(clean.code(), 0, "e2fsck -fn: {}", clean.stdout);

    // The guest itself finds every file, unmounts, and its system is clean without a replay.
    let script = WRITE.replace("[ -e /case/stop ] &&", "");
    let last = LinuxGuest::new(host, "6.1", MODULES, &script)?;
    last.boot(host, "vm", &options)?;
    let console = last.wait_for(host, "vm", "unmounted")?;
    check(&synced, &files(&console, "found"))?;
    let dir = host.path("last");
    host.ok(&["snapshot", "vm", &dir.to_string_lossy()])?;
    let clean = tool(host, "e2fsck", &["-f", "-n"], &dir.join("disk0"))?;
    ensure_eq!(
        clean.code(),
        0,
        "e2fsck -fn after unmounting: {}",
        clean.stdout
    );
    Ok(())
}

/// Every file whose sync returned is there as it was.
fn check(synced: &HashMap<String, String>, found: &HashMap<String, String>) -> Outcome {
    for (file, sum) in synced {
        let is = found.get(file);
        if is != Some(sum) {
            return Err(Failure::new(format!(
                "{file} was {sum} when it was synced and is {is:?}"
            )));
        }
    }
    Ok(())
}
