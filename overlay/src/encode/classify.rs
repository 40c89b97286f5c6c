//! The first pass: what each page is, compared with the base.

use super::plan::Listed;
use super::{BaseContent, EncodeError, Progress};
use crate::bytes::to_u64;
use crate::page::{PAGE_BYTES, PageAt, PageReader, Space, SpaceSize, is_zero};
use crate::parallel;

/// Pages compared in one job.
const JOB_PAGES: usize = 256;

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// What a reader takes it for if the delta does not mention it.
    Unchanged,
    /// All bytes are zero.
    Zero,
    /// The same as this page of the base in the same space. Page numbers are below 2^28.
    BasePage(u32),
    /// Anything else.
    Literal,
}

/// Two buffers a thread: the VM's pages, and the base's at the same place.
struct Buffers {
    now: Vec<u8>,
    base: Vec<u8>,
}

/// Classifies all pages; the result is in the order of `listed`.
pub(super) fn classify(
    listed: &[Listed],
    spaces: &[SpaceSize],
    pages: &dyn PageReader,
    base: Option<BaseContent<'_>>,
    threads: usize,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Class>, EncodeError> {
    let total = to_u64(listed.len());
    let mut classes = Vec::with_capacity(listed.len());
    progress(Progress::Compare { done: 0, total });
    let compare = Compare {
        spaces,
        pages,
        base,
    };
    parallel::ordered(
        threads,
        listed.len().div_ceil(JOB_PAGES),
        || {
            let buffer = || vec![0; JOB_PAGES * PAGE_BYTES];
            Buffers {
                now: buffer(),
                base: buffer(),
            }
        },
        |buffers, job| {
            let end = listed.len().min((job + 1) * JOB_PAGES);
            compare.job(&listed[job * JOB_PAGES..end], buffers)
        },
        |_, some: Vec<Class>| {
            classes.extend_from_slice(&some);
            progress(Progress::Compare {
                done: to_u64(classes.len()),
                total,
            });
            Ok(())
        },
    )?;
    Ok(classes)
}

struct Compare<'a> {
    spaces: &'a [SpaceSize],
    pages: &'a dyn PageReader,
    base: Option<BaseContent<'a>>,
}

impl Compare<'_> {
    fn job(&self, listed: &[Listed], buffers: &mut Buffers) -> Result<Vec<Class>, EncodeError> {
        let mut classes = Vec::with_capacity(listed.len());
        for run in listed.chunk_by(|one, next| one.at.plus(1) == next.at) {
            self.run(run[0].at, run.len(), buffers, &mut classes)?;
        }
        Ok(classes)
    }

    /// Classifies contiguous pages.
    fn run(
        &self,
        first: PageAt,
        count: usize,
        buffers: &mut Buffers,
        classes: &mut Vec<Class>,
    ) -> Result<(), EncodeError> {
        let now = &mut buffers.now[..count * PAGE_BYTES];
        self.pages.read_run(first, now).map_err(|source| {
            let pages = to_u64(count);
            EncodeError::Read {
                first,
                pages,
                source,
            }
        })?;
        let in_base = self.base_pages(first.space).saturating_sub(first.page);
        let in_base = usize::try_from(in_base).unwrap_or(usize::MAX).min(count);
        let mut base_pages: &[[u8; PAGE_BYTES]] = &[];
        if let Some(base) = self.base
            && in_base > 0
        {
            let there = &mut buffers.base[..in_base * PAGE_BYTES];
            base.pages.read_run(first, there).map_err(|source| {
                let pages = to_u64(in_base);
                EncodeError::ReadBase {
                    first,
                    pages,
                    source,
                }
            })?;
            base_pages = there.as_chunks().0;
        }
        for (number, page) in now.as_chunks().0.iter().enumerate() {
            let class = if base_pages.get(number) == Some(page) {
                Class::Unchanged
            } else if is_zero(page) {
                // Behind the end of the base, zero is what a page is if nobody says otherwise.
                if number < in_base {
                    Class::Zero
                } else {
                    Class::Unchanged
                }
            } else {
                self.find_in_base(first.space, page)?
            };
            classes.push(class);
        }
        Ok(())
    }

    fn base_pages(&self, space: Space) -> u64 {
        self.spaces
            .iter()
            .find(|size| size.space == space)
            .map_or(0, |size| size.base_pages)
    }

    /// Looks for the same content elsewhere in the base. The hashes are truncated, and may be
    /// those of another base altogether, so the bytes decide.
    fn find_in_base(&self, space: Space, page: &[u8; PAGE_BYTES]) -> Result<Class, EncodeError> {
        let Some(base) = self.base else {
            return Ok(Class::Literal);
        };
        let Some(hashes) = base.hashes else {
            return Ok(Class::Literal);
        };
        let Some(number) = hashes.find(space, page) else {
            return Ok(Class::Literal);
        };
        let first = PageAt {
            space,
            page: u64::from(number),
        };
        if first.page >= self.base_pages(space) {
            return Ok(Class::Literal);
        }
        let mut there = [0; PAGE_BYTES];
        base.pages
            .read(first, &mut there)
            .map_err(|source| EncodeError::ReadBase {
                first,
                pages: 1,
                source,
            })?;
        Ok(if there == *page {
            Class::BasePage(number)
        } else {
            Class::Literal
        })
    }
}
