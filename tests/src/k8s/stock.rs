//! A node of the cluster whose pods stock ztunnel carries, beside nodes of ours. Its binary is not part of the project:
//! `UM_ZTUNNEL` names one, and without it the scenario is skipped. What Istio's CNI agent does on such a node (rules in the
//! pods, their namespaces over ZDS, the annotation) is done from here: that agent is no part of this cluster.

use super::mesh::between;
use super::node::agents;
use super::pods;
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::capture::carries;
use crate::bed::{netns, wait};
use crate::peer::{redirect, zds};
use crate::scenarios::skip;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[scenario(
    "a stock ztunnel takes a node of the cluster, and its pods and ours meet over mutual TLS and under policies",
    300,
    beside,
)];

const PATIENCE: Duration = Duration::from_secs(60);
/// Service account and name of its pod: the chart's control plane trusts this account with the identities of a node.
const ZTUNNEL: &str = "ztunnel";

/// ztunnel in a pod of a node that has no agent of ours. Everything is as before on drop.
struct Stock<'a> {
    bed: &'a Bed,
    dir: PathBuf,
    held: Option<zds::Connection>,
}

impl<'a> Stock<'a> {
    fn start(bed: &'a Bed, node: &str, binary: &Path) -> Result<Self> {
        let dir = bed.layout()?.path(ZTUNNEL);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        std::fs::copy(binary, dir.join(ZTUNNEL))
            .with_context(|| format!("cannot copy {}", binary.display()))?;
        let listener = zds::Listener::bind(&dir.join("zds.sock"))?;
        let mut stock = Self { bed, dir, held: None };
        let others: Vec<String> = bed.nodes.iter().filter(|name| *name != node).cloned().collect();
        agents(bed, &others)?;
        bed.kubectl.apply(&stock.objects(node))?;
        stock.held = Some(listener.hand_over(&[], PATIENCE)?);
        let ready = ["--namespace", SYSTEM, "wait", "--for=condition=Ready", "--timeout=60s", "pod/ztunnel"];
        bed.kubectl.run(&ready)?;
        Ok(stock)
    }

    fn objects(&self, node: &str) -> String {
        let image = pods::IMAGE;
        let env: String = [
            ("PROXY_MODE", "shared"),
            ("INPOD_UDS", "/ztunnel/zds.sock"),
            ("XDS_ADDRESS", "https://istiod.istio-system.svc:15012"),
            ("CA_ADDRESS", "https://istiod.istio-system.svc:15012"),
            ("XDS_ROOT_CA", "/var/run/secrets/istio/root-cert.pem"),
            ("CA_ROOT_CA", "/var/run/secrets/istio/root-cert.pem"),
            ("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token"),
            ("CLUSTER_ID", "Kubernetes"),
            ("POD_NAMESPACE", SYSTEM),
            ("POD_NAME", ZTUNNEL),
            ("NODE_NAME", node),
        ]
        .iter()
        .map(|(name, value)| format!("    - {{name: {name}, value: \"{value}\"}}\n"))
        .collect();
        format!(
            "
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {ZTUNNEL}, namespace: {SYSTEM}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {ZTUNNEL}, namespace: {SYSTEM}, labels: {{app: {ZTUNNEL}, istio.io/dataplane-mode: none}}}}
spec:
  serviceAccountName: {ZTUNNEL}
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 1
  containers:
  - name: {ZTUNNEL}
    image: {image}
    imagePullPolicy: IfNotPresent
    command: [/ztunnel/ztunnel, proxy, ztunnel]
    securityContext: {{privileged: true, runAsUser: 0}}
    env:
    - {{name: INSTANCE_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
{env}    readinessProbe: {{httpGet: {{path: /healthz/ready, port: 15021}}, periodSeconds: 1}}
    volumeMounts:
    - {{name: own, mountPath: /ztunnel}}
    - {{name: root, mountPath: /var/run/secrets/istio}}
    - {{name: token, mountPath: /var/run/secrets/tokens}}
  volumes:
  - {{name: own, hostPath: {{path: {}}}}}
  - {{name: root, configMap: {{name: istio-ca-root-cert}}}}
  - name: token
    projected: {{sources: [{{serviceAccountToken: {{audience: istio-ca, path: istio-token}}}}]}}
",
            self.dir.display()
        )
    }

    /// Takes a running pod, as Istio's CNI agent does.
    fn take(&self, space: &Space<'_>, pod: &str) -> Result<()> {
        let object = space.get("pod", pod)?;
        let uid = object["metadata"]["uid"].as_str().context("a pod without uid")?;
        let netns = namespace_of(uid)?;
        let inside = |argv: &[&str]| {
            let place = format!("--net={}", netns.display());
            netns::command("nsenter", [place.as_str()].into_iter().chain(argv.iter().copied()))
        };
        let rules = self.dir.join("rules.nft");
        std::fs::write(&rules, redirect::nft_script()).context("cannot write the rules")?;
        inside(&["nft", "-f", &rules.to_string_lossy()])?;
        for command in redirect::ip_commands() {
            let words = command.iter().map(String::as_str);
            inside(&["ip"].into_iter().chain(words).collect::<Vec<_>>())?;
        }
        let account = object["spec"]["serviceAccountName"].as_str().unwrap_or("default");
        let told = zds::Pod {
            uid: uid.to_owned(),
            name: pod.to_owned(),
            namespace: space.name().to_owned(),
            service_account: account.to_owned(),
            netns,
        };
        self.held.as_ref().context("no ztunnel")?.add(&told, PATIENCE)?;
        space.kubectl(&["annotate", "pod", pod, "ambient.istio.io/redirection=enabled"]).map(drop)
    }

    fn log(&self) -> String {
        let log = self.bed.kubectl.run(&["--namespace", SYSTEM, "logs", ZTUNNEL]);
        log.unwrap_or_else(|error| format!("{error:#}"))
    }
}

impl Drop for Stock<'_> {
    fn drop(&mut self) {
        for object in ["pod/ztunnel", "serviceaccount/ztunnel"] {
            let _ = self.bed.kubectl.run(&["--namespace", SYSTEM, "delete", object, "--ignore-not-found"]);
        }
        if let Err(error) = agents(self.bed, &self.bed.nodes) {
            eprintln!("warning: a node has no agent: {error:#}");
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The network namespace of a pod, by one of its processes.
fn namespace_of(uid: &str) -> Result<PathBuf> {
    let mark = format!("pod{uid}");
    for process in std::fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
        let path = process.path();
        if std::fs::read_to_string(path.join("cgroup")).is_ok_and(|text| text.contains(&mark)) {
            return Ok(path.join("ns/net"));
        }
    }
    bail!("no process of the pod with uid {uid}")
}

/// On each node a server, a friend and a stranger; the server lets friends in.
fn shop(bed: &Bed, space: &Space<'_>) -> Result<()> {
    let labelled = |pod: String, account: &str| {
        pod.replace("spec:\n", &format!("spec:\n  serviceAccountName: {account}\n"))
    };
    let enrolled = |pod: String| pod.replace("labels: {", "labels: {istio.io/dataplane-mode: ambient, ");
    // Without probes: Istio's CNI agent tells those of the kubelet apart, and it is not here.
    let server = |name: &str, node: &str| {
        let argv = ["mesh-tests", "tool", "web", "--name", name, "--port", pods::PORT];
        pods::pod(name, node, &argv)
    };
    let mut objects = Vec::new();
    for account in ["server", "friend", "stranger"] {
        objects.push(format!("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}}}\n"));
    }
    for (side, node) in [("our", &bed.nodes[0]), ("their", &bed.nodes[1])] {
        let made = [
            labelled(server(&format!("{side}-server"), node), "server"),
            labelled(pods::client(&format!("{side}-friend"), node), "friend"),
            labelled(pods::client(&format!("{side}-stranger"), node), "stranger"),
        ];
        objects.extend(made.into_iter().map(|pod| if side == "our" { enrolled(pod) } else { pod }));
        objects.push(pods::service(&format!("{side}-server")));
    }
    space.apply(&objects.concat())?;
    space.wait_ready(&PODS)?;
    space.wait_captured(&PODS[..3], true)
}

const PODS: [&str; 6] =
    ["our-server", "our-friend", "our-stranger", "their-server", "their-friend", "their-stranger"];

/// From whom to whom, across the pair of nodes.
const ACROSS: [(&str, &str); 2] = [("our", "their"), ("their", "our")];

fn beside(bed: &Bed) -> Result<()> {
    let binary = std::env::var_os("UM_ZTUNNEL").filter(|path| !path.is_empty());
    let binary = binary.ok_or_else(|| skip("no stock ztunnel binary: set UM_ZTUNNEL to one"))?;
    bed.layout()?;
    bed.mesh()?;
    let stock = Stock::start(bed, &bed.nodes[1], Path::new(&binary))?;
    met(bed, &stock).map_err(|error| error.context(format!("ztunnel says: {}", stock.log())))
}

fn met(bed: &Bed, stock: &Stock<'_>) -> Result<()> {
    let space = bed.space(&[])?;
    shop(bed, &space)?;
    for pod in &PODS[3..] {
        stock.take(&space, pod)?;
    }
    space.wait_captured(&PODS, true)?;
    for (from, to) in ACROSS {
        hidden(bed, &space, &format!("{from}-friend"), &format!("{to}-server"))?;
    }
    let log = stock.log();
    for account in ["friend", "server"] {
        let identity = format!("spiffe://cluster.local/ns/{}/sa/{account}", space.name());
        ensure!(log.contains(&identity), "ztunnel's access log does not name {identity}");
    }
    policies(bed, &space)
}

/// By address and by name, with the client's own address, and nothing readable or beside the tunnel between the nodes.
fn hidden(bed: &Bed, space: &Space<'_>, client: &str, server: &str) -> Result<()> {
    let (own, at) = (space.address(client)?, space.server(server)?);
    let tunnel = format!("{}:15008", at.ip());
    wait::until_true(&format!("tunnel from {client} to {server}"), PATIENCE, || {
        let _ = space.curl(client, &format!("http://{at}/poll"));
        Ok(space.exec(client, &["ss", "-Htn", "state", "established"])?.contains(&tunnel))
    })?;
    let capture = bed.capture(&bed.nodes[0])?;
    let answer = space.curl(client, &format!("http://{at}/secret-words"))?;
    ensure!(answer.contains(&own.to_string()), "{server} saw somebody else than {own}: {answer}");
    let answer = space.curl(client, &format!("http://{server}/secret-words"))?;
    ensure!(answer.contains(server), "the service of {server} is answered by another: {answer}");
    let segments = capture.stop()?;
    ensure!(!carries(&segments, b"secret-words"), "{client} to {server} is readable between the nodes");
    let seen = between(&segments, own, at.ip());
    ensure!(!seen.is_empty(), "the capture shows no packet between {client} and {server}");
    let beside = seen.iter().find(|segment| segment.from.port() != 15008 && segment.to.port() != 15008);
    ensure!(beside.is_none(), "a packet beside the tunnel: {beside:?}");
    Ok(())
}

/// Each lets in whom the other vouches for, and nobody in plain text once that is forbidden.
fn policies(bed: &Bed, space: &Space<'_>) -> Result<()> {
    let outside = bed.space(&[])?;
    outside.apply(&pods::client("client", &bed.nodes[0]))?;
    outside.wait_ready(&["client"])?;
    let url = |side: &str| anyhow::Ok(format!("http://{}/", space.server(&format!("{side}-server"))?));
    for side in ["our", "their"] {
        outside.curl("client", &url(side)?).with_context(|| format!("{side} server refuses plain text"))?;
    }
    space.apply(&format!(
        "{}---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: friends}}
spec:
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/{}/sa/friend]}}}}]
",
        super::mesh::STRICT,
        space.name()
    ))?;
    for (from, to) in ACROSS {
        let (friend, stranger, url) = (format!("{from}-friend"), format!("{from}-stranger"), url(to)?);
        wait::until_true(&format!("answer for {friend} and none for {stranger}"), PATIENCE, || {
            Ok(space.curl(&friend, &url).is_ok() && space.curl(&stranger, &url).is_err())
        })?;
        for _ in 0..5 {
            space.curl(&friend, &url)?;
            ensure!(space.curl(&stranger, &url).is_err(), "{stranger} got an answer of the {to} server");
        }
        ensure!(
            outside.curl("client", &url).is_err(),
            "the {to} server takes plain text, which STRICT forbids"
        );
    }
    Ok(())
}
