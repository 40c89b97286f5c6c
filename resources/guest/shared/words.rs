//! Words of requests and parameters, with errors that name the word.

use alloc::format;
use alloc::string::String;
use core::fmt::Display;
use core::str::FromStr;

/// The value of `key=value` among blank-separated words; `default` if the key is not there.
pub fn parameter<T: FromStr + PartialOrd + Display>(
    params: &str,
    key: &str,
    default: T,
    min: T,
    max: T,
) -> Result<T, String> {
    let mut value = default;
    for word in params.split_ascii_whitespace() {
        if let Some((k, v)) = word.split_once('=')
            && k == key
        {
            value = number(key, Some(v), &min, &max)?;
        }
    }
    Ok(value)
}

/// An error if `params` has a word that is none of the `keys`.
pub fn only(params: &str, keys: &[&str]) -> Result<(), String> {
    for word in params.split_ascii_whitespace() {
        let key = word.split_once('=').map(|(key, _)| key);
        if !key.is_some_and(|key| keys.contains(&key)) {
            return Err(format!(
                "`{word}` is none of the parameters {}",
                keys.join("=, ") + "="
            ));
        }
    }
    Ok(())
}

/// A number of a request, within bounds.
pub fn number<T: FromStr + PartialOrd + Display>(
    name: &str,
    word: Option<&str>,
    min: &T,
    max: &T,
) -> Result<T, String> {
    let word = word.ok_or_else(|| format!("{name} is missing"))?;
    match word.parse::<T>() {
        Ok(value) if value >= *min && value <= *max => Ok(value),
        _ => Err(format!(
            "{name} is `{word}`, not a number from {min} to {max}"
        )),
    }
}
