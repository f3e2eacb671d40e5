//! Waypoints on real pods, beyond their rules: whom they close, what their replacement costs, what can be seen of them.

use super::change::{figures, load};
use super::mesh::MODE;
use super::rules::{behind_waypoint, status};
use super::waypoint::{GATEWAY, programmed};
use super::{Bed, Scenario, Space, pods, scenario};
use crate::bed::wait;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "without its waypoint a service of pods is closed, and pods that require it are reached no other way",
        240,
        closed,
    ),
    scenario("a pod may have a waypoint of its own, for those who dial its address", 240, of_pod),
    scenario("no request fails while a waypoint's pods are replaced and its rules change", 240, replaced),
    scenario("what a waypoint of pods decides and does is seen by meshctl and in its metrics", 240, seen),
];

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// The addresses of a waypoint's pods, also of those that are leaving.
fn addresses(space: &Space<'_>, waypoint: &str) -> Result<Vec<String>> {
    let label = format!("gateway.networking.k8s.io/gateway-name={waypoint}");
    let list: Value =
        serde_json::from_str(&space.kubectl(&["get", "pods", "--selector", &label, "-o", "json"])?)?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    Ok(items.iter().filter_map(|pod| pod["status"]["podIP"].as_str().map(str::to_owned)).collect())
}

/// The server has been asked by a waypoint: it sees the waypoint's address.
fn by_waypoint(space: &Space<'_>, client: &str, url: &str, waypoint: &str) -> Result<bool> {
    let asked = addresses(space, waypoint)?;
    Ok(space.curl(client, url).is_ok_and(|said| asked.iter().any(|address| said.contains(address))))
}

fn closed(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let (space, outside) = (bed.space(&[(MODE, "ambient")])?, bed.space(&[])?);
    let objects =
        [pods::web("web", b), pods::service("web"), pods::client("far", a), pods::client("near", b)];
    space.apply(&objects.concat())?;
    outside.apply(&pods::client("stranger", a))?;
    space.wait_ready(&["web", "far", "near"])?;
    outside.wait_ready(&["stranger"])?;
    space.wait_captured(&["web", "far", "near"], true)?;
    let (service, direct) = ("http://web/", format!("http://{}/", space.server("web")?));
    for client in ["far", "near"] {
        space.curl(client, service)?;
    }
    space.kubectl(&["label", "service", "web", "istio.io/use-waypoint=waypoint"])?;
    let shut = |when: &str| -> Result<()> {
        for client in ["far", "near"] {
            wait::until_true(&format!("refusal of {client} {when}"), PATIENCE, || {
                Ok(space.curl(client, service).is_err())
            })?;
            for _ in 0..3 {
                ensure!(
                    space.curl(client, service).is_err(),
                    "{client} got past a waypoint that is not there"
                );
            }
        }
        Ok(())
    };
    shut("before there is a waypoint")?;
    space.apply(GATEWAY)?;
    programmed(&space)?;
    for client in ["far", "near"] {
        wait::until_true(&format!("answer for {client} by the waypoint"), PATIENCE, || {
            by_waypoint(&space, client, service, "waypoint")
        })?;
        space.curl(client, &direct).context("past the waypoint, which nobody requires yet")?;
    }

    space.kubectl(&["annotate", "service", "web", "undermesh.io/require-waypoint=true"])?;
    for (space, client) in [(&space, "far"), (&space, "near"), (&outside, "stranger")] {
        wait::until_true(&format!("refusal of {client}, who goes past the waypoint"), PATIENCE, || {
            Ok(space.curl(client, &direct).is_err())
        })?;
    }
    for client in ["far", "near"] {
        ensure!(by_waypoint(&space, client, service, "waypoint")?, "{client} has no answer by the waypoint");
        ensure!(space.curl(client, &direct).is_err(), "{client} got past the waypoint that is required");
    }
    space.kubectl(&["delete", "gateway", "waypoint"])?;
    shut("after the waypoint")
}

fn of_pod(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let space = bed.space(&[(MODE, "ambient")])?;
    let gateway =
        GATEWAY.replace("{name: waypoint}", "{name: own, labels: {istio.io/waypoint-for: workload}}");
    let web = pods::web("web", b).replace("app: web", "app: web, istio.io/use-waypoint: own");
    let objects = [gateway, web, pods::service("web"), pods::client("far", a), pods::client("near", b)];
    space.apply(&objects.concat())?;
    space.wait_ready(&["web", "far", "near"])?;
    space.wait_captured(&["web", "far", "near"], true)?;
    let direct = format!("http://{}/", space.server("web")?);
    for client in ["far", "near"] {
        wait::until_true(&format!("answer for {client} by the pod's own waypoint"), PATIENCE, || {
            by_waypoint(&space, client, &direct, "own")
        })?;
    }
    // It is for who dials the pod, not for who asks the service.
    for client in ["far", "near"] {
        let own = space.address(client)?.to_string();
        let said = space.curl(client, "http://web/")?;
        ensure!(said.contains(&own), "the service's pod saw somebody else than {own}: {said}");
    }
    Ok(())
}

/// Rules that differ in a header of answers.
fn revision(n: usize) -> String {
    format!(
        "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web}}
spec:
  hosts: [web]
  http:
  - name: all
    route: [{{destination: {{host: web}}}}]
    headers: {{response: {{set: {{x-revision: '{n}'}}}}}}
"
    )
}

fn in_force(space: &Space<'_>, n: usize) -> Result<()> {
    let wanted = format!("x-revision: {n}");
    wait::until_true(&format!("revision {n} of the rules"), PATIENCE, || {
        let argv = ["curl", "--silent", "--max-time", "5", "-i", "http://web/"];
        Ok(space.exec("client", &argv)?.contains(&wanted))
    })
}

fn replaced(bed: &Bed) -> Result<()> {
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let objects = [pods::web("web", b), pods::service("web")].concat();
    let space = behind_waypoint(bed, &(objects + &revision(0)), &["web"])?;
    in_force(&space, 0)?;
    let service = space.get("service", "web")?;
    let vip = service["spec"]["clusterIP"].as_str().context("a service without address")?;
    space.apply(&load("requests", a, &format!("{vip}:80"), "http", "10"))?;
    space.wait_ready(&["requests"])?;
    for n in 1..=20 {
        space.apply(&revision(n))?;
    }
    in_force(&space, 20)?;
    let before = addresses(&space, "waypoint")?;
    space.kubectl(&["rollout", "restart", "deployment/waypoint"])?;
    space.kubectl(&["rollout", "status", "deployment/waypoint", "--timeout=60s"])?;
    wait::until_true("end of the waypoint that was replaced", PATIENCE, || {
        let now = addresses(&space, "waypoint")?;
        Ok(!now.is_empty() && now.iter().all(|address| !before.contains(address)))
    })?;
    in_force(&space, 20)?;
    let seen = figures(&space, "requests")?;
    ensure!(seen.errors == 0, "{} of {} requests failed, first: {}", seen.errors, seen.ops, seen.first_error);
    ensure!(seen.ops > 500, "only {} requests were made", seen.ops);
    Ok(())
}

/// A port of this machine that leads to one of a waypoint's, as an operator has it; ends on drop.
pub(super) struct Forwarded {
    process: Child,
    port: u16,
    /// Open, so that kubectl can go on saying what it does.
    said: BufReader<ChildStdout>,
}

impl Forwarded {
    /// Of a namespace's pod, or of one of an object's pods.
    pub(super) fn start(bed: &Bed, namespace: &str, of: &str, to: u16) -> Result<Self> {
        let ports = format!(":{to}");
        let mut process = Command::new(&bed.kubectl.program)
            .env("KUBECONFIG", &bed.kubectl.kubeconfig)
            .args(["--namespace", namespace, "port-forward", of, &ports])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start kubectl")?;
        let said = process.stdout.take().context("kubectl has no output")?;
        let mut forwarded = Self { process, port: 0, said: BufReader::new(said) };
        // `Forwarding from 127.0.0.1:40000 -> 15000`; it says more for every connection, and is not to wait for a reader.
        let mut line = String::new();
        forwarded.said.read_line(&mut line).context("kubectl does not say which port it took")?;
        let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next());
        forwarded.port =
            port.and_then(|port| port.parse().ok()).with_context(|| format!("kubectl said {line:?}"))?;
        Ok(forwarded)
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn seen(bed: &Bed) -> Result<()> {
    bed.layout()?;
    let objects = [pods::web("web", &bed.nodes[1]), pods::service("web")].concat();
    let space = behind_waypoint(bed, &(objects + &revision(1)), &["web"])?;
    in_force(&space, 1)?;
    let of_waypoint = |port| Forwarded::start(bed, space.name(), "deployment/waypoint", port);
    let (admin, metrics) = (of_waypoint(15000)?, of_waypoint(15020)?);
    let meshctl = bed.meshctl()?;
    let waypoint = admin.url();
    // Others have a service of this name, too, and a waypoint knows of their rules.
    let host = format!("{}/web.", space.name());
    let json = |args: &[&str]| meshctl.json(&[args, &["--waypoint", &waypoint]].concat());

    let hits = || -> Result<u64> {
        let shown = json(&["waypoint", "routes", "--host", &host])?;
        let rule = &shown[0]["routes"][0]["rules"][0];
        ensure!(rule["rule"].as_str().is_some_and(|name| name.contains("all")), "{shown:#}");
        rule["hits"].as_u64().with_context(|| format!("{shown:#}"))
    };
    let before = hits()?;
    for _ in 0..7 {
        ensure!(status(&space, "client", "http://web/pay", &[])? == "200", "a request failed");
    }
    let after = hits()?;
    ensure!(after == before + 7, "{before} hits became {after} by 7 requests");
    let shown = json(&["waypoint", "endpoints", "--host", &host])?;
    let endpoint = &shown[0]["clusters"][0]["endpoints"][0];
    ensure!(endpoint["name"] == format!("{}/web", space.name()), "{shown:#}");
    ensure!(endpoint["requests"].as_u64() >= Some(7) && endpoint["failures"] == 0, "{shown:#}");

    let tapped = std::thread::scope(|scope| {
        let tap = scope.spawn(|| {
            let args = ["tap", "--path", "/pay", "--max", "2", "-o", "json", "--waypoint", &waypoint];
            meshctl.run(&args)
        });
        let asked = wait::until_true("two tapped requests", PATIENCE, || {
            status(&space, "client", "http://web/pay?access_token=abc123", &[])?;
            Ok(tap.is_finished())
        });
        let Ok(said) = tap.join() else { bail!("the tap panicked") };
        asked.and(said)
    })?;
    let identity = format!("spiffe://cluster.local/ns/{}/sa/default", space.name());
    for line in tapped.lines() {
        let request: Value = serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))?;
        for (field, value) in [
            ("source", format!("{}/client", space.name())),
            ("endpoint", format!("{}/web", space.name())),
            ("identity", identity.clone()),
            ("path", "/pay?access_token=[redacted]".to_owned()),
        ] {
            ensure!(request[field] == value, "{field} is not {value}: {request:#}");
        }
    }
    let url = format!("{}/metrics", metrics.url());
    let text = crate::bed::netns::command("curl", ["--silent", "--noproxy", "*", "--fail", &url])?;
    let counted = text.lines().any(|line| {
        let labels = [
            "istio_requests_total{".to_owned(),
            "reporter=\"waypoint\"".to_owned(),
            "source_workload=\"client\"".to_owned(),
            format!("destination_service=\"web.{}.svc.cluster.local\"", space.name()),
            "response_code=\"200\"".to_owned(),
        ];
        labels.iter().all(|label| line.contains(label))
    });
    ensure!(counted, "no request of the client is counted: {text}");
    Ok(())
}
