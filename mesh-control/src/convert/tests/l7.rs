use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use mesh_core::state::{MeshOptions, StateIndex};
use mesh_core::xds::proto::l7 as wire;
use mesh_waypoint::config::{self, Own};
use mesh_waypoint::observe::Observation;
use mesh_waypoint::routing::Routes;
use mesh_waypoint::security::Policies;
use mesh_waypoint::security::jwks::{KeyStore, Roots};
use proptest::prelude::*;
use serde_json::Value;

use crate::ads::snapshot::{ResourceType, Snapshot};
use crate::convert::{Captured, Mesh, Resources, convert};
use crate::testing::{load, resources};
use crate::tree::documents;

#[test]
fn waypoints_are_told_the_labels_of_pods_and_entries() {
    let text = "---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop, labels: {app: web, version: v1}}
spec: {nodeName: n1, containers: []}
status: {podIP: 10.1.0.5}
---
apiVersion: v1
kind: Pod
metadata: {name: bare, namespace: shop}
spec: {nodeName: n1, containers: []}
status: {podIP: 10.1.0.6}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop, labels: {a: b}}
spec: {address: 10.1.0.7, labels: {app: vm}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: out, namespace: shop}
spec: {hosts: [api.example], ports: [{number: 443, name: tls, protocol: TLS}], resolution: STATIC, endpoints: [{address: 10.9.0.1, labels: {version: v2}}]}
";
    let resources = resources(text);
    let told: Vec<(&str, String)> = resources
        .l7
        .labels
        .iter()
        .map(|(uid, l)| {
            assert_eq!(**uid, l.message.workload_uid);
            assert!(resources.addresses.contains_key(uid), "{uid} is a workload");
            (&**uid, format!("{:?}", l.message.labels))
        })
        .collect();
    assert_eq!(
        told,
        [
            ("Kubernetes//Pod/shop/p", r#"{"app": "web", "version": "v1"}"#.to_owned()),
            (
                "Kubernetes/networking.istio.io/ServiceEntry/shop/out/10.9.0.1",
                r#"{"version": "v2"}"#.to_owned()
            ),
            ("Kubernetes/networking.istio.io/WorkloadEntry/shop/vm", r#"{"a": "b", "app": "vm"}"#.to_owned()),
        ]
    );
}

#[test]
fn waypoints_are_told_what_the_mesh_settings_say() {
    let bare = &resources("").l7.settings["mesh"];
    assert_eq!(
        (bare.root_namespace.as_str(), bare.cluster_domain.as_str()),
        ("istio-system", "cluster.local")
    );
    let retry = bare.default_retry.clone().unwrap();
    assert_eq!((retry.attempts, retry.status_codes.as_slice()), (2, [503].as_slice()));
    assert_eq!(
        retry.on.join(","),
        "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
    );
    let text = "---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: td
    trustDomainAliases: [old]
    connectTimeout: 3s
    protocolDetectionTimeout: 100ms
    pathNormalization: {normalization: DECODE_AND_MERGE_SLASHES}
    defaultHttpRetryPolicy: {attempts: 0}
    localityLbSetting: {enabled: false}
    defaultConfig: {concurrency: 2, gatewayTopology: {numTrustedProxies: 1, proxyProtocol: {}}}
    defaultTrafficPolicy: {connectionPool: {tcp: {maxConnections: 5}}, outlierDetection: {consecutive5xxErrors: 9, consecutiveErrors: 3}}
    enableEnvoyAccessLogService: true
";
    let resources = resources(text);
    let told = &resources.l7.settings["mesh"];
    assert_eq!(
        (told.trust_domain.as_str(), told.trust_domain_aliases.as_slice()),
        ("td", ["old".to_owned()].as_slice())
    );
    assert_eq!(
        (told.connect_timeout.unwrap().seconds, told.protocol_detection_timeout.unwrap().nanos),
        (3, 100_000_000)
    );
    assert_eq!(told.path_normalization(), wire::settings::PathNormalization::DecodeAndMergeSlashes);
    assert_eq!(told.default_retry.clone().unwrap().attempts, 0);
    assert_eq!((told.locality.clone().unwrap().enabled, told.trusted_proxies), (Some(false), 1));
    assert_eq!(told.default_connection_pool.unwrap().max_connections, Some(5));
    assert_eq!(told.default_outlier_detection.unwrap().consecutive_5xx, Some(9));
    let messages: Vec<&str> = resources.conditions.iter().map(|c| c.message.as_str()).collect();
    assert!(
        messages.contains(&"MeshConfig field enableEnvoyAccessLogService has no effect here"),
        "{messages:?}"
    );
    for part in [
        "defaultTrafficPolicy.outlierDetection.consecutiveErrors",
        "defaultConfig.concurrency",
        "defaultConfig.gatewayTopology.proxyProtocol",
    ] {
        assert!(messages.iter().any(|m| m.contains(part)), "{part}: {messages:?}");
    }
    let wrong = load(&text.replace("attempts: 0", "attempts: -1").replace("3s", "soon"));
    let fields: Vec<&str> = wrong.problems.iter().map(|p| p.field.as_str()).collect();
    assert_eq!(fields, ["data.mesh.connectTimeout", "data.mesh.defaultHttpRetryPolicy.attempts"]);
}

/// One object of every kind, with most of their fields.
static CORPUS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let text = include_str!("../../../fuzz/seeds/yaml/waypoint.yaml");
    let objects: Vec<Value> = documents(text).into_iter().map(|d| d.unwrap().to_json()).collect();
    assert!(objects.len() >= 10);
    objects
});

/// Puts `with` where the `at`-th value of a tree is.
fn replace(tree: &mut Value, at: &mut usize, with: &Value) -> bool {
    if *at == 0 {
        *tree = with.clone();
        return true;
    }
    *at -= 1;
    match tree {
        Value::Array(items) => items.iter_mut().any(|item| replace(item, at, with)),
        Value::Object(fields) => fields.values_mut().any(|field| replace(field, at, with)),
        _ => false,
    }
}

/// What the waypoint shop/wp finds wrong with what it is told.
fn complaints(resources: &Resources) -> Vec<String> {
    let mut mesh = StateIndex::new(MeshOptions::default());
    for (name, resource) in &*resources.addresses {
        mesh.apply_address(name, &resource.message).unwrap();
    }
    fn shared<T: Clone>(given: &BTreeMap<String, T>) -> BTreeMap<String, Arc<T>> {
        given.iter().map(|(name, value)| (name.clone(), Arc::new(value.clone()))).collect()
    }
    let l7 = &resources.l7;
    let told = config::Resources {
        routes: l7.routes.iter().map(|(name, route)| (name.clone(), route.clone().into())).collect(),
        destinations: shared(&l7.destinations),
        authorizations: shared(&l7.authorizations),
        authentications: shared(&l7.authentications),
        telemetries: shared(&l7.telemetries),
        settings: Arc::new(l7.settings["mesh"].clone()),
        ..config::Resources::default()
    };
    let own = Own {
        namespace: "shop".into(),
        gateway: "wp".into(),
        class: "istio-waypoint".into(),
        hostname: "wp.shop.svc.cluster.local".into(),
        ..Own::default()
    };
    let routes = Routes::build(&told, mesh.state(), &own, &Routes::default());
    let (keys, _fetcher) = KeyStore::new(Roots::Given(Vec::new()));
    let policies = Policies::build(&told, &own, &keys);
    let found = routes.problems().map(ToString::to_string);
    let found = found.chain(policies.problems().iter().map(ToString::to_string));
    let observation = Observation::build(&told, &own);
    found.chain(observation.problems().iter().map(ToString::to_string)).collect()
}

fn size(tree: &Value) -> usize {
    1 + match tree {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(fields) => fields.values().map(size).sum(),
        _ => 0,
    }
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_i64..200).prop_map(Value::from),
        any::<f64>().prop_map(|f| serde_json::Number::from_f64(f).map_or(Value::Null, Value::Number)),
        "[-a-z0-9./*{}\\[\\]:, %]{0,12}".prop_map(Value::from),
        Just(Value::from("web")),
        Just(Value::Array(Vec::new())),
        Just(Value::Object(serde_json::Map::new())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn whatever_is_accepted_is_converted_without_a_panic_and_a_waypoint_takes_it(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), scalar()), 1..4),
        dropped in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut objects = CORPUS.clone();
        for (object, place, value) in &edits {
            let object = object.get_mut(&mut objects);
            let mut at = place.index(size(object));
            replace(object, &mut at, value);
        }
        if let Some(dropped) = dropped {
            objects.remove(dropped.index(objects.len()));
        }
        let text: Vec<String> = objects.iter().map(Value::to_string).collect();
        let state = load(&text.join("\n---\n"));
        for problem in &state.problems {
            prop_assert!(!problem.message.is_empty() && !problem.consequence.is_empty());
        }
        let mesh = Mesh::default().with_settings(&state.objects);
        let resources = convert(&state.objects, &mesh, &Captured::new());
        for (name, route) in &resources.l7.routes {
            prop_assert!(!route.parents.is_empty(), "{name} is for nobody");
            let mut names: Vec<&str> = route.http.iter().map(|r| r.name.as_str()).collect();
            names.sort_unstable();
            prop_assert!(names.windows(2).all(|w| w[0] != w[1]), "{name} has a rule twice: {names:?}");
        }
        for condition in &resources.conditions {
            prop_assert!(condition.status || !condition.message.is_empty());
        }
        let mut complaints = complaints(&resources);
        if resources.conditions.iter().any(|c| c.reason == "ProviderNotFound") {
            complaints.retain(|c| !c.contains("is no extension provider"));
        }
        prop_assert!(complaints.is_empty(), "accepted here, and not there: {complaints:#?}");
        let snapshot = Snapshot::build(&resources, &Snapshot::default());
        prop_assert_eq!(snapshot.entries(ResourceType::Route).len(), resources.l7.routes.len());
        prop_assert!(Snapshot::build(&resources, &snapshot).same_content(&snapshot));
    }
}

#[test]
fn every_kind_of_the_corpus_is_served_by_its_own_type() {
    let text: Vec<String> = CORPUS.iter().map(Value::to_string).collect();
    let resources = resources(&text.join("\n---\n"));
    let snapshot = Snapshot::build(&resources, &Snapshot::default());
    let names = |kind| snapshot.entries(kind).keys().map(|n| n.to_string()).collect::<Vec<_>>();
    assert_eq!(
        names(ResourceType::Route),
        [
            "GRPCRoute/shop/grpc",
            "HTTPRoute/shop/api",
            "TCPRoute/shop/tcp",
            "TLSRoute/shop/tls",
            "VirtualService/shop/web"
        ]
    );
    assert_eq!(names(ResourceType::Destination), ["DestinationRule/shop/web"]);
    assert_eq!(names(ResourceType::RequestAuthorization), ["AuthorizationPolicy/shop/callers"]);
    assert_eq!(names(ResourceType::RequestAuthentication), ["RequestAuthentication/shop/tokens"]);
    assert_eq!(names(ResourceType::Labels), ["Kubernetes//Pod/shop/web-1"]);
    assert_eq!(names(ResourceType::Settings), ["mesh"]);
    assert_eq!(names(ResourceType::Telemetry), ["Telemetry/shop/t"]);
    let unsupported: Vec<_> =
        resources.conditions.iter().filter(|c| c.reason == "UnsupportedValue").collect();
    assert!(unsupported.is_empty(), "{unsupported:#?}");
}
