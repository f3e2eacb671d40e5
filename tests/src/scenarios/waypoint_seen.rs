//! What `meshctl` shows of a waypoint: rules with their hits, endpoints with their counts, requests as they end.

use super::waypoint::{SOON, both, curl, in_force, open, server, url};
use super::{Scenario, scenario};
use crate::bed::process::Proc;
use crate::bed::{Testbed, run, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("meshctl shows a waypoint's rules in their order, and how many requests each had", 90, routes),
    scenario("meshctl shows which endpoint fails, and that it is ejected", 90, endpoints),
    scenario("meshctl taps requests as they end, and keeps what is secret", 90, tap),
];

const WP: &str = "shop/wp";

/// What `meshctl` says beside the waypoint.
fn meshctl(bed: &Testbed, args: &[&str]) -> Result<String> {
    let done = bed.meshctl_in(&bed.pod(WP)?.place, args)?;
    Ok(done.ok().with_context(|| format!("meshctl {}", args.join(" ")))?.to_owned())
}

fn json(bed: &Testbed, args: &[&str]) -> Result<Value> {
    let text = meshctl(bed, &[args, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
}

fn routes() -> Result<()> {
    let mut bed = open(both)?;
    let none = meshctl(&bed, &["waypoint", "routes"])?;
    ensure!(none.contains("no rules"), "{none}");
    let route = format!(
        "{}
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: web, namespace: shop}}
spec:
  hosts: [web]
  http:
  - name: testers
    match: [{{headers: {{x-user: {{exact: tester}}}}, uri: {{prefix: /pay}}}}]
    route: [{{destination: {{host: web, subset: v2}}}}]
  - name: canary
    timeout: 3s
    route:
    - {{destination: {{host: web, subset: v1}}, weight: 80}}
    - {{destination: {{host: web, subset: v2}}, weight: 20}}
    headers: {{response: {{set: {{x-split: 'yes'}}}}}}
",
        super::waypoint::SUBSETS
    );
    bed.apply("route", &route)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-split: yes"))?;
    let hits = |bed: &Testbed| -> Result<[u64; 2]> {
        let shown = json(bed, &["waypoint", "routes", "--host", "web.shop"])?;
        let rules = &shown[0]["routes"][0]["rules"];
        ensure!(rules[0]["rule"].as_str().is_some_and(|name| name.contains("testers")), "{shown:#}");
        ensure!(rules[1]["rule"].as_str().is_some_and(|name| name.contains("canary")), "{shown:#}");
        Ok([0, 1].map(|at| rules[at]["hits"].as_u64().unwrap_or_default()))
    };
    let before = hits(&bed)?;
    curl(&bed, "shop/frontend", &["-H", "x-user: tester", &url("/pay/[1-7]")])?;
    curl(&bed, "shop/frontend", &[&url("/[1-5]")])?;
    let after = hits(&bed)?;
    ensure!([after[0] - before[0], after[1] - before[1]] == [7, 5], "{before:?} became {after:?}");
    let text = meshctl(&bed, &["waypoint", "routes"])?;
    for part in [
        "shop/web.shop.svc.cluster.local",
        "VirtualService/shop/web",
        "path begins with /pay, header x-user is tester",
        "subset v1 80 %",
        "subset v2 20 %",
        "timeout 3s",
        "everything",
    ] {
        ensure!(text.contains(part), "{part:?} is not in\n{text}");
    }
    Ok(())
}

fn endpoints() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?, server(bed, "v2", "b", true)?]))?;
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 3, baseEjectionTime: 5m, maxEjectionPercent: 100}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http: [{route: [{destination: {host: web}}], retries: {attempts: 0}}]
";
    bed.apply("rule", rule)?;
    let of = |bed: &Testbed, name: &str| -> Result<Value> {
        let shown = json(bed, &["waypoint", "endpoints", "--host", "web.shop"])?;
        let all = shown[0]["clusters"][0]["endpoints"].as_array().context("no endpoints")?.clone();
        all.into_iter().find(|e| e["name"] == format!("shop/{name}")).with_context(|| format!("{shown:#}"))
    };
    wait::until_true("ejection of the failing endpoint", SOON, || {
        curl(&bed, "shop/frontend", &["-o", "/dev/null", &url("/[1-10]")])?;
        Ok(of(&bed, "v2")?["outlier"]["ejected_for_ms"].as_u64() > Some(0))
    })?;
    // What the servers themselves have seen.
    for (name, status) in [("v1", "200"), ("v2", "503")] {
        let seen =
            std::fs::read_to_string(bed.dir.join(format!("nginx-{name}/seen"))).context("nginx's log")?;
        let (all, failed) =
            (seen.lines().count(), seen.lines().filter(|line| line.ends_with(" 503")).count());
        let shown = of(&bed, name)?;
        ensure!(seen.lines().all(|line| line.ends_with(status)), "{name} answered otherwise: {seen}");
        ensure!(
            shown["requests"] == all && shown["failures"] == failed,
            "{name} saw {all}, {failed}: {shown:#}"
        );
    }
    let text = meshctl(&bed, &["waypoint", "endpoints"])?;
    ensure!(text.contains("ejected for ") && text.contains("DestinationRule/shop/web"), "{text}");
    Ok(())
}

/// A tap beside the waypoint, printing JSON.
fn tapping(bed: &Testbed, args: &[&str]) -> Result<Proc> {
    let program = run::binary("meshctl")?.to_string_lossy().into_owned();
    bed.pod(WP)?.spawn([&[&*program, "tap", "-o", "json"], args].concat())
}

fn tap() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    let mut tap = tapping(&bed, &["--path", "/pay", "--headers", "--max", "2"])?;
    let mut failures = tapping(&bed, &["--status", "4xx"])?;
    let route = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http:
  - match: [{uri: {prefix: /teapot}}]
    directResponse: {status: 418}
  - name: pay
    route: [{destination: {host: web}}]
    headers: {response: {set: {x-rules: 'yes'}}}
";
    bed.apply("route", route)?;
    in_force(&bed, &["-i"], |answer| answer.contains("x-rules: yes"))?;
    let secret = ["-H", "authorization: Bearer abc123", "-H", "x-order: 42"];
    let pay = url("/pay?access_token=abc123&page=2");
    wait::until_true("tapped requests", SOON, || {
        for path in [url("/other"), url("/teapot"), pay.clone()] {
            curl(&bed, "shop/frontend", &[&secret[..], &[&path]].concat())?;
        }
        Ok(!tap.running()? && !failures.log().is_empty())
    })?;
    failures.kill();
    let lines = |text: &str| -> Result<Vec<Value>> {
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
            .collect()
    };
    let (seen, log) = (lines(&tap.log())?, tap.log());
    ensure!(seen.len() == 2 && !log.contains("abc123"), "{log}");
    for request in &seen {
        for (field, value) in [
            ("method", "GET"),
            ("host", "10.96.0.20"),
            ("path", "/pay?access_token=[redacted]&page=2"),
            ("source", "shop/frontend"),
            ("identity", "spiffe://cluster.local/ns/shop/sa/frontend"),
            ("endpoint", "shop/v1"),
            ("flags", "-"),
        ] {
            ensure!(request[field] == value, "{field} is not {value}: {request:#}");
        }
        ensure!(request["status"] == 200 && request["durationUs"].as_u64() > Some(0), "{request:#}");
        ensure!(
            request["route"].as_str().is_some_and(|r| r.starts_with("VirtualService/shop/web")),
            "{request:#}"
        );
        let headers = request["requestHeaders"].as_array().context("no headers")?;
        let value = |name: &str| headers.iter().find(|pair| pair[0] == name).map(|pair| pair[1].clone());
        ensure!(value("authorization") == Some("[redacted]".into()), "{request:#}");
        ensure!(value("x-order") == Some("42".into()), "{request:#}");
    }
    for request in lines(&failures.log())? {
        ensure!(request["status"] == 418 && request["path"] == "/teapot", "{request:#}");
        ensure!(request["endpointAddress"] == "" && request.get("requestHeaders").is_none(), "{request:#}");
    }
    Ok(())
}
