//! Which nameserver a pod's datagram was for, and sweeping what nobody picked up.

use super::{Capture, CaptureError, EnrolledPod};
use crate::sys;
use mesh_ebpf::{DNS_PORTS_START, NameserverKey};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

impl Capture {
    /// The nameserver that the application asked, by the port at which the agent's DNS socket got the datagram
    /// ([`crate::sys::udp::Datagram::local`]). `None`: that port stands for nothing in this pod.
    #[must_use]
    pub fn dns_original_server(&self, pod: &EnrolledPod, local_port: u16) -> Option<SocketAddr> {
        let index = u32::from(local_port.checked_sub(DNS_PORTS_START)?);
        let key = NameserverKey { slot: pod.slot, index };
        Some(self.maps.nameservers.get(&key).ok().flatten()?.to_socket())
    }

    /// The ports that stand for nameservers in each pod, by the pod's slot.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn nameserver_ports(&self) -> Result<HashMap<u32, Vec<u16>>, CaptureError> {
        let keys = self.maps.nameservers.keys();
        let keys = keys.map_err(|source| CaptureError::Map { map: "NAMESERVERS", source })?;
        let mut ports: HashMap<u32, Vec<u16>> = HashMap::new();
        for NameserverKey { slot, index } in keys {
            let port = u16::try_from(index).ok().and_then(|index| DNS_PORTS_START.checked_add(index));
            ports.entry(slot).or_default().extend(port);
        }
        Ok(ports)
    }

    /// Frees a port that stands for a nameserver: the next query to that server takes one anew, as does the next one to
    /// a server without a port.
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn forget_nameserver(&self, pod: &EnrolledPod, port: u16) -> Result<(), CaptureError> {
        let Some(index) = port.checked_sub(DNS_PORTS_START) else { return Ok(()) };
        let removed = self.maps.nameservers.remove(&NameserverKey { slot: pod.slot, index: index.into() });
        removed.map(|_| ()).map_err(|source| CaptureError::Map { map: "NAMESERVERS", source })
    }

    /// Removes records of connections that nobody accepted and tuples that were never established within `age`.
    /// Returns how many. Once per minute is enough.
    ///
    /// # Errors
    /// Only if the kernel refuses.
    pub fn sweep(&self, age: Duration) -> Result<usize, CaptureError> {
        let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
        let before = sys::monotonic_ns().saturating_sub(age);
        self.maps.sweep(before).map_err(|source| CaptureError::Map { map: "ORIGINALS", source })
    }
}
