use mesh_core::xds::proto::workload::load_balancing::{HealthPolicy, Mode, Scope};
use mesh_core::xds::proto::workload::{
    AppProtocol, IpFamilies, NetworkMode, Port, Visibility, WorkloadStatus,
};

use crate::testing::resources;

const POD: &str = "---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}
status: {podIP: 10.1.0.5, conditions: [{type: Ready, status: \"True\"}]}
";
const UID: &str = "Kubernetes//Pod/shop/p";
const NAME: &str = "shop/web.shop.svc.cluster.local";

fn service(metadata: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop{metadata}}}\nspec: {{{spec}}}\n"
    )
}

fn port(service_port: u32, target_port: u32) -> Port {
    Port { service_port, target_port, app_protocol: 0 }
}

#[test]
fn a_service_has_its_addresses_ports_and_families() {
    let spec = "clusterIPs: [10.2.0.1, \"fd00::1\"], ipFamilies: [IPv4, IPv6], ports: [{name: http, port: 80, targetPort: web}, \
                {name: tls-x, port: 443}, {name: g, port: 9000, appProtocol: kubernetes.io/h2c}, {name: dns-udp, port: 53, protocol: UDP}, \
                {name: dns, port: 53, targetPort: 5353}, {name: udp, port: 54, protocol: UDP, appProtocol: http}]";
    let resources = resources(&service("", spec));
    let s = resources.service(NAME);
    assert_eq!((s.name.as_str(), s.hostname.as_str()), ("web", "web.shop.svc.cluster.local"));
    assert_eq!(s.addresses.len(), 2);
    assert_eq!(resources.addresses[NAME].aliases, ["/10.2.0.1", "/fd00::1"]);
    assert_eq!(s.ip_families(), IpFamilies::Dual);
    assert!(s.canonical);
    assert_eq!(s.load_balancing, None);
    let ports: Vec<_> = s.ports.iter().map(|p| (p.service_port, p.target_port, p.app_protocol())).collect();
    assert_eq!(
        ports,
        [
            (80, 0, AppProtocol::Http11),
            (443, 443, AppProtocol::Tls),
            (9000, 9000, AppProtocol::Http2),
            (53, 5353, AppProtocol::Unknown),
            (54, 54, AppProtocol::Unknown),
        ],
        "a UDP port never shadows a TCP port of its number"
    );
}

#[test]
fn traffic_policies_become_load_balancing_in_istios_order_of_precedence() {
    let lb = |metadata: &str, spec: &str, namespace: &str| {
        let namespace =
            format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop{namespace}}}\n");
        let text = format!("{namespace}{}", service(metadata, &format!("ports: [{{port: 80}}]{spec}")));
        resources(&text)
            .service(NAME)
            .load_balancing
            .clone()
            .map(|l| (l.mode(), l.routing_preference().collect::<Vec<_>>(), l.health_policy()))
    };
    let zone = vec![Scope::Network, Scope::Region, Scope::Zone];
    let node = vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    let only = HealthPolicy::OnlyHealthy;
    let annotation = |v: &str| format!(", annotations: {{networking.istio.io/traffic-distribution: {v}}}");
    assert_eq!(lb("", "", ""), None);
    assert_eq!(
        lb("", ", internalTrafficPolicy: Local, trafficDistribution: PreferClose", ""),
        Some((Mode::Strict, vec![Scope::Node], only))
    );
    assert_eq!(lb("", ", trafficDistribution: PreferClose", ""), Some((Mode::Failover, zone.clone(), only)));
    assert_eq!(
        lb("", ", trafficDistribution: PreferSameNode", ""),
        Some((Mode::Failover, node.clone(), only))
    );
    assert_eq!(lb(&annotation("PREFERSAMEZONE"), "", ""), Some((Mode::Failover, zone, only)));
    assert_eq!(lb("", "", &annotation("PreferSameNode")), Some((Mode::Failover, node.clone(), only)));
    assert_eq!(lb(&annotation("Any"), "", &annotation("PreferClose")), None, "the service's word counts");
    assert_eq!(
        lb(&annotation("PreferClose"), ", trafficDistribution: PreferSameNode", ""),
        Some((Mode::Failover, node, only))
    );
    assert_eq!(
        lb("", ", publishNotReadyAddresses: true", ""),
        Some((Mode::UnspecifiedMode, vec![], HealthPolicy::AllowAll))
    );
}

#[test]
fn endpoints_are_derived_from_selector_and_pods_when_no_slice_is_given() {
    let ports = "ports: [{name: a, port: 80, targetPort: web}, {name: b, port: 81}, {name: c, port: 82, targetPort: missing}]";
    let text =
        format!("{POD}{}", service("", &format!("clusterIP: 10.2.0.1, selector: {{app: web}}, {ports}")));
    let found = resources(&text).workload(UID).services[NAME].ports.clone();
    assert_eq!(found, [port(80, 8080), port(81, 81)], "a named port that the pod lacks is left out");
    let sidecar = POD.replace("containers: [", "initContainers: [{name: s, restartPolicy: Always, ports: [{name: missing, containerPort: 9}]}], containers: [");
    let sidecar =
        format!("{sidecar}{}", service("", &format!("clusterIP: 10.2.0.1, selector: {{app: web}}, {ports}")));
    assert_eq!(resources(&sidecar).workload(UID).services[NAME].ports[2], port(82, 9));
    let other = format!("{POD}{}", service("", "selector: {app: other}, ports: [{port: 80}]"));
    assert!(resources(&other).workload(UID).services.is_empty());
    let none = format!("{POD}{}", service("", "ports: [{port: 80}]"));
    assert!(resources(&none).workload(UID).services.is_empty(), "no selector selects nothing");
}

#[test]
fn given_slices_are_followed_instead_of_the_selector() {
    let slice = |ready: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-1, namespace: shop, labels: \
             {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{name: a, port: 9999}}]\nendpoints:\n- addresses: \
             [10.1.0.5]\n  conditions: {{ready: {ready}}}\n  targetRef: {{kind: Pod, name: p, namespace: shop}}\n- addresses: \
             [172.16.0.9]\n  conditions: {{ready: false}}\n"
        )
    };
    let service = service("", "selector: {app: web}, ports: [{name: a, port: 80, targetPort: web}]");
    let resources = resources(&format!("{POD}{service}{}", slice("true")));
    assert_eq!(resources.workload(UID).services[NAME].ports, [port(80, 9999)]);
    let foreign = resources.workload("Kubernetes/discovery.k8s.io/EndpointSlice/shop/web-1/172.16.0.9");
    assert_eq!(foreign.network_mode(), NetworkMode::HostNetwork);
    assert_eq!(foreign.status(), WorkloadStatus::Unhealthy);
    assert_eq!(foreign.services[NAME].ports, [port(80, 9999)]);
    let unready = crate::testing::resources(&format!("{POD}{service}{}", slice("false")));
    assert!(unready.workload(UID).services.is_empty());
    let orphan = crate::testing::resources(&format!("{POD}{}", slice("true")));
    assert_eq!(orphan.condition("EndpointSlice shop/web-1", "Accepted").reason, "NoService");
}

#[test]
fn fields_without_effect_are_told() {
    let spec = "clusterIP: 10.2.0.1, ports: [{port: 80}], sessionAffinity: ClientIP, externalIPs: [1.2.3.4]";
    let resources = resources(&service(", annotations: {networking.istio.io/exportTo: \".\"}", spec));
    let condition = resources.condition("Service shop/web", "Accepted");
    for field in ["spec.sessionAffinity", "spec.externalIPs", "networking.istio.io/exportTo"] {
        assert!(condition.message.contains(field), "{}", condition.message);
    }
}

#[test]
fn headless_services_have_no_address_and_external_names_no_resource() {
    let headless = resources(&service("", "clusterIP: None, ports: [{port: 80}]"));
    assert!(headless.service(NAME).addresses.is_empty());
    let external = resources(&service("", "type: ExternalName, externalName: example.com"));
    assert!(external.addresses.is_empty());
}

const ENTRY: &str = "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: ext, namespace: shop}
spec:
";

#[test]
fn a_service_entry_has_one_service_per_host_and_workloads_for_its_endpoints() {
    let text = format!(
        "{ENTRY}  hosts: [a.example.com, b.example.com]\n  addresses: [203.0.113.7, 198.51.100.0/24]\n  ports: [{{number: 80, name: http, \
         protocol: HTTP, targetPort: 8080}}]\n  resolution: STATIC\n  location: MESH_INTERNAL\n  exportTo: [\".\"]\n  endpoints:\n  - \
         {{address: 192.0.2.1, ports: {{http: 9090}}, labels: {{networking.istio.io/tunnel: http}}, serviceAccount: ext}}\n"
    );
    let resources = resources(&text);
    let s = resources.service("shop/a.example.com");
    assert_eq!(resources.addresses["shop/a.example.com"].aliases, ["/203.0.113.7", "/198.51.100.0/24"]);
    assert_eq!((s.addresses[0].length, s.addresses[1].length), (None, Some(24)));
    assert_eq!(
        s.ports,
        [Port { service_port: 80, target_port: 8080, app_protocol: AppProtocol::Http11.into() }]
    );
    assert!(s.canonical);
    let w = resources.workload("Kubernetes/networking.istio.io/ServiceEntry/shop/ext/192.0.2.1");
    assert_eq!(w.services.keys().collect::<Vec<_>>(), ["shop/a.example.com", "shop/b.example.com"]);
    assert_eq!(w.services["shop/a.example.com"].ports, [port(80, 9090)]);
    assert!(w.native_tunnel);
    assert_eq!(w.service_account, "ext");
}

#[test]
fn a_service_entry_is_seen_where_it_is_exported_to_as_far_as_that_can_be_told() {
    let made = |export: &str, more: &str| {
        let label = if more.is_empty() {
            ""
        } else {
            ", labels: {istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: other}"
        };
        let entry = format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: ext, namespace: shop{label}}}\nspec: {{hosts: [a.example], ports: [{{number: 80, name: http}}], resolution: NONE, exportTo: [{export}]}}\n"
        );
        let resources = resources(&(entry + more));
        let said = resources.conditions.iter().find(|c| c.kind == "Accepted").map(|c| c.message.clone());
        (resources.service("shop/a.example").visibility(), said.unwrap_or_default())
    };
    let waypoint = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: wp, namespace: other}\nspec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]}\nstatus: {addresses: [{type: Hostname, value: wp.other.svc.cluster.local}]}\n";
    for (export, more, expected, note) in [
        ("", "", Visibility::Public, ""),
        ("'*', other", "", Visibility::Public, ""),
        ("'.'", "", Visibility::Namespace, ""),
        ("shop", "", Visibility::Namespace, ""),
        ("'~'", "", Visibility::Namespace, "to nobody"),
        ("'.', other", "", Visibility::Public, "of other namespaces none is told from another"),
        ("'.'", waypoint, Visibility::Public, "its waypoint is of another namespace"),
    ] {
        let (seen, said) = made(export, more);
        assert_eq!(seen, expected, "{export}");
        assert!(said.contains(note) && (said.is_empty() || !note.is_empty()), "{export}: {said}");
    }
}

#[test]
fn resolution_decides_how_a_service_entry_is_reached() {
    let entry = |spec: &str| {
        format!(
            "{ENTRY}  hosts: [a.example.com]\n  ports: [{{number: 443, name: tls, protocol: TLS}}]\n{spec}"
        )
    };
    let none = resources(&entry("  resolution: NONE\n"));
    let lb = none.service("shop/a.example.com").load_balancing.clone().unwrap();
    assert_eq!((lb.mode(), lb.health_policy()), (Mode::Passthrough, HealthPolicy::AllowAll));
    assert!(none.service("shop/a.example.com").addresses.is_empty());
    assert_eq!(none.addresses.len(), 1);
    let dns = resources(&entry("  resolution: DNS\n"));
    let w = dns.workload("Kubernetes/networking.istio.io/ServiceEntry/shop/ext/a.example.com");
    assert_eq!((w.hostname.as_str(), w.services.len()), ("a.example.com", 1));
    let wildcard =
        resources(&entry("  resolution: DYNAMIC_DNS\n").replace("[a.example.com]", "[\"*.example.com\"]"));
    assert_eq!(wildcard.condition("ServiceEntry shop/ext", "istio.io/WaypointMissing").reason, "NoWaypoint");
}

#[test]
fn addresses_are_given_out_the_same_every_time_and_never_twice() {
    let entry = |name: &str, host: &str| {
        ENTRY.replace("ext", name)
            + &format!("  hosts: [{host}]\n  resolution: DNS\n  ports: [{{number: 80, name: h}}]\n")
    };
    let one = resources(&entry("one", "one.example.com"));
    let addresses = one.service("shop/one.example.com").addresses.clone();
    assert_eq!(addresses[0].address[..2], [240, 240]);
    assert_eq!(addresses[1].address[..4], [0x20, 0x01, 0, 2]);
    let many: String = (0..300).map(|i| entry(&format!("e{i}"), &format!("e{i}.example.com"))).collect();
    let many = resources(&(entry("one", "one.example.com") + &many));
    assert_eq!(many.service("shop/one.example.com").addresses, addresses);
    let all: std::collections::BTreeSet<_> =
        many.addresses.values().flat_map(|r| r.aliases.clone()).collect();
    assert_eq!(all.len(), 301 * 2);
}

#[test]
fn a_host_belongs_to_the_service_then_to_the_oldest_entry() {
    let entry = |name: &str, created: &str, host: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: \
             \"{created}\"}}\nspec: {{hosts: [{host}], ports: [{{number: 80, name: h}}], resolution: DNS}}\n"
        )
    };
    let text = entry("young", "2026-02-01T00:00:00Z", "x.example.com")
        + &entry("old", "2026-01-01T00:00:00Z", "x.example.com")
        + &entry("shadow", "2020-01-01T00:00:00Z", "web.shop.svc.cluster.local")
        + &service("", "ports: [{port: 80}]");
    let resources = resources(&text);
    assert_eq!(resources.service("shop/x.example.com").name, "old");
    assert_eq!(resources.service(NAME).name, "web");
    assert_eq!(resources.condition("ServiceEntry shop/young", "Accepted").reason, "Conflicted");
    assert_eq!(resources.condition("ServiceEntry shop/shadow", "Accepted").reason, "Conflicted");
}

#[test]
fn a_workload_selector_makes_pods_endpoints_of_an_entry() {
    let text = format!(
        "{POD}{ENTRY}  hosts: [a.example.com]\n  workloadSelector: {{labels: {{app: web}}}}\n  resolution: STATIC\n  ports: [{{number: 80, name: h, targetPort: 8080}}]\n"
    );
    assert_eq!(resources(&text).workload(UID).services["shop/a.example.com"].ports, [port(80, 8080)]);
}
