//! The processes of imported images, in guests: started as the image says, and their end is the VM's.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, pid_of};
use crate::linux::{self, DEBIAN};
use crate::process::Process;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[Case {
    name: "linux_runs_the_process_of_an_oci_image",
    run: oci,
    needs: Needs::linux(&[DEBIAN])
        .with_programs(&["tar", "sha256sum", "busybox"])
        .with_memory_mib(1024)
        .within(150),
}];

/// How long a guest may take from its start to the end of a short process, in lane 1's time.
const RUN: Duration = Duration::from_secs(70);
/// How long the image's making may take.
const MAKE: Duration = Duration::from_secs(15);

/// Makes the OCI image `oci` (image-spec 1.1, `image-layout.md`) of a busybox. Its user is in no table,
/// and its directory not in the image. The exit code is one that a VM ends with as well.
const MAKE_OCI: &str = r#"
    set -e
    mkdir -p tree/bin tree/srv oci/blobs/sha256
    cp "$(command -v busybox)" tree/bin/busybox
    for name in sh pwd sleep cat true id stat kill pidof; do ln -s busybox tree/bin/$name; done
    echo served >tree/srv/page
    tar -C tree -cf layer .
    blob() {
        digest=$(sha256sum <"$1" | cut -c 1-64)
        cp "$1" oci/blobs/sha256/$digest
        printf '"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%s' \
            "$2" $digest "$(wc -c <"$1")"
    }
    layer=$(blob layer layer.v1.tar)
    look="stat -c 'its directory: %u %a' ."
    look="$look; case \$(cat /proc/cmdline) in *linger*) exec sleep 1000 ;; esac; exit 12"
    cat >config <<END
    {"architecture":"amd64","os":"linux","config":{"Env":["GREETING=hello","PATH=/bin"],
        "User":"1001:1002","WorkingDir":"/srv/app","Entrypoint":["/bin/sh","-c"],
        "Cmd":["echo \"the process says \$GREETING in \$(pwd) as \$(id -u):\$(id -g), \$(id -G)\"; $look"]},
        "rootfs":{"type":"layers","diff_ids":["sha256:$(sha256sum <layer | cut -c 1-64)"]}}
END
    config=$(blob config config.v1+json)
    printf '{"schemaVersion":2,"config":{%s},"layers":[{%s}]}' "$config" "$layer" >manifest
    printf '{"schemaVersion":2,"manifests":[{%s}]}' "$(blob manifest manifest.v1+json)" >oci/index.json
    printf '{"imageLayoutVersion":"1.0.0"}' >oci/oci-layout
"#;
const MACHINE: [&str; 4] = ["--image", "image", "--memory", "192"];

fn oci(host: &Host) -> Outcome {
    let mut make = Command::new("sh");
    make.args(["-c", MAKE_OCI]).current_dir(host.path(""));
    Process::spawn(&mut make, Stdio::null())?
        .wait(host.limit(MAKE))?
        .expect_code(0)?;
    let kernel = linux::dir(DEBIAN)?.to_string_lossy().into_owned();
    let import = ["image", "import", "oci", "image", "--size", "64"];
    host.ok(&[&import[..], &["--kernel-from", &kernel]].concat())?;
    attached(host)?;
    kept(host)?;
    detached(host)
}

/// The command ends with the process's exit code, and says that it is the guest's.
fn attached(host: &Host) -> Outcome {
    let run = host.spawn(&[&["--json", "run"], &MACHINE[..]].concat())?;
    let said = run.wait(host.limit(RUN))?.expect_code(12)?.stdout;
    for words in [
        "the process says hello in /srv/app as 1001:1002, 1002",
        "its directory: 0 755",
    ] {
        ensure!(said.contains(words), "no {words:?} in {said}");
    }
    let ended = said.lines().last().unwrap_or_default();
    let ended: serde_json::Value = serde_json::from_str(ended)?;
    ensure_eq!(ended["guest_code"], 12, "the guest's code in {ended}");
    ensure_eq!(ended["end"], "exited", "the end in {ended}");
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs after it");
    Ok(())
}

/// The process ends, and the VM stays.
fn kept(host: &Host) -> Outcome {
    let run = ["run", "--detach", "--name", "kept", "--keep"];
    host.ok(&[&run[..], &MACHINE].concat())?;
    host.wait_until("the end of the process", RUN, || {
        host.console("kept")
            .contains("the image's process ended with 12")
            .then_some(())
    })
    .map_err(|failure| Failure::new(format!("{failure}{}", host.evidence())))?;
    let wait = host.limit(RUN).as_secs().to_string();
    let page = ["exec", "--wait", &wait, "kept", "--", "cat", "/srv/page"];
    ensure_eq!(host.ok(&page)?, "served\n", "a file of the image");
    host.ok(&["stop", "kept"]).map(drop)
}

/// A VM in the background is remembered with what its process ended with, here a signal.
fn detached(host: &Host) -> Outcome {
    let run = ["run", "--detach", "--name", "vm", "--cmdline", "linger"];
    let pid = pid_of(&host.json(&[&run[..], &MACHINE].concat())?)?;
    let wait = host.limit(RUN).as_secs().to_string();
    let kill = "until pid=$(pidof sleep); do true; done; kill -KILL $pid";
    // The guest may end before the command's own end is told.
    host.run(&["exec", "--wait", &wait, "vm", "--", "sh", "-c", kill])?;
    host.wait_for_end(pid)?;
    let listed = host.ok(&["ps"])?;
    ensure!(listed.contains("exited (137)"), "not told: {listed}");
    let listed = host.json_lines(&["ps"])?;
    let said: Vec<_> = listed
        .iter()
        .map(|vm| (&vm["name"], &vm["guest_code"]))
        .collect();
    ensure!(said == [(&"vm".into(), &137.into())], "not told: {said:?}");
    host.ok(&["stop", "vm"])?;
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs after `stop`");
    Ok(())
}
