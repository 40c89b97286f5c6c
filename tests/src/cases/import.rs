//! `image import` of what users have: archives of every compression and form, container images in
//! directories and archives, and files that are neither.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use cloudlet_resources::GUEST_ELF;

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::process::Process;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "import_takes_archives_of_every_form",
        run: archives,
        needs: Needs::NO_GUEST.with_programs(&["tar", "gzip", "bzip2", "xz", "zstd", "e2fsck"]),
    },
    Case {
        name: "import_takes_container_images_by_name",
        run: images,
        needs: Needs::NO_GUEST.with_programs(&["tar", "sha256sum", "e2fsck"]),
    },
    Case {
        name: "import_refuses_what_is_no_root",
        run: refusals,
        needs: Needs::NO_GUEST,
    },
];

/// A tree with a file of 200 GiB that is nearly all hole and one that is older than 1970, packed.
const PACK: &str = r"
    mkdir -p tree/etc
    printf somebody | dd of=tree/lastlog bs=1 seek=20971520 status=none
    truncate -s 200G tree/lastlog
    echo hello >tree/etc/motd
    TZ=UTC touch -d 1960-01-01T00:00:00 tree/etc/motd
    tar -S --format=gnu -C tree -cf gnu.tar .
    for version in 0.0 0.1 1.0; do
        tar -S --format=pax --sparse-version=$version -C tree -cf pax-$version.tar .
    done
    gzip -c gnu.tar >gnu.tar.gz
    bzip2 -c gnu.tar >gnu.tar.bz2
    xz -c gnu.tar >gnu.tar.xz
    # As pzstd writes it: a frame to be skipped before each other.
    { printf '\120\052\115\030\004\000\000\000abcd'; zstd -qc gnu.tar; } >gnu.tar.zst
";

/// What `docker save` writes of two images, and an OCI image's directory and archive of the first.
const SAVE: &str = r#"
    mkdir -p save oci/blobs/sha256
    blob() {
        digest=$(sha256sum <"$1" | cut -c 1-64)
        cp "$1" oci/blobs/sha256/$digest
        printf '"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%s' \
            "$2" $digest "$(wc -c <"$1")"
    }
    for name in web db; do
        mkdir -p root/run save/$name
        ln -sfn /run/lock root/lock
        echo $name >root/name
        tar -C root -cf save/$name/layer.tar .
        printf '{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/%s"]},
            "rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
            $name $(sha256sum <save/$name/layer.tar | cut -c 1-64) >config
        digest=$(sha256sum <config | cut -c 1-64)
        cp config save/$digest.json
        printf '{"Config":"%s.json","RepoTags":["%s:1"],"Layers":["%s/layer.tar"]}\n' \
            $digest $name $name >>entries
        layer=$(blob save/$name/layer.tar layer.v1.tar)
        config=$(blob config config.v1+json)
        printf '{"schemaVersion":2,"config":{%s},"layers":[{%s}]}' "$config" "$layer" >manifest
        printf '{%s,"annotations":{"org.opencontainers.image.ref.name":"%s:1"}}\n' \
            "$(blob manifest manifest.v1+json)" $name >>manifests
    done
    printf '[%s]' "$(paste -sd, entries)" >save/manifest.json
    printf '{"schemaVersion":2,"manifests":[%s]}' "$(paste -sd, manifests)" >oci/index.json
    printf '{"imageLayoutVersion":"1.0.0"}' >oci/oci-layout
    tar -C save -cf save.tar .
    tar -C oci -cf oci.tar .
"#;

fn script(host: &Host, script: &str) -> Outcome {
    let mut make = Command::new("sh");
    make.args(["-ec", script]).current_dir(host.path(""));
    Process::spawn(&mut make, Stdio::null())?
        .wait(host.limit(Duration::from_secs(20)))?
        .expect_code(0)?;
    std::fs::write(host.path("kernel"), GUEST_ELF)?;
    std::fs::write(host.path("initrd"), b"initrd")?;
    Ok(())
}

fn arguments<'a>(source: &'a str, out: &'a str) -> Vec<&'a str> {
    let boot = ["--kernel", "kernel", "--initrd", "initrd", "--size", "64"];
    [&["image", "import", source, out], &boot[..]].concat()
}

/// What debugfs answers about an image's root.
fn ask(host: &Host, image: &str, request: &str) -> Outcome<String> {
    let mut debugfs = Command::new("debugfs");
    let path = std::env::var("PATH").unwrap_or_default();
    debugfs
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("TZ", "UTC")
        .args(["-R", request])
        .arg(host.path(image).join("root.ext4"));
    let finished = Process::spawn(&mut debugfs, Stdio::null())?
        .wait(host.limit(Duration::from_secs(10)))?
        .expect_code(0)?;
    Ok(finished.stdout)
}

fn archives(host: &Host) -> Outcome {
    script(host, PACK)?;
    let sources = [
        "tree",
        "gnu.tar",
        "pax-0.0.tar",
        "pax-0.1.tar",
        "pax-1.0.tar",
        "gnu.tar.gz",
        "gnu.tar.bz2",
        "gnu.tar.xz",
        "gnu.tar.zst",
        "-",
    ];
    for (number, source) in sources.iter().enumerate() {
        let out = number.to_string();
        let stdin = match *source {
            "-" => Stdio::from(File::open(host.path("gnu.tar.gz"))?),
            _ => Stdio::null(),
        };
        Process::spawn(&mut host.command(&arguments(source, &out)), stdin)?
            .wait(host.limit(Duration::from_secs(20)))?
            .expect_code(0)?;
        let stat = ask(host, &out, "stat /lastlog")?;
        ensure!(stat.contains("Size: 214748364800"), "{source}: {stat}");
        let motd = ask(host, &out, "stat /etc/motd")?;
        let is_early = |line: &str| line.contains("mtime:") && line.contains("1960");
        ensure!(motd.lines().any(is_early), "{source}: {motd}");
        let words = ask(host, &out, "cat /etc/motd")?;
        ensure_eq!(words, "hello\n", "{source}");
    }
    Ok(())
}

fn images(host: &Host) -> Outcome {
    script(host, SAVE)?;
    for (number, source) in ["oci", "oci.tar", "save", "save.tar"].iter().enumerate() {
        let stderr = host.fails(&arguments(source, "none"), 1)?;
        let has_names = stderr.contains("db:1") && stderr.contains("web:1");
        ensure!(has_names, "{source}: names are not listed: {stderr}");
        let (named, out) = (format!("{source}:web:1"), number.to_string());
        host.ok(&arguments(&named, &out))?;
        ensure_eq!(ask(host, &out, "cat /name")?, "web\n", "{source}");
        let process = ask(host, &out, "cat /etc/cloudlet/entry")?;
        ensure!(process.contains("/bin/web"), "{source}: {process}");
        let blobs = ask(host, &out, "ls /")?;
        ensure!(!blobs.contains("manifest"), "{source}: {blobs}");
    }
    Ok(())
}

fn refusals(host: &Host) -> Outcome {
    script(
        host,
        "truncate -s 64K zeros disk.iso disk.img disk.qcow2; : >empty",
    )?;
    let write = |name: &str, at: u64, bytes: &[u8]| -> Outcome {
        use std::os::unix::fs::FileExt;
        let file = File::options().write(true).open(host.path(name))?;
        Ok(file.write_all_at(bytes, at)?)
    };
    write("disk.iso", 0x8001, b"CD001")?;
    write("disk.img", 0x1fe, b"\x55\xaa")?;
    write("disk.qcow2", 0, b"QFI\xfb")?;
    for (source, words) in [
        ("empty", "empty"),
        ("zeros", "no entries"),
        ("disk.iso", "bsdtar"),
        ("disk.img", "virt-tar-out"),
        ("disk.qcow2", "virt-tar-out"),
        ("kernel", "a program"),
        ("initrd", "no tar archive"),
    ] {
        let stderr = host.fails(&arguments(source, "out"), 1)?;
        ensure!(stderr.contains(words), "{source}: {stderr}");
        ensure!(!host.path("out").exists(), "{source} left an image");
    }
    // What stands in a name does not reach the terminal.
    let stderr = host.fails(&arguments("\x1b]0;title\x07\u{202e}name", "out"), 1)?;
    ensure!(stderr.contains("?]0;title??name"), "{stderr:?}");
    Ok(())
}
