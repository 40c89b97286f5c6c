//! The runtime's loop: what the socket brought first, then the application's steps, then sleep.
//!
//! One request is worked on at a time. An answer is sent from where the application keeps it, so the
//! application gets no other request before the device has read all of it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use shared::abi::{Bytes, Services};
use shared::protocol::{Frame, HEADER_LEN, Header, Install, Kind};

use crate::app::{Answer, App, Placing, Space};
use crate::block::Disk;
use crate::peers::{Peers, Ready};
use crate::vsock::{ConnId, Vsock};
use crate::{HEAP, cpu, host, say, store};

/// Steps left out after the machine was moved, so that whoever moved it gets its answer first.
const HOLD_TICKS: u32 = 2;
/// Ticks when there is nothing to step.
const IDLE_TICK_NS: u64 = 4_000_000_000;

/// An answer on its way.
struct Sending {
    to: ConnId,
    head: [u8; HEADER_LEN],
    /// Words of the runtime's own; the application's are in `parts`.
    own: String,
    parts: [Bytes; 2],
    done: usize,
    then_close: bool,
}

/// Everything the runtime has.
pub struct Server {
    vsock: Option<Vsock>,
    disks: Vec<Disk>,
    peers: Peers,
    space: Space,
    memory: u64,
    app: Option<App>,
    sending: Option<Sending>,
    services: &'static mut Services,
    ticks: u32,
    hold: u32,
}

impl Server {
    /// A server over these devices.
    pub fn new(
        vsock: Option<Vsock>,
        disks: Vec<Disk>,
        space: Space,
        memory: u64,
        services: &'static mut Services,
    ) -> Server {
        Server {
            vsock,
            disks,
            peers: Peers::new(space),
            space,
            memory,
            app: None,
            sending: None,
            services,
            ticks: cpu::ticks(),
            hold: 0,
        }
    }

    /// Works for ever.
    pub fn run(mut self) -> ! {
        loop {
            cpu::clear_seen();
            let busy = self.receive() | self.send() | self.work() | self.step();
            if !busy {
                cpu::wait();
            }
        }
    }

    fn receive(&mut self) -> bool {
        let Some(vsock) = &mut self.vsock else {
            return false;
        };
        let busy = vsock.poll(&mut self.peers);
        for (id, bytes) in self.peers.take_consumed() {
            vsock.consumed(id, bytes);
        }
        if core::mem::take(&mut self.peers.moved) {
            self.hold = HOLD_TICKS;
        }
        busy
    }

    /// Moves the answer along. True if that got anywhere.
    fn send(&mut self) -> bool {
        let (Some(vsock), Some(sending)) = (&mut self.vsock, &mut self.sending) else {
            return false;
        };
        let gone = !self.peers.has(sending.to);
        let mut moved = false;
        if !gone {
            let own = Bytes::of(sending.own.as_bytes());
            let parts = [
                Bytes::of(&sending.head),
                own,
                sending.parts[0],
                sending.parts[1],
            ];
            let mut skip = sending.done;
            for part in parts {
                if skip >= part.len {
                    skip -= part.len;
                    continue;
                }
                // SAFETY: our own bytes live in `sending`, which stays in place until the device is
                // done; the application keeps its bytes until its next call.
                let bytes = unsafe { &part.get()[skip..] };
                let sent = vsock.send(sending.to, bytes);
                sending.done += sent;
                moved |= sent > 0;
                if sent < bytes.len() {
                    break;
                }
                skip = 0;
            }
            if sending.done < parts.iter().map(|part| part.len).sum() {
                vsock.want_tx_interrupts(true);
                return moved;
            }
        }
        if vsock.sending() {
            vsock.want_tx_interrupts(true);
            return moved;
        }
        vsock.want_tx_interrupts(false);
        let (to, close) = (sending.to, sending.then_close);
        self.sending = None;
        if close {
            vsock.reset(to);
            self.peers.remove(to);
        } else {
            self.peers.answered(to);
        }
        true
    }

    /// Works on one request, if one is ready and the last answer is out.
    fn work(&mut self) -> bool {
        if self.sending.is_some() {
            return false;
        }
        let Some((id, ready)) = self.peers.take_ready() else {
            return false;
        };
        match ready {
            Ready::Frame(frame) if frame.kind == Kind::Install => match self.begin(&frame) {
                Ok((install, placing)) => self.peers.stream(id, install, placing),
                // The image follows whatever we say, so the connection cannot go on.
                Err(text) => self.reply(id, Err(text), true),
            },
            Ready::Frame(frame) => self.request(id, &frame),
            Ready::Installed(install, placing) => {
                let result = self.install(&install, placing);
                self.reply(id, result, false);
            }
            Ready::Broken(text) => self.reply(id, Err(text), true),
        }
        true
    }

    fn request(&mut self, id: ConnId, frame: &Frame) {
        match frame.kind {
            Kind::Status => {
                let status = self.status();
                self.reply(id, Ok(status), false);
            }
            Kind::Load => {
                let result = self.load();
                self.reply(id, result, false);
            }
            Kind::Call | Kind::Verify => {
                let Some(app) = &mut self.app else {
                    self.reply(id, Err("no application is installed".into()), false);
                    return;
                };
                let answer = match frame.kind {
                    Kind::Call => app.request(&frame.text, &frame.blob),
                    _ => app.verify(),
                };
                self.answer(id, answer);
            }
            Kind::Install | Kind::Ok | Kind::Error => {
                self.reply(
                    id,
                    Err(format!("a {:?} frame is no request", frame.kind)),
                    true,
                );
            }
        }
    }

    /// Sends words of our own.
    fn reply(&mut self, to: ConnId, result: Result<String, String>, then_close: bool) {
        let (kind, own) = match result {
            Ok(text) => (Kind::Ok, text),
            Err(text) => (Kind::Error, text),
        };
        let parts = [Bytes::of(&[]); 2];
        self.start_sending(to, kind, own, parts, then_close);
    }

    /// Sends the application's words.
    fn answer(&mut self, to: ConnId, answer: Answer) {
        // SAFETY: the application keeps its bytes until its next call.
        let text = unsafe { answer.text.get() };
        if core::str::from_utf8(text).is_err() {
            self.reply(
                to,
                Err("the application's answer is not UTF-8".into()),
                false,
            );
            return;
        }
        let kind = if answer.ok { Kind::Ok } else { Kind::Error };
        self.start_sending(to, kind, String::new(), [answer.text, answer.blob], false);
    }

    fn start_sending(
        &mut self,
        to: ConnId,
        kind: Kind,
        own: String,
        parts: [Bytes; 2],
        then_close: bool,
    ) {
        match Header::new(kind, own.len() + parts[0].len, parts[1].len) {
            Ok(header) => {
                let head = header.encode();
                self.sending = Some(Sending {
                    to,
                    head,
                    own,
                    parts,
                    done: 0,
                    then_close,
                });
            }
            Err(error) => {
                let text = format!("the answer cannot be sent: {error}");
                self.reply(to, Err(text), then_close);
            }
        }
    }

    fn begin(&mut self, frame: &Frame) -> Result<(Install, Placing), String> {
        let install = Install::from_frame(frame).map_err(|error| error.to_string())?;
        if self.peers.streaming() {
            return Err("another application is being installed".into());
        }
        let placing = Placing::begin(self.space, install.image_len, install.data_len)?;
        self.stop_app();
        Ok((install, placing))
    }

    fn stop_app(&mut self) {
        self.app = None;
        host::set_tick(IDLE_TICK_NS);
    }

    fn install(&mut self, install: &Install, mut placing: Placing) -> Result<String, String> {
        store::check(&mut placing, install, self.space)?;
        if let Some(disk) = self.disks.iter_mut().find(|disk| disk.writable()) {
            let (image, data) = placing.bytes(self.space)?;
            store::save(disk, install, image, data)?;
            let (install, placing) = store::load(disk, self.space)?;
            return self.start(&install, placing);
        }
        self.start(install, placing)
    }

    fn load(&mut self) -> Result<String, String> {
        if self.peers.streaming() {
            return Err("another application is being installed".into());
        }
        let mut why = String::from("there is no disk");
        for at in 0..self.disks.len() {
            self.stop_app();
            match store::load(&mut self.disks[at], self.space) {
                Ok((install, placing)) => return self.start(&install, placing),
                Err(text) => why = text,
            }
        }
        Err(why)
    }

    fn start(&mut self, install: &Install, placing: Placing) -> Result<String, String> {
        // The services stay in place for ever: one static value, lent to one application at a time,
        // the one before having been stopped.
        let services: *mut Services = self.services;
        // SAFETY: see above.
        let services = unsafe { &mut *services };
        let (app, text) = placing.start(self.space, services, &install.name, &install.params)?;
        say!("cloudlet-guest: {}: {text}", app.name);
        if app.interval > 0 {
            host::set_tick(app.interval);
        }
        self.ticks = cpu::ticks();
        self.app = Some(app);
        Ok(text)
    }

    /// The application's turn, if a tick came. Missed ticks are not made up for.
    fn step(&mut self) -> bool {
        let ticks = cpu::ticks();
        if ticks == self.ticks {
            return false;
        }
        self.ticks = ticks;
        if self.hold > 0 {
            self.hold -= 1;
            return false;
        }
        match &mut self.app {
            Some(app) if app.interval > 0 => {
                app.step(host::now());
                true
            }
            _ => false,
        }
    }

    fn status(&self) -> String {
        let (heap_used, heap_total) = HEAP.usage();
        let (name, interval, steps, calls) = match &self.app {
            Some(app) => (
                format!("\"{}\"", app.name),
                app.interval,
                app.steps,
                app.calls,
            ),
            None => ("null".into(), 0, 0, 0),
        };
        format!(
            "{{\"version\":\"{}\",\"app\":{name},\"step_interval_ns\":{interval},\
             \"steps\":{steps},\"calls\":{calls},\"uptime_ns\":{},\"memory_bytes\":{},\
             \"heap_used_bytes\":{heap_used},\"heap_bytes\":{heap_total},\"disks\":{},\"cid\":{},\"random\":\"{:016x}\"}}",
            env!("GUEST_VERSION"),
            host::now(),
            self.memory,
            self.disks.len(),
            self.vsock.as_ref().map_or(0, Vsock::cid),
            host::random_word(),
        )
    }
}
