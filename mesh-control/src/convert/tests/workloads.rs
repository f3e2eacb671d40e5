use mesh_core::xds::proto::workload::{
    Extension, Locality, NetworkMode, Port, TunnelProtocol, WorkloadStatus, WorkloadType,
};
use mesh_core::xds::{ENROL_EXTENSION, SETTINGS_EXTENSION};
use prost::Message;

use crate::convert::Captured;
use crate::testing::{resources, resources_with};

/// A pod with parts of its metadata, spec and status.
fn pod(metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: shop{metadata}}}\nspec: {{nodeName: n1, \
         containers: [{{name: c, ports: [{{name: web, containerPort: 8080}}]}}]{spec}}}\nstatus: {{phase: Running, podIP: \
         10.1.0.5, conditions: [{{type: Ready, status: \"True\"}}]{status}}}\n"
    )
}

const UID: &str = "Kubernetes//Pod/shop/p";
const AMBIENT: &str = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n";

#[test]
fn a_pod_becomes_a_workload_with_everything_that_nodes_need() {
    let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/region: eu, \
                topology.kubernetes.io/zone: eu-1, topology.istio.io/subzone: rack}}\n";
    let labels = ", labels: {app: web, version: v2, pod-template-hash: abc}, ownerReferences: [{apiVersion: apps/v1, kind: \
                  ReplicaSet, name: web-abc, uid: u, controller: true}]";
    let text = format!(
        "{node}{}",
        pod(labels, ", serviceAccountName: web", ", podIPs: [{ip: 10.1.0.5}, {ip: \"fd00::5\"}]")
    );
    let resources = resources(&text);
    let w = resources.workload(UID);
    assert_eq!(w.uid, UID);
    assert_eq!((w.name.as_str(), w.namespace.as_str(), w.node.as_str()), ("p", "shop", "n1"));
    assert_eq!(w.addresses[0], [10, 1, 0, 5]);
    assert_eq!(w.addresses[1].len(), 16);
    assert_eq!(w.service_account, "web");
    assert_eq!(w.trust_domain, "", "the default is left out");
    assert_eq!(w.workload_name, "web");
    assert_eq!((w.canonical_name.as_str(), w.canonical_revision.as_str()), ("web", "v2"));
    assert_eq!(w.workload_type(), WorkloadType::Pod);
    assert_eq!(w.cluster_id, "Kubernetes");
    assert_eq!(w.status(), WorkloadStatus::Healthy);
    assert_eq!(w.tunnel_protocol(), TunnelProtocol::None);
    assert_eq!(
        w.locality,
        Some(Locality { region: "eu".into(), zone: "eu-1".into(), subzone: "rack".into() })
    );
    assert_eq!(resources.addresses[UID].aliases, ["/10.1.0.5", "/fd00::5"]);
}

#[test]
fn the_workload_name_is_that_of_the_controller_people_know() {
    let owner = |kind: &str, name: &str, labels: &str| {
        let text = pod(
            &format!(
                ", labels: {{{labels}}}, ownerReferences: [{{apiVersion: v1, kind: {kind}, name: {name}, uid: u, controller: true}}]"
            ),
            "",
            "",
        );
        resources(&text).workload(UID).workload_name.clone()
    };
    assert_eq!(owner("ReplicaSet", "web-abc", "pod-template-hash: abc"), "web");
    assert_eq!(owner("ReplicaSet", "web-abc", "x: y"), "web-abc");
    assert_eq!(owner("StatefulSet", "db", "x: y"), "db");
    assert_eq!(owner("Job", "report-28471680", "x: y"), "report");
    assert_eq!(owner("Job", "migrate-1", "x: y"), "migrate-1");
    assert_eq!(owner("ReplicaSet", "web-abc", "service.istio.io/workload-name: special"), "special");
    assert_eq!(resources(&pod("", "", "")).workload(UID).workload_name, "p");
}

#[test]
fn unready_deleted_addressless_and_ended_pods_are_told_apart() {
    let status = |text: &str| resources(text).workload(UID).status();
    let ready = pod("", "", "");
    assert_eq!(status(&ready), WorkloadStatus::Healthy);
    assert_eq!(status(&ready.replace("\"True\"", "\"False\"")), WorkloadStatus::Unhealthy);
    let deleting = pod(", deletionTimestamp: \"2026-01-01T00:00:00Z\"", "", "");
    assert_eq!(status(&deleting), WorkloadStatus::Unhealthy);
    assert!(resources(&ready.replace("Running", "Succeeded")).addresses.is_empty());
    assert!(resources(&ready.replace("podIP: 10.1.0.5, ", "")).addresses.is_empty());
    assert_eq!(status(&ready.replace("Running", "Pending")), WorkloadStatus::Healthy);
}

#[test]
fn a_pod_is_announced_as_reachable_only_once_its_node_says_so() {
    let text = format!("{AMBIENT}{}", pod("", "", ""));
    let enrol = Extension { name: ENROL_EXTENSION.into(), config: None };
    let waiting = resources(&text);
    assert_eq!(waiting.workload(UID).tunnel_protocol(), TunnelProtocol::None);
    assert_eq!(waiting.workload(UID).extensions, std::slice::from_ref(&enrol));
    let report = |node: &str| Captured::from([(node.to_owned(), [UID.to_owned()].into())]);
    let captured = resources_with(&text, &report("n1"));
    assert_eq!(captured.workload(UID).tunnel_protocol(), TunnelProtocol::Hbone);
    assert_eq!(captured.workload(UID).extensions, [enrol]);
    let elsewhere = resources_with(&text, &report("n2"));
    assert_eq!(
        elsewhere.workload(UID).tunnel_protocol(),
        TunnelProtocol::None,
        "another node's word does not count"
    );
    let left = resources_with(&pod("", "", ""), &report("n1"));
    assert_eq!(left.workload(UID).tunnel_protocol(), TunnelProtocol::None, "left the mesh, still captured");
    assert!(left.workload(UID).extensions.is_empty());
}

#[test]
fn labels_of_pod_and_namespace_decide_about_enrolment() {
    let enrolled = |text: &str| !resources(text).workload(UID).extensions.is_empty();
    let own = |value: &str| pod(&format!(", labels: {{istio.io/dataplane-mode: {value}}}"), "", "");
    assert!(!enrolled(&pod("", "", "")));
    assert!(enrolled(&own("ambient")));
    assert!(enrolled(&format!("{AMBIENT}{}", pod("", "", ""))));
    assert!(enrolled(&format!("{AMBIENT}{}", own("other"))), "only none opts out");
    assert!(!enrolled(&format!("{AMBIENT}{}", own("none"))));
    let sidecar = pod(", annotations: {sidecar.istio.io/status: x}", "", "");
    assert!(!enrolled(&format!("{AMBIENT}{sidecar}")));
    let annotated = resources(&pod(", annotations: {ambient.istio.io/redirection: enabled}", "", ""));
    assert_eq!(annotated.workload(UID).tunnel_protocol(), TunnelProtocol::Hbone);
    let own = ", annotations: {ambient.istio.io/redirection: enabled, undermesh.io/redirection: enabled}";
    let own = resources(&pod(own, "", ""));
    assert_eq!(own.workload(UID).tunnel_protocol(), TunnelProtocol::None, "what we wrote tells us nothing");
    let native = resources(&pod(", labels: {networking.istio.io/tunnel: http}", "", ""));
    assert_eq!(native.workload(UID).tunnel_protocol(), TunnelProtocol::Hbone);
    assert!(native.workload(UID).native_tunnel);
}

#[test]
fn a_pod_on_the_host_network_is_never_enrolled_and_says_so() {
    let resources = resources(&format!("{AMBIENT}{}", pod("", ", hostNetwork: true", "")));
    let w = resources.workload(UID);
    assert_eq!((w.network_mode(), w.tunnel_protocol()), (NetworkMode::HostNetwork, TunnelProtocol::None));
    assert!(w.extensions.is_empty());
    assert!(resources.addresses[UID].aliases.is_empty());
    assert_eq!(resources.condition("Pod shop/p", "undermesh.io/Enrolled").reason, "HostNetwork");
}

#[test]
fn settings_reach_the_pods_that_they_are_for() {
    let settings = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  \
                    undermesh: |\n    failOpen: true\n    excludedCIDRs: [192.168.0.1/16]\n    excludedPorts: [9000]\n";
    let annotated = pod(
        ", annotations: {undermesh.io/same-node: tunnel, ambient.istio.io/dns-capture: \"false\", ambient.istio.io/bypass-inbound-capture: \"true\"}",
        "",
        "",
    );
    let resources = resources(&format!("{settings}{AMBIENT}{annotated}"));
    let extension = &resources.workload(UID).extensions[1];
    assert_eq!(extension.name, SETTINGS_EXTENSION);
    let config = prost_types::Struct::decode(extension.config.as_ref().unwrap().value.as_slice()).unwrap();
    let keys: Vec<&str> = config.fields.keys().map(String::as_str).collect();
    assert_eq!(keys, ["dnsCapture", "excludedCIDRs", "excludedPorts", "failOpen", "sameNode"]);
    let cidr = format!("{:?}", config.fields["excludedCIDRs"]);
    assert!(cidr.contains("192.168.0.0/16"), "{cidr}");
    let condition = resources.condition("Pod shop/p", "Accepted");
    assert!(condition.message.contains("bypass-inbound-capture"), "{}", condition.message);
}

#[test]
fn two_pods_with_one_address_are_reported() {
    let other = pod("", "", "").replace("name: p,", "name: q,");
    let resources = resources(&format!("{}{other}", pod("", "", "")));
    assert_eq!(resources.condition("Pod shop/q", "Accepted").reason, "DuplicateAddress");
}

#[test]
fn a_custom_trust_domain_is_announced() {
    let settings = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  \
                    mesh: |\n    trustDomain: corp.example\n    enablePrometheusMerge: true\n";
    let resources = resources(&format!("{settings}{}", pod("", "", "")));
    assert_eq!(resources.workload(UID).trust_domain, "corp.example");
    let condition = resources.condition("ConfigMap istio-system/istio", "Accepted");
    assert!(condition.message.contains("enablePrometheusMerge"));
}

#[test]
fn workload_entries_are_workloads_with_their_own_identity_and_ports() {
    let text = "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop, labels: {app: db}}
spec: {address: 10.9.0.1, ports: {tcp-db: 6432}, labels: {networking.istio.io/tunnel: http}, locality: eu/eu-1, weight: 3, serviceAccount: db}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: dns, namespace: shop}
spec: {address: db.example.com}
status: {conditions: [{type: Healthy, status: \"False\"}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: tcp-db, port: 5432}]}
";
    let resources = resources(text);
    let vm = resources.workload("Kubernetes/networking.istio.io/WorkloadEntry/shop/vm");
    assert_eq!((vm.service_account.as_str(), vm.capacity, vm.native_tunnel), ("db", Some(3), true));
    assert_eq!(vm.tunnel_protocol(), TunnelProtocol::Hbone);
    let ports = &vm.services["shop/db.shop.svc.cluster.local"].ports;
    assert_eq!(ports, &[Port { service_port: 5432, target_port: 6432, app_protocol: 0 }]);
    let dns = resources.workload("Kubernetes/networking.istio.io/WorkloadEntry/shop/dns");
    assert_eq!((dns.hostname.as_str(), dns.addresses.len()), ("db.example.com", 0));
    assert_eq!(dns.status(), WorkloadStatus::Unhealthy);
    assert_eq!(dns.tunnel_protocol(), TunnelProtocol::None);
}
