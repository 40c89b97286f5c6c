//! `base create`, `ls`, `show`, `verify`, `rm`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use cloudlet::control::{Client, Request};
use cloudlet::hold::Hold;
use cloudlet::launch::{BootSource, DiskSource, Source};
use cloudlet::registry;
use cloudlet::store::{Base as StoredBase, Store};
use serde_json::{Value, json};

use super::output::{megabytes, table};
use super::stop::stop_quietly;
use super::{Host, run, vm};
use crate::cli::{Base, BaseCreate, BaseRm, NewVm};

/// Disk of the embedded guest, in bytes: room for an application and its data.
const BUILTIN_DISK_LEN: u64 = 64 << 20;
/// How long an image may take to boot until its agent answers: a slow machine needs half a minute.
const AGENT_TIMEOUT: Duration = Duration::from_secs(180);
/// Digits of an id that a list shows.
const ID_DIGITS: usize = 12;

pub(super) fn base(host: &Host, command: &Base) -> Result<()> {
    let store = Store::open(host.paths.store()?);
    match command {
        Base::Create(args) => {
            let base = create(host, &store, args)?;
            host.output
                .result(&value_of(&base)?, || format!("{} is {}", args.tag, base.id));
        }
        Base::Ls => list(host, &store)?,
        Base::Show(args) => {
            let base = store.find(&args.base)?;
            let value = value_of(&base)?;
            host.output.result(&value, || describe(&value));
        }
        Base::Verify(args) => {
            let base = store.find(&args.base)?;
            let progress = host.output.progress();
            let verified = base.verify(&mut |done, total| progress.show("verify", done, total));
            progress.finish();
            let bytes = verified?;
            host.output.result(
                &json!({ "id": base.id.to_string(), "bytes": bytes, "intact": true }),
                || format!("{}: intact, {}", args.base, megabytes(bytes)),
            );
        }
        Base::Rm(args) => remove(host, &store, args)?,
    }
    Ok(())
}

/// Publishes the state of a VM, which goes on running, or of a freshly booted embedded guest.
pub(super) fn create(host: &Host, store: &Store, args: &BaseCreate) -> Result<StoredBase> {
    match (&args.from, &args.image) {
        (Some(name), _) => publish(host, store, &mut host.connect(name)?, &args.tag),
        (None, Some(dir)) => create_of_image(host, store, args, dir),
        (None, None) => create_builtin(host, store, args),
    }
}

fn create_of_image(
    host: &Host,
    store: &Store,
    args: &BaseCreate,
    dir: &Path,
) -> Result<StoredBase> {
    let image = run::open_image(dir)?;
    let source = BootSource {
        kernel: Some(image.kernel),
        initrd: Some(image.initrd),
        cmdline: image.manifest.cmdline,
        disks: vec![run::root_disk(image.root)],
        cpus: 1,
        memory_mib: args.memory,
        cpu_model: args.cpu.clone(),
        discovery: "auto".into(),
        balloon: true,
    };
    boot_and_publish(host, store, &args.tag, source, |vsock| {
        cloudlet::agent::connect_within(vsock, AGENT_TIMEOUT)
            .map(drop)
            .context("the image's agent does not answer; `cloudlet run --image` shows its console")
    })
}

fn create_builtin(host: &Host, store: &Store, args: &BaseCreate) -> Result<StoredBase> {
    let source = BootSource {
        kernel: None,
        initrd: None,
        cmdline: String::new(),
        disks: vec![DiskSource {
            empty_len: BUILTIN_DISK_LEN,
            ..DiskSource::default()
        }],
        cpus: 1,
        memory_mib: args.memory,
        cpu_model: args.cpu.clone(),
        discovery: "auto".into(),
        balloon: true,
    };
    boot_and_publish(host, store, &args.tag, source, |vsock| {
        cloudlet::guest::wait_ready(vsock).context("the embedded guest does not become ready")
    })
}

/// Boots a VM, publishes its state when `ready` says that it is, and ends it.
fn boot_and_publish(
    host: &Host,
    store: &Store,
    tag: &str,
    source: BootSource,
    ready: impl FnOnce(&Path) -> Result<()>,
) -> Result<StoredBase> {
    let options = NewVm::default();
    let vmm = host.start(&options, true, "base", Source::Boot(source))?;
    let published = ready(&vmm.dir.vsock_socket()).and_then(|()| {
        let mut client = Client::connect(&vmm.dir.control_socket())?;
        publish(host, store, &mut client, tag)
    });
    let published = published.map_err(|error| match vmm.ended().guest_code() {
        Some(code) => error.context(format!(
            "the image's process ended with exit code {code}, and the VM with it (`run --keep` keeps one, \
             and --from publishes it)"
        )),
        None => error,
    });
    stop_quietly(&vmm.dir)?;
    published
}

pub(super) fn publish(
    host: &Host,
    store: &Store,
    client: &mut Client,
    tag: &str,
) -> Result<StoredBase> {
    let incoming = store.incoming()?;
    let dir = incoming.path().join("image");
    let progress = host.output.progress();
    let request = Request::Snapshot { dir: dir.clone() };
    let written = client.call(&request, &mut |step, done, total| {
        progress.show(step, done, total)
    });
    progress.finish();
    written?;
    Ok(store.publish(&dir, tag, &mut |_| {})?)
}

fn value_of(base: &StoredBase) -> Result<Value> {
    let description = base.image()?.description;
    Ok(json!({
        "id": base.id.to_string(),
        "tags": base.tags,
        "memory_bytes": description.memory_bytes,
        "disks": description.disks,
        "cpus": description.cpus,
        "cpu_model": description.cpu_model,
        "base": description.base,
        "stored_bytes": base.disk_usage()?,
        "dir": base.dir,
    }))
}

fn describe(value: &Value) -> String {
    let fields = value.as_object().into_iter().flatten();
    let row = |(key, value): (&String, &Value)| {
        vec![
            key.clone(),
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned),
        ]
    };
    table(&fields.map(row).collect::<Vec<_>>())
}

fn list(host: &Host, store: &Store) -> Result<()> {
    let bases = store.list()?;
    let values: Vec<Value> = bases.iter().map(value_of).collect::<Result<_>>()?;
    let mut rows = vec![
        ["ID", "TAGS", "MEMORY", "DISKS", "STORED"]
            .map(String::from)
            .to_vec(),
    ];
    for base in &bases {
        let description = base.image()?.description;
        let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
        rows.push(vec![
            base.id.to_string()[..ID_DIGITS].to_owned(),
            base.tags.join(","),
            mib(description.memory_bytes),
            description
                .disks
                .iter()
                .map(|disk| mib(disk.bytes))
                .collect::<Vec<_>>()
                .join(","),
            megabytes(base.disk_usage()?),
        ]);
    }
    host.output.list(&values, &rows);
    Ok(())
}

fn remove(host: &Host, store: &Store, args: &BaseRm) -> Result<()> {
    let (name, all) = (args.base.as_str(), args.all);
    let base = store.find(name)?;
    let is_tag = base.tags.iter().any(|tag| tag == name);
    if all {
        // Held until it is gone, so that no VM starts on it meanwhile.
        let alone = Hold::alone(&base.dir)?;
        if alone.is_none() && !args.force {
            let users = users_of(host, &base)?;
            anyhow::bail!("{name} is in use by {users} (--force removes it all the same)");
        }
        store.remove(&base)?;
    } else if is_tag {
        store.untag(name)?;
    } else {
        anyhow::bail!("{name} is an id: --all removes the base VM and its tags");
    }
    host.output.result(
        &json!({ "id": base.id.to_string(), "removed": all }),
        String::new,
    );
    Ok(())
}

/// The VMs that use `base`, in words. One that is just starting does not say what it uses.
fn users_of(host: &Host, base: &StoredBase) -> Result<String> {
    let id = base.id.to_string();
    let mut users = Vec::new();
    for dir in registry::list(&host.paths.vms()?)? {
        let state = vm::state_of(&dir, vm::PS_TIMEOUT);
        if state["base"] == id {
            users.push(dir.name.to_string());
        } else if matches!(state["state"].as_str(), Some("busy" | "starting")) {
            users.push(format!("perhaps {}, which does not answer yet", dir.name));
        }
    }
    Ok(match users.as_slice() {
        [] => {
            "a VM of another runtime directory, or one that was restored from its directory".into()
        }
        users => users.join(", "),
    })
}
