//! `encode-memory`: the anonymous memory that encoding takes, all of a large guest's memory changed.
//! The guest is made as it is read, so that nothing of what is measured is its own.
//!
//! `BENCH_ENCODE_GIB=N` takes a guest of another size; the figure must not grow with it but for
//! the base's page hashes, 32 bytes a page.

use std::fs;
use std::io::{self, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cloudlet_overlay::{
    BaseContent, BaseHashes, BaseId, DeltaSpec, Digest, Options, PAGE_BYTES, PageAt, PageReader,
    PageSpan, Space, SpaceSize, encode,
};

use super::{Figure, RUNS_MIN, Sheet};
use crate::failure::{Failure, Outcome};

/// GiB of the guest's memory, if not the default.
const GIB_VARIABLE: &str = "BENCH_ENCODE_GIB";
const GIB: u64 = 4;
/// Time between two looks at what is resident.
const LOOK: Duration = Duration::from_millis(2);

/// Memory of which each page is another: half of it noise, half of it zero.
struct Made {
    seed: u64,
}

impl PageReader for Made {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        // xorshift64*, never at its fixed point 0.
        let mut state = (at.page << 8 | self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let (words, _) = into.as_chunks_mut::<8>();
        let (noise, rest) = words.split_at_mut(PAGE_BYTES / 16);
        for word in noise {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
        }
        rest.fill([0; 8]);
        Ok(())
    }
}

/// Counts and forgets.
#[derive(Default)]
struct Nowhere {
    at: u64,
}

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.at += u64::try_from(bytes.len()).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Nowhere {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Start(at) => self.at = at,
            SeekFrom::Current(0) => {}
            _ => return Err(io::ErrorKind::Unsupported.into()),
        }
        Ok(self.at)
    }
}

/// Resident anonymous memory of this process, KiB.
fn resident_kib() -> Outcome<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    let number = number.ok_or_else(|| Failure::new("no RssAnon in /proc/self/status"))?;
    Ok(number.parse()?)
}

/// The highest that [`resident_kib`] is while `work` runs.
fn peak_kib(work: impl FnOnce() -> Outcome) -> Outcome<u64> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = resident_kib()?.max(peak);
                std::thread::sleep(LOOK);
            }
            Outcome::Ok(peak)
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let peak = looks.join();
        worked?;
        peak.map_err(|_| Failure::new("the looking thread panicked"))?
    })
}

fn pages() -> Outcome<u64> {
    let gib = match std::env::var(GIB_VARIABLE) {
        Ok(text) => text
            .parse()
            .map_err(|_| Failure::new(format!("{GIB_VARIABLE}={text}: not GiB")))?,
        Err(_) => GIB,
    };
    Ok((gib << 30) / u64::try_from(PAGE_BYTES)?)
}

/// `encode-memory`
pub(super) fn run(sheet: &mut Sheet) -> Outcome {
    let pages = pages()?;
    let (before, now) = (Made { seed: 1 }, Made { seed: 2 });
    let idle = resident_kib()?;
    let hashes = BaseHashes::build(&[(Space::Memory, pages)], &before, 0)?;
    let spaces = [SpaceSize {
        space: Space::Memory,
        pages,
        base_pages: pages,
    }];
    let changed = vec![PageSpan {
        first: PageAt::memory(0),
        pages,
    }];
    let spec = DeltaSpec {
        base: BaseId(Digest::of(b"bench")),
        spaces: &spaces,
        early: &[],
        changed: &changed,
        state: &[],
        meta: &[],
    };
    let base = BaseContent {
        pages: &before,
        hashes: Some(&hashes),
    };
    let mut runs = Vec::new();
    for _ in 0..RUNS_MIN {
        let peak = peak_kib(|| {
            let mut out = Nowhere::default();
            let options = Options::default();
            let summary = encode(&spec, &now, Some(base), &mut out, options, &mut |_| ())?;
            crate::ensure_eq!(summary.literal_pages, pages, "pages that are stored");
            Ok(())
        })?;
        // Far below 2^53.
        runs.push(peak.saturating_sub(idle) as f64 / 1024.0);
    }
    sheet.put(&Figure::from_runs("encode.memory", "MiB", &runs)?)
}
