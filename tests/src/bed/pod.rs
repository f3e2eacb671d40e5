//! A pod of the testbed: a namespace, a cgroup, and the programs of its manifest.

use super::net;
use super::netns::Netns;
use super::objects::PodSpec;
use super::process::{self, Finished, Place, Proc, Program};
use crate::tools::call::Outcome;
use anyhow::{Context, Result, bail};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long a program that should answer at once may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running pod. Its programs die with it.
#[derive(Debug)]
pub struct Pod {
    /// What its manifest says.
    pub spec: PodSpec,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Programs of its containers.
    pub programs: Vec<Proc>,
    /// Where its programs run.
    pub place: Place,
    /// Its network namespace.
    pub netns: Netns,
    /// Logs of its programs.
    pub(super) dir: PathBuf,
    pub(super) spawned: AtomicU32,
}

impl Pod {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        self.spec.key()
    }

    /// An address of it.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// An IPv6 address of it.
    pub fn at6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// It cannot be started or takes too long. Its own failure is in the result.
    pub fn run(&self, program: impl Into<Program>) -> Result<Finished> {
        process::finish(&self.place, program, PATIENCE).with_context(|| format!("in pod {}", self.key()))
    }

    /// Runs a program to its end and returns its output.
    ///
    /// # Errors
    /// As [`Pod::run`], and if it fails.
    pub fn output(&self, program: impl Into<Program>) -> Result<String> {
        let program = program.into();
        let line = program.argv.join(" ");
        let done = self.run(program)?;
        Ok(done.ok().with_context(|| format!("`{line}` in pod {}", self.key()))?.to_owned())
    }

    /// Starts a program that goes on; its output is in its log.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, program: impl Into<Program>) -> Result<Proc> {
        let program = program.into();
        let n = self.spawned.fetch_add(1, Ordering::Relaxed);
        let log = self.dir.join(format!("{}.{}-{n}.log", self.spec.namespace, self.spec.name));
        Proc::spawn(&self.place, program, &log).with_context(|| format!("in pod {}", self.key()))
    }

    /// One TCP connection by our own client, with what it saw; see [`crate::tools::call`] for the options.
    ///
    /// # Errors
    /// The client itself did not work. A refused or broken connection is an [`Outcome`].
    pub fn call(&self, to: &str, options: &[&str]) -> Result<Outcome> {
        let argv = ["mesh-tests", "tool", "call", "--to", to].into_iter().chain(options.iter().copied());
        let text = self.output(argv)?;
        serde_json::from_str(text.trim()).with_context(|| format!("the client said {text:?}"))
    }

    /// As [`Pod::call`] to a server that greets with the addresses it sees: the peer that the server saw.
    ///
    /// # Errors
    /// The connection failed.
    pub fn greeted(&self, to: &str) -> Result<(Outcome, Greeting)> {
        let outcome = self.call(to, &["--lines", "1"])?;
        if !outcome.ok {
            bail!("{} -> {to}: {}", self.key(), outcome.problem());
        }
        let greeting = serde_json::from_str(&outcome.received)
            .with_context(|| format!("{} -> {to}: greeted with {:?}", self.key(), outcome.received))?;
        Ok((outcome, greeting))
    }

    /// Whether something listens on a port.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn listening(&self, port: u16) -> Result<bool> {
        net::listening(&self.netns, port)
    }

    /// What the pod's first program wrote.
    pub fn log(&self) -> String {
        self.programs.first().map(Proc::log).unwrap_or_default()
    }
}

/// What a greeting server saw of a connection.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Greeting {
    /// The client, as `getpeername` says.
    pub peer: SocketAddr,
    /// Itself, as `getsockname` says.
    pub local: SocketAddr,
}
