//! A stream with lengths, as passt and QEMU speak it: whole frames, frames in pieces, nonsense.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

fn stream_net() -> (Driver, UnixStream, Arc<NetStats>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = StreamBackend::new(ours, "passt").unwrap();
    let device = net(Some(Box::new(backend)));
    let stats = device.stats();
    let driver = Driver::started(Box::new(device), MRG | EVENT_IDX | MAC_AND_STATUS);
    (driver, theirs, stats)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    let len = u32::try_from(frame.len()).unwrap();
    [&len.to_be_bytes()[..], frame].concat()
}

#[test]
fn no_offloads_are_offered() {
    let (mut driver, ..) = stream_net();
    driver.write(0x14, 0);
    let features = u64::from(driver.read(0x10));
    assert_eq!(features & tap::OFFLOADS, 0);
    assert_eq!(features & MAC_AND_STATUS, MAC_AND_STATUS);
}

#[test]
fn frames_go_out_behind_their_length() {
    let (mut driver, mut network, stats) = stream_net();
    for len in [1, 60, 1514, 65_549] {
        let frame = pattern(len, len);
        let reader = std::thread::spawn({
            let mut network = network.try_clone().unwrap();
            move || {
                let mut got = vec![0; 4 + len];
                network.read_exact(&mut got).unwrap();
                got
            }
        });
        send(&mut driver, &frame);
        assert!(driver.used(TX).is_some());
        assert_eq!(reader.join().unwrap(), framed(&frame), "{len}");
    }
    assert_eq!(stats.sent(), 4);
    network.set_nonblocking(true).unwrap();
    assert!(network.read(&mut [0; 1]).is_err(), "nothing else");
}

#[test]
fn what_the_socket_does_not_take_waits_and_nothing_is_lost() {
    let (mut driver, mut network, stats) = stream_net();
    let frames: Vec<_> = (0..40).map(|seed| pattern(30_000 + seed, seed)).collect();
    for (slot, frame) in (0..).zip(&frames) {
        let at = TX_BUFFERS + slot * 0x1_0000;
        driver.put(at, &[0xff; HEADER_BYTES]);
        driver.put(at + 12, frame);
        let len = u32::try_from(HEADER_BYTES + frame.len()).unwrap();
        driver.post(TX, &[(at, len, false)]);
    }
    driver.kick_and_turn(TX);
    let before = stats.sent();
    assert!(before > 0 && before < 40, "{before}");
    assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
    let expected: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
    let mut got = vec![0; expected.len()];
    let begin = Instant::now();
    // In steps that fit no frame.
    for part in got.chunks_mut(7919) {
        network.set_nonblocking(true).unwrap();
        let mut done = 0;
        while done < part.len() {
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "the rest does not come"
            );
            match network.read(&mut part[done..]) {
                Ok(count) => done += count,
                Err(_) => driver.turn(),
            }
        }
    }
    assert!(got == expected, "the stream is another");
    driver.turn();
    assert_eq!(stats.sent(), 40);
    assert_eq!(std::iter::from_fn(|| driver.used(TX)).count(), 40);
}

#[test]
fn frames_come_in_whatever_pieces() {
    let (mut driver, mut network, _) = stream_net();
    post_rx(&mut driver, 0..100, 1536);
    let frames = [
        pattern(60, 1),
        pattern(65_550, 2),
        pattern(1514, 3),
        pattern(1, 4),
    ];
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
    let mut slot = 0;
    let mut got = Vec::new();
    for part in bytes.chunks(997) {
        network.write_all(part).unwrap();
        driver.turn();
        got.extend(std::iter::from_fn(|| taken(&mut driver, &mut slot)));
    }
    assert_eq!(got.len(), 4);
    assert!(got == frames);
    // All at once, and the header says nothing.
    network.write_all(&framed(&frames[0])).unwrap();
    network.write_all(&framed(&frames[3])).unwrap();
    driver.turn();
    assert_eq!(
        driver.bytes(BUFFERS + slot * 0x2_0000, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(taken(&mut driver, &mut slot).as_ref(), Some(&frames[0]));
    assert_eq!(taken(&mut driver, &mut slot).as_ref(), Some(&frames[3]));
}

#[test]
fn a_frame_from_the_stream_waits_for_buffers() {
    let (mut driver, mut network, _) = stream_net();
    let frame = pattern(3000, 5);
    network.write_all(&framed(&frame)).unwrap();
    network.write_all(&framed(&frame)).unwrap();
    driver.turn();
    let mut slot = 0;
    for at in 0..8 {
        post_rx(&mut driver, at..at + 1, 1000);
        assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
    }
    assert_eq!(taken(&mut driver, &mut slot).as_ref(), Some(&frame));
    assert_eq!(taken(&mut driver, &mut slot).as_ref(), Some(&frame));
    assert_eq!(slot, 8);
}

#[test]
fn a_length_that_no_frame_has_ends_the_link() {
    for length in [0_u32, 65_555, 1 << 24, u32::MAX] {
        let (mut driver, mut network, stats) = stream_net();
        post_rx(&mut driver, 0..4, 1536);
        network.write_all(&framed(&pattern(60, 1))).unwrap();
        network.write_all(&length.to_be_bytes()).unwrap();
        network.write_all(&[1; 100]).unwrap();
        driver.turn();
        let mut slot = 0;
        assert_eq!(taken(&mut driver, &mut slot), Some(pattern(60, 1)));
        assert!(!stats.is_link_up(), "{length}");
        assert!(!link_is_up(&mut driver));
        // The other end is told by the end of its stream.
        let mut rest = Vec::new();
        assert!(network.read_to_end(&mut rest).is_ok_and(|count| count == 0));
        send(&mut driver, &pattern(60, 1));
        assert!(driver.used(TX).is_some() && !driver.needs_reset());
    }
}

#[test]
fn the_end_of_the_stream_takes_the_link_down() {
    let (mut driver, network, stats) = stream_net();
    post_rx(&mut driver, 0..4, 1536);
    drop(network);
    driver.turn();
    assert!(!stats.is_link_up());
    assert!(driver.interrupt().is_some_and(|bits| bits & 2 != 0));
    assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
}

proptest! {
    /// Frames come out of a stream as they went in, however it was cut.
    #[test]
    fn framing_is_independent_of_pieces(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..30),
        cuts in prop::collection::vec(1_usize..500, 1..60),
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut reader = FrameReader::default();
        let (mut rest, mut got) = (&bytes[..], Vec::new());
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (part, behind) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            prop_assert_eq!(reader.fill(part).unwrap(), part.len());
            rest = behind;
            while let Some(frame) = reader.next_frame().unwrap() {
                got.push(frame.to_vec());
            }
        }
        prop_assert_eq!(got, frames);
    }
}
