//! A large cluster: read whole, and followed pod by pod. `UM_PODS` says how large (1,000 by default; the figures of
//! docs/SPECIFICATION.md are for 10,000, with a tenth as many Services).

mod apiserver;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::{ApiServer, Control, RBAC, until};
use kube::api::{Api, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::DynamicObject;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

/// Requests at once.
const AT_ONCE: usize = 64;

async fn client(kubeconfig: &Path) -> Client {
    let file = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config =
        Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("a cluster");
    Client::try_from(config).expect("a client")
}

fn api(client: &Client, kind: &str, namespace: &str) -> Api<DynamicObject> {
    let resource = kube::api::ApiResource {
        group: String::new(),
        version: "v1".into(),
        api_version: "v1".into(),
        kind: kind.into(),
        plural: format!("{}s", kind.to_lowercase()),
    };
    Api::namespaced_with(client.clone(), namespace, &resource)
}

/// Creates an object, and its status where it has one.
async fn create(api: Api<DynamicObject>, mut object: Value, slots: Arc<Semaphore>) {
    let _slot = slots.acquire().await.expect("a slot");
    let status = object.as_object_mut().and_then(|o| o.remove("status"));
    let made: DynamicObject = serde_json::from_value(object).expect("an object");
    let made = api.create(&PostParams::default(), &made).await.expect("it is created");
    if let Some(status) = status {
        let name = made.metadata.name.clone().unwrap_or_default();
        let patch = kube::api::Patch::Merge(json!({ "status": status }));
        api.patch_status(&name, &kube::api::PatchParams::default(), &patch).await.expect("its status is set");
    }
}

fn pod(n: usize) -> (String, Value) {
    let namespace = format!("ns-{}", n % 20);
    let ip = format!("10.{}.{}.{}", 1 + n / 62_500, n / 250 % 250, 1 + n % 250);
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("pod-{n}"), "namespace": namespace, "labels": {
            "app": format!("app-{}", n / 10), "pod-template-hash": "5d4f9c7b8", "version": "v1",
        }},
        "spec": {
            "nodeName": format!("node-{}", n % 100), "serviceAccountName": format!("account-{}", n / 10),
            "containers": [{"name": "app", "image": "registry.test/app:1", "ports": [{"name": "http", "containerPort": 8080}],
                "env": (0..10).map(|i| json!({"name": format!("VARIABLE_{i}"), "value": "some value"})).collect::<Vec<_>>()}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    });
    (namespace, object)
}

async fn fill(client: &Client, pods: usize) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..pods {
        let (namespace, object) = pod(n);
        tasks.spawn(create(api(client, "Pod", &namespace), object, slots.clone()));
    }
    for n in 0..pods / 10 {
        let namespace = format!("ns-{}", n % 20);
        let object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("app-{n}"), "namespace": namespace},
            "spec": {"selector": {"app": format!("app-{n}")}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        });
        tasks.spawn(create(api(client, "Service", &namespace), object, slots.clone()));
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("created");
    }
}

/// Resident memory of a process, MiB.
fn resident(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).unwrap_or_default() / 1024
}

/// CPU time of a process, in hundredths of a second.
fn cpu(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_cluster_is_read_whole_and_followed_pod_by_pod() {
    let pods: usize = std::env::var("UM_PODS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000);
    let Some(server) = ApiServer::start() else { return };
    server.apply(RBAC);
    let namespaces: Vec<String> = (0..20)
        .map(|n| format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: ns-{n}, labels: {{istio.io/dataplane-mode: ambient}}}}}}"))
        .collect();
    server.apply(&namespaces.join("\n---\n"));
    let client = client(&server.kubeconfig()).await;
    let began = Instant::now();
    fill(&client, pods).await;
    println!("{pods} pods and {} services were made in {:.1} s", pods / 10, began.elapsed().as_secs_f64());

    let kubeconfig = server.kubeconfig_of("istio-system", "undermesh-control");
    let began = Instant::now();
    let control = Control::start(&server, "a", &kubeconfig, &[]);
    control.wait_ready();
    let took = began.elapsed();
    let counts = control.json("/debug/objects")["counts"].clone();
    println!(
        "synced after {:.2} s, {} MiB resident, {:.2} s of CPU",
        took.as_secs_f64(),
        resident(control.pid()),
        cpu(control.pid()) as f64 / 100.0
    );
    assert_eq!(counts["Pod"], pods);
    assert_eq!(counts["Service"], pods / 10 + 1, "and the API server's own");

    // One change after the other: each is seen, and none of them reads the cluster again.
    let before = cpu(control.pid());
    let changes: usize = 20;
    let mut latest = Duration::ZERO;
    for n in 0..changes {
        let uid = format!("Kubernetes//Pod/ns-0/late-{n}");
        let (_, mut object) = pod(pods + n * 20);
        object["metadata"]["name"] = format!("late-{n}").into();
        object["metadata"]["namespace"] = "ns-0".into();
        let began = Instant::now();
        create(api(&client, "Pod", "ns-0"), object, Arc::new(Semaphore::new(1))).await;
        tokio::task::block_in_place(|| {
            until("the pod is told", || control.logged().contains("published") && told(&control, &uid));
        });
        latest = latest.max(began.elapsed());
    }
    println!(
        "{changes} pods came one by one: {:.0} ms of CPU each, the last seen {:.0} ms after it was made at most, {} MiB resident",
        (cpu(control.pid()) - before) as f64 * 10.0 / changes as f64,
        latest.as_millis(),
        resident(control.pid())
    );
}

/// Whether a workload is in what nodes are told, by the debug port's list of objects (the dump of a large mesh is large).
fn told(control: &Control, uid: &str) -> bool {
    let name = uid.rsplit("//Pod/").next().unwrap_or_default();
    control.json("/debug/objects")["Pod"].as_array().is_some_and(|pods| pods.iter().any(|p| p == name))
}
