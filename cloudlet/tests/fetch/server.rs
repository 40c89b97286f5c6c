//! The project's own server, spoken to by hand.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use cloudlet::serve::{ServeError, ServeOptions, Server};

use crate::util::{Folder, serve};

/// Sends one request and returns everything that comes back.
fn ask(server: &Server, request: &str) -> String {
    let mut socket = TcpStream::connect(server.addr()).expect("connects");
    socket.write_all(request.as_bytes()).expect("sends");
    let mut response = Vec::new();
    socket
        .read_to_end(&mut response)
        .expect("the server closes");
    String::from_utf8_lossy(&response).into_owned()
}

fn get(server: &Server, target: &str, extra: &str) -> String {
    ask(
        server,
        &format!("GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{extra}\r\n"),
    )
}

#[test]
fn ranges_heads_and_tags() {
    let folder = Folder::new(0);
    folder.replace(b"0123456789");
    let server = serve(&folder, ServeOptions::default());
    let all = get(&server, "/file.bin", "");
    assert!(
        all.starts_with("HTTP/1.1 200 OK\r\n") && all.ends_with("\r\n\r\n0123456789"),
        "{all}"
    );
    let tag = all
        .lines()
        .find_map(|line| line.strip_prefix("ETag: "))
        .expect("a tag")
        .to_owned();
    let middle = get(&server, "/file.bin", "Range: bytes=2-4\r\n");
    assert!(middle.starts_with("HTTP/1.1 206 "), "{middle}");
    assert!(middle.contains("Content-Range: bytes 2-4/10\r\n") && middle.ends_with("\r\n\r\n234"));
    assert!(get(&server, "/file.bin", "Range: bytes=-3\r\n").ends_with("\r\n\r\n789"));
    let outside = get(&server, "/file.bin", "Range: bytes=10-\r\n");
    assert!(outside.starts_with("HTTP/1.1 416 "), "{outside}");
    assert!(
        outside.contains("Content-Range: bytes */10\r\n"),
        "{outside}"
    );
    let same = get(
        &server,
        "/file.bin",
        &format!("Range: bytes=9-\r\nIf-Range: {tag}\r\n"),
    );
    assert!(same.ends_with("\r\n\r\n9"), "{same}");
    let other = get(
        &server,
        "/file.bin",
        "Range: bytes=9-\r\nIf-Range: \"other\"\r\n",
    );
    assert!(
        other.starts_with("HTTP/1.1 200 ") && other.ends_with("0123456789"),
        "{other}"
    );
    let head = ask(&server, "HEAD /file.bin HTTP/1.0\r\n\r\n");
    assert!(
        head.contains("Content-Length: 10\r\n") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    // Two requests at once are answered one after the other.
    let two = ask(
        &server,
        "GET /file.bin HTTP/1.1\r\nRange: bytes=0-0\r\n\r\nGET /file.bin HTTP/1.0\r\n\r\n",
    );
    assert_eq!(two.matches("HTTP/1.1 20").count(), 2, "{two}");
}

/// What a client has already is not sent again, and what it no longer finds is not sent at all.
#[test]
fn conditions_are_heeded() {
    let folder = Folder::new(0);
    folder.replace(b"0123456789");
    let server = serve(&folder, ServeOptions::default());
    let all = get(&server, "/file.bin", "");
    let tag = all.lines().find_map(|line| line.strip_prefix("ETag: "));
    let tag = tag.expect("a tag");
    for fresh in [tag, "*", &format!("W/{tag}"), &format!("\"x\", {tag}")] {
        let field = format!("If-None-Match: {fresh}\r\n");
        for request in [field.clone(), format!("Range: bytes=2-4\r\n{field}")] {
            let answer = get(&server, "/file.bin", &request);
            assert!(answer.starts_with("HTTP/1.1 304 "), "{fresh}: {answer}");
            assert!(answer.contains(&format!("ETag: {tag}\r\n")), "{answer}");
            let no_body = answer.ends_with("\r\n\r\n") && !answer.contains("Content-Length");
            assert!(no_body, "{answer}");
        }
    }
    let stale = get(&server, "/file.bin", "If-None-Match: \"x\"\r\n");
    assert!(stale.ends_with("\r\n\r\n0123456789"), "{stale}");
    let missing = get(&server, "/missing", "If-None-Match: *\r\n");
    assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
    let gone = get(&server, "/file.bin", "If-Match: \"x\"\r\n");
    assert!(gone.starts_with("HTTP/1.1 412 "), "{gone}");
    let there = get(&server, "/file.bin", &format!("If-Match: {tag}\r\n"));
    assert!(there.starts_with("HTTP/1.1 200 "), "{there}");
    // The connection carries the next request.
    let two = format!(
        "GET /file.bin HTTP/1.1\r\nIf-None-Match: {tag}\r\n\r\nGET /file.bin HTTP/1.0\r\n\r\n"
    );
    let two = ask(&server, &two);
    assert!(
        two.starts_with("HTTP/1.1 304 ") && two.ends_with("0123456789"),
        "{two}"
    );
}

#[test]
fn nothing_outside_the_directory_is_served() {
    let outer = Folder::new(1000);
    let inside = outer.path.join("inside");
    std::fs::create_dir_all(inside.join("deeper")).expect("a directory");
    std::fs::write(inside.join("ok"), b"fine").expect("writes");
    std::fs::write(inside.join(".hidden"), b"secret").expect("writes");
    symlink("ok", inside.join("link")).expect("links");
    symlink("../file.bin", inside.join("out")).expect("links");
    symlink(outer.file(), inside.join("absolute")).expect("links");
    symlink("..", inside.join("up")).expect("links");
    symlink("/proc/self/fd/0", inside.join("magic")).expect("links");
    rustix::fs::mkfifoat(rustix::fs::CWD, inside.join("fifo"), rustix::fs::Mode::RUSR)
        .expect("a FIFO");
    let server = Server::bind(&inside, "127.0.0.1:0", ServeOptions::default()).expect("a server");
    for fine in ["/ok", "/link", "/%6fk", "http://elsewhere:1/ok"] {
        assert!(get(&server, fine, "").ends_with("\r\n\r\nfine"), "{fine}");
    }
    for bad in [
        "/../file.bin",
        "/deeper/../../file.bin",
        "/%2e%2e/file.bin",
        "/..%2ffile.bin",
        "/out",
        "/absolute",
        "/up/file.bin",
        "/magic",
        "/fifo",
        "/deeper",
        "/",
        "/.hidden",
        "//etc/passwd",
        "/etc/passwd",
        "/missing",
        "http://elsewhere/../file.bin",
        "http://elsewhere",
    ] {
        let answer = get(&server, bad, "");
        assert!(answer.starts_with("HTTP/1.1 404 "), "{bad}: {answer}");
        assert!(answer.ends_with("\r\n\r\n"), "{bad}: {answer}");
    }
    for (request, status) in [
        ("POST /ok HTTP/1.1\r\nContent-Length: 2\r\n\r\nxx", "405"),
        ("GET /ok HTTP/1.1\r\nContent-Length: 2\r\n\r\n", "400"),
        ("GET ok HTTP/1.1\r\n\r\n", "400"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let answer = ask(&server, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{request:?}: {answer}"
        );
        let allows = answer.contains("\r\nAllow: GET, HEAD\r\n");
        assert_eq!(allows, status == "405", "{request:?}: {answer}");
    }
}

#[test]
fn slow_and_many_clients_are_limited() {
    let folder = Folder::new(1000);
    let options = ServeOptions {
        connections_max: 3,
        head_timeout: Duration::from_millis(300),
        ..Default::default()
    };
    let mut server = serve(&folder, options);
    let connect = || TcpStream::connect(server.addr()).expect("connects");
    let mut slow: Vec<TcpStream> = (0..3).map(|_| connect()).collect();
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(100));
    let mut fourth = String::new();
    connect().read_to_string(&mut fourth).expect("an answer");
    assert!(fourth.starts_with("HTTP/1.1 503 "), "{fourth}");
    // A byte now and then does not buy more time.
    let mut trickle = slow[0].try_clone().expect("clones");
    std::thread::spawn(move || {
        while trickle.write_all(b"G").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    for socket in &mut slow {
        // Closed, or reset because of bytes that nobody read.
        let _ = socket.read_to_end(&mut Vec::new());
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    assert!(get(&server, "/file.bin", "").starts_with("HTTP/1.1 200 "));
    let _open = connect();
    let start = Instant::now();
    server.stop();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    assert!(TcpStream::connect(server.addr()).is_err());
}

#[test]
fn what_cannot_be_served_is_said() {
    let folder = Folder::new(10);
    let bind = |path: &std::path::Path, address: &str| {
        Server::bind(path, address, ServeOptions::default()).expect_err("refused")
    };
    assert!(matches!(
        bind(&folder.file(), "127.0.0.1:0"),
        ServeError::Directory { .. }
    ));
    assert!(matches!(
        bind(&folder.path, "127.0.0.1"),
        ServeError::Listen { .. }
    ));
    let server = serve(&folder, ServeOptions::default());
    let error = bind(&folder.path, &server.addr().to_string());
    assert!(
        error.to_string().contains(&server.addr().to_string()),
        "{error}"
    );
}
