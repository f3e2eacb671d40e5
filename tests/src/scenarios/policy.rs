//! Who may talk to whom: PeerAuthentication and AuthorizationPolicy.

use super::shop::{self, ONLY_FRONTEND, open, peer_authentication, refused, talks};
use super::{Scenario, scenario};
use crate::bed::{Load, Testbed, wait};
use anyhow::{Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("STRICT refuses plaintext from outside the mesh, PERMISSIVE accepts it", 60, strict),
    scenario("a port-level exception opens one port of a STRICT workload", 60, port_level),
    scenario("DISABLE lets plaintext into a namespace of a STRICT mesh, and tunnels go on", 60, disable),
    scenario("only frontend may call backend", 60, only_frontend),
    scenario("a DENY policy wins over an ALLOW policy", 60, deny_wins),
    scenario("a policy change ends the connections that it denies and no others", 90, live_change),
    scenario("a dry-run policy denies nothing", 60, dry_run),
    scenario("policies match ports, namespaces and address blocks", 90, matches),
    scenario("a DENY rule with a part that this layer cannot see denies more, never less", 60, stricter),
];

const SOON: Duration = Duration::from_secs(10);

/// Waits until a call has the wished outcome: policies travel through the control plane.
fn eventually(what: &str, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    wait::until(what, SOON, || check().map(Some))
}

fn backend(bed: &Testbed, port: u16) -> Result<String> {
    Ok(bed.pod("shop/backend")?.at(port).to_string())
}

fn strict() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    talks(&bed, "outside/visitor", &to)?;
    bed.apply("peer", &peer_authentication("STRICT"))?;
    eventually("STRICT in force", || refused(&bed, "outside/visitor", &to))?;
    refused(&bed, "outside/visitor", &bed.pod("shop/backend")?.at6(8080).to_string())?;
    talks(&bed, "shop/frontend", &to)?;
    talks(&bed, "shop/local", &to)?;
    bed.apply("peer", &peer_authentication("PERMISSIVE"))?;
    eventually("PERMISSIVE in force", || talks(&bed, "outside/visitor", &to))
}

fn port_level() -> Result<()> {
    let mut bed = open()?;
    let policy = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: backend, namespace: shop}
spec:
  selector: {matchLabels: {app: backend}}
  mtls: {mode: STRICT}
  portLevelMtls: {'8081': {mode: PERMISSIVE}}
";
    bed.apply("peer", policy)?;
    let (echo, greet) = (backend(&bed, 8080)?, backend(&bed, 8081)?);
    eventually("STRICT in force", || refused(&bed, "outside/visitor", &echo))?;
    let (_, seen) = bed.pod("outside/visitor")?.greeted(&greet)?;
    ensure!(seen.peer.ip() == bed.pod("outside/visitor")?.at(0).ip(), "it saw {}", seen.peer);
    talks(&bed, "shop/frontend", &echo)
}

fn disable() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    bed.apply("mesh", &peer_authentication("STRICT").replace("namespace: shop", "namespace: istio-system"))?;
    eventually("a STRICT mesh", || refused(&bed, "outside/visitor", &to))?;
    bed.apply("peer", &peer_authentication("DISABLE"))?;
    eventually("DISABLE in force", || talks(&bed, "outside/visitor", &to))?;
    // What speaks for the mesh still speaks inside a tunnel.
    let capture = bed.capture("a")?;
    talks(&bed, "shop/frontend", &to)?;
    let segments = capture.stop()?;
    ensure!(segments.iter().any(|s| s.to.port() == 15_008), "no tunnel on the wire");
    ensure!(segments.iter().all(|s| s.to.to_string() != to), "frontend went past the tunnel");
    bed.remove("peer")?;
    eventually("the mesh's own mode again", || refused(&bed, "outside/visitor", &to))
}

fn only_frontend() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    for from in ["shop/frontend", "shop/other", "shop/local", "outside/visitor"] {
        talks(&bed, from, &to)?;
    }
    bed.apply("policy", ONLY_FRONTEND)?;
    eventually("policy in force", || refused(&bed, "shop/other", &to))?;
    refused(&bed, "outside/visitor", &to)?;
    refused(&bed, "shop/other", "10.96.0.10:80")?;
    talks(&bed, "shop/frontend", &to)?;
    talks(&bed, "shop/local", &to)?;
    // The server's own log: nothing of the refused ones ever reached it.
    let other = bed.pod("shop/other")?.at(0).ip().to_string();
    let before = bed.pod("shop/backend")?.log().matches(&format!("\"peer\":\"{other}:")).count();
    refused(&bed, "shop/other", &to)?;
    let after = bed.pod("shop/backend")?.log().matches(&format!("\"peer\":\"{other}:")).count();
    ensure!(before == after, "a refused connection reached the server");
    bed.remove("policy")?;
    eventually("policy gone", || talks(&bed, "shop/other", &to))
}

fn deny_wins() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    let deny = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-frontend, namespace: shop}
spec:
  selector: {matchLabels: {app: backend}}
  action: DENY
  rules:
  - from:
    - source: {principals: [cluster.local/ns/shop/sa/frontend]}
";
    bed.apply("policy", &format!("{ONLY_FRONTEND}---{deny}"))?;
    eventually("policies in force", || refused(&bed, "shop/frontend", &to))?;
    refused(&bed, "shop/local", &to)?;
    refused(&bed, "shop/other", &to)
}

fn live_change() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    let load =
        |from: &str| Load::start(bed.pod(from)?, &to, &["--shape", "pp", "--conns", "3", "--pause-ms", "5"]);
    let (mut kept, mut cut, mut cut_plain) =
        (load("shop/frontend")?, load("shop/other")?, load("outside/visitor")?);
    for load in [&mut kept, &mut cut, &mut cut_plain] {
        ensure!(load.running()?, "a load did not start");
    }
    crate::bed::run::pause(Duration::from_millis(500))?;
    bed.apply("policy", ONLY_FRONTEND)?;
    for (name, load) in [("over the tunnel", &mut cut), ("in plaintext", &mut cut_plain)] {
        wait::until_true(&format!("end of denied connections {name}"), SOON, || Ok(!load.running()?))?;
    }
    let figures = cut.figures()?;
    ensure!(
        figures.errors == 3 && figures.ops > 0,
        "{} errors, {} round trips before",
        figures.errors,
        figures.ops
    );
    let figures = kept.stop()?;
    ensure!(
        figures.errors == 0 && figures.alive == 3,
        "allowed connections were hurt: {}",
        figures.first_error
    );
    Ok(())
}

fn dry_run() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    let dry = ONLY_FRONTEND.replace(
        "metadata: {name: only-frontend, ",
        "metadata: {annotations: {istio.io/dry-run: 'true'}, name: dry, ",
    );
    bed.apply("policy", &dry)?;
    // That the dry policy has arrived shows in a real one that was written after it.
    bed.apply("peer", &peer_authentication("STRICT"))?;
    eventually("later policy in force", || refused(&bed, "outside/visitor", &to))?;
    talks(&bed, "shop/other", &to)?;
    talks(&bed, "shop/frontend", &to)
}

fn matches() -> Result<()> {
    let mut bed = open()?;
    let frontend = bed.pod("shop/frontend")?.v4;
    let rule = |rule: &str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: match, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: backend}}}}
  action: DENY
  rules: [{rule}]
"
        )
    };
    let (echo, greet) = (backend(&bed, 8080)?, backend(&bed, 8081)?);
    bed.apply("policy", &rule("{to: [{operation: {ports: ['8080']}}]}"))?;
    eventually("port rule", || refused(&bed, "shop/other", &echo))?;
    bed.pod("shop/other")?.greeted(&greet)?;
    bed.apply("policy", &rule("{from: [{source: {notNamespaces: [shop]}}]}"))?;
    eventually("namespace rule", || talks(&bed, "shop/other", &echo))?;
    refused(&bed, "outside/visitor", &echo)?;
    bed.apply("policy", &rule(&format!("{{from: [{{source: {{ipBlocks: ['{frontend}/32']}}}}]}}")))?;
    eventually("address rule", || refused(&bed, "shop/frontend", &echo))?;
    eventually("address rule for others", || talks(&bed, "outside/visitor", &echo))?;
    talks(&bed, "shop/other", &echo)
}

fn stricter() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed, 8080)?;
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-deletes, namespace: shop}
spec:
  selector: {matchLabels: {app: backend}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]
    to: [{operation: {methods: [DELETE]}}]
";
    bed.apply("policy", policy)?;
    eventually("policy in force", || refused(&bed, "shop/other", &to))?;
    talks(&bed, "shop/frontend", &to)?;
    let conditions = bed.control_get("/debug/conditions")?;
    ensure!(conditions.contains("no-deletes"), "no condition speaks of the widened policy: {conditions}");
    shop::talks(&bed, "shop/local", &to)
}
