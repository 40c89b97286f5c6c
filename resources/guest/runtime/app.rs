//! The application: where it goes, how it is started, and calls into it.

use alloc::format;
use alloc::string::{String, ToString};
use core::mem::size_of;

use shared::abi::{APP_ABI, APP_BASE, APP_MAGIC, AppHeader, Bytes, Region, Reply, Services};

const PAGE: usize = 4096;

/// Memory that belongs to applications.
#[derive(Clone, Copy)]
pub struct Space {
    /// From `APP_BASE` to here.
    pub low_end: usize,
    /// What there is above 4 GiB.
    pub high: Region,
}

/// An answer whose bytes the application keeps until it is called again.
pub struct Answer {
    pub ok: bool,
    pub text: Bytes,
    pub blob: Bytes,
}

/// An image on its way into memory: first the image, then its data.
pub struct Placing {
    image_len: usize,
    data_len: usize,
    data_start: usize,
    done: usize,
}

impl Placing {
    /// Begins. Whatever application was there is gone.
    pub fn begin(space: Space, image_len: u64, data_len: u64) -> Result<Placing, String> {
        let room = space.low_end.saturating_sub(APP_BASE);
        let (Ok(image_len), Ok(data_len)) = (usize::try_from(image_len), usize::try_from(data_len))
        else {
            return Err("lengths beyond all memory".into());
        };
        let sum = image_len.checked_add(data_len).filter(|&sum| sum <= room);
        if sum.is_none() || image_len < size_of::<AppHeader>() {
            return Err(format!(
                "an image of {image_len} and data of {data_len} bytes do not fit into {room} bytes"
            ));
        }
        Ok(Placing {
            image_len,
            data_len,
            data_start: 0,
            done: 0,
        })
    }

    /// Bytes that are still to come.
    pub fn missing(&self) -> usize {
        self.image_len + self.data_len - self.done
    }

    /// Where the next bytes go; never empty while some are missing.
    pub fn next(&mut self, space: Space) -> Result<&'static mut [u8], String> {
        let (start, len) = if self.done < self.image_len {
            (APP_BASE + self.done, self.image_len - self.done)
        } else {
            if self.data_start == 0 {
                self.data_start = self.place_data(space)?;
            }
            let at = self.done - self.image_len;
            (self.data_start + at, self.data_len - at)
        };
        // SAFETY: inside the applications' space, which nobody else uses (`begin` and `place_data`
        // checked the bounds).
        Ok(unsafe { core::slice::from_raw_parts_mut(start as *mut u8, len) })
    }

    /// So many bytes of `next` have been filled.
    pub fn advance(&mut self, bytes: usize) {
        self.done += bytes;
    }

    fn header(&self) -> Result<&'static AppHeader, String> {
        // SAFETY: the image is in place and longer than a header; it comes from whoever owns this
        // machine, and is code to be run anyway.
        let header = unsafe { &*(APP_BASE as *const AppHeader) };
        if header.magic != APP_MAGIC || header.abi != APP_ABI {
            return Err("not an application image of this runtime's version".into());
        }
        if header.image_end as usize != APP_BASE + self.image_len
            || (header.memory_end as usize) < header.image_end as usize
        {
            return Err("the image's length is not what it says".into());
        }
        Ok(header)
    }

    /// Data goes behind the image's zeroed memory.
    fn place_data(&self, space: Space) -> Result<usize, String> {
        let start = (self.header()?.memory_end as usize).next_multiple_of(PAGE);
        match start.checked_add(self.data_len) {
            Some(end) if end <= space.low_end => Ok(start),
            _ => Err("image and data do not fit into memory".into()),
        }
    }

    /// Image and data, once all is in place.
    pub fn bytes(
        &mut self,
        space: Space,
    ) -> Result<(&'static mut [u8], &'static mut [u8]), String> {
        if self.data_start == 0 {
            self.data_start = self.place_data(space)?;
        }
        // SAFETY: as in `next`.
        Ok(unsafe {
            (
                core::slice::from_raw_parts_mut(APP_BASE as *mut u8, self.image_len),
                core::slice::from_raw_parts_mut(self.data_start as *mut u8, self.data_len),
            )
        })
    }

    /// Starts what is in place.
    pub fn start(
        mut self,
        space: Space,
        services: &'static mut Services,
        name: &str,
        params: &str,
    ) -> Result<(App, String), String> {
        let header = self.header()?;
        let (_, data) = self.bytes(space)?;
        let (bss, bss_end) = (header.image_end as usize, header.memory_end as usize);
        // SAFETY: the zeroed memory of the image, inside the applications' space (`place_data`).
        unsafe { (bss as *mut u8).write_bytes(0, bss_end - bss) };
        let heap = (self.data_start + self.data_len).next_multiple_of(PAGE);
        services.memory = [
            Region {
                start: heap,
                end: space.low_end.max(heap),
            },
            space.high,
        ];
        let mut app = App {
            header,
            name: name.to_string(),
            interval: 0,
            steps: 0,
            calls: 0,
        };
        let mut reply = EMPTY;
        let (params, data) = (Bytes::of(params.as_bytes()), Bytes::of(data));
        // SAFETY: the promises of AppHeader::init: services and data stay for ever.
        unsafe { (header.init)(services, params, data, &mut app.interval, &mut reply) };
        let text = text_of(&reply);
        if reply.ok == 1 {
            Ok((app, text))
        } else {
            Err(text)
        }
    }
}

const EMPTY: Reply = Reply {
    ok: 0,
    text: Bytes::of(&[]),
    blob: Bytes::of(&[]),
};

fn text_of(reply: &Reply) -> String {
    // SAFETY: the application keeps its answer until it is called again.
    String::from_utf8_lossy(unsafe { reply.text.get() }).into_owned()
}

/// A running application.
pub struct App {
    header: &'static AppHeader,
    pub name: String,
    /// Nanoseconds between steps; 0 for none.
    pub interval: u64,
    pub steps: u64,
    pub calls: u64,
}

impl App {
    /// Time has come.
    pub fn step(&mut self, now: u64) {
        self.steps += 1;
        // SAFETY: a started application, not in a call.
        unsafe { (self.header.step)(now) }
    }

    /// A request.
    pub fn request(&mut self, text: &str, blob: &[u8]) -> Answer {
        self.calls += 1;
        let mut reply = EMPTY;
        // SAFETY: a started application, not in a call; the arguments live during the call.
        unsafe {
            (self.header.request)(Bytes::of(text.as_bytes()), Bytes::of(blob), &mut reply);
        }
        Answer {
            ok: reply.ok == 1,
            text: reply.text,
            blob: reply.blob,
        }
    }

    /// A check of everything.
    pub fn verify(&mut self) -> Answer {
        let mut reply = EMPTY;
        // SAFETY: a started application, not in a call.
        unsafe { (self.header.verify)(&mut reply) };
        Answer {
            ok: reply.ok == 1,
            text: reply.text,
            blob: reply.blob,
        }
    }
}
