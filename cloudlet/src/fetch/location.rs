//! Where an overlay lies, as the user wrote it: a path or an `http`/`https` URL.
//! Only what the client can really use is accepted, everything else is refused with the reason.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest URL taken from a user or a redirect, in bytes.
const URL_BYTES_MAX: usize = 2048;

/// Why a location was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LocationError {
    /// Nothing was given.
    #[error("an empty location: give a path or an http(s) URL")]
    Empty,
    /// A scheme that the client does not speak.
    #[error("unknown scheme {0:?}: give a path, or a URL that starts with http:// or https://")]
    Scheme(String),
    /// Longer than the limit.
    #[error("the URL is longer than {URL_BYTES_MAX} bytes")]
    TooLong,
    /// A character that has to be percent-encoded.
    #[error("the URL contains {0:?}, which has to be percent-encoded")]
    Character(char),
    /// `user@host`.
    #[error("the URL contains a user name or password, which is not supported")]
    UserInfo,
    /// The host part is missing or malformed.
    #[error("the URL's host {0:?} is not a host name or address")]
    Host(String),
    /// The port is no number from 1 to 65535.
    #[error("the URL's port {0:?} is not a number from 1 to 65535")]
    Port(String),
}

/// Where bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of this host.
    File(PathBuf),
    /// A file behind an HTTP or HTTPS server.
    Http(Url),
}

impl FromStr for Location {
    type Err = LocationError;

    /// Anything of the form `scheme://...` is a URL, all else is a path.
    fn from_str(text: &str) -> Result<Self, LocationError> {
        if text.is_empty() {
            return Err(LocationError::Empty);
        }
        match text.split_once("://") {
            Some((scheme, _)) if is_scheme(scheme) => text.parse().map(Location::Http),
            _ => Ok(Location::File(PathBuf::from(text))),
        }
    }
}

impl From<PathBuf> for Location {
    fn from(path: PathBuf) -> Self {
        Location::File(path)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::File(path) => path.display().fmt(f),
            Location::Http(url) => url.fmt(f),
        }
    }
}

/// An `http` or `https` URL, taken apart. Its `Display` leaves the query out, which may be a
/// signed permission that belongs in no log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    tls: bool,
    host: String,
    port: u16,
    target: String,
}

impl Url {
    /// Whether the connection is encrypted.
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Host name, or an address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Path and query, as they stand in the request line.
    pub(super) fn target(&self) -> &str {
        &self.target
    }

    /// The value of the `Host` header.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        };
        if self.port == default_port(self.tls) {
            host
        } else {
            format!("{host}:{}", self.port)
        }
    }

    /// The URL that a redirect's `Location` header means, seen from this one (RFC 3986, 5.2).
    pub(super) fn join(&self, reference: &str) -> Result<Url, LocationError> {
        let reference = reference.split('#').next().unwrap_or_default();
        if let Some((scheme, _)) = reference.split_once("://")
            && is_scheme(scheme)
        {
            return reference.parse();
        }
        if let Some(rest) = reference.strip_prefix("//") {
            return format!("{}://{rest}", self.scheme()).parse();
        }
        check_characters(reference)?;
        let path = self.target.split('?').next().unwrap_or("/");
        let target = if reference.starts_with('/') {
            remove_dot_segments(reference)
        } else if reference.is_empty() || reference.starts_with('?') {
            format!("{path}{reference}")
        } else {
            let folder = path.rfind('/').map_or("/", |end| &path[..=end]);
            remove_dot_segments(&format!("{folder}{reference}"))
        };
        Ok(Url {
            target,
            ..self.clone()
        })
    }

    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

impl FromStr for Url {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        let (scheme, rest) = text.split_once("://").ok_or(LocationError::Empty)?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(LocationError::Scheme(scheme.to_owned())),
        };
        check_characters(text)?;
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        if authority.contains('@') {
            return Err(LocationError::UserInfo);
        }
        let (host, port) = split_authority(authority, default_port(tls))?;
        let target = if target.starts_with('/') {
            target.to_owned()
        } else {
            format!("/{target}")
        };
        Ok(Url {
            tls,
            host,
            port,
            target,
        })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, query) = match self.target.split_once('?') {
            Some((path, _)) => (path, "?..."),
            None => (self.target.as_str(), ""),
        };
        write!(f, "{}://{}{path}{query}", self.scheme(), self.authority())
    }
}

fn default_port(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

/// RFC 3986, 3.1.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// Nothing that could end the request line or that the server would have to guess about.
fn check_characters(text: &str) -> Result<(), LocationError> {
    if text.len() > URL_BYTES_MAX {
        return Err(LocationError::TooLong);
    }
    match text
        .chars()
        .find(|c| !c.is_ascii_graphic() || "\"<>\\^`{|}".contains(*c))
    {
        Some(c) => Err(LocationError::Character(c)),
        None => Ok(()),
    }
}

fn split_authority(authority: &str, port: u16) -> Result<(String, u16), LocationError> {
    let bad_host = || LocationError::Host(authority.to_owned());
    let (host, port_text) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or_else(bad_host)?;
        host.parse::<std::net::Ipv6Addr>().map_err(|_| bad_host())?;
        (
            host,
            if after.is_empty() {
                None
            } else {
                Some(after.strip_prefix(':').ok_or_else(bad_host)?)
            },
        )
    } else {
        let (host, port_text) = match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        let name_like = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if host.is_empty() || host.len() > 253 || !host.chars().all(name_like) {
            return Err(bad_host());
        }
        (host, port_text)
    };
    let port = match port_text {
        None | Some("") => port,
        Some(text) => match text.parse::<u16>() {
            Ok(number) if number != 0 && text.bytes().all(|b| b.is_ascii_digit()) => number,
            _ => return Err(LocationError::Port(text.to_owned())),
        },
    };
    Ok((host.to_ascii_lowercase(), port))
}

/// RFC 3986, 5.2.4, on an absolute path; the query is left as it is.
fn remove_dot_segments(target: &str) -> String {
    let (path, query) = target.split_at(target.find('?').unwrap_or(target.len()));
    let mut kept: Vec<&str> = Vec::new();
    let mut open_end = false;
    for segment in path.split('/').skip(1) {
        open_end = matches!(segment, "." | "..");
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            other => kept.push(other),
        }
    }
    let end = if open_end && !kept.is_empty() {
        "/"
    } else {
        ""
    };
    format!("/{}{end}{query}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().expect("a good URL")
    }

    #[test]
    fn paths_and_urls_are_told_apart() {
        assert_eq!(
            "a/b.overlay".parse(),
            Ok(Location::File("a/b.overlay".into()))
        );
        assert_eq!("a:b".parse(), Ok(Location::File("a:b".into())));
        assert!(matches!("HTTP://h/x".parse(), Ok(Location::Http(_))));
        assert_eq!(
            "ftp://h/x".parse::<Location>(),
            Err(LocationError::Scheme("ftp".into()))
        );
        assert_eq!("".parse::<Location>(), Err(LocationError::Empty));
    }

    #[test]
    fn parts_of_a_url() {
        let u = url("https://Edge.example:8443/a/b?sig=1#part");
        assert!(u.is_tls());
        assert_eq!(
            (u.host(), u.port(), u.target()),
            ("edge.example", 8443, "/a/b?sig=1")
        );
        assert_eq!(u.to_string(), "https://edge.example:8443/a/b?...");
        let u = url("http://[::1]/");
        assert_eq!(
            (u.host(), u.port(), u.authority()),
            ("::1", 80, "[::1]".to_owned())
        );
        assert_eq!(url("http://h?q").target(), "/?q");
        assert_eq!(url("http://h").target(), "/");
    }

    #[test]
    fn bad_urls_are_refused() {
        for (text, why) in [
            ("http://u:p@h/", LocationError::UserInfo),
            ("http://h:0/", LocationError::Port("0".into())),
            ("http://h:+1/", LocationError::Port("+1".into())),
            ("http://h:99999/", LocationError::Port("99999".into())),
            ("http://h/a b", LocationError::Character(' ')),
            ("http://h/a\r\nX: y", LocationError::Character('\r')),
            ("http:///x", LocationError::Host(String::new())),
            ("http://[::g]/x", LocationError::Host("[::g]".into())),
        ] {
            assert_eq!(text.parse::<Url>(), Err(why), "{text:?}");
        }
        assert_eq!(
            format!("http://h/{}", "a".repeat(4000)).parse::<Url>(),
            Err(LocationError::TooLong)
        );
    }

    #[test]
    fn redirects_are_joined() {
        let base = url("http://h:81/a/b/c?q");
        for (reference, whole) in [
            ("/x", "http://h:81/x"),
            ("x", "http://h:81/a/b/x"),
            ("../x", "http://h:81/a/x"),
            ("../../../../x", "http://h:81/x"),
            ("./", "http://h:81/a/b/"),
            ("..", "http://h:81/a/"),
            ("//other/x", "http://other/x"),
            ("https://other/x#f", "https://other/x"),
            ("", "http://h:81/a/b/c"),
        ] {
            assert_eq!(
                base.join(reference).map(|u| u.to_string()),
                Ok(whole.to_owned()),
                "{reference}"
            );
        }
        assert_eq!(
            base.join("?z").map(|u| u.target().to_owned()),
            Ok("/a/b/c?z".to_owned())
        );
        assert!(matches!(
            base.join("gopher://x/"),
            Err(LocationError::Scheme(_))
        ));
    }
}
