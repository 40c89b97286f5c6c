//! `encode` and `apply`: megabytes of guest memory per second and core, on the memory that the two
//! applications really leave in the embedded guest, each beside the same work without a format.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Cursor};
use std::path::Path;
use std::time::Instant;

use cloudlet_overlay::format::SEGMENT_BYTES_MAX;
use cloudlet_overlay::verify::read_head;
use cloudlet_overlay::{
    BaseContent, BaseHashes, BaseId, Codec, DeltaSpec, Digest, LEVEL_DEFAULT, Options, PAGE_BYTES,
    PageAt, PageReader, PageSpan, SegmentDecoder, SegmentId, Space, SpaceSize, encode,
};
use cloudlet_vmm::memory::{PageRun, Ram, RamLayout, RamPage};

use super::bare_uffd::Region;
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
    changed: Vec<PageSpan>,
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
        let mut changed: Vec<PageSpan> = Vec::new();
        for (number, _) in pairs.filter(|(_, (old, new))| old != new) {
            match changed.last_mut() {
                Some(span) if span.end() == number => span.pages += 1,
                _ => changed.push(PageSpan {
                    first: PageAt::memory(number),
                    pages: 1,
                }),
            }
        }
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
        let pages: u64 = self.changed.iter().map(|span| span.pages).sum();
        pages * to_u64(PAGE_BYTES)
    }

    fn encode(&self) -> Outcome<Vec<u8>> {
        let spec = DeltaSpec {
            base: BaseId(Digest::of(b"bench")),
            spaces: &self.spaces,
            early: &[],
            changed: &self.changed,
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

    /// The least that encoding can be, without a format: the changed pages compared with the base,
    /// hashed one by one, and compressed and hashed again a megabyte at a time. The seconds it took.
    fn bare_encode(&self) -> Outcome<f64> {
        let started = Instant::now();
        let mut zstd = zstd::bulk::Compressor::new(LEVEL_DEFAULT)?;
        let mut raw = Vec::with_capacity(SEGMENT_BYTES_MAX);
        let mut stored = Vec::with_capacity(zstd::zstd_safe::compress_bound(SEGMENT_BYTES_MAX));
        for at in self.changed.iter().flat_map(|span| span.places()) {
            let (now, before) = (self.vm.run(at, PAGE_BYTES)?, self.base.run(at, PAGE_BYTES)?);
            if now != before {
                black_box(blake3::hash(now));
                raw.extend_from_slice(now);
            }
            if raw.len() == SEGMENT_BYTES_MAX {
                bare_segment(&mut zstd, &mut raw, &mut stored)?;
            }
        }
        bare_segment(&mut zstd, &mut raw, &mut stored)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Verifies, decompresses and places every segment of `overlay` in fresh guest memory; the
    /// bytes placed and the seconds it took.
    fn apply(&self, overlay: &[u8]) -> Outcome<(u64, f64)> {
        let (prefix, index) = read_head(&mut Cursor::new(overlay))?;
        let mut runs: Vec<PageRun> = Vec::new();
        for number in 0..prefix.segments() {
            let places = index.segment_places(SegmentId(number));
            runs.extend(places.map(|to| PageRun::new(to.first.page, u64::from(to.pages))));
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

impl Delta {
    /// The least that applying can be: every segment's stored bytes hashed, decompressed, and copied
    /// to where they belong, by a call for each run of pages. The bytes and the seconds.
    fn bare_apply(&self, overlay: &[u8]) -> Outcome<(u64, f64)> {
        let (_, index) = read_head(&mut Cursor::new(overlay))?;
        let region = Region::new(self.vm.0.len())?;
        let mut zstd = zstd::bulk::Decompressor::new()?;
        let mut raw = vec![0; SEGMENT_BYTES_MAX];
        let mut placed = 0;
        let started = Instant::now();
        for (number, segment) in (0..).zip(index.segments()) {
            let start = usize::try_from(segment.offset)?;
            let stored = overlay
                .get(start..start + usize::try_from(segment.stored_bytes)?)
                .ok_or_else(|| Failure::new("a short overlay"))?;
            black_box(blake3::hash(stored));
            match segment.codec {
                Codec::Raw => raw[..stored.len()].copy_from_slice(stored),
                Codec::Zstd => {
                    zstd.decompress_to_buffer(stored, &mut raw)?;
                }
            }
            for to in index.segment_places(SegmentId(number)) {
                let from = usize::try_from(to.slot)? * PAGE_BYTES;
                let length = usize::try_from(to.pages)? * PAGE_BYTES;
                let offset = usize::try_from(to.first.page)? * PAGE_BYTES;
                region.copy(offset, &raw[from..from + length])?;
                placed += to_u64(length);
            }
        }
        Ok((placed, started.elapsed().as_secs_f64()))
    }
}

/// Compresses and hashes what is in `raw`, and empties it.
fn bare_segment(
    zstd: &mut zstd::bulk::Compressor<'_>,
    raw: &mut Vec<u8>,
    stored: &mut Vec<u8>,
) -> Outcome {
    stored.clear();
    zstd.compress_to_buffer(raw.as_slice(), stored)?;
    black_box(blake3::hash(stored));
    raw.clear();
    Ok(())
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
        let bare = deltas
            .iter()
            .map(Delta::bare_encode)
            .sum::<Outcome<f64>>()?;
        let bytes = deltas.iter().map(Delta::bytes).sum();
        runs.push((rate(bytes, seconds), rate(bytes, bare)));
    }
    let is = "compare, BLAKE3, zstd, BLAKE3 of the same pages";
    sheet.put(&Figure::beside("encode.rate", "MB/s", &runs, is)?)
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
        let (mut ours, mut bare) = ((0, 0.0), (0, 0.0));
        for (delta, overlay) in deltas.iter().zip(&overlays) {
            let all = [
                (&mut ours, delta.apply(overlay)?),
                (&mut bare, delta.bare_apply(overlay)?),
            ];
            for (sum, (bytes, seconds)) in all {
                sum.0 += bytes;
                sum.1 += seconds;
            }
        }
        runs.push((rate(ours.0, ours.1), rate(bare.0, bare.1)));
    }
    let is = "BLAKE3, zstd, UFFDIO_COPY of the same segments";
    sheet.put(&Figure::beside("apply.rate", "MB/s", &runs, is)?)
}
