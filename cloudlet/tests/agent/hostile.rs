//! An agent that lies, and a host that does.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use cloudlet::agent::{self, Error};
use cloudlet_agent::connection::{self, Incoming, Outgoing};
use cloudlet_agent::protocol::{
    self, ENTROPY_LEN, End, Entropy, Exec, Reply, Request, Stream, WINDOW,
};
use cloudlet_agent::server::SESSIONS_MAX;
use cloudlet_agent::tree::{Entry, Meta};

use crate::util::{Agent, listing, shell, streams};

const HELLO: Request<'static> = Request::Hello(Entropy([7; ENTROPY_LEN]));

/// A connection to an agent that says `replies` after its hello, whatever it is asked.
fn liar(replies: Vec<Reply<'static>>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut outgoing = Outgoing::new(&theirs);
        for reply in [vec![Reply::Hello], replies].concat() {
            if outgoing.reply(&reply).is_err() {
                return;
            }
        }
        // What the host still says is heard, so that nothing is reset.
        let _ = theirs.shutdown(std::net::Shutdown::Write);
        let _ = std::io::copy(&mut &theirs, &mut std::io::sink());
    });
    ours
}

fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        seconds: 1,
        nanos: 0,
    }
}

fn directory(name: &'static str) -> Reply<'static> {
    let (name, meta) = (name.as_bytes(), meta(0o755));
    Reply::Tree(Entry::Directory { name, meta })
}

fn file(name: &'static str) -> [Reply<'static>; 3] {
    let (name, meta) = (name.as_bytes(), meta(0o4755));
    [
        Reply::Tree(Entry::File { name, meta }),
        Reply::Tree(Entry::Data(b"evil")),
        Reply::Tree(Entry::Data(b"")),
    ]
}

fn link(name: &'static str, target: &'static str) -> Reply<'static> {
    let (name, target, meta) = (name.as_bytes(), target.as_bytes(), meta(0o777));
    Reply::Tree(Entry::Link { name, meta, target })
}

const UP: Reply<'static> = Reply::Tree(Entry::Up);

/// Receives `replies` into a directory beside one that must stay as it is.
fn receive(replies: Vec<Reply<'static>>) -> (Result<(), Error>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("outside")).unwrap();
    fs::write(path("outside/kept"), b"kept").unwrap();
    fs::create_dir(path("inside")).unwrap();
    std::os::unix::fs::symlink("../outside", path("inside/mine")).unwrap();
    let before = listing(&path("outside"));
    let result = agent::get(
        liar(replies),
        OsStr::new("/tree/."),
        &path("inside"),
        &mut |_, _| {},
    );
    assert_eq!(listing(&path("outside")), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    (result.map(drop), listing(&path("inside")))
}

#[test]
fn a_guest_writes_nothing_outside_the_destination() {
    let attack = |entries: Vec<Reply<'static>>| {
        // Were the attack let through, a file would be planted where it leads.
        let mut replies = [vec![directory("")], entries].concat();
        replies.extend(file("planted"));
        replies.extend([UP, UP, UP]);
        let (result, left) = receive(replies);
        assert!(result.is_err(), "{result:?}");
        assert!(
            !left.iter().any(|line| line.contains("partial")),
            "{left:?}"
        );
    };
    for name in ["..", ".", "../outside/kept", "a/b", "/tmp/x", ""] {
        attack(file(name).to_vec());
        attack(vec![directory(name)]);
        attack(vec![link(name, "x")]);
    }
    // Through a link of the stream's own, or of the user's.
    attack(vec![link("l", "../outside"), directory("l")]);
    attack(vec![directory("mine")]);
    // Deeper than directories may be.
    attack(vec![directory("d"); 1000]);
    // A file that never ends.
    attack([&file("f")[..2], &[directory("d")]].concat());
    let (result, left) = receive([&[directory("")], &file("f")[..2]].concat());
    assert!(result.is_err() && left.len() == 1, "{result:?} {left:?}");
}

#[test]
fn a_link_is_replaced_and_not_written_through() {
    let mut replies = vec![directory(""), link("l", "../outside/kept")];
    replies.extend(file("l"));
    replies.extend(file("mine"));
    replies.push(UP);
    let (result, left) = receive(replies);
    result.unwrap();
    // Without the set-user-ID bit that the guest asked for.
    assert_eq!(left.len(), 2);
    assert!(
        left.iter().all(|line| line.contains(" 100755 ")),
        "{left:?}"
    );
}

#[test]
fn a_file_alone_gets_the_hosts_name_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let replies = file("other").to_vec();
    agent::get(liar(replies), OsStr::new("/f"), dir.path(), &mut |_, _| {}).unwrap();
    assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"evil");
    assert_eq!(
        fs::metadata(dir.path().join("f")).unwrap().mode() & 0o7777,
        0o755
    );
}

#[test]
fn an_agent_that_sends_too_much_or_nonsense_is_left() {
    let run = |replies| {
        let (streams, _control, output, _) = streams(std::io::empty());
        let result = agent::exec(liar(replies), &shell("true"), streams);
        (result, output.take().len())
    };
    const PIECE: &[u8] = &[0; 32 << 10];
    // Nobody says that it was passed on, as nobody reads it.
    let (reader, writer) = std::io::pipe().unwrap();
    let (mut stuck, _control, _, _) = streams(std::io::empty());
    stuck.output = Box::new(writer);
    let flood = vec![Reply::Output(Stream::Stdout, PIECE); 2 * WINDOW / PIECE.len()];
    let session = thread::spawn(move || agent::exec(liar(flood), &shell("true"), stuck));
    thread::sleep(Duration::from_millis(200));
    std::io::copy(&mut &reader, &mut std::io::sink()).unwrap();
    let result = session.join().unwrap();
    assert!(
        matches!(
            result,
            Err(Error::Connection(connection::Error::Protocol(
                protocol::Error::Window
            )))
        ),
        "{result:?}"
    );
    assert!(matches!(run(vec![Reply::Done]).0, Err(Error::Unexpected)));
    assert!(run(vec![Reply::Taken(1)]).0.is_err());
    assert!(matches!(run(vec![]).0, Err(Error::Connection(_))));
    let (result, _) = run(vec![Reply::Error("\x1b[2Jevil\r")]);
    assert_eq!(result.unwrap_err().to_string(), "?[2Jevil?");
    let (result, _) = run(vec![Reply::Exit(End::NotFound, "\x1b]0;x\x07")]);
    assert_eq!(result.unwrap().1, "?]0;x?");
}

/// What the agent says to raw bytes, until it closes.
fn say(agent: &Agent, bytes: &[u8]) -> Vec<u8> {
    let mut stream = agent.connect();
    stream.write_all(bytes).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

fn frames(requests: &[Request<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for request in requests {
        request.encode(&mut bytes).unwrap();
    }
    bytes
}

#[test]
fn what_comes_along_with_the_request_is_not_forgotten() {
    let agent = Agent::start();
    let cat = Request::Exec(Exec {
        arguments: vec![b"cat"],
        ..Exec::default()
    });
    let all = [HELLO, cat, Request::Stdin(b"input"), Request::StdinEnd];
    let mut stream = agent.connect();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    stream.write_all(&frames(&all)).unwrap();
    let mut incoming = Incoming::new(stream);
    assert_eq!(incoming.reply().unwrap(), Reply::Hello);
    let output = Reply::Output(Stream::Stdout, b"input");
    assert_eq!(incoming.reply().unwrap(), output);
    assert_eq!(incoming.reply().unwrap(), Reply::Exit(End::Code(0), ""));
}

#[test]
fn other_versions_are_named_in_words() {
    // An agent of the version before: its hello, and its answer to ours.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs
        .write_all(b"\x01\0\0\0\x0c\0\0\0CLDAGENT\x01\0\0\0")
        .unwrap();
    let error = agent::sync(ours).unwrap_err().to_string();
    assert!(
        error.contains("version 1") && error.contains("anew"),
        "{error}"
    );
    // A request that came later than the agent, and those that are only for guests.
    let agent = Agent::start();
    for (request, words) in [
        (
            &b"\x0f\0\0\0\0\0\0\0"[..],
            "does not know what it was asked for (request 0xf)",
        ),
        (&frames(&[Request::PowerOff]), "not expected here"),
    ] {
        let said = [&frames(&[HELLO]), request].concat();
        let answer = String::from_utf8_lossy(&say(&agent, &said)).into_owned();
        assert!(answer.contains(words), "{answer:?}");
    }
}

#[test]
fn the_agent_survives_any_host() {
    let agent = Agent::start();
    let hello = frames(&[HELLO]);
    let long = [&[1, 0, 0, 0], &u32::MAX.to_le_bytes()[..]].concat();
    for bytes in [
        &b""[..],
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 100_000],
        &long,
        &hello,
        &hello[..5],
        &[&hello[..], &hello].concat(),
        &[&hello[..], &frames(&[Request::StdinEnd])].concat(),
        &[&hello[..], b"\x02\0\0\0\x01\0\0\0\x00"].concat(),
    ] {
        say(&agent, bytes);
    }
    // A command of whose streams more is claimed than was sent, and more is sent than was granted.
    let sleep = Request::Exec(Exec {
        arguments: vec![b"sleep", b"1000"],
        ..Exec::default()
    });
    let piece = [0; 32 << 10];
    let flood = vec![Request::Stdin(&piece); WINDOW / piece.len() + 8];
    let claim = vec![Request::Taken(Stream::Stdout, 1)];
    for more in [
        flood,
        claim,
        vec![Request::Signal(9999)],
        vec![Request::Sync],
    ] {
        let requests = [vec![HELLO, sleep.clone()], more].concat();
        let answer = say(&agent, &frames(&requests));
        let mut incoming = Incoming::new(&answer[..]);
        let mut last = String::new();
        while let Ok(reply) = incoming.reply() {
            last = format!("{reply:?}");
        }
        assert!(last.starts_with("Error("), "{last}");
    }
    // Sessions are bounded, and given back.
    let idle: Vec<UnixStream> = (0..80).map(|_| agent.connect()).collect();
    let mut last = idle.last().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut answer = Vec::new();
    let _ = last.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).contains("sessions already"));
    drop(idle);
    crate::util::wait_for("a free session", || {
        agent.shell("true", b"").result.is_ok().then_some(())
    });
    assert!(Path::new(&format!("/proc/{}", agent.pid())).exists());
}

/// It says so instead of its hello.
#[test]
fn an_agent_that_serves_enough_says_so() {
    let agent = Agent::start();
    let sessions: Vec<_> = (0..SESSIONS_MAX).map(|_| agent.connect()).collect();
    for mut session in &sessions {
        // Served, when it greets.
        session.read_exact(&mut [0]).unwrap();
    }
    let busy = format!("serves {SESSIONS_MAX} sessions already");
    let error = agent.shell("true", b"").result.unwrap_err().to_string();
    assert!(error.contains(&busy), "{error}");
    let error = agent::sync(agent.connect()).unwrap_err().to_string();
    assert!(error.contains(&busy), "{error}");
}
