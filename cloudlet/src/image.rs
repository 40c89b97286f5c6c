//! An image directory: one VM's state at one moment, as files. Snapshots are images; a base VM in
//! the store is an image with page hashes and a manifest beside it.
//!
//! | file | what it is |
//! | --- | --- |
//! | `image.json` | [`Description`] |
//! | `state` | machine state: a container of the snapshot crate |
//! | `memory` | RAM, region after region, sparse |
//! | `disk0`, `disk1`, … | the disks as the guest sees them, raw, sparse |
//!
//! The directory appears whole or not at all: it is written beside its place and renamed.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files;

/// Largest machine state read, in bytes: eight vCPUs with AMX state and thirty disks' layer maps
/// stay far below it.
pub const STATE_LEN_MAX: u64 = 64 << 20;
const DESCRIPTION_LEN_MAX: u64 = 64 << 10;
const DISKS_MAX: usize = 16;
/// The version of the layout above.
pub const FORMAT: u32 = 1;

/// Names of the files in an image.
pub mod file {
    /// [`super::Description`] as JSON.
    pub const DESCRIPTION: &str = "image.json";
    /// The machine state.
    pub const STATE: &str = "state";
    /// RAM.
    pub const MEMORY: &str = "memory";

    /// Disk number `index`.
    #[must_use]
    pub fn disk(index: usize) -> String {
        format!("disk{index}")
    }
}

/// What an image has in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Always [`FORMAT`].
    pub format: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// The disks in order.
    pub disks: Vec<DiskImage>,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Name of the CPU model.
    pub cpu_model: String,
    /// Id of the base VM that this VM was made of, if any.
    pub base: Option<String>,
}

/// A disk in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskImage {
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is not there, or is none.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A file cannot be looked at.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The description is no JSON of ours.
    #[error("{path} is no image description")]
    Description {
        /// The file.
        path: PathBuf,
        /// Where it went wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The image was written by another version.
    #[error("{path} has format {format}; this version reads format {FORMAT}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        format: u32,
    },
    /// A file has another length than the description says.
    #[error("{path} has {found} bytes, not {expected}: the image is damaged")]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// More disks than a VM can have.
    #[error("{path} names {found} disks; a VM has {DISKS_MAX} at most")]
    Disks {
        /// The file.
        path: PathBuf,
        /// The number of disks.
        found: usize,
    },
}

/// An image whose files are there and have the lengths they should.
#[derive(Debug, Clone)]
pub struct Image {
    dir: PathBuf,
    /// What it has in it.
    pub description: Description,
}

impl Image {
    /// Looks at the image in `dir`.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(file::DESCRIPTION);
        let text = files::read_inside(dir, file::DESCRIPTION, DESCRIPTION_LEN_MAX)?;
        let description: Description =
            serde_json::from_slice(&text).map_err(|source| Error::Description {
                path: path.clone(),
                source,
            })?;
        if description.format != FORMAT {
            return Err(Error::Format {
                path,
                format: description.format,
            });
        }
        if description.disks.len() > DISKS_MAX {
            return Err(Error::Disks {
                path,
                found: description.disks.len(),
            });
        }
        let image = Self {
            dir: dir.to_owned(),
            description,
        };
        image.check_len(file::MEMORY, image.description.memory_bytes)?;
        for (index, disk) in image.description.disks.iter().enumerate() {
            image.check_len(&file::disk(index), disk.bytes)?;
        }
        Ok(image)
    }

    fn check_len(&self, name: &str, expected: u64) -> Result<(), Error> {
        let path = self.dir.join(name);
        match files::open_inside(&self.dir, name)?.metadata() {
            Err(source) => Err(Error::Read { path, source }),
            Ok(meta) if meta.len() != expected => Err(Error::Length {
                path,
                found: meta.len(),
                expected,
            }),
            Ok(_) => Ok(()),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The machine state.
    pub fn state(&self) -> Result<Vec<u8>, Error> {
        Ok(files::read_inside(&self.dir, file::STATE, STATE_LEN_MAX)?)
    }

    /// The RAM file, for reading.
    pub fn memory(&self) -> Result<File, Error> {
        Ok(files::open_inside(&self.dir, file::MEMORY)?)
    }

    /// The disks' files in order, for reading.
    pub fn disks(&self) -> Result<Vec<File>, Error> {
        let count = self.description.disks.len();
        (0..count)
            .map(|index| Ok(files::open_inside(&self.dir, &file::disk(index))?))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        Description {
            format: FORMAT,
            memory_bytes: 8192,
            disks: vec![DiskImage {
                bytes: 4096,
                read_only: false,
            }],
            cpus: 1,
            cpu_model: "host".into(),
            base: None,
        }
    }

    fn write(dir: &Path, description: &Description) {
        let text = serde_json::to_vec(description).unwrap();
        std::fs::write(dir.join(file::DESCRIPTION), text).unwrap();
        std::fs::write(dir.join(file::MEMORY), [0; 8192]).unwrap();
        std::fs::write(dir.join(file::disk(0)), [0; 4096]).unwrap();
    }

    #[test]
    fn links_out_of_an_image_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = dir.path().join("secret");
        std::fs::write(&elsewhere, [7; 8192]).unwrap();
        let image = dir.path().join("image");
        std::fs::create_dir(&image).unwrap();
        for name in [file::DESCRIPTION, file::MEMORY, &file::disk(0)] {
            write(&image, &description());
            let path = image.join(name);
            let aside = dir.path().join("aside");
            std::fs::rename(&path, &aside).unwrap();
            std::os::unix::fs::symlink(&aside, &path).unwrap();
            let error = Image::open(&image).unwrap_err();
            assert!(
                matches!(error, Error::File(files::Error::Inside { .. })),
                "{name}: {error}"
            );
            std::fs::remove_file(&path).unwrap();
        }
        write(&image, &description());
        std::os::unix::fs::symlink(&elsewhere, image.join(file::STATE)).unwrap();
        assert!(Image::open(&image).unwrap().state().is_err());
    }

    #[test]
    fn what_does_not_fit_its_description_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &description());
        assert!(Image::open(dir.path()).is_ok());
        std::fs::write(dir.path().join(file::MEMORY), [0; 8191]).unwrap();
        assert!(matches!(
            Image::open(dir.path()),
            Err(Error::Length { found: 8191, .. })
        ));
        write(
            dir.path(),
            &Description {
                format: 2,
                ..description()
            },
        );
        assert!(matches!(
            Image::open(dir.path()),
            Err(Error::Format { format: 2, .. })
        ));
        write(
            dir.path(),
            &Description {
                disks: vec![
                    DiskImage {
                        bytes: 0,
                        read_only: false
                    };
                    99
                ],
                ..description()
            },
        );
        assert!(matches!(
            Image::open(dir.path()),
            Err(Error::Disks { found: 99, .. })
        ));
        std::fs::write(dir.path().join(file::DESCRIPTION), "{}").unwrap();
        assert!(matches!(
            Image::open(dir.path()),
            Err(Error::Description { .. })
        ));
    }
}
