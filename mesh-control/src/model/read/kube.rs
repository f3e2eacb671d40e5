//! Readers of Kubernetes' own kinds.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_core::tls::server_key;
use mesh_core::xds::proto::workload::IpFamilies;

use super::super::credential::Pair;
use super::super::{
    Credential, Distribution, Endpoint, EndpointSlice, GatewayHost, Meta, Namespace, Node, Object, Pod,
    Service, ServiceAccount, ServicePort, SlicePort, TargetPort, Transport, app_protocol,
};
use super::{Check, Document, FieldError, meta, probes, shape};

pub(super) fn namespace(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: core::Namespace = shape(doc)?;
    let mut check = Check::new(doc);
    check.label("metadata.name", &doc.key.name);
    let meta = meta(doc, object.metadata, &mut check);
    check.finish(Object::Namespace(Arc::new(Namespace { meta })))
}

pub(super) fn node(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: core::Node = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    check.finish(Object::Node(Arc::new(Node { meta })))
}

pub(super) fn service_account(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: core::ServiceAccount = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    check.finish(Object::ServiceAccount(Arc::new(ServiceAccount { meta })))
}

/// The type of Secrets that hold a certificate with its key.
const TLS: &str = "kubernetes.io/tls";
/// The type of Secrets of which none is said.
const OPAQUE: &str = "Opaque";
/// What a Secret has of a certificate, under one of these names.
const PARTS: [&str; 4] = ["tls.crt", "cert", "ca.crt", "cacert"];

pub(super) fn secret(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let given = doc.node.text("type").unwrap_or(OPAQUE);
    let is_tls = given == TLS;
    let names_one =
        |part: &str| doc.node.get(part).is_some_and(|data| PARTS.iter().any(|p| data.get(p).is_some()));
    if !is_tls && !(given == OPAQUE && (names_one("data") || names_one("stringData"))) {
        // What is in it is nobody's business here.
        return Ok(Object::Ignored(Arc::new(Meta::default())));
    }
    let object: core::Secret = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let mut data: BTreeMap<String, Vec<u8>> =
        object.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect();
    data.extend(
        object.string_data.unwrap_or_default().into_iter().map(|(key, text)| (key, text.into_bytes())),
    );
    let (pair, problem) = match pair(&data) {
        Ok(pair) => (Some(Arc::new(pair)), None),
        Err(problem) => (None, Some(problem)),
    };
    let text = |names: [&str; 2]| {
        let found = names.iter().find_map(|name| data.get(*name));
        found.map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    };
    let (roots, revocations) = (text(["ca.crt", "cacert"]), text(["ca.crl", "crl"]));
    check.finish(Object::Credential(Arc::new(Credential { meta, is_tls, roots, revocations, pair, problem })))
}

fn pair(data: &BTreeMap<String, Vec<u8>>) -> Result<Pair, String> {
    let part = |name: &str, what: &str| {
        let missing = || format!("data has no {name:?}; {what} belongs there, as PEM");
        data.get(name).ok_or_else(missing)
    };
    // The other names are those of Istio's generic Secrets.
    let other = data.contains_key("cert") && !data.contains_key("tls.crt");
    let (of_chain, of_key) = if other { ("cert", "key") } else { ("tls.crt", "tls.key") };
    let (chain, key) = (part(of_chain, "the certificate")?, part(of_key, "its private key")?);
    server_key(chain, key).map_err(|error| format!("of {of_chain} and {of_key}, {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Pair { chain: text(chain), key: text(key) })
}

fn transport(value: Option<&str>, field: &str, check: &mut Check<'_>) -> Transport {
    match value {
        None | Some("TCP") => Transport::Tcp,
        Some("UDP") => Transport::Udp,
        Some("SCTP") => Transport::Sctp,
        Some(other) => {
            check.error(field, format!("{other:?} is no protocol; write TCP, UDP or SCTP"));
            Transport::Tcp
        }
    }
}

/// A container runtime knows a static pod by the hash of its manifest, which the pod in the API server is annotated with.
fn uid(metadata: &ObjectMeta) -> String {
    let hash = metadata.annotations.iter().flatten().find(|(key, _)| *key == "kubernetes.io/config.hash");
    hash.map(|(_, hash)| hash.clone()).or_else(|| metadata.uid.clone()).unwrap_or_default()
}

pub(super) fn pod(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: core::Pod = shape(doc)?;
    let mut check = Check::new(doc);
    let spec = object.spec.unwrap_or_default();
    let status = object.status.unwrap_or_default();
    let owner = object
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true))
        .map(|o| (o.kind.clone(), o.name.clone()));
    let mut ips = Vec::new();
    for (i, ip) in status.pod_ips.iter().flatten().enumerate() {
        ips.extend(check.ip(&format!("status.podIPs[{i}].ip"), &ip.ip));
    }
    if let Some(ip) = &status.pod_ip {
        let first = check.ip("status.podIP", ip);
        match (first, ips.first()) {
            (Some(ip), None) => ips.push(ip),
            (Some(a), Some(b)) if a != *b => {
                check.error("status.podIP", format!("{a} is not the first of status.podIPs ({b})"));
            }
            _ => {}
        }
    }
    let mut ports = BTreeMap::new();
    // An init container that is restarted runs beside the others (a native sidecar), and its ports count.
    let init = spec.init_containers.iter().flatten().enumerate();
    let init = init.filter(|(_, c)| c.restart_policy.as_deref() == Some("Always"));
    let all = spec.containers.iter().enumerate().map(|(i, c)| (format!("spec.containers[{i}]"), c));
    for (place, container) in all.chain(init.map(|(i, c)| (format!("spec.initContainers[{i}]"), c))) {
        for (p, port) in container.ports.iter().flatten().enumerate() {
            let field = format!("{place}.ports[{p}]");
            let number = check.port(&format!("{field}.containerPort"), i64::from(port.container_port));
            let transport = transport(port.protocol.as_deref(), &format!("{field}.protocol"), &mut check);
            if let Some(name) = &port.name {
                check.label(&format!("{field}.name"), name);
                ports.entry((name.clone(), transport)).or_insert(number);
            }
        }
    }
    let uid = uid(&object.metadata);
    let restarted = spec.init_containers.iter().flatten();
    let restarted = restarted.filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let mut probe_ports: Vec<u16> = spec.containers.iter().chain(restarted).flat_map(probes::ports).collect();
    probe_ports.sort_unstable();
    probe_ports.dedup();
    let phase = status.phase.as_deref();
    if let Some(other) =
        phase.filter(|p| !["Pending", "Running", "Succeeded", "Failed", "Unknown"].contains(p))
    {
        check.error(
            "status.phase",
            format!("{other:?} is no phase; write Pending, Running, Succeeded, Failed or Unknown"),
        );
    }
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    let pod = Pod {
        meta: meta(doc, object.metadata, &mut check),
        ips,
        node: spec.node_name.unwrap_or_default(),
        service_account: spec
            .service_account_name
            .filter(|s| !s.is_empty())
            .unwrap_or_else(|| "default".into()),
        host_network: spec.host_network.unwrap_or_default(),
        terminal: matches!(phase, Some("Succeeded" | "Failed")),
        ready,
        ports,
        owner,
        uid,
        probe_ports,
    };
    check.finish(Object::Pod(Arc::new(pod)))
}

pub(super) fn service(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: core::Service = shape(doc)?;
    let mut check = Check::new(doc);
    check.label("metadata.name", &doc.key.name);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if !["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"].contains(&kind) {
        check.error(
            "spec.type",
            format!("{kind:?} is no type; write ClusterIP, NodePort, LoadBalancer or ExternalName"),
        );
    }
    let mut cluster_ips = Vec::new();
    match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(all), _) if !all.is_empty() => {
            for (i, ip) in all.iter().enumerate().filter(|(_, ip)| *ip != "None") {
                cluster_ips.extend(check.ip(&format!("spec.clusterIPs[{i}]"), ip));
            }
        }
        (_, Some(ip)) if ip != "None" && !ip.is_empty() => cluster_ips.extend(check.ip("spec.clusterIP", ip)),
        _ => {}
    }
    let ports = service_ports(&spec, kind, &mut check);
    let internal_local = match spec.internal_traffic_policy.as_deref() {
        None | Some("Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            check
                .error("spec.internalTrafficPolicy", format!("{other:?} is unknown; write Cluster or Local"));
            false
        }
    };
    let distribution = spec.traffic_distribution.as_deref().and_then(|value| {
        let known = ["PreferClose", "PreferSameZone", "PreferSameNode"].contains(&value);
        if !known {
            check.error(
                "spec.trafficDistribution",
                format!("{value:?} is unknown; write PreferClose, PreferSameZone or PreferSameNode"),
            );
        }
        Distribution::parse(value).filter(|_| known)
    });
    let ip_families = ip_families(spec.ip_families.as_deref().unwrap_or_default(), &mut check);
    let mut unsupported = Vec::new();
    if spec.session_affinity.as_deref().is_some_and(|a| a != "None") {
        unsupported.push("spec.sessionAffinity".to_owned());
    }
    if spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty()) {
        unsupported.push("spec.externalIPs".to_owned());
    }
    let balancer = object.status.and_then(|status| status.load_balancer).and_then(|b| b.ingress);
    // What a cloud writes here is not the user's to mend: what cannot be read is passed over.
    let ip = |text: &str| text.parse().ok().map(GatewayHost::Ip);
    let host = |text: String| GatewayHost::Hostname(text);
    let ingress = balancer.into_iter().flatten();
    let ingress = ingress.filter_map(|i| i.ip.as_deref().and_then(ip).or_else(|| i.hostname.map(host)));
    let ingress = ingress.collect();
    let export = "networking.istio.io/exportTo";
    if meta.annotation(export).is_some() {
        unsupported.push(format!("annotation {export}"));
    }
    let service = Service {
        meta,
        cluster_ips,
        selector: spec.selector.unwrap_or_default(),
        ports,
        ip_families,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        internal_local,
        distribution,
        external_name: kind == "ExternalName",
        load_balancer: kind == "LoadBalancer",
        ingress,
        unsupported,
    };
    check.finish(Object::Service(Arc::new(service)))
}

fn ip_families(families: &[String], check: &mut Check<'_>) -> IpFamilies {
    let (mut v4, mut v6) = (false, false);
    for (i, family) in families.iter().enumerate() {
        match family.as_str() {
            "IPv4" => v4 = true,
            "IPv6" => v6 = true,
            other => {
                check.error(
                    format!("spec.ipFamilies[{i}]"),
                    format!("{other:?} is unknown; write IPv4 or IPv6"),
                );
            }
        }
    }
    match (v4, v6) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

fn service_ports(spec: &core::ServiceSpec, kind: &str, check: &mut Check<'_>) -> Vec<ServicePort> {
    let given = spec.ports.as_deref().unwrap_or_default();
    let headless = spec.cluster_ip.as_deref() == Some("None");
    if given.is_empty() && kind != "ExternalName" && !headless {
        check.error("spec.ports", "missing; a service needs at least one port");
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut ports = Vec::new();
    for (i, port) in given.iter().enumerate() {
        let field = format!("spec.ports[{i}]");
        let number = check.port(&format!("{field}.port"), i64::from(port.port));
        let transport = transport(port.protocol.as_deref(), &format!("{field}.protocol"), check);
        let name = port.name.clone().unwrap_or_default();
        if name.is_empty() && given.len() > 1 {
            check.error(format!("{field}.name"), "missing; a service with several ports names each of them");
        } else if !name.is_empty() {
            check.label(&format!("{field}.name"), &name);
        }
        if !seen.insert((name.clone(), 0, None)) && !name.is_empty() {
            check.error(format!("{field}.name"), format!("{name:?} is used by another port of this service"));
        }
        if !seen.insert((String::new(), number, Some(transport))) {
            check.error(format!("{field}.port"), format!("{number} is used by another port of this service"));
        }
        let target = match &port.target_port {
            None => TargetPort::Number(number),
            Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(n)) => {
                TargetPort::Number(check.port(&format!("{field}.targetPort"), i64::from(*n)))
            }
            Some(IntOrString::String(s)) => {
                if s.parse::<u16>().is_ok() {
                    check.error(
                        format!("{field}.targetPort"),
                        format!("{s:?} in quotes is a port's name; write the number without quotes"),
                    );
                }
                TargetPort::Name(s.clone())
            }
        };
        let app_protocol = app_protocol(port.app_protocol.as_deref(), &name);
        ports.push(ServicePort { name, port: number, target, transport, app_protocol });
    }
    ports
}

pub(super) fn endpoint_slice(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: discovery::EndpointSlice = shape(doc)?;
    let mut check = Check::new(doc);
    let fqdn = match object.address_type.as_str() {
        "IPv4" | "IPv6" => false,
        "FQDN" => true,
        other => {
            check.error("addressType", format!("{other:?} is unknown; write IPv4 or IPv6"));
            false
        }
    };
    if fqdn {
        check.error("addressType", "FQDN is not supported; use a ServiceEntry with resolution DNS");
    }
    let mut ports = Vec::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        let Some(number) = port.port else {
            check.error(format!("ports[{i}].port"), "missing; write the number of the port");
            continue;
        };
        ports.push(SlicePort {
            name: port.name.clone().unwrap_or_default(),
            port: check.port(&format!("ports[{i}].port"), i64::from(number)),
            transport: transport(port.protocol.as_deref(), &format!("ports[{i}].protocol"), &mut check),
        });
    }
    let mut endpoints = Vec::new();
    for (i, endpoint) in object.endpoints.iter().enumerate() {
        let mut addresses = Vec::new();
        if endpoint.addresses.is_empty() {
            check.error(format!("endpoints[{i}].addresses"), "missing; an endpoint needs an address");
        }
        for (j, ip) in endpoint.addresses.iter().enumerate().filter(|_| !fqdn) {
            addresses.extend(check.ip(&format!("endpoints[{i}].addresses[{j}]"), ip));
        }
        let target = endpoint.target_ref.as_ref();
        endpoints.push(Endpoint {
            addresses,
            ready: endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true),
            pod: target.filter(|t| t.kind.as_deref() == Some("Pod")).and_then(|t| t.name.clone()),
            node: endpoint.node_name.clone().unwrap_or_default(),
        });
    }
    let meta = meta(doc, object.metadata, &mut check);
    check.finish(Object::EndpointSlice(Arc::new(EndpointSlice { meta, ports, endpoints })))
}
