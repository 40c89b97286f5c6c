//! `overlay create`, `show`, `verify`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use cloudlet::control::{Client, Request, SpacePage};
use cloudlet::guest::{self, AppRequest};
use cloudlet::launch::{self, OverlaySource, Source};
use cloudlet_overlay::LEVEL_STORED;
use serde_json::{Value, json};

use super::output::{megabytes, table};
use super::scratch::Scratch;
use super::stop::stop_quietly;
use super::{Host, absolute, app, named};
use crate::cli::{NewVm, Overlay, OverlayCreate};

pub(super) fn overlay(host: &Host, command: &Overlay) -> Result<()> {
    match command {
        Overlay::Create(args) => create(host, args),
        Overlay::Show { file } => show(host, file),
        Overlay::Verify { file } => verify(host, file),
    }
}

fn create(host: &Host, args: &OverlayCreate) -> Result<()> {
    let out = absolute(&args.out)?;
    if out.exists() && !args.force {
        bail!(
            "{} exists: give another name, or --force to write over it",
            args.out.display()
        );
    }
    let attachment = app::attachment(args.train_attach.as_deref(), args.train_sample)?;
    let request = args
        .train
        .clone()
        .map(|text| AppRequest { text, attachment });
    let summary = encode(host, &args.from, &out, request.as_ref(), args.level)?;
    host.output.result(&summary, || {
        let id = summary["id"].as_str().unwrap_or("?");
        let bytes = summary["bytes"].as_u64().unwrap_or(0);
        format!("{}: {}, id {id}", args.out.display(), megabytes(bytes))
    });
    Ok(())
}

/// Writes the overlay of the VM `from` to `out`, with what `request` touches first.
pub(super) fn encode(
    host: &Host,
    from: &str,
    out: &Path,
    request: Option<&AppRequest>,
    level: i32,
) -> Result<Value> {
    let mut client = host.connect(from)?;
    let early = match request {
        None => Vec::new(),
        Some(request) => {
            // Both overlays are of the same moment: the VM waits until this connection closes.
            client.ask(&Request::Pause { lease: true })?;
            rehearse(host, &mut client, out, request).context("the rehearsal failed")?
        }
    };
    let touched = early.len();
    let mut summary = write(host, &mut client, out, early, level)?;
    summary["first_touch_pages"] = json!(touched);
    Ok(summary)
}

fn write(
    host: &Host,
    client: &mut Client,
    out: &Path,
    early: Vec<SpacePage>,
    level: i32,
) -> Result<Value> {
    let request = Request::Overlay {
        out: out.to_owned(),
        early,
        level,
    };
    let progress = host.output.progress();
    let result = client.call(&request, &mut |step, done, total| {
        progress.show(step, done, total)
    });
    progress.finish();
    Ok(result?)
}

/// Makes a throw-away copy of the paused VM from an uncompressed overlay in no particular order, sends
/// it the request, and returns the pages in the order in which the copy touched them.
fn rehearse(
    host: &Host,
    client: &mut Client,
    out: &Path,
    request: &AppRequest,
) -> Result<Vec<SpacePage>> {
    let dir = Scratch::new(out.parent().unwrap_or(Path::new("/")), ".rehearsal-")
        .context("no room beside the overlay for the rehearsal")?;
    let unordered = dir.path().join("unordered");
    // Read once, on this host: compressing it would take longer than writing it.
    write(host, client, &unordered, Vec::new(), LEVEL_STORED)?;
    let source = Source::Overlay(OverlaySource {
        location: named(&unordered)?.to_owned(),
        early_start: true,
        record: true,
        rate_mbit: None,
        ca: None,
        stall_secs: 10.0,
        expect: None,
    });
    let options = NewVm::default();
    let rehearsal = host.start(&options, true, "rehearsal", source)?;
    let touched = guest::call(&rehearsal.dir.vsock_socket(), request)
        .map_err(anyhow::Error::from)
        .and_then(|_| {
            let result =
                Client::connect(&rehearsal.dir.control_socket())?.ask(&Request::FirstTouch)?;
            Ok(serde_json::from_value(result["pages"].clone())?)
        })
        .map_err(|error| match launch::read_report(&rehearsal.dir) {
            Some(end) => error.context(format!("the copy of the VM ended: {end}")),
            None => error,
        });
    stop_quietly(&rehearsal.dir)?;
    touched
}

fn show(host: &Host, file: &Path) -> Result<()> {
    let shown = cloudlet::synthesis::show(file)?;
    let value = serde_json::to_value(&shown)?;
    host.output.result(&value, || {
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
    });
    Ok(())
}

fn verify(host: &Host, file: &Path) -> Result<()> {
    let name = named(file)?;
    let progress = host.output.progress();
    let verified = cloudlet::synthesis::verify(file, &mut |done, total| {
        progress.show("verify", done, total)
    });
    progress.finish();
    let bytes = verified?;
    host.output.result(
        &json!({ "file": name, "bytes": bytes, "intact": true }),
        || format!("{}: intact, {}", file.display(), megabytes(bytes)),
    );
    Ok(())
}
