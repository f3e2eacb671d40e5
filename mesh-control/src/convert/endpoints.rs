//! Which services a pod is an endpoint of, and on which ports.
//!
//! Services whose EndpointSlices are given follow them; for the others the slices are derived from selector and
//! pods, as Kubernetes' endpoint controller does.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use mesh_core::xds::proto::workload::{Port, PortList};

use super::service::announced_ports;
use crate::model::{
    Endpoint, EndpointSlice, Key, Objects, Pod, Service, ServicePort, TargetPort, Transport, selects,
};

/// Membership that EndpointSlices state, by pod, and the services that have slices.
pub(super) struct Slices<'a> {
    by_pod: HashMap<&'a Key, Vec<(&'a Arc<EndpointSlice>, &'a Service)>>,
    with_slices: HashSet<&'a Key>,
    /// Slices that name no service.
    pub(super) orphans: Vec<&'a EndpointSlice>,
    /// Endpoints that are no pod of ours.
    pub(super) foreign: Vec<(&'a EndpointSlice, &'a Service, &'a Endpoint, PortList)>,
}

impl<'a> Slices<'a> {
    pub(super) fn new(objects: &'a Objects) -> Self {
        let mut out = Self {
            by_pod: HashMap::new(),
            with_slices: HashSet::new(),
            orphans: Vec::new(),
            foreign: Vec::new(),
        };
        for slice in objects.endpoint_slices.values() {
            let of = slice.service().map(|service| Key::new(&slice.meta.namespace, service));
            let Some((key, service)) = of.and_then(|key| objects.services.get_key_value(&key)) else {
                out.orphans.push(slice);
                continue;
            };
            out.with_slices.insert(key);
            for endpoint in &slice.endpoints {
                let pod = endpoint.pod.as_ref().map(|name| Key::new(&slice.meta.namespace, name));
                match pod.and_then(|key| objects.pods.get_key_value(&key)) {
                    Some((key, _)) if endpoint.ready || service.publish_not_ready => {
                        out.by_pod.entry(key).or_default().push((slice, service));
                    }
                    Some(_) => {}
                    None => out.foreign.push((slice, service, endpoint, slice_ports(service, slice))),
                }
            }
        }
        out
    }

    /// Whether a service has slices.
    pub(super) fn are_of(&self, service: &Key) -> bool {
        self.with_slices.contains(service)
    }

    fn naming(&self, pod: &Key) -> &[(&'a Arc<EndpointSlice>, &'a Service)] {
        self.by_pod.get(pod).map_or(&[], Vec::as_slice)
    }

    /// Those that have a pod as an endpoint which is sent traffic.
    pub(super) fn of(&self, pod: &Key) -> impl Iterator<Item = &'a Arc<EndpointSlice>> {
        self.naming(pod).iter().map(|(slice, _)| *slice)
    }

    /// `namespace/hostname` to the pod's ports, with `hostname` from the service's name.
    pub(super) fn services_of(
        &self,
        objects: &Objects,
        pod: &Pod,
        hostname: impl Fn(&Service) -> String,
    ) -> BTreeMap<String, PortList> {
        let mut out = BTreeMap::new();
        let name = |service: &Service| format!("{}/{}", service.meta.namespace, hostname(service));
        for (slice, service) in self.naming(&pod.meta.key()) {
            let list: &mut PortList = out.entry(name(service)).or_default();
            list.ports.extend(slice_ports(service, slice).ports);
        }
        for (key, service) in in_namespace(&objects.services, &pod.meta.namespace) {
            let derived = !service.selector.is_empty()
                && !service.external_name
                && !self.are_of(key)
                && selects(&service.selector, &pod.meta.labels);
            if derived {
                let target = |port: &ServicePort| match &port.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => pod.ports.get(&(name.clone(), port.transport)).copied(),
                };
                out.insert(name(service), port_list(service, target));
            }
        }
        out
    }
}

/// Objects of one namespace.
pub(super) fn in_namespace<'a, T>(
    objects: &'a BTreeMap<Key, T>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Key, &'a T)> + use<'a, T> {
    let namespace = namespace.to_owned();
    objects.range(Key::new(namespace.clone(), "")..).take_while(move |(key, _)| key.namespace == namespace)
}

/// The announced ports of a service with the numbers of one endpoint; ports that the endpoint lacks are left
/// out.
pub(super) fn port_list(service: &Service, target: impl Fn(&ServicePort) -> Option<u16>) -> PortList {
    let ports = announced_ports(service)
        .filter_map(|port| {
            let target = target(port)?;
            Some(Port { service_port: port.port.into(), target_port: target.into(), app_protocol: 0 })
        })
        .collect();
    PortList { ports }
}

fn slice_ports(service: &Service, slice: &EndpointSlice) -> PortList {
    let number = |name: &str, transport: Transport| {
        slice.ports.iter().find(|p| p.name == name && p.transport == transport).map(|p| p.port)
    };
    port_list(service, |port| number(&port.name, port.transport))
}
