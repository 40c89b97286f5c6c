//! A command in the guest, with our streams as its own.
//!
//! The connection is always read, so that the command's end and room for its input get through while
//! somebody is slow to read its output. A thread writes each output, and one reads the input.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use cloudlet_agent::connection::{self, Outgoing};
use cloudlet_agent::protocol::{
    self, CHUNK_MAX, End, Exec, Reply, Request, Size, Stream, TAKEN_STEP, WINDOW,
};

use super::{Error, Session, words};

/// What happens to a command from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// A signal, by its number, for its process group.
    Signal(u32),
    /// Its terminal has another size.
    Resize(Size),
}

/// What a command is connected with.
pub struct Streams {
    /// Its standard input.
    pub input: Box<dyn Read + Send>,
    /// Its standard output (on a terminal: all output).
    pub output: Box<dyn Write + Send>,
    /// Its standard error.
    pub error: Box<dyn Write + Send>,
    /// Signals and such.
    pub control: Receiver<Control>,
}

type Requests = Arc<Mutex<Outgoing<UnixStream>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `command` over a connection to the agent, to its end: how it ended, and why it never ran if it
/// did not. If this ends earlier, the agent ends the command.
///
/// # Errors
/// See [`Error`].
pub fn exec(
    stream: UnixStream,
    command: &Exec<'_>,
    streams: Streams,
) -> Result<(End, String), Error> {
    let session = Session::open(stream, &Request::Exec(command.clone()))?;
    let mut incoming = session.incoming;
    let requests: Requests = Arc::new(Mutex::new(session.outgoing));
    let credit = Arc::new(Credit::default());
    let mut outputs = [
        Output::start(Stream::Stdout, streams.output, &requests, &session.stream)?,
        Output::start(Stream::Stderr, streams.error, &requests, &session.stream)?,
    ];
    // Both end with the connection or with the process: a read of a terminal cannot be interrupted.
    let sender = Arc::clone(&requests);
    let granted = Arc::clone(&credit);
    thread::spawn(move || send_input(streams.input, &sender, &granted));
    let sender = Arc::clone(&requests);
    thread::spawn(move || send_control(&streams.control, &sender));

    let ended = loop {
        match incoming.reply() {
            Ok(Reply::Output(stream, bytes)) => {
                if let Err(error) = outputs[stream.index()].pass_on(bytes) {
                    break Err(error.into());
                }
            }
            Ok(Reply::Taken(bytes)) => {
                if let Err(error) = credit.add(bytes) {
                    break Err(error.into());
                }
            }
            Ok(Reply::Exit(end, why)) => break Ok((end, words(why))),
            Ok(Reply::Error(why)) => break Err(Error::Refused(words(why))),
            Ok(_) => break Err(Error::Unexpected),
            Err(error) => break Err(error.into()),
        }
    };
    // Whatever came of it, the agent is to know that it is over. It may know already.
    let _ = session.stream.shutdown(Shutdown::Both);
    // An output that cannot be written is why the connection ended, not the other way round.
    for output in &mut outputs {
        output.finish()?;
    }
    ended
}

/// Room that the agent has for standard input.
#[derive(Debug)]
struct Credit {
    bytes: Mutex<usize>,
    changed: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            bytes: Mutex::new(WINDOW),
            changed: Condvar::new(),
        }
    }
}

impl Credit {
    fn add(&self, bytes: usize) -> Result<(), protocol::Error> {
        let mut credit = lock(&self.bytes);
        *credit += bytes;
        self.changed.notify_all();
        if *credit > WINDOW {
            return Err(protocol::Error::Window);
        }
        Ok(())
    }

    /// Takes room for some of `wanted` bytes; waits until there is any.
    fn take(&self, wanted: usize) -> usize {
        let mut credit = lock(&self.bytes);
        while *credit == 0 {
            credit = self
                .changed
                .wait(credit)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let taken = wanted.min(*credit);
        *credit -= taken;
        taken
    }
}

fn send_input(mut input: Box<dyn Read + Send>, requests: &Requests, credit: &Credit) {
    let mut buffer = vec![0; CHUNK_MAX];
    loop {
        let mut rest = match input.read(&mut buffer) {
            Ok(length) => &buffer[..length],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Input that cannot be read has nothing more to say.
            Err(_) => &[],
        };
        if rest.is_empty() {
            // A connection that is gone is the other thread's to notice.
            let _ = lock(requests).request(&Request::StdinEnd);
            return;
        }
        while !rest.is_empty() {
            let (now, later) = rest.split_at(credit.take(rest.len()));
            if lock(requests).request(&Request::Stdin(now)).is_err() {
                return;
            }
            rest = later;
        }
    }
}

fn send_control(control: &Receiver<Control>, requests: &Requests) {
    for event in control {
        let request = match event {
            Control::Signal(signal) => Request::Signal(signal),
            Control::Resize(size) => Request::Resize(size),
        };
        if lock(requests).request(&request).is_err() {
            return;
        }
    }
}

/// An output of the command, written by a thread.
struct Output {
    to_thread: Option<Sender<Vec<u8>>>,
    thread: Option<JoinHandle<io::Result<()>>>,
    /// Bytes that were received and that the agent was not told of as passed on.
    held: Arc<AtomicUsize>,
}

impl Output {
    fn start(
        stream: Stream,
        sink: Box<dyn Write + Send>,
        requests: &Requests,
        connection: &UnixStream,
    ) -> Result<Self, Error> {
        let (to_thread, pieces) = mpsc::channel();
        let held = Arc::new(AtomicUsize::new(0));
        let requests = Arc::clone(requests);
        let of_thread = Arc::clone(&held);
        let connection = connection.try_clone().map_err(connection::Error::from)?;
        let write = move || {
            let written = write_output(stream, sink, &pieces, &requests, &of_thread);
            if written.is_err() {
                // Nobody reads it any more: the command is of no use. A connection that is gone
                // needs no end.
                let _ = connection.shutdown(Shutdown::Both);
            }
            written
        };
        Ok(Self {
            to_thread: Some(to_thread),
            thread: Some(thread::spawn(write)),
            held,
        })
    }

    /// Has `bytes` written; never more of them wait than the agent was granted.
    fn pass_on(&mut self, bytes: &[u8]) -> Result<(), protocol::Error> {
        if self.held.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len() > WINDOW {
            return Err(protocol::Error::Window);
        }
        if let Some(to_thread) = &self.to_thread {
            // A thread that has ended had an error, which `finish` finds.
            let _ = to_thread.send(bytes.to_vec());
        }
        Ok(())
    }

    /// Waits until everything is written.
    fn finish(&mut self) -> Result<(), Error> {
        drop(self.to_thread.take());
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let written = thread.join();
        written
            .unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
            .map_err(Error::Output)
    }
}

fn write_output(
    stream: Stream,
    mut sink: Box<dyn Write + Send>,
    pieces: &Receiver<Vec<u8>>,
    requests: &Requests,
    held: &AtomicUsize,
) -> io::Result<()> {
    let mut taken = 0;
    for piece in pieces {
        sink.write_all(&piece)?;
        sink.flush()?;
        taken += piece.len();
        if taken >= TAKEN_STEP {
            held.fetch_sub(taken, Ordering::Relaxed);
            // The command may have ended, and the agent with it.
            let _ = lock(requests).request(&Request::Taken(stream, taken));
            taken = 0;
        }
    }
    Ok(())
}
