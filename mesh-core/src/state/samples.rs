//! Small meshes for tests, built from wire messages, so that tests go through the decoders.

use std::net::IpAddr;
use std::sync::Arc;

use super::{MeshOptions, MeshState, StateIndex, Workload};
use crate::xds::proto::workload as wire;

/// A mesh under construction.
#[derive(Default)]
pub(crate) struct Mesh {
    pub(crate) index: StateIndex,
}

impl Mesh {
    pub(crate) fn on_network(network: &str) -> Self {
        let options = MeshOptions { network: network.into(), ..MeshOptions::default() };
        Self { index: StateIndex::new(options) }
    }

    pub(crate) fn with(mut self, resource: impl Into<Resource>) -> Self {
        self.add(resource);
        self
    }

    pub(crate) fn add(&mut self, resource: impl Into<Resource>) {
        let address = match resource.into() {
            Resource::Workload(workload) => wire::address::Type::Workload(*workload),
            Resource::Service(service) => wire::address::Type::Service(*service),
        };
        self.index.apply_address("", &wire::Address { r#type: Some(address) }).unwrap();
    }

    pub(crate) fn state(&mut self) -> Arc<MeshState> {
        self.index.snapshot()
    }

    pub(crate) fn workload(&self, name: &str) -> Arc<Workload> {
        self.index.state().workload(&uid(name)).unwrap_or_else(|| panic!("no workload {name}")).clone()
    }
}

pub(crate) enum Resource {
    Workload(Box<wire::Workload>),
    Service(Box<wire::Service>),
}

impl From<wire::Workload> for Resource {
    fn from(workload: wire::Workload) -> Self {
        Self::Workload(Box::new(workload))
    }
}

impl From<wire::Service> for Resource {
    fn from(service: wire::Service) -> Self {
        Self::Service(Box::new(service))
    }
}

/// `name` as the uid of a pod of namespace `shop`; a name with a slash names its namespace first.
pub(crate) fn uid(name: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    format!("Kubernetes//Pod/{namespace}/{name}")
}

pub(crate) fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A captured pod of `namespace/name` (or `name` in `shop`) whose service account is its name, on node `n1`.
pub(crate) fn pod(name: &str, ips: &[&str]) -> wire::Workload {
    let (namespace, short) = name.split_once('/').unwrap_or(("shop", name));
    wire::Workload {
        uid: uid(name),
        name: short.to_owned(),
        namespace: namespace.to_owned(),
        addresses: ips.iter().map(|ip| bytes(ip)).collect(),
        service_account: short.to_owned(),
        node: "n1".to_owned(),
        workload_name: short.to_owned(),
        canonical_name: short.to_owned(),
        canonical_revision: "v1".to_owned(),
        workload_type: wire::WorkloadType::Pod.into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        ..wire::Workload::default()
    }
}

/// The same outside of the mesh.
pub(crate) fn plain(name: &str, ips: &[&str]) -> wire::Workload {
    wire::Workload { tunnel_protocol: wire::TunnelProtocol::None.into(), ..pod(name, ips) }
}

pub(crate) trait WorkloadExt {
    /// Endpoint of a service of the same or a named namespace, with own `(service port, target port)` pairs.
    fn serving(self, service: &str, ports: &[(u32, u32)]) -> Self;
}

impl WorkloadExt for wire::Workload {
    fn serving(mut self, service: &str, ports: &[(u32, u32)]) -> Self {
        let (namespace, name) = service.split_once('/').unwrap_or(("shop", service));
        let ports = ports.iter().map(|(s, t)| port(*s, *t)).collect();
        self.services.insert(format!("{namespace}/{}", host(namespace, name)), wire::PortList { ports });
        self
    }
}

pub(crate) fn host(namespace: &str, name: &str) -> String {
    format!("{name}.{namespace}.svc.cluster.local")
}

pub(crate) fn port(service_port: u32, target_port: u32) -> wire::Port {
    wire::Port { service_port, target_port, app_protocol: 0 }
}

/// A Kubernetes service with one address on the default network.
pub(crate) fn service(name: &str, vip: &str, ports: &[(u32, u32)]) -> wire::Service {
    let (namespace, short) = name.split_once('/').unwrap_or(("shop", name));
    wire::Service {
        name: short.to_owned(),
        namespace: namespace.to_owned(),
        hostname: host(namespace, short),
        addresses: if vip.is_empty() { Vec::new() } else { vec![vip_on("", vip)] },
        ports: ports.iter().map(|(s, t)| port(*s, *t)).collect(),
        canonical: true,
        ..wire::Service::default()
    }
}

/// `ip` or `ip/length`.
pub(crate) fn vip_on(network: &str, vip: &str) -> wire::NetworkAddress {
    let (ip, length) = match vip.split_once('/') {
        Some((ip, length)) => (ip, Some(length.parse().unwrap())),
        None => (vip, None),
    };
    wire::NetworkAddress { network: network.to_owned(), address: bytes(ip), length }
}

pub(crate) fn gateway_by_host(namespace: &str, hostname: &str, port: u32) -> wire::GatewayAddress {
    let name = wire::NamespacedHostname { namespace: namespace.to_owned(), hostname: hostname.to_owned() };
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(name)),
        hbone_mtls_port: port,
    }
}

pub(crate) fn gateway_by_ip(network: &str, ip: &str, port: u32) -> wire::GatewayAddress {
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Address(vip_on(network, ip))),
        hbone_mtls_port: port,
    }
}

pub(crate) fn balancing(
    mode: wire::load_balancing::Mode,
    scopes: &[wire::load_balancing::Scope],
) -> wire::LoadBalancing {
    wire::LoadBalancing {
        mode: mode.into(),
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        health_policy: wire::load_balancing::HealthPolicy::OnlyHealthy.into(),
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
