//! What leaves a paused VM: an image of all it is, or an overlay of what differs from its base.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use cloudlet_overlay::{
    BaseContent, ChangedPages, DeltaSpec, Options, PAGE_BYTES, PageAt, PageReader, PageSpan,
    Progress, Space, SpaceSize, encode,
};
use cloudlet_snapshot::{AtomicDir, AtomicFile};
use cloudlet_vmm::devices::disk::{BlockNumber, Disk};
use cloudlet_vmm::machine::Machine;
use cloudlet_vmm::memory::{PageSet, Ram, RamPage};
use serde_json::{Value, json};

use super::Failure;
use super::build::{About, Origin};
use crate::control::SpacePage;
use crate::image::file;
use crate::pages::ImagePages;
use crate::synthesis::Meta;

/// Told how far a step has come.
type Report<'a> = &'a mut dyn FnMut(&str, u64, u64);

const PAGE_LEN: u64 = PAGE_BYTES as u64;

/// Writes an image of the VM into the new directory `dir`.
pub(super) fn image(
    machine: &mut Machine,
    about: &About,
    dir: &Path,
    report: Report<'_>,
) -> Result<Value, Failure> {
    let state = machine.save()?;
    let target = AtomicDir::create(dir)?;
    let total = about.image.memory_bytes + about.disks.iter().map(Disk::bytes).sum::<u64>();
    report("snapshot", 0, total);
    File::create(target.path().join(file::STATE))?.write_all(&state)?;
    let description = serde_json::to_vec(&about.image)?;
    File::create(target.path().join(file::DESCRIPTION))?.write_all(&description)?;
    machine
        .ram()
        .write_image(&File::create(target.path().join(file::MEMORY))?)?;
    let mut done = about.image.memory_bytes;
    report("snapshot", done, total);
    for (index, disk) in about.disks.iter().enumerate() {
        let out = File::create(target.path().join(file::disk(index)))?;
        disk.write_image(&out, &mut |at| report("snapshot", done + at, total))?;
        done += disk.bytes();
        report("snapshot", done, total);
    }
    target.commit()?;
    Ok(json!({ "name": about.name, "dir": dir, "memory_bytes": about.image.memory_bytes }))
}

/// The pages of a paused VM.
struct VmPages<'a> {
    ram: &'a Ram,
    disks: &'a [Disk],
}

impl PageReader for VmPages<'_> {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        self.read_run(at, into)
    }

    fn read_run(&self, first: PageAt, into: &mut [u8]) -> io::Result<()> {
        match first.space {
            Space::Memory => self
                .ram
                .read_pages(RamPage(first.page), into)
                .map_err(io::Error::other),
            Space::Disk(number) => {
                let disk = self
                    .disks
                    .get(usize::from(number))
                    .ok_or(io::ErrorKind::NotFound)?;
                disk.read_blocks(BlockNumber(first.page), into)
                    .map_err(io::Error::other)
            }
        }
    }
}

/// Writes an overlay of the VM against its base into the file `out`.
pub(super) fn overlay(
    machine: &mut Machine,
    about: &About,
    out: &Path,
    early: &[SpacePage],
    level: i32,
    report: Report<'_>,
) -> Result<Value, Failure> {
    let origin = origin(about)?;
    let state = machine.save()?;
    let base_image = origin.base.image()?;
    let (base_pages, hashes) = (ImagePages::open(&base_image)?, origin.base.hashes()?);
    let spaces = spaces(about, &base_image.description);
    let changed = Changes::of(machine, about, origin.is_mapped)?;
    let early: Vec<PageAt> = early.iter().map(|&page| place(page)).collect();
    let meta = serde_json::to_vec(&Meta {
        image: about.image.clone(),
    })?;
    let spec = DeltaSpec {
        base: origin.base.id,
        spaces: &spaces,
        early: &early,
        changed: &changed,
        state: &state,
        meta: &meta,
    };
    let pages = VmPages {
        ram: machine.ram(),
        disks: &about.disks,
    };
    let base = BaseContent {
        pages: &base_pages,
        hashes: Some(&hashes),
    };
    let target = AtomicFile::create(out)?;
    let mut writer = BufWriter::with_capacity(1 << 20, target.file());
    let options = Options {
        level,
        ..Options::default()
    };
    let summary = encode(
        &spec,
        &pages,
        Some(base),
        &mut writer,
        options,
        &mut |Progress { done, total }| report("encode", done * PAGE_LEN, total * PAGE_LEN),
    )?;
    writer.flush()?;
    drop(writer);
    target.commit()?;
    Ok(json!({
        "id": summary.id.to_string(),
        "base": origin.base.id.to_string(),
        "file": out,
        "bytes": summary.total_bytes,
        "early_bytes": summary.early_bytes,
        "segments": summary.segments,
        "early_segments": summary.early_segments,
        "literal_pages": summary.literal_pages,
        "zero_pages": summary.zero_pages,
        "base_pages": summary.base_pages,
        "repeated_pages": summary.repeated_pages,
        "unchanged_pages": summary.unchanged_pages,
    }))
}

fn origin(about: &About) -> Result<&Origin, Failure> {
    about
        .origin
        .as_ref()
        .ok_or_else(|| match &about.image.base {
            Some(id) => {
                format!("this VM was made of base VM {id}, which is not in the store").into()
            }
            None => {
                "this VM was not made of a base VM: publish one with `cloudlet base create`, and \
                 start from it with `cloudlet restore TAG`"
                    .into()
            }
        })
}

fn place((space, page): SpacePage) -> PageAt {
    match space.checked_sub(1) {
        None => PageAt::memory(page),
        Some(disk) => PageAt::disk(disk, page),
    }
}

fn spaces(about: &About, base: &crate::image::Description) -> Vec<SpaceSize> {
    let pages = |bytes: u64| bytes.div_ceil(PAGE_LEN);
    let memory = SpaceSize {
        space: Space::Memory,
        pages: pages(about.image.memory_bytes),
        base_pages: pages(base.memory_bytes),
    };
    let disks = (0..)
        .zip(&about.image.disks)
        .map(|(number, disk)| SpaceSize {
            space: Space::Disk(number),
            pages: pages(disk.bytes),
            base_pages: base
                .disks
                .get(usize::from(number))
                .map_or(0, |disk| pages(disk.bytes)),
        });
    std::iter::once(memory).chain(disks).collect()
}

/// Every page and block that may differ from the base. A VM whose RAM and disks lie on the base's own
/// files knows what it has written; otherwise all is compared.
struct Changes<'a> {
    memory_pages: u64,
    disks: &'a [Disk],
    /// The pages of memory that were written, where that is known.
    written: Option<PageSet>,
}

impl<'a> Changes<'a> {
    fn of(machine: &Machine, about: &'a About, is_mapped: bool) -> Result<Self, Failure> {
        let written = is_mapped.then(|| machine.ram().pages_off_base());
        Ok(Self {
            memory_pages: about.image.memory_bytes.div_ceil(PAGE_LEN),
            disks: &about.disks,
            written: written.transpose()?,
        })
    }

    fn of_disk(&self, number: u8, disk: &Disk) -> Box<dyn Iterator<Item = PageSpan>> {
        let span = move |first, pages| {
            let first = PageAt::disk(number, first);
            PageSpan { first, pages }
        };
        if self.written.is_some() {
            let runs = disk.changed_runs().into_iter();
            Box::new(runs.map(move |run| span(run.first, run.count)))
        } else {
            Box::new(std::iter::once(span(0, disk.blocks())))
        }
    }
}

impl ChangedPages for Changes<'_> {
    fn spans(&self) -> Box<dyn Iterator<Item = PageSpan> + '_> {
        let span = |first, pages| PageSpan {
            first: PageAt::memory(first),
            pages,
        };
        let memory: Box<dyn Iterator<Item = PageSpan>> = match &self.written {
            Some(pages) => Box::new(pages.runs().map(move |run| span(run.first.0, run.count))),
            None => Box::new(std::iter::once(span(0, self.memory_pages))),
        };
        let disks = (0..).zip(self.disks);
        Box::new(memory.chain(disks.flat_map(|(number, disk)| self.of_disk(number, disk))))
    }
}
