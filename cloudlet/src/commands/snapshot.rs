//! `snapshot` and `restore`.

use std::path::Path;

use anyhow::Result;
use cloudlet::control::Request;
use cloudlet::launch::Source;
use cloudlet::store::Store;
use serde_json::{Value, json};

use super::{Host, absolute, disk, existing, net};
use crate::cli::{NewVm, Restore, Snapshot};

pub(super) fn snapshot(host: &Host, args: &Snapshot) -> Result<()> {
    let dir = absolute(&args.dir)?;
    let result = host.ask(&args.name, &Request::Snapshot { dir })?;
    host.output
        .result(&result, || format!("{} written", args.dir.display()));
    Ok(())
}

pub(super) fn restore(host: &Host, args: &Restore) -> Result<()> {
    let source = image_source(host, &args.source)?;
    if args.clones.is_some_and(|clones| clones > 1) {
        net::check_clones(&net::parse_all(&args.vm)?)?;
    }
    let mut started: Vec<Value> = Vec::new();
    let disk_limits = disk::parse_limits(&args.limits.disk_limits)?;
    for options in clone_options(args) {
        let options = NewVm {
            disk_limits: disk_limits.clone(),
            ..options
        };
        let vmm = host.start(&options, false, "vm", source.clone())?;
        started.push(json!({ "name": vmm.dir.name.as_str(), "pid": vmm.child.id() }));
    }
    for vm in &started {
        host.output
            .result(vm, || vm["name"].as_str().unwrap_or_default().to_owned());
    }
    Ok(())
}

/// A directory wins over a tag of the same name if it is written as a path.
pub(super) fn image_source(host: &Host, source: &str) -> Result<Source> {
    if source.contains('/') || Path::new(source).is_dir() {
        let dir = existing(source.as_ref(), "snapshot")?;
        return Ok(Source::Image { dir, base: None });
    }
    let base = Store::open(host.paths.store()?).find(source)?;
    Ok(Source::Image {
        dir: base.dir.clone(),
        base: Some(base.id.to_string()),
    })
}

fn clone_options(args: &Restore) -> Vec<NewVm> {
    let Some(clones) = args.clones else {
        return vec![args.vm.clone()];
    };
    let numbered = |name: &str, number| format!("{name}-{number}");
    let clone = |number: u16| NewVm {
        name: args.vm.name.as_deref().map(|name| numbered(name, number)),
        vsock: args.vm.vsock.as_ref().map(|path| {
            let mut path = path.clone().into_os_string();
            path.push(format!("-{number}"));
            path.into()
        }),
        ..args.vm.clone()
    };
    (1..=clones).map(clone).collect()
}
