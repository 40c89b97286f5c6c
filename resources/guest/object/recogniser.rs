//! The recogniser: a database made of training pictures and many slightly moved copies of them, and
//! votes of what is most like a picture.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::descriptor::{ALIKE, DIMS, Move, PIXELS, Picture};
use crate::index::{Found, Index, RECORD, Source};
use crate::math::Random;
use crate::words::{only, parameter};

/// Bytes of a training record: the label, then the pixels.
const TRAINING_RECORD: usize = 1 + PIXELS;
/// Pictures that vote.
const VOTERS: usize = 5;

/// What the application was asked to be.
pub struct Settings {
    pub mib: usize,
    pub probes: usize,
}

impl Settings {
    /// From `mib= probes=` words; both have defaults.
    pub fn parse(params: &str) -> Result<Settings, String> {
        only(params, &["mib", "probes"])?;
        Ok(Settings {
            mib: parameter(params, "mib", 100, 1, 2048)?,
            probes: parameter(params, "probes", 3, 1, 64)?,
        })
    }
}

struct Training {
    pictures: Vec<(u8, Picture)>,
    count: usize,
}

impl Training {
    fn new(data: &[u8], count: usize) -> Result<Training, String> {
        if data.is_empty() || !data.len().is_multiple_of(TRAINING_RECORD) {
            return Err(format!("{} bytes are no training pictures", data.len()));
        }
        let have = data.len() / TRAINING_RECORD;
        if have > usize::from(u16::MAX) {
            return Err(format!("{have} training pictures are too many"));
        }
        let records = data.chunks_exact(TRAINING_RECORD).enumerate();
        let pictures = records.map(|(i, record)| {
            let picture = Picture::new(&record[1..]).filter(|_| record[0] < 10);
            picture
                .map(|p| (record[0], p))
                .ok_or(format!("training picture {i} is none"))
        });
        let pictures = pictures.collect::<Result<Vec<_>, _>>()?;
        let count = count.max(pictures.len());
        Ok(Training { pictures, count })
    }
}

impl Source for Training {
    fn count(&self) -> usize {
        self.count
    }

    /// Each picture as it is, then all of them moved, again and again.
    fn write(&self, number: usize, out: &mut [u8]) {
        let which = number % self.pictures.len();
        let (label, picture) = &self.pictures[which];
        let mut moved = Move::NONE;
        if number >= self.pictures.len() {
            let mut random = Random::new(number as u64);
            random.bits();
            moved = Move {
                turn: random.between(-0.2, 0.2),
                scale_x: random.between(0.88, 1.14),
                scale_y: random.between(0.88, 1.14),
                shift_x: random.between(-0.7, 0.7),
                shift_y: random.between(-0.7, 0.7),
            };
        }
        out.fill(0);
        if let Some(descriptor) = out.first_chunk_mut::<DIMS>() {
            picture.describe(moved, descriptor);
        }
        out[DIMS] = *label;
        out[DIMS + 1..DIMS + 3].copy_from_slice(&(which as u16).to_le_bytes());
    }
}

/// What a picture was taken for.
pub struct Recognised {
    pub label: u8,
    /// The share of the votes, 0 to 1.
    pub share: f32,
    /// How alike the best record is, about 0 to 1.
    pub likeness: f32,
    /// Records looked at.
    pub looked: usize,
}

/// The application's state.
pub struct Recogniser {
    index: Index,
    probes: usize,
}

impl Recogniser {
    /// Makes the database from training records.
    pub fn new(settings: &Settings, data: &[u8]) -> Result<Recogniser, String> {
        let training = Training::new(data, (settings.mib << 20) / RECORD)?;
        let index = Index::build(&training)?;
        let recogniser = Recogniser {
            index,
            probes: settings.probes,
        };
        // Do once what a request does, so that none has first-time work.
        recogniser.recognise(&data[1..TRAINING_RECORD])?;
        Ok(recogniser)
    }

    /// What is on a picture of 64 bytes?
    pub fn recognise(&self, pixels: &[u8]) -> Result<Recognised, String> {
        let picture = Picture::new(pixels).ok_or_else(|| {
            format!(
                "a picture is {PIXELS} bytes of 0 to 16; these {} are not",
                pixels.len()
            )
        })?;
        let mut descriptor = [0; DIMS];
        picture.describe(Move::NONE, &mut descriptor);
        let mut best = [None; VOTERS];
        let looked = self.index.search(&descriptor, self.probes, &mut best)?;
        let mut votes = [0.0f32; 10];
        let top = best[0].ok_or("the database is empty")?.likeness;
        for Found {
            likeness, label, ..
        } in best.iter().flatten()
        {
            let behind = (top - likeness) as f32 / ALIKE;
            votes[usize::from(*label) % 10] += 1.0 / (0.01 + behind);
        }
        let mut label = 0;
        for (i, vote) in votes.iter().enumerate() {
            if *vote > votes[label] {
                label = i;
            }
        }
        let share = votes[label] / votes.iter().sum::<f32>();
        Ok(Recognised {
            label: label as u8,
            share,
            likeness: top as f32 / ALIKE,
            looked,
        })
    }

    /// Answers `recognise` (with a picture attached) and `stats`.
    pub fn request(&self, text: &str, attachment: &[u8]) -> Result<String, String> {
        match text.trim() {
            "recognise" => {
                let r = self.recognise(attachment)?;
                Ok(format!(
                    "label {} score {:.4} likeness {:.4} scanned {}",
                    r.label, r.share, r.likeness, r.looked
                ))
            }
            "stats" => Ok(self.stats()),
            other => Err(format!(
                "`{other}` is not understood; try `recognise` with a picture attached, or `stats`"
            )),
        }
    }

    /// What there is.
    pub fn stats(&self) -> String {
        let (records, lists) = self.index.counts();
        format!(
            "records {records} lists {lists} bytes {} probes {}",
            self.index.bytes(),
            self.probes
        )
    }

    /// Checks everything.
    pub fn verify(&self) -> Result<String, String> {
        let hash = self.index.verify()?;
        Ok(format!(
            "object {} lists {hash:016x}",
            self.index.counts().1
        ))
    }

    /// For tests of the self-check.
    #[cfg(test)]
    pub fn index_mut(&mut self) -> &mut Index {
        &mut self.index
    }
}
