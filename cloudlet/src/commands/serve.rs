//! `serve`: a directory of overlays over HTTP.

use anyhow::{Context, Result};
use cloudlet::fetch::Rate;
use cloudlet::serve::{ServeOptions, Server};
use serde_json::json;

use super::Host;
use crate::cli::Serve;

pub(super) fn serve(host: &Host, args: &Serve) -> Result<()> {
    let tls = match args.tls.as_deref() {
        Some([certificate, key]) => Some((certificate.clone(), key.clone())),
        _ => None,
    };
    let rate = args.rate.map(Rate::from_mbit).transpose()?;
    let mut server = Server::bind(
        &args.dir,
        &args.listen,
        ServeOptions {
            tls,
            rate,
            ..Default::default()
        },
    )
    .with_context(|| format!("cannot serve {} at {}", args.dir.display(), args.listen))?;
    let url = server.url("");
    host.output.result(&json!({ "url": url }), || {
        format!("serving {} at {url}", args.dir.display())
    });
    server.wait();
    Ok(())
}
