//! The dashboards and alert rules of deploy/, on a real Prometheus that scrapes a mesh with real traffic.

use super::programs::need;
use super::shop::{ONLY_FRONTEND, refused, talks};
use super::waypoint::{curl, open as open_waypoint, server, url};
use super::{Scenario, scenario};
use crate::bed::process::Proc;
use crate::bed::{Testbed, http, net, netns, run, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("every panel of every dashboard shows series when Prometheus scrapes a mesh", 180, panels),
    scenario("every alert fires under the figures that it is for", 60, alerts),
];

const SOON: Duration = Duration::from_secs(20);
/// How long traffic goes on; rates are over ten seconds.
const TRAFFIC: Duration = Duration::from_secs(25);
const PORT: u16 = 9090;
const DASHBOARDS: [(&str, &str); 7] = [
    ("mesh", include_str!("../../../deploy/dashboards/mesh.json")),
    ("service", include_str!("../../../deploy/dashboards/service.json")),
    ("workload", include_str!("../../../deploy/dashboards/workload.json")),
    ("node", include_str!("../../../deploy/dashboards/node.json")),
    ("waypoint", include_str!("../../../deploy/dashboards/waypoint.json")),
    ("control", include_str!("../../../deploy/dashboards/control.json")),
    ("flows", include_str!("../../../deploy/dashboards/flows.json")),
];
const RULES: &str = include_str!("../../../deploy/alerts/undermesh.yaml");
const RULE_TESTS: &str = include_str!("../../../deploy/alerts/undermesh-test.yaml");

/// Rules and their tests in a directory.
fn write_rules(dir: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).context("cannot make a directory")?;
    std::fs::write(dir.join("undermesh.yaml"), RULES).context("cannot write rules")?;
    let tests = dir.join("undermesh-test.yaml");
    std::fs::write(&tests, RULE_TESTS).context("cannot write rules")?;
    Ok(tests)
}

/// Everything that can be scraped.
fn everything(bed: &Testbed) -> Result<String> {
    let mut targets = vec!["127.0.0.1:15014".to_owned(), format!("{}:15020", bed.pod("shop/wp")?.v4)];
    targets.extend(
        bed.nodes.values().map(|node| format!("{}:15020", net::underlay_v4(net::node_place(node.index)))),
    );
    Ok(format!("- job_name: mesh\n  static_configs: [{{targets: {targets:?}}}]\n"))
}

/// Starts Prometheus beside the control plane, which scrapes these jobs every second.
pub(super) fn prometheus(bed: &Testbed, jobs: &str, flags: &[&str]) -> Result<Proc> {
    let dir = bed.dir.join("prometheus");
    write_rules(&dir)?;
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [undermesh.yaml]\nscrape_configs:\n{jobs}"
    );
    let path = dir.join("prometheus.yaml");
    std::fs::write(&path, config).context("cannot write a file")?;
    let argv = [
        need("prometheus")?.display().to_string(),
        format!("--config.file={}", path.display()),
        format!("--storage.tsdb.path={}", dir.join("data").display()),
        format!("--web.listen-address=127.0.0.1:{PORT}"),
    ];
    let argv = argv.into_iter().chain(flags.iter().map(|&flag| flag.to_owned()));
    let running = Proc::spawn(&bed.control_place, argv, &bed.dir.join("prometheus.log"))?;
    wait::until_true("ready Prometheus", SOON, || get(bed, "/-/ready").map(|_| true))
        .with_context(|| running.log())?;
    Ok(running)
}

/// GET of Prometheus.
pub(super) fn get(bed: &Testbed, path: &str) -> Result<String> {
    bed.control_netns.within(|| http::get_tcp(([127, 0, 0, 1], PORT).into(), path))?
}

/// A text in a URL's query.
pub(super) fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// The series of a query over the last twenty seconds that have a figure at all.
pub(super) fn series(bed: &Testbed, query: &str) -> Result<Vec<Value>> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
    let path = format!("/api/v1/query_range?query={}&start={}&end={now}&step=2", encoded(query), now - 20.0);
    let answer: Value = serde_json::from_str(&get(bed, &path).with_context(|| query.to_owned())?)?;
    let found = answer["data"]["result"].as_array().with_context(|| format!("{query}: {answer}"))?;
    let has_figure = |series: &&Value| {
        let values = series["values"].as_array().into_iter().flatten();
        values.filter_map(|value| value[1].as_str()?.parse::<f64>().ok()).any(f64::is_finite)
    };
    Ok(found.iter().filter(has_figure).cloned().collect())
}

/// One round of everything that figures are made of: good and bad requests, connections and names.
fn traffic(bed: &mut Testbed, round: usize) -> Result<()> {
    curl(bed, "shop/frontend", &["-d", "hello", &url("/[1-5]")])?;
    talks(bed, "shop/frontend", "10.96.0.10:80")?;
    refused(bed, "shop/other", &bed.pod("shop/backend")?.at(8080).to_string())?;
    let nobody = bed.pod("outside/site")?.at(9).to_string();
    let visitor = bed.pod("outside/visitor")?;
    visitor.call(&nobody, &["--send", "x", "--timeout-ms", "5000"])?;
    let dropped = bed.pod("outside/site")?.at(8080).to_string();
    visitor.call(&dropped, &["--send", "x", "--timeout-ms", "1500"])?;
    let script = "import socket\nfor n in ('backend.shop.svc.cluster.local','nothing.example'):\n try: socket.gethostbyname(n)\n except OSError: pass\n";
    bed.pod("shop/frontend")?.run(["python3", "-c", script])?;
    // A change for the control plane to push, and back.
    let policy = ONLY_FRONTEND.replace("only-frontend", &format!("only-frontend-{}", round % 2));
    bed.apply("policy", &policy)
}

fn panels() -> Result<()> {
    let mut bed = open_waypoint(|bed| Ok(vec![server(bed, "v1", "b", false)?]))?;
    bed.apply("policy", ONLY_FRONTEND)?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    bed.pod("outside/site")?.netns.nft(
        "table inet um_drop {\n chain input {\n type filter hook input priority 0;\n tcp dport 8080 drop\n }\n}\n",
    )?;
    let prometheus = prometheus(&bed, &everything(&bed)?, &[])?;
    let start = Instant::now();
    for round in 1.. {
        traffic(&mut bed, round)?;
        if start.elapsed() > TRAFFIC {
            break;
        }
    }
    let (mut seen, mut empty) = (0, Vec::new());
    for (name, text) in DASHBOARDS {
        let dashboard: Value = serde_json::from_str(text).with_context(|| format!("{name} is no JSON"))?;
        for (title, query) in queries(&dashboard)? {
            seen += 1;
            if series(&bed, &query)?.is_empty() {
                empty.push(format!("{name}: {title}: {query}"));
            }
        }
    }
    ensure!(empty.is_empty(), "of {seen} queries these show nothing:\n{}", empty.join("\n"));
    ensure!(seen > 90, "only {seen} queries");
    figures(&bed)?;
    rules(&bed).with_context(|| prometheus.log())
}

/// The queries of a dashboard, with choices as they are when everything is chosen.
fn queries(dashboard: &Value) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    let mut names = Vec::new();
    for choice in dashboard["templating"]["list"].as_array().context("no list of choices")? {
        let name = choice["name"].as_str().context("a choice without a name")?;
        names.push(name);
        let Some(definition) = choice["definition"].as_str() else { continue };
        let inner = definition.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
        let (selector, label) = inner.and_then(|inner| inner.rsplit_once(", ")).context("no label_values")?;
        all.push((format!("choice {name}"), format!("count by ({label}) ({selector})")));
    }
    for panel in dashboard["panels"].as_array().context("no panels")? {
        let title = panel["title"].as_str().unwrap_or_default();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().context("a target without a query")?;
            all.push((title.to_owned(), query.to_owned()));
        }
    }
    for (_, query) in &mut all {
        *query = query.replace("$__rate_interval", "10s");
        for name in &names {
            *query = query.replace(&format!("${name}"), ".*");
        }
        ensure!(!query.contains('$'), "not replaced: {query}");
    }
    Ok(all)
}

/// Figures whose truth is known.
fn figures(bed: &Testbed) -> Result<()> {
    let value = |query: &str| -> Result<f64> {
        let answer: Value =
            serde_json::from_str(&get(bed, &format!("/api/v1/query?query={}", encoded(query)))?)?;
        let text =
            answer["data"]["result"][0]["value"][1].as_str().with_context(|| format!("{query}: {answer}"))?;
        Ok(text.parse()?)
    };
    for (query, expected) in [
        ("sum(pilot_xds)", 3.0),
        ("sum(undermesh_proxies{type=\"waypoint\"})", 1.0),
        ("sum(undermesh_relay_nodes)", 2.0),
        ("sum(istio_build)", 4.0),
        ("max(undermesh_model_objects{kind=\"AuthorizationPolicy\"})", 1.0),
        ("sum(undermesh_convergence_unfinished_total)", 0.0),
    ] {
        let found = value(query)?;
        ensure!((found - expected).abs() < 0.01, "{query} is {found}, not {expected}");
    }
    wait::until_true("no proxy behind", SOON, || Ok(value("sum(undermesh_proxies_behind)")? == 0.0))?;
    let days = value("citadel_server_root_cert_expiry_seconds")? / 86_400.0;
    ensure!(days > 300.0 && days < 20_000.0, "the root ends in {days} days");
    // Every change that was applied reached all of them, in well under the scenario's patience.
    let changes = value("undermesh_convergence_seconds_count")?;
    ensure!(changes >= 5.0, "{changes} changes were measured");
    let slowest = value("undermesh_convergence_seconds_sum / undermesh_convergence_seconds_count")?;
    ensure!(slowest > 0.0 && slowest < 5.0, "{slowest} s on average");
    Ok(())
}

/// Prometheus evaluates every rule, and a mesh that is well fires none of those for a mesh that is not.
fn rules(bed: &Testbed) -> Result<()> {
    let answer: Value = serde_json::from_str(&get(bed, "/api/v1/rules")?)?;
    let rules =
        answer["data"]["groups"][0]["rules"].as_array().with_context(|| format!("no rules: {answer}"))?;
    ensure!(rules.len() >= 14, "{} rules", rules.len());
    let mut firing = BTreeSet::new();
    for rule in rules {
        ensure!(rule["health"] == "ok", "{rule:#}");
        if rule["state"] == "firing" {
            firing.insert(rule["name"].as_str().unwrap_or_default());
        }
    }
    ensure!(firing.is_empty(), "firing: {firing:?}");
    Ok(())
}

fn alerts() -> Result<()> {
    let promtool = need("promtool")?;
    let dir = run::dir_of(&run::next_name()).join("rules");
    let tests = write_rules(&dir)?;
    netns::command(&promtool.to_string_lossy(), ["test", "rules", &tests.to_string_lossy()])?;
    std::fs::remove_dir_all(&dir).context("cannot remove a directory")
}
