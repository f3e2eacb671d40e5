//! What people see: metrics, logs, `meshctl`, DNS answers, failure codes.

use super::shop::{self, ONLY_FRONTEND, metric, open, refused, talks};
use super::{Scenario, scenario};
use crate::bed::process::Proc;
use crate::bed::{Testbed, net, wait};
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::net::IpAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("metrics of a tunnelled connection have the labels that dashboards ask for", 60, labels),
    scenario("byte counters advance while a connection is open and agree with its ends", 60, bytes),
    scenario("a blocked port 15008 is told apart from a dead server", 90, network_policy),
    scenario("meshctl why names the policy that decided", 60, why),
    scenario("meshctl shows status, workloads, services, policies and certificates", 60, meshctl),
    scenario("dry-run results are counted, through the tunnel and on the fast path", 60, dry_run),
    scenario("open connections and the kernel's decisions are metrics", 60, figures),
    scenario("names are answered while the only agent of a node drains", 60, dns_drain),
    scenario("a pod may ask one nameserver after the other without end", 90, many_nameservers),
    scenario("names of the mesh are answered, other names are asked where the pod asks", 60, dns),
];

const SOON: Duration = Duration::from_secs(15);

fn labels() -> Result<()> {
    let bed = open()?;
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    let common = [
        ("source_workload", "frontend"),
        ("source_workload_namespace", "shop"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/frontend"),
        ("destination_workload", "backend"),
        ("destination_workload_namespace", "shop"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/backend"),
        ("destination_service", "backend.shop.svc.cluster.local"),
        ("destination_service_name", "backend"),
        ("destination_service_namespace", "shop"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    for (node, reporter) in [("a", "source"), ("b", "destination")] {
        let wanted: Vec<_> = [("reporter", reporter)].into_iter().chain(common).collect();
        for name in ["istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"] {
            wait::until_true(&format!("{name} of the {reporter}"), SOON, || {
                Ok(metric(&bed.metrics(node)?, name, &wanted) == 1.0)
            })
            .with_context(|| shown(&bed, node, name))?;
        }
    }
    let visitor = bed.pod("shop/backend")?.at(8080).to_string();
    talks(&bed, "outside/visitor", &visitor)?;
    let wanted = [
        ("reporter", "destination"),
        ("source_workload", "visitor"),
        ("source_principal", "unknown"),
        ("connection_security_policy", "unknown"),
    ];
    let name = "istio_tcp_connections_opened_total";
    wait::until_true("metric of a plaintext connection", SOON, || {
        Ok(metric(&bed.metrics("b")?, name, &wanted) == 1.0)
    })
    .with_context(|| shown(&bed, "b", name))
}

fn shown(bed: &Testbed, node: &str, name: &str) -> String {
    let text = bed.metrics(node).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with(name)).collect();
    format!("the node shows:\n{}", lines.join("\n"))
}

fn bytes() -> Result<()> {
    let bed = open()?;
    let (frontend, backend) = (bed.pod("shop/frontend")?, bed.pod("shop/backend")?);
    let received = |node: &str| -> Result<f64> {
        Ok(metric(
            &bed.metrics(node)?,
            "istio_tcp_received_bytes_total",
            &[("source_workload", "frontend"), ("destination_workload", "backend")],
        ))
    };
    let open = crate::bed::Load::start(frontend, &backend.at(8082).to_string(), &["--shape", "bulk"])?;
    let first = wait::until("counted bytes of an open connection", SOON, || {
        let now = received("b")?;
        Ok((now > 0.0).then_some(now))
    })?;
    wait::until_true("more bytes", SOON, || Ok(received("b")? > first && received("a")? > first))?;
    let sent = open.stop()?.bytes;
    #[expect(clippy::cast_precision_loss, reason = "a few seconds of bytes")]
    let sent = sent as f64;
    for node in ["a", "b"] {
        // What the client wrote last may have been cut off by its end, on both nodes; nothing may be counted twice.
        wait::until_true(&format!("all bytes on {node}"), SOON, || Ok(received(node)? >= sent * 0.9))?;
        let counted = received(node)?;
        ensure!(counted <= sent, "{node} counted {counted} of {sent} bytes");
    }
    Ok(())
}

fn network_policy() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    // As a CNI's network policy that opens the application's port only.
    bed.node("b")?.netns.nft(
        "table inet um_policy {\n chain forward {\n type filter hook forward priority 0;\n tcp dport 15008 drop\n }\n}\n",
    )?;
    let outcome = bed
        .pod("shop/frontend")?
        .call(&backend.at(8080).to_string(), &["--send", "x\n", "--lines", "1", "--timeout-ms", "30000"])?;
    ensure!(!outcome.ok, "it got through: {:?}", outcome.received);
    ensure!(outcome.total_ms < 25_000.0, "it took {:.0} ms to fail", outcome.total_ms);
    let name = "istio_tcp_connections_failed_total";
    let wanted = [("response_flags", "NETWORK_POLICY"), ("source_workload", "frontend")];
    wait::until_true("failure flagged NETWORK_POLICY", SOON, || {
        Ok(metric(&bed.metrics("a")?, name, &wanted) >= 1.0)
    })
    .with_context(|| shown(&bed, "a", name))
}

fn why() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    // The service by name, and the pod by address.
    for target in ["shop/backend:80", &to] {
        let text = bed.meshctl_any("b", &["why", "shop/other", target])?;
        ensure!(text.contains("shop/only-frontend"), "{target}: it does not name the policy:\n{text}");
    }
    let text = bed.meshctl_any("b", &["why", "shop/local", "shop/backend:80"])?;
    ensure!(text.to_lowercase().contains("allow"), "it does not say that it is allowed:\n{text}");
    let json = bed.meshctl_any("b", &["why", "shop/other", "shop/backend:80", "-o", "json"])?;
    serde_json::from_str::<serde_json::Value>(&json).with_context(|| format!("no JSON: {json}"))?;
    Ok(())
}

fn meshctl() -> Result<()> {
    let bed = open()?;
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    for (command, word) in [
        ("status", "a"),
        ("workloads", "frontend"),
        ("services", "backend.shop.svc.cluster.local"),
        ("policies", ""),
        ("certs", "spiffe://cluster.local/ns/shop/sa/frontend"),
        ("version", env!("CARGO_PKG_VERSION")),
    ] {
        let text = bed.meshctl("a", &[command])?;
        ensure!(text.contains(word), "meshctl {command} does not show {word:?}:\n{text}");
    }
    Ok(())
}

fn dns() -> Result<()> {
    let mut bed = open()?;
    let log = bed.dir.join("dns.log");
    let argv = ["mesh-tests", "tool", "dns", "--record", "elsewhere.example=203.0.113.7"];
    let server = Proc::spawn(&bed.control_place, argv, &log)?;
    bed.others.push(server);
    wait::until_true("DNS server", SOON, || net::listening(&bed.control_netns, 53))?;
    let frontend = bed.pod("shop/frontend")?;
    let dig = |args: &[&str]| -> Result<String> {
        frontend.output(["dig", "+tries=2", "+time=3", "+short"].into_iter().chain(args.iter().copied()))
    };
    for (question, answer) in [
        (["backend.shop.svc.cluster.local", "A"].as_slice(), "10.96.0.10"),
        (&["backend.shop.svc.cluster.local", "AAAA"], "fd96::10"),
        (&["+tcp", "backend.shop.svc.cluster.local", "A"], "10.96.0.10"),
        (&["+search", "backend", "A"], "10.96.0.10"),
        (&["elsewhere.example", "A"], "203.0.113.7"),
        (&["+tcp", "elsewhere.example", "A"], "203.0.113.7"),
    ] {
        let said = dig(question)?;
        ensure!(said.lines().any(|line| line == answer), "{question:?} was answered {said:?}");
    }
    let headless = dig(&["backend-headless.shop.svc.cluster.local", "A"])?;
    let pod = bed.pod("shop/backend")?.v4.to_string();
    ensure!(headless.trim() == pod, "headless was answered {headless:?}");
    let asked = std::fs::read_to_string(&log).unwrap_or_default();
    ensure!(
        asked.contains("udp elsewhere.example") && asked.contains("tcp elsewhere.example"),
        "not forwarded: {asked}"
    );
    ensure!(!asked.contains("backend"), "names of the mesh were asked elsewhere: {asked}");
    let (_, seen) = frontend.greeted("backend:81")?;
    // The name has addresses of both families: the client chose.
    let own = [IpAddr::from(frontend.v4), IpAddr::from(frontend.v6)];
    ensure!(own.contains(&seen.peer.ip()), "it saw {}", seen.peer);
    shop::talks(&bed, "shop/frontend", "backend:80")
}

fn many_nameservers() -> Result<()> {
    let bed = open()?;
    // Each datagram goes to another server; a refused one is sent again.
    let script =
        "for i in $(seq 1 200); do until printf x > /dev/udp/198.51.100.$i/53; do sleep 0.2; done; done";
    let done = bed.pod("shop/frontend")?.spawn(["bash", "-c", script])?.wait(Duration::from_secs(60));
    ensure!(done.context("some nameservers stay refused")?.success(), "the client failed");
    Ok(())
}

fn dry_run() -> Result<()> {
    let mut bed = open()?;
    let dry = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: dry, namespace: shop, annotations: {istio.io/dry-run: 'true'}}
spec:
  selector: {matchLabels: {app: backend}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/frontend]}}]
";
    bed.apply("policy", dry)?;
    let to = bed.pod("shop/backend")?.at(8080);
    let would = [("policy", "shop/dry"), ("would", "deny")];
    let counted = |bed: &Testbed| -> Result<f64> {
        Ok(metric(&bed.metrics("b")?, "undermesh_policy_dry_run_total", &would))
    };
    wait::until_true("counted result", SOON, || {
        talks(&bed, "shop/frontend", &to.to_string())?;
        Ok(counted(&bed)? > 0.0)
    })?;
    // Beside backend: after the first one, its connections stay in the kernel.
    let direct = |bed: &Testbed| -> Result<f64> {
        Ok(metric(&bed.metrics("b")?, "undermesh_kernel_events_total", &[("reason", "fast_path")]))
    };
    wait::until_true("fast path", SOON, || {
        talks(&bed, "shop/local", &to.to_string())?;
        Ok(direct(&bed)? > 0.0)
    })?;
    // Figures of the fast path are read every second: wait until all of them are in.
    let settled = |bed: &Testbed| -> Result<f64> {
        let mut last = counted(bed)?;
        wait::until("settled count", SOON, || {
            crate::bed::run::pause(Duration::from_millis(2500))?;
            let now = counted(bed)?;
            Ok((std::mem::replace(&mut last, now) == now).then_some(now))
        })
    };
    let (before, direct_before) = (settled(&bed)?, direct(&bed)?);
    for _ in 0..5 {
        talks(&bed, "shop/local", &to.to_string())?;
    }
    ensure!(direct(&bed)? == direct_before + 5.0, "the pair left the fast path");
    ensure!(settled(&bed)? == before + 5.0, "5 connections raised {before} to {}", counted(&bed)?);
    let log = bed.node("b")?.agent(0)?.log();
    ensure!(log.contains("dry-run: would be denied by shop/dry"), "the log does not speak of it");
    Ok(())
}

fn figures() -> Result<()> {
    let bed = open()?;
    let frontend = bed.pod("shop/frontend")?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let pod = [("namespace", "shop"), ("pod", "frontend")];
    let of_pod = || -> Result<f64> { Ok(metric(&bed.metrics("a")?, "undermesh_pod_connections_open", &pod)) };
    wait::until_true("a quiet pod", SOON, || Ok(of_pod()? == 0.0))?;
    let argv = ["mesh-tests", "tool", "call", "--to", &to, "--send", "x", "--hold-ms", "50000"];
    let mut held = [frontend.spawn(argv)?, frontend.spawn(argv)?, frontend.spawn(argv)?];
    wait::until_true("gauge of three open connections", SOON, || Ok(of_pod()? == 3.0))?;
    let text = bed.metrics("a")?;
    let node = metric(&text, "undermesh_connections_open", &[]);
    let limit = metric(&text, "undermesh_connections_limit", &[]);
    ensure!((3.0..limit).contains(&node), "the node shows {node} of {limit}");
    let captured = metric(&text, "undermesh_kernel_events_total", &[("reason", "captured")]);
    ensure!(captured >= 3.0, "the kernel counted {captured} captured connections");
    held.iter_mut().for_each(Proc::kill);
    wait::until_true("gauge without connections", SOON, || Ok(of_pod()? == 0.0))
}

/// Sends the same query over one connected socket again and again, and writes a line for each answer.
fn asking(server: &str) -> String {
    let query = "\\x12\\x34\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\
                 \\x07backend\\x04shop\\x03svc\\x07cluster\\x05local\\x00\\x00\\x01\\x00\\x01";
    format!(
        "exec 3<>/dev/udp/{server}/53; while sleep 0.2; do printf '{query}' >&3; \
         [ $(timeout 1 head -c 12 <&3 | wc -c) = 12 ] && echo answered; done"
    )
}

fn dns_drain() -> Result<()> {
    let bed = open()?;
    let frontend = bed.pod("shop/frontend")?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let server = net::underlay_v4(net::CONTROL).to_string();
    let mut asking = frontend.spawn(["bash", "-c", &asking(&server)])?;
    let answers = |asking: &Proc| asking.log().lines().filter(|line| *line == "answered").count();
    wait::until_true("answer", SOON, || Ok(answers(&asking) > 0))
        .with_context(|| format!("the client says: {}", asking.log()))?;
    let argv = ["mesh-tests", "tool", "call", "--to", &to, "--send", "x", "--hold-ms", "50000"];
    let mut held = frontend.spawn(argv)?;
    wait::until_true("held connection", SOON, || Ok(!net::established(&frontend.netns)?.is_empty()))?;
    bed.node("a")?.agent(0)?.signal(Signal::TERM)?;
    wait::until("refusal of new connections", SOON, || {
        Ok(talks(&bed, "shop/frontend", &to).is_err().then_some(()))
    })?;
    // The listeners of the data path are closed by now; what the connection at hand needs is still resolved.
    let draining = || Ok(bed.node("a")?.agent(0)?.log().contains("draining"));
    wait::until_true("drain", SOON, draining)?;
    crate::bed::run::pause(Duration::from_secs(4))?;
    let before = answers(&asking);
    wait::until_true("answers while the agent drains", SOON, || Ok(answers(&asking) > before + 2))?;
    ensure!(held.running()?, "the drain has cut the open connection: {}", held.log());
    held.kill();
    asking.kill();
    Ok(())
}
