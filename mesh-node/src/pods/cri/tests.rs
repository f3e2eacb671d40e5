use super::*;

/// What containerd 1.6 tells of a sandbox, shortened.
const INFO: &str = r#"{"pid":42,"config":{"dns_config":{"servers":["10.0.0.10"],
    "searches":["shop.svc.cluster.local","svc.cluster.local","cluster.local"],"options":["ndots:5"]},
    "linux":{"cgroup_parent":"/kubepods/burstable/pod1"}},
    "runtimeSpec":{"ociVersion":"1.0.2","linux":{"cgroupsPath":"/kubepods/burstable/pod1/c0ffee","namespaces":[
    {"type":"pid"},{"type":"ipc"},{"type":"network","path":"/var/run/netns/cni-1"}]}}}"#;

fn sandbox(id: &str, uid: &str, created_at: i64) -> PodSandbox {
    PodSandbox {
        id: id.into(),
        metadata: Some(mesh_core::xds::proto::cri::PodSandboxMetadata {
            name: "cart".into(),
            uid: uid.into(),
            namespace: "shop".into(),
            attempt: 0,
        }),
        state: PodSandboxState::SandboxReady.into(),
        created_at,
        labels: [("app", "cart"), ("io.kubernetes.pod.uid", uid)]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
    }
}

fn status(info: &str, network: mesh_core::xds::proto::cri::NamespaceMode) -> PodSandboxStatusResponse {
    use mesh_core::xds::proto::cri::{LinuxPodSandboxStatus, Namespace, NamespaceOption, PodSandboxStatus};
    let options = Some(NamespaceOption { network: network.into() });
    PodSandboxStatusResponse {
        status: Some(PodSandboxStatus {
            linux: Some(LinuxPodSandboxStatus { namespaces: Some(Namespace { options }) }),
            ..PodSandboxStatus::default()
        }),
        info: [("info".to_owned(), info.to_owned())].into(),
    }
}

use mesh_core::xds::proto::cri::{NamespaceMode, PodSandboxStatusResponse};

fn source(socket: &Path) -> CriSource {
    CriSource {
        shared: Arc::new(Shared {
            socket: socket.to_owned(),
            state: Mutex::default(),
            answered: Condvar::new(),
            poke: Notify::new(),
        }),
        stop: CancellationToken::new(),
    }
}

#[test]
fn a_sandbox_is_read_as_a_pod_without_the_kubelets_labels() {
    let found = sandbox::found(&sandbox("s", "1", 5), &status(INFO, NamespaceMode::Pod)).unwrap();
    let pod = found.pod;
    assert_eq!((pod.uid.as_str(), pod.namespace.as_str(), pod.name.as_str()), ("1", "shop", "cart"));
    assert_eq!(pod.netns, Path::new("/var/run/netns/cni-1"));
    assert_eq!(pod.cgroup, Path::new("kubepods/burstable/pod1"));
    assert_eq!(pod.labels.keys().collect::<Vec<_>>(), ["app"]);
    assert_eq!(pod.dns_search.unwrap().len(), 3);
    assert_eq!((pod.service_account.as_str(), pod.host_network), ("", false), "the runtime does not know it");
}

#[test]
fn a_pod_on_the_nodes_network_is_marked_so() {
    let found = sandbox::found(&sandbox("s", "1", 5), &status("{}", NamespaceMode::Node)).unwrap();
    assert!(found.pod.host_network);
}

#[test]
fn an_answer_that_lacks_something_is_named() {
    let without_path = INFO.replace("/var/run/netns/cni-1", "");
    for (sandbox, info, expected) in [
        (sandbox("s", "", 5), INFO, "metadata.uid"),
        (sandbox("s", "1", 5), "{", "info: "),
        (sandbox("s", "1", 5), without_path.as_str(), "no path of a network namespace"),
    ] {
        let problem = sandbox::found(&sandbox, &status(info, NamespaceMode::Pod)).unwrap_err();
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn of_two_sandboxes_of_one_pod_the_newer_one_counts() {
    let source = source(Path::new("/nowhere.sock"));
    let old = sandbox::found(&sandbox("a", "1", 5), &status(INFO, NamespaceMode::Pod)).unwrap();
    let info = INFO.replace("cni-1", "cni-2");
    let new = sandbox::found(&sandbox("b", "1", 6), &status(&info, NamespaceMode::Pod)).unwrap();
    source.shared.answer(vec![Ok(new), Ok(old), Err(("sandbox c".into(), "broken".into()))]);
    let snapshot = source.snapshot().unwrap();
    assert_eq!(snapshot.pods.len(), 1);
    assert_eq!(snapshot.pods[0].netns, Path::new("/var/run/netns/cni-2"));
    assert_eq!(snapshot.rejected.len(), 1);
}

#[test]
fn a_pod_that_is_being_started_is_there_until_the_runtime_lists_it_or_its_network_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let source = source(Path::new("/nowhere.sock"));
    source.shared.answer(Vec::new());
    let netns = directory.path().join("cni-1");
    std::fs::write(&netns, "").unwrap();
    let found = sandbox::found(&sandbox("a", "1", 5), &status(INFO, NamespaceMode::Pod)).unwrap();
    let early = PodInfo { netns: netns.clone(), cgroup: PathBuf::new(), ..found.pod.clone() };
    source.expect(early.clone());
    assert_eq!(source.snapshot().unwrap().pods, [early]);
    let listed = Found { pod: PodInfo { netns: netns.clone(), ..found.pod.clone() }, created_at: 5 };
    source.shared.answer(vec![Ok(listed.clone())]);
    assert_eq!(source.snapshot().unwrap().pods, [listed.pod]);
    source.shared.answer(Vec::new());
    source.expect(PodInfo { netns: netns.clone(), ..found.pod });
    std::fs::remove_file(&netns).unwrap();
    assert!(source.snapshot().unwrap().pods.is_empty());
}

#[test]
fn a_runtime_that_is_away_is_named_and_its_last_answer_stays() {
    let source = source(Path::new("/nowhere.sock"));
    let error = source.snapshot().unwrap_err().to_string();
    assert!(error.contains("/nowhere.sock") && error.contains("not answered"), "{error}");
    let found = sandbox::found(&sandbox("a", "1", 5), &status(INFO, NamespaceMode::Pod)).unwrap();
    source.shared.answer(vec![Ok(found)]);
    source.shared.fail("connection refused");
    assert_eq!(source.snapshot().unwrap().pods.len(), 1);
}

#[test]
fn a_change_is_told_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let source = source(Path::new("/nowhere.sock"));
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let guard = source
        .watch(Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        }))
        .unwrap();
    let found = sandbox::found(&sandbox("a", "1", 5), &status(INFO, NamespaceMode::Pod)).unwrap();
    source.shared.answer(vec![Ok(found.clone())]);
    source.shared.answer(vec![Ok(found)]);
    assert_eq!(count.load(Ordering::SeqCst), 1, "the second answer was the same");
    drop(guard);
    source.shared.answer(Vec::new());
    assert_eq!(count.load(Ordering::SeqCst), 1, "nobody listens any more");
}
