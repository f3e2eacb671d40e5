//! Whole commands against servers that answer as nodes and the control plane do: what is asked, what is shown, and
//! the exit code.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod server;

use std::collections::BTreeMap;
use std::path::Path;

use clap::Parser as _;
use mesh_core::admin::*;
use mesh_core::why::{Explanation, NameError, Object, Outcome, Path as Way, Stage, Step, Verdict};
use mesh_ctl::{Answer, Exit, Surroundings};
use serde_json::json;
use server::Server;

async fn meshctl(run_dir: &Path, args: &[&str]) -> Answer {
    let cli = mesh_ctl::cli::Cli::try_parse_from([&["meshctl"], args].concat()).unwrap();
    mesh_ctl::run(&cli, &Surroundings { colour: false, run_dir: run_dir.to_owned() }).await
}

/// As [`meshctl`], with the node and control plane named.
async fn ask(node: &Server, control: Option<&Server>, args: &[&str]) -> Answer {
    let mut all = vec!["--node", &node.url];
    if let Some(control) = control {
        all.extend(["--control", &control.url]);
    }
    all.extend(args);
    meshctl(Path::new("/nonexistent"), &all).await
}

fn pod(name: &str, state: PodState, problem: Option<&str>) -> Pod {
    Pod {
        namespace: "shop".into(),
        name: name.into(),
        service_account: "default".into(),
        state,
        problem: problem.map(str::to_owned),
        addresses: vec!["10.0.1.1".into()],
    }
}

fn status() -> NodeStatus {
    let upstream =
        |address: &str| Upstream { address: address.into(), connected: true, ..Upstream::default() };
    NodeStatus {
        node: "n1".into(),
        version: "0.1.0".into(),
        pid: 7,
        started_ms: 1,
        agents: vec![Agent { pid: 7, version: "0.1.0".into(), phase: Phase::Serving, ..Agent::default() }],
        pods: vec![pod("frontend-1", PodState::Captured, None)],
        xds: upstream("https://control:15012"),
        ca: upstream("https://control:15012"),
        certificates: BTreeMap::from([("Available".to_owned(), 1)]),
        fail: "closed".into(),
        same_node: "fast".into(),
        ..NodeStatus::default()
    }
}

fn dump() -> serde_json::Value {
    // As a node writes it, with fields that only other readers want.
    json!({
        "workloads": [
            {"uid": "c//Pod/shop/frontend-1", "name": "frontend-1", "namespace": "shop",
             "workloadIps": ["10.0.1.1"], "protocol": "HBONE", "networkMode": "Standard", "trustDomain": "cluster.local",
             "serviceAccount": "frontend", "workloadName": "frontend", "node": "n1", "status": "Healthy", "services": []},
            {"uid": "c//Pod/shop/backend-1", "name": "backend-1", "namespace": "shop",
             "workloadIps": ["10.0.2.1", "fd00::1"], "protocol": "TCP", "trustDomain": "cluster.local",
             "serviceAccount": "backend", "workloadName": "backend", "node": "n2", "status": "Unhealthy",
             "services": ["shop/backend.shop.svc.cluster.local"]},
        ],
        "services": [
            {"name": "backend", "namespace": "shop", "hostname": "backend.shop.svc.cluster.local", "vips": ["/10.96.0.1"],
             "ports": {"80": 8080, "9": 0}, "subjectAltNames": [], "canonical": true,
             "endpoints": {"c//Pod/shop/backend-1":
                {"workloadUid": "c//Pod/shop/backend-1", "port": {"80": 8080}, "status": "Unhealthy"}}},
        ],
        "policies": [
            {"name": "only-frontend", "namespace": "shop", "scope": "WorkloadSelector", "action": "Allow", "rules": [[]]},
            {"name": "converted_peer_authentication_strict", "namespace": "shop", "scope": "Namespace",
             "action": "Deny", "rules": [[]], "dryRun": true},
        ],
        "certificates": [
            {"identity": "spiffe://cluster.local/ns/shop/sa/frontend", "state": "Available", "certChain": [
                {"pem": "x", "serialNumber": "42", "validFrom": "2020-01-01T00:00:00Z",
                 "expirationTime": "2090-01-01T00:00:00Z"}]},
        ],
        "config": {"localNode": "n1"},
        "version": {"component": "ztunnel"},
    })
}

fn healthy_control() -> Server {
    Server::tcp(&[
        ("/version", 200, json!({"name": "mesh-control", "version": "0.1.0"}).to_string()),
        ("/ready", 200, "ready\n".into()),
        ("/metrics", 200, "citadel_server_root_cert_expiry_timestamp 4000000000\n".into()),
        (
            "/debug/syncz",
            200,
            json!([
            {"id": "ztunnel~x", "node": "n1", "peer": "10.0.0.1:1", "connected_at": 1,
             "types": {"Address": {"sent": "3", "acked": "3", "snapshot": 3, "resources": 2, "rejects": 0}}}])
            .to_string(),
        ),
        (
            "/debug/nodes",
            200,
            json!([{"name": "n1", "connected": true, "pods": ["shop/frontend-1"]}]).to_string(),
        ),
        ("/debug/conditions", 200, "[]".into()),
        ("/debug/errors", 200, "[]".into()),
    ])
}

#[tokio::test]
async fn a_healthy_mesh_is_shown_at_a_glance_and_exits_with_0() {
    let (node, control) = (Server::tcp(&[("/status", 200, json!(status()).to_string())]), healthy_control());
    let answer = ask(&node, Some(&control), &["status"]).await;
    assert_eq!((answer.exit, answer.errors.as_str()), (Exit::Fine, ""), "{}", answer.text);
    let row =
        |title: &str| answer.text.lines().skip_while(|l| !l.starts_with(title)).nth(1).unwrap().to_owned();
    for part in [&control.url, "0.1.0", "yes", "1/1"] {
        assert!(row("CONTROL PLANE").contains(part), "{part}:\n{}", answer.text);
    }
    for part in ["n1", "yes", "1/1", "connected", "closed", "fast"] {
        assert!(row("NODE").contains(part), "{part}:\n{}", answer.text);
    }
    for absent in ["\nPROBLEMS\n", "\nNOTES\n", "PHASE", "POD "] {
        assert!(!answer.text.contains(absent), "{absent}:\n{}", answer.text);
    }
    let all = ask(&node, Some(&control), &["status", "--pods"]).await;
    assert!(all.text.contains("frontend-1") && all.text.contains("captured"), "{}", all.text);
}

#[tokio::test]
async fn everything_that_is_wrong_is_a_line_and_the_exit_code_is_1() {
    let mut sick = status();
    sick.pending = vec!["workloads: not received".into()];
    sick.pods.push(pod("broken-1", PodState::Failed, Some("its network namespace is gone")));
    sick.xds = Upstream { connected: false, problem: Some("refused".into()), ..sick.xds };
    sick.certificates.insert("Unavailable".into(), 2);
    let old = Agent { pid: 6, phase: Phase::Draining, connections: 12, ..Agent::default() };
    sick.agents.insert(0, old);
    let node = Server::tcp(&[("/status", 200, json!(sick).to_string())]);
    let control = healthy_control();
    control.set("/debug/errors", 200, &json!([
        {"file": "shop.yaml", "line": 12, "object": {"kind": "Pod", "namespace": "shop", "name": "a"},
         "field": "spec.nodeNam", "message": "unknown field; did you mean nodeName?", "consequence": "not in force"}]));
    control.set("/debug/conditions", 200, &json!([
        {"object": {"kind": "AuthorizationPolicy", "namespace": "shop", "name": "l7"}, "type": "ZtunnelAccepted",
         "status": true, "reason": "UnsupportedValue", "message": "methods need a waypoint"}]));
    let answer = ask(&node, Some(&control), &["status"]).await;
    assert_eq!(answer.exit, Exit::No);
    for line in [
        "n1: not ready: workloads: not received",
        "n1: workload feed https://control:15012: refused",
        "n1: pod shop/broken-1 is not captured: its network namespace is gone",
        "n1: 2 identities have no usable certificate, see `meshctl certs`",
        "control plane: shop.yaml:12: Pod shop/a: spec.nodeNam: unknown field; did you mean nodeName? (not in force)",
        "AuthorizationPolicy shop/l7: methods need a waypoint",
    ] {
        assert!(answer.text.lines().any(|l| l == line), "{line}:\n{}", answer.text);
    }
    assert!(answer.text.contains("draining"), "an agent on its way out is listed:\n{}", answer.text);
}

#[tokio::test]
async fn who_cannot_be_reached_is_named_with_the_fix_and_the_exit_code_is_3() {
    let dir = tempfile::tempdir().unwrap();
    let gone = format!("unix:{}", dir.path().join("admin.sock").display());
    let node = Server::tcp(&[("/status", 200, json!(status()).to_string())]);
    let args = ["--node", &gone, "--node", &node.url, "status", "-o", "json"];
    let answer = meshctl(dir.path(), &args).await;
    assert_eq!(answer.exit, Exit::Unreachable);
    assert!(
        answer.errors.contains(&gone) && answer.errors.contains("fix: is the agent running"),
        "{}",
        answer.errors
    );
    let document: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!(document["nodes"][0]["node"], "n1", "the other node's answer is shown all the same");
    assert_eq!(document["unreachable"][0]["endpoint"], gone.as_str());
    assert_eq!(document["healthy"], false);

    let control = ["--node", &node.url, "--control", "http://127.0.0.1:1", "status"];
    let answer = meshctl(dir.path(), &control).await;
    assert_eq!(answer.exit, Exit::Unreachable, "a control plane that was named must answer");
    assert!(
        answer.errors.contains("http://127.0.0.1:1") && answer.errors.contains("--control"),
        "{}",
        answer.errors
    );
}

#[tokio::test]
async fn a_server_that_does_not_answer_or_answers_nonsense_is_an_error_with_its_text() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let dir = Path::new("/nonexistent");
    let answer = meshctl(dir, &["--node", &silent, "--timeout", "100ms", "workloads"]).await;
    assert_eq!(answer.exit, Exit::Unreachable, "{}", answer.errors);

    let waiting = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", waiting.local_addr().unwrap());
    let answer = meshctl(dir, &["--node", &url, "--timeout", "100ms", "workloads"]).await;
    assert!(answer.errors.contains("no answer within 100ms"), "{}", answer.errors);

    for (status, body, expected) in [
        (200, "{\"workloads\": 3}", "other JSON than expected"),
        (200, "<html>", "other JSON than expected"),
        (404, "nothing at /config_dump", "404 Not Found nothing at /config_dump"),
        (500, "\u{1b}[2Jx", "500 Internal Server Error  [2Jx"),
    ] {
        let node = Server::tcp(&[("/config_dump", status, body.into())]);
        let answer = ask(&node, None, &["workloads"]).await;
        assert_eq!(answer.exit, Exit::Unreachable, "{body}");
        assert!(answer.errors.contains(expected), "{expected} in {}", answer.errors);
    }
}

#[tokio::test]
async fn lists_are_tables_that_line_up_and_full_documents() {
    let node = Server::tcp(&[("/config_dump", 200, dump().to_string())]);
    let answer = ask(&node, None, &["workloads"]).await;
    let expected = "\
NAMESPACE  NAME        ADDRESS           NODE  PROTOCOL  HEALTH     SERVICE ACCOUNT  SERVICES
shop       backend-1   10.0.2.1,fd00::1  n2    TCP       Unhealthy  backend          backend
shop       frontend-1  10.0.1.1          n1    HBONE     Healthy    frontend         -
";
    assert_eq!((answer.exit, answer.text.as_str()), (Exit::Fine, expected), "{}", answer.errors);

    let answer = ask(&node, None, &["services"]).await;
    let expected = "\
NAMESPACE  NAME     ADDRESSES  PORTS              ENDPOINTS  WAYPOINT  HOSTNAME
shop       backend  10.96.0.1  9->named,80->8080  0/1        -         backend.shop.svc.cluster.local
";
    assert_eq!(answer.text, expected);

    let answer = ask(&node, None, &["policies"]).await;
    let expected = "\
NAMESPACE  NAME           KIND                 ACTION  APPLIES TO          RULES  MODE
shop       strict         PeerAuthentication   Deny    its namespace       1      dry-run
shop       only-frontend  AuthorizationPolicy  Allow   selected workloads  1      enforced
";
    assert_eq!(answer.text, expected);

    let answer = ask(&node, None, &["workloads", "-o", "json", "frontend-1"]).await;
    let document: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!(document.as_array().unwrap().len(), 1);
    assert_eq!(document[0]["networkMode"], "Standard", "fields that no table shows are kept");

    let answer = ask(&node, None, &["services", "-o", "yaml"]).await;
    assert!(answer.text.contains("hostname: backend.shop.svc.cluster.local"), "{}", answer.text);
}

#[tokio::test]
async fn objects_that_several_nodes_know_are_listed_once_and_certificates_by_node() {
    let (a, b) = (
        Server::tcp(&[("/config_dump", 200, dump().to_string())]),
        Server::tcp(&[("/config_dump", 200, dump().to_string())]),
    );
    let nodes = ["--node", &a.url, "--node", &b.url];
    let rows = |text: &str| text.lines().count() - 1;
    let dir = Path::new("/nonexistent");
    assert_eq!(rows(&meshctl(dir, &[&nodes[..], &["workloads"]].concat()).await.text), 2);
    let certs = meshctl(dir, &[&nodes[..], &["certs"]].concat()).await;
    assert_eq!((rows(&certs.text), certs.exit), (2, Exit::Fine), "{}", certs.text);
    assert!(
        certs.text.contains("n1    spiffe://cluster.local/ns/shop/sa/frontend  Available"),
        "{}",
        certs.text
    );
}

#[tokio::test]
async fn a_certificate_that_is_missing_makes_certs_exit_with_1() {
    let mut dump = dump();
    dump["certificates"][0]["certChain"] = json!([]);
    dump["certificates"][0]["state"] = json!("Unavailable");
    dump["certificates"][0]["problem"] = json!("Unauthenticated");
    let node = Server::tcp(&[("/config_dump", 200, dump.to_string())]);
    let answer = ask(&node, None, &["certs"]).await;
    assert_eq!(answer.exit, Exit::No);
    assert!(answer.text.contains("Unauthenticated"), "{}", answer.text);
}

#[tokio::test]
async fn a_name_that_nothing_has_exits_with_2_and_suggests() {
    let node = Server::tcp(&[("/config_dump", 200, dump().to_string())]);
    for (command, typo, meant) in [
        ("workloads", "shop/fronted-1", "shop/frontend-1"),
        ("services", "backned", "shop/backend"),
        ("policies", "only-fronted", "shop/only-frontend"),
    ] {
        let answer = ask(&node, None, &[command, typo]).await;
        assert_eq!(answer.exit, Exit::Usage, "{command}");
        assert!(answer.errors.contains(&format!("did you mean: {meant}?")), "{}", answer.errors);
    }
    let answer = ask(&node, None, &["workloads", "-n", "empty"]).await;
    assert_eq!((answer.exit, answer.text.as_str()), (Exit::Fine, "no workloads in namespace empty\n"));
}

fn explanation(verdict: Verdict) -> Explanation {
    let step = |stage, outcome, detail: &str, fix: Option<&str>| Step {
        stage,
        outcome,
        object: Some(Object::new("AuthorizationPolicy", "shop", "only-frontend")),
        detail: detail.into(),
        fix: fix.map(str::to_owned),
    };
    let denied = verdict == Verdict::Denied;
    let outcome = if denied { Outcome::Blocked } else { Outcome::Ok };
    Explanation {
        node: "n1".into(),
        source: Object::new("Workload", "shop", "client-1"),
        destination: Object::new("Service", "shop", "backend"),
        port: Some(80),
        verdict,
        path: Some(Way::Tunnel),
        summary: format!("client -> backend: {}", verdict.as_str()),
        decided_by: Some(Object::new("AuthorizationPolicy", "shop", "only-frontend")),
        fix: denied.then(|| "add the principal".into()),
        steps: vec![
            step(Stage::SourceEnrolment, Outcome::Warn, "leaves the mesh", Some("label it")),
            step(Stage::Policy, outcome, "no ALLOW policy matches", denied.then_some("add the principal")),
        ],
        source_is_local: true,
        destination_is_local: true,
    }
}

#[tokio::test]
async fn why_prints_the_verdict_what_decided_and_the_way_and_exits_by_the_verdict() {
    let path = "/why?src=shop%2Fclient&dst=shop%2Fbackend&port=80";
    let denied = Server::tcp(&[(path, 200, json!(explanation(Verdict::Denied)).to_string())]);
    let answer = ask(&denied, None, &["why", "shop/client", "shop/backend:80"]).await;
    let expected = "\
client -> backend: denied
decided by: AuthorizationPolicy shop/only-frontend
fix: add the principal

STAGE             OUTCOME  FOUND
source enrolment  warn     leaves the mesh
                           fix: label it
policy            blocked  no ALLOW policy matches

as seen by node n1
";
    assert_eq!((answer.exit, answer.text.as_str()), (Exit::No, expected), "{}", answer.errors);

    let allowed = Server::unix(&[(path, 200, json!(explanation(Verdict::Allowed)).to_string())]);
    let answer = ask(&allowed, None, &["why", "shop/client", "shop/backend:80"]).await;
    assert_eq!(answer.exit, Exit::Fine, "{}", answer.errors);
    let unreachable = Server::tcp(&[(path, 200, json!(explanation(Verdict::Unreachable)).to_string())]);
    let answer = ask(&unreachable, None, &["why", "shop/client", "shop/backend:80", "-o", "json"]).await;
    assert_eq!(answer.exit, Exit::No);
    assert_eq!(serde_json::from_str::<Explanation>(&answer.text).unwrap(), explanation(Verdict::Unreachable));
}

#[tokio::test]
async fn why_of_a_udp_port_says_that_the_mesh_has_no_part_in_it() {
    // Nobody is asked: nobody serves there.
    let nobody = Path::new("/nonexistent");
    let answer = meshctl(nobody, &["why", "shop/client", "shop/backend:5353/udp"]).await;
    assert_eq!(answer.exit, Exit::Fine);
    assert!(answer.text.contains("shop/backend:5353/udp: UDP other than DNS"), "{}", answer.text);
    let answer = meshctl(nobody, &["why", "shop/client", "shop/backend:53/udp", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!((json["captured"].as_bool(), json["protocol"].as_str()), (Some(true), Some("udp")));
}

#[tokio::test]
async fn what_no_node_covers_is_noted_once_and_nothing_stands_above_the_first_table() {
    let mut status = status();
    status.capture.not_covered = vec![UDP_NOT_COVERED.to_owned()];
    let status = json!(status).to_string();
    let nodes = [Server::tcp(&[("/status", 200, status.clone())]), Server::tcp(&[("/status", 200, status)])];
    let urls = format!("{},{}", nodes[0].url, nodes[1].url);
    let nowhere = "http://127.0.0.1:9";
    let args = ["status", "--node", &urls, "--control", nowhere];
    let answer = meshctl(Path::new("/nonexistent"), &args).await;
    assert_eq!(answer.text.matches(UDP_NOT_COVERED).count(), 1, "{}", answer.text);
    assert!(answer.text.starts_with("NODE "), "{}", answer.text);
}

#[tokio::test]
async fn why_with_a_name_that_means_nothing_exits_with_2_and_without_an_agent_with_3() {
    let error = NameError {
        role: "source".into(),
        name: "shop/clinet".into(),
        problem: "no workload has this name; give namespace/name".into(),
        suggestions: vec!["shop/client-1".into()],
    };
    let path = "/why?src=shop%2Fclinet&dst=shop%2Fbackend";
    let node = Server::tcp(&[(path, 404, json!(error).to_string())]);
    let answer = ask(&node, None, &["why", "shop/clinet", "shop/backend"]).await;
    assert_eq!(answer.exit, Exit::Usage);
    assert!(answer.errors.contains("did you mean: shop/client-1?"), "{}", answer.errors);

    let answer = ask(&node, None, &["why", "shop/client", "shop/backend:http"]).await;
    assert_eq!(answer.exit, Exit::Usage, "a bad port is told before anybody is asked");
    assert!(answer.errors.contains("\"http\" is no port"), "{}", answer.errors);

    let answer = meshctl(Path::new("/nonexistent"), &["--node", "http://127.0.0.1:1", "why", "a", "b"]).await;
    assert_eq!(answer.exit, Exit::Unreachable, "{}", answer.errors);
}

#[tokio::test]
async fn doctor_shows_costs_and_fixes_and_exits_with_1_when_something_is_missing() {
    let probe = |name: &str, state, fix: &str| Probe {
        name: name.into(),
        state,
        detail: "found".into(),
        cost: "speed".into(),
        fix: fix.into(),
    };
    for (worst, exit) in [(Fitness::Degraded, Exit::Fine), (Fitness::Missing, Exit::No)] {
        let probes = vec![
            probe("cgroup2", Fitness::Ok, ""),
            probe("sock_destroy", worst, "enable CONFIG_INET_DIAG_DESTROY"),
        ];
        let node = Server::tcp(&[("/doctor", 200, json!(probes).to_string())]);
        let answer = ask(&node, None, &["doctor"]).await;
        assert_eq!(answer.exit, exit, "{}", answer.text);
        assert!(answer.text.contains("fix: enable CONFIG_INET_DIAG_DESTROY"), "{}", answer.text);
        assert_eq!(answer.text.matches("costs:").count(), 1, "what works costs nothing:\n{}", answer.text);
    }
}

#[tokio::test]
async fn version_asks_everybody_unless_only_the_client_is_wanted() {
    let (node, control) = (Server::tcp(&[("/status", 200, json!(status()).to_string())]), healthy_control());
    let answer = ask(&node, Some(&control), &["version"]).await;
    assert_eq!(answer.exit, Exit::Fine, "{}", answer.errors);
    for component in ["meshctl", "mesh-node", "mesh-control"] {
        assert!(answer.text.contains(component), "{}", answer.text);
    }
    let alone = ["--node", "http://127.0.0.1:1", "version", "--client"];
    let answer = meshctl(Path::new("/nonexistent"), &alone).await;
    assert_eq!((answer.exit, answer.text.lines().count()), (Exit::Fine, 2), "{}", answer.text);
}

#[tokio::test]
async fn sockets_of_this_machine_are_found_without_being_named() {
    let node = Server::unix(&[("/config_dump", 200, dump().to_string())]);
    let run_dir = node.socket.as_ref().unwrap().parent().unwrap();
    let answer = meshctl(run_dir, &["workloads"]).await;
    assert_eq!((answer.exit, answer.text.lines().count()), (Exit::Fine, 3), "{}", answer.errors);
}

#[test]
fn the_program_itself_exits_with_those_codes_and_writes_no_colour_into_a_pipe() {
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_meshctl"));
        command.env_remove("UM_NODE_ADMIN").env_remove("UM_CONTROL");
        command.args(args).output().unwrap()
    };
    let typo = run(&["statsu"]);
    assert_eq!(typo.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&typo.stderr).contains("'status'"));
    assert_eq!(run(&["--node", "http://127.0.0.1:1", "workloads"]).status.code(), Some(3));
    let version = run(&["version", "--client"]);
    assert_eq!(version.status.code(), Some(0));
    assert!(!version.stdout.contains(&0x1b));
    let completion = run(&["completion", "bash"]);
    assert_eq!(completion.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&completion.stdout).contains("_meshctl"));
}
