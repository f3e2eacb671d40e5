//! Who sees which events of connections, decided by the RBAC of a real API server.

mod apiserver;

use std::process::Command;
use std::time::Duration;

use apiserver::{ApiServer, Control, RBAC, free_port, until};
use mesh_core::flows::{self, Flow, Party};
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::node::FlowReport;
use mesh_core::xds::proto::node::node_service_client::NodeServiceClient;

const OBJECTS: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: bank}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: undermesh-node, namespace: istio-system}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: operator, namespace: istio-system}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: jane, namespace: shop}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: nobody, namespace: shop}}
---
apiVersion: v1
kind: Pod
metadata: {name: agent-1, namespace: istio-system}
spec: {nodeName: n1, serviceAccountName: undermesh-node, containers: [{name: c, image: none}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: logs}
rules: [{apiGroups: [''], resources: [pods/log], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: operator-logs}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: logs}
subjects: [{kind: ServiceAccount, name: operator, namespace: istio-system}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: jane-logs, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: logs}
subjects: [{kind: ServiceAccount, name: jane, namespace: shop}]
";

/// As many events as there are pairs, in their order.
fn events(node: &str, pairs: &[(&str, &str)]) -> Vec<u8> {
    let party = |namespace: &&str| Party { namespace: (*namespace).to_owned(), ..Party::default() };
    let flow = |(number, (from, to)): (u64, &(&str, &str))| Flow {
        seq: number,
        at_us: number,
        node: node.to_owned(),
        source: party(from),
        destination: party(to),
        ..Flow::default()
    };
    flows::lines(&(1..).zip(pairs).map(flow).collect::<Vec<_>>())
}

/// Sends one report as a node's agent, and waits for the end of the stream or for a moment.
async fn report(control: &Control, token: &str, report: FlowReport) -> Result<u32, tonic::Status> {
    let server = ControlPlane {
        address: format!("https://127.0.0.1:{}", control.tls),
        root_cert: Some(control.state.join("root-cert.pem")),
        server_name: Some("istiod.istio-system.svc".into()),
        ..ControlPlane::default()
    };
    let channel = server.connect().await.expect("a connection");
    let mut request = tonic::Request::new(tokio_stream::iter([report]));
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a header"));
    let mut demands = NodeServiceClient::new(channel).report_flows(request).await?.into_inner();
    let wanted = demands.message().await?.map_or(0, |demand| demand.per_second);
    while demands.message().await?.is_some() {}
    Ok(wanted)
}

/// What curl gets: status and body.
fn curl(control: &Control, url: &str, token: Option<&str>) -> (String, String) {
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "10", "-w", "\n%{http_code}", "--cacert"]);
    command.arg(control.state.join("root-cert.pem"));
    if let Some(token) = token {
        command.args(["-H", &format!("Authorization: Bearer {token}")]);
    }
    let output = command.arg(url).output().expect("curl runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or_default();
    let errors = String::from_utf8_lossy(&output.stderr);
    (status.to_owned(), format!("{body}{errors}"))
}

/// What agents say is not sorted by namespaces.
fn only_who_sees_everything_asks_agents(control: &Control, base: &str, jane: &str, operator: &str) {
    for (path, token, status, why) in [
        ("/nodes", None, "401", "kubectl create token"),
        ("/nodes", Some(jane), "403", "may not get pods/log in all namespaces"),
        ("/nodes/n1/config_dump", Some(jane), "403", "may not get pods/log in all namespaces"),
        ("/nodes", Some(operator), "200", "[]"),
        ("/nodes/n1/status", Some(operator), "404", "connected are: none"),
    ] {
        let (got, body) = curl(control, &format!("{base}{path}"), token);
        assert!(got == status && body.contains(why), "{path} {token:?}: {got} {body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_get_logs_of_a_namespace_sees_its_events_and_no_others() {
    let Some(server) = ApiServer::start() else { return };
    server.apply(RBAC);
    server.apply(OBJECTS);
    let kubeconfig = server.kubeconfig_of("istio-system", "undermesh-control");
    let relay = free_port();
    let control = Control::start(&server, "a", &kubeconfig, &[&format!("--listen-relay=127.0.0.1:{relay}")]);
    control.wait_ready();
    let token = |account: &str, namespace: &str| {
        server.text(&["create", "token", account, "-n", namespace]).trim().to_owned()
    };
    let agent = server.text(&[
        "create",
        "token",
        "undermesh-node",
        "-n",
        "istio-system",
        "--audience",
        "istio-ca",
        "--bound-object-kind",
        "Pod",
        "--bound-object-name",
        "agent-1",
    ]);
    let pairs = [("shop", "shop"), ("shop", "bank"), ("bank", "shop"), ("bank", "bank"), ("", "")];
    let sent = |node: &str, events: Vec<u8>| FlowReport { node: node.into(), events, held_back: 7, lost: 0 };
    assert_eq!(report(&control, agent.trim(), sent("n1", events("n1", &pairs))).await.unwrap(), 500);

    // Agents tell of their own node only, and nobody else tells.
    for (report_, code, why) in [
        (sent("n2", Vec::new()), tonic::Code::PermissionDenied, "tells of itself only"),
        (sent("n1", events("n2", &pairs)), tonic::Code::InvalidArgument, "line 1: node \"n2\""),
        (sent("n1", b"{]".to_vec()), tonic::Code::InvalidArgument, "events: line 1"),
    ] {
        let status = report(&control, agent.trim(), report_).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(why), "{status}");
    }
    let jane = token("jane", "shop");
    let status = report(&control, &jane, sent("n1", Vec::new())).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unauthenticated, "{status}");

    let secure = format!("https://localhost:{relay}");
    let local = format!("http://localhost:{}", control.debug);
    let seen = |base: &str, token: &str, query: &str| {
        let (status, body) = curl(&control, &format!("{base}/flows?last=100{query}"), Some(token));
        assert_eq!(status, "200", "{body}");
        let (flows, mark) = flows::parse(body.as_bytes()).expect("an answer");
        assert_eq!(mark.held_back, 7);
        flows.iter().map(|flow| flow.seq).collect::<Vec<_>>()
    };
    let (operator, nobody) = (token("operator", "istio-system"), token("nobody", "shop"));
    for base in [&secure, &local] {
        assert_eq!(seen(base, &operator, ""), [1, 2, 3, 4, 5]);
        assert_eq!(seen(base, &jane, ""), [1, 2, 3]);
        assert_eq!(seen(base, &jane, "&namespace=shop"), [1, 2, 3]);
        assert_eq!(seen(base, &nobody, ""), [] as [u64; 0]);
        for (query, token, status, why) in [
            ("", None, "401", "kubectl create token"),
            ("", Some("x.y.z"), "401", "refused"),
            ("", Some(agent.trim()), "401", "refused"),
            (
                "?namespace=bank",
                Some(&*jane),
                "403",
                "system:serviceaccount:shop:jane may not get pods/log in namespace bank",
            ),
        ] {
            let (got, body) = curl(&control, &format!("{base}/flows{query}"), token);
            assert!(got == status && body.contains(why), "{query} {token:?}: {got} {body}");
        }
        only_who_sees_everything_asks_agents(&control, base, &jane, &operator);
    }

    // A right that is taken away is gone, once what was remembered of it has ended.
    server.text(&["delete", "rolebinding", "-n", "shop", "jane-logs"]);
    tokio::task::block_in_place(|| {
        until("the right is gone", || {
            std::thread::sleep(Duration::from_secs(1));
            seen(&secure, &jane, "").is_empty()
        });
    });
}
