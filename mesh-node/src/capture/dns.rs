//! Which nameserver a pod's datagram was for, and sweeping what nobody picked up.

use super::{Capture, CaptureError, EnrolledPod};
use crate::sys;
use mesh_ebpf::{DNS_PORTS_START, NameserverKey};
use std::net::SocketAddr;
use std::time::Duration;

impl Capture {
    /// The nameserver that the application asked, by the port at which the agent's DNS socket got the datagram
    /// ([`sys::udp::Datagram::local`]). `None`: that port stands for nothing in this pod.
    #[must_use]
    pub fn dns_original_server(&self, pod: &EnrolledPod, local_port: u16) -> Option<SocketAddr> {
        let index = u32::from(local_port.checked_sub(DNS_PORTS_START)?);
        let key = NameserverKey { slot: pod.slot, index };
        Some(self.maps.nameservers.get(&key).ok().flatten()?.to_socket())
    }

    /// Removes records of connections that nobody accepted and tuples that were never established within `age`.
    /// Returns how many. A few times per minute is enough.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn sweep(&self, age: Duration) -> Result<usize, CaptureError> {
        let before = sys::monotonic_ns().saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX));
        let mut removed = 0;
        let failed = |source| CaptureError::Map { map: "ORIGINALS", source };
        for (tuple, original) in self.maps.originals.entries().map_err(failed)? {
            if original.created_ns < before {
                removed += usize::from(self.maps.originals.remove(&tuple).map_err(failed)?);
            }
        }
        let failed = |source| CaptureError::Map { map: "AUTHORISED", source };
        for (tuple, entry) in self.maps.authorised.entries().map_err(failed)? {
            if entry.created_ns < before {
                removed += usize::from(self.maps.authorised.remove(&tuple).map_err(failed)?);
            }
        }
        Ok(removed)
    }
}
