//! A closed gate: frames wait on both sides of it.

use super::*;
use crate::devices::virtio::Gate;

#[test]
fn frames_wait_at_a_closed_gate() {
    let gate = Gate::default();
    gate.close();
    let (network, wire) = Network::new();
    let device = Box::new(net(Some(wire)).behind(gate.clone()));
    let mut driver = Driver::started(device, MAC_AND_STATUS);
    post_rx(&mut driver, 0..4, 2000);
    let (from_guest, to_guest) = (pattern(60, 1), pattern(70, 2));
    send(&mut driver, &from_guest);
    network.give(&to_guest);
    driver.turn();
    assert!(network.take().is_none(), "a frame left the guest");
    assert!(driver.used(RX).is_none(), "a frame reached the guest");
    assert!(driver.used(TX).is_none());
    assert!(link_is_up(&mut driver));
    gate.open();
    driver.transport.wake();
    driver.turn();
    assert_eq!(network.take().unwrap(), from_guest);
    assert_eq!(taken(&mut driver, &mut 0).unwrap(), to_guest);
}
