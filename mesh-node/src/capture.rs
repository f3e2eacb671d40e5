//! The kernel side of the agent: loading and pinning the programs, the typed maps, enrolling pods.
//!
//! How a connection is captured (the programs are in `mesh-ebpf`):
//! - The connect hook of an enrolled pod rewrites the destination to the pod's own address and a port of the capture
//!   range; `sock_ops` records the original destination under the connection's tuple; `sk_lookup` in the pod's
//!   namespace hands the SYN to the outbound listener; [`Capture::take_original_dst`] answers at accept.
//! - `sk_lookup` hands connections from outside to the HBONE or the inbound listener; the accepted socket's local
//!   address is the original destination.
//! - A connection that the verdict map allows is not touched: its tuple is authorised and passes `sk_lookup`.
//! - The agent's own connections are exempt by its process and cgroup.
//!
//! Everything that outlives the agent is pinned: maps and links under `<pins>/v<layout>/`. A new agent opens the same
//! maps, replaces the programs of the links only if its object differs, and takes over the listeners.
//!
//! Order in which a pod is enrolled: [`Capture::enrol`] (namespace prepared, slot taken), listeners made with
//! [`crate::sys::listener`], [`Capture::set_listener`] for each kind, [`Capture::activate`] (from here on it is
//! captured). [`Capture::release`] goes the other way.

mod addresses;
mod config;
mod counters;
mod dns;
pub mod doctor;
mod enrol;
mod error;
mod fastpath;
mod heartbeat;
mod klog;
mod layouts;
mod loader;
mod maps;
#[cfg(test)]
mod model;
mod routes;
pub mod trace;

pub use config::{CaptureConfig, FailMode, Limits, MAX_PREFIXES, MeshSettings, ObjectSource};
pub use counters::Counter;
pub use enrol::EnrolledPod;
pub use error::CaptureError;
pub use fastpath::{Decision, FlowFigures, FlowState, Pair};
pub use layouts::remove_pins;
pub use loader::cgroup as cgroup_directory;
pub use mesh_ebpf::LAYOUT_VERSION;
pub use routes::clean_namespace;

/// Where pins of a node are, in a directory of its name, unless the operator says otherwise.
pub const PINS: &str = "/sys/fs/bpf/undermesh";

use crate::sys;
use crate::sys::bpf::Write;
use addresses::AddressWatch;
use heartbeat::Heartbeat;
use loader::Programs;
use maps::Maps;
use mesh_core::flows::ConnectionId;
use mesh_ebpf::{Endpoint, Tuple, listener};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a listener of a pod is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerKind {
    /// Captured outbound TCP.
    Outbound,
    /// Inbound TCP from outside, any port but 15008.
    Inbound,
    /// Inbound TCP from outside to 15008.
    Hbone,
    /// Captured TCP to port 53.
    DnsTcp,
    /// Captured UDP to port 53.
    DnsUdp,
}

impl ListenerKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Outbound, Self::Inbound, Self::Hbone, Self::DnsTcp, Self::DnsUdp];

    const fn index(self) -> u32 {
        match self {
            Self::Outbound => listener::OUTBOUND,
            Self::Inbound => listener::INBOUND,
            Self::Hbone => listener::HBONE,
            Self::DnsTcp => listener::DNS_TCP,
            Self::DnsUdp => listener::DNS_UDP,
        }
    }
}

/// The loaded kernel side. All methods take `&self`, none waits for another thread on the data path.
pub struct Capture {
    maps: Arc<Maps>,
    programs: Programs,
    enrolled: enrol::Registry,
    addresses: AddressWatch,
    /// What agents of other layouts left and is still in use.
    others: Mutex<Vec<layouts::OtherLayout>>,
    /// Whether listeners that are registered already stay.
    yields: AtomicBool,
    /// Ends when dropped.
    heartbeat: Option<Heartbeat>,
    kernel_log: Mutex<Option<klog::KernelLog>>,
}

impl Capture {
    /// Loads the programs, adopts or makes the pins, attaches the cgroup programs and starts the heartbeat.
    ///
    /// # Errors
    /// Names the missing kernel feature, mount, capability or file, and the fix.
    pub fn load(config: CaptureConfig) -> Result<Self, CaptureError> {
        let (programs, maps) = loader::load(&config)?;
        let maps = Arc::new(maps);
        let last_beat = maps.config(mesh_ebpf::config::HEARTBEAT)?;
        // An earlier agent's settings hold until the control plane tells this one of its own.
        if last_beat == 0 || !config.keep_settings {
            maps.apply(&config.settings)?;
        }
        let agent =
            if config.exempt_self { heartbeat::register_agent(&maps)? } else { heartbeat::Agent::default() };
        let others = programs.pins().map(layouts::beside).transpose()?.unwrap_or_default();
        others.iter().try_for_each(layouts::OtherLayout::stop_enforcing)?;
        let enrolled = enrol::Registry::adopt(&maps, config.limits.pods)?;
        let addresses = AddressWatch::start(Arc::clone(&maps))?;
        let mut capture = Self {
            maps,
            programs,
            enrolled,
            addresses,
            others: Mutex::new(others),
            yields: AtomicBool::new(false),
            heartbeat: None,
            kernel_log: Mutex::new(None),
        };
        // Nobody kept the verdicts of a dead agent true; the first beat must not bring them back to life.
        if crate::sys::monotonic_ns().saturating_sub(last_beat) > mesh_ebpf::HEARTBEAT_STALE_NS {
            capture.distrust_verdicts()?;
        }
        if config.heartbeat {
            let shown = !config.silent_start;
            capture.heartbeat = Some(Heartbeat::start(Arc::clone(&capture.maps), agent, shown)?);
        }
        Ok(capture)
    }

    /// Shows signs of life from now on, after a silent start: connections of enrolled pods are captured instead of
    /// falling to the mesh's fail mode.
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn serve(&self) -> Result<(), CaptureError> {
        let Some(heartbeat) = &self.heartbeat else { return Ok(()) };
        // Nobody kept them true while nobody showed signs of life.
        if self.heartbeat_age_ns()? > mesh_ebpf::HEARTBEAT_STALE_NS {
            self.distrust_verdicts()?;
        }
        heartbeat.show(true);
        self.maps.set_config(mesh_ebpf::config::HEARTBEAT, sys::monotonic_ns())
    }

    /// Stops showing signs of life: unless another agent does, new connections of enrolled pods fall to the mesh's fail
    /// mode within three seconds. Connections that this agent carries go on.
    pub fn retire(&self) {
        if let Some(heartbeat) = &self.heartbeat {
            heartbeat.show(false);
        }
    }

    /// Applies mesh-wide settings: fail mode, DNS, fast path, destinations that are left alone.
    ///
    /// # Errors
    /// More prefixes or ports than the maps hold.
    pub fn set_config(&self, settings: &MeshSettings) -> Result<(), CaptureError> {
        self.maps.apply(settings)
    }

    /// Says whether a later agent is there. While one is, [`Capture::set_listener`] leaves in place what that one
    /// registered: both serve a pod that comes now, and the one that stays must be the one that connections meet when
    /// the other has left.
    pub fn yield_to_later(&self, yields: bool) {
        self.yields.store(yields, Ordering::Relaxed);
    }

    /// Hands connections of one kind to a listener of the pod's namespace, replacing an older agent's.
    ///
    /// # Errors
    /// The socket is not listening (TCP) or bound (UDP).
    pub fn set_listener(
        &self,
        pod: &EnrolledPod,
        kind: ListenerKind,
        socket: &impl AsFd,
    ) -> Result<(), CaptureError> {
        let yields = self.yields.load(Ordering::Relaxed);
        let write = if yields { Write::New } else { Write::Any };
        match self.maps.set_listener(pod.slot, kind.index(), socket.as_fd(), write) {
            Err(error) if yields && error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done.map_err(|source| CaptureError::Pod {
                pod: pod.info.to_string(),
                action: "register a listener",
                source,
            }),
        }
    }

    /// Where a connection that the outbound or DNS listener accepted wanted to go. `local` and `peer` are the
    /// accepted socket's addresses. `None`: nothing captured it, so reset it. One system call; the record is gone
    /// afterwards.
    #[must_use]
    pub fn take_original_dst(&self, local: SocketAddr, peer: SocketAddr) -> Option<SocketAddr> {
        self.take_original(local, peer).map(|(destination, _)| destination)
    }

    /// As [`Capture::take_original_dst`], with the connection's name.
    #[must_use]
    pub fn take_original(&self, local: SocketAddr, peer: SocketAddr) -> Option<(SocketAddr, ConnectionId)> {
        let (client, server) = (Endpoint::from(peer), Endpoint::from(local));
        let tuple = Tuple {
            client: client.address,
            server: server.address,
            client_port: client.port,
            server_port: server.port,
        };
        let record = self.maps.originals.take(&tuple).ok().flatten()?;
        // As tracing tells of it: by the client's address as packets carry it.
        let id = ConnectionId::of(record.created_ns, client.to_socket());
        Some((record.destination.to_socket(), id))
    }

    /// Turns kernel-side diagnostics on or off; they appear as log records of target `mesh_ebpf`.
    ///
    /// # Errors
    /// The ring buffer cannot be read, or the kernel refuses the map write.
    pub fn set_kernel_log(&self, on: bool) -> Result<(), CaptureError> {
        let mut reader = self.kernel_log.lock().unwrap_or_else(PoisonError::into_inner);
        if on && reader.is_none() {
            *reader = Some(klog::KernelLog::start(&mut self.programs.ebpf())?);
        }
        self.maps.set_config(mesh_ebpf::config::LOG, u64::from(on))
    }

    /// Nanoseconds since the last heartbeat of an agent on these maps.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn heartbeat_age_ns(&self) -> Result<u64, CaptureError> {
        Ok(sys::monotonic_ns().saturating_sub(self.maps.config(mesh_ebpf::config::HEARTBEAT)?))
    }
}
