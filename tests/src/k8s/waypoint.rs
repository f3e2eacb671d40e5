//! Waypoints on real pods: deployed from their Gateway, in the path of those who ask for them.

use super::pods;
use super::{Bed, Scenario, Space, scenario};
use crate::bed::wait;
use crate::cluster::balancer::Balancer;
use crate::cluster::kubectl::has_condition;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "a Gateway becomes a running waypoint, which routes and denies by path and identity",
        240,
        gateway,
    ),
    scenario(
        "a client outside the mesh reaches routes through a gateway that its Gateway deployed",
        240,
        ingress,
    ),
];

const PATIENCE: Duration = Duration::from_secs(60);

pub(super) const GATEWAY: &str = "
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
";

/// Requests of one path are rewritten; one path is denied to all, another to all but one identity.
fn rules(namespace: &str) -> String {
    format!(
        "
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: rewrite}}
spec:
  parentRefs: [{{group: '', kind: Service, name: far, port: 80}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /old}}}}]
    filters:
    - type: URLRewrite
      urlRewrite: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: /new}}}}
    backendRefs: [{{name: far, port: 80}}]
  - backendRefs: [{{name: far, port: 80}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: paths}}
spec:
  targetRefs: [{{group: '', kind: Service, name: far}}]
  action: DENY
  rules:
  - to: [{{operation: {{paths: [/closed]}}}}]
  - from: [{{source: {{notPrincipals: [cluster.local/ns/{namespace}/sa/friend]}}}}]
    to: [{{operation: {{paths: [/friends]}}}}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: friend}}
"
    )
}

/// Waits until the waypoint of [`GATEWAY`] runs.
pub(super) fn programmed(space: &Space<'_>) -> Result<()> {
    wait::until_true("waypoint that is programmed", PATIENCE, || {
        // Istio's kind has the same short name.
        Ok(has_condition(&space.get("gateways.gateway.networking.k8s.io", "waypoint")?, "Programmed"))
    })
}

pub(super) fn gateway(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[("istio.io/dataplane-mode", "ambient")])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let friend = pods::client("friend", a).replace("spec:\n", "spec:\n  serviceAccountName: friend\n");
    let objects = [
        GATEWAY,
        &rules(space.name()),
        &friend,
        &pods::client("stranger", a),
        &pods::web("far", b),
        &pods::service("far"),
    ];
    space.apply(&objects.concat())?;
    space.wait_ready(&["friend", "stranger", "far"])?;
    programmed(&space)?;
    let url = |path: &str| format!("http://far.{}.svc.cluster.local{path}", space.name());
    wait::until_true("answer without the waypoint", PATIENCE, || {
        Ok(space.curl("stranger", &url("/old/shoes")).is_ok_and(|answer| answer.contains("/old/shoes")))
    })?;
    space.label("istio.io/use-waypoint", Some("waypoint"))?;
    wait::until_true("route of the waypoint", PATIENCE, || {
        Ok(space.curl("stranger", &url("/old/shoes"))?.contains("/new/shoes"))
    })?;
    let status = |pod: &str, path: &str| -> Result<String> {
        let argv =
            ["curl", "--silent", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", &url(path)];
        space.exec(pod, &argv)
    };
    for (pod, path, wanted) in [
        ("stranger", "/open", "200"),
        ("stranger", "/closed", "403"),
        ("friend", "/closed", "403"),
        ("stranger", "/friends", "403"),
        ("friend", "/friends", "200"),
    ] {
        let got = status(pod, path)?;
        ensure!(got == wanted, "{pod} got {got} instead of {wanted} for {path}");
    }
    space.kubectl(&["delete", "gateway", "waypoint"])?;
    wait::until_true("end of the waypoint's deployment", PATIENCE, || {
        Ok(space.kubectl(&["get", "deployments", "-o", "name"])?.trim().is_empty())
    })
}

/// A gateway with its Service's settings in a ConfigMap, and routes: one is served, one names a backend of another
/// namespace without being allowed to, one has hosts that the listener does not.
const INGRESS: &str = "
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data:
  deployment: 'spec: {replicas: 2}'
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in}
spec:
  gatewayClassName: istio
  infrastructure: {labels: {team: edge}, parametersRef: {group: '', kind: ConfigMap, name: settings}}
  listeners: [{name: http, port: 80, protocol: HTTP, hostname: '*.example'}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: served}
spec:
  parentRefs: [{name: in}]
  hostnames: [shop.example]
  rules:
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}]
    backendRefs: [{name: far, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: forbidden}
spec:
  parentRefs: [{name: in}]
  hostnames: [forbidden.example]
  rules: [{backendRefs: [{name: kubernetes, namespace: default, port: 443}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: elsewhere}
spec:
  parentRefs: [{name: in}]
  hostnames: [shop.test]
  rules: [{backendRefs: [{name: far, port: 80}]}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: all}
spec: {mtls: {mode: STRICT}}
";

/// Status and reason of a condition of a route's first parent.
fn said(route: &Value, kind: &str) -> String {
    let all = route["status"]["parents"][0]["conditions"].as_array().cloned().unwrap_or_default();
    let found = all.iter().find(|condition| condition["type"] == kind);
    found.map_or_else(String::new, |c| format!("{} {}", c["status"], c["reason"]).replace('"', ""))
}

fn ingress(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let _balancer = Balancer::start(layout, &bed.kubectl)?;
    let space = bed.space(&[("istio.io/dataplane-mode", "ambient")])?;
    let b = &bed.nodes[1];
    space.apply(&[INGRESS, &pods::web("far", b), &pods::service("far")].concat())?;
    space.wait_ready(&["far"])?;
    wait::until_true("gateway that is programmed", PATIENCE, || {
        Ok(has_condition(&space.get("gateway", "in")?, "Programmed"))
    })?;
    let status = space.get("gateway", "in")?["status"].clone();
    let address = status["addresses"][0]["value"].as_str().context("the gateway has no address")?.to_owned();
    let listener = &status["listeners"][0];
    ensure!(listener["attachedRoutes"] == 2, "the listener says {listener}");
    let deployment = space.get("deployment", "in-istio")?;
    ensure!(deployment["spec"]["replicas"] == 2, "the ConfigMap says two: {}", deployment["spec"]);
    ensure!(deployment["metadata"]["labels"]["team"] == "edge", "{}", deployment["metadata"]);

    // As a client outside the cluster, which knows the address and nothing else.
    let ask = |host: &str, path: &str| bed.ask_from_outside(&address, host, path);
    wait::until_true("answer through the gateway", PATIENCE, || {
        Ok(ask("shop.example", "/old/shoes").is_ok_and(|answer| answer.ends_with(" 200")))
    })?;
    let answer = ask("shop.example", "/old/shoes")?;
    ensure!(answer.contains("/new/shoes"), "the route's rewrite is missing: {answer}");
    for (host, code) in [("shop.test", " 404"), ("other.example", " 404"), ("forbidden.example", " 500")] {
        let answer = ask(host, "/old/shoes")?;
        ensure!(answer.ends_with(code), "{host}: {answer} instead of{code}");
    }
    for (route, kind, wanted) in [
        ("served", "Accepted", "True Accepted"),
        ("served", "ResolvedRefs", "True ResolvedRefs"),
        ("forbidden", "Accepted", "True Accepted"),
        ("forbidden", "ResolvedRefs", "False RefNotPermitted"),
        ("elsewhere", "Accepted", "False NoMatchingListenerHostname"),
    ] {
        let found = said(&space.get("httproute", route)?, kind);
        ensure!(found == wanted, "route {route}, {kind}: {found:?} instead of {wanted:?}");
    }
    space.kubectl(&["delete", "gateway", "in"])?;
    wait::until_true("end of the gateway's deployment", PATIENCE, || {
        Ok(space.kubectl(&["get", "deployments", "-o", "name"])?.trim().is_empty())
    })
}
