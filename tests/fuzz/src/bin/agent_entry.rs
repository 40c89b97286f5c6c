//! The file that tells the agent of an imported image's process: refused, or the one way to write what it
//! says.

#![no_main]

use cloudlet_agent::entry::{Entry, WORDS_MAX};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(entry) = Entry::decode(data) else {
        return;
    };
    assert!(!entry.arguments.is_empty());
    assert!(entry.arguments.len() + entry.environment.len() <= WORDS_MAX);
    let words = entry.arguments.iter().chain(&entry.environment);
    assert!(words.chain([&entry.directory]).all(|word| !word.contains(&0)));
    assert_eq!(entry.encode().expect("it was read"), data);
});
