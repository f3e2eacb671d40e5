//! The maps, typed, and what is written to them as a whole.

use super::{CaptureError, FailMode, MeshSettings};
use crate::sys::bpf::{PerCpuCounters, Table, Write};
use aya::Pod as Plain;
use aya::maps::Map;
use ipnet::IpNet;
use mesh_ebpf::{
    Address, Authorised, Endpoint, Flow, LISTENERS_PER_POD, NameserverKey, Original, Owner, Pod, Tuple,
    Verdict, VerdictKey, config, destination,
};
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Key of DESTINATIONS.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Prefix {
    length: u32,
    address: Address,
}

impl From<&IpNet> for Prefix {
    fn from(net: &IpNet) -> Self {
        let length = match net {
            IpNet::V4(_) => u32::from(net.prefix_len()) + 96,
            IpNet::V6(_) => u32::from(net.prefix_len()),
        };
        Self { length, address: net.network().into() }
    }
}

/// Wraps a [`Prefix`] as the plain words that the map's key is made of.
pub(super) type PrefixWords = [u32; 5];

impl Prefix {
    const fn words(self) -> PrefixWords {
        let a = self.address.0;
        [self.length, a[0], a[1], a[2], a[3]]
    }
}

/// Every map of the programs.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) config: Table<u32, u64>,
    pub(super) counters: PerCpuCounters,
    pub(super) pods: Table<u64, Pod>,
    pub(super) own_addresses: Table<Address, Owner>,
    pub(super) listeners: Table<u32, u32>,
    pub(super) agents: Table<u32, u64>,
    pub(super) agent_cgroups: Table<u64, u32>,
    pub(super) originals: Table<Tuple, Original>,
    pub(super) authorised: Table<Tuple, Authorised>,
    pub(super) verdicts: Table<VerdictKey, Verdict>,
    pub(super) flows: Table<u64, Flow>,
    pub(super) nameservers: Table<NameserverKey, Endpoint>,
    pub(super) destinations: Table<PrefixWords, u32>,
    pub(super) excluded_ports: Table<u32, u32>,
    pub(super) kubelets: Table<u64, u32>,
    pub(super) probe_ports: Table<Endpoint, u32>,
}

/// Names of all maps that are pinned.
pub(super) const NAMES: [&str; 18] = [
    // Programs of an earlier agent write their diagnostics there too.
    "AYA_LOGS",
    "CONFIG",
    "COUNTERS",
    "PODS",
    "OWN_ADDRESSES",
    "LISTENERS",
    "AGENTS",
    "AGENT_CGROUPS",
    "ORIGINALS",
    "AUTHORISED",
    "VERDICTS",
    "FLOWS",
    "NAMESERVERS",
    "DESTINATIONS",
    "EXCLUDED_PORTS",
    "KUBELETS",
    "PROBE_PORTS",
    "SOCKETS",
];

/// A map's descriptor.
pub(super) fn descriptor(ebpf: &aya::Ebpf, name: &'static str) -> Result<OwnedFd, CaptureError> {
    let Some(
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::SockMap(data)
        | Map::SkStorage(data)
        | Map::RingBuf(data),
    ) = ebpf.map(name)
    else {
        return Err(CaptureError::NoMap(name));
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|source| CaptureError::Map { map: name, source })
}

fn table<K: Plain, V: Plain>(ebpf: &aya::Ebpf, name: &'static str) -> Result<Table<K, V>, CaptureError> {
    Table::new(descriptor(ebpf, name)?).map_err(|source| CaptureError::Map { map: name, source })
}

impl Maps {
    pub(super) fn of(ebpf: &aya::Ebpf) -> Result<Self, CaptureError> {
        Ok(Self {
            config: table(ebpf, "CONFIG")?,
            counters: PerCpuCounters::new(descriptor(ebpf, "COUNTERS")?)
                .map_err(|source| CaptureError::Map { map: "COUNTERS", source })?,
            pods: table(ebpf, "PODS")?,
            own_addresses: table(ebpf, "OWN_ADDRESSES")?,
            listeners: table(ebpf, "LISTENERS")?,
            agents: table(ebpf, "AGENTS")?,
            agent_cgroups: table(ebpf, "AGENT_CGROUPS")?,
            originals: table(ebpf, "ORIGINALS")?,
            authorised: table(ebpf, "AUTHORISED")?,
            verdicts: table(ebpf, "VERDICTS")?,
            flows: table(ebpf, "FLOWS")?,
            nameservers: table(ebpf, "NAMESERVERS")?,
            destinations: table(ebpf, "DESTINATIONS")?,
            excluded_ports: table(ebpf, "EXCLUDED_PORTS")?,
            kubelets: table(ebpf, "KUBELETS")?,
            probe_ports: table(ebpf, "PROBE_PORTS")?,
        })
    }

    pub(super) fn config(&self, index: u32) -> Result<u64, CaptureError> {
        let value = self.config.get(&index).map_err(|source| CaptureError::Map { map: "CONFIG", source })?;
        Ok(value.unwrap_or(0))
    }

    pub(super) fn set_config(&self, index: u32, value: u64) -> Result<(), CaptureError> {
        self.config
            .set(&index, &value, Write::Any)
            .map_err(|source| CaptureError::Map { map: "CONFIG", source })
    }

    /// Writes mesh-wide settings. Prefixes and ports are added before old ones go, so that nothing that is left
    /// alone before and after is captured in between.
    pub(super) fn apply(&self, settings: &MeshSettings) -> Result<(), CaptureError> {
        let excluded = settings.excluded.iter().map(|net| (Prefix::from(net).words(), destination::LEAVE));
        let included = settings.included.iter().map(|net| (Prefix::from(net).words(), destination::CAPTURE));
        sync(&self.destinations, "DESTINATIONS", included.chain(excluded).collect())?;
        let ports = settings.excluded_ports.iter().map(|port| (u32::from(*port), 1)).collect();
        sync(&self.excluded_ports, "EXCLUDED_PORTS", ports)?;
        self.set_config(config::LEAVE_UNLISTED, u64::from(!settings.included.is_empty()))?;
        self.set_config(config::FAIL_OPEN, u64::from(settings.fail == FailMode::Open))?;
        self.set_config(config::DNS, u64::from(settings.dns))?;
        self.set_config(config::FAST_PATH, u64::from(settings.fast_path))
    }

    /// Removes records that nobody accepted and tuples that were never established since `before`
    /// (CLOCK_MONOTONIC ns); says how many.
    pub(super) fn sweep(&self, before: u64) -> io::Result<usize> {
        let mut removed = 0;
        for (tuple, original) in self.originals.entries()? {
            if original.created_ns < before {
                removed += usize::from(self.originals.remove(&tuple)?);
            }
        }
        for (tuple, entry) in self.authorised.entries()? {
            if entry.created_ns < before {
                removed += usize::from(self.authorised.remove(&tuple)?);
            }
        }
        Ok(removed)
    }

    pub(super) fn set_listener(
        &self,
        slot: u32,
        kind: u32,
        socket: BorrowedFd<'_>,
        write: Write,
    ) -> io::Result<()> {
        let fd = socket.as_raw_fd().cast_unsigned();
        self.listeners.set(&(slot * LISTENERS_PER_POD + kind), &fd, write)
    }
}

/// Makes a map hold exactly `wanted`.
pub(super) fn sync<K: Plain + Eq + std::hash::Hash, V: Plain>(
    table: &Table<K, V>,
    map: &'static str,
    wanted: Vec<(K, V)>,
) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Map { map, source };
    for (key, value) in &wanted {
        table.set(key, value, Write::Any).map_err(|source| full(map, source, wanted.len()))?;
    }
    let keep: HashSet<K> = wanted.into_iter().map(|(key, _)| key).collect();
    for key in table.keys().map_err(failed)? {
        if !keep.contains(&key) {
            table.remove(&key).map_err(failed)?;
        }
    }
    Ok(())
}

/// Tells a full map from other failures.
pub(super) fn full(map: &'static str, source: io::Error, wanted: usize) -> CaptureError {
    match source.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => CaptureError::MapFull { map, wanted },
        _ => CaptureError::Map { map, source },
    }
}
