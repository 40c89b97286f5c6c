//! RAM that is filled while it is read: a pager that notes the demand, a worker that reads the
//! page from a file and places it, both filtered, and this thread in the place of a vCPU.

use cloudlet_vmm::memory::{
    GuestRam, PAGE, PAGE_BYTES, PageRun, PageSource, Pager, PagerHooks, Placer, Ram, RamLayout,
    RamPage, SourceError,
};
use cloudlet_vmm::seccomp::{ThreadKind, install};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::thread;
use vm_memory::{Bytes, GuestAddress};

/// The pages of RAM, and which of them are filled on demand.
const PAGES: u64 = 4096;
const DELTA: PageRun = PageRun {
    first: RamPage(100),
    count: 2000,
};
const ZERO: PageRun = PageRun {
    first: RamPage(2150),
    count: 10,
};

/// Puts the demand into a channel.
struct Demand(mpsc::Sender<RamPage>);

impl PageSource for Demand {
    fn on_fault(&self, page: RamPage, _: &Placer) -> Result<(), SourceError> {
        Ok(self.0.send(page)?)
    }
}

/// The whole of it; panics if a page is wrong.
pub(crate) fn child() {
    let base = numbered_file(0);
    let delta = numbered_file(1 << 32);
    let layout = RamLayout::new(PAGES * PAGE_BYTES).expect("layout");
    let (ram, placer) = Ram::with_delta(&layout, Some(&base), &[DELTA], &[ZERO]).expect("ram");
    let (demand, wanted) = mpsc::channel();
    let worker_placer = placer.clone();
    let worker = thread::Builder::new()
        .name("worker0".to_owned())
        .spawn(move || {
            install(ThreadKind::Worker).expect("install");
            place_all(&wanted, &delta, &worker_placer);
        })
        .expect("spawn");
    let hooks = PagerHooks {
        on_start: Box::new(|| Ok(install(ThreadKind::Pager)?)),
        on_error: Box::new(|error| panic!("{error:?}")),
        record: false,
    };
    let pager = Pager::spawn(placer.clone(), Arc::new(Demand(demand)), hooks).expect("pager");
    for page in (0..PAGES).rev() {
        let expected = if ZERO.contains(RamPage(page)) {
            0
        } else if DELTA.contains(RamPage(page)) {
            1 << 32 | page
        } else {
            page
        };
        assert_eq!(number_of(ram.guest(), page), expected, "page {page}");
    }
    assert!(placer.wait_complete(None).expect("wait"));
    drop(pager);
    worker.join().expect("worker");
    eprintln!("all pages are right");
}

/// A worker's day: single pages on demand, neighbours in bulk.
fn place_all(wanted: &mpsc::Receiver<RamPage>, delta: &File, placer: &Placer) {
    for page in wanted {
        let first = page.0.saturating_sub(15).max(DELTA.first.0);
        let mut bytes = vec![0; usize::try_from(page.0 + 1 - first).expect("small") * PAGE];
        delta
            .read_exact_at(&mut bytes, first * PAGE_BYTES)
            .expect("read");
        placer.place(RamPage(first), &bytes).expect("place");
    }
}

/// Each page starts with its number plus `offset`.
fn numbered_file(offset: u64) -> File {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(PAGES * PAGE_BYTES).expect("length");
    for page in 0..PAGES {
        file.write_all_at(&(offset + page).to_le_bytes(), page * PAGE_BYTES)
            .expect("write");
    }
    file
}

fn number_of(guest: &GuestRam, page: u64) -> u64 {
    guest
        .read_obj(GuestAddress(page * PAGE_BYTES))
        .expect("in RAM")
}
