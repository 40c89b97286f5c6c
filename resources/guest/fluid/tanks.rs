//! Many tanks, each with a hash that is checked before every use and renewed after it: the state of
//! the application. Steps go round; a tank that was poked is advanced next.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;

use crate::hash::Hash;
use crate::words::{number, only, parameter};

use crate::render::{self, SIZE_MAX, SIZE_MIN};
use crate::sim::{self, FIELDS, PARTICLES_MAX, PARTICLES_MIN, Scratch};

/// What the application was asked to be.
pub struct Settings {
    pub tanks: usize,
    pub particles: usize,
    pub rate_hz: u32,
    pub dirty: usize,
    pub warmup: usize,
    pub seed: u64,
}

impl Settings {
    /// From `tanks= particles= rate_hz= dirty= warmup= seed=` words; all have defaults.
    pub fn parse(params: &str) -> Result<Settings, String> {
        only(
            params,
            &["tanks", "particles", "rate_hz", "dirty", "warmup", "seed"],
        )?;
        let tanks = parameter(params, "tanks", 128, 1, 16384)?;
        Ok(Settings {
            tanks,
            particles: parameter(params, "particles", 6000, PARTICLES_MIN, PARTICLES_MAX)?,
            rate_hz: parameter(params, "rate_hz", 10, 0, 100)?,
            dirty: parameter(params, "dirty", 1, 0, tanks)?,
            warmup: parameter(params, "warmup", 3, 0, 1000)?,
            seed: parameter(params, "seed", 1, 0, u64::MAX)?,
        })
    }
}

#[derive(Clone, Copy, Default)]
struct Tank {
    steps: u64,
    hash: u64,
    poked: bool,
}

/// All tanks.
pub struct Tanks {
    settings: Settings,
    state: Vec<f32>,
    tanks: Vec<Tank>,
    scratch: Scratch,
    next: usize,
    poked: usize,
    steps: u64,
    /// The first damage found by a step, which has nobody to tell.
    damage: Option<String>,
}

/// What a request is answered with: words and perhaps a picture.
pub type Reply = (String, Vec<u8>);

impl Tanks {
    /// Fills all tanks and warms them up.
    pub fn new(settings: Settings) -> Result<Tanks, String> {
        let len = settings.particles * FIELDS * settings.tanks;
        let mut state = Vec::new();
        state
            .try_reserve_exact(len)
            .map_err(|_| format!("there is no memory for {len} numbers"))?;
        state.resize(len, 0.0);
        let mut tanks = Tanks {
            state,
            tanks: vec![Tank::default(); settings.tanks],
            scratch: Scratch::new(settings.particles),
            next: 0,
            poked: 0,
            steps: 0,
            damage: None,
            settings,
        };
        for tank in 0..tanks.settings.tanks {
            let seed = tanks
                .settings
                .seed
                .wrapping_mul(0x1_0000_0001)
                .wrapping_add(tank as u64);
            sim::fill(tanks.slice_mut(tank), seed);
            for _ in 0..tanks.settings.warmup {
                tanks.advance_unchecked(tank);
            }
            tanks.seal(tank);
        }
        Ok(tanks)
    }

    /// Bytes of live state.
    pub fn bytes(&self) -> usize {
        self.state.len() * size_of::<f32>()
    }

    fn slice_mut(&mut self, tank: usize) -> &mut [f32] {
        let len = self.settings.particles * FIELDS;
        &mut self.state[tank * len..(tank + 1) * len]
    }

    fn slice(&self, tank: usize) -> &[f32] {
        let len = self.settings.particles * FIELDS;
        &self.state[tank * len..(tank + 1) * len]
    }

    /// The hash is seeded by the tank's number and step, so that neither another tank's memory nor an
    /// older state of this one passes.
    fn hash(&self, tank: usize) -> u64 {
        let mut hash = Hash::new((tank as u64) << 40 ^ self.tanks[tank].steps);
        hash.floats(self.slice(tank));
        hash.finish()
    }

    fn seal(&mut self, tank: usize) {
        self.tanks[tank].hash = self.hash(tank);
    }

    fn check(&self, tank: usize) -> Result<(), String> {
        let (found, kept) = (self.hash(tank), self.tanks[tank].hash);
        if found == kept {
            return Ok(());
        }
        Err(format!(
            "tank {tank} is damaged: hash {found:016x}, kept {kept:016x}"
        ))
    }

    fn advance_unchecked(&mut self, tank: usize) {
        let len = self.settings.particles * FIELDS;
        sim::step(
            &mut self.state[tank * len..(tank + 1) * len],
            &mut self.scratch,
        );
        self.tanks[tank].steps += 1;
    }

    fn advance(&mut self, tank: usize) -> Result<(), String> {
        self.check(tank)?;
        self.advance_unchecked(tank);
        self.seal(tank);
        self.steps += 1;
        Ok(())
    }

    /// A timer step: advances as many tanks as the dirty knob says. Returns new damage.
    pub fn step(&mut self) -> Result<(), String> {
        for _ in 0..self.settings.dirty {
            let tank = self.take_next();
            if let Err(text) = self.advance(tank) {
                let new = self.damage.is_none();
                let text = self.damage.get_or_insert(text);
                return if new { Err(text.clone()) } else { Ok(()) };
            }
        }
        Ok(())
    }

    fn take_next(&mut self) -> usize {
        if self.poked > 0
            && let Some(tank) = self.tanks.iter().position(|tank| tank.poked)
        {
            self.poked -= 1;
            self.tanks[tank].poked = false;
            return tank;
        }
        let tank = self.next;
        self.next = (self.next + 1) % self.tanks.len();
        tank
    }

    /// Answers `poke TANK X Y FORCE [W H]`, `frame TANK [W H]`, `advance TANK STEPS`, `stats`.
    pub fn request(&mut self, text: &str) -> Result<Reply, String> {
        let mut words = text.split_ascii_whitespace();
        let verb = words.next().unwrap_or("");
        if verb == "stats" {
            return self.stats();
        }
        if !["poke", "frame", "advance"].contains(&verb) {
            return Err(format!(
                "`{verb}` is not understood; try `poke TANK X Y FORCE [W H]`, `frame TANK [W H]`, \
                 `advance TANK STEPS` or `stats`"
            ));
        }
        let tank = number("TANK", words.next(), &0, &(self.tanks.len() - 1))?;
        match verb {
            "poke" => {
                let x = number("X", words.next(), &0.0, &1.0)?;
                let y = number("Y", words.next(), &0.0, &1.0)?;
                let force = number("FORCE", words.next(), &-4.0, &4.0)?;
                let size = size(&mut words)?;
                self.check(tank)?;
                sim::poke(self.slice_mut(tank), x, y, force);
                self.advance_unchecked(tank);
                self.seal(tank);
                if !self.tanks[tank].poked {
                    self.tanks[tank].poked = true;
                    self.poked += 1;
                }
                Ok(self.frame(tank, size))
            }
            "advance" => {
                for _ in 0..number("STEPS", words.next(), &1, &10_000)? {
                    self.advance(tank)?;
                }
                Ok((self.name(tank), Vec::new()))
            }
            _ => {
                let size = size(&mut words)?;
                self.check(tank)?;
                Ok(self.frame(tank, size))
            }
        }
    }

    fn name(&self, tank: usize) -> String {
        let Tank { steps, hash, .. } = self.tanks[tank];
        format!("tank {tank} step {steps} state {hash:016x}")
    }

    fn frame(&self, tank: usize, (width, height): (usize, usize)) -> Reply {
        let rgb = render::picture(self.slice(tank), width, height);
        let hash = crate::hash::hash(&rgb);
        (
            format!("{} {width}x{height} rgb {hash:016x}", self.name(tank)),
            rgb,
        )
    }

    fn stats(&self) -> Result<Reply, String> {
        let Settings {
            tanks,
            particles,
            rate_hz,
            dirty,
            ..
        } = self.settings;
        let mut text = format!(
            "tanks {tanks} particles {particles} bytes {} rate_hz {rate_hz} dirty {dirty} steps {} \
             next {}",
            self.bytes(),
            self.steps,
            self.next
        );
        if let Some(damage) = &self.damage {
            let _ = write!(text, " damage: {damage}"); // a String takes everything
            return Err(text);
        }
        Ok((text, Vec::new()))
    }

    /// Checks every tank; the answer is a hash over all of them.
    pub fn verify(&self) -> Result<String, String> {
        let mut all = Hash::new(0);
        for tank in 0..self.tanks.len() {
            self.check(tank)?;
            all.word(self.tanks[tank].hash);
        }
        match &self.damage {
            Some(damage) => Err(damage.clone()),
            None => Ok(format!(
                "fluid {} tanks {:016x}",
                self.tanks.len(),
                all.finish()
            )),
        }
    }

    /// Does once what requests do, so that none has first-time work. Leaves the tanks as they are.
    pub fn warm_up(&mut self) {
        for (width, height) in [(SIZE_MIN, SIZE_MIN), DEFAULT_SIZE] {
            drop(self.frame(0, (width, height)));
        }
    }
}

const DEFAULT_SIZE: (usize, usize) = (640, 480);

fn size<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<(usize, usize), String> {
    let Some(width) = words.next() else {
        return Ok(DEFAULT_SIZE);
    };
    let width = number("W", Some(width), &SIZE_MIN, &SIZE_MAX)?;
    Ok((width, number("H", words.next(), &SIZE_MIN, &SIZE_MAX)?))
}
