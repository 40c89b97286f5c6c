//! `object`: says which digit is on a picture, by a database of descriptors of about 100 MB.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;

use shared::app::{Answer, App, Host, Started};
// The modules below name these as `crate::…`, so that the host's tests can include them.
use shared::{hash, lanes, math, words};

mod descriptor;
mod index;
mod recogniser;

use recogniser::{Recogniser, Settings};

struct Object(Recogniser);

impl App for Object {
    fn init(params: &str, data: &'static [u8], host: Host) -> Result<Started<Object>, String> {
        let settings = Settings::parse(params)?;
        let begin = host.now();
        let recogniser = Recogniser::new(&settings, data)?;
        let ms = (host.now() - begin) / 1_000_000;
        let text = format!("started with {} in {ms} ms", recogniser.stats());
        Ok(Started {
            app: Object(recogniser),
            interval: 0,
            text,
        })
    }

    fn step(&mut self, _: u64) {}

    fn request(&mut self, text: &str, blob: &[u8]) -> Result<Answer, String> {
        self.0.request(text, blob).map(Answer::from)
    }

    fn verify(&mut self) -> Result<String, String> {
        self.0.verify()
    }
}

shared::application!(Object);
