//! `image build`: runs the recipe that the program has in it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cloudlet::boot_image::BootImage;
use cloudlet_resources::linux;
use serde_json::json;

use super::scratch::Scratch;
use super::{Host, absolute};
use crate::cli::{Image, ImageBuild};

/// What the recipe's lines begin with.
const RECIPE_SAYS: &str = "build-debian: ";

pub(super) fn image(host: &Host, command: &Image) -> Result<()> {
    match command {
        Image::Build(args) => build(host, args),
    }
}

fn build(host: &Host, args: &ImageBuild) -> Result<()> {
    let out = absolute(&args.out)?;
    let scratch = Scratch::new(&host.paths.scratch()?, "recipe-")?;
    for (name, mode, contents) in linux::RECIPE {
        write(&scratch.path().join(name), *mode, contents)?;
    }
    // The recipe ends, and removes what it has, when this command is killed.
    let mut recipe = Command::new("setpriv");
    recipe
        .args(["--pdeathsig", "TERM", "bash"])
        .arg(scratch.path().join(linux::RECIPE_SCRIPT))
        .args(["--suite", &args.suite])
        .args(["--kernel", args.kernel.name()])
        .args(["--init", args.init.name()])
        .args(["--size", &args.size.to_string()]);
    if !args.include.is_empty() {
        recipe.args(["--include", &args.include.join(",")]);
    }
    if args.check {
        recipe.arg("--check");
    }
    run(host, recipe.arg(&out))?;
    let image = BootImage::open(&out).context("the recipe made no image")?;
    host.output
        .result(&json!({ "image": out, "manifest": image.manifest }), || {
            format!("cloudlet run --image {} boots it", args.out.display())
        });
    Ok(())
}

fn write(path: &Path, mode: u32, contents: &[u8]) -> Result<()> {
    let mut file = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    std::io::Write::write_all(&mut file, contents)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Runs the recipe, shows its steps as they come, and makes an error of its last words.
fn run(host: &Host, recipe: &mut Command) -> Result<()> {
    let mut child = recipe
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the recipe with setpriv (util-linux)")?;
    let errors = child.stderr.take().expect("it is a pipe");
    let errors = std::thread::spawn(move || last_words(BufReader::new(errors)));
    let steps = BufReader::new(child.stdout.take().expect("it is a pipe"));
    for line in steps.lines() {
        let line = line.context("cannot read what the recipe says")?;
        host.output
            .say(line.strip_prefix(RECIPE_SAYS).unwrap_or(&line));
    }
    let status = child.wait().context("cannot wait for the recipe")?;
    let words = errors.join().expect("reading lines does not panic");
    if !status.success() {
        bail!(
            "{}",
            words.unwrap_or_else(|| format!("the recipe ended with {status}"))
        );
    }
    Ok(())
}

/// Passes lines on to standard error, but for the last one of the recipe itself, which is returned.
fn last_words(lines: impl BufRead) -> Option<String> {
    let mut last = None;
    for line in lines.lines().map_while(Result::ok) {
        match line.strip_prefix(RECIPE_SAYS) {
            Some(words) => {
                if let Some(earlier) = last.replace(words.to_owned()) {
                    eprintln!("{earlier}");
                }
            }
            None => eprintln!("{line}"),
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_are_the_recipes_own() {
        let text = b"E: noise\nbuild-debian: first\nmore\nbuild-debian: why\nnoise\n";
        assert_eq!(last_words(&text[..]).as_deref(), Some("why"));
        assert_eq!(last_words(&b"noise\n"[..]), None);
    }
}
