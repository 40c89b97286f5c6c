//! Assembles the harness's own guests with rustc's assembler and lld, as flat images.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

/// Where the harness's kernels are loaded and entered: `src/guest.rs`.
const LOAD_ADDRESS: &str = "0x100000";

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let source = root.join("guest/chaos.s");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", source.display());
    let script = out.join("chaos.ld");
    let sections = format!(
        "ENTRY(chaos_start)\nSECTIONS {{ . = {LOAD_ADDRESS}; .chaos : {{ *(.chaos) }} \
         /DISCARD/ : {{ *(.text*) *(.data*) *(.bss*) *(.rodata*) *(.eh_frame*) *(.comment) *(.debug*) }} }}\n"
    );
    fs::write(&script, sections).expect("the build directory can be written");
    let main = out.join("chaos.rs");
    let program = format!(
        "#![no_std]\n#![no_main]\ncore::arch::global_asm!(include_str!({:?}));\n\
         #[panic_handler]\nfn panic(_: &core::panic::PanicInfo) -> ! {{ loop {{}} }}\n",
        source.display().to_string()
    );
    fs::write(&main, program).expect("the build directory can be written");
    let status = Command::new(env::var_os("RUSTC").expect("cargo sets it"))
        .args(["--edition", "2024", "--target", "x86_64-unknown-linux-gnu"])
        .args(["--crate-type", "bin", "--crate-name", "chaos"])
        .args(["-C", "panic=abort", "-C", "relocation-model=static"])
        .args(["-C", "linker=rust-lld", "-C", "linker-flavor=ld.lld"])
        .args(["-C", "link-arg=--oformat=binary", "-C"])
        .arg(format!("link-arg=-T{}", script.display()))
        .arg(&main)
        .arg("-o")
        .arg(out.join("chaos"))
        .status()
        .expect("rustc can be started");
    assert!(status.success(), "guest/chaos.s does not build");
}
