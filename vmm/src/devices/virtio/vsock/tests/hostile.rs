//! Guests that do what they should not: unknown connections, too many of them, headers of any value.

use super::*;

#[test]
fn packets_of_unknown_connections_are_reset() {
    let mut guest = Guest::new();
    for op in [
        0,
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        8,
        65535,
    ] {
        let stray = answer(
            &Header {
                src_port: 5,
                dst_port: 6,
                ..Header::default()
            },
            op,
        );
        guest.transmit(&stray, &[]);
        let reset = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (5, 6));
    }
    let stray = answer(
        &Header {
            src_port: 5,
            dst_port: 6,
            ..Header::default()
        },
        op::RST,
    );
    guest.transmit(&stray, &[]);
    guest.transmit(
        &Header {
            src_cid: 9,
            op: op::RW,
            ..stray
        },
        &[],
    );
    guest.transmit_raw(&[0; 43]);
    guest.transmit_raw(&[]);
    guest.quiet();
    for _ in 0..2000 {
        let header = Header {
            op: op::RW,
            ..stray
        };
        guest.driver.put(TX_BUFFER, &header.encode());
        guest.driver.post(TX, &[(TX_BUFFER, 44, false)]);
    }
    assert!(!guest.driver.needs_reset());
}

#[test]
fn connections_are_limited_and_given_back() {
    let mut guest = Guest::new();
    let mut streams: Vec<UnixStream> = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        streams.push(UnixStream::connect(guest.path()).unwrap());
        guest.driver.turn();
    }
    let mut refused = UnixStream::connect(guest.path()).unwrap();
    guest.driver.turn();
    assert!(is_closed(&mut refused));
    streams.truncate(CONNECTIONS_MAX - 1);
    guest.driver.turn();
    let (mut stream, to_host) = guest.connected();
    stream.write_all(b"room again").unwrap();
    assert_eq!(guest.next().1, b"room again");
    // One the guest will not let go of makes room when room is needed.
    drop(stream);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 5\n").unwrap();
    guest.expect(op::RST);
    assert_eq!(guest.expect(op::REQUEST).dst_port, 5);
    guest.transmit(
        &Header {
            op: op::RW,
            ..to_host
        },
        b"?",
    );
    guest.expect(op::RST);
}

fn header() -> impl Strategy<Value = Header> {
    let near = |value: u64| prop_oneof![4 => Just(value), 1 => any::<u64>()];
    let port = prop_oneof![Just(PORT), Just(1_u32 << 30), 0_u32..4, any::<u32>()];
    let word = prop_oneof![Just(0_u32), Just(64 * 1024), 0_u32..200, any::<u32>()];
    (
        (near(CID), near(HOST_CID), port.clone(), port),
        (
            word.clone(),
            prop_oneof![6 => Just(1_u16), 1 => any::<u16>()],
        ),
        (
            prop_oneof![6 => 0_u16..9, 1 => any::<u16>()],
            0_u32..5,
            word.clone(),
            word,
        ),
    )
        .prop_map(
            |((src_cid, dst_cid, src_port, dst_port), (len, kind), rest)| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op: rest.0,
                flags: rest.1,
                buf_alloc: rest.2,
                fwd_cnt: rest.3,
            },
        )
}

/// Found by the property below: shutting a socket raises an edge, and the edge led to shutting it.
#[test]
fn closing_a_direction_settles() {
    for flags in [SHUTDOWN_SEND, SHUTDOWN_RECEIVE] {
        let mut guest = Guest::new();
        let (_stream, to_host) = guest.connected();
        let close = Header {
            op: op::SHUTDOWN,
            flags,
            ..to_host
        };
        guest.transmit(&close, &[]);
        guest.transmit(&close, &[]);
        for _ in 0..4 {
            guest.driver.manager.run_with_timeout(0).unwrap();
        }
        assert_eq!(
            guest.driver.manager.run_with_timeout(0).unwrap(),
            0,
            "still busy"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Every field of the header takes every value, with and without a connection it may hit, and
    /// the device goes on serving the next connection.
    #[test]
    fn no_header_breaks_the_device(headers in prop::collection::vec((header(), 0_usize..300), 1..40)) {
        let mut guest = Guest::new();
        let (mut stream, _) = guest.connected();
        for (header, payload) in headers {
            guest.transmit_raw(&[&header.encode()[..], &vec![7; payload]].concat());
            let _ = stream.write(b"some data");
        }
        prop_assert!(!guest.driver.needs_reset());
        guest.turn();
        guest.inbox.clear();
        let mut stream = UnixStream::connect(guest.path()).unwrap();
        stream.write_all(b"CONNECT 4097\n").unwrap();
        let request = loop {
            let (header, _) = guest.next();
            if header.op == op::REQUEST && header.dst_port == 4097 {
                break header;
            }
        };
        guest.transmit(&answer(&request, op::RESPONSE), &[]);
        stream.set_nonblocking(true).unwrap();
        prop_assert!(read(&mut stream).starts_with(b"OK "));
    }

    #[test]
    fn each_field_of_a_live_connections_packet_flipped(byte in 0_usize..44, bit in 0_u32..8) {
        let mut guest = Guest::new();
        let (mut stream, to_host) = guest.connected();
        let header = Header { op: op::RW, len: 4, ..to_host };
        let mut bytes = [&header.encode()[..], b"data"].concat();
        bytes[byte] ^= 1 << bit;
        guest.transmit_raw(&bytes);
        prop_assert!(!guest.driver.needs_reset());
        // The program gets the data whole, or not at all, or a part and a reset connection.
        let got = read(&mut stream);
        prop_assert!(b"data".starts_with(&got));
    }
}
