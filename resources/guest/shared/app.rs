//! An application's side of abi.rs: a trait, and the macro that makes an image of what implements it.

use alloc::string::String;
use alloc::vec::Vec;
use core::cell::UnsafeCell;

use crate::abi::{Bytes, Reply, Services};

/// A successful answer.
pub struct Answer {
    /// Words.
    pub text: String,
    /// Attachment; may be empty.
    pub blob: Vec<u8>,
}

impl From<String> for Answer {
    fn from(text: String) -> Answer {
        Answer {
            text,
            blob: Vec::new(),
        }
    }
}

/// A started application, its step interval in nanoseconds (0 for no steps), and words about it.
pub struct Started<A> {
    pub app: A,
    pub interval: u64,
    pub text: String,
}

/// What an application is.
pub trait App: Sized {
    /// Starts and warms up.
    fn init(params: &str, data: &'static [u8], host: Host) -> Result<Started<Self>, String>;
    /// Time has come.
    fn step(&mut self, now: u64);
    /// A request.
    fn request(&mut self, text: &str, blob: &[u8]) -> Result<Answer, String>;
    /// Checks all state.
    fn verify(&mut self) -> Result<String, String>;
}

/// The runtime's services.
#[derive(Clone, Copy)]
pub struct Host(&'static Services);

impl Host {
    /// A line on the console.
    pub fn log(self, line: &str) {
        // SAFETY: the runtime's function; the bytes live during the call.
        unsafe { (self.0.log)(Bytes::of(line.as_bytes())) }
    }

    /// Nanoseconds since boot.
    pub fn now(self) -> u64 {
        // SAFETY: the runtime's function.
        unsafe { (self.0.now)() }
    }

    /// A random number.
    pub fn random(self) -> u64 {
        let mut bytes = [0; 8];
        // SAFETY: the runtime's function; it writes 8 bytes.
        unsafe { (self.0.random)(bytes.as_mut_ptr(), 8) };
        u64::from_le_bytes(bytes)
    }
}

/// The state behind an image's four functions.
pub struct Slot<A>(UnsafeCell<State<A>>);

struct State<A> {
    app: Option<A>,
    services: Option<&'static Services>,
    text: String,
    blob: Vec<u8>,
}

// SAFETY: the runtime calls an application from its one thread, and never from within a call.
unsafe impl<A> Sync for Slot<A> {}

impl<A: App> Slot<A> {
    /// An image that was not started.
    pub const fn new() -> Slot<A> {
        let state = State {
            app: None,
            services: None,
            text: String::new(),
            blob: Vec::new(),
        };
        Slot(UnsafeCell::new(state))
    }

    fn state(&self) -> &mut State<A> {
        // SAFETY: see Sync; each entry function calls this once.
        unsafe { &mut *self.0.get() }
    }

    /// # Safety
    /// As `AppHeader::init`: pointers are valid, services and data for ever, and the memory regions
    /// are the application's.
    pub unsafe fn init(
        &self,
        heap: &crate::heap::Heap,
        services: *const Services,
        params: Bytes,
        data: Bytes,
        interval: *mut u64,
        reply: *mut Reply,
    ) {
        // SAFETY: the caller's promise.
        let (services, params, data) = unsafe {
            for region in (*services).memory {
                heap.add(region.start, region.end);
            }
            (&*services, params.get(), data.get())
        };
        let state = self.state();
        state.services = Some(services);
        let params = core::str::from_utf8(params).unwrap_or("");
        let result = A::init(params, data, Host(services)).map(|started| {
            state.app = Some(started.app);
            // SAFETY: the caller's promise.
            unsafe { interval.write(started.interval) };
            Answer::from(started.text)
        });
        // SAFETY: the caller's promise.
        unsafe { state.answer(result, reply) }
    }

    /// As `AppHeader::step`.
    pub fn step(&self, now: u64) {
        if let Some(app) = &mut self.state().app {
            app.step(now);
        }
    }

    /// # Safety
    /// As `AppHeader::request`: pointers are valid during the call.
    pub unsafe fn request(&self, text: Bytes, blob: Bytes, reply: *mut Reply) {
        let state = self.state();
        state.forget();
        // SAFETY: the caller's promise.
        let (text, blob) = unsafe { (text.get(), blob.get()) };
        let result = match (core::str::from_utf8(text), &mut state.app) {
            (Ok(text), Some(app)) => app.request(text, blob),
            (Err(_), _) => Err("the request is not UTF-8".into()),
            (_, None) => Err("the application is not started".into()),
        };
        // SAFETY: the caller's promise.
        unsafe { state.answer(result, reply) }
    }

    /// # Safety
    /// As `AppHeader::verify`: the pointer is valid.
    pub unsafe fn verify(&self, reply: *mut Reply) {
        let state = self.state();
        state.forget();
        let result = match &mut state.app {
            Some(app) => app.verify().map(Answer::from),
            None => Err("the application is not started".into()),
        };
        // SAFETY: the caller's promise.
        unsafe { state.answer(result, reply) }
    }

    /// The end: an image's panic handler.
    pub fn fail(&self, line: &str) -> ! {
        // SAFETY: only reads the field; a panic never returns to who held the state.
        let services = unsafe { (*self.0.get()).services };
        match services {
            // SAFETY: the runtime's function.
            Some(services) => unsafe { (services.fail)(Bytes::of(line.as_bytes())) },
            None => loop {
                core::hint::spin_loop();
            },
        }
    }
}

impl<A> State<A> {
    /// Drops the last answer, before memory is taken for the next.
    fn forget(&mut self) {
        self.text = String::new();
        self.blob = Vec::new();
    }

    /// # Safety
    /// `reply` is valid for writing.
    unsafe fn answer(&mut self, result: Result<Answer, String>, reply: *mut Reply) {
        let ok = match result {
            Ok(answer) => {
                (self.text, self.blob) = (answer.text, answer.blob);
                1
            }
            Err(text) => {
                self.text = text;
                0
            }
        };
        let text = Bytes::of(self.text.as_bytes());
        // SAFETY: the caller's promise.
        unsafe {
            reply.write(Reply {
                ok,
                text,
                blob: Bytes::of(&self.blob),
            })
        }
    }
}

/// Makes an image of a type that implements `App`: header, heap, panic handler.
#[macro_export]
macro_rules! application {
    ($app:ty) => {
        use $crate::abi::{AppHeader, Bytes, Reply, Services};

        #[global_allocator]
        static HEAP: $crate::heap::Heap = $crate::heap::Heap::new();
        static SLOT: $crate::app::Slot<$app> = $crate::app::Slot::new();

        unsafe extern "C" {
            static image_end: u8;
            static memory_end: u8;
        }

        #[used]
        #[unsafe(link_section = ".header")]
        static HEADER: AppHeader = AppHeader {
            magic: $crate::abi::APP_MAGIC,
            abi: $crate::abi::APP_ABI,
            reserved: 0,
            image_end: &raw const image_end,
            memory_end: &raw const memory_end,
            init: app_init,
            step: app_step,
            request: app_request,
            verify: app_verify,
        };

        unsafe extern "C" fn app_init(
            services: *const Services,
            params: Bytes,
            data: Bytes,
            interval: *mut u64,
            reply: *mut Reply,
        ) {
            // SAFETY: the runtime keeps the promises of AppHeader::init.
            unsafe { SLOT.init(&HEAP, services, params, data, interval, reply) }
        }
        unsafe extern "C" fn app_step(now: u64) {
            SLOT.step(now)
        }
        unsafe extern "C" fn app_request(text: Bytes, blob: Bytes, reply: *mut Reply) {
            // SAFETY: the runtime keeps the promises of AppHeader::request.
            unsafe { SLOT.request(text, blob, reply) }
        }
        unsafe extern "C" fn app_verify(reply: *mut Reply) {
            // SAFETY: the runtime keeps the promises of AppHeader::verify.
            unsafe { SLOT.verify(reply) }
        }

        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo) -> ! {
            SLOT.fail(&alloc::format!("{info}"))
        }
    };
}
