//! `synthesize`: a VM from its base and an overlay.

use anyhow::{Context, Result, bail};
use cloudlet::control::{Client, Error, Request};
use cloudlet::fetch::Location;
use cloudlet::launch::{OverlaySource, Source, Vmm};
use serde_json::json;

use super::{Host, absolute, disk, existing};
use crate::cli::{NewVm, Synthesize};

/// Slowest link that can be asked for, in Mbit/s; below it a page takes seconds.
const RATE_MBIT_MIN: f64 = 0.01;

pub(super) fn synthesize(host: &Host, args: &Synthesize) -> Result<()> {
    if args
        .rate
        .is_some_and(|rate| !rate.is_finite() || rate < RATE_MBIT_MIN)
    {
        bail!("--rate takes Mbit/s, {RATE_MBIT_MIN} or more");
    }
    if !args.stall.is_finite() || args.stall <= 0.0 {
        bail!("--stall takes a number of seconds above 0");
    }
    let source = Source::Overlay(OverlaySource {
        location: absolute_location(&args.overlay)?,
        early_start: !args.no_early_start,
        record: false,
        rate_mbit: args.rate,
        ca: args
            .ca
            .as_deref()
            .map(|path| existing(path, "CA file"))
            .transpose()?,
        stall_secs: args.stall,
        expect: args.expect.clone(),
    });
    let options = NewVm {
        disk_limits: disk::parse_limits(&args.limits.disk_limits)?,
        ..args.vm.clone()
    };
    let mut vmm = host.start(&options, false, "vm", source)?;
    if args.wait {
        wait_complete(host, &mut vmm)
            .with_context(|| format!("the overlay of {} did not arrive whole", vmm.dir.name))?;
    }
    let name = vmm.dir.name.as_str();
    host.output
        .result(&json!({ "name": name, "pid": vmm.child.id() }), || {
            name.to_owned()
        });
    Ok(())
}

/// Waits until the VM's overlay is complete. A VM that ends instead has left word why.
fn wait_complete(host: &Host, vmm: &mut Vmm) -> Result<()> {
    let progress = host.output.progress();
    let waited = Client::connect(&vmm.dir.control_socket()).and_then(|mut client| {
        client.call(&Request::WaitComplete, &mut |step, done, total| {
            progress.show(step, done, total);
        })
    });
    progress.finish();
    if let Err(Error::Connect { .. } | Error::Io(_) | Error::Ended) = waited {
        vmm.wait()?;
        if let Some(report) = vmm.report() {
            bail!("{report}");
        }
    }
    waited?;
    Ok(())
}

/// A path as the VMM process understands it; a URL as it is.
pub(super) fn absolute_location(text: &str) -> Result<String> {
    match text.parse()? {
        Location::File(path) => {
            let path = absolute(&existing(&path, "overlay")?)?;
            path.into_os_string()
                .into_string()
                .map_err(|path| anyhow::anyhow!("{} is no UTF-8", path.display()))
        }
        Location::Http(_) => Ok(text.to_owned()),
    }
}
