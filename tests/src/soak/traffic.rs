//! The load: new connections, connections that stay, and bulk, over tunnels and the fast path. All of it is of pods that
//! stay in the mesh: an agent that lets go of a pod ends what it carries for it (M0315).

use crate::bed::load::measure;
use crate::bed::{Load, Testbed};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// Connections that do nothing, over tunnels and over the fast path.
const IDLE: usize = 100;

/// What runs from the first round to the last.
pub(super) struct Traffic {
    loads: Vec<(&'static str, Load)>,
    /// What bursts moved.
    bytes: u64,
}

impl Traffic {
    pub(super) fn start(bed: &Testbed) -> Result<Self> {
        let backend = bed.pod("shop/backend")?.at(8080).to_string();
        let backend6 = bed.pod("shop/backend")?.at6(8080).to_string();
        let store = bed.pod("shop/store")?.at(8080).to_string();
        let idle = IDLE.to_string();
        let new = ["--shape", "crr", "--conns", "2", "--pause-ms", "5"];
        let one = ["--shape", "crr", "--pause-ms", "5"];
        let open = ["--shape", "pp", "--conns", "4", "--pause-ms", "2"];
        let hold = ["--shape", "hold", "--conns", &idle];
        let mut loads = Vec::new();
        for (name, pod, to, options) in [
            ("new connections through tunnels", "shop/frontend", &backend, &one[..]),
            ("new IPv6 connections through tunnels", "shop/frontend", &backend6, &one[..]),
            ("open connections through tunnels", "shop/frontend", &backend, &open[..]),
            ("idle connections through tunnels", "shop/frontend", &backend, &hold[..]),
            ("new connections of the fast path", "shop/local", &backend, &one[..]),
            ("open connections of the fast path", "shop/local", &backend, &open[..]),
            ("idle connections of the fast path", "shop/local", &backend, &hold[..]),
            ("many new connections at once", "shop/other", &store, &new[..]),
        ] {
            let load = Load::start(bed.pod(pod)?, to, options).with_context(|| name.to_owned())?;
            loads.push((name, load));
        }
        for (name, load) in loads.iter_mut().filter(|(name, _)| name.starts_with("idle")) {
            load.wait_holding(IDLE, Duration::from_secs(30)).with_context(|| (*name).to_owned())?;
        }
        Ok(Self { loads, bytes: 0 })
    }

    /// Half a second of bytes as fast as they go, each way.
    pub(super) fn burst(&mut self, bed: &Testbed) -> Result<()> {
        let source = bed.pod("shop/backend")?.at(8083).to_string();
        for pod in ["shop/frontend", "shop/local"] {
            let options = ["--shape", "bulkr", "--to", &source].map(str::to_owned);
            let figures = measure(bed.pod(pod)?, None, &options, 0.5)?;
            ensure!(figures.errors == 0 && figures.bytes > 0, "a burst to {pod}: {figures:?}");
            self.bytes += figures.bytes;
        }
        Ok(())
    }

    /// Every load still runs: those with connections of their own end when all of them are gone.
    pub(super) fn alive(&mut self) -> Result<()> {
        for (name, load) in &mut self.loads {
            ensure!(load.running()?, "{name}: the load has ended");
        }
        Ok(())
    }

    /// Stops the load; an error if one operation of it failed.
    pub(super) fn unharmed(self) -> Result<()> {
        ensure!(self.bytes > 0, "no bulk was moved");
        for (name, load) in self.loads {
            let figures = load.stop().with_context(|| name.to_owned())?;
            ensure!(figures.ops > 0, "{name}: nothing was done");
            ensure!(
                figures.errors == 0,
                "{name}: {} of {} failed: {}",
                figures.errors,
                figures.ops,
                figures.first_error
            );
            let kept = if name.starts_with("idle") { IDLE as u64 } else { 0 };
            ensure!(figures.alive >= kept, "{name}: {} of {kept} are left", figures.alive);
        }
        Ok(())
    }
}
