//! The Gateway API's conformance suite as it is published, on the cluster of this machine.
//!
//! The suite is a client outside the mesh: it runs in the network namespace of the cluster's control plane, from where it
//! reaches gateways by the addresses of their load balancer, and runs programs in pods through the API server.

use super::bed::Bed;
use crate::bed::{netns, run as this_run, wait};
use crate::cluster::balancer::Balancer;
use crate::cluster::kubectl::has_condition;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What to run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the groups of profiles whose name contains this: mesh, gateway
    #[arg(long, default_value = "")]
    profiles: String,
    /// Only the test of this name
    #[arg(long, default_value = "")]
    test: String,
    /// Directory for the reports
    #[arg(long, value_name = "DIR")]
    reports: Option<PathBuf>,
    /// Directory of the suite's program and images
    #[arg(long, env = "UM_CONFORMANCE")]
    suite: PathBuf,
    /// Directory of Kubernetes's programs
    #[arg(long, env = "UM_KUBERNETES")]
    binaries: Option<PathBuf>,
    /// Directory of image archives that every node gets
    #[arg(long, env = "UM_IMAGES")]
    images: Option<PathBuf>,
}

/// Profiles that run together, and the extended features that we claim for them.
struct Group {
    name: &'static str,
    profiles: &'static str,
    features: &'static [&'static str],
}

const GROUPS: &[Group] = &[
    Group {
        name: "mesh",
        profiles: "MESH-HTTP,MESH-GRPC",
        features: &[
            "Mesh",
            "HTTPRoute",
            "GRPCRoute",
            "MeshClusterIPMatching",
            "MeshHTTPRouteRewritePath",
            "MeshHTTPRouteSchemeRedirect",
            "MeshHTTPRouteRedirectPort",
            "MeshHTTPRouteRedirectPath",
            "MeshHTTPRouteBackendRequestHeaderModification",
            "MeshHTTPRouteQueryParamMatching",
            "MeshHTTPRouteNamedRouteRule",
            "HTTPRoute303RedirectStatusCode",
            "HTTPRoute307RedirectStatusCode",
            "HTTPRoute308RedirectStatusCode",
            "HTTPRouteParentRefPort",
            "HTTPRouteResponseHeaderModification",
        ],
    },
    Group {
        name: "gateway",
        profiles: "GATEWAY-HTTP,GATEWAY-GRPC",
        features: &[
            "Gateway",
            "HTTPRoute",
            "GRPCRoute",
            "ReferenceGrant",
            "GatewayPort8080",
            "GatewayInfrastructure",
            "GatewayHTTPListenerIsolation",
            "GatewayHTTPSListenerDetectMisdirectedRequests",
            "HTTPRouteDestinationPortMatching",
            "HTTPRouteBackendRequestHeaderModification",
            "HTTPRouteQueryParamMatching",
            "HTTPRouteMethodMatching",
            "HTTPRouteResponseHeaderModification",
            "HTTPRoutePortRedirect",
            "HTTPRouteSchemeRedirect",
            "HTTPRoutePathRedirect",
            "HTTPRouteHostRewrite",
            "HTTPRoutePathRewrite",
            "HTTPRouteRequestMirror",
            "HTTPRouteRequestMultipleMirrors",
            "HTTPRouteRequestPercentageMirror",
            "HTTPRouteRequestTimeout",
            "HTTPRouteBackendTimeout",
            "HTTPRouteParentRefPort",
            "HTTPRouteBackendProtocolH2C",
            "HTTPRouteBackendProtocolWebSocket",
            "HTTPRouteNamedRouteRule",
            "HTTPRouteCORS",
            "HTTPRoute303RedirectStatusCode",
            "HTTPRoute307RedirectStatusCode",
            "HTTPRoute308RedirectStatusCode",
            "GRPCRouteNamedRouteRule",
        ],
    },
];

/// Whose waypoint the suite's namespaces have: they are made by the suite, and it takes labels for them only.
const WAYPOINT: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: um-conformance}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: um-conformance}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]
";
const LABELS: &str = "istio.io/dataplane-mode=ambient,istio.io/use-waypoint=waypoint,istio.io/use-waypoint-namespace=um-conformance";

/// Runs the groups asked for; whether every test passed.
///
/// # Errors
/// There is no cluster, the mesh does not come up, or the run was interrupted.
pub fn run(args: &Args) -> Result<bool> {
    let bed = Bed::local(args.binaries.clone(), args.images.clone())?;
    let layout = bed.layout()?;
    crate::cluster::images::load(layout, &args.suite.join("images"))?;
    bed.mesh()?;
    let _balancer = Balancer::start(layout, &bed.kubectl)?;
    bed.kubectl.apply(WAYPOINT)?;
    wait::until_true("waypoint that is programmed", Duration::from_secs(60), || {
        let gateway = bed.kubectl.json(&["--namespace", "um-conformance", "get", "gateway", "waypoint"])?;
        Ok(has_condition(&gateway, "Programmed"))
    })?;
    let begin = Instant::now();
    let mut tally = Tally::default();
    for group in GROUPS.iter().filter(|group| group.name.contains(&args.profiles)) {
        run_group(&bed, group, args, &mut tally)?;
    }
    let word = if tally.failed.is_empty() { "ok" } else { "FAILED" };
    if !tally.failed.is_empty() {
        println!("\nfailed:\n  {}", tally.failed.join("\n  "));
    }
    println!(
        "\ntest result: {word}. {} passed; {} failed; {} skipped; finished in {:.0}s",
        tally.passed,
        tally.failed.len(),
        tally.skipped,
        begin.elapsed().as_secs_f64()
    );
    Ok(tally.failed.is_empty() && tally.passed > 0)
}

/// Tests of the suite, without the parts that a test has.
#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Tally {
    /// Counts a closing line of Go's: `    --- PASS: TestConformance/Name (1.2s)`.
    fn add(&mut self, line: &str) {
        let Some((verdict, rest)) = line.trim_start().strip_prefix("--- ").and_then(|l| l.split_once(": "))
        else {
            return;
        };
        let name = rest.split(' ').next().unwrap_or_default();
        let Some(("TestConformance", test)) = name.split_once('/') else { return };
        if test.contains('/') {
            return;
        }
        match verdict {
            "PASS" => self.passed += 1,
            "SKIP" => self.skipped += 1,
            _ => self.failed.push(test.to_owned()),
        }
    }
}

fn run_group(bed: &Bed, group: &Group, args: &Args, tally: &mut Tally) -> Result<()> {
    let namespace = Path::new(netns::DIR).join(bed.layout()?.prefix());
    println!("conformance: {}", group.profiles);
    let flag = |name: &str, value: &str| format!("--{name}={value}");
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", namespace.display()))
        .arg(args.suite.join("suite"))
        .args(["-test.v", "-test.run=TestConformance", "-test.timeout=60m"])
        .arg(flag("gateway-class", "istio"))
        .arg(flag("conformance-profiles", group.profiles))
        .arg(flag("supported-features", &group.features.join(",")))
        .arg(flag("namespace-labels", LABELS))
        .arg(flag("organization", "Undermesh"))
        .arg(flag("project", "Undermesh"))
        .arg(flag("url", "https://undermesh.invalid"))
        .arg(flag("version", env!("CARGO_PKG_VERSION")))
        .arg(flag("contact", "@undermesh/maintainers"))
        .env("KUBECONFIG", &bed.kubectl.kubeconfig)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if !args.test.is_empty() {
        command.arg(flag("run-test", &args.test));
    }
    if let Some(dir) = &args.reports {
        let dir = std::path::absolute(dir).context("cannot tell where the reports go")?;
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        command.arg(flag("report-output", &dir.join(format!("{}.yaml", group.name)).to_string_lossy()));
    }
    let mut child = command.spawn().context("cannot start the suite")?;
    let out = child.stdout.take().context("the suite has no output")?;
    let (before, mut any) = (tally.failed.len(), false);
    for line in BufReader::new(out).lines() {
        let line = line.context("the suite's output is not text")?;
        println!("{line}");
        any |= line.contains("--- ");
        tally.add(&line);
        if let Err(stopped) = this_run::check() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(stopped);
        }
    }
    let status = child.wait().context("cannot wait for the suite")?;
    if !any {
        bail!("the suite ended with {status} and ran nothing");
    }
    if !status.success() && tally.failed.len() == before {
        tally.failed.push(format!("{}: the suite ended with {status}", group.profiles));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_tests_of_the_suite_are_counted() {
        let mut tally = Tally::default();
        for line in [
            "--- FAIL: TestConformance (10.00s)",
            "    --- PASS: TestConformance/MeshBasic (1.00s)",
            "        --- PASS: TestConformance/MeshBasic/Part (1.00s)",
            "    --- FAIL: TestConformance/MeshPorts (1.00s)",
            "        --- FAIL: TestConformance/MeshPorts/Part (1.00s)",
            "    --- SKIP: TestConformance/UDPRoute (0.00s)",
            "=== RUN   TestConformance/Other",
        ] {
            tally.add(line);
        }
        assert_eq!((tally.passed, tally.skipped, tally.failed), (1, 1, vec!["MeshPorts".to_owned()]));
    }
}
