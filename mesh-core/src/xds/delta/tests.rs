//! Types beside those of the workload API; what both have in common is tested with the client.

use prost_types::Any;

use super::*;
use crate::xds::l7::{DESTINATION_TYPE, ROUTE_TYPE};

/// Takes what is text, and keeps it.
#[derive(Default)]
struct Texts {
    held: BTreeMap<(&'static str, String), String>,
    synced: bool,
}

impl Handler for Texts {
    fn address(&mut self, _: &str, _: &Address) -> Result<(), String> {
        Ok(())
    }
    fn remove_address(&mut self, _: &str) {}
    fn policy(&mut self, _: &str, _: &Authorization) -> Result<(), String> {
        Ok(())
    }
    fn remove_policy(&mut self, _: &str) {}
    fn further_types(&self) -> &'static [&'static str] {
        &[ROUTE_TYPE, DESTINATION_TYPE]
    }
    fn further(&mut self, type_url: &'static str, name: &str, payload: &[u8]) -> Result<(), String> {
        let text = std::str::from_utf8(payload).map_err(|error| format!("is no text: {error}"))?;
        self.held.insert((type_url, name.to_owned()), text.to_owned());
        Ok(())
    }
    fn remove_further(&mut self, type_url: &'static str, name: &str) {
        self.held.remove(&(type_url, name.to_owned()));
    }
    fn commit(&mut self, synced: bool) {
        self.synced = synced;
    }
}

fn response(type_url: &str, resources: &[(&str, &[u8])], removed: &[&str]) -> DeltaDiscoveryResponse {
    let resource = |(name, payload): &(&str, &[u8])| Resource {
        name: (*name).to_owned(),
        version: "1".to_owned(),
        resource: Some(Any { type_url: type_url.to_owned(), value: payload.to_vec() }),
        ..Resource::default()
    };
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: "n".to_owned(),
        resources: resources.iter().map(resource).collect(),
        removed_resources: removed.iter().map(|&name| name.to_owned()).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

#[test]
fn further_types_are_asked_for_handed_over_and_named_when_they_are_wrong() {
    let mut handler = Texts::default();
    let mut state = DeltaState::with_further(Node::default(), handler.further_types());
    let asked: Vec<String> = state.initial_requests().into_iter().map(|r| r.type_url).collect();
    assert_eq!(asked, [ADDRESS_TYPE, AUTHORIZATION_TYPE, ROUTE_TYPE, DESTINATION_TYPE]);

    let received = state
        .receive(response(ROUTE_TYPE, &[("a", b"one"), ("b", b"\xff"), ("c", b"two")], &[]), &mut handler);
    assert_eq!((received.type_url, received.applied), (Some(ROUTE_TYPE), 2));
    assert_eq!(
        received.answer.error_detail.expect("a NACK").message,
        "b: is no text: invalid utf-8 sequence of 1 bytes from index 0"
    );
    // The same name of another type is another resource.
    state.receive(response(DESTINATION_TYPE, &[("a", b"three")], &[]), &mut handler);
    state.receive(response(ROUTE_TYPE, &[], &["a"]), &mut handler);
    let held: Vec<_> = handler.held.iter().map(|((url, name), text)| (*url, &**name, &**text)).collect();
    assert_eq!(held, [(DESTINATION_TYPE, "a", "three"), (ROUTE_TYPE, "c", "two")]);
    assert_eq!(state.held(), 2);
}

#[test]
fn nothing_is_complete_before_every_type_has_been_answered() {
    let mut handler = Texts::default();
    let mut state = DeltaState::with_further(Node::default(), handler.further_types());
    for type_url in [ADDRESS_TYPE, ROUTE_TYPE, AUTHORIZATION_TYPE] {
        state.receive(response(type_url, &[], &[]), &mut handler);
        assert!(!handler.synced, "{type_url}");
    }
    state.receive(response(DESTINATION_TYPE, &[], &[]), &mut handler);
    assert!(handler.synced);
}

#[test]
fn an_agent_neither_asks_for_further_types_nor_takes_them() {
    let mut handler = Texts::default();
    let mut state = DeltaState::new(Node::default());
    assert_eq!(state.initial_requests().len(), 2);
    let received = state.receive(response(ROUTE_TYPE, &[("a", b"one")], &[]), &mut handler);
    assert!(received.answer.error_detail.expect("a NACK").message.contains("was not subscribed to"));
    assert!(handler.held.is_empty());
}
