//! Pods, and endpoints of EndpointSlices that are no pods, as workloads.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::identity::DEFAULT_TRUST_DOMAIN;
use mesh_core::xds::proto::workload::{
    Locality, NetworkMode, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, address,
};

use super::endpoints::Slices;
use super::enrol::enrolment;
use super::kept::{Kept, PodPart, PodScope, WorkloadPart};
use super::waypoint::{Binding, Traffic, bind};
use super::{Assignments, Context, Resources, assign, ip_bytes, labels_of, require};
use crate::model::{Condition, Kind, Meta, Node, ObjectRef, Pod};

/// `<cluster>//Pod/<namespace>/<name>`.
pub(crate) fn pod_uid(cluster: &str, meta: &Meta) -> String {
    format!("{cluster}//Pod/{}/{}", meta.namespace, meta.name)
}

/// Adds a workload for every pod with an address, and for foreign endpoints. Of pods that are as they were, what was kept
/// of them is taken.
pub(super) fn convert(context: &mut Context<'_>, resources: &mut Resources, kept: Kept) -> Kept {
    let objects = context.objects;
    let slices = Slices::new(objects);
    for slice in &slices.orphans {
        context.conditions.push(Condition::new(
            ObjectRef::of(Kind::EndpointSlice, &slice.meta),
            "Accepted",
            false,
            "NoService",
            "no effect: label kubernetes.io/service-name names no Service of its namespace",
        ));
    }
    let mut owner_of = HashMap::new();
    let mut turn = kept.turn(context);
    resources.assignments = Assignments::new(objects);
    for (key, pod) in &objects.pods {
        if has_address(pod) && !pod.host_network {
            duplicates(context, &mut owner_of, pod);
        }
        let uid = pod_uid(&context.mesh.cluster_id, &pod.meta);
        let scope = PodScope::of(context, &slices, (key, pod), &uid);
        let part = match turn.unchanged(context, &slices, &scope) {
            Some(part) => part,
            None => Arc::new(part(context, resources, scope, &slices, uid)),
        };
        resources.add_pod(&pod.node, &part);
        context.conditions.extend_from_slice(&part.conditions);
        turn.keep(part);
    }
    foreign_endpoints(context, &slices, resources);
    turn.end()
}

fn has_address(pod: &Pod) -> bool {
    !pod.ips.is_empty() && !pod.terminal
}

/// Says of a pod that another has its address.
fn duplicates<'a>(context: &mut Context<'_>, owner_of: &mut HashMap<IpAddr, &'a Meta>, pod: &'a Pod) {
    for ip in &pod.ips {
        if let Some(first) = owner_of.insert(*ip, &pod.meta) {
            let first = first.key();
            let message =
                format!("address {ip} is also that of Pod {first}; a node can tell only one of them");
            let object = ObjectRef::of(Kind::Pod, &pod.meta);
            context.conditions.push(Condition::new(object, "Accepted", false, "DuplicateAddress", message));
        }
    }
}

/// Makes a pod's part.
fn part(
    context: &mut Context<'_>,
    resources: &mut Resources,
    scope: PodScope,
    slices: &Slices<'_>,
    uid: String,
) -> PodPart {
    let pod = scope.pod();
    let assigned = assign::pod(context.objects, context.mesh, pod).map(Arc::new);
    if !has_address(pod) {
        return PodPart { scope, once: false, assigned, workload: None, conditions: Vec::new() };
    }
    // What is said of this pod is kept with it.
    let before = std::mem::take(&mut context.conditions);
    let uid: Arc<str> = uid.into();
    let (mut workload, binding) = pod_workload(context, &scope, slices, &uid);
    let required = require::policy(context, &mut resources.authorizations, pod, &workload, &binding);
    let conditions = std::mem::replace(&mut context.conditions, before);
    let once = required.is_some();
    workload.authorization_policies.extend(required);
    let alias = |ip| format!("{}/{ip}", workload.network);
    let aliases = if pod.host_network { Vec::new() } else { pod.ips.iter().map(alias).collect() };
    let labels = labels_of(&uid, &pod.meta.labels);
    let address = super::address(address::Type::Workload(workload), aliases);
    PodPart { once, assigned, workload: Some(WorkloadPart { uid, address, labels }), conditions, scope }
}

/// A pod, and the waypoint that it is bound to itself.
fn pod_workload(
    context: &mut Context<'_>,
    scope: &PodScope,
    slices: &Slices<'_>,
    uid: &str,
) -> (Workload, Binding) {
    let (objects, mesh, pod) = (context.objects, context.mesh, scope.pod());
    let enrolment = enrolment(context, pod, scope.captured());
    let object = ObjectRef::of(Kind::Pod, &pod.meta);
    let binding = bind(context, &object, &pod.meta, Traffic::Workload);
    let mut services = slices.services_of(objects, pod, |s| mesh.hostname(&s.meta.namespace, &s.meta.name));
    context.services.select(&pod.meta.namespace, &pod.meta.labels, &BTreeMap::new(), &mut services);
    let workload_name = workload_name(pod);
    let healthy = pod.ready && !pod.meta.deleting;
    let network = pod.meta.label("topology.istio.io/network").unwrap_or(&context.network).to_owned();
    let network_mode = if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard };
    let workload = Workload {
        uid: uid.to_owned(),
        name: pod.meta.name.clone(),
        namespace: pod.meta.namespace.clone(),
        addresses: pod.ips.iter().map(|ip| ip_bytes(*ip)).collect(),
        hostname: String::new(),
        network,
        tunnel_protocol: enrolment.tunnel.into(),
        trust_domain: announced_trust_domain(&mesh.trust_domain),
        service_account: pod.service_account.clone(),
        waypoint: binding.waypoint.clone(),
        network_gateway: None,
        node: pod.node.clone(),
        canonical_name: canonical_name(&pod.meta.labels, &workload_name),
        canonical_revision: canonical_revision(&pod.meta.labels),
        workload_type: WorkloadType::Pod.into(),
        workload_name,
        native_tunnel: enrolment.native,
        application_tunnel: None,
        services,
        authorization_policies: scope.policies().to_vec(),
        status: if healthy { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
        cluster_id: mesh.cluster_id.clone(),
        locality: locality(&pod.meta.labels, scope.node()),
        network_mode: network_mode.into(),
        extensions: enrolment.extensions,
        capacity: None,
    };
    (workload, binding)
}

/// Endpoints that were written by hand: addresses without identity, reached in plain TCP.
fn foreign_endpoints(context: &Context<'_>, slices: &Slices<'_>, resources: &mut Resources) {
    let mesh = context.mesh;
    for (slice, service, endpoint, ports) in &slices.foreign {
        let Some(ip) = endpoint.addresses.first() else { continue };
        let meta = &slice.meta;
        let uid = format!(
            "{}/discovery.k8s.io/EndpointSlice/{}/{}/{ip}",
            mesh.cluster_id, meta.namespace, meta.name
        );
        let hostname = mesh.hostname(&service.meta.namespace, &service.meta.name);
        let workload = Workload {
            uid: uid.clone(),
            name: format!("{}/{ip}", meta.name),
            namespace: meta.namespace.clone(),
            addresses: vec![ip_bytes(*ip)],
            network: context.network.clone(),
            tunnel_protocol: TunnelProtocol::None.into(),
            trust_domain: announced_trust_domain(&mesh.trust_domain),
            node: endpoint.node.clone(),
            canonical_name: service.meta.name.clone(),
            canonical_revision: "latest".into(),
            workload_type: WorkloadType::Pod.into(),
            workload_name: service.meta.name.clone(),
            services: BTreeMap::from([(format!("{}/{hostname}", service.meta.namespace), ports.clone())]),
            status: if endpoint.ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
            cluster_id: mesh.cluster_id.clone(),
            // The address may be that of a workload known under another name; this one must not hide it.
            network_mode: NetworkMode::HostNetwork.into(),
            ..Workload::default()
        };
        resources.add(uid, address::Type::Workload(workload), Vec::new());
    }
}

/// Istio leaves out the default.
pub(super) fn announced_trust_domain(domain: &str) -> String {
    if domain == DEFAULT_TRUST_DOMAIN { String::new() } else { domain.to_owned() }
}

/// The controller that people know: the Deployment of a ReplicaSet, the CronJob of a Job.
fn workload_name(pod: &Pod) -> String {
    if let Some(name) = pod.meta.label("service.istio.io/workload-name") {
        return name.to_owned();
    }
    let Some((kind, name)) = &pod.owner else { return pod.meta.name.clone() };
    let stem = match kind.as_str() {
        "ReplicaSet" => {
            pod.meta.label("pod-template-hash").and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'))
        }
        // A CronJob's jobs end in the minute (8 digits) or second (10) of their start.
        "Job" => name.rsplit_once('-').and_then(|(stem, time)| {
            ((8..=10).contains(&time.len()) && time.bytes().all(|b| b.is_ascii_digit())).then_some(stem)
        }),
        _ => None,
    };
    stem.filter(|s| !s.is_empty()).unwrap_or(name).to_owned()
}

fn first(labels: &BTreeMap<String, String>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|n| labels.get(*n)).filter(|v| !v.is_empty()).cloned()
}

/// Name of the service in telemetry.
pub(super) fn canonical_name(labels: &BTreeMap<String, String>, workload_name: &str) -> String {
    first(labels, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
        .unwrap_or_else(|| workload_name.to_owned())
}

/// Revision of the service in telemetry.
pub(super) fn canonical_revision(labels: &BTreeMap<String, String>) -> String {
    first(labels, &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
        .unwrap_or_else(|| "latest".to_owned())
}

/// From the pod's own label, else from its node's.
fn locality(labels: &BTreeMap<String, String>, node: Option<&Node>) -> Option<Locality> {
    let own = labels.get("topology.istio.io/locality").or_else(|| labels.get("istio-locality")).map(|text| {
        let separator = if text.contains('/') { '/' } else { '.' };
        let mut parts = text.splitn(3, separator).map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Locality { region: next(), zone: next(), subzone: next() }
    });
    own.or_else(|| {
        let label = |name: &str| node.and_then(|n| n.meta.label(name)).unwrap_or_default().to_owned();
        let locality = Locality {
            region: label("topology.kubernetes.io/region"),
            zone: label("topology.kubernetes.io/zone"),
            subzone: label("topology.istio.io/subzone"),
        };
        (locality != Locality::default()).then_some(locality)
    })
}
