//! A bad network between the nodes: the underlay is cut in two, and a program carries the frames from one half to the
//! other as it is told (this kernel may have no netem).

use super::Testbed;
use super::process::{Place, Proc};
use super::{net, wait};
use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::Value;
use std::path::PathBuf;
use std::time::Duration;

const FORWARDER: &str = include_str!("../tools/wan.py");
/// Its ends, on the first and the second half.
const ENDS: [&str; 2] = ["wan0", "wan1"];

/// The way between one node and everybody else; perfect until [`Wan::change`] says otherwise.
#[derive(Debug)]
pub struct Wan {
    place: Place,
    log: PathBuf,
    forwarder: Option<Proc>,
}

impl Wan {
    /// Moves `node` behind it. Nothing gets through before [`Wan::change`].
    ///
    /// # Errors
    /// The kernel has no TAP devices, or `ip` failed.
    pub fn before(bed: &Testbed, node: &str) -> Result<Self> {
        let port = format!("n{}", net::node_place(bed.node(node)?.index));
        let mut lines = vec![
            "link add br1 type bridge".to_owned(),
            "link set br1 type bridge mcast_snooping 0 forward_delay 0".to_owned(),
            "link set br1 up".to_owned(),
        ];
        for (end, bridge) in ENDS.into_iter().zip(["br0", "br1"]) {
            lines.push(format!("tuntap add dev {end} mode tap"));
            // What the forwarder is slow to take must not be lost: it alone decides about that.
            lines.push(format!("link set {end} txqueuelen 20000 master {bridge} up"));
        }
        lines.push(format!("link set {port} master br1"));
        bed.underlay.batch(&lines)?;
        let log = bed.dir.join("wan.log");
        Ok(Self { place: bed.underlay_place.clone(), log, forwarder: None })
    }

    /// From now on treats frames as the options of `tools/wan.py` say; returns what the forwarder did before, if it ran.
    ///
    /// # Errors
    /// The forwarder does not start.
    pub fn change(&mut self, options: &[&str]) -> Result<Option<Value>> {
        let did = self.forwarder.is_some().then(|| self.stop()).transpose()?;
        let _ = std::fs::remove_file(&self.log);
        let argv = ["python3", "-c", FORWARDER].into_iter().chain(ENDS).chain(options.iter().copied());
        let mut forwarder = Proc::spawn(&self.place, argv, &self.log)?;
        wait::until_true("forwarding", Duration::from_secs(10), || {
            if forwarder.running()? {
                return Ok(forwarder.log().contains("forwarding"));
            }
            Err(wait::hopeless(forwarder.log()))
        })?;
        self.forwarder = Some(forwarder);
        Ok(did)
    }

    /// Ends the forwarder; returns what it did, by name.
    ///
    /// # Errors
    /// It had ended by itself.
    pub fn stop(&mut self) -> Result<Value> {
        let mut forwarder = self.forwarder.take().context("nothing is forwarded")?;
        forwarder.signal(Signal::TERM)?;
        forwarder.wait(Duration::from_secs(10))?;
        let log = forwarder.log();
        serde_json::from_str(log.lines().last().unwrap_or_default())
            .with_context(|| format!("the forwarder said {log}"))
    }
}
