//! Compiles the seccomp policies of `resources/seccomp` into BPF programs, and the table of
//! system call names that reports need. A policy that is wrong stops the build.

use seccomp::policy::{Condition, Policy, Verdict};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};
use std::collections::{BTreeMap, BTreeSet};
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
const KINDS: [&str; 6] = ["control", "vcpu", "pager", "worker", "fetch", "image"];

/// Set in the number of every call made through the x32 ABI
/// (__X32_SYSCALL_BIT of arch/x86/include/uapi/asm/unistd.h).
const X32_SYSCALL_BIT: u32 = 0x4000_0000;

/// Instructions at the start of what seccompiler makes that check the architecture: load it,
/// compare it, kill the process. Nothing behind them jumps back over them.
const ARCHITECTURE_CHECK: usize = 3;

/// BPF_LD | BPF_W | BPF_ABS at 0: the number of the call is the first field of struct
/// seccomp_data (include/uapi/linux/seccomp.h). Opcodes: include/uapi/linux/bpf_common.h.
const LOAD_NUMBER: sock_filter = sock_filter {
    code: 0x20,
    jt: 0,
    jf: 0,
    k: 0,
};
/// BPF_JMP | BPF_JEQ | BPF_K: skips `jt` instructions if what is loaded is `k`, else `jf`.
const JUMP_IF_EQ: u16 = 0x15;
/// BPF_JMP | BPF_JGE | BPF_K: the same for at least `k`.
const JUMP_IF_GE: u16 = 0x35;
/// BPF_RET | BPF_K.
const RETURN: u16 = 0x06;

/// BPF_JMP | BPF_JA: skips `k` instructions.
const JUMP: u16 = 0x05;

/// seccompiler's rules: by number of the call the alternatives, none of them for any arguments.
type Chains = BTreeMap<i64, Vec<SeccompRule>>;

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

/// The filter, in this order: foreign architectures and x32 kill the process; calls that the
/// policy makes fail do so; calls that it allows whatever their arguments pass, found by binary
/// search; then seccompiler's rules for those with conditions; everything else traps.
fn compile(policy: &Policy) -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let mut plain = BTreeSet::new();
    let mut allowed = Chains::new();
    let mut failing: BTreeMap<u16, Chains> = BTreeMap::new();
    for rule in &policy.rules {
        let chains = match rule.verdict {
            Verdict::Fail(errno) => failing.entry(errno).or_default(),
            Verdict::Allow if rule.conditions.is_empty() => {
                plain.insert(u32::try_from(rule.number)?);
                continue;
            }
            Verdict::Allow => &mut allowed,
        };
        let chain = chains.entry(rule.number).or_default();
        if !rule.conditions.is_empty() {
            let conditions = rule
                .conditions
                .iter()
                .map(condition)
                .collect::<Result<_, _>>()?;
            chain.push(SeccompRule::new(conditions)?);
        }
    }
    let mut head = vec![
        LOAD_NUMBER,
        jump(JUMP_IF_GE, X32_SYSCALL_BIT, 0, 1),
        end_with(SeccompAction::KillProcess),
    ];
    for (errno, chains) in failing {
        head.extend(fail(chains, errno)?);
    }
    head.push(LOAD_NUMBER);
    head.extend(search(&Vec::from_iter(plain))?);
    let (trap, allow) = (SeccompAction::Trap, SeccompAction::Allow);
    let filter = SeccompFilter::new(allowed, trap, allow, TargetArch::x86_64)?;
    let mut program = BpfProgram::try_from(filter)?;
    program.splice(ARCHITECTURE_CHECK..ARCHITECTURE_CHECK, head);
    Ok(program)
}

/// The calls that `chains` match fail with `errno`; for all others the program runs on behind
/// itself, where seccompiler would have allowed them.
fn fail(chains: Chains, errno: u16) -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let (go_on, fail) = (SeccompAction::Allow, SeccompAction::Errno(errno.into()));
    let filter = SeccompFilter::new(chains, go_on, fail, TargetArch::x86_64)?;
    let mut program = BpfProgram::try_from(filter)?;
    program.drain(..ARCHITECTURE_CHECK);
    let end = program.len();
    for (index, step) in program.iter_mut().enumerate() {
        if *step == end_with(SeccompAction::Allow) {
            *step = jump(JUMP, u32::try_from(end - index - 1)?, 0, 0);
        }
    }
    Ok(program)
}

/// Allows the call if its number, which is loaded, is one of the sorted `numbers`, and runs on
/// behind itself if not. Cheaper than one comparison after the other, both for each call and when
/// the kernel tries the filter with every number to see which calls it always allows.
fn search(numbers: &[u32]) -> Result<BpfProgram, std::num::TryFromIntError> {
    let mut steps = Vec::new();
    branch(numbers, &mut steps);
    let end = steps.len();
    let mut program = BpfProgram::new();
    for (
        index,
        Step {
            code,
            number,
            then,
            otherwise,
        },
    ) in steps.into_iter().enumerate()
    {
        let distance = |to| {
            u8::try_from(match to {
                To::Step(step) => step - index - 1,
                To::Allow => end - index - 1,
                To::Miss => end - index,
            })
        };
        program.push(jump(code, number, distance(then)?, distance(otherwise)?));
    }
    program.push(end_with(SeccompAction::Allow));
    Ok(program)
}

/// A comparison whose targets are not counted out yet.
struct Step {
    code: u16,
    number: u32,
    then: To,
    otherwise: To,
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum To {
    Step(usize),
    Allow,
    Miss,
}

fn branch(numbers: &[u32], steps: &mut Vec<Step>) {
    if let [first, rest @ ..] = numbers
        && rest.len() < 3
    {
        let otherwise = if rest.is_empty() {
            To::Miss
        } else {
            To::Step(steps.len() + 1)
        };
        steps.push(Step {
            code: JUMP_IF_EQ,
            number: *first,
            then: To::Allow,
            otherwise,
        });
        branch(rest, steps);
    } else if !numbers.is_empty() {
        let (low, high) = numbers.split_at(numbers.len() / 2);
        let at = steps.len();
        let otherwise = To::Step(at + 1);
        steps.push(Step {
            code: JUMP_IF_GE,
            number: high[0],
            then: To::Miss,
            otherwise,
        });
        branch(low, steps);
        steps[at].then = To::Step(steps.len());
        branch(high, steps);
    }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn end_with(action: SeccompAction) -> sock_filter {
    sock_filter {
        code: RETURN,
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
