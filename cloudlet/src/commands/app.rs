//! `app install` and `call`: the applications of the embedded guest.

use std::fs::File;
use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use cloudlet::files;
use cloudlet::guest::{self, AppRequest};
use cloudlet::picture;
use cloudlet_resources::protocol::{BLOB_MAX, DATA_MAX};
use serde_json::json;

use super::{Host, named};
use crate::cli::{App, AppInstall, AppName, Call};

const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";

pub(super) fn app(host: &Host, command: &App) -> Result<()> {
    let App::Install(args) = command;
    let said = install(host, args)?;
    host.output
        .result(&json!({ "name": args.name, "said": said }), || said.clone());
    Ok(())
}

pub(super) fn install(host: &Host, args: &AppInstall) -> Result<String> {
    let (name, image) = match args.app {
        AppName::Fluid => ("fluid", cloudlet_resources::APP_FLUID),
        AppName::Object => ("object", cloudlet_resources::APP_OBJECT),
    };
    let data = match (&args.data, args.app) {
        (Some(path), _) => files::read(path, DATA_MAX)?,
        (None, AppName::Fluid) => Vec::new(),
        (None, AppName::Object) => cloudlet_resources::digits::training(),
    };
    let mut client = guest::connect(&host.guest_of(&args.name)?)?;
    let installed = client.install(name, &args.params, image, &data);
    installed.with_context(|| format!("cannot install {name} in {}", args.name))
}

pub(super) fn call(host: &Host, args: &Call) -> Result<()> {
    let saved = args.save.as_deref().map(named).transpose()?;
    let attachment = attachment(args.attach.as_deref(), args.sample)?;
    let request = AppRequest {
        text: args.request.join(" "),
        attachment,
    };
    let answer = guest::call(&host.guest_of(&args.name)?, &request)
        .with_context(|| format!("{} does not answer", args.name))?;
    if let Some(path) = &args.save {
        save(path, &answer.text, &answer.blob)?;
    }
    let value =
        json!({ "answer": answer.text, "attachment_bytes": answer.blob.len(), "saved": saved });
    host.output.result(&value, || answer.text.clone());
    Ok(())
}

/// Label and pixels of a held-back picture.
pub(super) fn sample(number: usize) -> Result<(u8, Vec<u8>)> {
    let mut held_back = cloudlet_resources::digits::held_back();
    let digit = held_back.nth(number).with_context(|| {
        let count = cloudlet_resources::digits::held_back().count();
        format!(
            "there is no sample {number}: they go from 0 to {}",
            count - 1
        )
    })?;
    Ok((digit.label, digit.pixels.to_vec()))
}

/// What goes with a request: a file, a sample, or nothing.
pub(super) fn attachment(file: Option<&Path>, sampled: Option<usize>) -> Result<Vec<u8>> {
    match (file, sampled) {
        (Some(path), _) => read_attachment(path),
        (None, Some(number)) => Ok(sample(number)?.1),
        (None, None) => Ok(Vec::new()),
    }
}

/// A file that goes with a request: a PNG as the recogniser takes it, anything else as it is.
fn read_attachment(path: &Path) -> Result<Vec<u8>> {
    let bytes = files::read(path, BLOB_MAX as u64)?;
    if !bytes.starts_with(PNG_SIGNATURE) {
        return Ok(bytes);
    }
    picture::digit_of_png(Cursor::new(bytes))
        .with_context(|| format!("cannot use {}", path.display()))
}

/// Saves what came with an answer: a picture as PNG, anything else as it is.
pub(super) fn save(path: &Path, text: &str, blob: &[u8]) -> Result<()> {
    if blob.is_empty() {
        bail!("nothing came with the answer that could be saved: {text}");
    }
    let mut file =
        File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    match picture::size_in(text, blob.len()) {
        Some((width, height)) => picture::write_png(&file, width, height, blob)?,
        None => file
            .write_all(blob)
            .with_context(|| format!("cannot write {}", path.display()))?,
    }
    Ok(())
}
