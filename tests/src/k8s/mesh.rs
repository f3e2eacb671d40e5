//! The mesh on real pods: installed, switched on by a label, seen on the wire.

use super::pods;
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::capture::{Segment, carries};
use crate::bed::wait;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("the mesh is installed by one command, and its parts are ready on every node", 300, install),
    scenario("a label captures running pods without a restart, and nodes see only mutual TLS", 180, label),
    scenario("a pod's first connection is in the mesh", 180, first),
    scenario("a pod on the host's network is left alone, and that is said", 180, host_network),
    scenario("a second installation is refused, and names the first", 120, second),
    scenario(
        "what is wrong is found in the cluster as in files, and in files as if they were applied",
        120,
        analysed,
    ),
    scenario(
        "a policy denies by identity, and probes stay green under STRICT with nothing allowed",
        180,
        policy,
    ),
];

/// Port of tunnels.
const HBONE: u16 = 15008;

/// Label of namespaces and pods in the mesh.
pub(super) const MODE: &str = "istio.io/dataplane-mode";

pub(super) fn install(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let list = bed.kubectl.json(&["--namespace", SYSTEM, "get", "daemonset", "undermesh-node"])?;
    let ready = list["status"]["numberReady"].as_u64();
    ensure!(ready == Some(bed.nodes.len() as u64), "{ready:?} agents are ready on {} nodes", bed.nodes.len());
    bed.meshctl()?.run(&["verify"])?;
    // What an installation of Istio has, by name: tools and agents of others look for it.
    for (kind, name) in [
        ("deployment", "istiod"),
        ("service", "istiod"),
        ("configmap", "istio"),
        ("configmap", "istio-ca-root-cert"),
        ("serviceaccount", "istiod"),
    ] {
        bed.kubectl.run(&["--namespace", SYSTEM, "get", kind, name])?;
    }
    Ok(())
}

/// The port of a server on a node itself.
const HOST_PORT: &str = "18080";

fn host_network(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let server = pods::pod("host", b, &["mesh-tests", "tool", "web", "--name", "host", "--port", HOST_PORT])
        .replace("spec:\n", "spec:\n  hostNetwork: true\n");
    space.apply(&[pods::client("client", a), server].concat())?;
    space.wait_ready(&["client", "host"])?;
    space.wait_captured(&["client"], true)?;
    wait::until_true("what is said of the pod", Duration::from_secs(30), || {
        let path = format!("/api/v1/namespaces/{SYSTEM}/services/istiod:15014/proxy/debug/conditions");
        let all: Value = serde_json::from_str(&bed.kubectl.run(&["get", "--raw", &path])?)?;
        let said = all.as_array().into_iter().flatten().find(|c| {
            let object = &c["object"];
            object["kind"] == "Pod" && object["namespace"] == space.name() && object["name"] == "host"
        });
        Ok(said.is_some_and(|c| c["status"] == false && c["reason"] == "HostNetwork"))
    })?;
    // A pod of the mesh reaches it as it reaches any other machine.
    let server = SocketAddr::new(space.address("host")?, HOST_PORT.parse()?);
    space.curl("client", &format!("http://{server}/"))?;
    let annotations = space.get("pod", "host")?["metadata"]["annotations"].clone();
    ensure!(
        annotations["ambient.istio.io/redirection"].is_null(),
        "it is said to be captured: {annotations}"
    );
    let listeners = space.exec("host", &["ss", "-Hltn", "sport", "=", ":15001"])?;
    ensure!(listeners.trim().is_empty(), "an agent listens in the node's own network: {listeners}");
    Ok(())
}

fn second(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let error = bed.meshctl()?.run(&["install", "-n", "other-mesh", "--set", "image.tag=dev"]);
    let error = error.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(error.contains(SYSTEM), "a second installation was not refused for the first: {error:?}");
    let namespace = bed.kubectl.run(&["get", "namespace", "other-mesh"]);
    ensure!(namespace.is_err(), "a refused installation left its namespace");
    bed.meshctl()?.run(&["verify"]).map(drop)
}

/// A route to a subset that nothing defines, and what defines it.
const ROUTE: &str = "---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web}
spec: {hosts: [web], http: [{route: [{destination: {host: web, subset: canary}}]}]}
";
const SUBSET: &str = "---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web}
spec: {host: web, subsets: [{name: canary, labels: {version: canary}}]}
";

fn analysed(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[])?;
    let dir = crate::bed::run::dir_of(space.name());
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let outcome = analysed_in(bed, &space, &dir);
    let _ = std::fs::remove_dir_all(&dir);
    outcome
}

fn analysed_in(bed: &Bed, space: &Space<'_>, dir: &Path) -> Result<()> {
    let meshctl = bed.meshctl()?;
    // All that it says: with findings of this severity it fails.
    let findings = |args: &[&str]| {
        let common = ["analyze", "--failure-threshold", "info", "--namespace", space.name()];
        let said = meshctl.run(&[&common[..], args].concat());
        said.unwrap_or_else(|error| format!("{error:#}"))
    };
    let file = |name: &str, yaml: &str| -> Result<String> {
        let path = dir.join(name);
        let own = yaml.replace("{name: web}", &format!("{{name: web, namespace: {}}}", space.name()));
        std::fs::write(&path, own).context("cannot write a file")?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (service, route, subset) = (
        file("service.yaml", &pods::service("web"))?,
        file("route.yaml", ROUTE)?,
        file("subset.yaml", SUBSET)?,
    );
    let missing = |said: &str| said.contains("SubsetNotFound") && said.contains("has a subset canary");

    let said = findings(&[&service, &route]);
    ensure!(missing(&said) && said.contains("route.yaml:"), "of files it says: {said}");
    let said = findings(&[&service, &route, &subset]);
    ensure!(!said.contains("SubsetNotFound"), "of files with the subset it says: {said}");

    space.apply(&[&pods::service("web"), ROUTE].concat())?;
    let said = findings(&[]);
    ensure!(
        missing(&said) && said.contains(&format!("VirtualService {}/web", space.name())),
        "of the cluster it says: {said}"
    );
    let said = findings(&["--with-cluster", &route, &subset]);
    ensure!(!said.contains("SubsetNotFound"), "as if it were applied: {said}");
    let said = findings(&["--with-cluster", &route]);
    ensure!(missing(&said), "as if the route alone were applied: {said}");
    space.apply(SUBSET)?;
    let said = findings(&[]);
    ensure!(!said.contains("SubsetNotFound"), "of the cluster with the subset it says: {said}");
    Ok(())
}

/// A client on the first node, a web service on each.
fn shop(bed: &Bed, space: &Space<'_>) -> Result<()> {
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let objects =
        [pods::client("client", a), pods::web("near", a), pods::web("far", b), pods::service("far")];
    space.apply(&objects.concat())?;
    space.wait_ready(&["client", "near", "far"])
}

/// Segments between the two addresses of a scenario.
pub(super) fn between(segments: &[Segment], a: IpAddr, b: IpAddr) -> Vec<&Segment> {
    let of = |segment: &Segment, from, to| segment.from.ip() == from && segment.to.ip() == to;
    segments.iter().filter(|segment| of(segment, a, b) || of(segment, b, a)).collect()
}

pub(super) fn label(bed: &Bed) -> Result<()> {
    bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[])?;
    shop(bed, &space)?;
    let started = |pod: &str| -> Result<String> {
        let status = &space.get("pod", pod)?["status"]["containerStatuses"][0];
        Ok(format!("{} {}", status["containerID"], status["restartCount"]))
    };
    let before = (started("client")?, started("far")?);
    let (client, far) = (space.address("client")?, space.server("far")?);
    let url = |word: &str| format!("http://{far}/{word}");

    let capture = bed.capture(&bed.nodes[0])?;
    space.curl("client", &url("open-words"))?;
    ensure!(
        carries(&capture.stop()?, b"open-words"),
        "without a label the capture does not show what is sent"
    );

    space.label(MODE, Some("ambient"))?;
    space.wait_captured(&["client", "near", "far"], true)?;
    ensure!(before == (started("client")?, started("far")?), "a label started a container again");
    // For others who look for it: Istio's tools, Kiali, stock agents of other nodes.
    let annotated = |pods: &[&str], wanted: bool| {
        wait::until_true("annotation of what is captured", Duration::from_secs(30), || {
            for pod in pods {
                let value =
                    &space.get("pod", pod)?["metadata"]["annotations"]["ambient.istio.io/redirection"];
                if (*value == "enabled") != wanted {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    };
    annotated(&["client", "near", "far"], true)?;
    let capture = bed.capture(&bed.nodes[0])?;
    // Both nodes have to know of each other's pods; until then a connection is passed through.
    wait::until_true("tunnel between the nodes", Duration::from_secs(30), || {
        space.curl("client", &url("poll"))?;
        let open = space.exec("client", &["ss", "-Htn", "state", "established"])?;
        Ok(open.contains(&SocketAddr::new(far.ip(), HBONE).to_string()))
    })?;
    drop(capture);

    let capture = bed.capture(&bed.nodes[0])?;
    let answer = space.curl("client", &url("secret-words"))?;
    ensure!(answer.contains(&client.to_string()), "the server saw somebody else than {client}: {answer}");
    let segments = capture.stop()?;
    let seen = between(&segments, client, far.ip());
    ensure!(!seen.is_empty(), "the capture shows no packet between {client} and {far}");
    ensure!(!carries(&segments, b"secret-words"), "what is sent is readable between the nodes");
    let other = seen.iter().find(|segment| segment.from.port() != HBONE && segment.to.port() != HBONE);
    ensure!(other.is_none(), "a packet beside the tunnel: {other:?}");

    space.label(MODE, None)?;
    space.wait_captured(&["client", "near", "far"], false)?;
    annotated(&["client", "near", "far"], false)?;
    let capture = bed.capture(&bed.nodes[0])?;
    wait::until_true("answer without the mesh", Duration::from_secs(20), || {
        Ok(space.curl("client", &url("open-again")).is_ok())
    })?;
    ensure!(carries(&capture.stop()?, b"open-again"), "without the label what is sent is still hidden");
    ensure!(before == (started("client")?, started("far")?), "a label started a container again");
    Ok(())
}

/// Mutual TLS or nothing, for every pod of a namespace.
pub(super) const STRICT: &str = "
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
";

fn first(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(&(STRICT.to_owned() + &pods::web("server", &bed.nodes[1])))?;
    space.wait_ready(&["server"])?;
    space.wait_captured(&["server"], true)?;
    let url = format!("http://{}/", space.server("server")?);
    // Outside the mesh there is no answer; from here on the policy is in force.
    let outside = bed.space(&[])?;
    outside.apply(&pods::client("client", &bed.nodes[0]))?;
    outside.wait_ready(&["client"])?;
    wait::until_true("refusal of plain text", Duration::from_secs(30), || {
        Ok(outside.curl("client", &url).is_err())
    })?;
    for n in 0..5 {
        let name = format!("early-{n}");
        let argv = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", &url];
        // It ends with its one request: a pod that is started again had a first request that failed.
        let pod = pods::pod(&name, &bed.nodes[n % 2], &argv) + "  restartPolicy: Never\n";
        space.apply(&pod)?;
        let phase = wait::until(&format!("end of {name}"), Duration::from_secs(30), || {
            let phase = space.get("pod", &name)?["status"]["phase"].as_str().unwrap_or_default().to_owned();
            Ok(matches!(phase.as_str(), "Succeeded" | "Failed").then_some(phase))
        })?;
        let said = space.kubectl(&["logs", &name])?;
        ensure!(phase == "Succeeded", "the first connection of {name} failed: {said}");
    }
    Ok(())
}

pub(super) fn policy(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    let allow = format!(
        "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: nothing}}
spec: {{}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: friend}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/{}/sa/friend]}}}}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: friend}}
",
        space.name()
    );
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let friend = pods::client("friend", a).replace("spec:\n", "spec:\n  serviceAccountName: friend\n");
    let objects = [STRICT, &allow, &friend, &pods::client("stranger", a), &pods::web("server", b)];
    space.apply(&objects.concat())?;
    // Ready by its probe, which is no connection of the mesh.
    space.wait_ready(&["friend", "stranger", "server"])?;
    space.wait_captured(&["friend", "stranger", "server"], true)?;
    let url = format!("http://{}/", space.server("server")?);
    wait::until_true("answer for the friend and none for the stranger", Duration::from_secs(30), || {
        Ok(space.curl("friend", &url).is_ok() && space.curl("stranger", &url).is_err())
    })?;
    for _ in 0..5 {
        space.curl("friend", &url)?;
        ensure!(space.curl("stranger", &url).is_err(), "the stranger got an answer");
    }
    let status = space.get("pod", "server")?["status"].clone();
    ensure!(
        crate::cluster::kubectl::has_condition(&serde_json::json!({ "status": status }), "Ready"),
        "the probe turned red: {status}"
    );
    Ok(())
}
