//! Peers on the tunnel port that this project did not write: Debian's python with its OpenSSL and python-h2.

use super::pki::Issued;
use super::process::Finished;
use super::{Pod, process};
use crate::scenarios::skip;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// The distribution's python, whatever else is in the path: python-h2 is installed for that one.
pub const PYTHON: &str = "/usr/bin/python3";

const CLIENT: &str = include_str!("../foreign/hbone_client.py");
const SERVER: &str = include_str!("../foreign/hbone_server.py");

/// One request on a connection.
#[derive(Debug, Clone, Serialize)]
pub struct Request {
    method: &'static str,
    authority: String,
    headers: Vec<(String, String)>,
    padding: usize,
    send: String,
}

impl Request {
    /// CONNECT to a destination, and the text to send once it is accepted.
    pub fn connect(authority: impl Into<String>, send: &str) -> Self {
        Self {
            method: "CONNECT",
            authority: authority.into(),
            headers: Vec::new(),
            padding: 0,
            send: send.to_owned(),
        }
    }

    /// A request that is no CONNECT.
    pub fn get(authority: &str) -> Self {
        Self { method: "GET", ..Self::connect(authority, "") }
    }

    /// With headers of so many bytes.
    #[must_use]
    pub fn padded(self, bytes: usize) -> Self {
        Self { padding: bytes, ..self }
    }

    /// With one more header.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// What came of a connection.
#[derive(Debug, Clone, Deserialize)]
pub struct Said {
    /// Why it ended early: a TLS alert, a reset, an error of the protocol. Empty if it did not.
    pub error: String,
    /// URI names in the server's certificate.
    pub server: Vec<String>,
    /// The code of a GOAWAY.
    pub goaway: Option<u32>,
    /// One per request that was made.
    pub answers: Vec<Answer>,
}

/// What came of a request.
#[derive(Debug, Clone, Deserialize)]
pub struct Answer {
    /// `:status`.
    pub status: Option<u16>,
    /// The other headers.
    pub headers: BTreeMap<String, String>,
    /// The bytes, as text.
    pub received: String,
    /// The code of a RST_STREAM.
    pub reset: Option<u32>,
}

/// Makes requests to `to` over one connection from a pod, with a certificate or without.
///
/// # Errors
/// The client itself did not work, or python-h2 is not installed (then the scenario is skipped).
pub fn ask(
    from: &Pod,
    to: impl ToString,
    roots: &Path,
    certificate: Option<&Issued>,
    requests: &[Request],
) -> Result<Said> {
    need_h2()?;
    let ask = serde_json::json!({
        "to": to.to_string(),
        "roots": roots,
        "chain": certificate.map(|c| &c.chain),
        "key": certificate.map(|c| &c.key),
        "requests": requests,
    });
    let script = from.dir.join("hbone_client.py");
    std::fs::write(&script, CLIENT).context("cannot write the HTTP/2 client")?;
    let argv = [PYTHON, &script.to_string_lossy(), &ask.to_string()];
    let done: Finished = process::finish(&from.place, argv, Duration::from_secs(30))?;
    let text = done.ok().context("the HTTP/2 client failed")?;
    serde_json::from_str(text.trim()).with_context(|| format!("the HTTP/2 client said {text:?}"))
}

/// The command of a server on port 15008: a stand-in for a waypoint or gateway. It gives bytes back, or forwards them
/// for the authorities of `targets`.
///
/// # Errors
/// The disk refuses, or python-h2 is not installed (then the scenario is skipped).
pub fn server(
    dir: &Path,
    roots: &Path,
    certificate: &Issued,
    targets: &[(String, SocketAddr)],
) -> Result<Vec<String>> {
    need_h2()?;
    let script = dir.join("hbone_server.py");
    std::fs::write(&script, SERVER).context("cannot write the HTTP/2 server")?;
    let targets: BTreeMap<_, _> = targets.iter().map(|(authority, to)| (authority, to.to_string())).collect();
    let ask = serde_json::json!({
        "port": 15_008,
        "roots": roots,
        "chain": certificate.chain,
        "key": certificate.key,
        "targets": targets,
    });
    Ok(vec![PYTHON.to_owned(), script.to_string_lossy().into_owned(), ask.to_string()])
}

/// A CONNECT that the server got.
#[derive(Debug, Clone, Deserialize)]
pub struct Asked {
    /// The client's address.
    pub from: SocketAddr,
    /// URI names in its certificate.
    pub identity: Vec<String>,
    /// All headers, `:method` and `:authority` too.
    pub headers: BTreeMap<String, String>,
}

/// The CONNECTs that the server got so far, from its log.
pub fn asked(log: &str) -> Vec<Asked> {
    log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Skips the scenario where Debian's python has no h2.
///
/// # Errors
/// It has none.
pub fn need_h2() -> Result<()> {
    static THERE: OnceLock<bool> = OnceLock::new();
    let there = THERE.get_or_init(|| {
        Command::new(PYTHON).args(["-c", "import h2"]).output().is_ok_and(|out| out.status.success())
    });
    if *there { Ok(()) } else { Err(skip("python3-h2 is not installed: run `cargo xtask setup`")) }
}
