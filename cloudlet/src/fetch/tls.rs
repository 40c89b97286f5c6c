//! TLS settings of both sides: rustls with ring, HTTP/1.1 only, certificates from PEM files.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::cause::Cause;
use crate::files;

const ALPN: &[u8] = b"http/1.1";

/// Trusts the certificates of `ca` alone, or without it those that the system trusts.
pub(super) fn client_config(ca: Option<&Path>) -> Result<Arc<ClientConfig>, Cause> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let bad = |source| Cause::Roots {
                path: path.to_owned(),
                source,
            };
            for certificate in CertificateDer::pem_reader_iter(files::open(path)?) {
                roots.add(certificate.map_err(bad)?).map_err(Cause::Tls)?;
            }
        }
        None => {
            // Certificates that cannot be read or parsed are only missing from the set.
            let native = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(native.certs);
        }
    }
    if roots.is_empty() {
        let place = ca.map_or("the system's store".into(), |path| {
            path.display().to_string()
        });
        return Err(Cause::NoRoots(place));
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(Cause::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// Shows `certificates` (leaf first) and proves them with `key`.
pub(crate) fn server_config(
    certificates: Vec<CertificateDer<'static>>,
    key: rustls::pki_types::PrivateKeyDer<'static>,
) -> Result<Arc<rustls::ServerConfig>, rustls::Error> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
