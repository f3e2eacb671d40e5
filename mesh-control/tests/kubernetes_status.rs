//! What the control plane writes into a real API server: status, waypoints, GatewayClasses, the webhook's bundle.

mod apiserver;

use apiserver::{ApiServer, Control, GATEWAY_API, ISTIO, RBAC, until};
use serde_json::Value;

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {rules: [{from: [{source: {namespaces: [shop]}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web, port: 80}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
";

const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  infrastructure: {labels: {team: a}}
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
";

const WEBHOOK: &str = "
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: undermesh-validator-istio-system}
webhooks:
- name: validation.undermesh.io
  clientConfig: {url: 'https://localhost:PORT/validate'}
  failurePolicy: Ignore
  sideEffects: None
  admissionReviewVersions: [v1]
  rules:
  - {apiGroups: [security.istio.io, networking.istio.io], apiVersions: ['*'], operations: [CREATE, UPDATE], resources: ['*']}
";

fn started(more: &[&str]) -> Option<(ApiServer, Control)> {
    let server = ApiServer::start()?;
    server.apply(RBAC);
    if !server.install_crds(&[ISTIO, GATEWAY_API]) {
        return None;
    }
    let kubeconfig = server.kubeconfig_of("istio-system", "undermesh-control");
    let control = Control::start(&server, "a", &kubeconfig, more);
    control.wait_ready();
    Some((server, control))
}

/// Status and reason of a condition.
fn condition(conditions: &Value, kind: &str) -> Option<(String, String)> {
    let found = conditions.as_array()?.iter().find(|c| c["type"] == *kind)?;
    Some((found["status"].as_str()?.to_owned(), found["reason"].as_str()?.to_owned()))
}

fn is(found: Option<(String, String)>, status: &str, reason: &str) -> bool {
    found == Some((status.to_owned(), reason.to_owned()))
}

#[test]
fn conditions_are_written_once_and_follow_what_changes() {
    let Some((server, control)) = started(&[]) else { return };
    server.apply(SHOP);
    let policy = || server.get(&["authorizationpolicies.security.istio.io", "p", "-n", "shop"]);
    let service = || server.get(&["service", "web", "-n", "shop"]);
    let route = || server.get(&["httproute", "web", "-n", "shop"]);
    until("the policy is accepted", || {
        is(condition(&policy()["status"]["conditions"], "ZtunnelAccepted"), "True", "Accepted")
    });
    until("nobody is connected, and that is said", || {
        is(condition(&policy()["status"]["conditions"], "undermesh.io/Programmed"), "False", "NoProxies")
    });
    until("the service says that its waypoint is missing", || {
        is(
            condition(&service()["status"]["conditions"], "istio.io/WaypointBound"),
            "False",
            "WaypointIsNotReady",
        )
    });
    until("the route's parent has a status", || {
        let parents = route()["status"]["parents"].clone();
        parents[0]["parentRef"]["name"] == "web"
            && parents[0]["controllerName"] == "istio.io/gateway-controller"
            && condition(&parents[0]["conditions"], "Accepted").is_some()
    });

    // Nothing is written again that is there.
    let versions = || [policy(), service(), route()].map(|o| o["metadata"]["resourceVersion"].clone());
    std::thread::sleep(std::time::Duration::from_secs(3));
    let before = versions();
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(versions(), before, "{}", control.logged());
    // Nor is it tried: an apply that changes nothing would not show in the version.
    let written = |object: &str| control.logged().matches(&format!("status written object={object}")).count();
    for object in ["AuthorizationPolicy shop/p", "Service shop/web", "HTTPRoute shop/web"] {
        assert!((1..=3).contains(&written(object)), "{object}: {}", control.logged());
    }

    // An object that is made anew under the same name gets its own.
    for kind in ["httproute", "authorizationpolicies.security.istio.io"] {
        server.text(&["delete", kind, "-n", "shop", "--all"]);
    }
    server.apply(SHOP);
    let begin = std::time::Instant::now();
    until("the new route and policy have a status", || {
        route()["status"]["parents"][0].is_object() && policy()["status"]["conditions"].is_array()
    });
    // What was written to the old ones would keep it away for a minute.
    assert!(begin.elapsed().as_secs() < 30, "{:?}", begin.elapsed());

    // Another controller's condition stays.
    let foreign = r#"[{"op":"add","path":"/status/conditions/-","value":{"type":"Theirs","status":"True","reason":"R","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}}]"#;
    server.text(&[
        "patch",
        "authorizationpolicies.security.istio.io",
        "p",
        "-n",
        "shop",
        "--subresource=status",
        "--type=json",
        "-p",
        foreign,
    ]);
    server.apply(&SHOP.replace("namespaces: [shop]", "notIpBlocks: [10.0.0.0/99]"));
    until("what is wrong is said", || {
        let all = policy()["status"]["conditions"].clone();
        is(condition(&all, "ZtunnelAccepted"), "False", "Invalid") && condition(&all, "Theirs").is_some()
    });
    server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: shop}}");
    until("a condition that is not said any more goes", || {
        condition(&service()["status"]["conditions"], "istio.io/WaypointBound").is_none()
    });
}

#[test]
fn a_gateway_gets_a_waypoint_that_is_put_right_and_says_how_far_it_is() {
    let Some((server, _control)) = started(&["--waypoint-image", "registry.test/waypoint:1"]) else { return };
    until("the classes are there", || {
        let class = server.get(&["gatewayclass", "istio-waypoint"]);
        is(condition(&class["status"]["conditions"], "Accepted"), "True", "Accepted")
    });
    server.apply(SHOP);
    server.apply(GATEWAY);
    let get = |kind: &str| server.get(&[kind, "waypoint", "-n", "shop"]);
    let gateway = || get("gateways.gateway.networking.k8s.io");
    until("it is deployed", || ["serviceaccount", "deployment", "service"].iter().all(|k| !get(k).is_null()));
    let deployment = get("deployment");
    assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], "registry.test/waypoint:1");
    assert_eq!(deployment["metadata"]["labels"]["team"], "a");
    assert_eq!(deployment["metadata"]["ownerReferences"][0]["uid"], gateway()["metadata"]["uid"]);
    until("it waits for a pod", || {
        is(condition(&gateway()["status"]["conditions"], "Programmed"), "False", "Pending")
    });
    let ip = get("service")["spec"]["clusterIP"].clone();
    let addresses = gateway()["status"]["addresses"].clone();
    assert_eq!(
        addresses[0],
        serde_json::json!({"type": "Hostname", "value": "waypoint.shop.svc.cluster.local"})
    );
    assert_eq!(addresses[1]["value"], ip);
    server.set_status(
        "deployment",
        "shop",
        "waypoint",
        r#"{"replicas":1,"readyReplicas":1,"availableReplicas":1}"#,
    );
    until("it is programmed", || {
        is(condition(&gateway()["status"]["conditions"], "Programmed"), "True", "Programmed")
    });
    until("what asks for it is bound", || {
        let service = server.get(&["service", "web", "-n", "shop"]);
        is(condition(&service["status"]["conditions"], "istio.io/WaypointBound"), "True", "WaypointAccepted")
    });

    server.text(&["delete", "service", "-n", "shop", "waypoint"]);
    until("a deleted Service is back", || !get("service").is_null());
    server.apply(&GATEWAY.replace("team: a", "team: b"));
    until("a changed label arrives", || get("deployment")["metadata"]["labels"]["team"] == "b");

    // A name that somebody else's Service has is left to him.
    server.apply(&GATEWAY.replace("name: waypoint", "name: web"));
    until("it is refused", || {
        let other = server.get(&["gateways.gateway.networking.k8s.io", "web", "-n", "shop"]);
        is(condition(&other["status"]["conditions"], "Programmed"), "False", "Invalid")
    });
    assert_eq!(server.get(&["service", "web", "-n", "shop"])["spec"]["ports"][0]["port"], 80);
}

const INGRESS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: edge}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: edge}
spec:
  gatewayClassName: undermesh
  infrastructure: {parametersRef: {group: '', kind: ConfigMap, name: settings}}
  listeners:
  - {name: http, port: 80, protocol: HTTP}
  - {name: odd, port: 81, protocol: example.com/odd}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: edge}
spec:
  parentRefs: [{name: in, sectionName: http}, {name: in, sectionName: gone}, {name: in, sectionName: odd}, {name: other}]
  rules: [{backendRefs: [{name: gone, port: 80}]}]
";
const PARAMETERS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: edge}
data: {service: 'spec: {externalTrafficPolicy: Local}'}
";

#[test]
fn a_gateway_is_deployed_and_says_of_its_listeners_and_routes_what_came_of_them() {
    let Some((server, control)) = started(&["--waypoint-image", "registry.test/waypoint:1"]) else { return };
    until("the class is there", || {
        let class = server.get(&["gatewayclass", "undermesh"]);
        is(condition(&class["status"]["conditions"], "Accepted"), "True", "Accepted")
    });
    // Another version of a class is looked at, too.
    server.text(&[
        "patch",
        "gatewayclass",
        "undermesh",
        "--type=merge",
        "-p",
        r#"{"spec":{"description":"x"}}"#,
    ]);
    until("the changed class is accepted", || {
        let class = server.get(&["gatewayclass", "undermesh"]);
        class["status"]["conditions"][0]["observedGeneration"] == class["metadata"]["generation"]
    });
    server.apply(INGRESS);
    let gateway = || server.get(&["gateways.gateway.networking.k8s.io", "in", "-n", "edge"]);
    until("its parameters are missing", || {
        is(condition(&gateway()["status"]["conditions"], "Accepted"), "False", "InvalidParameters")
    });
    server.apply(PARAMETERS);
    let service = || server.get(&["service", "in-undermesh", "-n", "edge"]);
    until("it is deployed", || service()["spec"]["externalTrafficPolicy"] == "Local");
    assert_eq!(service()["spec"]["type"], "LoadBalancer");
    until("it has no address", || {
        is(condition(&gateway()["status"]["conditions"], "Programmed"), "False", "AddressNotAssigned")
    });
    server.set_status(
        "service",
        "edge",
        "in-undermesh",
        r#"{"loadBalancer":{"ingress":[{"ip":"192.0.2.1"}]}}"#,
    );
    let ready = r#"{"replicas":1,"readyReplicas":1,"availableReplicas":1}"#;
    server.set_status("deployment", "edge", "in-undermesh", ready);
    until("it is programmed", || {
        is(condition(&gateway()["status"]["conditions"], "Programmed"), "True", "Programmed")
    });
    let status = gateway()["status"].clone();
    assert!(is(condition(&status["conditions"], "Accepted"), "True", "ListenersNotValid"), "{status}");
    assert_eq!(status["addresses"], serde_json::json!([{"type": "IPAddress", "value": "192.0.2.1"}]));
    let listener = |i: usize| status["listeners"][i].clone();
    assert_eq!((&listener(0)["attachedRoutes"], &listener(1)["attachedRoutes"]), (&1.into(), &0.into()));
    assert!(is(condition(&listener(1)["conditions"], "Accepted"), "False", "UnsupportedProtocol"));
    let route = || server.get(&["httproute", "r", "-n", "edge"]);
    until("each parent that is ours has a status", || {
        route()["status"]["parents"].as_array().is_some_and(|parents| parents.len() == 3)
    });
    let parents = route()["status"]["parents"].clone();
    for (i, (ok, reason)) in
        [("True", "Accepted"), ("False", "NoMatchingParent"), ("False", "NotAllowedByListeners")]
            .iter()
            .enumerate()
    {
        assert_eq!(parents[i]["controllerName"], "undermesh.io/gateway-controller");
        assert!(is(condition(&parents[i]["conditions"], "Accepted"), ok, reason), "{parents}");
        assert!(
            is(condition(&parents[i]["conditions"], "ResolvedRefs"), "False", "BackendNotFound"),
            "{parents}"
        );
    }

    // Nothing is written again that is there.
    std::thread::sleep(std::time::Duration::from_secs(6));
    let before = [gateway(), route(), service()].map(|o| o["metadata"]["resourceVersion"].clone());
    std::thread::sleep(std::time::Duration::from_secs(6));
    let after = [gateway(), route(), service()].map(|o| o["metadata"]["resourceVersion"].clone());
    assert_eq!(after, before, "{}", control.logged());
}

#[test]
fn the_webhook_refuses_what_would_not_be_taken_and_blocks_nobody_when_it_is_away() {
    let port = apiserver::free_port();
    let listen = format!("127.0.0.1:{port}");
    let Some((server, control)) = started(&["--listen-webhook", &listen]) else { return };
    server.apply(&WEBHOOK.replace("PORT", &port.to_string()));
    server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: shop}}");
    let configuration =
        || server.get(&["validatingwebhookconfiguration", "undermesh-validator-istio-system"]);
    until("the bundle is written", || configuration()["webhooks"][0]["clientConfig"]["caBundle"].is_string());
    let bad = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {rules: [{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]}
";
    let mut message = String::new();
    // The API server takes a configuration over within seconds.
    until("a policy that would not be taken is refused", || {
        let output = server.try_apply(bad);
        message = String::from_utf8_lossy(&output.stderr).into_owned();
        !output.status.success()
    });
    assert!(message.contains("spec.rules[0].from[0].source.ipBlocks[0]"), "{message}");
    server.apply(&bad.replace("/99", "/8"));
    server.apply(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: e, namespace: shop}
spec: {hosts: [x.example], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS}
",
    );
    control.stop();
    server.apply(bad);
}
