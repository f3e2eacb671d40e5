//! The client's side of delta ADS as pure state: what to ask, what to answer, what is held.
//!
//! Every type is a wildcard subscription: workloads and services, L4 policies, and those that the [`Handler`] adds (a
//! waypoint's), whose resources it gets as they are on the wire. What is held survives the stream: a reconnect names it with its versions, so
//! that the server sends only what differs and names what is gone. A response is applied as far as it can be decoded;
//! what cannot is named in the answer, and the last good version of it stays.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use prost::Message;

use super::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};
use super::proto::security::Authorization;
use super::proto::workload::Address;
use super::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;
/// Rejections that one answer spells out; the rest is counted. A broken server must not get its megabytes back.
const SPELLED_OUT: usize = 50;

/// Takes the resources of the control plane.
pub trait Handler {
    /// A workload or service was added or changed.
    ///
    /// # Errors
    /// Why it is rejected; the last version stays.
    fn address(&mut self, name: &str, address: &Address) -> Result<(), String>;
    /// A workload or service is gone.
    fn remove_address(&mut self, name: &str);
    /// A policy was added or changed.
    ///
    /// # Errors
    /// Why it is rejected; the last version stays.
    fn policy(&mut self, name: &str, policy: &Authorization) -> Result<(), String>;
    /// A policy is gone.
    fn remove_policy(&mut self, name: &str);
    /// Type URLs of what is subscribed to beside workloads, services and L4 policies.
    fn further_types(&self) -> &'static [&'static str] {
        &[]
    }
    /// A resource of a further type was added or changed.
    ///
    /// # Errors
    /// Why it is rejected; the last version stays.
    fn further(&mut self, type_url: &'static str, name: &str, _payload: &[u8]) -> Result<(), String> {
        Err(format!("nobody here reads {type_url}, such as {name}"))
    }
    /// A resource of a further type is gone.
    fn remove_further(&mut self, _type_url: &'static str, _name: &str) {}
    /// All of one response was handed over: publish it. `synced` is true from the moment on at which every type has
    /// been answered once.
    fn commit(&mut self, synced: bool);
}

/// What is held of one type.
#[derive(Debug)]
struct Subscription {
    type_url: &'static str,
    /// Version by name.
    held: BTreeMap<String, String>,
    answered: bool,
}

/// The state of the client.
#[derive(Debug)]
pub struct DeltaState {
    node: Node,
    /// In the order in which they are asked for.
    subscriptions: Vec<Subscription>,
}

/// What came of a response.
#[derive(Debug)]
pub struct Received {
    /// Goes back to the server.
    pub answer: DeltaDiscoveryRequest,
    /// The type, when it is one that we asked for.
    pub type_url: Option<&'static str>,
    /// Resources that were added or changed.
    pub applied: usize,
    /// Resources that were removed.
    pub removed: usize,
    /// Names with the reason for which each was rejected.
    pub rejected: Vec<(String, String)>,
}

impl DeltaState {
    /// A client that holds nothing and wants workloads, services and L4 policies. `node` goes into the first request of
    /// each type of each stream.
    #[must_use]
    pub fn new(node: Node) -> Self {
        Self::with_further(node, &[])
    }

    /// As [`Self::new`], with the types that a handler adds.
    #[must_use]
    pub fn with_further(node: Node, further: &[&'static str]) -> Self {
        let types = [ADDRESS_TYPE, AUTHORIZATION_TYPE].into_iter().chain(further.iter().copied());
        let subscription = |type_url| Subscription { type_url, held: BTreeMap::new(), answered: false };
        Self { node, subscriptions: types.map(subscription).collect() }
    }

    /// The requests that open a stream: one per type, with everything that is held.
    #[must_use]
    pub fn initial_requests(&self) -> Vec<DeltaDiscoveryRequest> {
        let request = |subscription: &Subscription| DeltaDiscoveryRequest {
            node: Some(self.node.clone()),
            type_url: subscription.type_url.to_owned(),
            initial_resource_versions: subscription.held.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        self.subscriptions.iter().map(request).collect()
    }

    /// Whether every type has been answered once, on this or an earlier stream.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.subscriptions.iter().all(|subscription| subscription.answered)
    }

    /// How many resources are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.subscriptions.iter().map(|subscription| subscription.held.len()).sum()
    }

    /// Hands a response to the handler and makes the answer: ACK, or NACK with what was rejected.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse, handler: &mut impl Handler) -> Received {
        let mut answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        let wanted = self.subscriptions.iter_mut().find(|wanted| wanted.type_url == response.type_url);
        let Some(subscription) = wanted else {
            let text = format!("type {:?} was not subscribed to", response.type_url);
            answer.error_detail = Some(invalid(text.clone()));
            let rejected = vec![(response.type_url, text)];
            return Received { answer, type_url: None, applied: 0, removed: 0, rejected };
        };
        let type_url = subscription.type_url;
        let (mut applied, mut rejected) = (0, Vec::new());
        for resource in response.resources {
            match apply(type_url, &resource, handler) {
                Ok(()) => {
                    applied += 1;
                    subscription.held.insert(resource.name, resource.version);
                }
                // What was held under that name stays held: the server compares versions when we come back, and can
                // still tell us that it is gone.
                Err(reason) => rejected.push((resource.name, reason)),
            }
        }
        for name in &response.removed_resources {
            subscription.held.remove(name);
            match type_url {
                ADDRESS_TYPE => handler.remove_address(name),
                AUTHORIZATION_TYPE => handler.remove_policy(name),
                further => handler.remove_further(further, name),
            }
        }
        subscription.answered = true;
        handler.commit(self.is_synced());
        if !rejected.is_empty() {
            answer.error_detail = Some(invalid(spell_out(&rejected)));
        }
        let removed = response.removed_resources.len();
        Received { answer, type_url: Some(type_url), applied, removed, rejected }
    }
}

/// The payload is read as the type of the response; the type URL inside it is not looked at (as the reference does).
fn apply(type_url: &'static str, resource: &Resource, handler: &mut impl Handler) -> Result<(), String> {
    let Some(any) = &resource.resource else { return Err("the resource is empty".to_owned()) };
    let payload = any.value.as_slice();
    let decode = |error: prost::DecodeError| format!("cannot be decoded: {error}");
    match type_url {
        ADDRESS_TYPE => handler.address(&resource.name, &Address::decode(payload).map_err(decode)?),
        AUTHORIZATION_TYPE => {
            handler.policy(&resource.name, &Authorization::decode(payload).map_err(decode)?)
        }
        further => handler.further(further, &resource.name, payload),
    }
}

fn invalid(message: String) -> Status {
    Status { code: INVALID_ARGUMENT, message, details: Vec::new() }
}

/// `name: reason; name: reason`, as servers expect it.
fn spell_out(rejected: &[(String, String)]) -> String {
    let mut parts: Vec<String> =
        rejected.iter().take(SPELLED_OUT).map(|(name, reason)| format!("{name}: {reason}")).collect();
    if rejected.len() > SPELLED_OUT {
        parts.push(format!("and {} more", rejected.len() - SPELLED_OUT));
    }
    parts.join("; ")
}
