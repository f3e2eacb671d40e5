//! Enrolling and releasing pods.

use crate::support::*;
use mesh_node::capture::{Capture, CaptureConfig, CaptureError, Limits, ListenerKind};
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

#[test]
fn a_pod_whose_addresses_do_not_fit_leaves_neither_addresses_nor_a_slot_behind() {
    // Room for eight addresses.
    let limits = Limits { pods: 1, ..Limits::default() };
    let capture = Capture::load(CaptureConfig { limits, ..config() }).unwrap();
    let net = Net::new(2);
    let many: String = (20..40).map(|i| format!("addr add 10.77.1.{i}/24 dev eth0\n")).collect();
    ip_in(&net, 0, &many);
    let error = capture.enrol(&net.info(0)).err().unwrap().to_string();
    assert!(error.contains("pod-0") && error.contains("addresses"), "{error}");
    assert!(capture.enrolled_pods().is_empty());
    // Seven addresses: they fit only if nothing of the other pod is left.
    let some: String = (20..24).map(|i| format!("addr add 10.77.2.{i}/24 dev eth0\n")).collect();
    ip_in(&net, 1, &some);
    let pod = Pod::enrol(&capture, &net.info(1));
    let _client = connect(&net.hosts[0], at(v4(1), 80)).unwrap();
    accept(&pod.inbound);
    capture.release(&pod.pod).unwrap();
    ip_in(&net, 0, "addr flush dev eth0 to 10.77.1.0/24\n");
    Pod::enrol(&capture, &net.info(0));
}

#[test]
fn a_pod_that_cannot_be_activated_is_captured_in_neither_direction_and_can_be_tried_again() {
    let net = Net::new(3);
    let pins = Pins::new(&net.prefix);
    let limits = Limits { pods: 2, ..Limits::default() };
    let capture = Capture::load(CaptureConfig { limits, ..pins.config() }).unwrap();
    // Somebody fills the map of pods.
    let map = aya::maps::MapData::from_pin(pins.file("PODS")).unwrap();
    let mut full: aya::maps::HashMap<_, u64, mesh_ebpf::Pod> =
        aya::maps::Map::HashMap(map).try_into().unwrap();
    for cookie in 0..2 {
        full.insert(u64::MAX - cookie, mesh_ebpf::Pod::default(), 0).unwrap();
    }
    let pod = capture.enrol(&net.info(0)).unwrap();
    let listener = mesh_node::sys::listener(&pod.netns, 0, 16).unwrap();
    capture.set_listener(&pod, ListenerKind::Inbound, &listener).unwrap();
    let error = capture.activate(&pod).unwrap_err().to_string();
    assert!(error.contains("PODS"), "{error}");
    assert!(!pod.is_active() && !capture.is_intact(&pod));
    let (application, server) = (serve(&net.hosts[0], 8080), serve(&net.hosts[2], 80));
    let _client = connect(&net.hosts[2], at(v4(0), 8080)).unwrap();
    accept(&application);
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    accept(&server);
    capture.abandon(&pod).unwrap();
    for cookie in 0..2 {
        full.remove(&(u64::MAX - cookie)).unwrap();
    }
    let again = Pod::enrol(&capture, &net.info(0));
    assert_eq!(again.pod.slot, pod.slot);
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    accept(&again.outbound);
}

#[test]
fn giving_up_on_a_pod_that_an_earlier_agent_captured_does_not_uncapture_it() {
    let net = Net::new(3);
    let pins = Pins::new(&net.prefix);
    drop(Pod::enrol(&Capture::load(pins.config()).unwrap(), &net.info(0)));
    let capture = Capture::load(pins.config()).unwrap();
    let pod = capture.enrol(&net.info(0)).unwrap();
    capture.abandon(&pod).unwrap();
    let (application, server) = (serve(&net.hosts[0], 8080), serve(&net.hosts[2], 80));
    assert!(connect(&net.hosts[2], at(v4(0), 8080)).is_err());
    assert!(connect(&net.hosts[0], at(v4(2), 80)).is_err());
    // Its place is still its own.
    assert_ne!(capture.enrol(&net.info(1)).unwrap().slot, pod.slot);
    let again = Pod::enrol(&capture, &net.info(0));
    assert_eq!(again.pod.slot, pod.slot);
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    accept(&again.outbound);
    // Nobody claims it: now it is let go.
    drop((again, capture));
    let capture = Capture::load(pins.config()).unwrap();
    let pod = capture.enrol(&net.info(0)).unwrap();
    capture.forget_unclaimed().unwrap();
    capture.abandon(&pod).unwrap();
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    accept(&server);
    let _client = connect(&net.hosts[2], at(v4(0), 8080)).unwrap();
    accept(&application);
}

#[test]
fn a_connection_whose_syn_was_lost_while_its_pod_joined_is_established_all_the_same() {
    let capture = Capture::load(config()).unwrap();
    let net = Net::new(2);
    let application = serve(&net.hosts[1], 8080);
    nft(
        &net,
        1,
        "table ip um {\n chain c {\n type filter hook input priority 0;\n tcp dport 8080 counter drop\n }\n}\n",
    );
    let host = &net.hosts[0];
    let client = std::thread::scope(|scope| {
        let client = scope.spawn(|| connect(host, at(v4(1), 8080)));
        eventually("its SYN is lost", || dropped(&net, 1) > 0);
        let pod = Pod::enrol(&capture, &net.info(0));
        nft(&net, 1, "delete table ip um\n");
        let client = client.join().unwrap().unwrap();
        assert!(is_idle(&pod.outbound), "the connect hook has not seen it");
        capture.joined(&pod.pod).unwrap();
        client
    });
    let (_, peer) = accept(&application);
    assert_eq!(peer, client.local_addr().unwrap());
}

#[test]
fn a_pod_that_has_joined_long_ago_sends_no_syn_that_was_not_captured() {
    let capture = Capture::load(config()).unwrap();
    let net = Net::new(2);
    nft(
        &net,
        1,
        "table ip um {\n chain c {\n type filter hook input priority 0;\n tcp dport 8080 counter drop\n }\n}\n",
    );
    let host = &net.hosts[0];
    std::thread::scope(|scope| {
        let client = scope.spawn(|| connect(host, at(v4(1), 8080)));
        eventually("its SYN is lost", || dropped(&net, 1) > 0);
        let pod = Pod::enrol(&capture, &net.info(0));
        capture.joined(&pod.pod).unwrap();
        let lost = dropped(&net, 1);
        eventually("its next SYN is held back", || capture.counter("dropped_uncaptured").unwrap() > 0);
        assert_eq!(dropped(&net, 1), lost);
        // Let go, it is sent again.
        capture.release(&pod.pod).unwrap();
        nft(&net, 1, "delete table ip um\n");
        let _application = serve(&net.hosts[1], 8080);
        client.join().unwrap().unwrap();
    });
}
