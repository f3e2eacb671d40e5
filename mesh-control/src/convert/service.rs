//! Kubernetes services as workload API services.

use mesh_core::xds::proto::workload::load_balancing::{HealthPolicy, Mode, Scope};
use mesh_core::xds::proto::workload::{
    AppProtocol, LoadBalancing, NetworkAddress, Port, Service as Wire, Visibility, address,
};

use super::waypoint::{Traffic, bind};
use super::{Context, Resources, ip_bytes, require};
use crate::model::{
    Distribution, Kind, Meta, ObjectRef, Objects, Service, ServicePort, TargetPort, Transport,
};

const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// Adds a resource for every service that has one.
pub(super) fn convert(context: &mut Context<'_>, resources: &mut Resources) {
    let objects = context.objects;
    for service in objects.services.values().filter(|s| !s.external_name) {
        let object = ObjectRef::of(Kind::Service, &service.meta);
        context.unsupported(&object, &service.unsupported);
        let binding = bind(context, &object, &service.meta, Traffic::Service);
        let hostname = context.mesh.hostname(&service.meta.namespace, &service.meta.name);
        let name = format!("{}/{hostname}", service.meta.namespace);
        require::note(context, &name, &object, &service.meta, &binding);
        let addresses: Vec<NetworkAddress> = service
            .cluster_ips
            .iter()
            .map(|ip| NetworkAddress {
                network: context.network.clone(),
                address: ip_bytes(*ip),
                length: None,
            })
            .collect();
        let aliases = service.cluster_ips.iter().map(|ip| format!("{}/{ip}", context.network)).collect();
        let wire = Wire {
            name: service.meta.name.clone(),
            namespace: service.meta.namespace.clone(),
            hostname: hostname.clone(),
            addresses,
            ports: announced_ports(service).map(port).collect(),
            subject_alt_names: Vec::new(),
            waypoint: binding.waypoint,
            load_balancing: load_balancing(objects, service),
            ip_families: service.ip_families.into(),
            extensions: Vec::new(),
            canonical: true,
            ingress_use_waypoint: ingress_use_waypoint(objects, &service.meta),
            weighted_waypoints: binding.weighted,
            visibility: Visibility::Public.into(),
        };
        context.asked.extend(binding.asked.map(|gateway| (name.clone(), gateway)));
        resources.add(name, address::Type::Service(wire), aliases);
    }
}

/// Ports that nodes are told: all of TCP, and others where no TCP port has the same number (the workload API
/// knows no transport, so the second would shadow the first).
pub(super) fn announced_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    let tcp = |number| service.ports.iter().any(|p| p.port == number && p.transport == Transport::Tcp);
    service.ports.iter().filter(move |p| p.transport == Transport::Tcp || !tcp(p.port))
}

fn port(port: &ServicePort) -> Port {
    let app_protocol = match port.transport {
        Transport::Tcp => port.app_protocol,
        Transport::Udp | Transport::Sctp => AppProtocol::Unknown,
    };
    let target_port = match port.target {
        TargetPort::Number(number) => u32::from(number),
        TargetPort::Name(_) => 0,
    };
    Port { service_port: port.port.into(), target_port, app_protocol: app_protocol.into() }
}

fn load_balancing(objects: &Objects, service: &Service) -> Option<LoadBalancing> {
    let annotation = |meta: &Meta| meta.annotation(DISTRIBUTION).map(Distribution::parse);
    let distribution = service.distribution.or_else(|| {
        annotation(&service.meta)
            .or_else(|| objects.namespaces.get(&service.meta.namespace).and_then(|n| annotation(&n.meta)))
            .flatten()
    });
    let (scopes, mode): (&[Scope], Mode) = match (service.internal_local, distribution) {
        (true, _) => (&[Scope::Node], Mode::Strict),
        (false, Some(Distribution::SameZone)) => {
            (&[Scope::Network, Scope::Region, Scope::Zone], Mode::Failover)
        }
        (false, Some(Distribution::SameNode)) => {
            (&[Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node], Mode::Failover)
        }
        (false, None) => (&[], Mode::UnspecifiedMode),
    };
    if scopes.is_empty() && !service.publish_not_ready {
        return None;
    }
    let health = if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(LoadBalancing {
        routing_preference: scopes.iter().map(|s| i32::from(*s)).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

pub(super) fn ingress_use_waypoint(objects: &Objects, meta: &Meta) -> bool {
    let label = "istio.io/ingress-use-waypoint";
    meta.label(label).or_else(|| objects.namespace_label(&meta.namespace, label)) == Some("true")
}
