//! The checksums of ext4's metadata: CRC-32C, begun with the file system's identity and, for what
//! belongs to a file, with the file's number (Documentation/filesystems/ext4/checksums.rst).

/// The beginning of a checksum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seed(u32);

impl Seed {
    /// Of nothing: the superblock's.
    pub(super) const EMPTY: Self = Self(!0);

    /// Of all metadata of a file system.
    pub(super) fn of(uuid: &[u8; 16]) -> Self {
        Self(Self::EMPTY.over(uuid))
    }

    /// Of what belongs to inode `number`, whose generation is 0.
    pub(super) fn inode(self, number: u32) -> Self {
        self.and(&number.to_le_bytes()).and(&[0; 4])
    }

    /// With more before what is to come.
    pub(super) fn and(self, bytes: &[u8]) -> Self {
        Self(self.over(bytes))
    }

    /// The checksum, which ext4 does not invert at the beginning and at the end, as the crate does.
    pub(super) fn over(self, bytes: &[u8]) -> u32 {
        !crc32c::crc32c_append(!self.0, bytes)
    }
}

/// The half that fits where there is room for 16 bits.
pub(super) fn low(checksum: u32) -> u16 {
    let [a, b, ..] = checksum.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// The other half.
pub(super) fn high(checksum: u32) -> u16 {
    let [.., c, d] = checksum.to_le_bytes();
    u16::from_le_bytes([c, d])
}
