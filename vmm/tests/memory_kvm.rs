//! Guest memory under a real vCPU: the dirty log, private copies and missing pages. Needs
//! `/dev/kvm`. The guest is a few instructions in real mode.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cloudlet_vmm::memory::{
    DirtyLog, PAGE, PAGE_BYTES, PageRun, PageSource, Pager, PagerHooks, Placer, Ram, RamLayout,
    RamPage, SourceError,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

/// `mov bx, 0x3000; mov [bx], al; mov bx, 0x7000; mov [bx], al; hlt`
const WRITE_3_AND_7: &[u8] = &[
    0xbb, 0x00, 0x30, 0x88, 0x07, 0xbb, 0x00, 0x70, 0x88, 0x07, 0xf4,
];
/// `mov bx, 0x7000; mov al, [bx]; mov bx, 0x3000; mov [bx], al; hlt`
const COPY_7_TO_3: &[u8] = &[
    0xbb, 0x00, 0x70, 0x8a, 0x07, 0xbb, 0x00, 0x30, 0x88, 0x07, 0xf4,
];

const PAGES: u64 = 64;
const CODE_PAGE: u64 = 1;

struct Guest {
    ram: Ram,
    vcpu: VcpuFd,
    vm: VmFd,
}

impl Guest {
    fn new(ram: Ram) -> Self {
        let kvm = Kvm::new().expect("these tests need /dev/kvm");
        let vm = kvm.create_vm().unwrap();
        for slot in ram.slots() {
            // SAFETY: the memory is `ram`'s, which the guest keeps, and the vCPU runs only inside
            // `run`, never when the guest is dropped.
            unsafe { vm.set_user_memory_region(slot.kvm_region(0)) }.unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).unwrap();
        Self { ram, vcpu, vm }
    }

    /// Puts the vCPU at the start of the code.
    fn start(&self) {
        let mut regs = self.vcpu.get_regs().unwrap();
        regs.rip = CODE_PAGE * PAGE_BYTES;
        regs.rax = 0xab;
        regs.rflags = 2;
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Runs the code from its start to its `hlt`.
    fn run(&mut self) {
        self.start();
        match self.vcpu.run().unwrap() {
            VcpuExit::Hlt => {}
            exit => panic!("unexpected exit {exit:?}"),
        }
    }

    fn byte(&self, page: u64) -> u8 {
        self.ram
            .guest()
            .read_obj(GuestAddress(page * PAGE_BYTES))
            .unwrap()
    }
}

fn layout() -> RamLayout {
    RamLayout::new(PAGES * PAGE_BYTES).unwrap()
}

fn image(code: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGES * PAGE_BYTES).unwrap();
    for page in 0..PAGES {
        file.write_all_at(&[0x55; PAGE], page * PAGE_BYTES).unwrap();
    }
    file.write_all_at(code, CODE_PAGE * PAGE_BYTES).unwrap();
    file
}

fn runs(pages: &cloudlet_vmm::memory::PageSet) -> Vec<(u64, u64)> {
    pages.runs().map(|run| (run.first.0, run.count)).collect()
}

#[test]
fn the_dirty_log_has_the_pages_of_both_writers() {
    let ram = Ram::anonymous(&layout()).unwrap();
    ram.guest()
        .write_slice(WRITE_3_AND_7, GuestAddress(CODE_PAGE * PAGE_BYTES))
        .unwrap();
    let mut guest = Guest::new(ram);
    guest.run();
    let log = DirtyLog::start(&guest.vm, &guest.ram).unwrap();
    assert!(
        log.take(&guest.vm, &guest.ram).unwrap().is_empty(),
        "nothing was written since"
    );

    guest
        .ram
        .guest()
        .write_obj(1u64, GuestAddress(9 * PAGE_BYTES - 4))
        .unwrap();
    guest.run();
    assert_eq!(
        runs(&log.take(&guest.vm, &guest.ram).unwrap()),
        [(3, 1), (7, 3)]
    );
    assert!(
        log.take(&guest.vm, &guest.ram).unwrap().is_empty(),
        "taken is taken"
    );

    guest.run();
    assert_eq!(
        runs(&log.take(&guest.vm, &guest.ram).unwrap()),
        [(3, 1), (7, 1)]
    );
    log.stop(&guest.vm, &guest.ram).unwrap();
    guest.run();
}

#[test]
fn what_a_vcpu_writes_over_the_base_is_private() {
    let file = image(WRITE_3_AND_7);
    let mut guest = Guest::new(Ram::from_image(&layout(), &file).unwrap());
    assert!(guest.ram.private_pages().unwrap().is_empty());
    guest.run();
    guest
        .ram
        .guest()
        .write_obj(1u8, GuestAddress(20 * PAGE_BYTES))
        .unwrap();
    assert_eq!(guest.byte(40), 0x55);
    assert_eq!(
        runs(&guest.ram.private_pages().unwrap()),
        [(3, 1), (7, 1), (20, 1)]
    );
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3 * PAGE_BYTES).unwrap();
    assert_eq!(byte, [0x55], "the base stays as it is");
}

fn hooks() -> PagerHooks {
    PagerHooks {
        on_start: Box::new(|| Ok(())),
        on_error: Box::new(|error| panic!("{error}")),
        record: false,
    }
}

struct Filled(u8);

impl PageSource for Filled {
    fn on_fault(&self, page: RamPage, placer: &Placer) -> Result<(), SourceError> {
        Ok(placer.place(page, &[self.0; PAGE]).map(|_| ())?)
    }
}

#[test]
fn a_vcpu_waits_for_missing_pages() {
    let file = image(COPY_7_TO_3);
    let delta = [PageRun::new(3, 1), PageRun::new(7, 20)];
    let (ram, placer) = Ram::with_delta(&layout(), Some(&file), &delta, &[]).unwrap();
    let pager = Pager::spawn(placer.clone(), Arc::new(Filled(0x77)), hooks()).unwrap();
    let mut guest = Guest::new(ram);
    guest.run();
    // The base pages before page 3 are few enough to be paged in with it, so the code waits too.
    assert_eq!(
        pager.first_touch(),
        [RamPage(CODE_PAGE), RamPage(7), RamPage(3)]
    );
    assert_eq!(guest.byte(3), 0x77);

    placer.place(RamPage(7), &[0x88; 20 * PAGE]).unwrap();
    while placer.place_base_pages(100).unwrap() > 0 {}
    assert!(placer.wait_complete(Some(Duration::from_secs(10))).unwrap());
    assert!(placer.finish().unwrap());
    guest.run();
    assert_eq!(
        (guest.byte(3), guest.byte(5), guest.byte(8)),
        (0x77, 0x55, 0x88)
    );
}

/// Notes no demand: the test places the pages itself.
struct Later;

impl PageSource for Later {
    fn on_fault(&self, _: RamPage, _: &Placer) -> Result<(), SourceError> {
        Ok(())
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// What a kick does to a vCPU that waits for a page differs between kernels: it may leave KVM_RUN
/// at once, wait on, or ask for the page over and over until it is there. None of them may run the
/// guest on a hole or lose the instruction.
#[test]
fn a_kick_during_the_wait_for_a_page_loses_nothing() {
    let signal = libc::SIGRTMIN();
    // SAFETY: an all-zero sigaction is a valid one (no flags, empty mask); the handler does
    // nothing, which is safe at any time.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
    let file = image(COPY_7_TO_3);
    let delta = [PageRun::new(7, 1), PageRun::new(20, 20)];
    let (ram, placer) = Ram::with_delta(&layout(), Some(&file), &delta, &[]).unwrap();
    let pager = Pager::spawn(placer.clone(), Arc::new(Later), hooks()).unwrap();
    let mut guest = Guest::new(ram);
    guest.start();
    let vcpu = thread::spawn(move || {
        let left = guest.vcpu.run().map(|exit| format!("{exit:?}"));
        (guest, left)
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while pager.waiting() != [RamPage(7)] {
        assert!(
            Instant::now() < deadline,
            "the vCPU does not come to the missing page"
        );
        thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: the thread has not been joined.
    let sent = unsafe { libc::pthread_kill(vcpu.as_pthread_t(), signal) };
    assert_eq!(sent, 0);
    thread::sleep(Duration::from_millis(50));
    placer.place(RamPage(7), &[0x88; PAGE]).unwrap();
    assert!(pager.waiting().is_empty());
    let (mut guest, left) = vcpu.join().unwrap();
    match left {
        Ok(exit) => assert_eq!(exit, "Hlt"),
        Err(error) => {
            assert_eq!(error.errno(), libc::EINTR);
            assert!(matches!(guest.vcpu.run(), Ok(VcpuExit::Hlt)));
        }
    }
    assert_eq!(guest.byte(3), 0x88);
}
