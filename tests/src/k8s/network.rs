//! What the cluster's own network does to pods of the mesh: network policies, nodes that masquerade.
//!
//! The test cluster's network has no network policies of its own. They are held by kube-router's controller, which runs on
//! each node for as long as a scenario needs it.

use super::mesh::{MODE, STRICT};
use super::plain::asked;
use super::pods;
use super::{Bed, Scenario, Space, scenario};
use crate::bed::wait;
use crate::cluster::{Layout, layout, node};
use crate::scenarios::skip;
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "network policies hold for pods of the mesh, which need port 15008 and no other open",
        300,
        network_policies,
    ),
    scenario("nodes that masquerade what pods send change nothing for the mesh", 180, masqueraded),
];

const PATIENCE: Duration = Duration::from_secs(60);
/// kube-router, as it is called on the nodes.
const PROGRAM: &str = "kube-router";

/// The controller of network policies on every node; ends on drop, with its rules.
struct Policies<'a> {
    bed: &'a Bed,
    layout: &'a Layout,
    program: PathBuf,
}

impl<'a> Policies<'a> {
    fn start(bed: &'a Bed) -> Result<Self> {
        let layout = bed.layout()?;
        let program = std::env::var_os("UM_NETWORK_POLICIES").filter(|path| !path.is_empty());
        let program: PathBuf = program
            .ok_or_else(|| skip("UM_NETWORK_POLICIES names no kube-router: `cargo xtask test k8s` does"))?
            .into();
        let started = Self { bed, layout, program };
        let state = layout.state()?;
        let services = state.families.list(layout::SERVICES, layout::SERVICES6);
        for name in &bed.nodes {
            let line = format!(
                "{} --run-firewall --run-router=false --run-service-proxy=false --enable-ipv6 --metrics-port=0 \
                 --health-port=0 --hostname-override={name} --kubeconfig={} --service-cluster-ip-range={services}",
                started.program.display(),
                layout.path("policies.kubeconfig").display(),
            );
            let log = layout.log(&format!("{name}-{PROGRAM}"));
            let shell = format!("setsid {line} > {} 2>&1 & echo $! > /run/{PROGRAM}.pid", log.display());
            started.on(name, &shell)?;
        }
        Ok(started)
    }

    fn on(&self, node: &str, shell: &str) -> Result<String> {
        let out = node::inside(self.layout, node)?
            .args(["sh", "-c", shell])
            .output()
            .context("cannot run nsenter")?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "node {node}: {}", said.trim());
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

impl Drop for Policies<'_> {
    fn drop(&mut self) {
        for name in &self.bed.nodes {
            let end = format!(
                "kill $(cat /run/{PROGRAM}.pid); {} --cleanup-config > /dev/null 2>&1; rm /run/{PROGRAM}.pid",
                self.program.display()
            );
            if let Err(error) = self.on(name, &end) {
                eprintln!("warning: network policies stay in force: {error:#}");
            }
        }
    }
}

fn policy(name: &str, from: &str, ports: &str) -> String {
    format!(
        "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}}}
spec:
  podSelector: {{matchLabels: {{app: server}}}}
  policyTypes: [Ingress]
  ingress: [{{from: {from}, ports: {ports}}}]
"
    )
}

/// Which of a list of pods get an answer.
fn answered<'p>(space: &Space<'_>, clients: &[&'p str], url: &str) -> Vec<&'p str> {
    clients.iter().copied().filter(|client| space.curl(client, url).is_ok()).collect()
}

fn wait_answered(space: &Space<'_>, clients: &[&str], url: &str, wanted: &[&str], when: &str) -> Result<()> {
    wait::until_true(&format!("answers for {wanted:?} alone, {when}"), PATIENCE, || {
        Ok(answered(space, clients, url) == wanted)
    })
}

fn network_policies(bed: &Bed) -> Result<()> {
    let _policies = Policies::start(bed)?;
    bed.mesh()?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let space = bed.space(&[])?;
    let friend = |name: &str, node: &str| {
        pods::client(name, node).replace(&format!("app: {name}"), &format!("app: {name}, is: friend"))
    };
    let clients = ["far", "near", "far-friend", "near-friend"];
    let objects = [
        pods::web("server", b),
        pods::client("far", a),
        pods::client("near", b),
        friend("far-friend", a),
        friend("near-friend", b),
        policy("friends", "[{podSelector: {matchLabels: {is: friend}}}]", "[]"),
    ];
    space.apply(&objects.concat())?;
    space.wait_ready(&["server", "far", "near", "far-friend", "near-friend"])?;
    let url = format!("http://{}/", space.server("server")?);
    let friends = ["far-friend", "near-friend"];
    wait_answered(&space, &clients, &url, &friends, "without the mesh")?;

    space.label(MODE, Some("ambient"))?;
    space.wait_captured(&["server", "far", "near", "far-friend", "near-friend"], true)?;
    wait_answered(&space, &clients, &url, &friends, "in the mesh")?;

    // Beside the tunnel there is no way in, and everybody in the mesh has one: also those of the same node, whose
    // connections would be direct.
    let outside = bed.space(&[])?;
    outside.apply(&(pods::client("far", a) + &pods::client("near", b)))?;
    outside.wait_ready(&["far", "near"])?;
    space.apply(&policy("friends", "[]", "[{port: 15008}]"))?;
    for _ in 0..5 {
        wait_answered(&space, &clients, &url, &clients, "with port 15008 open")?;
    }
    wait_answered(&outside, &["far", "near"], &url, &[], "outside the mesh, with port 15008 open")?;

    // The other way round: the port of the server alone is no way in for the mesh. A pod that has no tunnel yet shows it.
    space.apply(&[policy("friends", "[]", "[{port: 8080}]"), pods::client("late", a)].concat())?;
    space.wait_ready(&["late"])?;
    space.wait_captured(&["late"], true)?;
    wait_answered(
        &outside,
        &["far", "near"],
        &url,
        &["far", "near"],
        "outside the mesh, with its own port open",
    )?;
    ensure!(space.curl("late", &url).is_err(), "a pod of the mesh got in beside port 15008");
    Ok(())
}

/// Rules of a node under which what its pods send comes from the node.
struct Masquerade<'a> {
    layout: &'a Layout,
    nodes: &'a [String],
}

impl<'a> Masquerade<'a> {
    fn start(layout: &'a Layout, nodes: &'a [String]) -> Result<Self> {
        let started = Self { layout, nodes };
        for node in nodes {
            started.rule(node, "-I")?;
        }
        Ok(started)
    }

    fn rule(&self, node: &str, verb: &str) -> Result<()> {
        let argv =
            ["iptables", "-w", "-t", "nat", verb, "POSTROUTING", "-s", layout::PODS, "-d", layout::PODS];
        let out = node::inside(self.layout, node)?.args(argv).args(["-j", "MASQUERADE"]).output()?;
        ensure!(out.status.success(), "node {node}: {}", String::from_utf8_lossy(&out.stderr).trim());
        Ok(())
    }
}

impl Drop for Masquerade<'_> {
    fn drop(&mut self) {
        for node in self.nodes {
            if let Err(error) = self.rule(node, "-D") {
                eprintln!("warning: a node still masquerades: {error:#}");
            }
        }
    }
}

fn masqueraded(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let _rules = Masquerade::start(layout, &bed.nodes)?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let outside = bed.space(&[])?;
    outside.apply(&(pods::web("server", b) + &pods::client("client", a)))?;
    outside.wait_ready(&["server", "client"])?;
    let url = |space: &Space<'_>| -> Result<String> { Ok(format!("http://{}/", space.server("server")?)) };
    let (_, seen) = asked(&outside.curl("client", &url(&outside)?)?)?;
    let own = outside.address("client")?.to_string();
    ensure!(seen != own, "the scenario's rules do nothing: the server saw {own}");

    let space = bed.space(&[(MODE, "ambient")])?;
    let friend = |name: &str, node: &str| {
        pods::client(name, node).replace("spec:\n", "spec:\n  serviceAccountName: friend\n")
    };
    let allow = format!(
        "
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: friend}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: friend}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  rules: [{{from: [{{source: {{principals: [cluster.local/ns/{}/sa/friend]}}}}]}}]
",
        space.name()
    );
    let objects = [
        STRICT,
        &allow,
        &pods::web("server", b),
        &friend("far-friend", a),
        &friend("near-friend", b),
        &pods::client("far", a),
        &pods::client("near", b),
    ];
    space.apply(&objects.concat())?;
    let all = ["server", "far-friend", "near-friend", "far", "near"];
    space.wait_ready(&all)?;
    space.wait_captured(&all, true)?;
    let url = url(&space)?;
    for _ in 0..5 {
        wait_answered(&space, &all[1..], &url, &all[1..3], "from masquerading nodes")?;
    }
    Ok(())
}
