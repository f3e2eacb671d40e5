//! ServiceEntry and WorkloadEntry: services and workloads that are no Kubernetes services and pods.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_core::xds::proto::workload::load_balancing::{HealthPolicy, Mode};
use mesh_core::xds::proto::workload::{
    AppProtocol, IpFamilies, LoadBalancing, Locality, NetworkAddress, Port, PortList, Service as Wire,
    TunnelProtocol, Visibility, Workload, WorkloadStatus, WorkloadType, address,
};
use twox_hash::XxHash64;

use super::endpoints::{in_namespace, port_list};
use super::service::ingress_use_waypoint;
use super::waypoint::{Traffic, bind};
use super::workload::{announced_trust_domain, canonical_name, canonical_revision};
use super::{Context, Mesh, Resources, ip_bytes};
use crate::model::{
    Condition, EndpointAddress, EntryEndpoint, EntryPort, Key, Kind, ObjectRef, Objects, Resolution,
    ServiceEntry, TargetPort, WorkloadEntry, selects,
};

/// One host of a ServiceEntry that is in force.
struct Host<'a> {
    entry: &'a ServiceEntry,
    host: &'a str,
    canonical: bool,
    addresses: Vec<IpNet>,
}

/// The hosts of all ServiceEntries, conflicts resolved and addresses given out.
pub(super) struct ServiceIndex<'a> {
    hosts: Vec<Host<'a>>,
    /// By namespace, those whose entry selects workloads.
    selecting: HashMap<&'a str, Vec<usize>>,
}

impl<'a> ServiceIndex<'a> {
    /// In one namespace a Kubernetes service beats an entry, and the oldest entry beats the others.
    pub(super) fn new(objects: &'a Objects, mesh: &Mesh, conditions: &mut Vec<Condition>) -> Self {
        let kubernetes: BTreeMap<String, &str> = objects
            .services
            .values()
            .filter(|s| !s.external_name)
            .map(|s| (mesh.hostname(&s.meta.namespace, &s.meta.name), s.meta.namespace.as_str()))
            .collect();
        let mut entries: Vec<&ServiceEntry> = objects.service_entries.values().map(|e| &**e).collect();
        entries.sort_by(|a, b| a.meta.age().cmp(&b.meta.age()));
        let mut taken = BTreeMap::new();
        let mut known = BTreeSet::new();
        let mut hosts = Vec::new();
        let mut allocator = Allocator::default();
        for entry in entries {
            for host in &entry.hosts {
                let loser = |winner: String| {
                    Condition::new(
                        ObjectRef::of(Kind::ServiceEntry, &entry.meta),
                        "Accepted",
                        false,
                        "Conflicted",
                        format!("host {host} belongs to {winner}, which comes first"),
                    )
                };
                if kubernetes.get(host.as_str()) == Some(&entry.meta.namespace.as_str()) {
                    conditions.push(loser("the Service of that name".into()));
                    continue;
                }
                if let Some(winner) =
                    taken.insert((entry.meta.namespace.as_str(), host.as_str()), &entry.meta.name)
                {
                    taken.insert((entry.meta.namespace.as_str(), host.as_str()), winner);
                    conditions.push(loser(format!("ServiceEntry {}/{winner}", entry.meta.namespace)));
                    continue;
                }
                let canonical = known.insert(host.as_str()) && !kubernetes.contains_key(host);
                let addresses = allocator.addresses(entry, host);
                hosts.push(Host { entry, host, canonical, addresses });
            }
        }
        let mut selecting: HashMap<&str, Vec<usize>> = HashMap::new();
        for (place, host) in hosts.iter().enumerate().filter(|(_, host)| host.entry.selector.is_some()) {
            selecting.entry(&host.entry.meta.namespace).or_default().push(place);
        }
        Self { hosts, selecting }
    }

    /// Adds the entries whose selector takes a workload with these labels.
    pub(super) fn select(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
        overrides: &BTreeMap<String, u16>,
        services: &mut BTreeMap<String, PortList>,
    ) {
        // While they are converted themselves, they are not here.
        let places = self.selecting.get(namespace).into_iter().flatten();
        for host in places.filter_map(|place| self.hosts.get(*place)) {
            if host.entry.selector.as_ref().is_some_and(|s| selects(s, labels)) {
                services
                    .insert(format!("{namespace}/{}", host.host), entry_ports(&host.entry.ports, overrides));
            }
        }
    }
}

/// Gives addresses to entries without one: always the same for the same entry as long as no other takes it.
#[derive(Default)]
struct Allocator {
    used: BTreeSet<u16>,
}

impl Allocator {
    fn addresses(&mut self, entry: &ServiceEntry, host: &str) -> Vec<IpNet> {
        if !entry.addresses.is_empty() {
            return entry.addresses.clone();
        }
        let assigned: Vec<IpNet> = entry
            .assigned
            .iter()
            .filter(|(h, _)| h.is_empty() || h == host)
            .map(|(_, ip)| IpNet::from(*ip))
            .collect();
        let wanted = entry.meta.label("networking.istio.io/enable-autoallocate-ip") != Some("false")
            && !host.starts_with("*.")
            && entry.resolution != Resolution::None;
        if !assigned.is_empty() || !wanted || self.used.len() >= 65_000 {
            return assigned;
        }
        let seed = format!("{}/{}/{host}", entry.meta.namespace, entry.meta.name);
        let hash = XxHash64::oneshot(0, seed.as_bytes());
        let mut slot = u16::try_from(hash % 65_534).unwrap_or_default() + 1;
        while !self.used.insert(slot) {
            slot = if slot >= 65_534 { 1 } else { slot + 1 };
        }
        // The ranges of Istio's allocator: 240.240.0.0/16 and 2001:2::/48 (benchmarking, never routed).
        let [high, low] = slot.to_be_bytes();
        let v4 = Ipv4Addr::new(240, 240, high, low);
        let v6 = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, slot);
        vec![IpNet::from(IpAddr::V4(v4)), IpNet::from(IpAddr::V6(v6))]
    }
}

fn tcp_ports(ports: &[EntryPort]) -> impl Iterator<Item = &EntryPort> {
    ports.iter().filter(|p| !p.udp || !ports.iter().any(|o| !o.udp && o.number == p.number))
}

fn entry_ports(ports: &[EntryPort], overrides: &BTreeMap<String, u16>) -> PortList {
    let ports = tcp_ports(ports)
        .map(|p| Port {
            service_port: p.number.into(),
            target_port: overrides.get(&p.name).copied().unwrap_or(p.target).into(),
            app_protocol: 0,
        })
        .collect();
    PortList { ports }
}

/// Adds services and workloads of all entries.
pub(super) fn convert(context: &mut Context<'_>, resources: &mut Resources) {
    let hosts = std::mem::take(&mut context.services.hosts);
    for host in &hosts {
        entry_service(context, host, resources);
    }
    for entry in context.objects.service_entries.values() {
        let own: Vec<&Host<'_>> = hosts.iter().filter(|h| std::ptr::eq(h.entry, &**entry)).collect();
        inline_endpoints(context, entry, &own, resources);
        let asked = own.iter().find_map(|host| context.asked.get(&service_name(host)));
        if let (_, Some(note)) = visibility(entry, asked) {
            context.unsupported(&ObjectRef::of(Kind::ServiceEntry, &entry.meta), &[note.to_owned()]);
        }
    }
    context.services.hosts = hosts;
    for entry in context.objects.workload_entries.values() {
        workload_entry(context, entry, resources);
    }
}

/// Name of the resource of an entry's host.
fn service_name(host: &Host<'_>) -> String {
    format!("{}/{}", host.entry.meta.namespace, host.host)
}

/// Who sees an entry's services, and what of `exportTo` cannot be told: the workload API has everybody, or the entry's own
/// namespace. A waypoint of another namespace has to see what it stands before.
fn visibility(entry: &ServiceEntry, asked: Option<&Key>) -> (Visibility, Option<&'static str>) {
    let own = entry.meta.namespace.as_str();
    if entry.export_to.is_empty() || entry.export_to.iter().any(|to| to == "*") {
        return (Visibility::Public, None);
    }
    if entry.export_to.iter().any(|to| ![".", "~", own].contains(&to.as_str())) {
        let note = "spec.exportTo (of other namespaces none is told from another: every one sees it)";
        return (Visibility::Public, Some(note));
    }
    if asked.is_some_and(|waypoint| waypoint.namespace != own) {
        let note = "spec.exportTo (its waypoint is of another namespace: every one sees it)";
        return (Visibility::Public, Some(note));
    }
    let nobody = entry.export_to.iter().all(|to| to == "~");
    (Visibility::Namespace, nobody.then_some("spec.exportTo[~] (to nobody: its own namespace sees it)"))
}

fn entry_service(context: &mut Context<'_>, host: &Host<'_>, resources: &mut Resources) {
    let entry = host.entry;
    let object = ObjectRef::of(Kind::ServiceEntry, &entry.meta);
    let binding = bind(context, &object, &entry.meta, Traffic::Service);
    if binding.waypoint.is_none()
        && (host.host.starts_with("*.") || entry.resolution == Resolution::DynamicDns)
    {
        context.conditions.push(Condition::new(
            object,
            "istio.io/WaypointMissing",
            true,
            "NoWaypoint",
            format!("host {} is resolved per connection, which only a waypoint can do; bind one", host.host),
        ));
    }
    let load_balancing = (entry.resolution == Resolution::None).then(|| LoadBalancing {
        routing_preference: Vec::new(),
        mode: Mode::Passthrough.into(),
        health_policy: HealthPolicy::AllowAll.into(),
    });
    let mut aliases = Vec::new();
    let mut addresses = Vec::new();
    for net in &host.addresses {
        let single = net.prefix_len() == net.max_prefix_len();
        aliases.push(if single {
            format!("{}/{}", context.network, net.addr())
        } else {
            format!("{}/{net}", context.network)
        });
        addresses.push(NetworkAddress {
            network: context.network.clone(),
            address: ip_bytes(net.addr()),
            length: (!single).then(|| u32::from(net.prefix_len())),
        });
    }
    let ports = tcp_ports(&entry.ports).map(|p| Port {
        service_port: p.number.into(),
        target_port: p.target.into(),
        app_protocol: if p.udp { AppProtocol::Unknown } else { p.app_protocol }.into(),
    });
    let wire = Wire {
        name: entry.meta.name.clone(),
        namespace: entry.meta.namespace.clone(),
        hostname: host.host.to_owned(),
        addresses,
        ports: ports.collect(),
        subject_alt_names: entry.subject_alt_names.clone(),
        waypoint: binding.waypoint,
        load_balancing,
        ip_families: IpFamilies::Automatic.into(),
        extensions: Vec::new(),
        canonical: host.canonical,
        ingress_use_waypoint: ingress_use_waypoint(context.objects, &entry.meta),
        weighted_waypoints: binding.weighted,
        visibility: visibility(entry, binding.asked.as_ref()).0.into(),
    };
    let name = service_name(host);
    context.asked.extend(binding.asked.map(|gateway| (name.clone(), gateway)));
    resources.add(name, address::Type::Service(wire), aliases);
}

/// Inline endpoints; an entry that is resolved by DNS and has none has one per host.
fn inline_endpoints(
    context: &Context<'_>,
    entry: &ServiceEntry,
    hosts: &[&Host<'_>],
    resources: &mut Resources,
) {
    let dns = matches!(entry.resolution, Resolution::Dns | Resolution::DnsRoundRobin);
    let services = |hosts: &[&Host<'_>], overrides: &BTreeMap<String, u16>| {
        let key = |h: &&Host<'_>| format!("{}/{}", entry.meta.namespace, h.host);
        hosts.iter().map(|h| (key(h), entry_ports(&entry.ports, overrides))).collect::<BTreeMap<_, _>>()
    };
    let prefix = format!(
        "{}/networking.istio.io/ServiceEntry/{}/{}",
        context.mesh.cluster_id, entry.meta.namespace, entry.meta.name
    );
    if entry.endpoints.is_empty() && entry.selector.is_none() && dns {
        for host in hosts.iter().filter(|h| !h.host.starts_with("*.")) {
            let endpoint = EntryEndpoint {
                address: EndpointAddress::Host(host.host.to_owned()),
                ports: BTreeMap::new(),
                labels: entry.meta.labels.clone(),
                network: String::new(),
                locality: Default::default(),
                weight: None,
                service_account: String::new(),
            };
            let uid = format!("{prefix}/{}", host.host);
            let services = services(&[host], &BTreeMap::new());
            add_endpoint(
                context,
                &uid,
                &entry.meta.namespace,
                host.host,
                &endpoint,
                services,
                false,
                resources,
            );
        }
        return;
    }
    // Passthrough dials what the client dialled: endpoints would never be asked.
    if entry.resolution == Resolution::None {
        return;
    }
    for endpoint in &entry.endpoints {
        let address = match &endpoint.address {
            EndpointAddress::Ip(ip) => ip.to_string(),
            EndpointAddress::Host(host) => host.clone(),
            EndpointAddress::Empty => endpoint.network.clone(),
        };
        let uid = format!("{prefix}/{address}");
        let services = services(hosts, &endpoint.ports);
        let internal = entry.internal;
        add_endpoint(
            context,
            &uid,
            &entry.meta.namespace,
            &entry.meta.name,
            endpoint,
            services,
            internal,
            resources,
        );
    }
}

fn workload_entry(context: &mut Context<'_>, entry: &WorkloadEntry, resources: &mut Resources) {
    let meta = &entry.meta;
    let uid = format!(
        "{}/networking.istio.io/WorkloadEntry/{}/{}",
        context.mesh.cluster_id, meta.namespace, meta.name
    );
    let mut services = BTreeMap::new();
    let of_namespace = in_namespace(&context.objects.services, &meta.namespace).map(|(_, service)| service);
    for service in of_namespace.filter(|s| !s.external_name) {
        if !service.selector.is_empty() && selects(&service.selector, &entry.spec.labels) {
            let list = port_list(service, |port| {
                entry.spec.ports.get(&port.name).copied().or(match &port.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => entry.spec.ports.get(name).copied(),
                })
            });
            let hostname = context.mesh.hostname(&meta.namespace, &service.meta.name);
            services.insert(format!("{}/{hostname}", meta.namespace), list);
        }
    }
    context.services.select(&meta.namespace, &entry.spec.labels, &entry.spec.ports, &mut services);
    let annotated = meta.annotation(super::enrol::REDIRECTION) == Some("enabled");
    let object = ObjectRef::of(Kind::WorkloadEntry, meta);
    let waypoint = bind(context, &object, meta, Traffic::Workload).waypoint;
    let (mut workload, aliases) =
        endpoint_workload(context, &uid, &meta.namespace, &meta.name, &entry.spec, true);
    workload.services = services;
    workload.waypoint = waypoint;
    if annotated {
        workload.tunnel_protocol = TunnelProtocol::Hbone.into();
    }
    if entry.unhealthy {
        workload.status = WorkloadStatus::Unhealthy.into();
    }
    resources.add_workload(workload, &entry.spec.labels, aliases);
}

#[allow(
    clippy::too_many_arguments,
    reason = "one call per kind of endpoint; a struct would only rename them"
)]
fn add_endpoint(
    context: &Context<'_>,
    uid: &str,
    namespace: &str,
    name: &str,
    endpoint: &EntryEndpoint,
    services: BTreeMap<String, PortList>,
    internal: bool,
    resources: &mut Resources,
) {
    let (mut workload, aliases) = endpoint_workload(context, uid, namespace, name, endpoint, internal);
    workload.services = services;
    resources.add_workload(workload, &endpoint.labels, aliases);
}

fn endpoint_workload(
    context: &Context<'_>,
    uid: &str,
    namespace: &str,
    name: &str,
    endpoint: &EntryEndpoint,
    internal: bool,
) -> (Workload, Vec<String>) {
    let native = internal && endpoint.labels.get("networking.istio.io/tunnel").is_some_and(|v| v == "http");
    let network =
        if endpoint.network.is_empty() { context.network.clone() } else { endpoint.network.clone() };
    let (addresses, hostname, aliases) = match &endpoint.address {
        EndpointAddress::Ip(ip) => (vec![ip_bytes(*ip)], String::new(), vec![format!("{network}/{ip}")]),
        EndpointAddress::Host(host) => (Vec::new(), host.clone(), Vec::new()),
        EndpointAddress::Empty => (Vec::new(), String::new(), Vec::new()),
    };
    let [region, zone, subzone] = endpoint.locality.clone();
    let locality = Locality { region, zone, subzone };
    let workload = Workload {
        uid: uid.to_owned(),
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        addresses,
        hostname,
        network,
        tunnel_protocol: if native { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
        native_tunnel: native,
        trust_domain: announced_trust_domain(&context.mesh.trust_domain),
        service_account: endpoint.service_account.clone(),
        canonical_name: canonical_name(&endpoint.labels, name),
        canonical_revision: canonical_revision(&endpoint.labels),
        workload_type: WorkloadType::Pod.into(),
        workload_name: name.to_owned(),
        authorization_policies: context.policies_of(namespace, &endpoint.labels),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: context.mesh.cluster_id.clone(),
        locality: (locality != Locality::default()).then_some(locality),
        capacity: endpoint.weight,
        ..Workload::default()
    };
    (workload, aliases)
}
