//! Firecracker on the same guest, where the variable `FIRECRACKER` names its program: started from
//! a configuration file, snapshotted and restored over its API (HTTP on a Unix socket).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cloudlet_resources::{GUEST_ELF, GUEST_READY};
use serde_json::{Value, json};

use super::vms::{ask, milliseconds, wait_for_banner};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::process::Process;

const LIMIT: Duration = Duration::from_secs(20);
const ANSWER_LEN_MAX: u64 = 64 << 10;

/// The peer's program and its files.
pub(super) struct Firecracker {
    program: PathBuf,
    dir: PathBuf,
}

impl Firecracker {
    /// The peer, if `FIRECRACKER` names one; its files go into a folder of `host`.
    pub(super) fn from_env(host: &Host) -> Outcome<Option<Self>> {
        let Some(program) = std::env::var_os("FIRECRACKER") else {
            return Ok(None);
        };
        let dir = host.path("firecracker");
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("guest.elf"), GUEST_ELF)?;
        Ok(Some(Self {
            program: program.into(),
            dir,
        }))
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    fn machine(&self, memory_mib: u64) -> Value {
        json!({
            "boot-source": { "kernel_image_path": self.path("guest.elf"), "boot_args": "" },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": memory_mib },
            "vsock": { "guest_cid": 3, "uds_path": self.path("vsock.sock") },
        })
    }

    fn spawn(&self, args: &[&str]) -> Outcome<Process> {
        // What an earlier process left would be in the way of the next.
        for socket in ["api.sock", "vsock.sock"] {
            let _ = fs::remove_file(self.dir.join(socket));
        }
        let mut command = Command::new(&self.program);
        Process::spawn(command.args(args).current_dir(&self.dir), Stdio::null())
    }

    /// As `start.first_output`, of a guest of 128 MiB.
    pub(super) fn first_output(&self) -> Outcome<f64> {
        let config = self.path("config.json");
        fs::write(&config, self.machine(128).to_string())?;
        let started = Instant::now();
        let vm = self.spawn(&["--no-api", "--config-file", &config])?;
        wait_for_banner(&vm)?;
        Ok(milliseconds(started.elapsed()))
    }

    /// Boots a guest with `fluid` in it and keeps a snapshot of it.
    pub(super) fn snapshot(&mut self, memory_mib: u64) -> Outcome {
        let config = self.path("config.json");
        fs::write(&config, self.machine(memory_mib).to_string())?;
        let api = self.path("api.sock");
        let vm = self.spawn(&["--api-sock", &api, "--config-file", &config])?;
        vm.wait_for_output(GUEST_READY, LIMIT)?;
        super::vms::install_fluid(&self.dir.join("vsock.sock"))?;
        self.request("PATCH", "/vm", &json!({ "state": "Paused" }))?;
        self.request(
            "PUT",
            "/snapshot/create",
            &json!({
                "snapshot_type": "Full",
                "snapshot_path": self.path("state"),
                "mem_file_path": self.path("memory"),
            }),
        )
    }

    /// As `restore.first_answer`, of the snapshot.
    pub(super) fn first_answer(&self) -> Outcome<f64> {
        let started = Instant::now();
        let _vm = self.spawn(&["--api-sock", &self.path("api.sock")])?;
        self.request(
            "PUT",
            "/snapshot/load",
            &json!({
                "snapshot_path": self.path("state"),
                "mem_backend": { "backend_path": self.path("memory"), "backend_type": "File" },
                "resume_vm": true,
            }),
        )?;
        ask(&self.dir.join("vsock.sock"))?;
        Ok(milliseconds(started.elapsed()))
    }

    /// One request to the API, which must answer with success.
    fn request(&self, method: &str, path: &str, body: &Value) -> Outcome {
        let mut stream = self.connect()?;
        let body = body.to_string();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Connection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes())?;
        let mut answer = Vec::new();
        // The connection is not always closed: an answer without a body ends with its head.
        let mut piece = [0; 1024];
        while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
            let got = (&mut stream).take(ANSWER_LEN_MAX).read(&mut piece)?;
            if got == 0 {
                break;
            }
            answer.extend_from_slice(&piece[..got]);
        }
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.split_ascii_whitespace().nth(1).unwrap_or_default();
        if status.starts_with('2') {
            return Ok(());
        }
        Err(Failure::new(format!(
            "Firecracker answered {method} {path} with: {answer}"
        )))
    }

    /// Connects to the API once it listens.
    fn connect(&self) -> Outcome<UnixStream> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(self.dir.join("api.sock")) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(LIMIT))?;
                    return Ok(stream);
                }
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }
}
