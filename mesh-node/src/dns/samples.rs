//! Services and workloads for the tests of this module.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::state::{MeshOptions, MeshState, StateIndex};
use mesh_core::xds::proto::workload as wire;

/// A service of namespace and hostname with addresses (of the default network, or `network/address`).
pub(super) fn service(namespace: &str, hostname: &str, vips: &[&str]) -> wire::Service {
    wire::Service {
        name: hostname.split('.').next().unwrap().to_owned(),
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        addresses: vips.iter().map(|vip| network_address(vip)).collect(),
        ..Default::default()
    }
}

fn network_address(text: &str) -> wire::NetworkAddress {
    let (network, ip) = text.split_once('/').unwrap_or(("", text));
    wire::NetworkAddress { network: network.to_owned(), address: octets(ip), length: None }
}

fn octets(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A pod of namespace `shop` on node `n1` behind services (`namespace/hostname`).
pub(super) fn pod(name: &str, addresses: &[&str], services: &[&str]) -> wire::Workload {
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        service_account: name.to_owned(),
        node: "n1".to_owned(),
        canonical_name: name.to_owned(),
        canonical_revision: "v1".to_owned(),
        addresses: addresses.iter().map(|ip| octets(ip)).collect(),
        services: services.iter().map(|key| ((*key).to_owned(), wire::PortList::default())).collect(),
        ..Default::default()
    }
}

/// A state with the client pod `client` of namespace `shop`.
pub(super) fn mesh(services: Vec<wire::Service>, workloads: Vec<wire::Workload>) -> Arc<MeshState> {
    use wire::address::Type;
    let mut index = StateIndex::new(MeshOptions::default());
    let workloads = workloads.into_iter().chain([pod("client", &["10.0.0.1"], &[])]).map(Type::Workload);
    for resource in services.into_iter().map(Type::Service).chain(workloads) {
        index.apply_address("sample", &wire::Address { r#type: Some(resource) }).unwrap();
    }
    index.snapshot()
}
