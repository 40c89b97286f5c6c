//! `image build` runs the recipe that the program has in it; `image import` makes an image of what is
//! there.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cloudlet::boot_image::{BootImage, Manifest};
use cloudlet::import::boot::Choice;
use cloudlet::import::source::Source;
use cloudlet::import::xattrs::LeftOut;
use cloudlet::import::{self, Options};
use cloudlet_resources::linux;
use cloudlet_snapshot::place_directory;
use serde_json::json;

use super::output::{Progress, tell};
use super::scratch::Scratch;
use super::{Host, absolute};
use crate::cli::{Image, ImageBuild, ImageImport};

/// What the recipe's lines begin with.
const RECIPE_SAYS: &str = "build-debian: ";

pub(super) fn image(host: &Host, command: &Image) -> Result<()> {
    match command {
        Image::Build(args) => build(host, args),
        Image::Import(args) => import(host, args),
    }
}

fn import(host: &Host, args: &ImageImport) -> Result<()> {
    let out = absolute(&args.out)?;
    if fs::symlink_metadata(&out).is_ok() {
        bail!("{} exists", args.out.display());
    }
    let parent = out.parent().context("the root directory is no image")?;
    let scratch = Scratch::new(parent, ".unfinished-import-")?;
    let from = args
        .kernel_from
        .as_deref()
        .map(BootImage::open)
        .transpose()
        .context("--kernel-from is to name a bootable image")?;
    let boot = match (&from, &args.kernel, &args.initrd) {
        (Some(image), _, _) => Choice::Image(image),
        (None, Some(kernel), Some(initrd)) => Choice::Files { kernel, initrd },
        _ => Choice::Tree,
    };
    let source = Source::new(&args.source);
    let options = Options {
        source: &source,
        boot,
        root_len: args.size.map(|mib| mib << 20),
        work: scratch.path(),
    };
    let mut steps = Steps {
        host,
        bar: host.output.progress(),
    };
    let made = import::import(&options, &mut steps)
        .with_context(|| format!("cannot import {}", args.source.display()))?;
    steps.bar.finish();
    // The directory gets its name in one step, and until then belongs to what is swept.
    place_directory(&scratch.path().join("image"), &out)?;
    report(host, &args.out, &made.manifest, Some(&made.left_out));
    Ok(())
}

/// Steps as remarks, and the last one's progress as a bar.
struct Steps<'a> {
    host: &'a Host,
    bar: Progress,
}

impl import::Progress for Steps<'_> {
    fn step(&mut self, step: &str) {
        self.host.output.say(step);
    }

    fn written(&mut self, done: u64, total: u64) {
        self.bar.show("write", done, total);
    }
}

/// Says what was made, and of an import what was left out.
fn report(host: &Host, out: &Path, manifest: &Manifest, left_out: Option<&LeftOut>) {
    let mut value = json!({ "image": out, "manifest": manifest });
    if let Some(left_out) = left_out {
        let counts: serde_json::Map<_, _> = left_out
            .iter()
            .map(|(name, count)| (name.to_owned(), count.into()))
            .collect();
        let counted = |(name, count)| format!("{name} of {count}");
        let names: Vec<String> = left_out.iter().map(counted).collect();
        if !names.is_empty() {
            tell(&format!(
                "cloudlet: extended attributes of files were left out: {}",
                names.join(", ")
            ));
        }
        value["left_out"] = counts.into();
    }
    host.output.result(&value, || {
        format!("cloudlet run --image {} boots it", out.display())
    });
}

fn build(host: &Host, args: &ImageBuild) -> Result<()> {
    let out = absolute(&args.out)?;
    if fs::symlink_metadata(&out).is_ok() {
        bail!("{} exists", args.out.display());
    }
    let parent = out.parent().context("the root directory is no image")?;
    let scratch = Scratch::new(parent, ".unfinished-build-")?;
    for (name, mode, contents) in linux::RECIPE {
        write(&scratch.path().join(name), *mode, contents)?;
    }
    // mmdebstrap unpacks where temporary files go, and apt's own user has to get there.
    let unpacked = Scratch::new(&std::env::temp_dir(), "cloudlet-build-")?;
    fs::set_permissions(unpacked.path(), fs::Permissions::from_mode(0o711))
        .context("cannot let apt's user into a temporary directory")?;
    let work = scratch.path().join("work");
    fs::create_dir(&work).with_context(|| format!("cannot make {}", work.display()))?;
    // The recipe, with all that it has started, is killed with this command; what they leave is swept.
    let mut recipe = Command::new("setpriv");
    recipe
        .env("TMPDIR", unpacked.path())
        .args(["--pdeathsig", "KILL", "bash"])
        .arg(scratch.path().join(linux::RECIPE_SCRIPT))
        .arg("--work")
        .arg(&work)
        .arg("--agent")
        .arg(scratch.path().join(linux::RECIPE_AGENT))
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
    report(host, &args.out, &image.manifest, None);
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
                    tell(&earlier);
                }
            }
            None => tell(&line),
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
