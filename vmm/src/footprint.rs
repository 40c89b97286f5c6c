//! What a VMM process needs to stay resident: what only its start needed is given back.
//!
//! Building a machine runs through most of the program once. The kernel maps sixteen pages of the
//! file around each that is touched, so that some 4 MiB of code and constants count as the VM's
//! although it never uses them again.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;

use libc::{MADV_DONTNEED, PF_W, PT_LOAD, dl_phdr_info};

/// Size of a page on x86-64, bytes.
const PAGE: usize = 4096;

/// Unmaps the pages of all loaded segments that nobody may write: the program's code and constants
/// and its libraries'. What is needed again is mapped again from the page cache at its next touch.
pub fn release_start_code() {
    // SAFETY: the callback has the type that dl_iterate_phdr calls, and ignores the data.
    unsafe { libc::dl_iterate_phdr(Some(release_object), ptr::null_mut()) };
}

/// Releases the segments of one object; 0, so that the next one follows.
unsafe extern "C" fn release_object(
    info: *mut dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr hands a valid record to its callback, and the program headers are
    // mapped for as long as the object is loaded, which the loader's lock ensures meanwhile.
    let (base, headers) = unsafe {
        let info = &*info;
        (
            info.dlpi_addr,
            slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()),
        )
    };
    for header in headers {
        if header.p_type != PT_LOAD || header.p_flags & PF_W != 0 {
            continue;
        }
        let range = (
            usize::try_from(base + header.p_vaddr),
            usize::try_from(header.p_memsz),
        );
        if let (Ok(start), Ok(len)) = range {
            let first = start & !(PAGE - 1);
            let len = (start + len).next_multiple_of(PAGE) - first;
            // SAFETY: a loaded segment without PF_W (gABI, chapter 5, "Program Header") is a
            // private mapping of a file that was never written to: dropping its pages loses
            // nothing. The kernel refuses what is none (the vDSO), which is as well.
            unsafe {
                libc::madvise(ptr::with_exposed_provenance_mut(first), len, MADV_DONTNEED);
            }
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of the mappings that hold code.
    fn resident_code_kib() -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut sum, mut is_code) = (0, false);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("Rss:"), Some(kib)) if is_code => sum += kib.parse::<u64>().unwrap(),
                (Some(_), Some(permissions)) if line.contains(" r") && permissions.len() == 4 => {
                    is_code = permissions == "r-xp" && line.contains('/');
                }
                _ => {}
            }
        }
        sum
    }

    #[test]
    fn code_is_given_back_and_comes_back() {
        let before = resident_code_kib();
        release_start_code();
        let after = resident_code_kib();
        assert!(after < before, "{after} KiB of code after, {before} before");
        // Constants and code are what they were.
        assert_eq!(format!("{:?}", [1.5, 2.25]), "[1.5, 2.25]");
    }
}
