//! Enrolling and releasing pods.

use crate::support::*;
use mesh_node::capture::{Capture, CaptureConfig, CaptureError, Limits};
use mesh_node::pods::PodInfo;
use mesh_node::sys::Netns;
use std::os::fd::{AsFd, AsRawFd};

/// A pod in a namespace that has no name.
fn unnamed(netns: &Netns, number: usize) -> PodInfo {
    PodInfo {
        uid: format!("u{number}"),
        name: format!("pod-{number}"),
        namespace: "test".into(),
        service_account: "default".into(),
        netns: format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd()).into(),
        cgroup: own_cgroup(),
        labels: Default::default(),
        probe_ports: Vec::new(),
        dns_search: None,
        host_network: false,
    }
}

#[test]
fn a_thousand_pods_are_enrolled_at_once() {
    let capture = Capture::load(config()).unwrap();
    let namespaces: Vec<Netns> = (0..1000).map(|_| Netns::create().unwrap()).collect();
    let infos: Vec<PodInfo> =
        namespaces.iter().enumerate().map(|(number, netns)| unnamed(netns, number)).collect();
    std::thread::scope(|scope| {
        for part in infos.chunks(125) {
            let capture = &capture;
            scope.spawn(move || {
                for info in part {
                    let pod = capture.enrol(info).unwrap();
                    capture.activate(&pod).unwrap();
                }
            });
        }
    });
    let pods = capture.enrolled_pods();
    assert_eq!(pods.len(), 1000);
    let slots: std::collections::BTreeSet<u32> = pods.iter().map(|pod| pod.slot).collect();
    assert_eq!(slots.len(), 1000);
    assert!(pods.iter().all(|pod| capture.is_intact(pod)));
    for pod in pods {
        capture.release(&pod).unwrap();
    }
    assert!(capture.enrolled_pods().is_empty());
}

#[test]
fn ten_thousand_pods_one_after_the_other_leave_nothing_behind() {
    let limits = Limits { pods: 16, ..Limits::default() };
    let capture = Capture::load(CaptureConfig { limits, ..config() }).unwrap();
    let netns = Netns::create().unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    for number in 0..10_000 {
        let pod = capture.enrol(&unnamed(&netns, number)).unwrap();
        capture.activate(&pod).unwrap();
        capture.release(&pod).unwrap();
    }
    // Other tests of this process open and close descriptors meanwhile.
    assert!(open() < before + 5_000, "descriptors leak");
}

#[test]
fn the_nodes_own_namespace_is_never_enrolled() {
    let capture = Capture::load(config()).unwrap();
    let info = PodInfo { netns: "/proc/self/ns/net".into(), ..unnamed(&Netns::current().unwrap(), 0) };
    assert!(matches!(capture.enrol(&info), Err(CaptureError::HostNetwork { .. })));
}

#[test]
fn one_pod_too_many_and_one_namespace_twice_are_clear_errors() {
    let limits = Limits { pods: 1, ..Limits::default() };
    let capture = Capture::load(CaptureConfig { limits, ..config() }).unwrap();
    let (one, two) = (Netns::create().unwrap(), Netns::create().unwrap());
    let pod = capture.enrol(&unnamed(&one, 1)).unwrap();
    assert_eq!(capture.enrol(&unnamed(&one, 1)).unwrap().slot, pod.slot, "enrolling again is no error");
    assert!(matches!(capture.enrol(&unnamed(&one, 3)), Err(CaptureError::Duplicate { .. })));
    let error = capture.enrol(&unnamed(&two, 2)).err().unwrap().to_string();
    assert!(error.contains("pod-2") && error.contains("raise the limit"), "{error}");
    capture.release(&pod).unwrap();
    capture.enrol(&unnamed(&two, 2)).unwrap();
}

#[test]
fn a_namespace_that_is_gone_is_a_clear_error() {
    let capture = Capture::load(config()).unwrap();
    let info =
        PodInfo { netns: "/var/run/netns/um-nothing".into(), ..unnamed(&Netns::current().unwrap(), 0) };
    let error = capture.enrol(&info).err().unwrap().to_string();
    assert!(error.contains("pod-0") && error.contains("network namespace"), "{error}");
}
