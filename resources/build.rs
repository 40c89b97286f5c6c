//! Builds the embedded guest from source: the unikernel and the applications are compiled by the
//! same rustc for the only target it needs to have, without the standard library, and linked by
//! rustc's own lld with linker scripts of ours. Always optimised, whatever the profile.
//!
//! The agent of Linux guests has dependencies, so cargo builds it, as a static program, in a target
//! directory of its own below this build's. What it needs has been fetched for the host's side.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// One guest program: its folder below `guest/`, its linker script, and whether the linker writes a
/// flat image.
struct Program {
    name: &'static str,
    script: &'static str,
    flat: bool,
}

const PROGRAMS: [Program; 3] = [
    Program {
        name: "runtime",
        script: "runtime/link.ld",
        flat: false,
    },
    Program {
        name: "fluid",
        script: "shared/app.ld",
        flat: true,
    },
    Program {
        name: "object",
        script: "shared/app.ld",
        flat: true,
    },
];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for path in ["build.rs", "src/hash.rs", "src/protocol.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    watch(&root.join("guest"));
    library(&root, &out);
    for program in &PROGRAMS {
        compile(&root, &out, program);
    }
    fluid_for_linux(&root, &out);
    for path in ["../Cargo.toml", "../Cargo.lock", "../agent/Cargo.toml"] {
        println!("cargo::rerun-if-changed={path}");
    }
    watch(&root.join("../agent/src"));
    agent(&root, &out);
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

/// What all compilations of guest code have in common.
fn rustc(root: &Path, crate_type: &str, name: &str) -> Command {
    let mut rustc = Command::new(env::var_os("RUSTC").expect("cargo sets it"));
    rustc
        .current_dir(root)
        .env(
            "GUEST_VERSION",
            env::var("CARGO_PKG_VERSION").expect("cargo sets it"),
        )
        .args(["--edition", "2024", "--target", TARGET])
        .args(["--crate-type", crate_type, "--crate-name", name])
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
        .arg(format!("--remap-path-prefix={}=cloudlet", root.display()));
    rustc
}

fn run(mut command: Command, what: &str) {
    let status = command.status().expect("rustc can be started");
    assert!(status.success(), "the guest's `{what}` does not build");
}

/// The agent, static, so that it runs on any Linux. The environment that cargo set for the build
/// around this one (lints, instrumentation, a wrapper of rustc) is not for it.
fn agent(root: &Path, out: &Path) {
    let target_dir = out.join("agent");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    cargo
        .current_dir(root.join("../agent"))
        .args(["build", "--quiet", "--locked", "--bin", "cloudlet-agent"])
        .args(["--profile", "agent", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static",
        );
    for name in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo can be started");
    assert!(status.success(), "the agent does not build");
    let built = target_dir.join(TARGET).join("agent/cloudlet-agent");
    fs::copy(built, out.join("cloudlet-agent")).expect("the agent can be copied");
}

/// The liquid as a program for Linux, static as well.
fn fluid_for_linux(root: &Path, out: &Path) {
    let mut command = rustc(root, "bin", "fluid_linux");
    command
        .args(["-C", "target-feature=+crt-static"])
        .arg("guest/fluid/linux.rs")
        .arg("-o")
        .arg(out.join("fluid-linux"));
    run(command, "fluid for Linux");
}

/// The crate `shared`, which every guest program uses.
fn library(root: &Path, out: &Path) {
    let mut command = rustc(root, "rlib", "shared");
    command.arg("guest/shared/lib.rs").arg("--out-dir").arg(out);
    run(command, "shared");
}

fn compile(root: &Path, out: &Path, program: &Program) {
    let script = root.join("guest").join(program.script);
    let mut command = rustc(root, "bin", &format!("guest_{}", program.name));
    command
        .arg("--extern")
        .arg(format!("shared={}", out.join("libshared.rlib").display()))
        .args(["-C", "linker=rust-lld", "-C", "linker-flavor=ld.lld"])
        .args([
            "-C",
            "link-arg=--build-id=none",
            "-C",
            "link-arg=-znognustack",
        ])
        .arg("-C")
        .arg(format!("link-arg=-T{}", script.display()))
        .arg(format!("guest/{}/main.rs", program.name))
        .arg("-o")
        .arg(out.join(program.name));
    if program.flat {
        command.args(["-C", "link-arg=--oformat=binary"]);
    }
    run(command, program.name);
}
