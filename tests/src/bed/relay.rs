//! A relay before the control plane that changes what it says (`foreign/control_relay.py`).

use super::hbone::{PYTHON, need_h2};
use super::mesh::MeshOptions;
use super::pki::Pki;
use super::process::Proc;
use super::{Testbed, wait};
use crate::bed::pki::Leaf;
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// Where the control plane itself serves when the relay stands before it.
const BEHIND: u16 = 15_112;

/// Options of a mesh whose CA is `pki` and whose control plane has a relay before it.
pub fn behind(pki: &Pki) -> MeshOptions {
    MeshOptions {
        control: vec![format!("--ca-dir={}", pki.dir().display())],
        control_port: Some(BEHIND),
        ..MeshOptions::default()
    }
}

/// What the relay does to messages of the configuration stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Passes them on.
    Pass,
    /// Sends bytes that are no message.
    Bytes,
    /// Sends messages whose resources are such bytes.
    Resource,
    /// Passes them on, and certificates a second late.
    SlowCa,
    /// Sends half of one, then ends the connection.
    Cut,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Bytes => "bytes",
            Self::Resource => "resource",
            Self::SlowCa => "slow-ca",
            Self::Cut => "cut",
        }
    }
}

/// A running relay.
#[derive(Debug)]
pub struct Relay {
    /// It, with what it did in its log.
    pub process: Proc,
    orders: PathBuf,
    patches: Map<String, Value>,
}

impl Relay {
    /// Starts one in the control plane's namespace, with a certificate of `pki` under the control plane's name.
    /// `patches` are bytes to add to resources, by name.
    ///
    /// # Errors
    /// It does not come to listen, or python-h2 is not installed (then the scenario is skipped).
    pub fn start(bed: &Testbed, pki: &Pki, patches: &[(&str, Vec<u8>)]) -> Result<Self> {
        need_h2()?;
        let certificate = pki.issue("relay", Leaf::of("DNS:istiod.istio-system.svc"))?;
        let script = bed.dir.join("control_relay.py");
        std::fs::write(&script, include_str!("../foreign/control_relay.py"))
            .context("cannot write the relay")?;
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let patches = patches
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), json!(hex(bytes))))
            .collect::<Map<_, _>>();
        let orders = bed.dir.join("orders.json");
        let ask = json!({
            "control": BEHIND,
            "orders": orders,
            "chain": certificate.chain,
            "key": certificate.key,
        });
        write(&orders, &patches, Mode::Pass)?;
        let argv = [PYTHON.to_owned(), script.to_string_lossy().into_owned(), ask.to_string()];
        let log = pki.dir().join("relay.log");
        let mut process = Proc::spawn(&bed.control_place, argv, &log)?;
        wait::until_true("listening relay", Duration::from_secs(10), || {
            ensure!(process.running()?, "it ended: {}", process.log());
            Ok(process.log().contains("listening"))
        })?;
        Ok(Self { process, orders, patches })
    }

    /// What it does from the next message on.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn order(&self, mode: Mode) -> Result<()> {
        write(&self.orders, &self.patches, mode)
    }

    /// How many certificates it made late.
    pub fn late_certificates(&self) -> usize {
        self.process.log().matches("a late certificate").count()
    }

    /// How many messages it passed in a mode.
    pub fn passed(&self, mode: Mode) -> usize {
        self.process.log().matches(&format!("a message, {}", mode.word())).count()
    }
}

fn write(orders: &std::path::Path, patches: &Map<String, Value>, mode: Mode) -> Result<()> {
    let new = orders.with_extension("new");
    std::fs::write(&new, json!({"mode": mode.word(), "patches": patches}).to_string())
        .context("cannot write orders")?;
    std::fs::rename(&new, orders).context("cannot give orders")
}

/// Protobuf, as far as patches need it.
pub mod wire {
    /// An integer field.
    pub fn number(field: u32, value: u64) -> Vec<u8> {
        [varint(u64::from(field) << 3), varint(value)].concat()
    }

    /// A message, string or bytes field.
    pub fn bytes(field: u32, value: &[u8]) -> Vec<u8> {
        [&varint(u64::from(field) << 3 | 2)[..], &varint(value.len() as u64), value].concat()
    }

    fn varint(mut value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while value >= 0x80 {
            out.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
        out
    }
}
