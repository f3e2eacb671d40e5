//! What the mesh's processes hold, as the kernel tells it: `/proc`, and the maps behind the pins.

use crate::bed::{Proc, Testbed, leftovers};
use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use mesh_ebpf::{Address, Authorised, Flow, NameserverKey, Original, Owner, Tuple, Verdict, VerdictKey};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Memory may be this much more at the end than after the warm-up: a part of it, and what an allocator keeps.
const MEMORY_SHARE: f64 = 0.15;
const MEMORY_MIB: f64 = 3.0;
/// Descriptors: a connection of somebody who looks at the agent, a tunnel that is just going.
const DESCRIPTORS: u64 = 4;
/// Entries: connections that are over and whose records are not swept yet.
const ENTRIES: u64 = 8;

/// Figures of one process.
#[derive(Debug, Clone, Default, PartialEq)]
struct Process {
    memory_mib: f64,
    descriptors: u64,
    threads: u64,
    /// Entries by map; only agents have any.
    entries: BTreeMap<&'static str, u64>,
}

/// Figures of every process of the mesh, by name.
#[derive(Debug, Clone)]
pub(super) struct Figures(BTreeMap<String, Process>);

impl Figures {
    /// Looks at all of them.
    pub(super) fn of(bed: &Testbed) -> Result<Self> {
        let mut all = BTreeMap::new();
        let control = bed.control.as_ref().context("no control plane")?;
        all.insert("control".to_owned(), Process::of(control)?);
        for node in bed.nodes.values() {
            let mut process = Process::of(node.agent(0)?)?;
            process.entries =
                entries(&Path::new(leftovers::PINS).join(format!("{}-{}", bed.name, node.name)))?;
            all.insert(node.name.clone(), process);
        }
        Ok(Self(all))
    }

    /// Everything that is counted, without memory, which is never quite still.
    pub(super) fn counts(&self) -> Vec<u64> {
        let of = |p: &Process| [p.descriptors, p.threads, p.entries.values().sum()];
        self.0.values().flat_map(of).collect()
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, process) in &self.0 {
            let Process { memory_mib, descriptors, threads, entries } = process;
            write!(f, "{name} {memory_mib:.1} MiB {descriptors} fds {threads} threads")?;
            if !entries.is_empty() {
                write!(f, " {} entries", entries.values().sum::<u64>())?;
            }
            write!(f, "  ")?;
        }
        Ok(())
    }
}

impl Process {
    fn of(process: &Proc) -> Result<Self> {
        let dir = Path::new("/proc").join(process.pid().to_string());
        let count = |sub: &str| -> Result<u64> {
            let entries = std::fs::read_dir(dir.join(sub)).context("a process of the mesh has ended")?;
            Ok(entries.count() as u64)
        };
        #[expect(clippy::cast_precision_loss, reason = "bytes of a small process")]
        let memory_mib = process.memory()?.0 as f64 / f64::from(1 << 20);
        Ok(Self { memory_mib, descriptors: count("fd")?, threads: count("task")?, entries: BTreeMap::new() })
    }
}

/// Entries of the maps that an agent and its programs fill and empty.
fn entries(pins: &Path) -> Result<BTreeMap<&'static str, u64>> {
    let dir = pins.join(format!("v{}", mesh_ebpf::LAYOUT_VERSION));
    Ok(BTreeMap::from([
        ("PODS", count::<u64, mesh_ebpf::Pod>(&dir, "PODS")?),
        ("OWN_ADDRESSES", count::<Address, Owner>(&dir, "OWN_ADDRESSES")?),
        ("ORIGINALS", count::<Tuple, Original>(&dir, "ORIGINALS")?),
        ("AUTHORISED", count::<Tuple, Authorised>(&dir, "AUTHORISED")?),
        ("VERDICTS", count::<VerdictKey, Verdict>(&dir, "VERDICTS")?),
        ("FLOWS", count::<u64, Flow>(&dir, "FLOWS")?),
        ("NAMESERVERS", count::<NameserverKey, mesh_ebpf::Endpoint>(&dir, "NAMESERVERS")?),
        ("AGENTS", count::<u32, u64>(&dir, "AGENTS")?),
    ]))
}

fn count<K: Pod, V: Pod>(dir: &Path, name: &str) -> Result<u64> {
    let map = MapData::from_pin(dir.join(name)).with_context(|| format!("cannot open the map {name}"))?;
    let map = HashMap::<_, K, V>::try_from(Map::HashMap(map)).with_context(|| format!("map {name}"))?;
    // An entry that goes while it is counted ends the count early; the next look counts again.
    Ok(map.keys().filter(Result::is_ok).count() as u64)
}

/// What is more after than before, beyond the tolerances; nothing if all is flat.
pub(super) fn excess(before: &Figures, after: &Figures) -> Vec<String> {
    let mut found = Vec::new();
    for (name, then) in &before.0 {
        let now = after.0.get(name).cloned().unwrap_or_default();
        let most = then.memory_mib * (1.0 + MEMORY_SHARE) + MEMORY_MIB;
        if now.memory_mib > most {
            found.push(format!(
                "{name} holds {:.1} MiB, after the warm-up it was {:.1} (at most {most:.1} are flat)",
                now.memory_mib, then.memory_mib
            ));
        }
        let mut compare = |what: &str, then: u64, now: u64, more: u64| {
            if now > then + more {
                found.push(format!(
                    "{name} has {now} {what}, after the warm-up it had {then} (+{more} are flat)"
                ));
            }
        };
        compare("descriptors", then.descriptors, now.descriptors, DESCRIPTORS);
        compare("threads", then.threads, now.threads, 0);
        for (map, count) in &now.entries {
            let then = then.entries.get(map).copied().unwrap_or(0);
            compare(&format!("entries in {map}"), then, *count, ENTRIES);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(memory_mib: f64, descriptors: u64, threads: u64, originals: u64) -> Figures {
        let entries = BTreeMap::from([("ORIGINALS", originals)]);
        Figures(BTreeMap::from([("a".to_owned(), Process { memory_mib, descriptors, threads, entries })]))
    }

    #[test]
    fn what_grew_beyond_its_tolerance_is_named_and_nothing_else() {
        let before = figures(20.0, 100, 8, 2);
        assert_eq!(excess(&before, &figures(26.0, 104, 8, 10)), Vec::<String>::new());
        assert_eq!(excess(&before, &figures(10.0, 50, 4, 0)), Vec::<String>::new());
        for (after, word) in [
            (figures(26.1, 100, 8, 2), "MiB"),
            (figures(20.0, 105, 8, 2), "descriptors"),
            (figures(20.0, 100, 9, 2), "threads"),
            (figures(20.0, 100, 8, 11), "ORIGINALS"),
        ] {
            let found = excess(&before, &after);
            assert!(found.len() == 1 && found[0].contains(word), "{found:?}");
        }
    }
}
