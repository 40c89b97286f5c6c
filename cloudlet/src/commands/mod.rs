//! What each command does, a file a group; here are dispatch and what the groups share.

mod app;
mod base;
mod console;
mod copy;
mod demo;
mod disk;
mod exec;
mod image;
mod net;
mod output;
mod overlay;
mod run;
mod scratch;
mod serve;
mod snapshot;
mod stdio;
mod stop;
mod synthesize;
mod terminal;
mod vm;

use std::io::{self, IsTerminal};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::CommandFactory;
use cloudlet::control::{Client, Request};
use cloudlet::launch::{self, Source, Spec, Vmm};
use cloudlet::paths::Paths;
use cloudlet::registry::{self, VmDir, VmName};
use serde_json::Value;

use crate::cli::{Cli, Command, NewVm};
use output::Output;
pub(crate) use output::{exit_code, tell};
pub(crate) use scratch::SWEEP_COMMAND;
pub(crate) use stop::ANSWER_SECS;

/// Does what `cli` says; the code is the process's.
pub(crate) fn run(cli: &Cli) -> Result<ExitCode> {
    if matches!(cli.command, Command::VmmProcess) {
        cloudlet::process::main();
    }
    if matches!(cli.command, Command::ImageProcess) {
        cloudlet::process::image::main();
    }
    if matches!(cli.command, Command::SweepProcess) {
        scratch::sweep()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Command::Completions { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "cloudlet", &mut script);
        output::print(&script);
        return Ok(ExitCode::SUCCESS);
    }
    let context = Host {
        paths: Paths::from_env()?,
        output: Output::new(cli.json),
    };
    match &cli.command {
        Command::Run(args) => return run::run(&context, args),
        Command::Ps => vm::ps(&context)?,
        Command::Status(vm) => vm::status(&context, &vm.name)?,
        Command::Balloon(args) => vm::balloon(&context, args)?,
        Command::Pause(vm) => vm::change(&context, &vm.name, &Request::Pause { lease: false })?,
        Command::Resume(vm) => vm::change(&context, &vm.name, &Request::Resume)?,
        Command::Shutdown(args) => vm::shutdown(&context, args)?,
        Command::Stop(args) => stop::stop(&context, args)?,
        Command::Console(vm) => return console::console(&context, &vm.name),
        Command::Exec(args) => return Ok(exec::exec(&context, args)),
        Command::Cp(args) => return copy::copy(&context, args),
        Command::Sync(vm) => vm::sync(&context, &vm.name)?,
        Command::Snapshot(args) => snapshot::snapshot(&context, args)?,
        Command::Restore(args) => snapshot::restore(&context, args)?,
        Command::Image(command) => image::image(&context, command)?,
        Command::Base(command) => base::base(&context, command)?,
        Command::Overlay(command) => overlay::overlay(&context, command)?,
        Command::Synthesize(args) => synthesize::synthesize(&context, args)?,
        Command::App(command) => app::app(&context, command)?,
        Command::Call(args) => app::call(&context, args)?,
        Command::Serve(args) => serve::serve(&context, args)?,
        Command::Demo(args) => demo::demo(&context, args)?,
        Command::Completions { .. }
        | Command::VmmProcess
        | Command::ImageProcess
        | Command::SweepProcess => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// What every command has at hand.
pub(crate) struct Host {
    pub(crate) paths: Paths,
    pub(crate) output: Output,
}

impl Host {
    /// The VM named `name`.
    fn find(&self, name: &str) -> Result<VmDir> {
        Ok(registry::find(&self.paths.vms()?, name)?)
    }

    /// A connection to the living VM named `name`.
    fn connect(&self, name: &str) -> Result<Client> {
        let dir = self.find(name)?;
        if !dir.is_alive() {
            let report = launch::read_report(&dir).unwrap_or_else(|| "it was killed".to_owned());
            anyhow::bail!("{name} has ended: {report} (`cloudlet stop {name}` forgets it)");
        }
        Ok(Client::reach(&dir)?)
    }

    /// The socket of a living VM's vsock.
    fn vsock_of(&self, name: &str) -> Result<PathBuf> {
        vsock_in(name, &self.connect(name)?.ask(&Request::Status)?)
    }

    /// As [`Host::vsock_of`], of a VM whose guest can be asked for something: it is not paused. If that
    /// happens later, it is said, once.
    fn guest_of(&self, name: &str) -> Result<PathBuf> {
        let mut client = self.connect(name)?;
        let status = client.ask(&Request::Status)?;
        // One that waits for its memory, or for a snapshot, goes on by itself.
        if status["paused_by"] == "request" {
            anyhow::bail!("{name} is paused, and so is its guest: `cloudlet resume {name}`");
        }
        let owned = name.to_owned();
        // Ends with the process, or with the VM.
        std::thread::spawn(move || {
            if client.ask(&Request::AwaitPause).is_ok() {
                // A command with a terminal has ours raw.
                let end = if io::stderr().is_terminal() { "\r" } else { "" };
                output::tell(&format!(
                    "cloudlet: {owned} is paused: this waits for `cloudlet resume {owned}`{end}"
                ));
            }
        });
        vsock_in(name, &status)
    }

    /// A connection to the agent in the VM named `name`, which is waited for so long.
    fn agent_of(&self, name: &str, patience: Duration) -> Result<UnixStream> {
        cloudlet::agent::connect_within(&self.guest_of(name)?, patience)
            .with_context(|| name.to_owned())
    }

    /// Asks the VM named `name` for something, with a progress bar on a terminal.
    fn ask(&self, name: &str, request: &Request) -> Result<Value> {
        let mut client = self.connect(name)?;
        let progress = self.output.progress();
        let result = client.call(request, &mut |step, done, total| {
            progress.show(step, done, total)
        });
        progress.finish();
        result.with_context(|| format!("{name} did not do it"))
    }

    /// Starts a VM from `source` and waits until it runs.
    fn start(&self, options: &NewVm, attached: bool, prefix: &str, source: Source) -> Result<Vmm> {
        let name = match &options.name {
            Some(name) => VmName::new(name)?,
            None => VmName::generated(prefix),
        };
        let vms = self.paths.vms()?;
        let dir = VmDir::new(&vms, name.clone());
        let vsock = vsock_for(options, &dir)?;
        let nets = net::parse_all(options)?;
        let spec = Spec {
            name: name.to_string(),
            vms,
            attached,
            seccomp: !options.no_seccomp,
            paused: options.paused,
            vsock,
            store: self.paths.store()?,
            scratch: self.paths.scratch()?,
            disk_limits: options.disk_limits.clone(),
            nets,
            source,
        };
        let progress = self.output.progress();
        let started = launch::start(&spec, dir, &mut |step, done, total| {
            progress.show(step, done, total)
        });
        progress.finish();
        started.with_context(|| format!("cannot start {name}"))
    }
}

/// The socket of the vsock of a VM that is started with `options`.
fn vsock_for(options: &NewVm, dir: &VmDir) -> Result<PathBuf> {
    match &options.vsock {
        Some(path) => absolute(path),
        None => Ok(dir.vsock_socket()),
    }
}

/// The socket of the vsock that a VM's status tells of.
fn vsock_in(name: &str, status: &Value) -> Result<PathBuf> {
    if let Some(what) = status["waits_for"].as_str() {
        anyhow::bail!("{name} does not run yet: it waits for {what}");
    }
    let path = status["vsock"].as_str();
    Ok(path.with_context(|| format!("{name} has no vsock"))?.into())
}

/// `path` as a VMM process understands it, which has this process's directory but may outlive it.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)
        .with_context(|| format!("cannot make {} absolute", path.display()))?;
    named(&path)?;
    Ok(path)
}

/// The path as text: results and what a VMM process is told are JSON, which has no other names.
fn named(path: &Path) -> Result<&str> {
    let text = path.to_str();
    text.with_context(|| {
        format!("the path {path:?} is not UTF-8: give it, or a link to it, a name that is")
    })
}

/// As [`absolute`], of a file that must be there.
fn existing(path: &Path, what: &str) -> Result<PathBuf> {
    let path = std::fs::canonicalize(path)
        .with_context(|| format!("cannot find the {what} {}", path.display()))?;
    named(&path)?;
    Ok(path)
}
