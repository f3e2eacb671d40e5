use super::*;
use crate::dns::samples::{mesh, pod, service};
use hickory_proto::op::Query;
use mesh_core::xds::proto::workload as wire;
use std::collections::BTreeSet;

/// A mesh and the pod `client` of namespace `shop`, asking.
struct Bench {
    state: std::sync::Arc<MeshState>,
    rules: Rules,
    search: Vec<String>,
}

fn bench(services: Vec<wire::Service>, workloads: Vec<wire::Workload>) -> Bench {
    let domain = ClusterDomain::new("cluster.local");
    let search = domain.default_search("shop");
    Bench { state: mesh(services, workloads), rules: Rules { domain, preferred_namespace: None }, search }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

impl Bench {
    fn outcome(&self, query: &Message) -> Outcome {
        let workload = self.state.workload("Kubernetes//Pod/shop/client").unwrap();
        let client = Client { workload, search: &self.search };
        answer(query, Some(client), &self.state, &self.rules, &mut fastrand::Rng::with_seed(7))
    }

    /// The answer section as text, sorted; `None` if the query is forwarded.
    fn ask(&self, name: &str, kind: RecordType) -> Option<Vec<String>> {
        match self.outcome(&query(name, kind)) {
            Outcome::Forward => None,
            Outcome::Reply(reply) => {
                assert_eq!(
                    reply.metadata.response_code,
                    ResponseCode::NoError,
                    "a known name is never denied"
                );
                assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
                let record = |r: &Record| format!("{} {} {} {}", r.name, r.ttl, r.record_type(), r.data);
                let mut records: Vec<_> = reply.answers.iter().map(record).collect();
                records.sort();
                Some(records)
            }
        }
    }

    fn a(&self, name: &str) -> Option<Vec<String>> {
        self.ask(name, RecordType::A)
    }

    fn aaaa(&self, name: &str) -> Option<Vec<String>> {
        self.ask(name, RecordType::AAAA)
    }
}

fn cart() -> wire::Service {
    service("shop", "cart.shop.svc.cluster.local", &["10.96.0.1", "fd00::1"])
}

fn records(records: &[&str]) -> Option<Vec<String>> {
    Some(records.iter().map(|r| (*r).to_owned()).collect())
}

#[test]
fn a_service_is_answered_by_its_full_name_in_both_families() {
    let bench = bench(vec![cart()], vec![]);
    let name = "cart.shop.svc.cluster.local.";
    assert_eq!(bench.a(name), records(&["cart.shop.svc.cluster.local. 30 A 10.96.0.1"]));
    assert_eq!(bench.aaaa(name), records(&["cart.shop.svc.cluster.local. 30 AAAA fd00::1"]));
}

#[test]
fn short_names_are_completed_and_answered_under_the_name_that_was_asked() {
    let bench = bench(vec![cart(), service("pay", "bank.pay.svc.cluster.local", &["10.96.0.2"])], vec![]);
    for (name, ip) in [
        ("cart.", "10.96.0.1"),
        ("cart.shop.", "10.96.0.1"),
        ("bank.pay.", "10.96.0.2"),
        ("bank.pay.svc.", "10.96.0.2"),
    ] {
        assert_eq!(bench.a(name), records(&[&format!("{name} 30 A {ip}")]), "{name}");
    }
    assert_eq!(bench.a("bank."), None, "of another namespace");
}

#[test]
fn a_pod_name_of_a_service_is_not_answered_by_the_mesh() {
    let bench = bench(vec![cart()], vec![pod("db-0", &["10.0.0.2"], &["shop/cart.shop.svc.cluster.local"])]);
    assert_eq!(bench.a("db-0.cart.shop.svc.cluster.local."), None);
}

#[test]
fn an_unknown_name_is_forwarded() {
    let bench = bench(vec![cart()], vec![]);
    for name in ["example.com.", "nothing.shop.svc.cluster.local.", "cluster.local.", "."] {
        assert_eq!(bench.a(name), None, "{name}");
    }
}

#[test]
fn other_types_classes_and_operations_are_forwarded_even_for_known_names() {
    let bench = bench(vec![cart()], vec![]);
    for kind in [RecordType::MX, RecordType::SRV, RecordType::TXT, RecordType::HTTPS, RecordType::ANY] {
        assert_eq!(bench.ask("cart.shop.svc.cluster.local.", kind), None, "{kind}");
    }
    let mut chaos = query("cart.shop.svc.cluster.local.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(bench.outcome(&chaos), Outcome::Forward);
    let mut update = query("cart.shop.svc.cluster.local.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_eq!(bench.outcome(&update), Outcome::Forward);
}

#[test]
fn a_client_that_is_not_known_gets_a_failure_to_try_again() {
    let bench = bench(vec![cart()], vec![]);
    let query = query("cart.shop.svc.cluster.local.", RecordType::A);
    let outcome = answer(&query, None, &bench.state, &bench.rules, &mut fastrand::Rng::new());
    let Outcome::Reply(reply) = outcome else { panic!("forwarded") };
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!((reply.metadata.id, &reply.queries), (query.metadata.id, &query.queries));
    assert!(!reply.metadata.authoritative && reply.metadata.recursion_desired);
}

#[test]
fn a_known_name_without_an_address_of_the_family_has_an_empty_answer() {
    let bench = bench(vec![service("shop", "v4.shop.svc.cluster.local", &["10.96.0.9"])], vec![]);
    assert_eq!(bench.aaaa("v4.shop.svc.cluster.local."), records(&[]));
    assert_eq!(bench.aaaa("v4.shop.svc.cluster.local.shop.svc.cluster.local."), records(&[]), "nor an alias");
}

#[test]
fn a_name_with_a_search_domain_is_answered_with_an_alias() {
    let bench = bench(vec![service("shop", "api.example.com", &["240.240.0.1"])], vec![]);
    assert_eq!(bench.a("api.example.com."), records(&["api.example.com. 30 A 240.240.0.1"]));
    for search in ["shop.svc.cluster.local.", "svc.cluster.local.", "cluster.local."] {
        let asked = format!("api.example.com.{search}");
        let alias = format!("{asked} 30 CNAME api.example.com.");
        assert_eq!(bench.a(&asked), records(&["api.example.com. 30 A 240.240.0.1", &alias]), "{search}");
    }
    assert_eq!(bench.a("api.example.com.other.svc.cluster.local."), None, "not on the search list");
}

#[test]
fn the_alias_comes_before_the_addresses() {
    let bench = bench(vec![service("shop", "api.example.com", &["240.240.0.1", "240.240.0.2"])], vec![]);
    let Outcome::Reply(reply) = bench.outcome(&query("api.example.com.cluster.local.", RecordType::A)) else {
        panic!("forwarded")
    };
    assert_eq!(reply.answers[0].record_type(), RecordType::CNAME);
    assert_eq!(reply.answers.len(), 3);
}

#[test]
fn the_search_list_of_the_pod_decides() {
    let mut bench = bench(vec![service("shop", "api.example.com", &["240.240.0.1"])], vec![]);
    bench.search = vec!["corp.example".to_owned()];
    assert!(bench.a("api.example.com.corp.example.").is_some());
    assert_eq!(bench.a("api.example.com.shop.svc.cluster.local."), None);
}

#[test]
fn the_case_of_the_query_is_kept_and_does_not_matter() {
    let bench = bench(vec![service("shop", "api.example.com", &["240.240.0.1"])], vec![]);
    assert_eq!(bench.a("aPi.ExAmple.com."), records(&["aPi.ExAmple.com. 30 A 240.240.0.1"]));
    assert_eq!(
        bench.a("aPi.ExAmple.com.Cluster.Local."),
        records(&[
            "aPi.ExAmple.com. 30 A 240.240.0.1",
            "aPi.ExAmple.com.Cluster.Local. 30 CNAME aPi.ExAmple.com."
        ])
    );
}

#[test]
fn an_exact_host_wins_over_wildcards_and_a_longer_wildcard_over_a_shorter_one() {
    let bench = bench(
        vec![
            service("shop", "*.com", &["240.240.0.1"]),
            service("shop", "*.example.com", &["240.240.0.2"]),
            service("shop", "www.example.com", &["240.240.0.3"]),
        ],
        vec![],
    );
    for (name, ip) in [
        ("www.example.com.", "240.240.0.3"),
        ("a.example.com.", "240.240.0.2"),
        ("b.a.example.com.", "240.240.0.2"),
        ("example.com.", "240.240.0.1"),
        ("other.com.", "240.240.0.1"),
    ] {
        assert_eq!(bench.a(name), records(&[&format!("{name} 30 A {ip}")]), "{name}");
    }
    assert_eq!(bench.a("com."), None);
}

#[test]
fn a_wildcard_answers_under_the_name_that_was_asked_also_without_its_search_domain() {
    let bench = bench(vec![service("shop", "*.example.com", &["240.240.0.2"])], vec![]);
    let name = "a.example.com.svc.cluster.local.";
    assert_eq!(bench.a(name), records(&[&format!("{name} 30 A 240.240.0.2")]));
}

#[test]
fn a_service_without_an_address_is_forwarded_unless_it_is_headless() {
    let headless = service("shop", "db.shop.svc.cluster.local", &[]);
    let bench = bench(vec![service("shop", "api.example.com", &[]), headless], vec![]);
    assert_eq!(bench.a("api.example.com."), None);
    assert_eq!(bench.a("db.shop.svc.cluster.local."), records(&[]), "known, without endpoints");
}

#[test]
fn a_host_without_an_address_does_not_hide_a_wildcard_that_has_one() {
    let bench = bench(
        vec![service("shop", "api.example.com", &[]), service("shop", "*.example.com", &["240.240.0.2"])],
        vec![],
    );
    assert_eq!(bench.a("api.example.com."), records(&["api.example.com. 30 A 240.240.0.2"]));
}

#[test]
fn a_headless_service_answers_one_address_per_endpoint_and_family() {
    let key = ["shop/db.shop.svc.cluster.local"];
    let bench = bench(
        vec![service("shop", "db.shop.svc.cluster.local", &[])],
        vec![
            pod("db-0", &["10.0.0.2", "10.0.0.3", "fd00::2"], &key),
            pod("db-1", &["10.0.0.4"], &key),
            pod("other", &["10.0.0.5"], &[]),
        ],
    );
    let name = "db.shop.svc.cluster.local.";
    assert_eq!(bench.a(name), records(&[&format!("{name} 30 A 10.0.0.2"), &format!("{name} 30 A 10.0.0.4")]));
    assert_eq!(bench.aaaa(name), records(&[&format!("{name} 30 AAAA fd00::2")]));
}

#[test]
fn a_headless_service_leaves_out_endpoints_that_are_not_ready_unless_it_publishes_them() {
    let key = ["shop/db.shop.svc.cluster.local"];
    let mut unready = pod("db-0", &["10.0.0.2"], &key);
    unready.status = wire::WorkloadStatus::Unhealthy.into();
    let mut headless = service("shop", "db.shop.svc.cluster.local", &[]);
    let name = "db.shop.svc.cluster.local.";
    assert_eq!(bench(vec![headless.clone()], vec![unready.clone()]).a(name), records(&[]));
    headless.load_balancing = Some(wire::LoadBalancing {
        health_policy: wire::load_balancing::HealthPolicy::AllowAll.into(),
        ..Default::default()
    });
    assert_eq!(bench(vec![headless], vec![unready]).a(name), records(&[&format!("{name} 30 A 10.0.0.2")]));
}

#[test]
fn a_headless_service_leaves_out_endpoints_of_other_networks() {
    let key = ["shop/db.shop.svc.cluster.local"];
    let mut far = pod("db-0", &["10.0.0.2"], &key);
    far.network = "other".to_owned();
    let bench = bench(vec![service("shop", "db.shop.svc.cluster.local", &[])], vec![far]);
    assert_eq!(bench.a("db.shop.svc.cluster.local."), records(&[]));
}

#[test]
fn the_families_of_a_service_bound_its_answers() {
    let key = ["shop/db.shop.svc.cluster.local"];
    let mut headless = service("shop", "db.shop.svc.cluster.local", &[]);
    headless.ip_families = wire::IpFamilies::Ipv6Only.into();
    let bench = bench(vec![headless], vec![pod("db-0", &["10.0.0.2", "fd00::2"], &key)]);
    assert_eq!(bench.a("db."), records(&[]));
    assert_eq!(bench.aaaa("db."), records(&["db. 30 AAAA fd00::2"]));
}

#[test]
fn virtual_addresses_of_other_networks_are_left_out() {
    let bench = bench(
        vec![service("shop", "cart.shop.svc.cluster.local", &["10.96.0.1", "other/10.97.0.1"])],
        vec![],
    );
    assert_eq!(bench.a("cart."), records(&["cart. 30 A 10.96.0.1"]));
}

#[test]
fn a_service_that_the_client_may_not_see_is_forwarded() {
    let private = |namespace: &str| wire::Service {
        visibility: wire::Visibility::Namespace.into(),
        ..service(namespace, "api.example.com", &["240.240.0.1"])
    };
    assert_eq!(bench(vec![private("pay")], vec![]).a("api.example.com."), None);
    assert!(bench(vec![private("shop")], vec![]).a("api.example.com.").is_some());
}

#[test]
fn the_own_namespace_wins_then_the_canonical_service_then_the_preferred_namespace_then_the_first() {
    let host = "api.example.com";
    let of = |namespace: &str, ip: &str| service(namespace, host, &[ip]);
    let canonical = |s: wire::Service| wire::Service { canonical: true, ..s };
    let (first, second) = (of("a", "240.0.0.1"), of("b", "240.0.0.2"));
    let best = |services: Vec<wire::Service>, preferred: Option<&str>| {
        let mut bench = bench(services, vec![]);
        bench.rules.preferred_namespace = preferred.map(str::to_owned);
        let all = bench.a("api.example.com.").unwrap();
        assert_eq!(all.len(), 1);
        all[0].rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(best(vec![first.clone(), second.clone()], None), "240.0.0.1");
    assert_eq!(best(vec![first.clone(), second.clone()], Some("b")), "240.0.0.2");
    let third = canonical(of("c", "240.0.0.3"));
    assert_eq!(best(vec![first.clone(), second.clone(), third.clone()], Some("b")), "240.0.0.3");
    assert_eq!(best(vec![first, second, third, of("shop", "240.0.0.4")], Some("b")), "240.0.0.4");
}

#[test]
fn addresses_come_in_changing_order() {
    let vips = ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"];
    let bench = bench(vec![service("shop", "cart.shop.svc.cluster.local", &vips)], vec![]);
    let workload = bench.state.workload("Kubernetes//Pod/shop/client").unwrap();
    let client = Client { workload, search: &bench.search };
    let mut rng = fastrand::Rng::with_seed(1);
    let query = query("cart.", RecordType::A);
    let first: BTreeSet<String> = (0..64)
        .map(|_| match answer(&query, Some(client), &bench.state, &bench.rules, &mut rng) {
            Outcome::Reply(reply) => reply.answers[0].data.to_string(),
            Outcome::Forward => panic!("forwarded"),
        })
        .collect();
    assert_eq!(first.len(), vips.len());
}

#[test]
fn edns_is_answered_with_edns_and_only_then() {
    let bench = bench(vec![cart()], vec![]);
    let mut query = query("cart.", RecordType::A);
    let Outcome::Reply(plain) = bench.outcome(&query) else { panic!("forwarded") };
    assert_eq!(plain.edns, None);
    let mut edns = Edns::new();
    edns.set_dnssec_ok(true);
    query.set_edns(edns);
    let Outcome::Reply(extended) = bench.outcome(&query) else { panic!("forwarded") };
    let edns = extended.edns.unwrap();
    assert!(edns.flags().dnssec_ok && edns.version() == 0 && edns.max_payload() == MAX_PAYLOAD);
}

#[test]
fn a_name_as_long_as_names_get_is_no_problem() {
    let bench = bench(vec![service("shop", "*.local", &["240.240.0.1"])], vec![]);
    let mut labels = vec!["a"; 120];
    labels.extend(["cluster", "local"]);
    let name = Name::from_labels(labels).unwrap();
    let mut message = Message::query();
    message.add_query(Query::query(name, RecordType::A));
    let Outcome::Reply(reply) = bench.outcome(&message) else { panic!("forwarded") };
    assert_eq!(reply.answers.len(), 1);
}
