//! What the benches share: medians of repeated runs, and figures as one JSON object a line (for
//! scripts, which rely on the names) or as lines of a table.
//!
//! Where a figure has a reference, both are taken in the same run, one after the other, so that
//! the ratio says something even on a machine that is busy or slow.

mod bare_uffd;
mod codec;
mod encode_memory;
mod firecracker;
mod pager;
mod synthesis;
mod vms;

use serde::Serialize;

use crate::failure::{Failure, Outcome};

/// Runs that a median is taken of, at the least.
pub const RUNS_MIN: usize = 5;

/// One bench: what it is called on the command line, and what it measures.
pub struct Bench {
    /// Its name.
    pub name: &'static str,
    /// What it measures, for `--help`.
    pub about: &'static str,
    /// Runs it and hands every figure to the sheet.
    pub run: fn(&mut Sheet) -> Outcome,
}

/// The benches by name, in the order in which `all` runs them.
pub const BENCHES: &[Bench] = &[
    Bench {
        name: "start",
        about: "process start to first guest output, and what the VMM itself takes",
        run: vms::run_start,
    },
    Bench {
        name: "restore",
        about: "restore to first answered request, and what a second clone takes",
        run: vms::run_restore,
    },
    Bench {
        name: "pager",
        about: "demand faults and bulk placement, beside a bare userfaultfd probe",
        run: pager::run,
    },
    Bench {
        name: "synthesis",
        about: "first answer and complete overlay over links of 10, 38, 100 Mbit/s and no limit",
        run: synthesis::run,
    },
    Bench {
        name: "encode",
        about: "guest memory encoded into an overlay, per core",
        run: codec::run_encode,
    },
    Bench {
        name: "encode-memory",
        about: "memory that encoding a large guest takes, all of it changed",
        run: encode_memory::run,
    },
    Bench {
        name: "apply",
        about: "segments verified, decompressed and placed in guest memory, per core",
        run: codec::run_apply,
    },
];

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// Its stable name, for scripts.
    pub name: String,
    /// The median of the runs.
    pub value: f64,
    /// The unit of `value` and `reference`.
    pub unit: &'static str,
    /// What it is held against, measured in the same run: the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<f64>,
    /// What the reference is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_is: Option<String>,
    /// The median of the runs' ratios of value to reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

impl Figure {
    /// A figure from one value a run.
    pub fn from_runs(name: impl Into<String>, unit: &'static str, runs: &[f64]) -> Outcome<Self> {
        Ok(Self {
            name: name.into(),
            value: median(runs)?,
            unit,
            reference: None,
            reference_is: None,
            ratio: None,
        })
    }

    /// A figure from pairs of a value and its reference, one pair a run.
    pub fn beside(
        name: impl Into<String>,
        unit: &'static str,
        runs: &[(f64, f64)],
        reference_is: impl Into<String>,
    ) -> Outcome<Self> {
        let column = |pick: fn(&(f64, f64)) -> f64| runs.iter().map(pick).collect::<Vec<_>>();
        Ok(Self {
            name: name.into(),
            value: median(&column(|run| run.0))?,
            unit,
            reference: Some(median(&column(|run| run.1))?),
            reference_is: Some(reference_is.into()),
            ratio: Some(median(&column(|run| run.0 / run.1))?),
        })
    }

    fn row(&self) -> String {
        let mut row = format!("{:<44} {:>11.3} {:<5}", self.name, self.value, self.unit);
        if let (Some(reference), Some(is), Some(ratio)) =
            (self.reference, &self.reference_is, self.ratio)
        {
            row.push_str(&format!(" {ratio:>7.3} x {reference:.3} ({is})"));
        }
        row.trim_end().to_owned()
    }
}

/// Where figures go as soon as they are there.
pub struct Sheet {
    json: bool,
}

impl Sheet {
    /// A sheet that prints JSON lines, or rows for a person.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints one figure.
    pub fn put(&mut self, figure: &Figure) -> Outcome {
        if self.json {
            println!("{}", serde_json::to_string(figure)?);
        } else {
            println!("{}", figure.row());
        }
        Ok(())
    }

    /// A remark for the person who watches; scripts do not see it.
    pub fn note(&self, text: &str) {
        eprintln!("{text}");
    }
}

/// The median of `runs`: at least [`RUNS_MIN`] numbers.
pub fn median(runs: &[f64]) -> Outcome<f64> {
    if runs.len() < RUNS_MIN || runs.iter().any(|run| !run.is_finite()) {
        return Err(Failure::new(format!(
            "{runs:?} are not {RUNS_MIN} or more runs"
        )));
    }
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    Ok(if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_need_enough_runs() {
        assert_eq!(median(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap(), 3.0);
        assert_eq!(median(&[6.0, 5.0, 1.0, 3.0, 2.0, 4.0]).unwrap(), 3.5);
        assert!(median(&[1.0, 2.0, 3.0, 4.0]).is_err());
        assert!(median(&[1.0, 2.0, 3.0, 4.0, f64::NAN]).is_err());
    }

    #[test]
    fn figures_have_the_fields_that_scripts_read() {
        let plain = Figure::from_runs("a.b", "ms", &[1.0; 5]).unwrap();
        assert_eq!(
            serde_json::to_string(&plain).unwrap(),
            r#"{"name":"a.b","value":1.0,"unit":"ms"}"#
        );
        let beside = Figure::beside("a.b", "us", &[(3.0, 2.0); 5], "bare probe").unwrap();
        assert_eq!(
            serde_json::to_string(&beside).unwrap(),
            r#"{"name":"a.b","value":3.0,"unit":"us","reference":2.0,"reference_is":"bare probe","ratio":1.5}"#
        );
    }
}
