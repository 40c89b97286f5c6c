//! Little-endian integers in and out of byte slices, and conversions that cannot lose anything.

/// A fixed-size piece of `bytes`. The caller has checked that `at + N` is inside.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Little-endian u16 at `at`; see [`array_at`].
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

/// Little-endian u32 at `at`; see [`array_at`].
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

/// Little-endian u64 at `at`; see [`array_at`].
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// A u32 as a length or position in memory. The crate is for 64-bit hosts (pages and files are
/// larger than 4 GiB), where this loses nothing; elsewhere it saturates and the limit checks
/// that follow refuse it.
pub(crate) fn to_usize(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A length in memory as a u64, which on every host of Rust loses nothing.
pub(crate) fn to_u64(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}
