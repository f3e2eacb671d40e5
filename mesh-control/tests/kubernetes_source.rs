//! The control plane on a real API server, with exactly the rights that it is given in a cluster.

mod apiserver;

use apiserver::{ApiServer, Control, GATEWAY_API, ISTIO, RBAC, until};

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: front, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: front-1, namespace: shop, labels: {app: front}}
spec:
  nodeName: n1
  serviceAccountName: front
  containers: [{name: c, image: none}]
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec: {selector: {app: front}, ports: [{port: 80}]}
";

const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [other]}}]}]}
";

struct Cluster {
    server: ApiServer,
}

impl Cluster {
    fn start() -> Option<Self> {
        let server = ApiServer::start()?;
        server.apply(RBAC);
        Some(Self { server })
    }

    fn control(&self, name: &str) -> Control {
        let kubeconfig = self.server.kubeconfig_of("istio-system", "undermesh-control");
        Control::start(&self.server, name, &kubeconfig, &[])
    }
}

fn objects(control: &Control, kind: &str) -> Vec<String> {
    let all = control.json("/debug/objects");
    let names = all[kind].as_array().cloned().unwrap_or_default();
    names.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect()
}

#[test]
fn a_cluster_is_read_and_followed_and_kinds_may_come_and_go() {
    let Some(cluster) = Cluster::start() else { return };
    let server = &cluster.server;
    server.apply(SHOP);
    server.set_status("pod", "shop", "front-1", r#"{"podIP":"10.1.0.7","podIPs":[{"ip":"10.1.0.7"}],"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}"#);
    let control = cluster.control("a");
    control.wait_ready();
    assert_eq!(objects(&control, "Pod"), ["shop/front-1"]);
    assert!(objects(&control, "AuthorizationPolicy").is_empty());
    let dump = control.get("/debug/config_dump").unwrap().1;
    assert!(dump.contains("10.1.0.7"), "{dump}");

    if !server.install_crds(&[ISTIO, GATEWAY_API]) {
        return;
    }
    server.apply(POLICY);
    until("the policy of a kind that came later is in force", || {
        objects(&control, "AuthorizationPolicy") == ["shop/p"]
    });
    server.text(&["delete", "pod", "-n", "shop", "front-1", "--grace-period=0", "--force"]);
    until("the pod is gone", || objects(&control, "Pod").is_empty());
    server.text(&["delete", "crd", "authorizationpolicies.security.istio.io"]);
    until("the policy is gone with its kind", || objects(&control, "AuthorizationPolicy").is_empty());
}

#[test]
fn who_may_not_read_a_kind_is_not_ready_and_says_which_and_why() {
    let Some(cluster) = Cluster::start() else { return };
    let less = RBAC.replace("endpointslices", "endpointslices-not");
    assert_ne!(less, RBAC);
    cluster.server.apply(&less);
    let control = cluster.control("a");
    let unready = || control.get("/ready").filter(|(status, _)| *status == 503).map(|(_, body)| body);
    until("it says what it may not read", || {
        unready().is_some_and(|body| body.contains("EndpointSlice: ") && body.contains("is forbidden"))
    });
    let body = unready().unwrap_or_default();
    until("it waits for nothing else", || unready().is_some_and(|body| body.lines().count() == 2));
    assert!(body.contains("undermesh-control"), "whose rights are missing is not said: {body}");
    cluster.server.apply(RBAC);
    control.wait_ready();
}

#[test]
fn what_is_known_stays_while_the_api_server_and_etcd_are_away() {
    let Some(mut cluster) = Cluster::start() else { return };
    cluster.server.apply(SHOP);
    let control = cluster.control("a");
    control.wait_ready();
    cluster.server.stop_api();
    cluster.server.stop_etcd();
    until("the control plane noticed", || control.logged().contains("cannot be watched"));
    assert_eq!(objects(&control, "Pod"), ["shop/front-1"]);
    assert_eq!(control.get("/ready").unwrap().0, 200);
    cluster.server.start_etcd();
    cluster.server.start_api();
    cluster.server.apply(&SHOP.replace("front-1", "front-2"));
    until("it follows again", || objects(&control, "Pod") == ["shop/front-1", "shop/front-2"]);
}

#[test]
fn a_watch_that_has_expired_is_started_over_and_misses_nothing() {
    let Some(mut cluster) = Cluster::start() else { return };
    cluster.server.apply(SHOP);
    let control = cluster.control("a");
    control.wait_ready();
    // Deaf, and with nothing left to read, while objects come and go and the versions that it knows are thrown away.
    control.signal("STOP");
    cluster.server.stop_api();
    cluster.server.start_api();
    cluster.server.apply(&SHOP.replace("front-1", "front-2"));
    cluster.server.text(&["delete", "pod", "-n", "shop", "front-1", "--grace-period=0", "--force"]);
    cluster.server.compact();
    // An API server that starts remembers no more than etcd does.
    cluster.server.stop_api();
    cluster.server.start_api();
    control.signal("CONT");
    until("what came is there, and what went is not", || objects(&control, "Pod") == ["shop/front-2"]);
    // The API server answers 200, then tells in the stream; none of its watches has ended for another reason yet.
    let old =
        cluster.server.text(&["get", "--raw", "/api/v1/pods?watch=1&resourceVersion=1&timeoutSeconds=5"]);
    assert!(old.contains("\"code\":410"), "old versions are still known: {old}");
    let metrics = cluster.server.text(&["get", "--raw", "/metrics"]);
    let of_pods = ["apiserver_request_total{", "resource=\"pods\"", "verb=\"WATCH\""];
    let ended = metrics.lines().find(|line| of_pods.iter().all(|part| line.contains(part)));
    let ended = ended.and_then(|line| line.rsplit_once(' ')?.1.parse::<u32>().ok());
    assert!(ended >= Some(2), "the control plane's watch of pods has not expired: {ended:?}");
    cluster.server.apply(&SHOP.replace("front-1", "front-3"));
    until("it follows again", || objects(&control, "Pod") == ["shop/front-2", "shop/front-3"]);
}

#[test]
fn two_replicas_agree_on_the_ca_and_one_of_them_hands_out_its_roots() {
    let Some(cluster) = Cluster::start() else { return };
    let server = &cluster.server;
    server.apply(SHOP);
    let (a, b) = (cluster.control("a"), cluster.control("b"));
    a.wait_ready();
    b.wait_ready();
    let root = |control: &Control| std::fs::read_to_string(control.state.join("root-cert.pem")).unwrap();
    assert_eq!(root(&a), root(&b));
    let handed = |namespace: &str| {
        let map = server.get(&["configmap", "istio-ca-root-cert", "-n", namespace]);
        let label = map["metadata"]["labels"]["istio.io/config"].as_str() == Some("true");
        label.then(|| map["data"]["root-cert.pem"].as_str().unwrap_or_default().to_owned())
    };
    until("every namespace has the roots", || {
        ["shop", "istio-system", "kube-system", "default"].iter().all(|n| handed(n) == Some(root(&a)))
    });
    assert_eq!(handed("kube-public"), None);
    server.text(&["delete", "configmap", "-n", "shop", "istio-ca-root-cert"]);
    until("a deleted one is back", || handed("shop") == Some(root(&a)));
    server.text(&["label", "configmap", "-n", "shop", "istio-ca-root-cert", "istio.io/config-"]);
    until("a spoilt one is right", || handed("shop") == Some(root(&a)));
    // The one that leads gives the lease back, and the other one goes on.
    let holder =
        || server.get(&["lease", "undermesh-leader", "-n", "istio-system"])["spec"]["holderIdentity"].clone();
    let first = holder();
    let (leads, other) = if first == "a" { (a, b) } else { (b, a) };
    leads.stop();
    until("the other one leads", || holder() != first && holder().as_str().is_some_and(|h| !h.is_empty()));
    server.apply("{apiVersion: v1, kind: Namespace, metadata: {name: late}}");
    until("a new namespace has the roots", || handed("late") == Some(root(&other)));
}

#[test]
fn a_ca_that_is_plugged_in_is_taken_over_and_one_that_vanishes_is_not_replaced() {
    let Some(cluster) = Cluster::start() else { return };
    let server = &cluster.server;
    let control = cluster.control("a");
    control.wait_ready();
    let root = || std::fs::read_to_string(control.state.join("root-cert.pem")).unwrap();
    let own = root();
    let (cert, key) = apiserver::pki::root("somebody's");
    for (name, text) in
        [("ca-cert.pem", &cert), ("ca-key.pem", &key), ("root-cert.pem", &format!("{cert}{own}"))]
    {
        std::fs::write(server.dir.path().join(name), text).unwrap();
    }
    let file = |name: &str| format!("--from-file={}", server.dir.path().join(name).display());
    let files = ["ca-cert.pem", "ca-key.pem", "root-cert.pem"].map(file);
    let mut create = vec!["create", "secret", "generic", "cacerts", "-n", "istio-system"];
    create.extend(files.iter().map(String::as_str));
    server.text(&create);
    until("both roots are trusted", || root().matches("BEGIN CERTIFICATE").count() == 2);
    until("every namespace is told", || {
        let map = server.get(&["configmap", "istio-ca-root-cert", "-n", "default"]);
        map["data"]["root-cert.pem"].as_str().is_some_and(|held| held == root())
    });
    let both = root();
    server.text(&["delete", "secret", "-n", "istio-system", "cacerts", "istio-ca-secret"]);
    until("it is reported", || control.logged().contains("restore istio-ca-secret"));
    assert_eq!(root(), both);
    assert!(server.get(&["secret", "istio-ca-secret", "-n", "istio-system"]).is_null(), "no new CA was made");
}

#[test]
fn an_object_that_became_wrong_keeps_its_last_good_version() {
    let Some(cluster) = Cluster::start() else { return };
    let server = &cluster.server;
    if !server.install_crds(&[ISTIO]) {
        return;
    }
    server.apply(SHOP);
    server.apply(POLICY);
    let control = cluster.control("a");
    control.wait_ready();
    assert_eq!(objects(&control, "AuthorizationPolicy"), ["shop/p"]);
    // What the definition's schema cannot see.
    server.apply(&POLICY.replace("{source: {namespaces: [other]}}", "{source: {ipBlocks: [10.0.0.0/99]}}"));
    until("it is reported", || control.json("/debug/errors").as_array().is_some_and(|e| !e.is_empty()));
    let errors = control.json("/debug/errors");
    assert_eq!(errors[0]["field"], "spec.rules[0].from[0].source.ipBlocks[0]");
    assert_eq!(errors[0]["consequence"], "its last good version stays in force");
    let dump = control.get("/debug/config_dump").unwrap().1;
    assert!(dump.contains("other"), "{dump}");
    // Whoever has a kubeconfig asks the same question.
    let asked = std::process::Command::new(env!("CARGO_BIN_EXE_mesh-control"))
        .args(["check", "kubernetes:test"])
        .env("KUBECONFIG", server.kubeconfig())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&asked.stdout).into_owned();
    assert_eq!(asked.status.code(), Some(1), "{text}");
    assert!(
        text.contains(
            "error [Invalid] AuthorizationPolicy shop/p: spec.rules[0].from[0].source.ipBlocks[0]: "
        ),
        "{text}"
    );
}
