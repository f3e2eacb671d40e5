//! Policies hold for TCP only: whoever writes one for a workload that also serves UDP should hear that the mesh does not
//! deny its datagrams.

use crate::model::{AuthorizationPolicy, Condition, Kind, ObjectRef, Objects, Service, Transport, selects};
use mesh_core::admin::UDP_NOT_COVERED;

/// Served by the node, or left to the pod's own server; either way not what a policy is about.
const DNS: u16 = 53;
/// Ports that a condition names.
const NAMED: usize = 5;

/// Services with UDP ports, and those ports.
pub(super) struct Datagrams<'a>(Vec<(&'a Service, Vec<u16>)>);

impl<'a> Datagrams<'a> {
    pub(super) fn of(objects: &'a Objects) -> Self {
        let udp = |service: &Service| -> Vec<u16> {
            let ports = service.ports.iter().filter(|p| p.transport == Transport::Udp && p.port != DNS);
            ports.map(|p| p.port).collect()
        };
        let services = objects.services.values().map(|service| (&**service, udp(service)));
        Self(services.filter(|(_, ports)| !ports.is_empty()).collect())
    }

    /// What there is to say about a policy, if a pod that it selects serves UDP.
    pub(super) fn condition(
        &self,
        objects: &Objects,
        policy: &AuthorizationPolicy,
        root_namespace: &str,
    ) -> Option<Condition> {
        let namespace = &policy.meta.namespace;
        let everywhere = namespace == root_namespace;
        let mut ports = Vec::new();
        for (service, of_service) in &self.0 {
            let served = objects.pods.values().any(|pod| {
                pod.meta.namespace == service.meta.namespace
                    && (everywhere || pod.meta.namespace == *namespace)
                    && !service.selector.is_empty()
                    && selects(&service.selector, &pod.meta.labels)
                    && selects(&policy.selector, &pod.meta.labels)
            });
            if served {
                ports.extend(of_service.iter().map(|port| format!("{}:{port}", service.meta.key())));
            }
        }
        if ports.is_empty() {
            return None;
        }
        let more = if ports.len() > NAMED { ", ..." } else { "" };
        ports.truncate(NAMED);
        let message = format!(
            "does not hold for UDP ports of Services ({}{more}): {UDP_NOT_COVERED}",
            ports.join(", ")
        );
        let object = ObjectRef::of(Kind::AuthorizationPolicy, &policy.meta);
        Some(Condition::new(object, "undermesh.io/Transports", true, "UnsupportedValue", message))
    }
}
