//! Indices with several entries that fit.

use serde_json::{Value, json};

use super::super::oci::Index;
use super::*;

fn entry(digest: &str, variant: Option<&str>, name: Option<&str>) -> Value {
    let mut entry = json!({ "digest": digest, "size": 1 });
    if let Some(variant) = variant {
        entry["platform"] = json!({ "architecture": "amd64", "os": "linux", "variant": variant });
    }
    if let Some(name) = name {
        entry["annotations"] = json!({ NAME: name });
    }
    entry
}

fn digest(entries: &[Value], name: Option<&str>, level: u8) -> Result<String, Error> {
    let index: Index = serde_json::from_value(json!({ "manifests": entries })).unwrap();
    pick(&index.manifests, name, level).map(|entry| entry.digest.clone())
}

#[test]
fn the_best_variant_that_the_cpu_has_is_taken() {
    let variants = [
        entry("4", Some("v4"), None),
        entry("1", Some(""), None),
        entry("3", Some("v3"), None),
        entry("2", Some("v2"), None),
        entry("9", Some("v9"), None),
    ];
    for level in 1..=4 {
        assert_eq!(digest(&variants, None, level).unwrap(), level.to_string());
    }
    let high = [entry("4", Some("v4"), None)];
    assert!(matches!(digest(&high, None, 3), Err(Error::Platform)));
    assert!((1..=4).contains(&level_of_host()));
}

#[test]
fn names_choose_and_the_same_image_twice_is_one() {
    let two = [entry("a", None, Some("1.0")), entry("b", None, Some("2.0"))];
    assert_eq!(digest(&two, Some("1.0"), 1).unwrap(), "a");
    assert_eq!(digest(&two, Some("2.0"), 1).unwrap(), "b");
    let error = digest(&two, None, 1).unwrap_err().to_string();
    assert!(error.contains("1.0, 2.0"), "{error}");
    let error = digest(&two, Some("3.0"), 1).unwrap_err().to_string();
    assert!(error.contains("1.0, 2.0"), "{error}");

    let same = [
        entry("a", None, Some("1.0")),
        entry("a", None, Some("latest")),
    ];
    assert_eq!(digest(&same, None, 1).unwrap(), "a");

    let nameless = [entry("a", None, None), entry("b", None, None)];
    assert!(matches!(digest(&nameless, None, 1), Err(Error::Count(2))));
}

#[test]
fn a_better_variant_of_another_image_is_not_taken() {
    let mixed = [
        entry("a", Some(""), Some("1.0")),
        entry("b", Some("v2"), Some("1.0")),
        entry("c", Some("v3"), Some("2.0")),
    ];
    assert!(matches!(
        digest(&mixed, None, 4),
        Err(Error::Several { count: 2, .. })
    ));
    assert_eq!(digest(&mixed, Some("1.0"), 4).unwrap(), "b");
    assert_eq!(digest(&mixed, Some("1.0"), 1).unwrap(), "a");
}

#[test]
fn engines_names_may_be_shortened() {
    for (full, name) in [
        ("docker.io/library/web:1", "web:1"),
        ("docker.io/library/web:latest", "web"),
        ("docker.io/me/web:latest", "me/web"),
        ("web:latest", "docker.io/library/web"),
        ("quay.io/me/web:2", "quay.io/me/web:2"),
    ] {
        assert!(is_name(full, name), "{full} {name}");
    }
    assert!(!is_name("quay.io/me/web:2", "me/web:2"));
    assert!(!is_name("docker.io/library/web:1", "web"));
    let long = json!({
        "digest": "a", "size": 1,
        "annotations": { NAME: "1", LONG_NAME: "docker.io/library/web:1" },
    });
    let other = json!({
        "digest": "b", "size": 1,
        "annotations": { NAME: "1", LONG_NAME: "docker.io/library/db:1" },
    });
    let both = [long, other];
    assert_eq!(digest(&both, Some("db:1"), 1).unwrap(), "b");
    let error = digest(&both, None, 1).unwrap_err().to_string();
    assert!(error.contains("db:1, web:1"), "{error}");
}

#[test]
fn there_is_an_end_of_names() {
    let many: Vec<String> = (0..30).map(|number| format!("n{number:02}")).collect();
    let text = names_of(many.iter().map(String::as_str));
    assert!(text.ends_with("n19 and 10 more"), "{text}");
}
