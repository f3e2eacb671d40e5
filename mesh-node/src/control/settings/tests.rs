use std::sync::Arc;

use mesh_core::state::{MeshOptions, StateIndex};
use mesh_core::xds::SETTINGS_EXTENSION;
use mesh_core::xds::proto::workload as wire;
use prost_types::value::Kind;
use prost_types::{Any, ListValue, Struct, Value};

use super::*;
use crate::proxy::tests::bed::{address, workload};

fn text(word: &str) -> Kind {
    Kind::StringValue(word.to_owned())
}

fn list(kinds: Vec<Kind>) -> Kind {
    Kind::ListValue(ListValue { values: kinds.into_iter().map(|kind| Value { kind: Some(kind) }).collect() })
}

/// A workload that is wanted on `node`, with these settings.
fn pod(name: &str, last: u8, node: &str, fields: &[(&str, Kind)]) -> wire::Workload {
    let mut pod = workload(name, [10, 0, 0, last].into(), node);
    pod.extensions.push(wire::Extension { name: ENROL_EXTENSION.into(), config: None });
    if !fields.is_empty() {
        let value = |kind: &Kind| Value { kind: Some(kind.clone()) };
        let fields = fields.iter().map(|(key, kind)| ((*key).to_owned(), value(kind))).collect();
        let value = prost::Message::encode_to_vec(&Struct { fields });
        let config = Some(Any { type_url: String::new(), value });
        pod.extensions.push(wire::Extension { name: SETTINGS_EXTENSION.into(), config });
    }
    pod
}

fn mesh(pods: Vec<wire::Workload>) -> Arc<MeshState> {
    let mut index = StateIndex::new(MeshOptions::default());
    for pod in pods {
        index.apply_address(&pod.uid.clone(), &address(pod)).unwrap();
    }
    index.snapshot()
}

fn config() -> Config {
    let mut config = Config::default();
    config.node.name = "n1".into();
    config
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn all_set() -> Vec<(&'static str, Kind)> {
    vec![
        ("failOpen", Kind::BoolValue(true)),
        ("excludedCIDRs", list(vec![text("192.168.0.0/16")])),
        ("excludedPorts", list(vec![Kind::NumberValue(9000.0)])),
    ]
}

#[test]
fn what_the_mesh_sets_holds_on_the_node() {
    let state =
        mesh(vec![pod("a", 1, "n1", &all_set()), pod("b", 2, "n1", &all_set()), pod("c", 3, "n2", &[])]);
    let held = InForce::of_mesh(&state, &config()).unwrap();
    let expected = MeshSettings {
        fail: FailMode::Open,
        excluded: nets(&["192.168.0.0/16"]),
        excluded_ports: vec![9000],
        ..MeshSettings::default()
    };
    assert_eq!(held, InForce { kernel: expected, problems: vec![] });
}

#[test]
fn without_a_wanted_pod_nothing_is_known_of_the_mesh() {
    assert_eq!(InForce::of_mesh(&mesh(vec![pod("c", 3, "n2", &all_set())]), &config()), None);
    assert_eq!(InForce::of_config(&config()).kernel, MeshSettings::default());
}

#[test]
fn what_the_operator_gives_for_the_node_wins() {
    let state = mesh(vec![pod("a", 1, "n1", &all_set())]);
    let mut config = config();
    config.capture.fail = Some(GivenFailMode::Closed);
    config.capture.excluded_cidrs = nets(&["10.9.0.0/16"]);
    config.capture.excluded_ports = vec![1];
    config.capture.dns = false;
    config.proxy.same_node = SameNode::Tunnel;
    let expected = MeshSettings {
        fail: FailMode::Closed,
        dns: false,
        fast_path: false,
        excluded: nets(&["10.9.0.0/16"]),
        excluded_ports: vec![1],
        included: vec![],
    };
    assert_eq!(InForce::of_mesh(&state, &config).unwrap().kernel, expected);
}

#[test]
fn where_pods_differ_the_stricter_side_holds_and_the_status_says_so() {
    let mut all = all_set();
    all.push(("captureOutside", Kind::BoolValue(false)));
    for pods in [
        vec![pod("a", 1, "n1", &all), pod("b", 2, "n1", &[])],
        vec![pod("a", 1, "n1", &[]), pod("b", 2, "n1", &all)],
    ] {
        let held = InForce::of_mesh(&mesh(pods), &config()).unwrap();
        assert_eq!(held.kernel, MeshSettings::default());
        for (problem, name) in
            held.problems.iter().zip(["failOpen", "excludedCIDRs", "excludedPorts", "captureOutside"])
        {
            assert!(problem.starts_with(name), "{problem}");
        }
        assert_eq!(held.problems.len(), 4, "{:?}", held.problems);
    }
}

#[test]
fn settings_that_cannot_be_read_are_named_and_change_nothing_for_others() {
    let bad = pod("a", 1, "n1", &[("failOpen", text("yes"))]);
    let held = InForce::of_mesh(&mesh(vec![bad.clone(), pod("b", 2, "n1", &all_set())]), &config()).unwrap();
    assert_eq!(held.kernel.fail, FailMode::Open);
    assert!(held.problems[0].contains("failOpen"), "{:?}", held.problems);
    let alone = InForce::of_mesh(&mesh(vec![bad]), &config()).unwrap();
    assert_eq!((alone.kernel, alone.problems.len()), (MeshSettings::default(), 1));
}

#[test]
fn without_capture_of_the_outside_only_what_the_mesh_knows_and_does_not_exclude_is_captured() {
    let fields =
        [("captureOutside", Kind::BoolValue(false)), ("excludedCIDRs", list(vec![text("10.0.0.2/31")]))];
    let pods = vec![pod("a", 1, "n1", &fields), pod("b", 2, "n2", &[]), pod("c", 9, "n2", &[])];
    let held = InForce::of_mesh(&mesh(pods), &config()).unwrap();
    // 10.0.0.2 is within the excluded block; as a host it would win over it.
    assert_eq!(held.kernel.included, nets(&["10.0.0.1/32", "10.0.0.9/32"]));
    assert!(!held.describe().capture_outside);
    let mut config = config();
    config.capture.capture_outside = Some(true);
    let pods = vec![pod("a", 1, "n1", &fields)];
    assert_eq!(InForce::of_mesh(&mesh(pods), &config).unwrap().kernel.included, []);
}

#[test]
fn a_mesh_with_more_addresses_than_the_kernel_programs_hold_is_captured_whole() {
    let fields = [("captureOutside", Kind::BoolValue(false))];
    let mut pods = vec![pod("a", 1, "n1", &fields)];
    for number in 0..u16::try_from(MAX_PREFIXES).unwrap() {
        let [high, low] = number.to_be_bytes();
        pods.push(workload(&format!("x{number}"), [10, 1, high, low].into(), "n2"));
    }
    let held = InForce::of_mesh(&mesh(pods), &config()).unwrap();
    assert_eq!(held.kernel.included, []);
    assert!(held.problems[0].contains("4097"), "{:?}", held.problems);
}

#[test]
fn dns_is_answered_unless_the_pods_settings_say_no() {
    let state = mesh(vec![
        pod("a", 1, "n1", &[("dnsCapture", Kind::BoolValue(false))]),
        pod("b", 2, "n1", &[("dnsCapture", Kind::BoolValue(true))]),
        pod("c", 3, "n1", &[]),
    ]);
    let answered = |name: &str| answers_dns(state.workload(&format!("Kubernetes//Pod/shop/{name}")).unwrap());
    assert_eq!(["a", "b", "c"].map(answered), [false, true, true]);
}
