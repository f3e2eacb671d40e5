//! The services that routes, rules and policies can name, and how names are completed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_core::xds::proto::workload::address;

use super::super::{Context, Mesh, Resources};
use crate::model::Key;

/// One service of the workload API.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) namespace: String,
    pub(super) hostname: String,
    pub(super) ports: Vec<u32>,
    /// The waypoint that it asks for.
    pub(super) asked: Option<Key>,
    /// It stands behind that waypoint, or fails until the waypoint is there.
    pub(super) bound: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Services {
    by_host: BTreeMap<String, Vec<Service>>,
}

impl Services {
    pub(super) fn new(context: &Context<'_>, resources: &Resources) -> Self {
        let mut by_host: BTreeMap<String, Vec<Service>> = BTreeMap::new();
        for (name, resource) in &*resources.addresses {
            let Some(address::Type::Service(service)) = &resource.message.r#type else { continue };
            by_host.entry(service.hostname.clone()).or_default().push(Service {
                namespace: service.namespace.clone(),
                hostname: service.hostname.clone(),
                ports: service.ports.iter().map(|p| p.service_port).collect(),
                asked: context.asked.get(&**name).cloned(),
                bound: service.waypoint.is_some(),
            });
        }
        Self { by_host }
    }

    /// Services of a host name.
    pub(super) fn of(&self, hostname: &str) -> &[Service] {
        self.by_host.get(hostname).map_or(&[], Vec::as_slice)
    }

    /// Services that a host, which may be `*.domain`, stands for.
    pub(super) fn matching<'a>(&'a self, host: &'a str) -> Box<dyn Iterator<Item = &'a Service> + 'a> {
        if host.starts_with('*') {
            let covered = self.by_host.iter().filter(move |(name, _)| covers(host, name));
            Box::new(covered.flat_map(|(_, services)| services))
        } else {
            Box::new(self.of(host).iter())
        }
    }

    /// Services whose name is `*.domain`; `*` sorts before every letter.
    fn wildcards(&self) -> impl Iterator<Item = &Service> {
        let from = self.by_host.range("*".to_owned()..);
        from.take_while(|(name, _)| name.starts_with('*')).flat_map(|(_, services)| services)
    }

    /// Why a destination cannot be reached; nothing when it can.
    pub(super) fn missing(&self, hostname: &str, port: u32) -> Option<String> {
        // A wildcard of a ServiceEntry stands for every name below it.
        let found: Vec<&Service> = match self.of(hostname) {
            [] => self.wildcards().filter(|s| covers(&s.hostname, hostname)).collect(),
            exact => exact.iter().collect(),
        };
        if found.is_empty() {
            return Some(format!("{hostname} names no service"));
        }
        if port == 0 || found.iter().any(|s| s.ports.contains(&port)) {
            return None;
        }
        let ports: Vec<String> = found.iter().flat_map(|s| &s.ports).map(ToString::to_string).collect();
        Some(format!("{hostname} has no port {port}; it has {}", ports.join(", ")))
    }
}

/// Whether a host, which may be `*` or `*.domain`, stands for a name.
pub(super) fn covers(host: &str, name: &str) -> bool {
    match host.strip_prefix('*') {
        Some(suffix) => name.len() > suffix.len() && name.ends_with(suffix),
        None => host == name,
    }
}

/// A name without dots is a service of the object's namespace; every other is complete, as Istio reads them.
pub(crate) fn complete(host: &str, namespace: &str, mesh: &Mesh) -> String {
    if host.contains('.') || host == "*" || host.is_empty() || host.parse::<IpAddr>().is_ok() {
        host.to_owned()
    } else {
        mesh.hostname(namespace, host)
    }
}
