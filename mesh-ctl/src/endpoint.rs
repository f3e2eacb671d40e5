//! Where nodes and the control plane are asked, and how they are found.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::cli::{Global, Proof};

/// Directory below which agents make their admin sockets.
pub const RUN_DIR: &str = "/run/undermesh";

/// An HTTP server: a unix socket, or host and port, in the clear or over TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Path of a unix socket.
    Unix(PathBuf),
    /// Host (a bare IPv6 address without brackets) and port.
    Tcp(String, u16),
    /// As `Tcp`, over TLS: the control plane's relay.
    Tls(String, u16),
    /// A node's agent, asked through the control plane.
    Relayed(Box<Relayed>),
}

/// How a node's agent is reached where only the control plane is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relayed {
    /// The node.
    pub node: String,
    /// The control plane.
    pub control: Endpoint,
    /// How it is told who asks.
    pub proof: Proof,
}

/// Why a text is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}; give unix:PATH, http://HOST:PORT or, for the control plane, https://HOST:PORT")]
pub struct InvalidEndpoint(&'static str);

impl FromStr for Endpoint {
    type Err = InvalidEndpoint;

    /// Reads `unix:PATH`, an absolute path, `http://HOST:PORT`, `HOST:PORT` or `https://HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:").or(text.starts_with('/').then_some(text)) {
            // `unix:///run/x` is what some tools write.
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() {
                Err(InvalidEndpoint("the path is empty"))
            } else {
                Ok(Self::Unix(PathBuf::from(path)))
            };
        }
        let secure = text.strip_prefix("https://");
        let rest = secure.or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('/') {
            return Err(InvalidEndpoint("a path is not expected"));
        }
        let Some((host, port)) = authority.rsplit_once(':') else {
            return Err(InvalidEndpoint("the port is missing"));
        };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        match port.parse() {
            _ if host.is_empty() => Err(InvalidEndpoint("the host is missing")),
            Ok(port) if port > 0 && secure.is_some() => Ok(Self::Tls(host.to_owned(), port)),
            Ok(port) if port > 0 => Ok(Self::Tcp(host.to_owned(), port)),
            _ => Err(InvalidEndpoint("the port is no number from 1 to 65535")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "http://[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "http://{host}:{port}"),
            Self::Tls(host, port) if host.contains(':') => write!(f, "https://[{host}]:{port}"),
            Self::Tls(host, port) => write!(f, "https://{host}:{port}"),
            Self::Relayed(relayed) => write!(f, "{} through {}", relayed.node, relayed.control),
        }
    }
}

/// Whom to ask.
#[derive(Debug, Clone)]
pub struct Places {
    /// Node agents; never empty.
    pub nodes: Vec<Endpoint>,
    /// The control plane.
    pub control: Endpoint,
    /// Whether the control plane was named: then its absence is an error.
    pub control_was_named: bool,
    /// Whether it is asked for events in place of the nodes, and nodes are asked through it: it was named, and no node was.
    pub relay: bool,
    /// How it is told who asks.
    pub proof: Proof,
    /// Patience for one answer.
    pub timeout: Duration,
}

impl Places {
    /// What was given, else what is found on this machine, else the default ports.
    #[must_use]
    pub fn new(global: &Global, run_dir: &Path) -> Self {
        let mut nodes = if global.node.is_empty() { sockets(run_dir) } else { global.node.clone() };
        if nodes.is_empty() {
            nodes.push(Endpoint::Tcp("127.0.0.1".to_owned(), 15_000));
        }
        let control = global.control.clone();
        Self {
            nodes,
            control_was_named: control.is_some(),
            relay: control.is_some() && global.node.is_empty(),
            proof: global.proof.clone(),
            control: control.unwrap_or_else(|| Endpoint::Tcp("127.0.0.1".to_owned(), 15_014)),
            timeout: global.timeout,
        }
    }
}

/// `admin.sock` of the directory itself and of each directory in it, in order of their names. A link to the socket
/// of an agent that is gone counts, too: the error about it is what the user has to see.
fn sockets(run_dir: &Path) -> Vec<Endpoint> {
    let entries = std::fs::read_dir(run_dir).map(|dir| dir.flatten().map(|e| e.path()).collect());
    let mut directories: Vec<PathBuf> = entries.unwrap_or_default();
    directories.push(run_dir.to_owned());
    directories.sort();
    let socket = directories.into_iter().map(|dir| dir.join("admin.sock"));
    socket.filter(|path| path.symlink_metadata().is_ok()).map(Endpoint::Unix).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_in_every_usual_spelling_and_printed_in_one() {
        for (text, printed) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("/run/a.sock", "unix:/run/a.sock"),
            ("http://127.0.0.1:15000", "http://127.0.0.1:15000"),
            ("http://node-1:15000/", "http://node-1:15000"),
            ("[::1]:15000", "http://[::1]:15000"),
            ("https://istiod.istio-system.svc:15016", "https://istiod.istio-system.svc:15016"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), printed);
            assert_eq!(printed.parse::<Endpoint>().unwrap(), endpoint);
        }
        for (bad, why) in [
            ("unix:", "path is empty"),
            ("https://a", "port is missing"),
            ("http://a", "port is missing"),
            ("http://:1", "host is missing"),
            ("a:b", "no number"),
            ("a:0", "no number"),
            ("http://a:1/x", "path is not expected"),
        ] {
            let error = bad.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("unix:PATH"), "{bad}: {error}");
        }
    }

    #[test]
    fn events_come_from_the_control_plane_where_it_was_named_and_no_node_was() {
        let relay = |node: &[&str], control: Option<&str>| {
            let node = node.iter().map(|text| text.parse().unwrap()).collect();
            let control = control.map(|text| text.parse().unwrap());
            Places::new(&Global { node, control, ..Global::default() }, Path::new("/nowhere")).relay
        };
        assert!(relay(&[], Some("http://c:1")));
        assert!(!relay(&[], None));
        assert!(!relay(&["http://a:1"], Some("http://c:1")));
    }

    #[test]
    fn sockets_of_all_agents_are_found_and_the_default_port_is_the_last_resort() {
        let dir = tempfile::tempdir().unwrap();
        let nodes = |global: &Global| -> Vec<String> {
            Places::new(global, dir.path()).nodes.iter().map(ToString::to_string).collect()
        };
        assert_eq!(nodes(&Global::default()), ["http://127.0.0.1:15000"]);
        for name in ["b", "a", "without"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("b/admin.sock"), "").unwrap();
        std::os::unix::fs::symlink("agents/7.sock", dir.path().join("a/admin.sock")).unwrap();
        let unix = |name: &str| format!("unix:{}", dir.path().join(name).display());
        assert_eq!(nodes(&Global::default()), [unix("a/admin.sock"), unix("b/admin.sock")]);
        let given = Global { node: vec!["http://x:1".parse().unwrap()], ..Global::default() };
        assert_eq!(nodes(&given), ["http://x:1"]);
    }
}
