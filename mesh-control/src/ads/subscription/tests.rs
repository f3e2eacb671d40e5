use mesh_core::xds::proto::discovery::Status;
use mesh_core::xds::proto::workload::{Address, Workload, address};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::convert::{Addresses, Resource, Resources};
use crate::testing::resources;

const A: &str = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop, labels: {app: a}}\nspec: {nodeName: n1, containers: []}\nstatus: {podIP: 10.1.0.1}\n";
const B: &str = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: b, namespace: shop}\nspec: {nodeName: n1, containers: []}\nstatus: {podIP: 10.1.0.2}\n";
const S: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop}\nspec: {clusterIP: 10.2.0.1, selector: {app: a}, ports: [{port: 80}]}\n";
const POLICY: &str = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {}\n";
const UID_A: &str = "Kubernetes//Pod/shop/a";
const UID_B: &str = "Kubernetes//Pod/shop/b";
const SERVICE: &str = "shop/s.shop.svc.cluster.local";

fn snapshot(parts: &[&str]) -> Snapshot {
    Snapshot::build(&resources(&parts.concat()), &Snapshot::default())
}

fn request(subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    DeltaDiscoveryRequest {
        resource_names_subscribe: list(subscribe),
        resource_names_unsubscribe: list(unsubscribe),
        ..DeltaDiscoveryRequest::default()
    }
}

/// What a client reads of a response.
fn told(subscription: &mut Subscription, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
    let push = subscription.respond(snapshot)?;
    let response = push.read().unwrap();
    assert_eq!(response.encoded_len(), push.encoded_len());
    Some(response)
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

fn wildcard() -> Subscription {
    let mut s = Subscription::new(ResourceType::Address);
    s.request(&request(&[], &[]), "n1");
    s
}

#[test]
fn a_wildcard_client_gets_everything_then_only_what_changed() {
    let mut s = wildcard();
    let first = snapshot(&[A, S]);
    let response = told(&mut s, &first).unwrap();
    assert_eq!(names(&response), [UID_A, SERVICE]);
    assert_eq!(response.type_url, "type.googleapis.com/istio.workload.Address");
    assert!(told(&mut s, &first).is_none(), "nothing changed");
    let response = told(&mut s, &snapshot(&[A, B, S])).unwrap();
    assert_eq!((names(&response), response.removed_resources.len()), (vec![UID_B], 0));
    let response = told(&mut s, &snapshot(&[&A.replace("10.1.0.1", "10.1.0.9"), B])).unwrap();
    assert_eq!(
        (names(&response), response.removed_resources.clone()),
        (vec![UID_A], vec![SERVICE.to_owned()])
    );
}

#[test]
fn a_certificate_is_told_to_who_has_proved_to_be_its_gateway_and_to_nobody_else() {
    use crate::testing::{certificate, secret};
    let gateway = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: in, namespace: shop}\nspec: {gatewayClassName: istio, listeners: [{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}]}\n";
    let with = |pair: &(String, String)| snapshot(&[gateway, &secret("shop", "cert", pair)]);
    let name = "Gateway/shop/in/Secret/shop/cert";
    let (first, second) = (with(&certificate("a.example")), with(&certificate("a.example")));
    let asks = [request(&[], &[]), request(&[name], &[])];
    let as_of = |account: Option<(&str, &str)>| {
        let account = account.map(|(namespace, name)| Key::new(namespace, name));
        Subscription::of(ResourceType::Credential, account)
    };
    for ask in &asks {
        let mut own = as_of(Some(("shop", "in-istio")));
        own.request(ask, "n1");
        assert_eq!(names(&told(&mut own, &first).unwrap()), [name]);
        assert_eq!(names(&told(&mut own, &second).unwrap()), [name], "a new version");
        for other in
            [None, Some(("shop", "other")), Some(("bank", "in-istio")), Some(("istio-system", "ztunnel"))]
        {
            let mut other_s = as_of(other);
            other_s.request(ask, "n1");
            for snapshot in [&first, &second] {
                let told = told(&mut other_s, snapshot);
                assert!(told.iter().all(|told| told.resources.is_empty()), "{other:?} is told {told:?}");
            }
            assert_eq!(other_s.held(), 0);
        }
    }
    // The same key for a gateway that runs as somebody else now.
    let pair = certificate("a.example");
    let before = with(&pair);
    let moved = gateway.replace(
        "namespace: shop}",
        "namespace: shop, annotations: {gateway.istio.io/service-account: new}}",
    );
    let after = Snapshot::build(&resources(&[&moved, &*secret("shop", "cert", &pair)].concat()), &before);
    for (account, had, has) in [("in-istio", 1, 0), ("new", 0, 1)] {
        let mut s = as_of(Some(("shop", account)));
        s.request(&asks[0], "n1");
        told(&mut s, &before).unwrap();
        assert_eq!(s.held(), had, "{account}");
        assert!(told(&mut s, &after).is_some(), "{account}");
        assert_eq!(s.held(), has, "{account}");
    }
    // Who says that it holds the key is told that there is none.
    let mut liar = as_of(Some(("shop", "other")));
    let mut claims = request(&[], &[]);
    claims.initial_resource_versions.insert(name.to_owned(), "1".to_owned());
    liar.request(&claims, "n1");
    let told = told(&mut liar, &first).unwrap();
    assert_eq!((told.resources.len(), told.removed_resources), (0, vec![name.to_owned()]));
}

#[test]
fn the_first_request_is_answered_even_when_there_is_nothing() {
    for kind in ResourceType::ALL {
        let mut s = Subscription::new(kind);
        assert!(told(&mut s, &snapshot(&[])).is_none(), "not asked for yet");
        s.request(&request(&[], &[]), "n1");
        let response = told(&mut s, &snapshot(&[])).unwrap();
        // Settings hold in an empty mesh, too.
        let there = usize::from(kind == ResourceType::Settings);
        assert_eq!((response.resources.len(), response.type_url.as_str()), (there, kind.url()));
        assert!(told(&mut s, &snapshot(&[])).is_none());
    }
}

#[test]
fn versions_are_hashes_of_the_content() {
    let state = snapshot(&[A]);
    let entry = &state.entries(ResourceType::Address)[UID_A];
    assert_eq!(entry.version, format!("{:x}", twox_hash::XxHash64::oneshot(0, &entry.value)));
    assert_eq!(entry.version, snapshot(&[A, B]).entries(ResourceType::Address)[UID_A].version);
}

#[test]
fn a_client_that_comes_back_gets_what_differs_and_what_is_gone() {
    let state = snapshot(&[A, S, POLICY]);
    let version = |name: &str| state.entries(ResourceType::Address)[name].version.clone();
    let mut s = Subscription::new(ResourceType::Address);
    let mut back = request(&[], &[]);
    back.initial_resource_versions = [
        (UID_A.to_owned(), version(UID_A)),
        (SERVICE.to_owned(), "old".into()),
        ("x//Pod/y/z".into(), "1".into()),
    ]
    .into();
    s.request(&back, "n1");
    let response = told(&mut s, &state).unwrap();
    assert_eq!(
        (names(&response), response.removed_resources.clone()),
        (vec![SERVICE], vec!["x//Pod/y/z".to_owned()])
    );

    let mut s = Subscription::new(ResourceType::Address);
    back.initial_resource_versions =
        [(UID_A.to_owned(), version(UID_A)), (SERVICE.to_owned(), version(SERVICE))].into();
    s.request(&back, "n1");
    let response = told(&mut s, &state).unwrap();
    assert!(response.resources.is_empty() && response.removed_resources.is_empty(), "all held; answered");
}

#[test]
fn acknowledgements_rejections_and_stale_nonces_are_told_apart() {
    let mut s = wildcard();
    let first = told(&mut s, &snapshot(&[A])).unwrap().nonce;
    let second = told(&mut s, &snapshot(&[A, B])).unwrap().nonce;
    let answer = |nonce: &str, error: Option<&str>| DeltaDiscoveryRequest {
        response_nonce: nonce.into(),
        error_detail: error.map(|m| Status { message: m.into(), ..Status::default() }),
        ..DeltaDiscoveryRequest::default()
    };
    assert_eq!(s.request(&answer("wds-99", None), "n1"), Reply::Stale);
    assert_eq!(s.request(&answer(&first, None), "n1"), Reply::Ack(first.clone()));
    assert_eq!(s.request(&answer(&first, None), "n1"), Reply::Stale, "answered before");
    assert_eq!(s.request(&answer(&second, Some("b: bad")), "n1"), Reply::Nack("b: bad".into()));
    assert_eq!(cut(&"ä".repeat(1000)).len(), 1024);
    assert!(told(&mut s, &snapshot(&[A, B])).is_none(), "a rejection is not answered by the same again");
    assert_eq!(s.request(&request(&[], &[]), "n1"), Reply::None);
}

#[test]
fn an_on_demand_client_gets_what_it_asks_for_and_what_belongs_to_it() {
    let mut s = Subscription::new(ResourceType::Address);
    s.request(&request(&["*"], &["*"]), "n9");
    let state = snapshot(&[A, B, S]);
    let response = told(&mut s, &state).unwrap();
    assert!(response.resources.is_empty(), "asked for nothing");
    s.request(&request(&["/10.2.0.1"], &[]), "n9");
    let response = told(&mut s, &state).unwrap();
    assert_eq!(names(&response), [UID_A, SERVICE], "a service by its address, and its workloads");
    assert_eq!(response.resources[1].aliases, ["/10.2.0.1"]);
    s.request(&request(&["/10.9.9.9"], &[]), "n9");
    let response = told(&mut s, &state).unwrap();
    assert_eq!((names(&response).len(), response.removed_resources), (0, vec!["/10.9.9.9".to_owned()]));
    let moved = snapshot(&[&A.replace("nodeName: n1", "nodeName: n2"), B, S]);
    assert_eq!(names(&told(&mut s, &moved).unwrap()), [UID_A], "what it got before stays up to date");
    let later =
        snapshot(&[&A.replace("nodeName: n1", "nodeName: n2"), &B.replace("10.1.0.2", "10.9.9.9"), S]);
    assert_eq!(names(&told(&mut s, &later).unwrap()), [UID_B], "an unknown key appears");
}

#[test]
fn an_on_demand_client_gets_the_workloads_of_its_node() {
    let mut s = Subscription::new(ResourceType::Address);
    s.request(&request(&["*"], &["*"]), "n1");
    let state = snapshot(&[A, B, S]);
    told(&mut s, &state).unwrap();
    s.request(&request(&[SERVICE], &[]), "n1");
    assert_eq!(names(&told(&mut s, &state).unwrap()), [UID_A, UID_B, SERVICE]);
    s.request(&request(&[UID_A], &[]), "n1");
    assert_eq!(
        names(&told(&mut s, &state).unwrap()),
        [UID_A],
        "asked for by name: answered though it is held"
    );
}

#[test]
fn a_client_of_everything_may_ask_for_single_ones_and_goes_on_with_changes() {
    let mut s = wildcard();
    let first = snapshot(&[A, S]);
    told(&mut s, &first).unwrap();
    s.request(&request(&[UID_A], &[]), "n1");
    assert_eq!(names(&told(&mut s, &first).unwrap()), [UID_A], "asked for by name");
    let second = Snapshot::build(&resources(&[A, B, S].concat()), &first);
    assert_eq!(names(&told(&mut s, &second).unwrap()), [UID_B]);
    // What it let go of it does not have, and it still wants everything.
    s.request(&request(&[], &[UID_B]), "n1");
    assert_eq!(names(&told(&mut s, &second).unwrap()), [UID_B]);
    // No more than what it has, kept up to date.
    s.request(&request(&[], &["*"]), "n1");
    let third = Snapshot::build(&resources(&[&A.replace("10.1.0.1", "10.1.0.9"), S].concat()), &second);
    let response = told(&mut s, &third).unwrap();
    assert_eq!((names(&response), response.removed_resources.clone()), (vec![UID_A], vec![UID_B.to_owned()]));
}

#[test]
fn clients_that_get_the_same_get_the_same_bytes() {
    let (first, mut clients) = (snapshot(&[A, S]), [wildcard(), wildcard()]);
    let second = Snapshot::build(&resources(&[A, B, S].concat()), &first);
    for snapshot in [&first, &second] {
        let [one, other] = clients.each_mut().map(|client| client.respond(snapshot).unwrap());
        assert!(one.own.resources.is_empty() && !one.shared.is_empty());
        assert_eq!(one.shared.as_ptr(), other.shared.as_ptr());
    }
}

#[test]
fn kinds_of_which_nothing_changed_are_those_of_the_snapshot_before() {
    let first = snapshot(&[A, POLICY]);
    let second = Snapshot::build(&resources(&[A, B, POLICY].concat()), &first);
    let same = |kind| Arc::ptr_eq(first.entries(kind), second.entries(kind));
    assert!(same(ResourceType::Authorization) && !same(ResourceType::Address));
    let names: Vec<&str> = second.entries(ResourceType::Address).keys().map(|name| &**name).collect();
    assert_eq!(names, [UID_A, UID_B]);
    let changed = second.changes(ResourceType::Address, first.entries(ResourceType::Address));
    assert!(*changed.names == [UID_B.into()] && changed.shared.is_some(), "{changed:?}");
    let nothing = Arc::default();
    let changed = second.changes(ResourceType::Address, &nothing);
    assert!(changed.names.len() == 2 && changed.shared.is_none(), "for who has something else: {changed:?}");
}

/// Resources `0`..`9` with a number each as their content.
fn numbered(content: &BTreeMap<u8, u8>) -> Resources {
    let one = |(name, content): (&u8, &u8)| {
        let workload = Workload { uid: name.to_string(), name: content.to_string(), ..Workload::default() };
        let address = Address { r#type: Some(address::Type::Workload(workload)) };
        (name.to_string().into(), Arc::new(Resource::new(address, vec![])))
    };
    let addresses: Addresses = content.iter().map(one).collect();
    Resources { addresses: Arc::new(addresses), ..Resources::default() }
}

/// Name to version, as a client keeps it.
fn apply(client: &mut BTreeMap<String, String>, response: Option<DeltaDiscoveryResponse>) {
    for resource in response.iter().flat_map(|r| &r.resources) {
        client.insert(resource.name.clone(), resource.version.clone());
    }
    for name in response.iter().flat_map(|r| &r.removed_resources) {
        client.remove(name);
    }
}

proptest! {
    #[test]
    fn whatever_happens_a_client_ends_with_exactly_what_there_is(
        history in prop::collection::vec((prop::collection::btree_map(0u8..10, 0u8..3, 0..8), 0u8..4, 0u8..10), 1..12)
    ) {
        let mut client = BTreeMap::new();
        let mut stream = wildcard();
        let mut snapshot = Snapshot::default();
        for (content, event, lost) in history {
            snapshot = Snapshot::build(&numbered(&content), &snapshot);
            match event {
                // Busy: this snapshot is skipped.
                0 => continue,
                // The connection breaks; one resource is not held any more (it had been rejected).
                1 => {
                    client.remove(&lost.to_string());
                    stream = Subscription::new(ResourceType::Address);
                    let back = DeltaDiscoveryRequest { initial_resource_versions: client.clone(), ..Default::default() };
                    stream.request(&back, "");
                }
                _ => {}
            }
            apply(&mut client, told(&mut stream, &snapshot));
            let there: BTreeMap<String, String> =
                snapshot.entries(ResourceType::Address).iter().map(|(n, e)| (n.to_string(), e.version.clone())).collect();
            prop_assert_eq!(&client, &there);
            prop_assert!(told(&mut stream, &snapshot).is_none(), "up to date");
        }
    }
}
