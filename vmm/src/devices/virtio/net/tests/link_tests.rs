//! The link: down where nothing is behind the device, lost while it runs, and after a restore.

use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::mmio::MmioTransport;

#[test]
fn without_a_backend_the_link_is_down_and_frames_go_nowhere() {
    let device = net(None);
    let stats = device.stats();
    // Whatever a driver may have agreed with another host's TAP is still agreed.
    let mut driver = Driver::started(Box::new(device), MRG | tap::OFFLOADS | MAC_AND_STATUS);
    assert!(!link_is_up(&mut driver));
    post_rx(&mut driver, 0..4, 2000);
    for _ in 0..300 {
        send(&mut driver, &pattern(60, 1));
        assert!(driver.used(TX).is_some());
    }
    assert_eq!((stats.dropped(), stats.sent()), (300, 0));
    assert!(!stats.is_link_up());
    assert!(driver.used(RX).is_none());
}

#[test]
fn a_backend_that_goes_takes_the_link_down() {
    let (network, wire) = Network::new();
    let device = net(Some(wire));
    let stats = device.stats();
    let mut driver = Driver::started(Box::new(device), MRG | MAC_AND_STATUS);
    post_rx(&mut driver, 0..4, 2000);
    assert!(link_is_up(&mut driver) && stats.is_link_up());
    let generation = driver.read(0xfc);
    drop(network);
    send(&mut driver, &pattern(60, 1));
    assert!(driver.used(TX).is_some());
    assert!(!link_is_up(&mut driver) && !stats.is_link_up());
    assert!(
        driver.interrupt().is_some_and(|bits| bits & 2 != 0),
        "config interrupt"
    );
    assert_ne!(driver.read(0xfc), generation);
    assert!(!driver.needs_reset());
}

/// Saves a running device and restores it over another backend, with the driver it had.
fn restored(driver: &mut Driver, backend: Option<Box<dyn Backend>>) -> Driver {
    driver.transport.pause();
    let state = driver.transport.save();
    let guest = driver.guest.clone();
    let device: Box<dyn VirtioDevice> = Box::new(net(backend));
    let transport = MmioTransport::restore(&state, guest.clone(), device).unwrap();
    let mut restored = Driver::with(guest, transport);
    restored.queues = driver.queues.clone();
    restored
}

#[test]
fn a_restored_device_goes_on_and_says_how_the_link_is() {
    let (mut driver, network) = started(MRG | CSUM | EVENT_IDX);
    post_rx(&mut driver, 0..8, 1000);
    let mut slot = 0;
    network.give(&pattern(1500, 1));
    driver.turn();
    assert_eq!(taken(&mut driver, &mut slot), Some(pattern(1500, 1)));
    assert!(driver.interrupt().is_some());

    // Nothing behind it now: the link goes down, and what is sent is lost.
    let mut down = restored(&mut driver, None);
    assert!(!link_is_up(&mut down));
    down.transport.resume();
    down.turn();
    assert!(down.interrupt().is_some_and(|bits| bits & 2 != 0));
    send(&mut down, &pattern(60, 1));
    assert!(down.used(TX).is_some());
    drop(network);

    // Another network: up again, with the buffers and features from before.
    let (network, wire) = Network::new();
    let mut up = restored(&mut down, Some(wire));
    assert!(link_is_up(&mut up));
    network.give(&pattern(2000, 2));
    up.turn();
    assert_eq!(
        taken(&mut up, &mut slot),
        None,
        "a paused device leaves memory alone"
    );
    up.transport.resume();
    up.turn();
    assert!(up.interrupt().is_some_and(|bits| bits & 2 != 0));
    assert_eq!(
        network.features.load(Ordering::Relaxed) & 0xffff_ffff,
        MRG | CSUM | EVENT_IDX | MAC_AND_STATUS
    );
    assert_eq!(taken(&mut up, &mut slot), Some(pattern(2000, 2)));
    send(&mut up, &pattern(70, 3));
    assert_eq!(network.take(), Some(pattern(70, 3)));

    // The same again, and nothing to tell.
    let (_network, wire) = Network::new();
    let mut same = restored(&mut up, Some(wire));
    same.transport.resume();
    same.turn();
    assert!(same.interrupt().is_none_or(|bits| bits & 2 == 0));
}

#[test]
fn a_driver_that_uses_more_than_the_backend_has_is_not_restored() {
    let driver = Driver::started(Box::new(net(None)), MRG | tap::OFFLOADS);
    driver.transport.pause();
    let state = driver.transport.save();
    let (_network, wire) = Network::new();
    let device = Box::new(net(Some(wire)));
    assert!(MmioTransport::restore(&state, driver.guest.clone(), device).is_err());
}
