//! HTTPS with a certificate authority of the test's own.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cloudlet::fetch::{Cause, Error, Link, Location, Options, Remote};
use cloudlet::serve::{Fate, ServeError, ServeOptions, Server, Shape};

use crate::util::{Folder, Scripted, impatient, read_all, serve};

/// Writes a new authority and a certificate of it for `names`: authority, certificate, key.
pub(crate) fn certify(folder: &Folder, label: &str, names: &[&str]) -> [PathBuf; 3] {
    let ca_key = rcgen::KeyPair::generate().expect("a key");
    let mut ca = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).expect("a certificate");
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().expect("a key");
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let leaf = rcgen::CertificateParams::new(names).expect("parameters");
    let leaf = leaf.signed_by(&key, &issuer).expect("a certificate");
    [
        ("ca", ca_certificate.pem()),
        ("crt", leaf.pem()),
        ("key", key.serialize_pem()),
    ]
    .map(|(kind, text)| {
        let path = folder.path.join(format!("{label}.{kind}"));
        std::fs::write(&path, text).expect("writes");
        path
    })
}

fn secure(folder: &Folder, certificate: PathBuf, key: PathBuf) -> Server {
    serve(
        folder,
        ServeOptions {
            tls: Some((certificate, key)),
            ..Default::default()
        },
    )
}

fn location(server: &Server) -> Location {
    server.url("file.bin").parse().expect("a URL")
}

fn trusting(ca: PathBuf) -> Options {
    Options {
        ca: Some(ca),
        ..impatient()
    }
}

#[test]
fn the_right_authority_is_trusted_and_no_other() {
    let folder = Folder::new(2_000_000);
    let [ca, certificate, key] = certify(&folder, "right", &["127.0.0.1", "localhost"]);
    let [other_ca, ..] = certify(&folder, "other", &["127.0.0.1"]);
    let server = secure(&folder, certificate, key);
    assert!(server.url("").starts_with("https://"));
    let open = |options| Remote::open(&location(&server), options, &Link::new(None));
    let remote = open(trusting(ca)).expect("opens");
    let mut demand = remote.demand();
    demand.connect().expect("connects");
    let mut stream = remote.stream(0);
    let background = std::thread::spawn(move || read_all(&mut stream));
    for offset in [0, 999_999, 1_900_000] {
        let mut bytes = vec![0; 100_000];
        demand.read_range(offset, &mut bytes).expect("fetches");
        let start = usize::try_from(offset).expect("small");
        assert!(bytes == folder.bytes[start..start + 100_000]);
    }
    assert!(background.join().expect("no panic") == folder.bytes);
    for options in [trusting(other_ca), impatient()] {
        let error = open(options).expect_err("not trusted");
        let Error::Transfer {
            cause: Cause::Tls(cause),
            tries: 1,
            ..
        } = error
        else {
            // A system without any trusted certificate says that instead.
            assert!(
                matches!(
                    error,
                    Error::Transfer {
                        cause: Cause::NoRoots(_),
                        ..
                    }
                ),
                "{error:?}"
            );
            continue;
        };
        assert!(
            matches!(cause, rustls::Error::InvalidCertificate(_)),
            "{cause}"
        );
    }
}

#[test]
fn a_certificate_for_another_name_is_refused() {
    let folder = Folder::new(100);
    let [ca, certificate, key] = certify(&folder, "a", &["elsewhere.example"]);
    let server = secure(&folder, certificate, key);
    let error = Remote::open(&location(&server), trusting(ca), &Link::new(None));
    let error = error.expect_err("another name");
    assert!(
        matches!(
            error,
            Error::Transfer {
                cause: Cause::Tls(_),
                tries: 1,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn bad_certificate_files_are_named() {
    let folder = Folder::new(100);
    let [ca, certificate, key] = certify(&folder, "a", &["127.0.0.1"]);
    let server = secure(&folder, certificate.clone(), key.clone());
    for bad in ["missing.pem", "file.bin", "a.key"] {
        let options = trusting(folder.path.join(bad));
        let error = Remote::open(&location(&server), options, &Link::new(None));
        let Err(Error::Transfer { cause, .. }) = error else {
            panic!("{bad} was trusted")
        };
        assert!(cause.to_string().contains(bad), "{cause}");
    }
    let bind = |certificate, key| {
        let tls = Some((certificate, key));
        Server::bind(
            &folder.path,
            "127.0.0.1:0",
            ServeOptions {
                tls,
                ..Default::default()
            },
        )
    };
    assert!(matches!(
        bind(certificate.clone(), ca),
        Err(ServeError::Pem { .. })
    ));
    let [_, other, _] = certify(&folder, "b", &["127.0.0.1"]);
    assert!(matches!(bind(other, key), Err(ServeError::Tls(_))));
}

/// Plain servers behind https URLs, https servers behind http ones, and a cut TLS stream.
#[test]
fn tls_is_neither_dropped_nor_mistaken() {
    let folder = Folder::new(1_000_000);
    let [ca, certificate, key] = certify(&folder, "a", &["127.0.0.1"]);
    let plain = Scripted::new(|_, _, socket| {
        let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        false
    });
    let wrong: Location = format!("https://{}/x", plain.address)
        .parse()
        .expect("a URL");
    let hurried = Options {
        connect_timeout: Duration::from_millis(300),
        ..trusting(ca.clone())
    };
    let error = Remote::open(&wrong, hurried, &Link::new(None)).expect_err("no handshake");
    assert!(matches!(
        error,
        Error::Transfer {
            cause: Cause::Stalled(_),
            tries: 2,
            ..
        }
    ));

    struct CutOnce;
    impl Shape for CutOnce {
        fn next_chunk(&self, connection: u64, _: &str, offset: u64, _: &mut [u8]) -> Fate {
            if connection == 0 && offset > 500_000 {
                Fate::Cut
            } else {
                Fate::Send
            }
        }
    }
    let options = ServeOptions {
        tls: Some((certificate, key)),
        shape: Some(Arc::new(CutOnce)),
        ..Default::default()
    };
    let server = serve(&folder, options);
    let wrong = server
        .url("file.bin")
        .replace("https:", "http:")
        .parse()
        .expect("a URL");
    let error = Remote::open(&wrong, impatient(), &Link::new(None)).expect_err("not HTTP");
    assert!(matches!(error, Error::Transfer { .. }));
    let remote = Remote::open(&location(&server), trusting(ca), &Link::new(None)).expect("opens");
    assert!(read_all(&mut remote.stream(0)) == folder.bytes);
}

#[test]
fn redirects_lead_from_http_to_https_only() {
    let folder = Folder::new(1000);
    let [ca, certificate, key] = certify(&folder, "a", &["127.0.0.1"]);
    let server = secure(&folder, certificate.clone(), key.clone());
    let target = server.url("file.bin");
    let up = Scripted::saying(format!("HTTP/1.1 301 M\r\nLocation: {target}\r\n\r\n"));
    let remote = Remote::open(&up.location(), trusting(ca.clone()), &Link::new(None));
    assert!(read_all(&mut remote.expect("opens").stream(0)) == folder.bytes);

    // The way down, by a TLS server that is no more than a redirect.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let down = std::thread::spawn(move || redirect_once(&listener, &certificate, &key));
    let location = format!("https://{address}/x").parse().expect("a URL");
    let error = Remote::open(&location, trusting(ca), &Link::new(None)).expect_err("down");
    assert!(
        matches!(
            error,
            Error::Transfer {
                cause: Cause::Downgrade(_),
                ..
            }
        ),
        "{error:?}"
    );
    down.join().expect("no panic");
}

fn redirect_once(listener: &std::net::TcpListener, certificate: &PathBuf, key: &PathBuf) {
    use rustls::pki_types::pem::PemObject;
    let chain = rustls::pki_types::CertificateDer::pem_file_iter(certificate).expect("reads");
    let chain = chain.collect::<Result<Vec<_>, _>>().expect("certificates");
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(key).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(chain, key))
        .expect("a configuration");
    let (socket, _) = listener.accept().expect("a client");
    let session = rustls::ServerConnection::new(Arc::new(config)).expect("a session");
    let mut stream = rustls::StreamOwned::new(session, socket);
    std::io::Read::read(&mut stream, &mut [0; 4096]).expect("a request");
    let response = b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 0\r\n\r\n";
    stream.write_all(response).expect("sends");
}
