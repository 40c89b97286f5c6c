//! The language of the policy files in `resources/seccomp`: text in, rules out.
//!
//! Compiled into the build script, where a bad policy stops the build with `file:line: why`, and
//! into the tests of the crate. It knows nothing of BPF. The grammar, a line at a time
//! (`resources/seccomp/README.md` explains it):
//!
//! ```text
//! line      = [rule] ["#" reason]
//! rule      = SYSCALL [condition {"and" condition}] ["=>" ERRNO]
//! condition = argument ["&" value] "==" value
//!           | argument "in" "{" value {"," value} "}"
//! argument  = "arg" DIGIT [":64"]
//! value     = term {"|" term}
//! term      = CONSTANT | DECIMAL | "0x" HEX
//! ```

use super::tables;
use thiserror::Error;

/// The last argument of a system call, counted from 0.
const ARGUMENT_LAST: u8 = 5;

/// The calls that the violation handler makes itself: a thread that may not make them would die
/// without a word, so each policy must allow them whatever their arguments.
const NEEDED_TO_REPORT: [&str; 2] = ["write", "exit_group"];

/// MAX_ERRNO of include/linux/err.h: what a call can return as an error at all.
const ERRNO_MAX: u16 = 4095;

/// What one thread kind may call: its rules in the order of the file.
#[derive(Debug)]
pub(crate) struct Policy {
    /// Each says something about one call, or about one call under conditions.
    pub(crate) rules: Vec<Rule>,
}

/// What a filter does with a call that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The kernel performs it.
    Allow,
    /// The kernel returns this error without performing it.
    Fail(u16),
}

/// One call, and what happens to it when all the conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Where it stands, counted from 1.
    pub(crate) line: usize,
    /// Name of the system call.
    pub(crate) syscall: String,
    /// Its number on x86-64.
    pub(crate) number: i64,
    /// Empty: any arguments.
    pub(crate) conditions: Vec<Condition>,
    /// What happens then.
    pub(crate) verdict: Verdict,
}

/// `argument & mask == value`, over 32 or 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    /// 0 to 5.
    pub(crate) argument: u8,
    /// Compare all 64 bits (an `unsigned long` in the kernel) and not only the low 32 (an `int`).
    pub(crate) wide: bool,
    /// Bits looked at; `None` for all of them.
    pub(crate) mask: Option<u64>,
    /// What they must be.
    pub(crate) value: u64,
}

/// A policy that cannot be used, as `file:line: why`.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{file}:{line}: {problem}")]
pub(crate) struct PolicyError {
    /// Name of the file as the caller gave it.
    pub(crate) file: String,
    /// Counted from 1; the last line for what is missing from the whole file.
    pub(crate) line: usize,
    /// What is wrong there.
    pub(crate) problem: Problem,
}

/// What can be wrong with a line.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum Problem {
    /// No call of that name exists on x86-64.
    #[error("unknown system call `{0}`")]
    UnknownSyscall(String),
    /// Neither a number nor a constant of the tables.
    #[error("unknown constant `{0}`")]
    UnknownConstant(String),
    /// An argument that is not `arg0` to `arg5`, with `:64` or without.
    #[error("`{0}` is not an argument: write arg0 to arg5, or arg0:64 for all 64 bits")]
    BadArgument(String),
    /// A value that does not fit the 32 bits that are compared.
    #[error("{value:#x} does not fit 32 bits: write arg{argument}:64")]
    TooWide {
        /// Which argument.
        argument: u8,
        /// The value that is too large for it.
        value: u64,
    },
    /// Bits in the value that the mask takes away, so that the condition could never hold.
    #[error("{value:#x} has bits outside the mask {mask:#x}: it would never match")]
    NeverMatches {
        /// Bits looked at.
        mask: u64,
        /// What they should have been.
        value: u64,
    },
    /// A rule without a reason beside it.
    #[error("no reason given: say after `#` why the thread needs `{0}`")]
    NoReason(String),
    /// An error number that no call can return.
    #[error("{0} is not an error number")]
    BadErrno(u64),
    /// Something else was expected.
    #[error("expected {expected}, found {found}")]
    Unexpected {
        /// What the grammar asks for at this place.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// The same call under the same conditions, or with no conditions at all beside some.
    #[error("`{syscall}` is already settled by line {earlier}")]
    Duplicate {
        /// Name of the call.
        syscall: String,
        /// The line it repeats.
        earlier: usize,
    },
    /// The violation handler could not speak.
    #[error("`{0}` must be allowed without conditions: reporting a violation needs it")]
    CannotReport(&'static str),
}

impl Policy {
    /// Reads a whole policy. `file` is only for messages.
    ///
    /// # Errors
    /// The first line that is wrong, and why.
    pub(crate) fn parse(file: &str, text: &str) -> Result<Self, PolicyError> {
        let names = Names {
            syscalls: tables::syscalls(),
            constants: tables::constants(),
        };
        let mut rules: Vec<Rule> = Vec::new();
        let at = |line, problem| PolicyError {
            file: file.to_owned(),
            line,
            problem,
        };
        for (index, text) in text.lines().enumerate() {
            let line = index + 1;
            for rule in names
                .parse_line(line, text)
                .map_err(|problem| at(line, problem))?
            {
                if let Some(earlier) = rules.iter().find(|earlier| earlier.repeats(&rule)) {
                    let (syscall, earlier) = (rule.syscall, earlier.line);
                    return Err(at(line, Problem::Duplicate { syscall, earlier }));
                }
                rules.push(rule);
            }
        }
        for needed in NEEDED_TO_REPORT {
            if !rules
                .iter()
                .any(|rule| rule.syscall == needed && rule.is_plain())
            {
                return Err(at(text.lines().count(), Problem::CannotReport(needed)));
            }
        }
        Ok(Self { rules })
    }
}

impl Rule {
    /// Whether it allows the call whatever its arguments.
    fn is_plain(&self) -> bool {
        self.conditions.is_empty() && self.verdict == Verdict::Allow
    }

    /// Whether `other` says nothing new beside this rule, or the other way round.
    fn repeats(&self, other: &Self) -> bool {
        self.number == other.number
            && (self.conditions.is_empty()
                || other.conditions.is_empty()
                || self.conditions == other.conditions)
    }
}

/// What names mean.
struct Names {
    syscalls: Vec<(&'static str, i64)>,
    constants: Vec<(&'static str, u64)>,
}

impl Names {
    /// The rules of one line: none for a blank one, several where a condition names a set.
    fn parse_line(&self, line: usize, text: &str) -> Result<Vec<Rule>, Problem> {
        let (text, reason) = text.split_once('#').unwrap_or((text, ""));
        let mut words = Words(tokens(text)?.into_iter());
        let Some(syscall) = words.0.next() else {
            return Ok(Vec::new());
        };
        let number = self
            .syscalls
            .iter()
            .find(|(name, _)| *name == syscall)
            .map(|&(_, number)| number)
            .ok_or_else(|| Problem::UnknownSyscall(syscall.to_owned()))?;
        let alternatives = match words.peek() {
            None | Some("=>") => vec![Vec::new()],
            Some(_) => self.parse_conditions(&mut words)?,
        };
        let verdict = match words.0.next() {
            None => Verdict::Allow,
            // The conditions end nowhere else.
            Some(_) => self.parse_error(&mut words)?,
        };
        if reason.trim().is_empty() {
            return Err(Problem::NoReason(syscall.to_owned()));
        }
        Ok(alternatives
            .into_iter()
            .map(|conditions| {
                let syscall = syscall.to_owned();
                Rule {
                    line,
                    syscall,
                    number,
                    conditions,
                    verdict,
                }
            })
            .collect())
    }

    /// The error behind `=>`, and the end of the line.
    fn parse_error(&self, words: &mut Words<'_>) -> Result<Verdict, Problem> {
        let errno = self.parse_term(words.0.next())?;
        if let Some(found) = words.0.next() {
            return Err(unexpected("the end", Some(found)));
        }
        match u16::try_from(errno) {
            Ok(errno @ 1..=ERRNO_MAX) => Ok(Verdict::Fail(errno)),
            _ => Err(Problem::BadErrno(errno)),
        }
    }

    /// Conditions joined by `and`, as the list of all their combinations, up to `=>` or the end.
    fn parse_conditions(&self, words: &mut Words<'_>) -> Result<Vec<Vec<Condition>>, Problem> {
        let mut alternatives = vec![Vec::new()];
        loop {
            let choices = self.parse_condition(words)?;
            alternatives = product(&alternatives, &choices);
            match words.peek() {
                None | Some("=>") => return Ok(alternatives),
                Some("and") => _ = words.0.next(),
                other => return Err(unexpected("`and`, `=>` or the end", other)),
            }
        }
    }

    /// One condition, as the list of its alternatives.
    fn parse_condition(&self, words: &mut Words<'_>) -> Result<Vec<Condition>, Problem> {
        let word = words.0.next();
        let (argument, wide) = parse_argument(word.unwrap_or_default())?;
        let condition = |mask, value| Condition {
            argument,
            wide,
            mask,
            value,
        };
        let conditions = match words.0.next() {
            Some("==") => vec![condition(None, self.parse_value(words)?)],
            Some("&") => {
                let mask = self.parse_value(words)?;
                words.expect("==", "`==` after the mask")?;
                vec![condition(Some(mask), self.parse_value(words)?)]
            }
            Some("in") => {
                words.expect("{", "`{` after `in`")?;
                let mut values = vec![condition(None, self.parse_value(words)?)];
                loop {
                    match words.0.next() {
                        Some(",") => values.push(condition(None, self.parse_value(words)?)),
                        Some("}") => break values,
                        other => return Err(unexpected("`,` or `}`", other)),
                    }
                }
            }
            other => return Err(unexpected("`==`, `&` or `in`", other)),
        };
        conditions.iter().try_for_each(Condition::check)?;
        Ok(conditions)
    }

    /// Terms joined by `|`.
    fn parse_value(&self, words: &mut Words<'_>) -> Result<u64, Problem> {
        let mut value = self.parse_term(words.0.next())?;
        while words.peek() == Some("|") {
            words.0.next();
            value |= self.parse_term(words.0.next())?;
        }
        Ok(value)
    }

    fn parse_term(&self, word: Option<&str>) -> Result<u64, Problem> {
        let word = word.ok_or_else(|| unexpected("a constant or a number", None))?;
        if let Some(&(_, value)) = self.constants.iter().find(|(name, _)| *name == word) {
            return Ok(value);
        }
        let parsed = match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => word.parse(),
        };
        parsed.map_err(|_| Problem::UnknownConstant(word.to_owned()))
    }
}

impl Condition {
    fn check(&self) -> Result<(), Problem> {
        let narrow = u64::from(u32::MAX);
        for value in [self.mask.unwrap_or(0), self.value] {
            if !self.wide && value > narrow {
                return Err(Problem::TooWide {
                    argument: self.argument,
                    value,
                });
            }
        }
        match self.mask {
            Some(mask) if self.value & !mask != 0 => Err(Problem::NeverMatches {
                mask,
                value: self.value,
            }),
            _ => Ok(()),
        }
    }
}

/// The words of a line.
struct Words<'a>(std::vec::IntoIter<&'a str>);

impl<'a> Words<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.0.as_slice().first().copied()
    }

    fn expect(&mut self, word: &str, expected: &'static str) -> Result<(), Problem> {
        match self.0.next() {
            Some(found) if found == word => Ok(()),
            other => Err(unexpected(expected, other)),
        }
    }
}

/// Splits a line into names, numbers and the signs of the grammar.
fn tokens(text: &str) -> Result<Vec<&str>, Problem> {
    let mut rest = text.trim_start();
    let mut tokens = Vec::new();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '=' if rest.starts_with("==") || rest.starts_with("=>") => 2,
            '{' | '}' | ',' | '&' | '|' => 1,
            _ if is_word(first) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            _ => {
                return Err(unexpected(
                    "a name, a number or a sign",
                    Some(rest.trim_end()),
                ));
            }
        };
        let (token, after) = rest.split_at(length);
        tokens.push(token);
        rest = after.trim_start();
    }
    Ok(tokens)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// `arg0` to `arg5`, and whether `:64` follows.
fn parse_argument(word: &str) -> Result<(u8, bool), Problem> {
    let (name, wide) = word
        .strip_suffix(":64")
        .map_or((word, false), |name| (name, true));
    name.strip_prefix("arg")
        .filter(|digit| digit.len() == 1)
        .and_then(|digit| digit.parse().ok())
        .filter(|&argument: &u8| argument <= ARGUMENT_LAST)
        .map(|argument| (argument, wide))
        .ok_or_else(|| Problem::BadArgument(word.to_owned()))
}

/// Each of the lists so far, followed by each of the choices.
fn product(so_far: &[Vec<Condition>], choices: &[Condition]) -> Vec<Vec<Condition>> {
    so_far
        .iter()
        .flat_map(|list| {
            choices
                .iter()
                .map(|&choice| [list.as_slice(), &[choice]].concat())
        })
        .collect()
}

fn unexpected(expected: &'static str, found: Option<&str>) -> Problem {
    let found = found.map_or_else(
        || "the end of the line".to_owned(),
        |word| format!("`{word}`"),
    );
    Problem::Unexpected { expected, found }
}
