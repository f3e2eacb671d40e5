//! Agents come and go: pins, heartbeat, failing open and closed.

use crate::support::*;
use mesh_node::capture::{Capture, CaptureConfig, Decision, FailMode, MeshSettings, Pair, doctor};
use mesh_node::pods::DirectorySource;
use std::io::{ErrorKind, Read};
use std::net::TcpListener;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

fn open() -> MeshSettings {
    MeshSettings { fail: FailMode::Open, ..MeshSettings::default() }
}

#[test]
fn without_a_heartbeat_connects_are_refused_or_let_go_as_the_mesh_fails() {
    let mesh = Mesh::with(CaptureConfig { heartbeat: false, ..config() });
    let server = serve(mesh.host(2), 80);
    for ip in [v4(2), v6(2)] {
        let error = connect(mesh.host(0), at(ip, 80)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    }
    assert_eq!(mesh.count("refused_no_agent"), 2);
    mesh.capture.set_config(&open()).unwrap();
    for ip in [v4(2), v6(2)] {
        let _client = connect(mesh.host(0), at(ip, 80)).unwrap();
        accept(&server);
    }
    assert_eq!(mesh.count("left_fail_open"), 2);
    // What needs no agent works either way.
    mesh.capture.set_config(&MeshSettings::default()).unwrap();
    let own = serve(mesh.host(0), 8080);
    let _client = connect(mesh.host(0), at(v4(0), 8080)).unwrap();
    accept(&own);
}

#[test]
fn capture_outlives_the_agent_and_the_next_one_takes_over() {
    let net = Net::new(3);
    let pins = Pins::new(&net.prefix);
    let server = serve(&net.hosts[2], 80);
    let (slot, cookie) = {
        let capture = Capture::load(pins.config()).unwrap();
        let pod = Pod::enrol(&capture, &net.info(0));
        let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
        accept(&pod.outbound);
        (pod.pod.slot, pod.pod.cookie)
    };
    // No agent: inbound closes at once, outbound when the heartbeat is stale.
    let inbound = connect(&net.hosts[2], at(v4(0), 80)).unwrap_err();
    assert_eq!(inbound.kind(), ErrorKind::ConnectionRefused);
    eventually("outbound is refused", || {
        connect(&net.hosts[0], at(v4(2), 80)).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    });
    assert!(is_idle(&server));
    // The next agent finds maps and links, keeps the slot, and serves again.
    let capture = Capture::load(pins.config()).unwrap();
    let pod = Pod::enrol(&capture, &net.info(0));
    assert_eq!((pod.pod.slot, pod.pod.cookie), (slot, cookie));
    assert_eq!(capture.forget_unclaimed().unwrap(), 0);
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    let (stream, peer) = accept(&pod.outbound);
    assert_eq!(capture.take_original_dst(stream.local_addr().unwrap(), peer), Some(at(v4(2), 80)));
    let _client = connect(&net.hosts[2], at(v4(0), 80)).unwrap();
    accept(&pod.inbound);
    assert!(capture.is_intact(&pod.pod));
    capture.release(&pod.pod).unwrap();
    assert!(!capture.is_intact(&pod.pod));
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    accept(&server);
}

#[test]
fn verdicts_of_an_agent_that_is_long_dead_do_not_come_back_to_life() {
    let net = Net::new(2);
    let pins = Pins::new(&net.prefix);
    {
        let capture = Capture::load(pins.config()).unwrap();
        let pod = Pod::enrol(&capture, &net.info(0));
        let pair = Pair { netns: pod.pod.cookie, source: v4(0), destination: v4(1), port: 8080 };
        let decision = Decision { allow: true, policy: 0, flags: 0 };
        capture.set_verdict(&pair, decision, capture.generation().unwrap()).unwrap();
        drop(Capture::load(pins.config()).unwrap());
        assert_eq!(capture.verdicts().unwrap().len(), 1, "an agent that takes over at once keeps them");
    }
    eventually("the heartbeat is stale", || {
        connect(&net.hosts[0], at(v4(1), 80)).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    });
    let capture = Capture::load(pins.config()).unwrap();
    let current = capture.generation().unwrap();
    let believed = |verdicts: Vec<(Pair, Decision, u32)>| verdicts.iter().any(|(.., of)| *of >= current);
    assert!(!believed(capture.verdicts().unwrap()));
    let pod = Pod::enrol(&capture, &net.info(0));
    let _client = connect(&net.hosts[0], at(v4(1), 8080)).unwrap();
    accept(&pod.outbound);
}

#[test]
fn a_pod_that_the_next_agent_does_not_claim_is_let_go() {
    let net = Net::new(2);
    let pins = Pins::new(&net.prefix);
    drop(Pod::enrol(&Capture::load(pins.config()).unwrap(), &net.info(0)));
    let capture = Capture::load(pins.config()).unwrap();
    assert_eq!(capture.forget_unclaimed().unwrap(), 1);
    let server = serve(&net.hosts[1], 80);
    let _client = connect(&net.hosts[0], at(v4(1), 80)).unwrap();
    accept(&server);
    let own = serve(&net.hosts[0], 80);
    let _client = connect(&net.hosts[1], at(v4(0), 80)).unwrap();
    accept(&own);
}

/// Accepts until told to stop and the queue is empty; counts those that had a record.
fn drain(pod: &Pod, capture: &Capture, stop: &AtomicBool, served: &AtomicUsize) {
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        match pod.outbound.accept() {
            Ok((stream, peer)) => {
                let original = capture.take_original_dst(stream.local_addr().unwrap(), peer);
                served.fetch_add(usize::from(original.is_some()), Ordering::Relaxed);
            }
            Err(_) if stopping => return,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

#[test]
fn two_agents_overlap_without_losing_a_connection() {
    let net = Net::new(2);
    let pins = Pins::new(&net.prefix);
    let old = Capture::load(pins.config()).unwrap();
    let old_pod = Pod::enrol(&old, &net.info(0));
    let (stop_old, stop_new, stop_load) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let (old_served, new_served) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let new = Capture::load(pins.config()).unwrap();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut made = 0;
            while !stop_load.load(Ordering::Relaxed) {
                connect(&net.hosts[0], at(v4(1), 80)).unwrap_or_else(|error| panic!("after {made}: {error}"));
                made += 1;
            }
            made
        });
        let (stop, counted) = (&stop_old, &old_served);
        let old_drained = scope.spawn(move || {
            drain(&old_pod, &old, stop, counted);
            old.retire();
            // Its last connection may still be on its way through the handshake.
            std::thread::sleep(Duration::from_millis(100));
            drain(&old_pod, &old, stop, counted);
            drop((old_pod, old));
        });
        std::thread::sleep(Duration::from_millis(200));
        let new_pod = Pod::enrol(&new, &net.info(0));
        let (new, stop, counted) = (&new, &stop_new, &new_served);
        scope.spawn(move || drain(&new_pod, new, stop, counted));
        stop_old.store(true, Ordering::Relaxed);
        old_drained.join().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        stop_load.store(true, Ordering::Relaxed);
        let made = load.join().unwrap();
        // The client's last handshake is over before the server's.
        eventually("every connection is accepted", || {
            let served = [&old_served, &new_served].map(|count| count.load(Ordering::Relaxed));
            served.iter().all(|count| *count > 0) && served.iter().sum::<usize>() == made
        });
        stop_new.store(true, Ordering::Relaxed);
    });
}

#[test]
fn what_a_later_agent_registered_stays_when_an_earlier_one_finds_the_pod_too() {
    let net = Net::new(2);
    let pins = Pins::new(&net.prefix);
    let old = Capture::load(pins.config()).unwrap();
    let new = Capture::load(pins.config()).unwrap();
    // A pod came while both serve; the older one is the last to take it.
    let of_new = Pod::enrol(&new, &net.info(0));
    old.yield_to_later(true);
    let of_old = Pod::enrol(&old, &net.info(0));
    let _first = connect(&net.hosts[1], at(v4(0), 80)).unwrap();
    accept(&of_new.inbound);
    drop((of_old, old));
    let _second = connect(&net.hosts[1], at(v4(0), 80)).unwrap();
    accept(&of_new.inbound);
    let _third = connect(&net.hosts[0], at(v4(1), 80)).unwrap();
    accept(&of_new.outbound);
    assert!(new.is_intact(&of_new.pod));
}

#[test]
fn a_missing_object_or_cgroup_is_an_error_with_the_fix() {
    let error = |config| Capture::load(config).err().unwrap().to_string();
    let missing = mesh_node::capture::ObjectSource::File("/nowhere/mesh".into());
    assert!(error(CaptureConfig::new(missing)).contains("cargo xtask build"));
    let elsewhere = CaptureConfig { host_cgroup: Some("/tmp".into()), ..config() };
    assert!(error(elsewhere).contains("cgroup2"));
    let elsewhere = CaptureConfig { pins: Some(std::env::temp_dir().join("um-pins")), ..config() };
    assert!(error(elsewhere).contains("bpffs"));
}

#[test]
fn a_retired_agent_does_not_keep_a_dead_successor_alive() {
    let mesh = Mesh::new();
    mesh.capture.retire();
    eventually("the heartbeat is stale", || {
        connect(mesh.host(0), at(v4(2), 80)).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    });
}

#[test]
fn an_agent_that_does_not_serve_yet_leaves_pods_to_the_fail_mode_and_trusts_no_old_verdict() {
    let mesh = Mesh::with(CaptureConfig { silent_start: true, settings: open(), ..config() });
    let server = serve(mesh.host(2), 80);
    let _client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    accept(&server);
    let generation = mesh.capture.generation().unwrap();
    mesh.capture.set_config(&MeshSettings::default()).unwrap();
    let error = connect(mesh.host(0), at(v4(2), 80)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    mesh.capture.serve().unwrap();
    assert!(mesh.capture.generation().unwrap() > generation);
    let _client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    accept(&mesh.pods[0].outbound);
    assert!(is_idle(&server));
}

#[test]
fn kernel_diagnostics_are_switched_while_the_programs_run() {
    let mesh = Mesh::new();
    mesh.capture.set_kernel_log(true).unwrap();
    let _client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    mesh.capture.set_kernel_log(false).unwrap();
    mesh.capture.set_kernel_log(true).unwrap();
}

#[test]
fn the_doctor_finds_a_machine_that_can_run_these_tests_fit() {
    let none = tempfile::tempdir().unwrap();
    let probes = doctor::examine(&object(), &DirectorySource::new(none.path().to_owned()));
    let missing: Vec<_> =
        probes.iter().filter(|probe| probe.state == mesh_core::admin::Fitness::Missing).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    for name in ["kernel programs", "capture IPv4", "capture IPv6", "SOCK_DESTROY"] {
        let probe = probes.iter().find(|probe| probe.name == name).unwrap();
        assert_eq!(probe.state, mesh_core::admin::Fitness::Ok, "{probe:?}");
    }
}

/// Sets flags when dropped, so that a panic does not leave threads waiting for them.
struct Set<'a>([&'a AtomicBool; 2]);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|flag| flag.store(true, Ordering::Relaxed));
    }
}

/// How many connections wait at a listener, which are taken.
fn accepted(listener: &TcpListener) -> usize {
    std::iter::from_fn(|| listener.accept().ok()).count()
}

#[test]
fn programs_of_another_layout_are_replaced_without_losing_a_connection() {
    let net = Net::new(3);
    let pins = Pins::new(&net.prefix);
    let application = serve(&net.hosts[1], 8080);
    let old = Capture::load(pins.config()).unwrap();
    let old_pods: Vec<Pod> = (0..2).map(|i| Pod::enrol(&old, &net.info(i))).collect();
    let pair = Pair { netns: old_pods[0].pod.cookie, source: v4(0), destination: v4(1), port: 8080 };
    let decision = Decision { allow: true, policy: 0, flags: 0 };
    old.set_verdict(&pair, decision, old.generation().unwrap()).unwrap();
    let mut held = connect(&net.hosts[0], at(v4(1), 8080)).unwrap();
    let (_server, client) = accept(&application);
    // From here on it is another layout's, with everything alive.
    let other = pins.rename_layout("v4294967295");
    let new = Capture::load(pins.config()).unwrap();
    let (stop, stop_load) = (AtomicBool::new(false), AtomicBool::new(false));
    let [old_served, new_served, direct] = [const { AtomicUsize::new(0) }; 3];
    let enrolled: OnceLock<Vec<Pod>> = OnceLock::new();
    std::thread::scope(|scope| {
        let _end = Set([&stop, &stop_load]);
        let load = scope.spawn(|| {
            let mut made = 0;
            while !stop_load.load(Ordering::Relaxed) {
                // Alternately one that the old agent would capture and one that it would let go directly.
                for port in [80, 8080] {
                    connect(&net.hosts[0], at(v4(1), port))
                        .unwrap_or_else(|error| panic!("after {made} to {port}: {error}"));
                    made += 1;
                }
            }
            made
        });
        // Its queue would be full before the new agent comes.
        let direct_accepted = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                direct.fetch_add(accepted(&application), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let (old_pod, old, stop, counted) = (&old_pods[0], &old, &stop, &old_served);
        scope.spawn(move || drain(old_pod, old, stop, counted));
        std::thread::sleep(Duration::from_millis(200));
        let new_pods = enrolled.get_or_init(|| (0..2).map(|i| Pod::enrol(&new, &net.info(i))).collect());
        let (new_pod, new, counted) = (&new_pods[0], &new, &new_served);
        scope.spawn(move || drain(new_pod, new, stop, counted));
        std::thread::sleep(Duration::from_millis(200));
        new.forget_unclaimed().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        stop_load.store(true, Ordering::Relaxed);
        let made: usize = load.join().unwrap();
        let mut crossing = 0;
        // The client's last handshakes are over before the server's.
        eventually("every connection is accepted", || {
            // One that the old programs let go may meet the new ones on its way, who take it for plaintext.
            crossing += accepted(&new_pods[1].inbound);
            assert!(crossing <= 1, "only one is on its way at a time");
            assert!(is_idle(&old_pods[1].inbound), "the old programs know what they let go");
            let counts = [&old_served, &new_served, &direct].map(|count| count.load(Ordering::Relaxed));
            counts.iter().all(|count| *count > 0) && counts.iter().sum::<usize>() + crossing == made
        });
        stop.store(true, Ordering::Relaxed);
        direct_accepted.join().unwrap();
        // The old layout's direct connection lives, and can be ended.
        let flows = new.fastpath_flows().unwrap();
        let flow = flows.iter().find(|flow| flow.client == client).expect("it is known");
        assert!(other.exists());
        assert!(new.destroy(flow).unwrap());
        let ended = held.read(&mut [0]).unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionAborted);
        eventually("the other layout is gone", || {
            new.fastpath_flows().unwrap();
            !other.exists()
        });
        // Nothing of it captures any more: a pod that is let go here is let go.
        for pod in new_pods {
            new.release(&pod.pod).unwrap();
        }
        let _client = connect(&net.hosts[0], at(v4(1), 8080)).unwrap();
        accept(&application);
        assert!(is_idle(&old_pods[0].outbound) && is_idle(&new_pods[0].outbound));
    });
}

#[test]
fn the_doctor_says_whether_pods_share_a_segment() {
    let net = Net::new(2);
    let directory = tempfile::tempdir().unwrap();
    let source = DirectorySource::new(directory.path().to_owned());
    for host in 0..2 {
        let file = directory.path().join(format!("{host}.json"));
        std::fs::write(file, serde_json::to_string(&net.info(host)).unwrap()).unwrap();
    }
    let found = || {
        let probes = doctor::examine(&object(), &source);
        let probe = probes.into_iter().find(|probe| probe.name == "fast path").unwrap();
        (probe.state, probe.detail)
    };
    let (state, detail) = found();
    assert_eq!(state, mesh_core::admin::Fitness::Degraded);
    assert!(detail.contains("shared segment") && detail.contains("2 of 2"), "{detail}");
    for host in 0..2 {
        ip_in(&net, host, &format!("addr flush dev eth0\naddr add {}/32 dev eth0\n", v4(host)));
    }
    let (state, detail) = found();
    assert_eq!(state, mesh_core::admin::Fitness::Ok);
    assert!(detail.contains("routed") && detail.contains("2 pods"), "{detail}");
}
