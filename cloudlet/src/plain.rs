//! Words for a terminal. Names in archives, errors of guests and reports of VMs are written by others,
//! and a terminal obeys some characters: they colour, move, retitle, or turn what stands there round.

use std::borrow::Cow;
use std::fmt::Write;

/// What stands in place of a character that is not shown.
const REPLACEMENT: char = '?';

/// `text` without characters that steer a terminal; its lines stay.
#[must_use]
pub fn lines(text: &str) -> Cow<'_, str> {
    replaced(text, |c| c == '\n')
}

/// `text` as one line without characters that steer a terminal.
#[must_use]
pub fn line(text: &str) -> Cow<'_, str> {
    replaced(text, |_| false)
}

/// Words of this program with those of others in them: a further line stands in a little, so that none
/// of the others' begins as ours do.
#[must_use]
pub fn message(text: &str) -> Cow<'_, str> {
    match lines(text) {
        text if text.contains('\n') => text.replace('\n', "\n  ").into(),
        text => text,
    }
}

/// JSON whose text means the same and steers no terminal: such characters are only in its strings,
/// where they can be written as numbers.
#[must_use]
pub fn json(text: &str) -> Cow<'_, str> {
    if !text.chars().any(steers) {
        return text.into();
    }
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            // Writing to a string does not fail; all of these have four digits.
            let _ = write!(plain, "\\u{:04x}", u32::from(c));
        } else {
            plain.push(c);
        }
    }
    plain.into()
}

fn replaced(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_bad = |c: char| steers(c) && !keep(c);
    if !text.chars().any(is_bad) {
        return text.into();
    }
    let plain = text.chars();
    let plain = plain.map(|c| if is_bad(c) { REPLACEMENT } else { c });
    plain.collect::<String>().into()
}

/// Control characters of both sets, line and paragraph separators, and what changes the direction of
/// writing (Unicode's Bidi_Control).
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "a\u{1b}]0;t\u{7}\u{9b}2J\r\n\u{202e}b\u{2066}\u{7f}ö…日";

    #[test]
    fn nothing_that_steers_is_left() {
        assert_eq!(line(EVIL), "a?]0;t??2J???b??ö…日");
        assert_eq!(lines(EVIL), "a?]0;t??2J?\n?b??ö…日");
        assert_eq!(message("one\ntwo"), "one\n  two");
        let same = "nothing to do: ö…日";
        assert!(matches!(line(same), Cow::Borrowed(text) if text == same));
    }

    #[test]
    fn json_means_the_same() {
        let value = serde_json::json!({ EVIL: [EVIL, 1] });
        let text = value.to_string();
        let plain = json(&text);
        assert!(!plain.chars().any(steers), "{plain}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&plain).unwrap(),
            value
        );
        assert!(matches!(json("[1, \"ö\"]"), Cow::Borrowed(_)));
    }
}
