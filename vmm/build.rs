//! Compiles the seccomp policies of `resources/seccomp` into BPF programs, and the table of
//! system call names that reports need. A policy that is wrong stops the build.

use seccomp::policy::{Condition, Policy, Verdict};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

/// The two files that the crate's own tests compile as well.
#[path = "src/seccomp"]
mod seccomp {
    pub(crate) mod policy;
    pub(crate) mod tables;
}

/// A thread kind each; the file is `KIND.policy`, the program `KIND` in capitals.
const KINDS: [&str; 5] = ["control", "vcpu", "pager", "worker", "fetch"];

/// Set in the number of every call made through the x32 ABI
/// (__X32_SYSCALL_BIT of arch/x86/include/uapi/asm/unistd.h).
const X32_SYSCALL_BIT: u32 = 0x4000_0000;

/// Instructions at the start of what seccompiler makes that check the architecture: load it,
/// compare it, kill the process. Nothing behind them jumps back over them.
const ARCHITECTURE_CHECK: usize = 3;

fn main() {
    if let Err(error) = generate() {
        eprintln!("seccomp policies: {error}");
        std::process::exit(1);
    }
}

fn generate() -> Result<(), Box<dyn std::error::Error>> {
    let root = env::var("CARGO_MANIFEST_DIR")?;
    let policies = Path::new(&root).join("../resources/seccomp");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/seccomp/policy.rs");
    println!("cargo::rerun-if-changed=src/seccomp/tables.rs");
    let mut out = String::new();
    for kind in KINDS {
        let path = policies.join(format!("{kind}.policy"));
        println!("cargo::rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let policy = Policy::parse(&format!("resources/seccomp/{kind}.policy"), &text)?;
        write_program(&mut out, kind, &compile(&policy)?)?;
    }
    write_names(&mut out)?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("seccomp.rs"), out)?;
    Ok(())
}

/// The filter: foreign architectures and x32 kill the process, what the policy lists passes or
/// fails, everything else traps.
fn compile(policy: &Policy) -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // struct seccomp_data starts with the number of the call; a jump skips `jt` or `jf`
    // instructions (include/uapi/linux/bpf_common.h).
    let load_number = sock_filter {
        code: 0x20,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let unless_x32 = sock_filter {
        code: 0x35,
        jt: 0,
        jf: 1,
        k: X32_SYSCALL_BIT,
    };
    let mut head = vec![
        load_number,
        unless_x32,
        end_with(SeccompAction::KillProcess),
    ];
    for rule in &policy.rules {
        match rule.verdict {
            Verdict::Allow => {
                let chain = rules.entry(rule.number).or_default();
                if !rule.conditions.is_empty() {
                    let list = rule
                        .conditions
                        .iter()
                        .map(condition)
                        .collect::<Result<_, _>>()?;
                    chain.push(SeccompRule::new(list)?);
                }
            }
            Verdict::Fail(errno) => {
                let number = u32::try_from(rule.number)?;
                head.push(sock_filter {
                    code: 0x15,
                    jt: 0,
                    jf: 1,
                    k: number,
                });
                head.push(end_with(SeccompAction::Errno(errno.into())));
            }
        }
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let mut program = BpfProgram::try_from(filter)?;
    program.splice(ARCHITECTURE_CHECK..ARCHITECTURE_CHECK, head);
    Ok(program)
}

fn end_with(action: SeccompAction) -> sock_filter {
    sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: u32::from(action),
    }
}

fn condition(condition: &Condition) -> Result<SeccompCondition, seccompiler::BackendError> {
    let length = if condition.wide {
        SeccompCmpArgLen::Qword
    } else {
        SeccompCmpArgLen::Dword
    };
    let operator = condition
        .mask
        .map_or(SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq);
    SeccompCondition::new(condition.argument, length, operator, condition.value)
}

fn write_program(out: &mut String, kind: &str, program: &[sock_filter]) -> std::fmt::Result {
    writeln!(
        out,
        "static {}: [sock_filter; {}] = [",
        kind.to_uppercase(),
        program.len()
    )?;
    for sock_filter { code, jt, jf, k } in program {
        writeln!(
            out,
            "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},"
        )?;
    }
    writeln!(out, "];")
}

/// The names by number, empty where no call has that number.
fn write_names(out: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let mut names: Vec<&str> = Vec::new();
    for (name, number) in seccomp::tables::syscalls() {
        let number = usize::try_from(number)?;
        if names.len() <= number {
            names.resize(number + 1, "");
        }
        if !names[number].is_empty() {
            return Err(format!("{number} is both {} and {name}", names[number]).into());
        }
        names[number] = name;
    }
    writeln!(
        out,
        "static SYSCALL_NAMES: [&str; {}] = {names:?};",
        names.len()
    )?;
    Ok(())
}
