use super::*;
use crate::model::read::read_stored;
use crate::tree::documents;

const KINDS: [Kind; 3] = [Kind::Namespace, Kind::AuthorizationPolicy, Kind::ConfigMap];

/// What a watch makes of an object.
fn apply(yaml: &str) -> Change {
    let node = documents(yaml).pop().unwrap().unwrap();
    let read = read_stored(&node, "istio-system");
    let object = read.object.clone().unwrap();
    Change::apply(object.kind, object.key, read)
}

fn namespace(name: &str, mode: &str) -> Change {
    apply(&format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/dataplane-mode: {mode}}}}}\n"
    ))
}

fn policy(action: &str) -> Change {
    apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{action: {action}, rules: [{{}}]}}\n"
    ))
}

fn settings(domain: &str) -> Change {
    apply(&format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: \"trustDomain: {domain}\"}}\n"
    ))
}

/// A store that has listed what is given, and nothing else.
fn listed(objects: Vec<Change>) -> Store {
    let mut store = Store::new(KINDS.into_iter());
    for kind in KINDS {
        store.take(Change::Begin(kind));
    }
    objects.into_iter().for_each(|change| store.take(change));
    for kind in KINDS {
        assert!(!store.is_complete());
        store.take(Change::End(kind));
    }
    assert!(store.is_complete());
    store
}

#[test]
fn nothing_is_complete_before_every_kind_was_listed_or_found_absent() {
    let mut store = Store::new(KINDS.into_iter());
    store.take(Change::Begin(Kind::Namespace));
    store.take(namespace("shop", "ambient"));
    store.take(Change::End(Kind::Namespace));
    store.take(Change::Absent(Kind::AuthorizationPolicy));
    assert_eq!(store.waiting(), ["ConfigMap: not listed yet"]);
    store.take(Change::Begin(Kind::ConfigMap));
    assert!(!store.is_complete());
    store.take(Change::End(Kind::ConfigMap));
    assert!(store.is_complete() && store.is_dirty());
    let state = store.state();
    assert!(state.synced);
    assert_eq!(state.objects.namespaces.len(), 1);
}

#[test]
fn what_cannot_be_read_is_named_with_the_reason_and_waits_for_nothing_else() {
    let mut store = Store::new(KINDS.into_iter());
    store.take(Change::Absent(Kind::AuthorizationPolicy));
    let trouble = |why: Option<&str>| Change::Trouble("Namespace".to_owned(), why.map(str::to_owned));
    store.take(trouble(Some("namespaces is forbidden")));
    store.take(Change::Trouble("CustomResourceDefinition".to_owned(), Some("no route".to_owned())));
    assert_eq!(
        store.waiting(),
        [
            "CustomResourceDefinition: no route",
            "Namespace: namespaces is forbidden",
            "ConfigMap: not listed yet"
        ]
    );
    store.take(trouble(None));
    assert!(store.waiting().contains(&"Namespace: not listed yet".to_owned()));
}

#[test]
fn an_event_that_changes_nothing_publishes_nothing() {
    let mut store = listed(vec![namespace("shop", "ambient")]);
    store.state();
    store.take(namespace("shop", "ambient"));
    assert!(!store.is_dirty());
    store.take(namespace("shop", "none"));
    assert!(store.is_dirty());
}

#[test]
fn what_is_published_stays_as_it_is_when_the_store_goes_on() {
    let mut store = listed(vec![namespace("shop", "ambient")]);
    let before = store.state();
    store.take(Change::Delete(Kind::Namespace, Key::new("", "shop")));
    assert_eq!(before.objects.namespaces.len(), 1);
    assert_eq!(store.state().objects.namespaces.len(), 0);
}

#[test]
fn a_watch_that_expired_lets_go_only_of_what_the_new_listing_does_not_have() {
    let mut store = listed(vec![namespace("shop", "ambient"), namespace("bank", "ambient")]);
    store.state();
    store.take(Change::Begin(Kind::Namespace));
    assert!(!store.is_dirty() && store.is_complete(), "listing anew takes nothing away");
    store.take(namespace("shop", "ambient"));
    store.take(namespace("new", "none"));
    assert_eq!(store.state().objects.namespaces.len(), 3);
    store.take(Change::End(Kind::Namespace));
    let state = store.state();
    assert_eq!(state.objects.namespaces.keys().collect::<Vec<_>>(), ["new", "shop"]);
}

#[test]
fn the_last_good_version_stays_in_force_until_the_object_is_right_or_gone() {
    let mut store = listed(vec![policy("DENY")]);
    store.state();
    store.take(policy("NEVER"));
    let state = store.state();
    assert_eq!(state.objects.authorization_policies.len(), 1);
    assert_eq!(state.problems.len(), 1);
    assert_eq!(state.problems[0].consequence, "its last good version stays in force");
    assert!(
        state.problems[0].to_string().starts_with("AuthorizationPolicy shop/p: spec.action"),
        "{}",
        state.problems[0]
    );
    store.take(policy("ALLOW"));
    assert!(store.state().problems.is_empty());
    store.take(policy("NEVER"));
    store.take(Change::Delete(Kind::AuthorizationPolicy, Key::new("shop", "p")));
    let state = store.state();
    assert!(state.problems.is_empty() && state.objects.authorization_policies.is_empty());
}

#[test]
fn an_object_that_was_never_good_is_reported_and_vanishes_with_its_kind() {
    let mut store = listed(vec![policy("NEVER")]);
    let state = store.state();
    assert!(state.objects.authorization_policies.is_empty());
    assert_eq!(state.problems[0].consequence, "it is not in force, so it neither allows nor denies anything");
    store.take(Change::Absent(Kind::AuthorizationPolicy));
    assert!(store.state().problems.is_empty());
}

#[test]
fn the_mesh_settings_go_with_their_config_map_only() {
    let mut store = listed(vec![settings("example.org")]);
    assert_eq!(store.state().objects.settings.as_ref().unwrap().trust_domain.as_deref(), Some("example.org"));
    store.take(Change::Delete(Kind::ConfigMap, Key::new("istio-system", "other")));
    assert!(!store.is_dirty());
    store.take(Change::Begin(Kind::ConfigMap));
    store.take(Change::End(Kind::ConfigMap));
    assert!(store.state().objects.settings.is_none());
}

fn gateway(reference: &str) -> Change {
    apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: in, namespace: shop}}\nspec: {{gatewayClassName: istio, listeners: [{{name: https, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{reference}]}}}}]}}\n"
    ))
}

fn secret(name: &str) -> Change {
    let text = crate::testing::secret("shop", name, &crate::testing::certificate("a.example"));
    apply(text.trim_start_matches("---\n"))
}

fn named(store: &mut Store) -> Vec<String> {
    store.named_secrets().keys().map(ToString::to_string).collect()
}

#[test]
fn nothing_is_published_before_a_secret_that_a_gateway_names_was_looked_for() {
    let mut store = listed(vec![]);
    store.state();
    store.take(gateway("{name: cert}"));
    assert_eq!(named(&mut store), ["shop/cert"]);
    assert!(!store.is_complete(), "the gateway would be told to close its port");
    assert_eq!(store.waiting(), ["Secret: not listed yet"]);
    store.take(secret("cert"));
    assert!(!store.is_complete());
    store.take(Change::Looked(Key::new("shop", "cert")));
    assert!(store.is_complete() && store.is_dirty());
    assert_eq!(store.state().objects.credentials.len(), 1);
    // One that is not there, or not to be read, holds nothing up.
    store.take(gateway("{name: gone}"));
    assert_eq!(named(&mut store), ["shop/gone"]);
    store.take(Change::Looked(Key::new("shop", "gone")));
    assert!(store.is_complete());
    assert!(store.state().objects.credentials.is_empty(), "what nobody names is let go");
}

#[test]
fn a_secret_that_is_named_anew_is_looked_for_anew() {
    let mut store = listed(vec![gateway("{name: cert}")]);
    let number = |store: &mut Store| store.named_secrets().values().next().copied();
    let first = number(&mut store);
    store.take(Change::Looked(Key::new("shop", "cert")));
    store.take(gateway(""));
    assert_eq!(number(&mut store), None);
    // What its last watch still tells is too late.
    store.take(secret("cert"));
    assert!(store.state().objects.credentials.is_empty());
    store.take(gateway("{name: cert}"));
    assert_ne!(number(&mut store), first, "so that its watch is another");
    assert!(!store.is_complete());
}
