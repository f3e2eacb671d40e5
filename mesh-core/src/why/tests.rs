//! One sentence per verdict and per deciding object.

use std::net::IpAddr;
use std::time::{Duration, UNIX_EPOCH};

use prost::Message as _;

use super::*;
use crate::admin::{Failure, Pod, PodState, Upstream};
use crate::identity::SpiffeId;
use crate::state::{MeshOptions, MeshState, StateIndex};
use crate::xds::SETTINGS_EXTENSION;
use crate::xds::proto::security::{
    self, Authorization, Clause, Match, Rule, StringMatch, string_match::MatchType,
};
use crate::xds::proto::workload::{
    self as wire, Address, GatewayAddress, NamespacedHostname, NetworkAddress, TunnelProtocol,
    WorkloadStatus, address, gateway_address,
};

const NOW: Duration = Duration::from_secs(1_000_000);

/// Two nodes: n1 has shop/frontend-1 and shop/client-1, n2 has shop/backend-1 and shop/backend-2. Service
/// shop/backend has both backends on 8080.
struct World {
    workloads: Vec<wire::Workload>,
    services: Vec<wire::Service>,
    policies: Vec<Authorization>,
}

fn pod(name: &str, ip: &str, node: &str, account: &str) -> wire::Workload {
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![bytes(ip)],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        service_account: account.into(),
        workload_name: account.into(),
        node: node.into(),
        ..Default::default()
    }
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn behind(mut workload: wire::Workload, service: &str, ports: &[(u32, u32)]) -> wire::Workload {
    let ports = ports.iter().map(|(service_port, target_port)| wire::Port {
        service_port: *service_port,
        target_port: *target_port,
        ..Default::default()
    });
    let key = format!("shop/{service}.shop.svc.cluster.local");
    workload.services.insert(key, wire::PortList { ports: ports.collect() });
    workload
}

fn service(name: &str, vip: Option<&str>, ports: &[(u32, u32)]) -> wire::Service {
    let address = |ip| NetworkAddress { address: bytes(ip), ..Default::default() };
    let port = |(service_port, target_port): &(u32, u32)| wire::Port {
        service_port: *service_port,
        target_port: *target_port,
        ..Default::default()
    };
    wire::Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local"),
        addresses: vip.into_iter().map(address).collect(),
        ports: ports.iter().map(port).collect(),
        ..Default::default()
    }
}

fn to_waypoint(name: &str) -> Option<GatewayAddress> {
    let hostname =
        NamespacedHostname { namespace: "shop".into(), hostname: format!("{name}.shop.svc.cluster.local") };
    let destination = Some(gateway_address::Destination::Hostname(hostname));
    Some(GatewayAddress { destination, hbone_mtls_port: 15008 })
}

fn policy(name: &str, action: security::Action, principals: &[&str]) -> Authorization {
    let principal = |p: &&str| StringMatch { match_type: Some(MatchType::Exact((*p).to_owned())) };
    let m = Match { principals: principals.iter().map(principal).collect(), ..Default::default() };
    Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: action.into(),
        rules: vec![Rule { clauses: vec![Clause { matches: vec![m] }] }],
        ..Default::default()
    }
}

impl World {
    fn new() -> Self {
        let backend = |name: &str, ip: &str| behind(pod(name, ip, "n2", "backend"), "backend", &[(80, 8080)]);
        Self {
            workloads: vec![
                pod("frontend-1", "10.0.1.1", "n1", "frontend"),
                pod("client-1", "10.0.1.2", "n1", "client"),
                backend("backend-1", "10.0.2.1"),
                backend("backend-2", "10.0.2.2"),
            ],
            services: vec![service("backend", Some("10.96.0.1"), &[(80, 8080)])],
            policies: vec![],
        }
    }

    fn workload(&mut self, name: &str) -> &mut wire::Workload {
        self.workloads.iter_mut().find(|w| w.name == name).unwrap()
    }

    fn state(&self) -> MeshState {
        let mut index = StateIndex::new(MeshOptions::default());
        let mut apply = |name: &str, kind| {
            index.apply_address(name, &Address { r#type: Some(kind) }).unwrap();
        };
        for s in &self.services {
            apply(&format!("{}/{}", s.namespace, s.hostname), address::Type::Service(s.clone()));
        }
        for w in &self.workloads {
            apply(&w.uid, address::Type::Workload(w.clone()));
        }
        for p in &self.policies {
            index.apply_policy(p).unwrap();
        }
        (*index.snapshot()).clone()
    }

    fn ask(&self, facts: &Facts, src: &str, dst: &str) -> Explanation {
        self.try_ask(facts, src, dst).unwrap()
    }

    fn try_ask(&self, facts: &Facts, src: &str, dst: &str) -> Result<Explanation, NameError> {
        explain(&self.state(), &Question::new(src, dst, None).unwrap(), facts)
    }
}

/// What a node knows: each of `pods` captured, with a certificate for another half day.
fn facts(node: &str, pods: &[(&str, &str)]) -> Facts {
    let now = UNIX_EPOCH + NOW;
    let hours = |n: u64| Duration::from_secs(n * 3600);
    let fresh = CertificateFact { validity: Some((now - hours(1), now + hours(12))), problem: None };
    let identity = |account: &str| SpiffeId::new("", "shop", account);
    Facts {
        node: node.into(),
        fast_path: true,
        pods: pods
            .iter()
            .map(|(name, account)| Pod {
                namespace: "shop".into(),
                name: (*name).into(),
                service_account: (*account).into(),
                state: PodState::Captured,
                ..Pod::default()
            })
            .collect(),
        certificates: pods.iter().map(|(_, account)| (identity(account), fresh.clone())).collect(),
        failures: vec![],
        flows: vec![],
        illegal_ports: vec![15001, 15006, 15008],
        xds: Upstream { address: "https://control:15012".into(), connected: true, ..Upstream::default() },
        now,
    }
}

fn n1() -> Facts {
    facts("n1", &[("frontend-1", "frontend"), ("client-1", "client")])
}

fn n2() -> Facts {
    facts("n2", &[("backend-1", "backend"), ("backend-2", "backend")])
}

fn step(explanation: &Explanation, stage: Stage) -> &Step {
    explanation
        .steps
        .iter()
        .find(|s| s.stage == stage)
        .unwrap_or_else(|| panic!("no step {} in {explanation:#?}", stage.as_str()))
}

const FRONTEND: &str = "cluster.local/ns/shop/sa/frontend";

#[test]
fn without_policies_a_service_is_reached_through_the_tunnel() {
    let e = World::new().ask(&n1(), "shop/frontend-1", "shop/backend");
    assert_eq!((e.verdict, e.path, e.port), (Verdict::Allowed, Some(Path::Tunnel), Some(80)), "{e:#?}");
    assert!(step(&e, Stage::Routing).detail.contains("one of 2 endpoints"), "{e:#?}");
    assert_eq!(step(&e, Stage::DestinationCertificate).outcome, Outcome::Elsewhere);
    assert_eq!((e.source_is_local, e.destination_is_local), (true, false));
    assert!(e.steps.windows(2).all(|pair| pair[0].stage <= pair[1].stage), "steps are in order");
}

#[test]
fn an_allow_policy_that_matches_is_named_with_its_rule() {
    let mut world = World::new();
    world.policies = vec![policy("only-frontend", security::Action::Allow, &[FRONTEND])];
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend");
    assert_eq!(e.verdict, Verdict::Allowed, "{e:#?}");
    assert_eq!(e.decided_by, Some(Object::new("AuthorizationPolicy", "shop", "only-frontend")));
    assert!(step(&e, Stage::Policy).detail.ends_with("rule 1"), "{e:#?}");
}

#[test]
fn when_no_allow_policy_matches_the_text_says_what_they_want_and_who_came() {
    let mut world = World::new();
    world.policies = vec![policy("only-frontend", security::Action::Allow, &[FRONTEND])];
    let e = world.ask(&n1(), "shop/client-1", "shop/backend:80");
    assert_eq!(e.verdict, Verdict::Denied, "{e:#?}");
    assert_eq!(e.decided_by, Some(Object::new("AuthorizationPolicy", "shop", "only-frontend")));
    for part in [FRONTEND, "cluster.local/ns/shop/sa/client"] {
        assert!(e.summary.contains(part), "{part} in {}", e.summary);
    }
    assert!(e.fix.unwrap().contains("add principal cluster.local/ns/shop/sa/client"));
}

#[test]
fn a_deny_policy_that_matches_decides() {
    let mut world = World::new();
    world.policies = vec![policy("not-frontend", security::Action::Deny, &[FRONTEND])];
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend-1:8080");
    assert_eq!(e.verdict, Verdict::Denied, "{e:#?}");
    assert_eq!(e.decided_by, Some(Object::new("AuthorizationPolicy", "shop", "not-frontend")));
}

#[test]
fn mode_strict_denies_a_source_outside_of_the_mesh_and_is_named_as_peer_authentication() {
    let mut world = World::new();
    let presence = StringMatch { match_type: Some(MatchType::Presence(())) };
    let m = Match { not_principals: vec![presence], ..Default::default() };
    world.policies = vec![Authorization {
        name: "istio_converted_static_strict".into(),
        namespace: "istio-system".into(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: vec![Rule { clauses: vec![Clause { matches: vec![m] }] }],
        ..Default::default()
    }];
    for name in ["backend-1", "backend-2"] {
        world.workload(name).authorization_policies =
            vec!["istio-system/istio_converted_static_strict".into()];
    }
    let inside = world.ask(&n1(), "shop/frontend-1", "shop/backend");
    assert_eq!(inside.verdict, Verdict::Allowed, "{inside:#?}");

    world.workload("client-1").tunnel_protocol = TunnelProtocol::None.into();
    let e = world.ask(&facts("n1", &[]), "shop/client-1", "shop/backend");
    assert_eq!((e.verdict, e.path), (Verdict::Denied, Some(Path::Plaintext)), "{e:#?}");
    assert_eq!(e.decided_by.unwrap().kind, "PeerAuthentication");
    assert!(e.fix.unwrap().contains("enrol the source"));
}

#[test]
fn a_policy_that_has_not_arrived_denies_and_says_so() {
    let mut world = World::new();
    world.workload("backend-2").authorization_policies = vec!["shop/late".into()];
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend");
    assert_eq!(e.verdict, Verdict::Denied, "{e:#?}");
    assert!(e.summary.contains("has not reached this node"), "{}", e.summary);
    assert!(e.summary.contains("1 of 2 endpoints refuse"), "{}", e.summary);
}

#[test]
fn policies_of_a_destination_outside_of_the_mesh_are_reported_as_not_enforced() {
    let mut world = World::new();
    world.policies = vec![policy("only-frontend", security::Action::Allow, &[FRONTEND])];
    for name in ["backend-1", "backend-2"] {
        world.workload(name).tunnel_protocol = TunnelProtocol::None.into();
    }
    let e = world.ask(&n1(), "shop/client-1", "shop/backend");
    assert_eq!((e.verdict, e.path), (Verdict::Allowed, Some(Path::Plaintext)), "{e:#?}");
    let policy = step(&e, Stage::Policy);
    assert_eq!(policy.outcome, Outcome::Warn);
    assert!(
        policy.detail.contains("not enforced") && policy.detail.contains("shop/only-frontend"),
        "{policy:?}"
    );
    assert_eq!(step(&e, Stage::DestinationEnrolment).outcome, Outcome::Warn);
}

#[test]
fn a_service_whose_endpoints_are_not_ready_is_unreachable_from_inside_and_outside() {
    let mut world = World::new();
    for name in ["backend-1", "backend-2"] {
        world.workload(name).status = WorkloadStatus::Unhealthy.into();
    }
    world.workload("client-1").tunnel_protocol = TunnelProtocol::None.into();
    for (facts, src) in [(n1(), "shop/frontend-1"), (facts("n1", &[]), "shop/client-1")] {
        let e = world.ask(&facts, src, "shop/backend");
        assert_eq!(e.verdict, Verdict::Unreachable, "{e:#?}");
        assert!(e.summary.contains("2 not ready"), "{}", e.summary);
        assert_eq!(e.decided_by, Some(Object::new("Service", "shop", "backend")));
    }
}

#[test]
fn a_port_that_the_service_lacks_and_a_port_of_the_mesh_are_unreachable() {
    let world = World::new();
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend:443");
    assert_eq!(e.verdict, Verdict::Unreachable, "{e:#?}");
    assert!(e.summary.contains("does not have this port"), "{}", e.summary);
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend-1:15008");
    assert_eq!(e.verdict, Verdict::Unreachable, "{e:#?}");
    assert!(e.summary.contains("one of the mesh's own"), "{}", e.summary);
}

#[test]
fn a_waypoint_that_is_asked_for_and_missing_is_never_bypassed() {
    let mut world = World::new();
    world.services[0].waypoint = to_waypoint("wp");
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend");
    assert_eq!((e.verdict, e.path), (Verdict::Unreachable, None), "{e:#?}");
    assert!(e.summary.contains("unknown waypoint"), "{}", e.summary);
}

#[test]
fn behind_a_waypoint_the_endpoints_see_the_waypoint() {
    let mut world = World::new();
    world.services[0].waypoint = to_waypoint("wp");
    world.services.push(service("wp", Some("10.96.0.9"), &[(15008, 15008)]));
    let mut waypoint = behind(pod("wp-1", "10.0.2.9", "n2", "wp"), "wp", &[(15008, 15008)]);
    waypoint.native_tunnel = true;
    world.workloads.push(waypoint);
    world.policies = vec![policy("only-frontend", security::Action::Allow, &[FRONTEND])];
    let e = world.ask(&n1(), "shop/frontend-1", "shop/backend");
    assert_eq!((e.verdict, e.path), (Verdict::Denied, Some(Path::Waypoint)), "{e:#?}");
    assert!(e.summary.contains("cluster.local/ns/shop/sa/wp"), "{}", e.summary);
}

#[test]
fn pods_of_one_node_take_the_fast_path_when_addressed_themselves_and_the_mesh_lets_them() {
    let world = World::new();
    let e = world.ask(&n1(), "shop/frontend-1", "shop/client-1:8080");
    assert_eq!((e.verdict, e.path), (Verdict::Allowed, Some(Path::Fast)), "{e:#?}");
    let tunnel_only = Facts { fast_path: false, ..n1() };
    let e = world.ask(&tunnel_only, "shop/frontend-1", "shop/client-1:8080");
    assert_eq!(e.path, Some(Path::Tunnel), "{e:#?}");
    let e = world.ask(&n2(), "shop/backend-1", "shop/backend");
    assert_eq!(e.path, Some(Path::Tunnel), "service-addressed: {e:#?}");

    let mut world = World::new();
    let tunnel = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("tunnel".into())) };
    let settings = prost_types::Struct { fields: [("sameNode".to_owned(), tunnel)].into() };
    let config = prost_types::Any { type_url: String::new(), value: settings.encode_to_vec() };
    let extension = wire::Extension { name: SETTINGS_EXTENSION.into(), config: Some(config) };
    world.workload("client-1").extensions.push(extension);
    let e = world.ask(&n1(), "shop/frontend-1", "shop/client-1:8080");
    assert_eq!(e.path, Some(Path::Tunnel), "the destination asks for the tunnel: {e:#?}");
}

#[test]
fn addresses_that_the_mesh_does_not_know_pass_through_and_own_ones_stay_in_the_kernel() {
    let world = World::new();
    let e = world.ask(&n1(), "shop/frontend-1", "192.0.2.1:443");
    assert_eq!((e.verdict, e.path), (Verdict::Allowed, Some(Path::Passthrough)), "{e:#?}");
    let e = world.ask(&n1(), "shop/frontend-1", "10.0.1.1:443");
    assert_eq!((e.verdict, e.path), (Verdict::Allowed, Some(Path::Outside)), "{e:#?}");
}

#[test]
fn a_certificate_that_is_missing_expired_or_early_ends_the_connection_and_a_late_one_is_warned_of() {
    let world = World::new();
    let now = UNIX_EPOCH + NOW;
    let hours = |n: u64| Duration::from_secs(n * 3600);
    let refused = Some("Unauthenticated".to_owned());
    for (validity, problem, outcome, text) in [
        (None, refused.clone(), Outcome::Blocked, "Unauthenticated"),
        (None, None, Outcome::Blocked, "no certificate"),
        (Some((now - hours(24), now - hours(3))), refused.clone(), Outcome::Blocked, "expired 3h ago"),
        (Some((now + hours(3), now + hours(24))), None, Outcome::Blocked, "valid only in 3h"),
        (Some((now - hours(22), now + hours(2))), None, Outcome::Warn, "renewal is late"),
        (Some((now - hours(1), now + hours(23))), refused, Outcome::Warn, "renewal is late: Unauthenticated"),
        (Some((now - hours(1), now + hours(23))), None, Outcome::Ok, "valid for another 23h"),
    ] {
        let mut facts = n1();
        let fact = CertificateFact { validity, problem };
        facts.certificates.insert(SpiffeId::new("", "shop", "frontend"), fact);
        let e = world.ask(&facts, "shop/frontend-1", "shop/backend");
        let found = step(&e, Stage::SourceCertificate);
        assert_eq!(found.outcome, outcome, "{found:?}");
        assert!(found.detail.contains(text), "{text} in {}", found.detail);
        let unreachable = e.verdict == Verdict::Unreachable;
        assert_eq!(unreachable, outcome == Outcome::Blocked, "{e:#?}");
    }
}

#[test]
fn a_destination_that_peers_tunnel_to_and_that_is_not_captured_is_unreachable() {
    let world = World::new();
    let mut facts = n2();
    facts.pods[1].state = PodState::Failed;
    facts.pods[1].problem = Some("its network namespace is gone".into());
    let e = world.ask(&facts, "shop/frontend-1", "shop/backend");
    assert_eq!(e.verdict, Verdict::Unreachable, "{e:#?}");
    assert!(e.summary.contains("its network namespace is gone"), "{}", e.summary);
    assert_eq!(e.decided_by, Some(Object::new("Workload", "shop", "backend-2")));
}

#[test]
fn a_source_that_could_not_be_captured_goes_out_in_plaintext() {
    let world = World::new();
    let mut facts = n1();
    facts.pods[0].state = PodState::Failed;
    facts.pods[0].problem = Some("map full".into());
    let e = world.ask(&facts, "shop/frontend-1", "shop/backend");
    assert_eq!(e.path, Some(Path::Plaintext), "{e:#?}");
    let enrolment = step(&e, Stage::SourceEnrolment);
    assert_eq!(enrolment.outcome, Outcome::Warn);
    assert!(enrolment.detail.contains("map full"), "{enrolment:?}");
}

#[test]
fn a_headless_service_is_reached_by_its_endpoints_own_addresses() {
    let mut world = World::new();
    world.services = vec![service("backend", None, &[(8080, 8080)])];
    let e = world.ask(&n1(), "shop/frontend-1", "backend");
    assert_eq!((e.verdict, e.path, e.port), (Verdict::Allowed, Some(Path::Tunnel), Some(8080)), "{e:#?}");
    world.services = vec![service("backend", None, &[(8080, 8080)])];
    world.workloads.truncate(2);
    let e = world.ask(&n1(), "shop/frontend-1", "backend");
    assert_eq!(e.verdict, Verdict::Unreachable, "{e:#?}");
    assert!(e.summary.contains("neither a virtual address nor endpoints"), "{}", e.summary);
}

#[test]
fn names_that_mean_nothing_come_with_suggestions() {
    let world = World::new();
    let unknown = world.try_ask(&n1(), "shop/frontent-1", "shop/backend").unwrap_err();
    assert_eq!((unknown.role.as_str(), &unknown.suggestions[0][..]), ("source", "shop/frontend-1"));
    let unknown = world.try_ask(&n1(), "frontend-1", "shop/bakend").unwrap_err();
    assert_eq!((unknown.role.as_str(), &unknown.suggestions[0][..]), ("destination", "shop/backend"));
    let open = world.try_ask(&n1(), "frontend-1", "client-1").unwrap_err();
    assert!(open.problem.contains("append it"), "{open}");

    let mut world = World::new();
    world.services = vec![service("backend", Some("10.96.0.1"), &[(80, 8080), (443, 8443)])];
    let open = world.try_ask(&n1(), "frontend-1", "backend").unwrap_err();
    assert_eq!(open.suggestions, ["backend:80", "backend:443"], "{open}");

    let mut twin = pod("frontend-1", "10.0.3.1", "n3", "frontend");
    (twin.uid, twin.namespace) = ("Kubernetes//Pod/bank/frontend-1".into(), "bank".into());
    world.workloads.push(twin);
    let ambiguous = world.try_ask(&n1(), "frontend-1", "backend:80").unwrap_err();
    assert_eq!(ambiguous.suggestions, ["bank/frontend-1", "shop/frontend-1"], "{ambiguous}");
}

#[test]
fn one_thing_can_be_named_in_many_ways() {
    let world = World::new();
    for dst in [
        "backend:80",
        "shop/backend:80",
        "service/shop/backend:80",
        "backend.shop.svc.cluster.local:80",
        "10.96.0.1:80",
    ] {
        let e = world.ask(&n1(), "shop/frontend-1", dst);
        assert_eq!(e.destination, Object::new("Service", "shop", "backend"), "{dst}");
    }
    for src in ["10.0.1.1", "workload/shop/frontend-1", "Kubernetes//Pod/shop/frontend-1", "shop/frontend"] {
        let e = world.ask(&n1(), src, "workload/shop/backend:8080");
        assert_eq!(e.source, Object::new("Workload", "shop", "frontend-1"), "{src}");
        assert_eq!(e.destination, Object::new("Workload", "shop", "backend-1"), "an owner's first pod");
    }
}

fn failure(direction: &str, pod: &str, dst: &str, identity: Option<&str>) -> Failure {
    Failure {
        at_ms: (NOW.as_secs() - 300) * 1000,
        direction: direction.into(),
        pod: pod.into(),
        src: Some("10.0.1.1:40000".into()),
        src_identity: identity.map(str::to_owned),
        dst: Some(dst.into()),
        code: "M0401".into(),
        flag: "DENY".into(),
        error: "explicitly denied by: shop/x".into(),
        decided_by: Some("AuthorizationPolicy shop/x".into()),
    }
}

#[test]
fn the_last_real_failure_is_the_one_between_the_two() {
    let world = World::new();
    let spiffe = format!("spiffe://{FRONTEND}");
    for (facts, entry, found) in [
        (n1(), failure("outbound", "shop/frontend-1", "10.96.0.1:80", None), true),
        (n1(), failure("outbound", "shop/frontend-1", "10.0.2.2:8080", None), true),
        (n1(), failure("outbound", "shop/client-1", "10.96.0.1:80", None), false),
        (n1(), failure("outbound", "shop/frontend-1", "10.96.0.7:80", None), false),
        (n2(), failure("inbound", "shop/backend-2", "10.0.2.2:8080", Some(&spiffe)), true),
        (n2(), failure("inbound", "shop/backend-2", "10.0.2.2:8080", None), true),
        (n2(), failure("inbound", "shop/backend-2", "10.0.2.2:8080", Some("spiffe://a/ns/b/sa/c")), false),
    ] {
        let facts = Facts { failures: vec![entry.clone()], ..facts };
        let e = world.ask(&facts, "shop/frontend-1", "shop/backend");
        let last = step(&e, Stage::LastFailure);
        assert_eq!(last.outcome == Outcome::Warn, found, "{entry:?} {last:?}");
        if found {
            assert_eq!(last.object, Some(Object::new("AuthorizationPolicy", "shop", "x")));
            assert!(last.detail.starts_with("5m ago"), "{last:?}");
        }
    }
}

#[test]
fn the_views_of_both_nodes_make_one_answer() {
    let world = World::new();
    let mut far = n2();
    far.certificates.clear();
    far.failures = vec![failure("inbound", "shop/backend-2", "10.0.2.2:8080", None)];
    let ask = |facts: &Facts| world.ask(facts, "shop/frontend-1", "shop/backend");
    let merged = merge(vec![ask(&far), ask(&n1()), ask(&facts("n3", &[]))]).unwrap();
    assert_eq!(merged.node, "n1, n2");
    assert_eq!(step(&merged, Stage::SourceCertificate).outcome, Outcome::Ok, "from n1: {merged:#?}");
    assert_eq!(step(&merged, Stage::DestinationCertificate).outcome, Outcome::Blocked, "from n2");
    assert_eq!(merged.verdict, Verdict::Unreachable);
    assert!(merged.steps.iter().any(|s| s.stage == Stage::LastFailure && s.outcome == Outcome::Warn));
    assert_eq!(merge(vec![]), None);
}

#[test]
fn a_node_that_lost_its_control_plane_says_that_its_view_may_be_old() {
    let mut facts = n1();
    facts.xds.connected = false;
    facts.xds.problem = Some("connection refused".into());
    let e = World::new().ask(&facts, "shop/frontend-1", "shop/backend");
    assert_eq!(e.steps[0].stage, Stage::View);
    assert!(e.steps[0].detail.contains("connection refused"));
    assert_eq!(e.verdict, Verdict::Allowed, "it is a warning, no verdict");
}

#[test]
fn an_answer_survives_the_way_over_the_admin_endpoint() {
    let e = World::new().ask(&n1(), "shop/frontend-1", "shop/backend");
    let json = serde_json::to_string(&e).unwrap();
    assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), e);
    assert!(json.contains(r#""stage":"sourceEnrolment""#), "{json}");
}

#[test]
fn what_tracing_saw_between_the_two_is_part_of_the_answer() {
    use crate::flows::{Flow, Kind, Party, Path as Over, Verdict as Fate};
    let party = |pod: &str| Party { namespace: "shop".into(), pod: pod.into(), ..Party::default() };
    let flow = |kind, to: &str| Flow {
        at_us: u64::try_from(NOW.as_micros()).unwrap(),
        node: "n2".into(),
        kind,
        path: Over::Tunnel,
        source: party("frontend-1"),
        destination: party(to),
        ..Flow::default()
    };
    let ask = |flows: Vec<Flow>| {
        let facts = Facts { flows, ..n2() };
        World::new().ask(&facts, "shop/frontend-1", "shop/backend")
    };
    let dropped = Flow {
        verdict: Fate::Dropped,
        reason: "NETFILTER_DROP".into(),
        count: 4,
        ..flow(Kind::Drop, "backend-1")
    };
    let closed = Flow { srtt_us: Some(250), retransmits: Some(2), ..flow(Kind::Closed, "backend-2") };
    let e = ask(vec![flow(Kind::Accepted, "backend-2"), closed, dropped.clone()]);
    let traffic = step(&e, Stage::Traffic);
    assert_eq!(traffic.outcome, Outcome::Warn);
    for part in ["1 connections", "(tunnel)", "4 packets dropped: NETFILTER_DROP", "250 us", "2 segments"] {
        assert!(traffic.detail.contains(part), "no {part} in {}", traffic.detail);
    }
    assert!(traffic.fix.as_ref().unwrap().contains("node n2"), "{traffic:?}");
    // Of others, or long ago, is none of theirs.
    let old = Flow { at_us: 1, ..dropped.clone() };
    let of_others = Flow { source: party("client-1"), ..dropped.clone() };
    let elsewhere = Flow { destination: party("other-1"), ..dropped };
    let e = ask(vec![old, of_others, elsewhere]);
    assert!(e.steps.iter().all(|step| step.stage != Stage::Traffic), "{e:#?}");
    let e = ask(vec![flow(Kind::Accepted, "backend-1")]);
    assert_eq!(step(&e, Stage::Traffic).outcome, Outcome::Ok);
}
