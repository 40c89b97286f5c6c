//! How results reach the user: text or JSON on standard output, progress on a terminal. All that
//! commands print goes through here, and bears that nobody reads it any more.

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use cloudlet::plain;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use signal_hook::consts::SIGPIPE;

use super::stdio;
use super::terminal::exit_of_signal;

/// Why standard output takes nothing more. What a command does is not undone by that, so it goes on to
/// its end, and [`exit_code`] tells.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Writes to standard output, unless that has failed before.
pub(crate) fn print(bytes: &[u8]) {
    if LOST.get().is_some() {
        return;
    }
    if let Err(error) = stdio::stdout().write_all(bytes) {
        // The first error is the one that tells.
        let _ = LOST.set(error);
    }
}

/// What commands say has words of others in it, which are not to steer the terminal.
fn print_lines(text: &str) {
    print(format!("{}\n", plain::lines(text)).as_bytes());
}

fn print_json(value: &Value) {
    print(format!("{}\n", plain::json(&value.to_string())).as_bytes());
}

/// Tells the user something beside the results, on standard error.
pub(crate) fn tell(text: &str) {
    // Where nobody reads it, there is nobody to tell of that.
    let _ = stdio::stderr().write_all(format!("{}\n", plain::message(text)).as_bytes());
}

/// The exit code of the process after a command that would end with `code`: results that nobody got are
/// no success. A reader that has seen enough is told nothing.
pub(crate) fn exit_code(code: ExitCode) -> ExitCode {
    match LOST.get() {
        Some(error) if code == ExitCode::SUCCESS => code_of(error),
        _ => code,
    }
}

/// The exit code for an output that failed so, which is told unless the reader wished it.
pub(crate) fn code_of(error: &io::Error) -> ExitCode {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return exit_of_signal(SIGPIPE);
    }
    tell(&format!(
        "cloudlet: cannot write to standard output: {error}"
    ));
    ExitCode::FAILURE
}

/// Where results go.
pub(crate) struct Output {
    json: bool,
}

impl Output {
    /// Text, or JSON.
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether results are JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One result: `value` for scripts, or `text` for people.
    pub(crate) fn result(&self, value: &Value, text: impl FnOnce() -> String) {
        if self.json {
            print_json(value);
        } else {
            let text = text();
            if !text.is_empty() {
                print_lines(&text);
            }
        }
    }

    /// A list: a line of JSON for each of `values`, or the table `rows`, whose first row is the heading.
    pub(crate) fn list(&self, values: &[Value], rows: &[Vec<String>]) {
        if self.json {
            values.iter().for_each(print_json);
        } else {
            print_lines(&table(rows));
        }
    }

    /// A remark for people, which scripts do not get.
    pub(crate) fn say(&self, text: &str) {
        if !self.json {
            print_lines(text);
        }
    }

    /// A progress display, which shows nothing unless standard error is a terminal.
    pub(crate) fn progress(&self) -> Progress {
        Progress {
            shown: std::io::stderr().is_terminal() && !self.json,
            bar: RefCell::default(),
        }
    }
}

/// The progress of one piece of work.
pub(crate) struct Progress {
    shown: bool,
    bar: RefCell<Option<(String, ProgressBar)>>,
}

impl Progress {
    /// `done` of `total` bytes of `step` are through.
    pub(crate) fn show(&self, step: &str, done: u64, total: u64) {
        if !self.shown {
            return;
        }
        let mut current = self.bar.borrow_mut();
        if current.as_ref().is_none_or(|(name, _)| name != step) {
            if let Some((_, bar)) = current.take() {
                bar.finish_and_clear();
            }
            *current = Some((step.to_owned(), new_bar(step, total)));
        }
        if let Some((_, bar)) = current.as_ref() {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some((_, bar)) = self.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(step: &str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:>12} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
    )
    .expect("the template is well formed");
    let bar = ProgressBar::new(total)
        .with_style(style.progress_chars("=> "))
        .with_prefix(plain::line(step).into_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Bytes for people: `12.3 MB` (10^6), or exact below 10 kB.
pub(crate) fn megabytes(bytes: u64) -> String {
    if bytes < 10_000 {
        return format!("{bytes} B");
    }
    // Whole kilobytes below 2^53 are exact in a double.
    format!("{}.{:03} MB", bytes / 1_000_000, bytes / 1000 % 1000)
}

/// Rows as a table with columns as wide as their widest cell; the first row is the heading.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A field of a JSON object as text.
pub(crate) fn text_of(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let rows = [
            vec!["a".into(), "b".into()],
            vec!["long".into(), "c".into()],
        ];
        assert_eq!(table(&rows), "a     b\nlong  c");
    }

    #[test]
    fn bytes_are_decimal() {
        assert_eq!(megabytes(9_999), "9999 B");
        assert_eq!(megabytes(12_345_678), "12.345 MB");
    }
}
