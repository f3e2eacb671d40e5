//! A mesh that is converted again and again comes out as one that is converted once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;

use crate::convert::{Captured, Converter, Mesh, Resources, convert};
use crate::testing::objects;

/// Objects that pods depend on, each in some versions.
const VERSIONS: &[&[&str]] = &[
    &[
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}",
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: wp}}}",
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}, \
         annotations: {undermesh.io/same-node: tunnel, undermesh.io/require-waypoint: 'true'}}}",
    ],
    &[
        "{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/region: eu}}}",
        "{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/region: us}}}",
    ],
    &[
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {selector: {app: web}, ports: [{name: \
         http, port: 80, targetPort: 8080}]}}",
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: wp}, \
         annotations: {undermesh.io/require-waypoint: 'true'}}, spec: {selector: {app: web}, ports: [{port: 81}]}}",
        "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {selector: {app: web}, \
         publishNotReadyAddresses: true, ports: [{name: http, port: 80, targetPort: named}]}}",
    ],
    &[
        "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1, namespace: shop, labels: \
         {kubernetes.io/service-name: web}}, addressType: IPv4, ports: [{name: http, port: 8081}], endpoints: [{addresses: \
         [10.1.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: a}}]}",
        "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1, namespace: shop, labels: \
         {kubernetes.io/service-name: web}}, addressType: IPv4, ports: [{name: http, port: 8081}], endpoints: [{addresses: \
         [10.1.0.1], conditions: {ready: false}, targetRef: {kind: Pod, name: a}}, {addresses: [10.1.0.2], targetRef: {kind: \
         Pod, name: b}}, {addresses: [10.9.0.1]}]}",
        "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1, namespace: shop, labels: \
         {kubernetes.io/service-name: none}}, addressType: IPv4, endpoints: []}",
    ],
    &[
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, uid: u1, labels: {app: web}}, spec: {nodeName: n1, \
         containers: [{name: c, ports: [{name: named, containerPort: 8082}]}]}, status: {podIP: 10.1.0.1, conditions: \
         [{type: Ready, status: 'True'}]}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, uid: u1, labels: {app: db}}, spec: {nodeName: n2, \
         containers: [{name: c}]}, status: {podIP: 10.1.0.2}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, uid: u1}, spec: {nodeName: n1, containers: [{name: \
         c}]}, status: {phase: Succeeded}}",
    ],
    &[
        "{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, uid: u2, labels: {app: web, \
         istio.io/use-waypoint: wp}}, spec: {nodeName: n1, containers: [{name: c}]}, status: {podIP: 10.1.0.2}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: web}, annotations: \
         {undermesh.io/require-waypoint: 'yes'}}, spec: {nodeName: n1, containers: [{name: c}]}, status: {podIP: 10.1.0.2}}",
    ],
    &[
        "{apiVersion: v1, kind: Pod, metadata: {name: c, namespace: other, uid: u3, labels: \
         {gateway.networking.k8s.io/gateway-name: wp}}, spec: {nodeName: n1, serviceAccountName: wp2, containers: [{name: \
         c}]}, status: {podIP: 10.1.0.3}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: wp-1, namespace: shop, uid: u4, labels: \
         {gateway.networking.k8s.io/gateway-name: wp}}, spec: {nodeName: n1, serviceAccountName: wp2, containers: [{name: \
         c}]}, status: {podIP: 10.1.0.4}}",
    ],
    &[
        "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: wp, namespace: shop, labels: \
         {istio.io/waypoint-for: all}}, spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, \
         protocol: HBONE}]}, status: {addresses: [{type: Hostname, value: wp.shop.svc.cluster.local}]}}",
        "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: wp, namespace: shop}, spec: \
         {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}}",
    ],
    &[
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: shop}, spec: \
         {selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {ports: ['80']}}]}]}}",
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: p, namespace: istio-system}, spec: \
         {selector: {matchLabels: {app: db}}, action: DENY, rules: [{}]}}",
    ],
    &[
        "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: {mtls: \
         {mode: STRICT}}}",
        "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: p, namespace: shop}, spec: \
         {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}}",
    ],
    &[
        "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: e, namespace: shop}, spec: {hosts: \
         [api.example], ports: [{number: 80, name: http}], resolution: STATIC, workloadSelector: {labels: {app: web}}}}",
        "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: e, namespace: shop}, spec: {hosts: \
         [web.shop.svc.cluster.local], ports: [{number: 81, name: http}], resolution: STATIC, workloadSelector: {labels: \
         {app: web}}}}",
    ],
    &[
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: 'trustDomain: \
         other'}}",
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: 'trustDomain: \
         other', undermesh: 'failOpen: true'}}",
    ],
];

/// Which version of each object there is, and which pods are captured.
type Present = (Vec<usize>, BTreeSet<usize>);

fn captured(which: &BTreeSet<usize>) -> Captured {
    let uids = which.iter().map(|n| format!("Kubernetes//Pod/shop/{}", ["a", "b"][*n])).collect();
    BTreeMap::from([("n1".to_owned(), uids)])
}

fn text(versions: &[usize]) -> String {
    let of = VERSIONS.iter().zip(versions).filter_map(|(versions, n)| versions.get(*n).copied());
    of.collect::<Vec<_>>().join("\n---\n")
}

/// One change after the other: of one object, rarely of what is captured.
fn history() -> impl Strategy<Value = Vec<Present>> {
    let version = || prop_oneof![6 => 0_usize..2, 2 => Just(2_usize), 1 => Just(3_usize)];
    let start = proptest::collection::vec(version(), VERSIONS.len());
    let captured = || proptest::collection::btree_set(0_usize..2, 0..3);
    let change = (0..VERSIONS.len(), version(), proptest::option::weighted(0.1, captured()));
    let changes = proptest::collection::vec(change, 1..20);
    (start, captured(), changes).prop_map(|(versions, captured, changes)| {
        let mut history = vec![(versions, captured)];
        for (object, version, captured) in changes {
            let mut next = history[history.len() - 1].clone();
            match captured {
                Some(captured) => next.1 = captured,
                None => next.0[object] = version,
            }
            history.push(next);
        }
        history
    })
}

fn whole(text: &str, captured: &Captured, converter: &mut Converter) -> (Resources, Resources) {
    let objects = objects(text);
    let mesh = Mesh::default().with_settings(&objects);
    (converter.convert(&objects, &mesh, captured), convert(&objects, &mesh, captured))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn whatever_has_changed_what_is_kept_of_pods_makes_no_difference(history in history()) {
        let mut converter = Converter::default();
        for (versions, which) in history {
            let text = text(&versions);
            let (again, once) = whole(&text, &captured(&which), &mut converter);
            prop_assert_eq!(again, once, "{}", text);
        }
    }
}

#[test]
fn a_change_of_one_pod_makes_no_other_anew() {
    let all = |moved: &str| {
        let pod = |name: &str, ip: &str| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: web}}}}\n\
                 spec: {{nodeName: n1, containers: [{{name: c}}]}}\nstatus: {{podIP: {ip}}}\n"
            )
        };
        format!("{}{}---\n{}", pod("a", "10.1.0.1"), pod("b", moved), VERSIONS[2][0])
    };
    let mut converter = Converter::default();
    let mut of = |text: &str, uid: &str| {
        let resources = whole(text, &Captured::new(), &mut converter).0;
        Arc::clone(&resources.addresses[uid])
    };
    let (a, b) = ("Kubernetes//Pod/shop/a", "Kubernetes//Pod/shop/b");
    let before = of(&all("10.1.0.2"), a);
    assert!(Arc::ptr_eq(&before, &of(&all("10.1.0.3"), a)), "though its file was read anew");
    let before = of(&all("10.1.0.3"), b);
    assert!(!Arc::ptr_eq(&before, &of(&all("10.1.0.4"), b)));
}
