//! Agents come and go: pins, heartbeat, failing open and closed.

use crate::support::*;
use mesh_node::capture::{Capture, CaptureConfig, FailMode, MeshSettings};
use std::io::ErrorKind;
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

#[test]
fn two_agents_overlap_without_losing_a_connection() {
    let net = Net::new(2);
    let pins = Pins::new(&net.prefix);
    let old = Capture::load(pins.config()).unwrap();
    let old_pod = Pod::enrol(&old, &net.info(0));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut made = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                connect(&net.hosts[0], at(v4(1), 80)).unwrap_or_else(|error| panic!("after {made}: {error}"));
                made += 1;
            }
            made
        });
        std::thread::sleep(Duration::from_millis(200));
        let new = Capture::load(pins.config()).unwrap();
        let new_pod = Pod::enrol(&new, &net.info(0));
        std::thread::sleep(Duration::from_millis(200));
        let mut served = std::iter::from_fn(|| old_pod.outbound.accept().ok()).count();
        drop(old_pod);
        drop(old);
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let made = load.join().unwrap();
        served += std::iter::from_fn(|| new_pod.outbound.accept().ok()).count();
        assert!(made > 0);
        assert_eq!(served, made);
    });
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
