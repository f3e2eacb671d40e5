use std::time::Instant;

use mesh_core::policy::UnknownPolicy;
use mesh_core::state::{MeshOptions, StateIndex, Workload};
use mesh_core::xds::proto::workload as wire;

use super::*;

fn pod(uid: &str, name: &str, service_account: &str) -> PodInfo {
    let json = serde_json::json!({
        "uid": uid, "name": name, "namespace": "shop", "service_account": service_account,
        "netns": format!("/run/netns/{uid}"), "cgroup": "",
    });
    serde_json::from_value(json).unwrap()
}

fn assigned(pods: &[(&str, &str, &str)]) -> Assigned {
    let pods = pods.iter().map(|(uid, name, service_account)| AssignedPod {
        uid: (*uid).into(),
        namespace: "shop".into(),
        name: (*name).into(),
        service_account: (*service_account).into(),
        workload_uid: format!("c//Pod/shop/{name}"),
        enrol: true,
        probe_ports: vec![8080, 0, 70_000],
        ..AssignedPod::default()
    });
    let message = EnrolmentAck { assigns: true, pods: pods.collect(), namespaces: vec!["shop".into()] };
    Assigned::Known(Arc::new(Assignment::read(message).unwrap()))
}

/// A mesh with one workload of node `n1`.
fn mesh(name: &str, service_account: &str) -> Arc<MeshState> {
    let mut index = StateIndex::new(MeshOptions { network: "".into(), unknown_policy: UnknownPolicy::Deny });
    let workload = wire::Workload {
        uid: format!("c//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: service_account.into(),
        node: "n1".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        ..Default::default()
    };
    index.insert_workload(Workload::decode(&workload).unwrap());
    index.snapshot()
}

fn accounts(pods: &HashMap<PodKey, PodInfo>) -> Vec<(String, String)> {
    let mut list: Vec<_> = pods.values().map(|p| (p.uid.clone(), p.service_account.clone())).collect();
    list.sort();
    list
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[test]
fn a_pod_has_the_identity_that_its_uid_has_at_the_control_plane() {
    let pods = [pod("1", "cart", ""), pod("2", "other", ""), pod("3", "given", "mine")];
    let told = assigned(&[("1", "cart", "cart-sa"), ("2", "renamed", "x")]);
    let found = attribute(&pods, &BTreeMap::new(), &told, &mesh("cart", "old-sa"), "n1");
    assert_eq!(accounts(&found), pairs(&[("1", "cart-sa"), ("3", "mine")]));
    let cart = found.values().find(|p| p.uid == "1").unwrap();
    assert_eq!(cart.probe_ports, [8080]);
}

#[test]
fn a_pod_made_again_under_its_name_has_no_identity_until_the_control_plane_knows_its_uid() {
    let mesh = mesh("db-0", "old-sa");
    let told = assigned(&[("1", "db-0", "old-sa")]);
    let again = [pod("2", "db-0", "")];
    assert!(attribute(&again, &BTreeMap::new(), &told, &mesh, "n1").is_empty());
    let told = assigned(&[("2", "db-0", "new-sa")]);
    assert_eq!(accounts(&attribute(&again, &BTreeMap::new(), &told, &mesh, "n1")), pairs(&[("2", "new-sa")]));
}

#[test]
fn without_uids_of_the_control_plane_the_workload_of_the_name_on_this_node_counts() {
    let pods = [pod("1", "cart", "")];
    let mesh = mesh("cart", "cart-sa");
    let by = |assigned: &Assigned, node: &str| attribute(&pods, &BTreeMap::new(), assigned, &mesh, node);
    assert_eq!(accounts(&by(&Assigned::NotOffered, "n1")), pairs(&[("1", "cart-sa")]));
    assert!(by(&Assigned::NotOffered, "n2").is_empty(), "that is another node's");
    assert!(by(&Assigned::Unknown, "n1").is_empty(), "it may still tell");
}

#[test]
fn a_captured_pod_keeps_its_identity_when_the_control_plane_forgets_it() {
    let known = pod("1", "cart", "cart-sa");
    let held = Held { info: known.clone(), unwanted_since: None::<Instant>, alive: true };
    let held = BTreeMap::from([(known.key(), held)]);
    let found = attribute(&[pod("1", "cart", "")], &held, &assigned(&[]), &mesh("x", "y"), "n1");
    assert_eq!(accounts(&found), pairs(&[("1", "cart-sa")]));
    let again = attribute(&[pod("2", "cart", "")], &held, &assigned(&[]), &mesh("x", "y"), "n1");
    assert!(again.is_empty(), "another pod of that name");
}

#[test]
fn a_pod_without_an_address_is_wanted_before_it_is_a_workload() {
    let mut wanted = BTreeMap::new();
    add_wanted(&mut wanted, &assigned(&[("1", "cart", "cart-sa")]));
    let (key, cart) = wanted.first_key_value().unwrap();
    assert_eq!((key.name.as_str(), &*cart.workload), ("cart", "c//Pod/shop/cart"));
    assert_eq!(cart.identity, SpiffeId::new("", "shop", "cart-sa"));
    assert!(Assignment::read(EnrolmentAck::default()).is_none(), "a message that says nothing");
}
