//! Which services a pod is an endpoint of, and on which ports.
//!
//! Services whose EndpointSlices are given follow them; for the others the slices are derived from selector and
//! pods, as Kubernetes' endpoint controller does.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::workload::{Port, PortList};

use super::service::announced_ports;
use crate::model::{
    Endpoint, EndpointSlice, Key, Objects, Pod, Service, ServicePort, TargetPort, Transport, selects,
};

/// Membership that EndpointSlices state, by pod, and the services that have slices.
pub(super) struct Slices<'a> {
    by_pod: BTreeMap<Key, Vec<(&'a Service, PortList)>>,
    with_slices: BTreeSet<Key>,
    /// Slices that name no service.
    pub(super) orphans: Vec<&'a EndpointSlice>,
    /// Endpoints that are no pod of ours.
    pub(super) foreign: Vec<(&'a EndpointSlice, &'a Service, &'a Endpoint, PortList)>,
}

impl<'a> Slices<'a> {
    pub(super) fn new(objects: &'a Objects) -> Self {
        let mut out = Self {
            by_pod: BTreeMap::new(),
            with_slices: BTreeSet::new(),
            orphans: Vec::new(),
            foreign: Vec::new(),
        };
        for slice in objects.endpoint_slices.values() {
            let Some(service) =
                slice.service().and_then(|s| objects.services.get(&Key::new(&slice.meta.namespace, s)))
            else {
                out.orphans.push(slice);
                continue;
            };
            out.with_slices.insert(service.meta.key());
            for endpoint in &slice.endpoints {
                let ports = slice_ports(service, slice);
                let pod = endpoint.pod.as_ref().map(|name| Key::new(&slice.meta.namespace, name));
                match pod.filter(|key| objects.pods.contains_key(key)) {
                    Some(key) if endpoint.ready || service.publish_not_ready => {
                        out.by_pod.entry(key).or_default().push((service, ports));
                    }
                    Some(_) => {}
                    None => out.foreign.push((slice, service, endpoint, ports)),
                }
            }
        }
        out
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
        for (service, ports) in self.by_pod.get(&pod.meta.key()).into_iter().flatten() {
            let list: &mut PortList = out.entry(name(service)).or_default();
            list.ports.extend(ports.ports.iter().copied());
        }
        for service in services_in(objects, &pod.meta.namespace) {
            let derived = !service.selector.is_empty()
                && !service.external_name
                && !self.with_slices.contains(&service.meta.key())
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

/// Services of one namespace.
pub(super) fn services_in<'a>(objects: &'a Objects, namespace: &str) -> impl Iterator<Item = &'a Service> {
    let namespace = namespace.to_owned();
    objects
        .services
        .range(Key::new(namespace.clone(), "")..)
        .take_while(move |(key, _)| key.namespace == namespace)
        .map(|(_, service)| &**service)
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
