//! The benches as a program: `bench NAME... [--json]`, where NAME may be `all`.

use std::process::{Command, ExitCode};

use cloudlet_tests::bench::{BENCHES, Bench, Sheet};

fn main() -> ExitCode {
    let mut json = false;
    let mut names = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--json" => json = true,
            "--help" | "-h" => {
                println!("{}", usage());
                return ExitCode::SUCCESS;
            }
            _ => names.push(argument),
        }
    }
    let benches = match pick(&names) {
        Ok(benches) => benches,
        Err(message) => {
            eprintln!("bench: {message}\n\n{}", usage());
            return ExitCode::from(2);
        }
    };
    if let Err(message) = build_program() {
        eprintln!("bench: {message}");
        return ExitCode::FAILURE;
    }
    let mut sheet = Sheet::new(json);
    let mut code = ExitCode::SUCCESS;
    for bench in benches {
        if let Err(failure) = (bench.run)(&mut sheet) {
            eprintln!("bench {}: {failure}", bench.name);
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// Run by cargo, the benches have cargo build the program that they measure, which lies beside them:
/// an old one would give old figures.
fn build_program() -> Result<(), String> {
    let Some(cargo) = std::env::var_os("CARGO") else {
        return Ok(());
    };
    if std::env::var_os("CLOUDLET_BIN").is_some() {
        return Ok(());
    }
    let profile = if cfg!(debug_assertions) {
        "dev"
    } else {
        "release"
    };
    let status = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--package",
            "cloudlet",
            "--profile",
            profile,
        ])
        .status()
        .map_err(|error| format!("cargo cannot be run: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err("cloudlet does not build".to_owned())
    }
}

fn pick(names: &[String]) -> Result<Vec<&'static Bench>, String> {
    if names.is_empty() {
        return Err("no bench named".to_owned());
    }
    if names.iter().any(|name| name == "all") {
        return Ok(BENCHES.iter().collect());
    }
    let find = |name: &String| {
        let found = BENCHES.iter().find(|bench| bench.name == name);
        found.ok_or_else(|| format!("no bench {name:?}"))
    };
    names.iter().map(find).collect()
}

fn usage() -> String {
    let mut text = "bench NAME... [--json]\n\nBenches (or all of them: all):\n".to_owned();
    for bench in BENCHES {
        text.push_str(&format!("  {:<10} {}\n", bench.name, bench.about));
    }
    text.push_str(
        "\nWith --json, one object a figure on a line of its own. FIRECRACKER=PATH runs\n",
    );
    text.push_str(
        "Firecracker beside `start` and `restore`. BENCH_OBJECT_MIB=N makes the database\n",
    );
    text.push_str(
        "of `synthesis` smaller than 100 MiB, BENCH_RATES=38,max picks from its rates: all\n",
    );
    text.push_str("of it takes half an hour.");
    text
}
