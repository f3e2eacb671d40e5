use mesh_core::xds::proto::workload::gateway_address::Destination;
use mesh_core::xds::proto::workload::{GatewayAddress, NamespacedHostname};

use crate::convert::Resources;
use crate::testing::resources;

const POD: &str = "---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop}
spec: {nodeName: n1, containers: []}
status: {podIP: 10.1.0.5}
";
const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {ports: [{port: 80}]}
";

fn namespace(labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

fn gateway(name: &str, namespace: &str, labels: &str, listener: &str, addresses: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: {namespace}, labels: \
         {{{labels}}}}}\nspec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE{listener}}}]}}\nstatus: \
         {{addresses: [{addresses}]}}\n"
    )
}

fn ready(name: &str, namespace: &str, labels: &str, listener: &str) -> String {
    let host = format!(
        "{{type: Hostname, value: {name}.{namespace}.svc.cluster.local}}, {{type: IPAddress, value: 10.2.0.9}}"
    );
    gateway(name, namespace, labels, listener, &host)
}

fn address(namespace: &str, name: &str) -> GatewayAddress {
    let hostname = format!("{name}.{namespace}.svc.cluster.local");
    let destination =
        Some(Destination::Hostname(NamespacedHostname { namespace: namespace.into(), hostname }));
    GatewayAddress { destination, hbone_mtls_port: 15008 }
}

fn of_service(r: &Resources) -> Option<GatewayAddress> {
    r.service("shop/web.shop.svc.cluster.local").waypoint.clone()
}

fn of_pod(r: &Resources) -> Option<GatewayAddress> {
    r.workload("Kubernetes//Pod/shop/p").waypoint.clone()
}

#[test]
fn a_waypoint_stands_before_what_its_label_and_traffic_type_say() {
    let with = |labels: &str, accepts: &str| {
        resources(&format!("{}{POD}{SERVICE}{}", namespace(labels), ready("wp", "shop", accepts, "")))
    };
    let bound = Some(address("shop", "wp"));
    let plain = with("x: y", "x: y");
    assert_eq!((of_service(&plain), of_pod(&plain)), (None, None));
    let default = with("istio.io/use-waypoint: wp", "x: y");
    assert_eq!(
        (of_service(&default), of_pod(&default)),
        (bound.clone(), None),
        "the default is traffic to services"
    );
    let condition = default.condition("Service shop/web", "istio.io/WaypointBound");
    assert_eq!((condition.status, condition.reason.as_str()), (true, "WaypointAccepted"));
    let all = with("istio.io/use-waypoint: wp", "istio.io/waypoint-for: all");
    assert_eq!((of_service(&all), of_pod(&all)), (bound.clone(), bound.clone()));
    let workload = with("istio.io/use-waypoint: wp", "istio.io/waypoint-for: workload");
    assert_eq!((of_service(&workload), of_pod(&workload)), (None, bound));
    let none = with("istio.io/use-waypoint: wp", "istio.io/waypoint-for: none");
    assert_eq!((of_service(&none), of_pod(&none)), (None, None));
}

#[test]
fn the_object_beats_its_namespace_and_none_opts_out() {
    let with = |label: &str| {
        let service = SERVICE.replace("namespace: shop}", &format!("namespace: shop, labels: {{{label}}}}}"));
        resources(&format!(
            "{}{service}{}{}",
            namespace("istio.io/use-waypoint: wp"),
            ready("wp", "shop", "a: b", ""),
            ready("own", "shop", "a: b", "")
        ))
    };
    assert_eq!(of_service(&with("istio.io/use-waypoint: own")), Some(address("shop", "own")));
    assert_eq!(of_service(&with("istio.io/use-waypoint: none")), None);
    assert_eq!(
        of_service(&with("gateway.istio.io/managed: istio.io-mesh-controller")),
        None,
        "a waypoint has none"
    );
}

#[test]
fn a_waypoint_that_was_asked_for_and_is_not_there_fails_the_traffic() {
    let missing = resources(&format!("{}{POD}{SERVICE}", namespace("istio.io/use-waypoint: wp")));
    assert_eq!(of_service(&missing), Some(address("shop", "wp")), "an address that leads nowhere");
    assert_eq!(of_pod(&missing), None);
    let condition = missing.condition("Service shop/web", "istio.io/WaypointBound");
    assert_eq!((condition.status, condition.reason.as_str()), (false, "WaypointIsNotReady"));
    let homeless = format!(
        "{}{SERVICE}{}",
        namespace("istio.io/use-waypoint: wp"),
        gateway("wp", "shop", "a: b", "", "")
    );
    let homeless = resources(&homeless);
    assert_eq!(of_service(&homeless), Some(address("shop", "wp")));
    assert_eq!(homeless.condition("Gateway shop/wp", "Programmed").reason, "AddressNotAssigned");
}

#[test]
fn a_waypoint_admits_the_namespaces_of_its_listener() {
    let labels = "istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: infra, team: a";
    let with = |listener: &str| {
        resources(&format!("{}{SERVICE}{}", namespace(labels), ready("wp", "infra", "a: b", listener)))
    };
    let same = with("");
    assert_eq!(of_service(&same), None);
    assert_eq!(same.condition("Service shop/web", "istio.io/WaypointBound").reason, "AttachmentDenied");
    let bound = Some(address("infra", "wp"));
    assert_eq!(of_service(&with(", allowedRoutes: {namespaces: {from: All}}")), bound);
    let selector =
        |s: &str| with(&format!(", allowedRoutes: {{namespaces: {{from: Selector, selector: {s}}}}}"));
    assert_eq!(of_service(&selector("{matchLabels: {team: a}}")), bound);
    assert_eq!(of_service(&selector("{matchLabels: {team: b}}")), None);
    assert_eq!(
        of_service(&selector("{matchExpressions: [{key: team, operator: In, values: [a, b]}]}")),
        bound
    );
    assert_eq!(of_service(&selector("{matchExpressions: [{key: team, operator: DoesNotExist}]}")), None);
}

#[test]
fn a_refusal_by_traffic_type_is_told_only_where_the_object_asked() {
    let labelled = POD.replace("namespace: shop}", "namespace: shop, labels: {istio.io/use-waypoint: wp}}");
    let own = resources(&format!("{labelled}{}", ready("wp", "shop", "a: b", "")));
    assert_eq!(own.condition("Pod shop/p", "istio.io/WaypointBound").reason, "UnsupportedTrafficType");
    let inherited = resources(&format!(
        "{}{POD}{}",
        namespace("istio.io/use-waypoint: wp"),
        ready("wp", "shop", "a: b", "")
    ));
    assert!(inherited.conditions.iter().all(|c| c.object.to_string() != "Pod shop/p"));
}

#[test]
fn a_canary_takes_its_share() {
    let service = |weight: &str| {
        SERVICE.replace(
            "namespace: shop}",
            &format!("namespace: shop, labels: {{istio.io/use-waypoint: wp, istio.io/use-waypoint-canary: next}}, annotations: {{istio.io/use-waypoint-canary-weight: \"{weight}\"}}}}"),
        )
    };
    let gateways = ready("wp", "shop", "a: b", "") + &ready("next", "shop", "a: b", "");
    let split = resources(&format!("{}{gateways}", service("20")));
    let weighted = &split.service("shop/web.shop.svc.cluster.local").weighted_waypoints;
    let shares: Vec<_> = weighted.iter().map(|w| (w.destination.clone(), w.weight)).collect();
    assert_eq!(shares, [(Some(address("shop", "wp")), 80), (Some(address("shop", "next")), 20)]);
    assert_eq!(of_service(&split), Some(address("shop", "wp")), "the waypoint stays the primary");
    let invalid = resources(&format!("{}{gateways}", service("many")));
    assert!(invalid.service("shop/web.shop.svc.cluster.local").weighted_waypoints.is_empty());
    assert!(
        invalid
            .condition("Service shop/web", "istio.io/WaypointBound")
            .message
            .contains("CanaryInvalidWeight")
    );
}

#[test]
fn other_gateways_are_reported_as_not_served() {
    let ingress =
        ready("in", "shop", "a: b", "").replace("istio-waypoint", "istio-remote").replace("HBONE", "HTTP");
    let detailed = ready("wp", "shop", "a: b", ", hostname: x.example")
        .replace("spec: {", "spec: {infrastructure: {labels: {a: b}}, defaultScope: All, ");
    let condition = resources(&detailed).condition("Gateway shop/wp", "Accepted").message.clone();
    assert!(
        condition.contains("spec.defaultScope") && condition.contains("spec.listeners[0].hostname"),
        "{condition}"
    );
    let resources = resources(&ingress);
    assert_eq!(resources.condition("Gateway shop/in", "Accepted").reason, "UnsupportedValue");
}
