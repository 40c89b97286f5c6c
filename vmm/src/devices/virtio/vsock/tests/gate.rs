//! A closed gate: the host's own calls reach the guest, and everything else waits.

use super::*;

const AGENT: u32 = 25_452;

#[test]
fn only_calls_pass_a_closed_gate() {
    let gate = Gate::default();
    gate.close();
    let mut guest = Guest::behind(gate.clone(), EVENT_IDX, 4096, 64);
    assert!(gate.is_driven());
    // A host program that wants in, and a guest's that wants out.
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONNECT 1024\nearly").unwrap();
    let _listener = UnixListener::bind(guest.dir.path().join("v_7")).unwrap();
    let mut out = answer(&Header::default(), op::REQUEST);
    (out.src_port, out.dst_port) = (5, 7);
    guest.transmit(&out, &[]);
    guest.quiet();

    let mut call = gate.call(AGENT).unwrap();
    call.write_all(b"renew").unwrap();
    guest.driver.transport.wake();
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, AGENT);
    let to_host = answer(&request, op::RESPONSE);
    guest.transmit(&to_host, &[]);
    assert_eq!(guest.next().1, b"renew");
    let said = Header {
        op: op::RW,
        ..to_host
    };
    guest.transmit(&said, b"done");
    let expected = format!("OK {}\ndone", request.src_port);
    assert_eq!(read(&mut call), expected.as_bytes());
    // One that the guest refuses ends.
    let mut refused = gate.call(AGENT).unwrap();
    guest.driver.transport.wake();
    let request = guest.expect(op::REQUEST);
    guest.transmit(&answer(&request, op::RST), &[]);
    assert!(is_closed(&mut refused));
    guest.quiet();

    gate.open();
    guest.driver.transport.wake();
    let mut passed = [guest.next().0, guest.next().0];
    passed.sort_by_key(|header| header.op);
    assert_eq!((passed[0].op, passed[0].dst_port), (op::REQUEST, PORT));
    assert_eq!((passed[1].op, passed[1].dst_port), (op::RESPONSE, 5));
    guest.transmit(&answer(&passed[0], op::RESPONSE), &[]);
    assert_eq!(guest.next().1, b"early");
}

#[test]
fn a_device_without_its_driver_takes_no_calls() {
    let gate = Gate::default();
    let mut guest = Guest::behind(gate.clone(), EVENT_IDX, 4096, 4);
    guest.driver.write(0x70, 0);
    assert!(!gate.is_driven());
}
