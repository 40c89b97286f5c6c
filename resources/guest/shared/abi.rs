//! What the runtime and an application know of each other. An application is a flat image, linked at
//! [`APP_BASE`], that begins with an [`AppHeader`]. Both run in CPL 3 in one address space.

/// Where images are linked and loaded.
pub const APP_BASE: usize = 0x100_0000;
/// The first bytes of an image.
pub const APP_MAGIC: [u8; 8] = *b"CLDAPP\r\n";
/// Changes whenever anything in this file does.
pub const APP_ABI: u32 = 1;

/// A run of bytes that the callee may read during the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bytes {
    pub start: *const u8,
    pub len: usize,
}

impl Bytes {
    /// The bytes of a slice.
    pub const fn of(bytes: &[u8]) -> Bytes {
        Bytes {
            start: bytes.as_ptr(),
            len: bytes.len(),
        }
    }

    /// The bytes again.
    ///
    /// # Safety
    /// The memory is readable and unchanged for as long as the result is used.
    pub unsafe fn get<'a>(self) -> &'a [u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the caller's promise.
        unsafe { core::slice::from_raw_parts(self.start, self.len) }
    }
}

/// An answer. The bytes belong to the application and stay as they are until it is called again,
/// except by `step`, which leaves them alone.
#[repr(C)]
pub struct Reply {
    /// 1 for an answer, 0 for an error.
    pub ok: u32,
    pub text: Bytes,
    pub blob: Bytes,
}

/// Free memory for the application's heap.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Region {
    pub start: usize,
    pub end: usize,
}

/// What the runtime does for an application.
#[repr(C)]
pub struct Services {
    /// A line for the console.
    pub log: unsafe extern "C" fn(Bytes),
    /// A last line for the console; ends the machine.
    pub fail: unsafe extern "C" fn(Bytes) -> !,
    /// Nanoseconds since boot.
    pub now: unsafe extern "C" fn() -> u64,
    /// Random bytes.
    pub random: unsafe extern "C" fn(*mut u8, usize),
    /// Memory for the heap: below and above 4 GiB.
    pub memory: [Region; 2],
}

/// What an application begins with.
#[repr(C)]
pub struct AppHeader {
    pub magic: [u8; 8],
    pub abi: u32,
    pub reserved: u32,
    /// Addresses behind the last byte of the image and of its zeroed memory.
    pub image_end: *const u8,
    pub memory_end: *const u8,
    /// Starts the application with parameters and data (which stay in place for ever) and warms it
    /// up. On success, `interval` is how often it wants `step`, in nanoseconds; 0 for never.
    pub init: unsafe extern "C" fn(*const Services, Bytes, Bytes, *mut u64, *mut Reply),
    /// Time has come; the argument is `now`.
    pub step: unsafe extern "C" fn(u64),
    /// A request: words and attachment.
    pub request: unsafe extern "C" fn(Bytes, Bytes, *mut Reply),
    /// Check everything.
    pub verify: unsafe extern "C" fn(*mut Reply),
}

// SAFETY: the pointers are constants of the image.
unsafe impl Sync for AppHeader {}
