//! Pushed resources as JSON, by the names of their messages.

use std::net::IpAddr;

use mesh_core::xds::proto::security as policy;
use mesh_core::xds::proto::security::string_match::MatchType;
use mesh_core::xds::proto::workload as wire;
use mesh_core::xds::proto::workload::gateway_address::Destination;
use prost::Message;
use serde_json::{Map, Value, json};

use crate::ads::snapshot::{ResourceType, Snapshot};

/// Everything that is pushed.
pub(super) fn config_dump(snapshot: &Snapshot) -> Value {
    let (mut workloads, mut services) = (Vec::new(), Vec::new());
    for (name, entry) in snapshot.entries(ResourceType::Address).iter() {
        match wire::Address::decode(entry.value.as_slice()).ok().and_then(|a| a.r#type) {
            Some(wire::address::Type::Workload(w)) => workloads.push(workload(&w, &entry.version)),
            Some(wire::address::Type::Service(s)) => services.push(service(name, &s, &entry.version)),
            None => {}
        }
    }
    let policies: Vec<Value> = snapshot
        .entries(ResourceType::Authorization)
        .values()
        .filter_map(|e| {
            policy::Authorization::decode(e.value.as_slice()).ok().map(|p| authorization(&p, &e.version))
        })
        .collect();
    json!({
        "snapshot": snapshot.number,
        "workloads": workloads,
        "services": services,
        "policies": policies,
        "forWaypoints": for_waypoints(snapshot),
    })
}

/// Names with versions of what only waypoints are told, by short type name.
fn for_waypoints(snapshot: &Snapshot) -> Value {
    let only = ResourceType::ALL
        .into_iter()
        .filter(|kind| !matches!(kind, ResourceType::Address | ResourceType::Authorization));
    let versions = |kind| -> Map<String, Value> {
        let entries = snapshot.entries(kind).iter();
        entries.map(|(name, entry)| (name.to_string(), Value::from(entry.version.as_str()))).collect()
    };
    only.map(|kind| (kind.short().to_owned(), Value::Object(versions(kind)))).collect()
}

/// An address of the wire as text.
pub(crate) fn ip(bytes: &[u8]) -> String {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return IpAddr::from(v4).to_string();
    }
    <[u8; 16]>::try_from(bytes).map_or_else(|_| format!("{bytes:?}"), |v6| IpAddr::from(v6).to_string())
}

fn gateway(address: Option<&wire::GatewayAddress>) -> Value {
    match address.and_then(|a| a.destination.as_ref().map(|d| (d, a.hbone_mtls_port))) {
        None => Value::Null,
        Some((Destination::Hostname(h), port)) => json!(format!("{}/{}:{port}", h.namespace, h.hostname)),
        Some((Destination::Address(a), port)) => json!(format!("{}/{}:{port}", a.network, ip(&a.address))),
    }
}

fn ports(ports: &[wire::Port]) -> Value {
    let port = |p: &wire::Port| json!({"servicePort": p.service_port, "targetPort": p.target_port, "appProtocol": p.app_protocol().as_str_name()});
    Value::Array(ports.iter().map(port).collect())
}

fn workload(w: &wire::Workload, version: &str) -> Value {
    let services: serde_json::Map<String, Value> =
        w.services.iter().map(|(name, list)| (name.clone(), ports(&list.ports))).collect();
    json!({
        "uid": w.uid,
        "name": w.name,
        "namespace": w.namespace,
        "addresses": w.addresses.iter().map(|a| ip(a)).collect::<Vec<_>>(),
        "hostname": w.hostname,
        "network": w.network,
        "tunnelProtocol": w.tunnel_protocol().as_str_name(),
        "nativeTunnel": w.native_tunnel,
        "trustDomain": w.trust_domain,
        "serviceAccount": w.service_account,
        "node": w.node,
        "canonicalName": w.canonical_name,
        "canonicalRevision": w.canonical_revision,
        "workloadName": w.workload_name,
        "waypoint": gateway(w.waypoint.as_ref()),
        "services": services,
        "authorizationPolicies": w.authorization_policies,
        "status": w.status().as_str_name(),
        "networkMode": w.network_mode().as_str_name(),
        "locality": w.locality.as_ref().map(|l| [l.region.as_str(), &l.zone, &l.subzone].join("/")),
        "extensions": w.extensions.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(),
        "capacity": w.capacity,
        "version": version,
    })
}

fn service(key: &str, s: &wire::Service, version: &str) -> Value {
    let address = |a: &wire::NetworkAddress| {
        let length = a.length.map(|l| format!("/{l}")).unwrap_or_default();
        format!("{}/{}{length}", a.network, ip(&a.address))
    };
    json!({
        "key": key,
        "name": s.name,
        "namespace": s.namespace,
        "hostname": s.hostname,
        "addresses": s.addresses.iter().map(address).collect::<Vec<_>>(),
        "ports": ports(&s.ports),
        "subjectAltNames": s.subject_alt_names,
        "waypoint": gateway(s.waypoint.as_ref()),
        "loadBalancing": s.load_balancing.as_ref().map(|l| json!({
            "mode": l.mode().as_str_name(),
            "routingPreference": l.routing_preference().map(|r| r.as_str_name()).collect::<Vec<_>>(),
            "healthPolicy": l.health_policy().as_str_name(),
        })),
        "ipFamilies": s.ip_families().as_str_name(),
        "canonical": s.canonical,
        "version": version,
    })
}

fn authorization(p: &policy::Authorization, version: &str) -> Value {
    let rule = |r: &policy::Rule| {
        let clauses = r.clauses.iter().map(|c| Value::Array(c.matches.iter().map(one_match).collect()));
        Value::Array(clauses.collect())
    };
    json!({
        "key": format!("{}/{}", p.namespace, p.name),
        "scope": p.scope().as_str_name(),
        "action": p.action().as_str_name(),
        "dryRun": p.dry_run,
        "rules": p.rules.iter().map(rule).collect::<Vec<_>>(),
        "version": version,
    })
}

fn one_match(m: &policy::Match) -> Value {
    let mut out = serde_json::Map::new();
    let mut put = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            out.insert(name.to_owned(), json!(values));
        }
    };
    put("namespaces", strings(&m.namespaces));
    put("notNamespaces", strings(&m.not_namespaces));
    put("principals", strings(&m.principals));
    put("notPrincipals", strings(&m.not_principals));
    put("serviceAccounts", accounts(&m.service_accounts));
    put("notServiceAccounts", accounts(&m.not_service_accounts));
    put("sourceIps", nets(&m.source_ips));
    put("notSourceIps", nets(&m.not_source_ips));
    put("destinationIps", nets(&m.destination_ips));
    put("notDestinationIps", nets(&m.not_destination_ips));
    put("destinationPorts", m.destination_ports.iter().map(ToString::to_string).collect());
    put("notDestinationPorts", m.not_destination_ports.iter().map(ToString::to_string).collect());
    Value::Object(out)
}

fn strings(values: &[policy::StringMatch]) -> Vec<String> {
    let one = |m: &policy::StringMatch| match &m.match_type {
        Some(MatchType::Exact(s)) => s.clone(),
        Some(MatchType::Prefix(s)) => format!("{s}*"),
        Some(MatchType::Suffix(s)) => format!("*{s}"),
        Some(MatchType::Presence(())) => "*".to_owned(),
        None => String::new(),
    };
    values.iter().map(one).collect()
}

fn accounts(values: &[policy::ServiceAccountMatch]) -> Vec<String> {
    values.iter().map(|a| format!("{}/{}", a.namespace, a.service_account)).collect()
}

fn nets(values: &[policy::Address]) -> Vec<String> {
    values.iter().map(|a| format!("{}/{}", ip(&a.address), a.length)).collect()
}
