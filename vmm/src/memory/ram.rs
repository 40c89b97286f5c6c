//! The mappings that are the guest's RAM.
//!
//! Each region of the layout is one anonymous reservation, owned by vm-memory's `MmapRegion`,
//! which unmaps the whole of it when its last user goes. Pieces of a file are mapped over parts
//! of a reservation before anybody else can see it, and are unmapped with it. So the rule that
//! every unsafe block below leans on: **a region's address range is mapped readable and writable
//! from its construction until the last `Arc<GuestRam>` (or clone of its regions) is dropped, and
//! only volatile accessors and the kernel (KVM, userfaultfd, read and write calls) touch it.** The
//! one exception takes access away and gives none: pieces whose pages will never come are sealed
//! (see `placer.rs`).
//!
//! Memory is kept in 4 KiB pages (`MADV_NOHUGEPAGE`): what differs from the base, what is dirty
//! and what is still missing are all counted in such pages, and one huge page would turn a touched
//! byte into 2 MiB of delta. It belongs to the guest, so core dumps (`MADV_DONTDUMP`) and child
//! processes (`MADV_DONTFORK`) do without it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
};

use super::discard::Discarder;
use super::layout::{PageRun, PageSet, RamLayout, RamPage, to_u64, to_usize};
use super::pagemap::{Pagemap, PagemapError};
use super::pieces::{self, Backing, PIECES_MAX, Piece, Plan, PlanError};
use super::placer::{Placer, PlacerBuildError};

/// The guest's RAM as vm-memory sees it, with a bitmap of what devices have written.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Why RAM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The address space for a region could not be reserved.
    #[error("cannot reserve {len} bytes of address space for guest RAM")]
    Reserve {
        /// Length of the region in bytes.
        len: u64,
        /// What mmap said.
        #[source]
        source: MmapRegionError,
    },
    /// The regions do not make a guest address space.
    #[error("guest RAM regions do not fit together")]
    Regions(#[source] GuestRegionCollectionError),
    /// The memory image could not be looked at.
    #[error("cannot use the memory image")]
    Image(#[source] io::Error),
    /// The memory image has not the length of RAM.
    #[error("the memory image has {actual} bytes, RAM has {expected}")]
    ImageLength {
        /// Bytes of RAM.
        expected: u64,
        /// Bytes of the file.
        actual: u64,
    },
    /// A piece of the memory image could not be mapped.
    #[error("cannot map {len} bytes of the memory image at offset {offset}")]
    Piece {
        /// Offset in the image in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// What mmap said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused advice on the mapping.
    #[error("madvise on guest RAM failed")]
    Advise(#[source] io::Error),
    /// The delta cannot be laid out over RAM.
    #[error("the delta does not fit the VM's RAM")]
    Plan(#[source] PlanError),
    /// The delta pieces cannot be paged in.
    #[error("the missing pages of guest RAM cannot be waited for")]
    Placer(#[source] PlacerBuildError),
    /// It cannot be said later which pages have changed.
    #[error("changes of guest RAM cannot be observed")]
    Pagemap(#[source] PagemapError),
}

/// Why it cannot be said which pages are a VM's own.
#[derive(Debug, thiserror::Error)]
pub enum OwnPagesError {
    /// Pages have still to come, so any answer would be incomplete.
    #[error("{remaining} pages of guest RAM have not arrived yet")]
    Incomplete {
        /// How many.
        remaining: u64,
    },
    /// The kernel's page map cannot be read.
    #[error("cannot look through the mappings of guest RAM")]
    Pagemap(#[source] PagemapError),
}

/// One contiguous range of guest memory, as KVM gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Number of the memory slot.
    pub index: u32,
    /// Where it starts in the guest's physical address space.
    pub gpa: GuestAddress,
    /// Where it starts in this process.
    pub host: u64,
    /// Length in bytes.
    pub len: u64,
    /// The RAM page it starts with.
    pub first: RamPage,
}

impl Slot {
    /// What `KVM_SET_USER_MEMORY_REGION` takes, with `flags` (`KVM_MEM_*`).
    pub fn kvm_region(&self, flags: u32) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: self.index,
            flags,
            guest_phys_addr: self.gpa.0,
            memory_size: self.len,
            userspace_addr: self.host,
        }
    }

    /// The slot's pages.
    pub fn run(&self) -> PageRun {
        PageRun {
            first: self.first,
            count: self.len / super::PAGE_BYTES,
        }
    }

    /// Where a page lies in this process, `None` if it is not in this slot.
    pub fn host_of(&self, page: RamPage) -> Option<u64> {
        self.run()
            .contains(page)
            .then(|| self.host + (page.offset() - self.first.offset()))
    }

    /// The page at an address of this process, `None` if it is not in this slot.
    pub fn page_at_host(&self, host: u64) -> Option<RamPage> {
        let offset = host.checked_sub(self.host)?;
        (offset < self.len).then(|| RamPage(self.first.0 + offset / super::PAGE_BYTES))
    }
}

/// The guest's RAM.
#[derive(Debug)]
pub struct Ram {
    layout: RamLayout,
    guest: Arc<GuestRam>,
    slots: Vec<Slot>,
    pieces: Vec<Piece>,
    base: Option<File>,
    placer: Option<Placer>,
    pagemap: Pagemap,
}

impl Ram {
    /// RAM of zeros: anonymous memory that costs nothing until it is touched.
    ///
    /// # Errors
    /// [`RamError`] if the address space cannot be had.
    pub fn anonymous(layout: &RamLayout) -> Result<Self, RamError> {
        Self::build(layout, None, Plan::whole(layout, Backing::Zero))
    }

    /// RAM with the contents of a memory image, mapped privately: pages are shared through the
    /// page cache with everybody who maps the same file, until they are written.
    ///
    /// The file must not be cut short while the RAM lives: a touched page behind its new end
    /// would kill the process with SIGBUS. Images of the store are immutable.
    ///
    /// # Errors
    /// [`RamError::ImageLength`] if the file has not exactly the length of RAM, other
    /// [`RamError`]s if it cannot be mapped.
    pub fn from_image(layout: &RamLayout, image: &File) -> Result<Self, RamError> {
        Self::build(layout, Some(image), Plan::whole(layout, Backing::Base))
    }

    /// RAM of which the pages of `delta` come from outside, one by one, through the [`Placer`];
    /// those of `zero` are zeros, and the rest is the base's (mapped as by [`Ram::from_image`]),
    /// or zeros if there is no base. The runs may come in any order.
    ///
    /// Whoever touches a missing page waits until it is placed, so a [`Pager`](super::Pager) has
    /// to run before anybody does. Until [`Placer::finish`] nobody may drop pages
    /// (`MADV_DONTNEED`) but through a [`Discarder`]: they would be missing again, with nobody to
    /// bring them.
    ///
    /// # Errors
    /// [`RamError::Plan`] if the runs are empty, overlap, or lie outside RAM;
    /// [`RamError::Placer`] if userfaultfd cannot be had; otherwise as [`Ram::from_image`].
    pub fn with_delta(
        layout: &RamLayout,
        base: Option<&File>,
        delta: &[PageRun],
        zero: &[PageRun],
    ) -> Result<(Self, Placer), RamError> {
        let plan = pieces::plan(layout, base.is_some(), delta, zero, PIECES_MAX)
            .map_err(RamError::Plan)?;
        let mut ram = Self::build(layout, base, plan.clone())?;
        let placer_base = base
            .map(File::try_clone)
            .transpose()
            .map_err(RamError::Image)?;
        // SAFETY: the slots are those of the memory; the plan's delta pieces lie in them and are
        // parts of the anonymous reservation, since `build` mapped nothing over them and has not
        // let anybody see them.
        let placer = unsafe { Placer::new(&ram.guest, &ram.slots, &plan, placer_base) }
            .map_err(RamError::Placer)?;
        ram.placer = Some(placer.clone());
        Ok((ram, placer))
    }

    /// What vm-memory and the devices work on.
    pub fn guest(&self) -> &Arc<GuestRam> {
        &self.guest
    }

    /// The KVM memory slots, in order of address; slot numbers count from 0.
    ///
    /// Whoever registers them keeps a clone of [`Ram::guest`] as long as the VM lives.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Where RAM sits in the guest's address space.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Who places missing pages, if RAM was built with any.
    pub fn placer(&self) -> Option<&Placer> {
        self.placer.as_ref()
    }

    /// The pages that are this VM's own: written over the base's file, touched in anonymous
    /// memory, or placed. Everything else is what the base's file has there, or zeros. A page of
    /// its own need not differ: it may have been written with what it held, or only read in
    /// anonymous memory.
    ///
    /// Takes no logging and no preparation. While vCPUs run, pages that are written during the
    /// call may or may not be in the answer.
    ///
    /// # Errors
    /// [`OwnPagesError::Incomplete`] as long as pages have to be placed.
    pub fn private_pages(&self) -> Result<PageSet, OwnPagesError> {
        let remaining = self.placer.as_ref().map_or(0, Placer::remaining);
        if remaining > 0 {
            return Err(OwnPagesError::Incomplete { remaining });
        }
        let mut pages = PageSet::new(self.layout.pages());
        for slot in &self.slots {
            self.pagemap
                .add_own(slot.host, &slot.run(), &mut pages)
                .map_err(OwnPagesError::Pagemap)?;
        }
        Ok(pages)
    }

    /// The pages that may differ from the base: the private ones, and anonymous pages that lie over
    /// the base, touched or not, as those of the delta that were discarded. Without a base: from
    /// zeros.
    ///
    /// # Errors
    /// As [`Ram::private_pages`].
    pub fn pages_off_base(&self) -> Result<PageSet, OwnPagesError> {
        let mut pages = self.private_pages()?;
        if self.base.is_some() {
            for backing in [Backing::Zero, Backing::Delta] {
                for run in self.runs_of(backing) {
                    pages.insert_run(&run);
                }
            }
        }
        Ok(pages)
    }

    /// Who gives pages back to the host.
    ///
    /// # Errors
    /// When a descriptor cannot be had.
    pub fn discarder(&self) -> Result<Discarder, RamError> {
        let base = self.base.as_ref().map(File::try_clone).transpose();
        Discarder::new(
            self.layout,
            Arc::clone(&self.guest),
            self.slots.clone(),
            self.pieces.clone(),
            base.map_err(RamError::Image)?,
            self.placer.clone(),
        )
        .map_err(RamError::Pagemap)
    }

    /// The file behind base pieces.
    pub(super) fn base(&self) -> Option<&File> {
        self.base.as_ref()
    }

    /// The pages of all pieces with a backing, in order.
    pub(super) fn runs_of(&self, backing: Backing) -> impl Iterator<Item = PageRun> + '_ {
        self.pieces
            .iter()
            .filter(move |piece| piece.backing == backing)
            .map(|piece| piece.run)
    }

    /// Builds the mappings of a plan.
    fn build(layout: &RamLayout, base: Option<&File>, plan: Plan) -> Result<Self, RamError> {
        let mut ram = Self::reserve(layout)?;
        if let Some(image) = base {
            check_image(layout, image)?;
            for run in plan.runs_of(Backing::Base) {
                ram.map_image(image, &run)?;
            }
            ram.base = Some(image.try_clone().map_err(RamError::Image)?);
        }
        ram.pieces = plan.pieces;
        ram.advise()?;
        Ok(ram)
    }

    /// Reserves the address space: anonymous memory in every region.
    fn reserve(layout: &RamLayout) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        for (index, region) in (0u32..).zip(layout.regions()) {
            let len = to_usize(region.len);
            let mapping = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::with_len(len))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .map_err(|source| RamError::Reserve {
                    len: region.len,
                    source,
                })?;
            slots.push(Slot {
                index,
                gpa: region.gpa,
                host: to_u64(mapping.as_ptr().expose_provenance()),
                len: region.len,
                first: region.run().first,
            });
            regions.push(
                GuestRegionMmap::new(mapping, region.gpa).ok_or(RamError::Regions(
                    GuestRegionCollectionError::MemoryRegionOverlap,
                ))?,
            );
        }
        let guest = GuestRam::from_regions(regions).map_err(RamError::Regions)?;
        Ok(Self {
            layout: *layout,
            guest: Arc::new(guest),
            slots,
            pieces: Vec::new(),
            base: None,
            placer: None,
            pagemap: Pagemap::open().map_err(RamError::Pagemap)?,
        })
    }

    /// The first address of a run and its length, if the whole run lies in one slot.
    fn host_range(&self, run: &PageRun) -> Option<(*mut u8, usize)> {
        let (slot, region) = self.slots.iter().zip(self.guest.iter()).find(|(slot, _)| {
            slot.run()
                .overlap(run)
                .is_some_and(|overlap| overlap == *run)
        })?;
        let offset = to_usize(run.first.offset() - slot.first.offset());
        Some((region.as_ptr().wrapping_add(offset), to_usize(run.bytes())))
    }

    /// Maps the image's pages `run` over the reservation, privately. Only for constructors, before
    /// anybody can hold a reference to the memory.
    fn map_image(&self, image: &File, run: &PageRun) -> Result<(), RamError> {
        let failed = |source| RamError::Piece {
            offset: run.first.offset(),
            len: run.bytes(),
            source,
        };
        let (start, len) = self
            .host_range(run)
            .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::EINVAL)))?;
        let offset = libc::off_t::try_from(run.first.offset())
            .map_err(|_| failed(io::Error::from_raw_os_error(libc::EOVERFLOW)))?;
        // SAFETY: `host_range` gave a range inside a reservation that `self.guest` owns and that
        // nobody has seen yet, so replacing its pages takes nothing from anyone; the new mapping
        // is as readable and writable as the old one and goes with it.
        let mapped = unsafe {
            libc::mmap(
                start.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                image.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Gives the kernel the advice that holds for all guest memory.
    fn advise(&self) -> Result<(), RamError> {
        for region in self.guest.iter() {
            for advice in [
                libc::MADV_DONTDUMP,
                libc::MADV_DONTFORK,
                libc::MADV_NOHUGEPAGE,
            ] {
                // SAFETY: the range is a whole region that `self.guest` owns; no such advice
                // changes what the memory holds.
                let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
                let error = io::Error::last_os_error();
                // EINVAL for NOHUGEPAGE is a kernel built without huge pages: nothing to forbid.
                let harmless =
                    advice == libc::MADV_NOHUGEPAGE && error.raw_os_error() == Some(libc::EINVAL);
                if done != 0 && !harmless {
                    return Err(RamError::Advise(error));
                }
            }
        }
        Ok(())
    }
}

/// Checks that a file can be the memory image of a layout.
fn check_image(layout: &RamLayout, image: &File) -> Result<(), RamError> {
    let actual = image.metadata().map_err(RamError::Image)?.len();
    if actual != layout.bytes() {
        return Err(RamError::ImageLength {
            expected: layout.bytes(),
            actual,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;
    use crate::memory::{HOLE_END, HOLE_START, PAGE, PAGE_BYTES};

    fn image_of(pages: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        for page in 0..pages {
            let fill = u8::try_from(page % 251 + 1).unwrap();
            file.write_all_at(&[fill; PAGE], page * PAGE_BYTES).unwrap();
        }
        file
    }

    #[test]
    fn fresh_ram_is_zero_on_both_sides_of_the_hole() {
        let layout = RamLayout::new(HOLE_START + (2 << 20)).unwrap();
        let ram = Ram::anonymous(&layout).unwrap();
        assert_eq!(ram.slots().len(), 2);
        let guest = ram.guest();
        for gpa in [0, HOLE_START - 8, HOLE_END, HOLE_END + (2 << 20) - 8] {
            assert_eq!(guest.read_obj::<u64>(GuestAddress(gpa)).unwrap(), 0);
            guest.write_obj(gpa, GuestAddress(gpa)).unwrap();
            assert_eq!(guest.read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa);
        }
        assert!(guest.read_obj::<u64>(GuestAddress(HOLE_START)).is_err());
        let slot = ram.slots()[1];
        assert_eq!(slot.host_of(RamPage(3 << 18)), Some(slot.host));
        assert_eq!(slot.host_of(RamPage(0)), None);
        assert_eq!(
            slot.page_at_host(slot.host + 4097),
            Some(RamPage((3 << 18) + 1))
        );
        assert_eq!(slot.page_at_host(slot.host + slot.len), None);
    }

    #[test]
    fn an_image_is_read_and_never_written() {
        let layout = RamLayout::new(64 * PAGE_BYTES).unwrap();
        let file = image_of(64);
        let (one, two) = (
            Ram::from_image(&layout, &file).unwrap(),
            Ram::from_image(&layout, &file).unwrap(),
        );
        let at = GuestAddress(5 * PAGE_BYTES + 7);
        assert_eq!(one.guest().read_obj::<u8>(at).unwrap(), 6);
        one.guest().write_obj(0xffu8, at).unwrap();
        assert_eq!(one.guest().read_obj::<u8>(at).unwrap(), 0xff);
        assert_eq!(two.guest().read_obj::<u8>(at).unwrap(), 6);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at.0).unwrap();
        assert_eq!(byte, [6]);
    }

    #[test]
    fn memory_outlives_ram_while_somebody_holds_it() {
        let layout = RamLayout::new(16 * PAGE_BYTES).unwrap();
        let ram = Ram::anonymous(&layout).unwrap();
        let guest = GuestRam::clone(ram.guest());
        drop(ram);
        guest.write_obj(7u64, GuestAddress(0)).unwrap();
        assert_eq!(guest.read_obj::<u64>(GuestAddress(0)).unwrap(), 7);
    }

    #[test]
    fn an_image_of_another_length_is_refused() {
        let layout = RamLayout::new(64 * PAGE_BYTES).unwrap();
        let error = Ram::from_image(&layout, &image_of(63)).unwrap_err();
        assert!(matches!(error, RamError::ImageLength { .. }), "{error}");
    }

    #[test]
    fn private_pages_are_the_written_ones() {
        let layout = RamLayout::new(256 * PAGE_BYTES).unwrap();
        let ram = Ram::from_image(&layout, &image_of(256)).unwrap();
        let guest = ram.guest();
        for page in 0..256 {
            let at = GuestAddress(page * PAGE_BYTES + 100);
            let byte = guest.read_obj::<u8>(at).unwrap();
            if page % 7 == 3 {
                guest.write_obj(byte, at).unwrap();
            }
        }
        let private: Vec<u64> = ram
            .private_pages()
            .unwrap()
            .iter()
            .map(|page| page.0)
            .collect();
        assert_eq!(
            private,
            (0..256).filter(|page| page % 7 == 3).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_scattered_delta_keeps_within_its_mappings() {
        let pages = 1 << 15;
        let layout = RamLayout::new(pages * PAGE_BYTES).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.bytes()).unwrap();
        let delta: Vec<PageRun> = (0..pages / 8).map(|n| PageRun::new(n * 8, 2)).collect();
        let (ram, placer) = Ram::with_delta(&layout, Some(&file), &delta, &[]).unwrap();
        assert!(
            ram.pieces.len() <= PIECES_MAX,
            "{} pieces",
            ram.pieces.len()
        );
        for run in &delta {
            placer.place(run.first, &[1; 2 * PAGE]).unwrap();
        }
        while placer.place_base_pages(5000).unwrap() > 0 {}
        assert!(placer.finish().unwrap());
        for (page, byte) in [
            (0, 1u8),
            (1, 1),
            (2, 0),
            (7, 0),
            (pages - 8, 1),
            (pages - 1, 0),
        ] {
            let at = GuestAddress(page * PAGE_BYTES);
            assert_eq!(ram.guest().read_obj::<u8>(at).unwrap(), byte, "page {page}");
        }
    }

    #[test]
    fn thousands_of_pieces_are_one_slot() {
        let pages = 1 << 18;
        let layout = RamLayout::new(pages * PAGE_BYTES).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.bytes()).unwrap();
        let delta: Vec<PageRun> = (0..1000).map(|n| PageRun::new(n * 256 + 50, 2)).collect();
        let (ram, placer) = Ram::with_delta(&layout, Some(&file), &delta, &[]).unwrap();
        assert_eq!(ram.pieces.len(), 2001);
        assert_eq!(ram.slots().len(), 1);
        for run in &delta {
            placer.place(run.first, &[1; 2 * PAGE]).unwrap();
        }
        assert!(placer.finish().unwrap());
        assert_eq!(
            ram.private_pages().unwrap().runs().collect::<Vec<_>>(),
            delta
        );
    }
}
