//! What Kiali asks of a mesh in ambient mode: its queries at a real Prometheus, dumps with the types that it decodes, and
//! lines that it takes apart. It finds node agents by label `app=ztunnel` and pods `ztunnel-…`, which are the scraper's.

use super::dashboards::{prometheus, series};
use super::shop::{refused, talks};
use super::waypoint::{SOON, curl, open as open_waypoint, url};
use super::waypoint_telemetry::server;
use super::{Scenario, scenario};
use crate::bed::{Testbed, net, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub(super) const SCENARIOS: &[Scenario] = &[scenario(
    "Kiali finds traffic, health, versions, configuration and lines as it asks for them",
    180,
    kiali,
)];

/// By what Kiali groups the edges of its graph.
const ENDS: &str = "source_cluster, source_workload_namespace, source_workload, source_canonical_service, \
                    source_canonical_revision, destination_cluster, destination_service_namespace, destination_service, \
                    destination_service_name, destination_workload_namespace, destination_workload, \
                    destination_canonical_service, destination_canonical_revision";

/// As Istio's own Prometheus labels them.
fn jobs(bed: &Testbed) -> Result<String> {
    let mut jobs = format!(
        "- job_name: istiod\n  static_configs: [{{targets: ['127.0.0.1:15014'], labels: {{app: istiod, pod: istiod-0}}}}]\n\
         - job_name: waypoints\n  static_configs: [{{targets: ['{}:15020'], labels: {{app: wp, pod: wp-0, namespace: shop}}}}]\n\
         - job_name: nodes\n  static_configs:\n",
        bed.pod("shop/wp")?.v4
    );
    for node in bed.nodes.values() {
        jobs += &format!(
            "  - {{targets: ['{}:15020'], labels: {{app: ztunnel, pod: 'ztunnel-{}', namespace: istio-system}}}}\n",
            net::underlay_v4(net::node_place(node.index)),
            node.name
        );
    }
    Ok(jobs)
}

/// Queries of Kiali, and labels that at least one series of the answer must have.
fn queries() -> Vec<(String, Vec<(&'static str, &'static str)>)> {
    let web = vec![
        ("source_workload", "frontend"),
        ("destination_service_name", "web"),
        ("destination_workload", "v1"),
    ];
    let pay =
        vec![("source_workload", "frontend"), ("destination_service", "backend.shop.svc.cluster.local")];
    let inward = "reporter=~\"waypoint|destination\",destination_service_namespace=\"shop\"";
    let outward = "reporter=~\"waypoint|source\",source_workload_namespace=\"shop\"";
    let seconds = "istio_request_duration_milliseconds";
    let mut all = Vec::new();
    let mut add = |query: String, wanted: &[(&'static str, &'static str)]| all.push((query, wanted.to_vec()));
    // The graph.
    for side in [inward, outward] {
        let by = format!("{ENDS}, request_protocol, response_code, grpc_response_status, response_flags");
        add(format!("sum(rate(istio_requests_total{{{side}}}[10s])) by ({by}) > 0"), &web);
        for name in ["istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"] {
            add(format!("sum(rate({name}{{{side}}}[10s])) by (app, {ENDS}, response_flags) > 0"), &pay);
        }
    }
    add(
        format!("histogram_quantile(0.95, sum(rate({seconds}_bucket{{{inward}}}[10s])) by (le, {ENDS}))"),
        &web,
    );
    add(
        format!(
            "sum(rate({seconds}_sum{{{inward}}}[10s])) by ({ENDS}) / sum(rate({seconds}_count{{{inward}}}[10s])) by ({ENDS})"
        ),
        &web,
    );
    for name in ["istio_request_bytes_sum", "istio_response_bytes_sum"] {
        add(format!("sum(rate({name}{{{inward}}}[10s])) by ({ENDS})"), &web);
    }
    // The lock, and whose it is.
    let lock = "connection_security_policy, source_principal, destination_principal";
    let ours = [
        ("connection_security_policy", "mutual_tls"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/frontend"),
    ];
    add(format!("sum(rate(istio_requests_total{{{inward}}}[10s])) by ({ENDS}, {lock}) > 0"), &ours);
    let tunnel = "app=\"ztunnel\",reporter=\"source\"";
    add(format!("sum(rate(istio_tcp_sent_bytes_total{{{tunnel}}}[10s])) by ({ENDS}, {lock}) > 0"), &ours);
    // Health, without a reporter.
    add(
        "rate(istio_requests_total{destination_service_namespace=\"shop\"}[10s]) > 0".into(),
        &[("request_protocol", "http"), ("response_code", "200")],
    );
    add("rate(istio_requests_total{destination_service_namespace=\"shop\",response_code=~\"^0$|^[4-5]\\\\d\\\\d$\"}[10s]) > 0".into(), &[("response_code", "503")]);
    // Pages of single workloads, of node agents and of the control plane.
    for name in ["istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"] {
        add(format!("sum(rate({name}{{pod=~\"ztunnel-.*\"}}[10s])) by (pod)"), &[("pod", "ztunnel-a")]);
    }
    for (query, label) in [
        ("istio_build{component=\"ztunnel\"}", ("app", "ztunnel")),
        ("istio_build{component=\"pilot\"}", ("app", "istiod")),
        ("workload_manager_active_proxy_count{app=\"ztunnel\"}", ("pod", "ztunnel-b")),
        ("rate(process_cpu_seconds_total{app=\"istiod\"}[10s])", ("app", "istiod")),
        ("process_resident_memory_bytes{app=\"istiod\"}", ("pod", "istiod-0")),
        ("pilot_proxy_convergence_time_sum / pilot_proxy_convergence_time_count", ("app", "istiod")),
    ] {
        add(query.to_owned(), &[label]);
    }
    all
}

fn kiali() -> Result<()> {
    let bed = open_waypoint(server)?;
    let running = prometheus(&bed, &jobs(&bed)?, &[])?;
    let queries = queries();
    let mut missing = Vec::new();
    let found = wait::until_true("an answer to every query", SOON * 2, || {
        curl(&bed, "shop/frontend", &["-d", "hello", &url("/[1-5]")])?;
        curl(&bed, "shop/frontend", &["-o", "/dev/null", &url("/fail")])?;
        talks(&bed, "shop/frontend", "10.96.0.10:80")?;
        missing.clear();
        for (query, wanted) in &queries {
            let answers =
                |series: &Value| wanted.iter().all(|(label, value)| series["metric"][label] == *value);
            if !series(&bed, query)?.iter().any(answers) {
                missing.push(format!("{query}: no series with {wanted:?}"));
            }
        }
        Ok(missing.is_empty())
    });
    found.with_context(|| missing.join("\n")).with_context(|| running.log())?;
    for (query, _) in &queries {
        // Prometheus drops what is empty, and Kiali takes it for missing.
        for series in series(&bed, query)? {
            let labels = series["metric"].as_object().context("no labels")?;
            ensure!(!labels.values().any(|value| value == ""), "{query}: an empty label: {series}");
        }
    }
    proxies(&bed)?;
    dump(&bed)?;
    lines(&bed)
}

/// `/debug/syncz` and `/version`.
fn proxies(bed: &Testbed) -> Result<()> {
    let all: Value = serde_json::from_str(&bed.control_get("/debug/syncz")?)?;
    let all = all.as_array().context("no list of proxies")?;
    for proxy in all {
        for text in ["cluster_id", "proxy", "proxy_type"] {
            ensure!(proxy[text].is_string(), "{text} is no text: {proxy}");
        }
        ensure!(proxy["proxy"].as_str().is_some_and(|name| name.contains('.')), "{proxy}");
        for (url, state) in proxy["resources"].as_object().context("no resources")? {
            ensure!(url.starts_with("type.googleapis.com/"), "{url}");
            ensure!(state["sent"].is_string() && state["acked"].is_string(), "{state}");
        }
    }
    ensure!(all.len() == 3, "{} proxies", all.len());
    Ok(())
}

/// The dump of a node, by the types that Kiali's own has: one wrong, and it shows nothing.
fn dump(bed: &Testbed) -> Result<()> {
    let dump: Value = serde_json::from_str(&bed.admin("b", "/config_dump")?)?;
    type Check = fn(&Value) -> bool;
    let text: Check = Value::is_string;
    let texts: Check = |value| value.as_array().is_some_and(|all| all.iter().all(Value::is_string));
    let ports: Check = |value| value.as_object().is_some_and(|all| all.values().all(Value::is_u64));
    let object: Check = Value::is_object;
    let shapes: [(&str, &[(&str, Check)]); 4] = [
        ("certificates", &[("identity", text), ("state", text), ("certChain", Value::is_array)]),
        (
            "services",
            &[
                ("name", text),
                ("namespace", text),
                ("hostname", text),
                ("vips", texts),
                ("ports", ports),
                ("endpoints", object),
                ("subjectAltNames", texts),
            ],
        ),
        (
            "workloads",
            &[
                ("uid", text),
                ("name", text),
                ("namespace", text),
                ("workloadIps", texts),
                ("protocol", text),
                ("networkMode", text),
                ("trustDomain", text),
                ("serviceAccount", text),
                ("workloadName", text),
                ("workloadType", text),
                ("canonicalName", text),
                ("canonicalRevision", text),
                ("clusterId", text),
                ("node", text),
                ("status", text),
                ("services", texts),
            ],
        ),
        ("policies", &[]),
    ];
    for (list, fields) in shapes {
        let entries = dump[list].as_array().with_context(|| format!("{list} is no list"))?;
        ensure!(list == "policies" || !entries.is_empty(), "no {list}");
        for entry in entries {
            for (field, right) in fields {
                // What is left out is empty to Kiali; what is there has its type.
                ensure!(entry.get(field).is_none_or(right), "{list}: {field}: {entry}");
            }
        }
    }
    let chain = &dump["certificates"][0]["certChain"][0];
    for field in ["pem", "serialNumber", "validFrom", "expirationTime"] {
        ensure!(chain[field].is_string(), "certificates: {field}: {chain}");
    }
    let named = |list: &str, field: &str, value: &str| {
        dump[list].as_array().is_some_and(|all| all.iter().any(|entry| entry[field] == value))
    };
    ensure!(
        named("workloads", "workloadName", "backend") && named("services", "name", "web"),
        "something is missing"
    );
    ensure!(dump["config"].is_object(), "no config");
    Ok(())
}

/// Lines of the access log as Kiali splits them: by tabs, a time first, `key=value` fifth.
fn lines(bed: &Testbed) -> Result<()> {
    refused(bed, "outside/visitor", &bed.pod("outside/site")?.at(9).to_string()).ok();
    let log = bed.node("b")?.agent(0)?.log();
    let access: Vec<&str> = log.lines().filter(|line| line.contains("\taccess\t")).collect();
    ensure!(!access.is_empty(), "no lines");
    for line in access {
        let columns: Vec<&str> = line.split('\t').collect();
        ensure!(columns.len() >= 5, "{} columns: {line}", columns.len());
        ensure!(columns[0].len() == 27 && columns[0].ends_with('Z'), "no time: {line}");
        let has = |key: &str| columns[4].split(' ').any(|word| word.starts_with(&format!("{key}=")));
        for key in ["src.addr", "dst.addr", "duration", "bytes_recv", "bytes_sent"] {
            ensure!(has(key), "no {key}: {line}");
        }
    }
    Ok(())
}
