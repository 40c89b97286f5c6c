//! A command of the host's: its streams, its signals, its end.
//!
//! One loop waits for the connection, the pipes (or the terminal) and the command's end. It reads no
//! output for which the host has not granted room, and always reads the connection, so that nothing
//! waits for anything but the stream that it belongs to. The command leads a process group; when the
//! host goes away before the command's end, the group is killed.

mod process;
mod queue;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Error, chain};
use crate::connection::{self, Incoming, Outgoing};
use crate::protocol::{
    self, CHUNK_MAX, Decoder, End, Exec, Reply, Request, Stream, TAKEN_STEP, WINDOW,
};
use process::Running;
use queue::Queue;

/// While so many bytes wait for the host to read them, nothing that makes more is done.
const QUEUE_LEN_MAX: usize = 4 * WINDOW;
/// What ends the input of a terminal (`VEOF` as every terminal begins).
const END_OF_INPUT: u8 = 0x04;

/// Runs `command` to its end.
pub(super) fn run(
    command: &Exec<'_>,
    incoming: Incoming<&UnixStream>,
    mut outgoing: Outgoing<&UnixStream>,
) -> Result<(), Error> {
    let running = match process::start(command) {
        Ok(running) => running,
        Err(error) => return Ok(outgoing.reply(&Reply::Exit(error.end(), &chain(&error)))?),
    };
    let (stream, decoder) = incoming.into_parts();
    stream
        .set_nonblocking(true)
        .map_err(connection::Error::from)?;
    let session = Session {
        stream,
        decoder,
        to_host: Queue::default(),
        running,
        input: Queue::default(),
        input_ended: false,
        input_taken: 0,
        credit: [WINDOW; 2],
        ended: false,
        buffer: vec![0; CHUNK_MAX],
    };
    let status = session.relay()?;
    stream
        .set_nonblocking(false)
        .map_err(connection::Error::from)?;
    Ok(outgoing.reply(&Reply::Exit(end_of(status), ""))?)
}

fn end_of(status: ExitStatus) -> End {
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Code(byte(code)),
        (None, signal) => End::Signal(signal.map_or(0, byte)),
    }
}

struct Session<'s> {
    stream: &'s UnixStream,
    decoder: Decoder,
    to_host: Queue,
    running: Running,
    /// Standard input that the command has not taken; at most [`WINDOW`] bytes and an end.
    input: Queue,
    input_ended: bool,
    /// Bytes it took and the host has not been told of.
    input_taken: usize,
    /// Bytes of each output that the host has room for.
    credit: [usize; 2],
    /// The command itself has ended.
    ended: bool,
    buffer: Vec<u8>,
}

/// What can be done without waiting.
#[derive(Clone, Copy)]
struct Ready {
    requests: bool,
    output: [bool; 2],
    input: bool,
    ended: bool,
}

impl Session<'_> {
    /// Relays until the command has ended and its output is through.
    fn relay(mut self) -> Result<ExitStatus, Error> {
        // What came along with the request is here already.
        self.handle_requests()?;
        loop {
            let ready = self.wait()?;
            if ready.requests {
                self.take_requests()?;
            }
            if ready.input {
                self.feed()?;
            }
            for stream in Stream::ALL {
                if ready.output[stream.index()] {
                    self.take_output(stream)?;
                }
            }
            self.ended |= ready.ended;
            self.to_host
                .write_to(self.stream)
                .map_err(connection::Error::from)?;
            let open = self.running.outputs.iter().flatten().count();
            if self.ended && open == 0 && self.to_host.is_empty() {
                return self
                    .running
                    .reap()
                    .map_err(|error| Error::System("wait for the command", error));
            }
        }
    }

    fn wants_output(&self, stream: Stream) -> bool {
        self.running.outputs[stream.index()].is_some()
            && self.credit[stream.index()] > 0
            && self.to_host.len() < QUEUE_LEN_MAX
    }

    /// Waits for something to do.
    ///
    /// What the command leaves behind may hold its output open for ever: once it has ended, an output
    /// with nothing in it counts as closed.
    fn wait(&mut self) -> Result<Ready, Error> {
        let wanted = Stream::ALL.map(|stream| self.wants_output(stream));
        let settling = self.ended && wanted != [false; 2];
        let ready = self.poll(wanted, settling)?;
        if settling {
            for index in [0, 1] {
                if wanted[index] && !ready.output[index] {
                    self.running.outputs[index] = None;
                }
            }
        }
        Ok(ready)
    }

    fn poll<'s>(&'s self, wanted: [bool; 2], at_once: bool) -> Result<Ready, Error> {
        let may_read = self.to_host.len() < QUEUE_LEN_MAX;
        let mut connection = PollFlags::empty();
        connection.set(PollFlags::IN, may_read);
        connection.set(PollFlags::OUT, !self.to_host.is_empty());
        let mut descriptors = vec![PollFd::new(self.stream, connection)];
        // Where each of the others is, if it is waited for.
        let mut add = |descriptor: Option<BorrowedFd<'s>>, flags| {
            descriptor.map(|descriptor| {
                descriptors.push(PollFd::from_borrowed_fd(descriptor, flags));
                descriptors.len() - 1
            })
        };
        let outputs = &self.running.outputs;
        let output = [0, 1].map(|index| {
            let file = outputs[index].as_ref().filter(|_| wanted[index]);
            add(file.map(AsFd::as_fd), PollFlags::IN)
        });
        let input = self.running.input.as_ref();
        let input = input.filter(|_| !self.input.is_empty());
        let input = add(input.map(AsFd::as_fd), PollFlags::OUT);
        let end = self.running.end.as_ref().filter(|_| !self.ended);
        let end = add(end.map(AsFd::as_fd), PollFlags::IN);
        let timeout = at_once.then_some(Timespec::default());
        rustix::io::retry_on_intr(|| poll(&mut descriptors, timeout.as_ref()))
            .map_err(|error| Error::System("wait for events", error.into()))?;
        // An error or the end of a stream is found by using it.
        let is_ready = |place: Option<usize>| {
            place.is_some_and(|place| !descriptors[place].revents().is_empty())
        };
        let failed = PollFlags::ERR | PollFlags::HUP;
        let requests = descriptors[0].revents();
        Ok(Ready {
            requests: requests.intersects(failed) || requests.contains(PollFlags::IN),
            output: output.map(is_ready),
            input: is_ready(input),
            ended: is_ready(end),
        })
    }

    fn take_requests(&mut self) -> Result<(), Error> {
        match self.decoder.fill(self.stream) {
            Ok(0) => return Err(connection::Error::Ended.into()),
            Ok(_) => {}
            Err(error) if is_transient(&error) => return Ok(()),
            Err(error) => return Err(connection::Error::from(error).into()),
        }
        self.handle_requests()
    }

    fn handle_requests(&mut self) -> Result<(), Error> {
        while let Some(frame) = self.decoder.next_frame()? {
            match Request::decode(frame)? {
                Request::Stdin(bytes) => {
                    if self.input_ended || self.input.len() + bytes.len() > WINDOW {
                        return Err(protocol::Error::Window.into());
                    }
                    match self.running.input {
                        Some(_) => self.input.push(bytes),
                        None => self.input_taken += bytes.len(),
                    }
                }
                Request::StdinEnd => self.input_ended = true,
                Request::Taken(stream, bytes) => {
                    let credit = &mut self.credit[stream.index()];
                    *credit += bytes;
                    if *credit > WINDOW {
                        return Err(protocol::Error::Window.into());
                    }
                }
                Request::Signal(signal) => self.running.signal(signal)?,
                Request::Resize(size) => self.running.resize(size)?,
                _ => return Err(Error::Unexpected),
            }
        }
        self.after_input()
    }

    /// Gives the command what it takes of its input.
    fn feed(&mut self) -> Result<(), Error> {
        let Some(file) = &self.running.input else {
            return Ok(());
        };
        let before = self.input.len();
        if self.input.write_to(file).is_err() {
            // Nobody reads it any more: what still comes is passed on to nobody.
            self.input.clear();
            self.running.input = None;
        }
        self.input_taken += before - self.input.len();
        self.after_input()
    }

    /// Tells the host what was taken, and the command of the end.
    fn after_input(&mut self) -> Result<(), Error> {
        if self.input_taken >= TAKEN_STEP {
            let taken = std::mem::take(&mut self.input_taken);
            self.to_host.reply(&Reply::Taken(taken))?;
        }
        if self.input_ended && self.input.is_empty() && self.running.input.is_some() {
            if self.running.is_on_terminal() && !self.running.told_end {
                self.input.push(&[END_OF_INPUT]);
                self.running.told_end = true;
            } else if !self.running.is_on_terminal() {
                self.running.input = None;
            }
        }
        Ok(())
    }

    /// Sends on what the command has written.
    fn take_output(&mut self, stream: Stream) -> Result<(), Error> {
        let index = stream.index();
        let Some(file) = &mut self.running.outputs[index] else {
            return Ok(());
        };
        let room = self.credit[index].min(CHUNK_MAX);
        match file.read(&mut self.buffer[..room]) {
            Ok(0) => self.running.outputs[index] = None,
            Ok(length) => {
                self.credit[index] -= length;
                let bytes = &self.buffer[..length];
                self.to_host.reply(&Reply::Output(stream, bytes))?;
            }
            Err(error) if is_transient(&error) => {}
            // A terminal that nobody has open any more.
            Err(_) => self.running.outputs[index] = None,
        }
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
