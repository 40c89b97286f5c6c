//! Socket packets of any content, on a device with one open connection: the device never stops for
//! them, and serves the next connection.
//!
//! Most headers are made to hit the open connection, with one or two fields of the input's choice.

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use cloudlet_fuzz::Input;
use cloudlet_vmm::devices::virtio::testing::{BUFFERS, Driver, VERSION_1};
use cloudlet_vmm::devices::virtio::vsock::{HEADER_BYTES, HOST_CID, Header, HostSocket, Vsock};
use libfuzzer_sys::fuzz_target;

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
const RX_BYTES: u32 = 4096;
const TX_BUFFER: u64 = BUFFERS + (1 << 20);
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;

struct Guest {
    driver: Driver,
    dir: tempfile::TempDir,
}

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::new());
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let host = HostSocket::bind(&dir.path().join("v")).expect("a socket");
        let device = Vsock::new(CID, host).expect("a device");
        Self {
            driver: Driver::new(Box::new(device)),
            dir,
        }
    }

    fn start(&mut self) {
        self.driver.start(VERSION_1);
        for slot in 0..32 {
            self.post_rx(slot);
        }
        self.driver.kick_and_turn(RX);
    }

    fn post_rx(&mut self, slot: u16) {
        self.driver.queues[RX].next_descriptor = slot;
        let address = BUFFERS + u64::from(slot) * u64::from(RX_BYTES);
        self.driver.post(RX, &[(address, RX_BYTES, true)]);
    }

    /// Takes in what the device sent, and gives the buffers back.
    fn receive(&mut self) -> Vec<Header> {
        let mut headers = Vec::new();
        self.driver.turn();
        while let Some((slot, len)) = self.driver.used(RX) {
            let address = BUFFERS + u64::from(slot) * u64::from(RX_BYTES);
            let bytes = self.driver.bytes(address, HEADER_BYTES);
            let header = Header::decode(&bytes.try_into().expect("a header"));
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            assert_eq!(header.len as usize + HEADER_BYTES, len as usize);
            headers.push(header);
            self.post_rx(u16::try_from(slot).expect("a slot"));
        }
        self.driver.kick_and_turn(RX);
        headers
    }

    fn transmit(&mut self, header: &Header, payload: u32) {
        self.driver.put(TX_BUFFER, &header.encode());
        let len = u32::try_from(HEADER_BYTES).expect("44") + payload;
        self.driver.post(TX, &[(TX_BUFFER, len, false)]);
        self.driver.kick_and_turn(TX);
        assert!(self.driver.used(TX).is_some());
    }

    /// A connection from a host program to the guest's `port`; what answers it from the guest.
    fn connect(&mut self, port: u32) -> (UnixStream, Header) {
        let mut stream =
            UnixStream::connect(self.dir.path().join("v")).expect("the device listens");
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .expect("a line");
        for _ in 0..64 {
            let found = self.receive();
            let request = |h: &&Header| h.op == REQUEST && h.dst_port == port;
            if let Some(request) = found.iter().find(request) {
                let answer = Header {
                    src_cid: CID,
                    dst_cid: HOST_CID,
                    src_port: port,
                    dst_port: request.src_port,
                    kind: 1,
                    op: RESPONSE,
                    buf_alloc: 65536,
                    ..Header::default()
                };
                self.transmit(&answer, 0);
                return (stream, answer);
            }
        }
        panic!("no request came");
    }
}

/// A header that is the connection's, but for what the input says.
fn header(input: &mut Input<'_>, live: &Header) -> Header {
    let mut header = Header {
        op: u16::from(input.byte() % 9),
        ..*live
    };
    let what = input.byte();
    let word = u32::from_le_bytes(input.array());
    match what % 16 {
        0 => return Header::decode(&input.array()),
        1 => header.src_cid = u64::from_le_bytes(input.array()),
        2 => header.dst_cid = u64::from_le_bytes(input.array()),
        3 => header.src_port = word,
        4 => header.dst_port = word,
        5 => header.len = word,
        6 => header.kind = word as u16,
        7 => header.op = word as u16,
        8 => header.buf_alloc = word,
        9 => header.fwd_cnt = word,
        _ => {}
    }
    header.flags = u32::from(what / 16);
    header
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    GUEST.with_borrow_mut(|guest| {
        guest.start();
        let (mut stream, live) = guest.connect(1024);
        stream.set_nonblocking(true).expect("a socket");
        for _ in 0..64 {
            if input.0.is_empty() {
                break;
            }
            let payload = u32::from(u16::from_le_bytes(input.array()) % 4097);
            let mut header = header(&mut input, &live);
            if header.len == 0 && header.op == 5 {
                header.len = payload;
            }
            guest.transmit(&header, payload);
            match input.byte() % 8 {
                0 => drop(stream.write(&[7; 5000])),
                1 => drop(stream.read(&mut [0; 5000])),
                2 => drop(stream.shutdown(std::net::Shutdown::Write)),
                3 => drop(guest.receive()),
                _ => {}
            }
            assert!(!guest.driver.needs_reset());
        }
        drop(guest.receive());
        let (mut stream, _) = guest.connect(4097);
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).expect("the device answers");
        assert_eq!(&answer, b"OK ");
    });
});
