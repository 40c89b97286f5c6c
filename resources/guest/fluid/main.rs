//! `fluid`: many tanks of liquid that a timer advances and requests poke and look at.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;

use shared::app::{Answer, App, Host, Started};
// The modules below name these as `crate::…`, so that the host's tests can include them.
use shared::{hash, lanes, math, words};

mod render;
mod sim;
mod tanks;

use tanks::{Settings, Tanks};

struct Fluid {
    tanks: Tanks,
    host: Host,
}

impl App for Fluid {
    fn init(params: &str, _: &'static [u8], host: Host) -> Result<Started<Fluid>, String> {
        let settings = Settings::parse(params)?;
        let interval = match settings.rate_hz {
            0 => 0,
            hz => 1_000_000_000 / u64::from(hz),
        };
        let begin = host.now();
        let mut tanks = Tanks::new(settings)?;
        tanks.warm_up();
        let ms = (host.now() - begin) / 1_000_000;
        let text = format!("started with {} bytes of liquid in {ms} ms", tanks.bytes());
        Ok(Started {
            app: Fluid { tanks, host },
            interval,
            text,
        })
    }

    fn step(&mut self, _: u64) {
        if let Err(text) = self.tanks.step() {
            self.host.log(&format!("fluid: {text}"));
        }
    }

    fn request(&mut self, text: &str, _: &[u8]) -> Result<Answer, String> {
        self.tanks
            .request(text)
            .map(|(text, blob)| Answer { text, blob })
    }

    fn verify(&mut self) -> Result<String, String> {
        self.tanks.verify()
    }
}

shared::application!(Fluid);
