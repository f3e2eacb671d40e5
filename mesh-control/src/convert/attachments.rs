//! What there is to say of the parts of gateways and routes: of each listener, and of each parent of a route. Their status
//! has a place for each; what is said of the whole object is in its conditions.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::l7::GatewayRef;

use crate::model::{Key, Kind, ObjectRef};

/// Name of the controller of routes whose parent is a service, as Istio has it.
pub(crate) const MESH_CONTROLLER: &str = "istio.io/gateway-controller";

/// Reason and text.
pub type Refusal = (&'static str, String);

/// Listeners of gateways, and parents of routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachments {
    /// By Gateway: its listeners, in their order.
    pub listeners: BTreeMap<Key, Vec<ListenerState>>,
    /// By route: those of its `parentRefs` that are services of the mesh or gateways that are served here.
    pub parents: BTreeMap<ObjectRef, Vec<ParentState>>,
}

/// One listener of a gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerState {
    /// Its name.
    pub name: String,
    /// Kinds of routes that it takes.
    pub kinds: Vec<Kind>,
    /// How many routes are attached.
    pub attached: u32,
    /// Why it is not served.
    pub refusal: Option<Refusal>,
    /// What it names that is not there or not supported.
    pub unresolved: Option<Refusal>,
    /// Whether it can serve anybody: not without a kind of route, nor, where it ends TLS, without a certificate.
    pub serves: bool,
}

/// One parent of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentState {
    /// Its place in `parentRefs`.
    pub index: usize,
    /// Who says this.
    pub controller: &'static str,
    /// Why the route is not attached to it.
    pub refusal: Option<Refusal>,
}

impl Attachments {
    /// Counts a route at every listener that takes it, once.
    pub(super) fn count(&mut self, taken: &[GatewayRef]) {
        let places: BTreeSet<(&str, &str, &str)> =
            taken.iter().map(|r| (r.namespace.as_str(), r.name.as_str(), r.listener.as_str())).collect();
        for (namespace, name, listener) in places {
            let states = self.listeners.get_mut(&Key::new(namespace, name));
            let state = states.and_then(|all| all.iter_mut().find(|s| s.name == listener));
            if let Some(state) = state {
                state.attached += 1;
            }
        }
    }
}
