//! Fetching from files and servers, good, slow and hostile ones, and the project's own server.

mod confined;
mod hostile;
mod link;
mod server;
mod tls;
mod util;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cloudlet::fetch::{Cause, Error, Link, Location, Options, Remote, Trouble};
use cloudlet::serve::{Fate, ServeOptions, Server, Shape};

use util::{Folder, http, impatient, noise, read_all, serve};

#[test]
fn stream_and_ranges_bring_the_bytes() {
    let folder = Folder::new(3_000_000);
    let server = serve(&folder, ServeOptions::default());
    for location in [http(&server), Location::from(folder.file())] {
        let link = Link::new(None);
        let remote = Remote::open(&location, Options::default(), &link).expect("opens");
        assert_eq!(remote.len(), 3_000_000);
        assert!(remote.supports_ranges());
        let mut demand = remote.demand();
        demand.connect().expect("connects");
        let background = std::thread::spawn({
            let mut stream = remote.stream(0);
            move || read_all(&mut stream)
        });
        for (offset, len) in [
            (0, 1),
            (2_999_999, 1),
            (1_234_567, 65_536),
            (0, 3_000_000),
            (7, 0),
        ] {
            let mut bytes = vec![0; len];
            demand.read_range(offset, &mut bytes).expect("fetches");
            let start = usize::try_from(offset).expect("small");
            assert!(
                bytes == folder.bytes[start..start + len],
                "{location} {offset} {len}"
            );
        }
        assert!(background.join().expect("no panic") == folder.bytes);
        let mut one = [0];
        let outside = demand.read_range(3_000_000, &mut one);
        assert!(matches!(
            outside,
            Err(Error::OutOfRange { len: 3_000_000, .. })
        ));
        let outside = demand.read_range(u64::MAX, &mut one);
        assert!(matches!(outside, Err(Error::OutOfRange { .. })));
    }
}

/// Opening costs no byte twice, and all ranges go over one connection.
#[test]
fn connections_are_kept() {
    struct Count(AtomicU64);
    impl Shape for Count {
        fn next_chunk(&self, connection: u64, _: &str, _: u64, _: &mut [u8]) -> Fate {
            self.0.fetch_max(connection, Ordering::Relaxed);
            Fate::Send
        }
    }
    let folder = Folder::new(500_000);
    let count = Arc::new(Count(AtomicU64::new(0)));
    let server = serve(
        &folder,
        ServeOptions {
            shape: Some(count.clone()),
            ..Default::default()
        },
    );
    let remote = Remote::open(&http(&server), Options::default(), &Link::new(None)).expect("opens");
    assert!(read_all(&mut remote.stream(0)) == folder.bytes);
    assert_eq!(server.sent(), 500_000);
    let mut demand = remote.demand();
    for offset in 0..100 {
        demand
            .read_range(offset * 1000, &mut [0; 500])
            .expect("fetches");
    }
    assert_eq!(
        count.0.load(Ordering::Relaxed),
        1,
        "the stream's and the demand's connection"
    );
    assert_eq!(server.requests(), 101);
}

#[test]
fn streams_skip_and_go_back() {
    let folder = Folder::new(4_000_000);
    let server = serve(&folder, ServeOptions::default());
    for location in [http(&server), Location::from(folder.file())] {
        let remote = Remote::open(&location, Options::default(), &Link::new(None)).expect("opens");
        let mut stream = remote.stream(1000);
        for offset in [1000, 5000, 200_000, 3_999_000, 0, 3_000_000, 2_999_999] {
            stream.seek_to(offset);
            let mut bytes = [0; 1000];
            stream.read_exact(&mut bytes).expect("reads");
            let start = usize::try_from(offset).expect("small");
            assert!(
                bytes == folder.bytes[start..start + 1000],
                "{location} at {offset}"
            );
            assert_eq!(stream.position(), offset + 1000);
        }
        assert!(stream.discarded() < 400_000, "{}", stream.discarded());
        stream.seek_to(3_999_999);
        assert!(matches!(
            stream.read_exact(&mut [0; 2]),
            Err(Error::OutOfRange { .. })
        ));
        stream.seek_to(5_000_000);
        assert_eq!(stream.read_some(&mut [0; 2]).expect("the end"), 0);
    }
}

/// Cuts each connection after a while: the transfer goes on where it was, and the hook is told.
#[test]
fn a_cut_connection_is_resumed() {
    struct Scissors(Mutex<Vec<u64>>);
    impl Shape for Scissors {
        fn next_chunk(&self, connection: u64, _: &str, offset: u64, _: &mut [u8]) -> Fate {
            let mut starts = self.0.lock().expect("no panic");
            let index = usize::try_from(connection).expect("small");
            if starts.len() <= index {
                starts.resize(index + 1, offset);
            }
            if offset > starts[index] + 300_000 {
                Fate::Cut
            } else {
                Fate::Send
            }
        }
    }
    let folder = Folder::new(5_000_000);
    let shape = Arc::new(Scissors(Mutex::default()));
    let server = serve(
        &folder,
        ServeOptions {
            shape: Some(shape),
            ..Default::default()
        },
    );
    let (retried, recovered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (retried2, recovered2) = (retried.clone(), recovered.clone());
    let options = Options {
        on_trouble: Some(Arc::new(move |trouble| {
            match trouble {
                Trouble::Retrying {
                    retry, retries: 5, ..
                } if *retry <= 5 => &retried2,
                Trouble::Recovered { .. } => &recovered2,
                other => panic!("{other:?}"),
            }
            .fetch_add(1, Ordering::Relaxed);
        })),
        ..Options::default()
    };
    let remote = Remote::open(&http(&server), options, &Link::new(None)).expect("opens");
    assert!(read_all(&mut remote.stream(0)) == folder.bytes);
    let times = retried.load(Ordering::Relaxed);
    assert!(times >= 5, "{times}");
    assert_eq!(recovered.load(Ordering::Relaxed), times);
    let mut bytes = vec![0; 2_000_000];
    remote
        .demand()
        .read_range(1_000_000, &mut bytes)
        .expect("fetches");
    assert!(bytes == folder.bytes[1_000_000..3_000_000]);
}

/// A server that closes idle connections causes no trouble.
#[test]
fn an_idle_connection_may_end() {
    let folder = Folder::new(100_000);
    let head_timeout = Duration::from_millis(100);
    let server = serve(
        &folder,
        ServeOptions {
            head_timeout,
            ..Default::default()
        },
    );
    let options = Options {
        on_trouble: Some(Arc::new(|trouble| panic!("{trouble:?}"))),
        ..Options::default()
    };
    let remote = Remote::open(&http(&server), options, &Link::new(None)).expect("opens");
    let mut demand = remote.demand();
    demand.connect().expect("connects");
    for offset in [0, 50_000] {
        std::thread::sleep(Duration::from_millis(300));
        let mut bytes = [0; 1000];
        demand.read_range(offset, &mut bytes).expect("fetches");
        let start = usize::try_from(offset).expect("small");
        assert!(bytes == folder.bytes[start..start + 1000]);
    }
}

struct Mute {
    after: u64,
}

impl Shape for Mute {
    fn next_chunk(&self, _: u64, _: &str, offset: u64, _: &mut [u8]) -> Fate {
        if offset >= self.after {
            Fate::Delay(Duration::from_secs(600))
        } else {
            Fate::Send
        }
    }
}

#[test]
fn a_stalled_server_is_an_error_after_the_set_time() {
    let folder = Folder::new(2_000_000);
    let shape: Arc<dyn Shape> = Arc::new(Mute { after: 1_000_000 });
    let server = serve(
        &folder,
        ServeOptions {
            shape: Some(shape),
            ..Default::default()
        },
    );
    let options = Options {
        stall_timeout: Duration::from_millis(300),
        retries: 2,
        ..Options::default()
    };
    let remote = Remote::open(&http(&server), options, &Link::new(None)).expect("opens");
    let mut stream = remote.stream(0);
    let start = Instant::now();
    let error = loop {
        match stream.read_some(&mut [0; 100_000]) {
            Ok(count) => assert_ne!(count, 0),
            Err(error) => break error,
        }
    };
    // Three tries of 300 ms and a back-off of 200 ms.
    let took = start.elapsed();
    assert!((1100..6000).contains(&took.as_millis()), "{took:?}");
    let text = error.to_string();
    assert!(
        text.contains(&server.url("file.bin")) && text.contains("tries: 3"),
        "{text}"
    );
    assert!(
        text.contains(&format!("byte {}", stream.position())),
        "{text}"
    );
    assert!(matches!(
        error,
        Error::Transfer {
            cause: Cause::Stalled(_),
            ..
        }
    ));
    let error = remote
        .demand()
        .read_range(1_500_000, &mut [0; 10])
        .expect_err("stalls");
    assert!(matches!(
        error,
        Error::Transfer {
            cause: Cause::Stalled(_),
            tries: 3,
            ..
        }
    ));
}

#[test]
fn closing_the_link_ends_everything_at_once() {
    let folder = Folder::new(2_000_000);
    let shape: Arc<dyn Shape> = Arc::new(Mute { after: 0 });
    let server = serve(
        &folder,
        ServeOptions {
            shape: Some(shape),
            ..Default::default()
        },
    );
    let link = Link::new(None);
    let remote = Remote::open(&http(&server), Options::default(), &link).expect("opens");
    let threads = [
        std::thread::spawn({
            let mut stream = remote.stream(0);
            move || stream.read_exact(&mut [0; 10])
        }),
        std::thread::spawn({
            let mut demand = remote.demand();
            move || demand.read_range(5, &mut [0; 10])
        }),
    ];
    std::thread::sleep(Duration::from_millis(200));
    assert!(threads.iter().all(|thread| !thread.is_finished()));
    let start = Instant::now();
    link.close();
    for thread in threads {
        assert!(matches!(
            thread.join().expect("no panic"),
            Err(Error::Cancelled)
        ));
    }
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    assert!(matches!(
        remote.demand().read_range(5, &mut [0; 10]),
        Err(Error::Cancelled)
    ));
    assert!(matches!(
        remote.stream(0).read_exact(&mut [0; 10]),
        Err(Error::Cancelled)
    ));
    let again = Remote::open(&http(&server), Options::default(), &link);
    assert!(matches!(again, Err(Error::Cancelled)));
}

#[test]
fn a_file_of_another_length_is_an_error_and_one_with_another_tag_is_noted() {
    let folder = Folder::new(1_000_000);
    let server = serve(&folder, ServeOptions::default());
    let remote = Remote::open(&http(&server), impatient(), &Link::new(None)).expect("opens");
    let mut demand = remote.demand();
    demand.read_range(0, &mut [0; 10]).expect("still the same");
    assert_eq!(remote.replaced(), None);
    let other = noise(7, 1_000_000);
    folder.replace(&other);
    let mut bytes = [0; 10];
    demand.read_range(10, &mut bytes).expect("hashes decide");
    assert_eq!(bytes, other[10..20]);
    let said = remote.replaced().expect("noted");
    assert!(said.starts_with("its entity tag was \""), "{said}");
    folder.replace(&noise(7, 1_000_001));
    let changed = |error| match error {
        Error::Transfer {
            cause: Cause::Changed { was, now },
            tries: 1,
            ..
        } => (was, now),
        error => panic!("{error:?}"),
    };
    let error = demand.read_range(10, &mut bytes).expect_err("longer");
    assert_eq!(changed(error), (1_000_000, 1_000_001));
    let mut stream = remote.stream(900_000);
    let error = stream.read_some(&mut [0; 10]).expect_err("longer");
    assert_eq!(changed(error), (1_000_000, 1_000_001));
}

#[test]
fn local_files_that_shrink_or_are_none() {
    let folder = Folder::new(100_000);
    let location = Location::from(folder.file());
    let remote = Remote::open(&location, Options::default(), &Link::new(None)).expect("opens");
    std::fs::write(folder.file(), b"short").expect("writes");
    let error = remote
        .demand()
        .read_range(50_000, &mut [0; 10])
        .expect_err("too short");
    assert!(matches!(
        error,
        Error::Transfer {
            cause: Cause::Shrunk,
            ..
        }
    ));
    for bad in [folder.path.clone(), folder.path.join("missing")] {
        let error = Remote::open(&bad.clone().into(), Options::default(), &Link::new(None));
        let text = error.expect_err("no file").to_string();
        assert!(text.contains(&*bad.to_string_lossy()), "{text}");
    }
}

#[test]
fn empty_files_and_missing_ones() {
    let folder = Folder::new(0);
    let server = serve(&folder, ServeOptions::default());
    let remote = Remote::open(&http(&server), Options::default(), &Link::new(None)).expect("opens");
    assert!(remote.is_empty());
    assert_eq!(remote.stream(0).read_some(&mut [0; 9]).expect("the end"), 0);
    let location = server.url("other.bin").parse().expect("a URL");
    let error = Remote::open(&location, Options::default(), &Link::new(None)).expect_err("404");
    assert!(matches!(
        error,
        Error::Transfer {
            cause: Cause::Status(404),
            tries: 1,
            ..
        }
    ));
}

/// A name or a port that is not there is reported at once when opening.
#[test]
fn a_server_that_is_not_there() {
    let port = {
        let folder = Folder::new(1);
        let mut server: Server = serve(&folder, ServeOptions::default());
        server.stop();
        server.addr().port()
    };
    let location = format!("http://127.0.0.1:{port}/x").parse().expect("a URL");
    let error = Remote::open(&location, Options::default(), &Link::new(None)).expect_err("closed");
    assert!(matches!(
        error,
        Error::Transfer {
            cause: Cause::Connect { .. },
            tries: 1,
            ..
        }
    ));
}
