//! Whatever is in the files that a user writes.
//!
//! - Reading the same files again changes nothing, and so does a restart.
//! - What cannot be read leaves the objects of its file in force: a broken edit never removes a policy.
//! - Every problem names what is in force instead.
//! - Nodes take every resource that is made of the objects: nothing that they would have to reject is sent.
//! - Nor is anything that a waypoint could not honour, unless a condition says so.
#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use mesh_control::convert::{Captured, Mesh, Resources, convert};
use mesh_control::model::Objects;
use mesh_control::source::State;
use mesh_control::source::dir::Loader;
use mesh_core::state::{MeshOptions, StateIndex};
use mesh_waypoint::config::{self, Own};
use mesh_waypoint::routing::Routes;
use mesh_waypoint::security::Policies;
use mesh_waypoint::security::jwks::{KeyStore, Roots};

const ROOT: &str = "istio-system";
/// In force before the input comes.
const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec: {}
";

fn file(text: &str) -> BTreeMap<String, Result<String, String>> {
    BTreeMap::from([("a.yaml".to_owned(), Ok(text.to_owned()))])
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut loader = Loader::new(ROOT);
    let before = loader.load(file(POLICY)).expect("the first state");
    assert!(before.problems.is_empty() && before.objects.authorization_policies.len() == 1);
    let state = loader.load(file(text)).unwrap_or(before);
    assert!(loader.load(file(text)).is_none(), "the same files changed something");
    let is_unreadable = state.problems.iter().any(|problem| problem.object.is_none());
    if is_unreadable {
        let closed = |name: &String| name == "closed";
        let kept = state.objects.authorization_policies.keys().any(|key| closed(&key.name));
        assert!(kept, "a file that cannot be read lost its policy: {:?}", state.problems);
    }
    for problem in &state.problems {
        assert!(!problem.consequence.is_empty() && !problem.message.is_empty(), "{problem:?}");
    }
    let objects = &state.objects;
    assert_eq!(
        names(objects),
        names(&restarted(&loader, text).objects),
        "a restart changed what is in force"
    );
    accepted(objects);
});

/// What a process that starts with the other's memory makes of the same files.
fn restarted(loader: &Loader, text: &str) -> Arc<State> {
    let mut fresh = Loader::new(ROOT);
    fresh.restore(&loader.remembered());
    Arc::new(fresh.load(file(text)).expect("the first state"))
}

/// The policies and settings, which decide who may talk.
fn names(objects: &Objects) -> String {
    format!("{:?} {:?} {:?}", objects.authorization_policies, objects.peer_authentications, objects.settings)
}

fn accepted(objects: &Objects) {
    let mesh = Mesh::default().with_settings(objects);
    let resources = convert(objects, &mesh, &Captured::new());
    let mut node = StateIndex::new(MeshOptions::default());
    for (name, resource) in &*resources.addresses {
        if let Err(error) = node.apply_address(name, &resource.message) {
            panic!("a node rejects {name}: {error}");
        }
    }
    for (name, policy) in &resources.authorizations {
        if let Err(error) = node.apply_policy(policy) {
            panic!("a node rejects {name}: {error}");
        }
    }
    assert_eq!(node.state().policies().count(), resources.authorizations.len(), "policies hide each other");
    honoured(&resources, &node);
}

static KEYS: LazyLock<KeyStore> = LazyLock::new(|| KeyStore::new(Roots::Given(Vec::new())).0);

fn honoured(resources: &Resources, node: &StateIndex) {
    let l7 = &resources.l7;
    let told = config::Resources {
        routes: l7.routes.iter().map(|(name, route)| (name.clone(), route.clone().into())).collect(),
        destinations: shared(&l7.destinations),
        authorizations: shared(&l7.authorizations),
        authentications: shared(&l7.authentications),
        settings: Arc::new(l7.settings["mesh"].clone()),
        ..config::Resources::default()
    };
    let own = Own {
        namespace: "shop".into(),
        gateway: "wp".into(),
        class: "istio-waypoint".into(),
        hostname: "wp.shop.svc.cluster.local".into(),
        ..Own::default()
    };
    let routes = Routes::build(&told, node.state(), &own, &Routes::default());
    if let Some(problem) = routes.problems().next() {
        panic!("a waypoint cannot honour a route: {problem}");
    }
    let is_said = resources.conditions.iter().any(|c| c.reason == "ProviderNotFound");
    for problem in Policies::build(&told, &own, &KEYS).problems() {
        assert!(is_said && problem.field == "provider.name", "a waypoint cannot honour a policy: {problem}");
    }
}

fn shared<T: Clone>(given: &BTreeMap<String, T>) -> BTreeMap<String, Arc<T>> {
    given.iter().map(|(name, value)| (name.clone(), Arc::new(value.clone()))).collect()
}
