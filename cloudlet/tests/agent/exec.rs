//! Commands: how they end, their streams, signals, terminals.

use std::fs;
use std::io::{self, PipeWriter, Read, Write};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cloudlet::agent::{self, Control, Error, Streams};
use cloudlet_agent::protocol::{End, Exec, Size};

use crate::util::{Agent, Kept, noise, shell, streams, wait_for};

const LARGE: usize = 100 << 20;

#[test]
fn ends_are_passed_on() {
    let agent = Agent::start();
    assert_eq!(agent.shell("true", b"").end(), End::Code(0));
    assert_eq!(agent.shell("exit 7", b"").end(), End::Code(7));
    assert_eq!(agent.shell("kill -9 $$", b"").end(), End::Signal(9));
    assert_eq!(agent.shell("kill -9 $$", b"").end().code(), 137);
    let outcome = agent.shell("echo out; echo err >&2; exit 3", b"");
    assert_eq!(outcome.end(), End::Code(3));
    assert_eq!(outcome.output, b"out\n");
    assert_eq!(outcome.error, b"err\n");
}

#[test]
fn what_cannot_run_says_why() {
    let agent = Agent::start();
    let run = |arguments: &[&'static str], directory: &'static str| {
        let command = Exec {
            arguments: arguments.iter().map(|word| word.as_bytes()).collect(),
            directory: directory.as_bytes(),
            ..Exec::default()
        };
        agent.run(&command, b"").result.unwrap()
    };
    let (end, why) = run(&["no-such-program"], "/");
    assert_eq!(end, End::NotFound);
    assert!(
        why.contains("no-such-program") && why.contains("No such file"),
        "{why}"
    );
    let (end, why) = run(&["/etc/passwd"], "/");
    assert_eq!(end, End::NotRun);
    assert!(why.contains("Permission denied"), "{why}");
    let (end, why) = run(&["true"], "/no/such/directory");
    assert_eq!(end, End::NotRun);
    assert!(why.contains("/no/such/directory"), "{why}");
}

#[test]
fn environment_and_directory_are_the_requests() {
    let agent = Agent::start();
    let mut command = shell("pwd; env | grep -v ^_ | sort | cut -d= -f1; echo $A");
    command.directory = b"usr/bin/..";
    command.environment = vec![b"A=b=c"];
    let outcome = agent.run(&command, b"");
    let text = outcome.text();
    assert!(text.starts_with("/usr\n"), "{text}");
    assert!(text.ends_with("A\nHOME\nPATH\nPWD\nUSER\nb=c\n"), "{text}");
}

#[test]
fn large_streams_come_through_whole() {
    let agent = Agent::start();
    let input = noise(LARGE, 1);
    let outcome = agent.shell("exec cat", &input);
    assert_eq!(outcome.end(), End::Code(0));
    assert!(
        outcome.output == input,
        "{} bytes came back",
        outcome.output.len()
    );
    // Both outputs at once, and none of the input.
    let script = "head -c 30000000 /dev/zero & head -c 20000000 /dev/zero >&2; wait";
    let outcome = agent.shell(script, &input);
    assert_eq!(outcome.end(), End::Code(0));
    assert_eq!(
        (outcome.output.len(), outcome.error.len()),
        (30_000_000, 20_000_000)
    );
}

/// Takes nothing before it is told to.
struct Gate(mpsc::Receiver<()>, Kept);

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Once the sender is gone everything passes.
        let _ = self.0.recv();
        self.1.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_output_that_nobody_reads_holds_up_nothing_else() {
    let agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let script = format!(
        "yes & trap 'kill $!; echo got >&2; exit 5' INT; cat > {}; while :; do sleep 0.01; done",
        mark.display()
    );
    let input = noise(3 << 20, 2);
    let (open, gate) = mpsc::channel();
    let (sender, control) = mpsc::channel();
    let error = Kept::default();
    let streams = Streams {
        input: Box::new(io::Cursor::new(input.clone())),
        output: Box::new(Gate(gate, Kept::default())),
        error: Box::new(error.clone()),
        control,
    };
    let stream = agent.connect();
    let session = thread::spawn(move || agent::exec(stream, &shell(&script), streams));
    // All of the input gets through, while standard output stands still.
    wait_for("the input in a file", || {
        fs::read(&mark).is_ok_and(|got| got == input).then_some(())
    });
    sender.send(Control::Signal(2)).unwrap();
    wait_for("the answer to the signal", || {
        (error.text() == "got\n").then_some(())
    });
    drop(open);
    assert_eq!(session.join().unwrap().unwrap().0, End::Code(5));
}

#[test]
fn input_that_nobody_reads_holds_up_no_signal() {
    let agent = Agent::start();
    let (streams, control, output, _) = streams(io::repeat(7));
    let stream = agent.connect();
    let session = thread::spawn(move || {
        let script = "trap 'exit 6' TERM; echo ready; while :; do sleep 0.01; done";
        agent::exec(stream, &shell(script), streams)
    });
    wait_for("the command", || (output.text() == "ready\n").then_some(()));
    thread::sleep(Duration::from_millis(100));
    control.send(Control::Signal(15)).unwrap();
    assert_eq!(session.join().unwrap().unwrap().0, End::Code(6));
}

#[test]
fn input_after_its_reader_is_gone_is_no_error() {
    let agent = Agent::start();
    let outcome = agent.shell(
        "head -c 3; exec <&-; sleep 0.2; echo done",
        &noise(4 << 20, 3),
    );
    assert_eq!(
        outcome.output,
        [&noise(4 << 20, 3)[..3], b"done\n"].concat()
    );
}

#[test]
fn what_a_command_leaves_behind_is_not_waited_for() {
    let agent = Agent::start();
    let outcome = agent.shell("sleep 1000 & echo $!", b"");
    let pid: u32 = outcome.text().trim().parse().unwrap();
    // It is not ended either: this is how services are started.
    assert!(is_alive(pid));
    assert_eq!(
        agent.shell(&format!("kill -9 {pid}"), b"").end(),
        End::Code(0)
    );
}

fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_host_that_goes_away_ends_the_command_and_its_children() {
    let agent = Agent::start();
    let (read_end, write_end): (_, PipeWriter) = io::pipe().unwrap();
    let (streams, _control, output, _) = streams(read_end);
    let stream = agent.connect();
    let ours = stream.try_clone().unwrap();
    let session = thread::spawn(move || {
        agent::exec(stream, &shell("sleep 1000 & echo $$ $!; wait"), streams)
    });
    let pids = wait_for("the command", || {
        let text = output.text();
        let pids = text.split_ascii_whitespace().map(|word| word.parse().ok());
        pids.collect::<Option<Vec<u32>>>()
            .filter(|pids| pids.len() == 2)
    });
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    ours.shutdown(std::net::Shutdown::Both).unwrap();
    wait_for("the end of both", || {
        (!pids.iter().any(|&pid| is_alive(pid))).then_some(())
    });
    assert!(session.join().unwrap().is_err());
    drop(write_end);
}

#[test]
fn output_that_cannot_be_written_ends_the_command() {
    let agent = Agent::start();
    let (reader, writer) = io::pipe().unwrap();
    let (mut streams, _control, _, error) = streams(io::empty());
    streams.output = Box::new(writer);
    let stream = agent.connect();
    let session =
        thread::spawn(move || agent::exec(stream, &shell("echo $$ >&2; exec yes"), streams));
    let pid: u32 = wait_for("the command", || error.text().trim().parse().ok());
    let mut some = [0; 100];
    (&reader).read_exact(&mut some).unwrap();
    drop(reader);
    let result = session.join().unwrap();
    assert!(
        matches!(&result, Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe),
        "{result:?}"
    );
    wait_for("the end of the command", || (!is_alive(pid)).then_some(()));
}

#[test]
fn a_terminal_is_one() {
    let agent = Agent::start();
    let mut command = shell("stty size; tty; read line; echo got $line; exec cat");
    command.terminal = Some(Size {
        rows: 12,
        columns: 34,
    });
    let outcome = agent.run(&command, b"hello\n");
    let text = outcome.text();
    // What is typed is shown as soon as it is there, which may be between the two.
    assert!(
        text.starts_with("12 34\r\n") || text.contains("\n12 34\r\n"),
        "{text:?}"
    );
    assert!(text.contains("/dev/pts/"), "{text:?}");
    assert!(text.contains("got hello\r\n"), "{text:?}");

    // The interrupt key is the terminal's business, and sizes change.
    let (read_end, mut keyboard) = io::pipe().unwrap();
    let (streams, control, output, _) = streams(read_end);
    let stream = agent.connect();
    let session = thread::spawn(move || {
        let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done";
        let command = Exec {
            terminal: Some(Size::default()),
            ..shell(script)
        };
        agent::exec(stream, &command, streams)
    });
    wait_for("the command", || {
        output.text().contains("ready").then_some(())
    });
    let size = Size {
        rows: 56,
        columns: 78,
    };
    control.send(Control::Resize(size)).unwrap();
    wait_for("the new size", || {
        output.text().contains("56 78").then_some(())
    });
    keyboard.write_all(&[3]).unwrap();
    let end = session.join().unwrap().unwrap().0;
    assert!(matches!(end, End::Signal(2) | End::Code(130)), "{end:?}");
}

#[test]
fn descriptors_and_threads_are_given_back() {
    let agent = Agent::start();
    let count = |what| {
        fs::read_dir(format!("/proc/{}/{what}", agent.pid()))
            .unwrap()
            .count()
    };
    let before = (count("fd"), count("task"));
    for _ in 0..20 {
        assert_eq!(agent.shell("echo a; echo b >&2", b"x").end(), End::Code(0));
    }
    wait_for("the end of all sessions", || {
        ((count("fd"), count("task")) == before).then_some(())
    });
}
