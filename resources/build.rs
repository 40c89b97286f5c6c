//! Builds the embedded guest from source: the unikernel and the applications are compiled by the
//! same rustc for the only target it needs to have, without the standard library, and linked by
//! rustc's own lld with linker scripts of ours. Always optimised, whatever the profile.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// One guest program: its folder below `guest/`, and whether the linker writes a flat image.
struct Program {
    name: &'static str,
    flat: bool,
}

const PROGRAMS: [Program; 1] = [Program {
    name: "runtime",
    flat: false,
}];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src");
    watch(&root.join("guest"));
    for program in &PROGRAMS {
        compile(&root, &out, program);
    }
}

/// Names every file below `folder` to cargo.
fn watch(folder: &Path) {
    println!("cargo::rerun-if-changed={}", folder.display());
    for entry in fs::read_dir(folder).expect("the guest's sources are readable") {
        let path = entry.expect("the guest's sources are readable").path();
        if path.is_dir() {
            watch(&path);
        }
    }
}

fn compile(root: &Path, out: &Path, program: &Program) {
    let folder = root.join("guest").join(program.name);
    let image = out.join(program.name);
    let mut rustc = Command::new(env::var_os("RUSTC").expect("cargo sets it"));
    rustc
        .current_dir(root)
        .env_remove("RUSTC_WRAPPER")
        .env(
            "GUEST_VERSION",
            env::var("CARGO_PKG_VERSION").expect("cargo sets it"),
        )
        .args([
            "--edition",
            "2024",
            "--crate-type",
            "bin",
            "--target",
            TARGET,
        ])
        .arg("--crate-name")
        .arg(format!("guest_{}", program.name))
        .args(["-D", "warnings", "-D", "unsafe_op_in_unsafe_fn"])
        .args([
            "-C",
            "opt-level=3",
            "-C",
            "panic=abort",
            "-C",
            "codegen-units=1",
        ])
        .args(["-C", "relocation-model=static", "-C", "strip=debuginfo"])
        .args(["-C", "linker=rust-lld", "-C", "linker-flavor=ld.lld"])
        .args([
            "-C",
            "link-arg=--build-id=none",
            "-C",
            "link-arg=-znognustack",
        ])
        .arg("-C")
        .arg(format!("link-arg=-T{}", folder.join("link.ld").display()))
        .arg(format!("--remap-path-prefix={}=cloudlet", root.display()))
        .arg(folder.join("main.rs"))
        .arg("-o")
        .arg(&image);
    if program.flat {
        rustc.args(["-C", "link-arg=--oformat=binary"]);
    }
    let status = rustc.status().expect("rustc can be started");
    assert!(
        status.success(),
        "the guest program `{}` does not build",
        program.name
    );
}
