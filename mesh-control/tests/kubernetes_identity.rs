//! Who gets which certificate, with tokens that a real API server signed and checks.

mod apiserver;

use std::path::PathBuf;
use std::time::Duration;

use apiserver::{ApiServer, Control, RBAC, until};
use mesh_core::identity::SpiffeId;
use mesh_core::tls::certificate::WorkloadCertificate;
use mesh_core::tls::crl::Revocations;
use mesh_core::tls::key::KeyAndCsr;
use mesh_core::xds::ca::{CaClient, CaError};
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::node::node_service_client::NodeServiceClient;
use mesh_core::xds::proto::node::{EnrolledPod, EnrolmentReport};

const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: undermesh-node, namespace: istio-system}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: front, namespace: shop}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: waypoint, namespace: shop}}
---
apiVersion: v1
kind: Pod
metadata: {name: agent-1, namespace: istio-system}
spec: {nodeName: n1, serviceAccountName: undermesh-node, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent-2, namespace: istio-system}
spec: {nodeName: n2, serviceAccountName: undermesh-node, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front-1, namespace: shop}
spec: {nodeName: n1, serviceAccountName: front, containers: [{name: c, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: waypoint-1, namespace: shop}
spec: {nodeName: n1, serviceAccountName: waypoint, containers: [{name: c, image: none}]}
";

/// A token as the kubelet would project it.
fn token(server: &ApiServer, namespace: &str, account: &str, pod: &str, audience: &str) -> PathBuf {
    let mut args = vec!["create", "token", account, "-n", namespace, "--audience", audience];
    if !pod.is_empty() {
        args.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
    }
    let path = server.dir.path().join(format!("token-{account}-{pod}-{audience}"));
    std::fs::write(&path, server.text(&args).trim()).expect("the token is written");
    path
}

fn secured(control: &Control, token: PathBuf) -> ControlPlane {
    ControlPlane {
        address: format!("https://127.0.0.1:{}", control.tls),
        root_cert: Some(control.state.join("root-cert.pem")),
        server_name: Some("istiod.istio-system.svc".into()),
        token: Some(token),
        cluster_id: "Kubernetes".into(),
        headers: Vec::new(),
        again: Default::default(),
    }
}

async fn ask(control: &Control, token: PathBuf, wanted: &SpiffeId) -> Result<WorkloadCertificate, CaError> {
    let key = KeyAndCsr::generate(wanted).expect("a key");
    let client = CaClient::new(secured(control, token));
    let chain = client.sign(key.csr_pem(), wanted, Duration::from_secs(3600)).await?;
    Ok(WorkloadCertificate::new(key, &chain, &Revocations::default()).expect("a certificate"))
}

async fn report(control: &Control, token: PathBuf, node: &str) -> Result<(), tonic::Status> {
    let channel = secured(control, token.clone()).connect().await.expect("a connection");
    let text = std::fs::read_to_string(token).expect("a token");
    let pod = EnrolledPod { workload_uid: "Kubernetes//Pod/shop/front-1".into(), ..EnrolledPod::default() };
    let report = EnrolmentReport { node: node.into(), pods: vec![pod] };
    let mut request = tonic::Request::new(tokio_stream::iter([report]));
    request.metadata_mut().insert("authorization", format!("Bearer {text}").parse().expect("a header"));
    let mut answers = NodeServiceClient::new(channel).report_enrolment(request).await?.into_inner();
    // What the node is told of its own pods comes in between.
    while answers.message().await?.is_some_and(|answer| answer.assigns) {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_for_pods_of_the_agents_node_and_for_nobody_elses() {
    let Some(server) = ApiServer::start() else { return };
    server.apply(RBAC);
    server.apply(PODS);
    let kubeconfig = server.kubeconfig_of("istio-system", "undermesh-control");
    let control = Control::start(&server, "a", &kubeconfig, &[]);
    control.wait_ready();
    let of = |namespace, account, pod, audience| token(&server, namespace, account, pod, audience);
    let agent = |pod| of("istio-system", "undermesh-node", pod, "istio-ca");
    let front = SpiffeId::new("cluster.local", "shop", "front");
    let waypoint = SpiffeId::new("cluster.local", "shop", "waypoint");

    assert_eq!(ask(&control, agent("agent-1"), &front).await.unwrap().identity(), &front);
    let own = of("shop", "waypoint", "waypoint-1", "istio-ca");
    assert_eq!(ask(&control, own.clone(), &waypoint).await.unwrap().identity(), &waypoint);

    let refused = async |token: PathBuf, wanted: &SpiffeId, why: &str| {
        let error = ask(&control, token, wanted).await.unwrap_err();
        assert!(error.is_refusal(), "{why}: {error}");
        assert!(control.logged().contains(why), "{why}: {}", control.logged());
    };
    refused(agent("agent-2"), &front, "is scheduled on node n2").await;
    refused(own.clone(), &front, "is no node's agent").await;
    refused(of("istio-system", "undermesh-node", "agent-1", "other"), &front, "token refused").await;
    refused(agent(""), &front, "bound to no pod").await;

    // Reports: an agent for its own node, and nobody else.
    report(&control, agent("agent-1"), "n1").await.unwrap();
    assert_eq!(
        report(&control, agent("agent-1"), "n2").await.unwrap_err().code(),
        tonic::Code::PermissionDenied
    );
    assert_eq!(report(&control, own, "n1").await.unwrap_err().code(), tonic::Code::PermissionDenied);

    // A pod that is gone takes its token along, once what was remembered of it has ended.
    let gone = agent("agent-1");
    server.text(&["delete", "pod", "-n", "istio-system", "agent-1", "--grace-period=0", "--force"]);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        until("the token is void", || handle.block_on(ask(&control, gone.clone(), &front)).is_err());
    });
}
