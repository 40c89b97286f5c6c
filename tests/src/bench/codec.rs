//! `encode` and `apply`: megabytes of guest memory per second and core, on the memory that the two
//! applications really leave in the embedded guest.

use std::fs::{self, File};
use std::io::{self, Cursor};
use std::path::Path;
use std::time::Instant;

use cloudlet_overlay::format::SEGMENT_BYTES_MAX;
use cloudlet_overlay::verify::read_head;
use cloudlet_overlay::{
    BaseContent, BaseHashes, BaseId, DeltaSpec, Digest, Options, PAGE_BYTES, PageAt, PageReader,
    SegmentDecoder, SegmentId, Space, SpaceSize, encode,
};
use cloudlet_vmm::memory::{PageRun, Ram, RamLayout, RamPage};

use super::pager::{BARE_BULK_IS, bare_bulk};
use super::{Figure, RUNS_MIN, Sheet};
use crate::ensure_eq;
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane};

/// The applications, with what they are installed with; the encoder sees both.
const APPS: [(&str, &str); 2] = [("fluid", "128"), ("object", "256")];

/// A memory image read into memory, as the encoder would find a paused VM's RAM.
struct Image(Vec<u8>);

impl Image {
    fn pages(&self) -> u64 {
        to_u64(self.0.len() / PAGE_BYTES)
    }

    fn run(&self, first: PageAt, bytes: usize) -> io::Result<&[u8]> {
        let start = usize::try_from(first.page).map_err(io::Error::other)? * PAGE_BYTES;
        self.0
            .get(start..start + bytes)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl PageReader for Image {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        self.read_run(at, into)
    }

    fn read_run(&self, first: PageAt, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(self.run(first, into.len())?);
        Ok(())
    }
}

fn to_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// Megabytes (10^6) a second.
fn rate(bytes: u64, seconds: f64) -> f64 {
    // Memory sizes are far below 2^53.
    bytes as f64 / 1e6 / seconds
}

/// A customised VM against what it was made of.
struct Delta {
    base_file: File,
    base: Image,
    hashes: BaseHashes,
    vm: Image,
    /// The pages that differ.
    changed: Vec<PageAt>,
    spaces: [SpaceSize; 1],
}

impl Delta {
    /// Boots the embedded guest, installs the application and asks something of it; both moments
    /// are kept.
    fn of(app: &str, memory_mib: &str) -> Outcome<Self> {
        let host = Host::new(Lane::One)?;
        host.boot("vm", &["--memory", memory_mib])?;
        let before = host.path("before");
        let after = host.path("after");
        host.ok(&["snapshot", "vm", &before.to_string_lossy()])?;
        host.ok(&["app", "install", "vm", app])?;
        host.ok(&["call", "vm", "verify"])?;
        host.ok(&["snapshot", "vm", &after.to_string_lossy()])?;
        Self::between(&before.join("memory"), &after.join("memory"))
    }

    fn between(before: &Path, after: &Path) -> Outcome<Self> {
        let (base, vm) = (Image(fs::read(before)?), Image(fs::read(after)?));
        ensure_eq!(base.pages(), vm.pages(), "pages of the two moments");
        let (base_pages, _) = base.0.as_chunks::<PAGE_BYTES>();
        let (vm_pages, _) = vm.0.as_chunks::<PAGE_BYTES>();
        let pairs = (0..).zip(base_pages.iter().zip(vm_pages));
        let changed: Vec<PageAt> = pairs
            .filter(|(_, (old, new))| old != new)
            .map(|(number, _)| PageAt::memory(number))
            .collect();
        let spaces = [SpaceSize {
            space: Space::Memory,
            pages: vm.pages(),
            base_pages: base.pages(),
        }];
        let hashes = BaseHashes::build(&[(Space::Memory, base.pages())], &base, 0)?;
        Ok(Self {
            base_file: File::open(before)?,
            base,
            hashes,
            vm,
            changed,
            spaces,
        })
    }

    fn bytes(&self) -> u64 {
        to_u64(self.changed.len() * PAGE_BYTES)
    }

    fn encode(&self) -> Outcome<Vec<u8>> {
        let spec = DeltaSpec {
            base: BaseId(Digest::of(b"bench")),
            spaces: &self.spaces,
            early: &[],
            rest: &self.changed,
            state: &[],
            meta: &[],
        };
        let base = BaseContent {
            pages: &self.base,
            hashes: Some(&self.hashes),
        };
        let options = Options {
            threads: 1,
            ..Options::default()
        };
        let mut out = Cursor::new(Vec::new());
        encode(&spec, &self.vm, Some(base), &mut out, options, &mut |_| ())?;
        Ok(out.into_inner())
    }

    /// Verifies, decompresses and places every segment of `overlay` in fresh guest memory; the
    /// bytes placed and the seconds it took.
    fn apply(&self, overlay: &[u8]) -> Outcome<(u64, f64)> {
        let (prefix, index) = read_head(&mut &*overlay)?;
        let mut runs: Vec<PageRun> = Vec::new();
        for number in 0..prefix.segments() {
            let segment_runs = index.segment_runs(SegmentId(number));
            runs.extend(segment_runs.map(|(at, pages)| PageRun::new(at.page, to_u64(pages))));
        }
        let layout = RamLayout::new(to_u64(self.vm.0.len()))?;
        let (ram, placer) = Ram::with_delta(&layout, Some(&self.base_file), &runs, &[])?;
        let mut decoder = SegmentDecoder::new();
        let mut raw = vec![0; SEGMENT_BYTES_MAX];
        let mut offset = usize::try_from(prefix.segments_offset())?;
        let mut placed = 0;
        let started = Instant::now();
        for (number, segment) in (0..).zip(index.segments()) {
            let end = offset + usize::try_from(segment.stored_bytes)?;
            let stored = overlay
                .get(offset..end)
                .ok_or_else(|| Failure::new("a short overlay"))?;
            offset = end;
            let decoded = decoder.decode(&index, SegmentId(number), stored, &mut raw)?;
            for (at, bytes) in decoded.runs() {
                placed += placer.place(RamPage(at.page), bytes)?.new;
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        drop(ram);
        Ok((placed * to_u64(PAGE_BYTES), seconds))
    }
}

fn deltas(sheet: &Sheet) -> Outcome<Vec<Delta>> {
    let make = |(app, memory_mib): (&str, &str)| {
        let delta = Delta::of(app, memory_mib)?;
        sheet.note(&format!(
            "{app}: {:.1} MB of guest memory changed",
            rate(delta.bytes(), 1.0)
        ));
        Ok(delta)
    };
    APPS.into_iter().map(make).collect()
}

/// `encode`
pub(super) fn run_encode(sheet: &mut Sheet) -> Outcome {
    let deltas = deltas(sheet)?;
    let mut runs = Vec::new();
    for _ in 0..RUNS_MIN {
        let started = Instant::now();
        for delta in &deltas {
            delta.encode()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        runs.push(rate(deltas.iter().map(Delta::bytes).sum(), seconds));
    }
    sheet.put(&Figure::from_runs("encode.rate", "MB/s", &runs)?)
}

/// `apply`
pub(super) fn run_apply(sheet: &mut Sheet) -> Outcome {
    let deltas = deltas(sheet)?;
    let overlays = deltas
        .iter()
        .map(Delta::encode)
        .collect::<Outcome<Vec<_>>>()?;
    let mut runs = Vec::new();
    for _ in 0..RUNS_MIN {
        let (mut bytes, mut seconds) = (0, 0.0);
        for (delta, overlay) in deltas.iter().zip(&overlays) {
            let applied = delta.apply(overlay)?;
            bytes += applied.0;
            seconds += applied.1;
        }
        runs.push((rate(bytes, seconds), bare_bulk()?));
    }
    sheet.put(&Figure::beside("apply.rate", "MB/s", &runs, BARE_BULK_IS)?)
}
