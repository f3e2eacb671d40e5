//! Readers of PeerAuthentication, ServiceEntry and WorkloadEntry.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as metav1;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::{
    EndpointAddress, EntryEndpoint, EntryPort, MtlsMode, Object, PeerAuthentication, Resolution,
    ServiceEntry, WorkloadEntry, app_protocol,
};
use super::{Check, Document, FieldError, is_dns_name, match_labels, meta, shape};

/// The envelope that every custom resource has. Status is written by controllers; only what is read of it is
/// typed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Resource<S, T = IgnoredAny> {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredAny,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    pub(super) metadata: metav1::ObjectMeta,
    #[serde(default = "Option::default")]
    pub(super) spec: Option<S>,
    #[serde(default = "Option::default")]
    pub(super) status: Option<T>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SelectorText {
    pub(super) match_labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum ModeText {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl From<ModeText> for MtlsMode {
    fn from(mode: ModeText) -> Self {
        match mode {
            ModeText::Unset => Self::Unset,
            ModeText::Disable => Self::Disable,
            ModeText::Permissive => Self::Permissive,
            ModeText::Strict => Self::Strict,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MtlsText {
    mode: ModeText,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PeerSpec {
    selector: Option<SelectorText>,
    mtls: MtlsText,
    port_level_mtls: BTreeMap<String, MtlsText>,
}

pub(super) fn peer_authentication(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<PeerSpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let selector = spec.selector.unwrap_or_default().match_labels;
    match_labels(&selector, "spec.selector.matchLabels", &mut check);
    if !spec.port_level_mtls.is_empty() && selector.is_empty() {
        check.error("spec.portLevelMtls", "needs spec.selector.matchLabels: ports are set per workload");
    }
    let mut ports = BTreeMap::new();
    for (port, mtls) in &spec.port_level_mtls {
        let number = check.port_text(&format!("spec.portLevelMtls.{port}"), port);
        ports.insert(number, mtls.mode.into());
    }
    let mode = spec.mtls.mode.into();
    check.finish(Object::PeerAuthentication(Arc::new(PeerAuthentication { meta, selector, mode, ports })))
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct EndpointText {
    address: String,
    ports: BTreeMap<String, i64>,
    labels: BTreeMap<String, String>,
    network: String,
    locality: String,
    weight: Option<u32>,
    service_account: String,
}

fn endpoint(text: EndpointText, field: &str, check: &mut Check<'_>) -> EntryEndpoint {
    let address = if text.address.is_empty() {
        if text.network.is_empty() {
            check.error(
                format!("{field}.address"),
                "missing; write an IP address or a host name (or a network)",
            );
        }
        EndpointAddress::Empty
    } else if let Ok(ip) = text.address.parse() {
        EndpointAddress::Ip(ip)
    } else {
        if text.address.starts_with("unix://") {
            check.error(
                format!("{field}.address"),
                "unix sockets are not supported by the node's part of the mesh",
            );
        } else if !is_dns_name(&text.address) {
            check.error(
                format!("{field}.address"),
                format!("{:?} is neither an IP address nor a host name", text.address),
            );
        }
        EndpointAddress::Host(text.address)
    };
    let mut ports = BTreeMap::new();
    for (name, number) in text.ports {
        let number = check.port(&format!("{field}.ports.{name}"), number);
        ports.insert(name, number);
    }
    let mut parts = text.locality.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    EntryEndpoint {
        address,
        ports,
        labels: text.labels,
        network: text.network,
        locality: [next(), next(), next()],
        weight: text.weight,
        service_account: text.service_account,
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StatusText {
    conditions: Vec<ConditionText>,
    addresses: Vec<AssignedText>,
    #[serde(rename = "validationMessages")]
    _validation_messages: Option<IgnoredAny>,
    #[serde(rename = "observedGeneration")]
    _observed_generation: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ConditionText {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    #[serde(rename = "reason")]
    _reason: Option<IgnoredAny>,
    #[serde(rename = "message")]
    _message: Option<IgnoredAny>,
    #[serde(rename = "lastTransitionTime")]
    _last_transition_time: Option<IgnoredAny>,
    #[serde(rename = "lastProbeTime")]
    _last_probe_time: Option<IgnoredAny>,
    #[serde(rename = "observedGeneration")]
    _observed_generation: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AssignedText {
    value: String,
    host: String,
}

pub(super) fn workload_entry(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<EndpointText, StatusText> = shape(doc)?;
    let mut check = Check::new(doc);
    let mut meta = meta(doc, object.metadata, &mut check);
    if object.spec.is_none() {
        check.error("spec", "missing; a WorkloadEntry needs an address");
    }
    let mut spec = endpoint(object.spec.unwrap_or_default(), "spec", &mut check);
    // Istio selects by the labels of both; where they disagree, spec wins.
    for (key, value) in meta.labels.clone() {
        spec.labels.entry(key).or_insert(value);
    }
    meta.labels = spec.labels.clone();
    let unhealthy = object
        .status
        .unwrap_or_default()
        .conditions
        .iter()
        .any(|c| c.kind == "Healthy" && c.status == "False");
    check.finish(Object::WorkloadEntry(Arc::new(WorkloadEntry { meta, spec, unhealthy })))
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum LocationText {
    #[default]
    MeshExternal,
    MeshInternal,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum ResolutionText {
    #[default]
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PortText {
    number: i64,
    name: String,
    protocol: String,
    target_port: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceEntrySpec {
    hosts: Vec<String>,
    addresses: Vec<String>,
    ports: Vec<PortText>,
    location: LocationText,
    resolution: ResolutionText,
    endpoints: Vec<EndpointText>,
    workload_selector: Option<WorkloadSelectorText>,
    subject_alt_names: Vec<String>,
    export_to: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WorkloadSelectorText {
    labels: BTreeMap<String, String>,
}

fn entry_port(text: PortText, field: &str, check: &mut Check<'_>) -> EntryPort {
    let protocols = [
        "",
        "HTTP",
        "HTTPS",
        "GRPC",
        "GRPC-WEB",
        "HTTP2",
        "MONGO",
        "TCP",
        "TLS",
        "UDP",
        "HTTP_PROXY",
        "MYSQL",
        "REDIS",
    ];
    let upper = text.protocol.to_ascii_uppercase();
    if !protocols.contains(&upper.as_str()) {
        check.error(
            format!("{field}.protocol"),
            format!("{:?} is unknown; write HTTP, HTTPS, GRPC, HTTP2, TCP or TLS", text.protocol),
        );
    }
    if text.name.is_empty() {
        check.error(format!("{field}.name"), "missing; every port of a ServiceEntry has a name");
    }
    let number = check.port(&format!("{field}.number"), text.number);
    let target = text.target_port.map_or(number, |t| check.port(&format!("{field}.targetPort"), t));
    let protocol = Some(text.protocol.as_str()).filter(|p| !p.is_empty());
    EntryPort {
        app_protocol: app_protocol(protocol, &text.name),
        name: text.name,
        number,
        target,
        udp: upper == "UDP",
    }
}

pub(super) fn service_entry(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<ServiceEntrySpec, StatusText> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    if spec.hosts.is_empty() {
        check.error("spec.hosts", "missing; a ServiceEntry needs at least one host");
    }
    for (i, host) in spec.hosts.iter().enumerate() {
        if !is_dns_name(host.strip_prefix("*.").unwrap_or(host)) {
            check.error(
                format!("spec.hosts[{i}]"),
                format!("{host:?} is no host; write a DNS name, or *.domain for all below it"),
            );
        }
    }
    let mut addresses = Vec::new();
    for (i, address) in spec.addresses.iter().enumerate() {
        addresses.extend(check.cidr(&format!("spec.addresses[{i}]"), address));
    }
    if spec.ports.is_empty() {
        check.error("spec.ports", "missing; a ServiceEntry needs at least one port");
    }
    let ports: Vec<EntryPort> = spec
        .ports
        .into_iter()
        .enumerate()
        .map(|(i, p)| entry_port(p, &format!("spec.ports[{i}]"), &mut check))
        .collect();
    let selector = spec.workload_selector.map(|s| s.labels);
    if selector.is_some() && !spec.endpoints.is_empty() {
        check.error("spec.workloadSelector", "may not stand beside spec.endpoints; keep one of the two");
    }
    let endpoints: Vec<EntryEndpoint> = spec
        .endpoints
        .into_iter()
        .enumerate()
        .map(|(i, e)| endpoint(e, &format!("spec.endpoints[{i}]"), &mut check))
        .collect();
    for (i, e) in endpoints.iter().enumerate() {
        if matches!((&e.address, spec.resolution), (EndpointAddress::Host(_), ResolutionText::Static)) {
            check.error(
                format!("spec.endpoints[{i}].address"),
                "is a host name; resolution STATIC needs IP addresses (or write resolution: DNS)",
            );
        }
    }
    let mut assigned = Vec::new();
    for (i, a) in object.status.unwrap_or_default().addresses.into_iter().enumerate() {
        let ip = check.ip(&format!("status.addresses[{i}].value"), &a.value);
        assigned.extend(ip.map(|ip| (a.host, ip)));
    }
    let resolution = match spec.resolution {
        ResolutionText::None => Resolution::None,
        ResolutionText::Static => Resolution::Static,
        ResolutionText::Dns => Resolution::Dns,
        ResolutionText::DnsRoundRobin => Resolution::DnsRoundRobin,
        ResolutionText::DynamicDns => Resolution::DynamicDns,
    };
    check.finish(Object::ServiceEntry(Arc::new(ServiceEntry {
        meta,
        hosts: spec.hosts,
        addresses,
        ports,
        internal: spec.location == LocationText::MeshInternal,
        resolution,
        endpoints,
        selector,
        subject_alt_names: spec.subject_alt_names,
        assigned,
        export_to: spec.export_to,
    })))
}
