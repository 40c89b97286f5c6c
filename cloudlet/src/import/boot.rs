//! Kernel and initial RAM disk of an imported image: those of another image, files of the user's,
//! or what the root file system has in `/boot`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::spool::Blob;
use super::tree::{Kind, Tree};
use crate::boot_image::{self, BootImage};
use crate::files;

/// Words that every command line begins with.
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw panic=-1 quiet";
/// The init that the initial RAM disks of built images bring along.
const OWN_INIT: &str = "init=/run/cloudlet/init";

/// Where kernel and initial RAM disk come from.
#[derive(Debug)]
pub enum Choice<'a> {
    /// From an image that `image build` made; its initial RAM disk brings an init along.
    Image(&'a BootImage),
    /// From files; the root file system's own init runs.
    Files {
        /// The kernel.
        kernel: &'a Path,
        /// The initial RAM disk.
        initrd: &'a Path,
    },
    /// From `/boot` of the root file system, whose own init runs.
    Tree,
}

/// Why there is nothing to boot with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/boot` has no pair of kernel and initial RAM disk.
    #[error(
        "there is no kernel with its initial RAM disk in /boot (--kernel-from takes another image's)"
    )]
    NoKernel,
    /// A file is missing, or is none.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A file cannot be copied.
    #[error("cannot copy {}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Puts both into `image` and returns the command line that goes with them. `contents` is where the
/// tree's contents are.
///
/// # Errors
/// There are none, or they cannot be copied.
pub fn place(
    choice: &Choice<'_>,
    tree: &Tree,
    contents: &Path,
    image: &Path,
) -> Result<String, Error> {
    let (kernel, initrd, init) = match choice {
        Choice::Image(from) => (from.kernel.clone(), from.initrd.clone(), Some(OWN_INIT)),
        Choice::Files { kernel, initrd } => ((*kernel).into(), (*initrd).into(), None),
        Choice::Tree => {
            let (kernel, initrd) = newest(tree).ok_or(Error::NoKernel)?;
            let path = |blob: Blob| contents.join(blob.number.to_string());
            (path(kernel), path(initrd), None)
        }
    };
    copy(&kernel, &image.join(boot_image::KERNEL))?;
    copy(&initrd, &image.join(boot_image::INITRD))?;
    let words: Vec<&str> = [Some(CMDLINE), init].into_iter().flatten().collect();
    Ok(words.join(" "))
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let mut source = files::open(from)?;
    let copied = File::create(to).and_then(|mut file| io::copy(&mut source, &mut file));
    copied.map(drop).map_err(|source| Error::Copy {
        path: from.to_owned(),
        source,
    })
}

/// The last kernel by name that has an initial RAM disk as Debian, Fedora or Alpine name it.
fn newest(tree: &Tree) -> Option<(Blob, Blob)> {
    let boot = tree.find(b"/boot")?;
    let file = |name: &[u8]| {
        let id = tree.find(&[b"/boot/", name].concat())?;
        match tree.node(id).kind {
            Kind::File(blob) => Some(blob),
            _ => None,
        }
    };
    let mut found = None;
    for (name, _) in tree.names(boot) {
        let Some(version) = name.strip_prefix(b"vmlinuz-") else {
            continue;
        };
        let initrds = [
            [b"initrd.img-", version].concat(),
            [b"initramfs-", version, b".img"].concat(),
            [b"initramfs-", version].concat(),
        ];
        let initrd = initrds.iter().find_map(|name| file(name));
        found = file(name).zip(initrd).or(found);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::spool::{MemorySpool, Spool};
    use super::super::tree::Attributes;
    use super::*;

    #[test]
    fn the_newest_complete_pair_is_taken() {
        let mut tree = Tree::new();
        let mut spool = MemorySpool::new(1 << 20);
        assert!(newest(&tree).is_none());
        let names = [
            "vmlinuz-6.1",
            "initrd.img-6.1",
            "vmlinuz-6.2",
            "initramfs-6.2.img",
            "vmlinuz-6.3",
        ];
        for name in names {
            let blob = spool
                .store(&mut name.as_bytes(), name.len() as u64)
                .unwrap();
            let path = format!("/boot/{name}");
            tree.put(
                path.as_bytes(),
                Attributes::default(),
                Kind::File(blob),
                &mut spool,
            )
            .unwrap();
        }
        let (kernel, initrd) = newest(&tree).unwrap();
        assert_eq!(spool.load(kernel, 100).unwrap(), b"vmlinuz-6.2");
        assert_eq!(spool.load(initrd, 100).unwrap(), b"initramfs-6.2.img");
    }
}
