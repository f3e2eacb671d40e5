//! Gateways that are served as gateways: the ways into the mesh for clients that are no peers of it.
//!
//! Listeners for HTTP, HTTPS, TLS (which ends here or is passed on) and TCP are served; every other says so in its state.
//! What a listener presents is in Secrets: `credentials` looks for them.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::gateway::Inside;
use mesh_core::xds::proto::l7::listener_tls::Mode;

use super::super::Context;
use super::report::Report;
use super::{Confidential, L7, credentials, origin, resource_name};
use crate::convert::attachments::{ListenerState, Refusal};
use crate::model::l7::Reference;
use crate::model::{AllowedNamespaces, ClientMode, Condition, Gateway, Key, Kind, Listener, ObjectRef};

const ROUTES: &str = "gateway.networking.k8s.io";

/// Whether a Gateway is served as a gateway, by its class.
pub(in crate::convert) fn is_one(gateway: &Gateway) -> bool {
    gateway.gateway_controller().is_some()
}

/// What is spoken at a listener that can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speaks {
    Http,
    Https,
    /// TLS that is passed on.
    Passed,
    /// TLS that ends here, with bytes of any protocol inside.
    Tls,
    /// Bytes of any protocol.
    Tcp,
}

impl Speaks {
    /// # Errors
    /// Why nobody serves the listener.
    fn of(listener: &Listener, gateway: &Gateway) -> Result<Self, Refusal> {
        let passes = listener.tls.as_ref().is_some_and(|tls| tls.passthrough);
        match listener.protocol.as_str() {
            "HTTP" => Ok(Self::Http),
            "TCP" => Ok(Self::Tcp),
            "TLS" if passes => Ok(Self::Passed),
            "HTTPS" | "TLS" if gateway.validates_clients => {
                let why = "spec.tls.frontend asks for certificates of clients, which are not checked yet; a listener \
                           that let everybody in would not be what is asked for";
                Err(("UnsupportedValue", why.to_owned()))
            }
            "HTTPS" | "TLS" if listener.tls.as_ref().is_some_and(|tls| tls.clients == ClientMode::Mesh) => {
                let why = "tls.options asks for ISTIO_MUTUAL, which is not served; SIMPLE, MUTUAL and OPTIONAL_MUTUAL are";
                Err(("UnsupportedValue", why.to_owned()))
            }
            "HTTPS" => Ok(Self::Https),
            "TLS" => Ok(Self::Tls),
            other => {
                let why = format!("protocol is {other:?}; HTTP, HTTPS, TLS and TCP are served");
                Err(("UnsupportedProtocol", why))
            }
        }
    }

    const fn inside(self) -> Inside {
        match self {
            Self::Http | Self::Https => Inside::Http,
            Self::Passed | Self::Tls | Self::Tcp => Inside::Stream,
        }
    }

    /// Kinds of routes that such a listener takes.
    const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Http | Self::Https => &[Kind::HTTPRoute, Kind::GRPCRoute],
            Self::Passed => &[Kind::TLSRoute],
            Self::Tls => &[Kind::TLSRoute, Kind::TCPRoute],
            Self::Tcp => &[Kind::TCPRoute],
        }
    }
}

pub(super) fn convert(context: &mut Context<'_>, out: &mut L7) -> BTreeMap<Key, Vec<ListenerState>> {
    let mut conditions = Vec::new();
    let mut all = BTreeMap::new();
    for gateway in context.objects.gateways.values().filter(|gateway| is_one(gateway)) {
        let object = ObjectRef::of(Kind::Gateway, &gateway.meta);
        let (mut states, mut listeners) = (Vec::new(), Vec::new());
        for (i, listener) in gateway.listeners.iter().enumerate() {
            let earlier = gateway.listeners.iter().take(i).zip(&states);
            let spoken = refusal(listener, gateway, earlier);
            let (mut state, tls) = describe(context, gateway, listener, spoken.as_ref().ok().copied(), out);
            match spoken {
                Ok(spoken) => listeners.push(wire::gateway::Listener {
                    name: listener.name.clone(),
                    port: u32::from(listener.port),
                    // Of bytes nobody says a name.
                    hostname: if spoken == Speaks::Tcp { String::new() } else { listener.hostname.clone() },
                    tls,
                    inside: spoken.inside().into(),
                    server: String::new(),
                }),
                Err(refusal) => state.refusal = Some(refusal),
            }
            states.push(state);
        }
        say(gateway, &states, &mut conditions);
        if !listeners.is_empty() {
            let origin = Some(origin(Kind::Gateway, &gateway.meta));
            out.gateways.insert(resource_name(&object), wire::Gateway { origin, listeners });
        }
        all.insert(gateway.meta.key(), states);
    }
    context.conditions.extend(conditions);
    all
}

/// What there is to say of a listener before any route is looked at, and how it ends TLS. Its certificates are told to the
/// gateway's own proxies.
fn describe(
    context: &Context<'_>,
    gateway: &Gateway,
    listener: &Listener,
    spoken: Option<Speaks>,
    out: &mut L7,
) -> (ListenerState, Option<wire::ListenerTls>) {
    let (kinds, mut unresolved) = spoken.map_or((Vec::new(), None), |spoken| kinds(listener, spoken.kinds()));
    let mut serves = spoken.is_some() && !kinds.is_empty();
    let tls = match spoken {
        None | Some(Speaks::Http | Speaks::Tcp) => None,
        Some(Speaks::Passed) => {
            Some(wire::ListenerTls { mode: Mode::Passthrough.into(), ..wire::ListenerTls::default() })
        }
        Some(Speaks::Https | Speaks::Tls) => {
            let found = credentials::of(context, gateway, listener);
            unresolved = found.unresolved.or(unresolved);
            serves &= !found.credentials.is_empty();
            let credentials = found.credentials.keys().cloned().collect();
            let account = gateway.account();
            out.credentials.extend(
                found
                    .credentials
                    .into_iter()
                    .map(|(name, credential)| (name, Confidential { account: account.clone(), credential })),
            );
            let mut told = wire::ListenerTls { mode: Mode::Terminate.into(), ..wire::ListenerTls::default() };
            match clients(context, gateway, listener) {
                Ok(clients) => (told.credentials, told.clients) = (credentials, clients),
                // Who asks for certificates that nobody can check serves nobody.
                Err(why) => {
                    serves = false;
                    unresolved = Some(unresolved.unwrap_or(("InvalidCertificateRef", why)));
                }
            }
            Some(told)
        }
    };
    let name = listener.name.clone();
    (ListenerState { name, kinds, attached: 0, refusal: None, unresolved, serves }, tls)
}

/// Which certificates clients of a listener have to show.
///
/// # Errors
/// Why they cannot be checked.
fn clients(
    context: &Context<'_>,
    gateway: &Gateway,
    listener: &Listener,
) -> Result<Option<wire::ClientCertificates>, String> {
    let Some(tls) = listener.tls.as_ref().filter(|tls| tls.clients != ClientMode::None) else {
        return Ok(None);
    };
    let (roots, revocations) = credentials::roots(context, &context.objects.root_secrets(tls, gateway))?;
    let optional = tls.clients == ClientMode::Optional;
    Ok(Some(wire::ClientCertificates { roots, revocations, subject_alt_names: Vec::new(), optional }))
}

/// What is spoken at a listener.
///
/// # Errors
/// Why it is not served: the first of those that cannot be together is.
fn refusal<'a>(
    listener: &Listener,
    gateway: &Gateway,
    earlier: impl Iterator<Item = (&'a Listener, &'a ListenerState)>,
) -> Result<Speaks, Refusal> {
    let spoken = Speaks::of(listener, gateway)?;
    let port = listener.port;
    for (other, _) in earlier.filter(|(other, state)| state.refusal.is_none() && other.port == port) {
        // One port: HTTP in the clear, other bytes in the clear, or TLS.
        let kind = |protocol: &str| match protocol {
            "HTTP" => 0,
            "TCP" => 1,
            _ => 2,
        };
        if kind(&other.protocol) != kind(&listener.protocol) {
            let why = format!("listener {} has the port {port} for protocol {}", other.name, other.protocol);
            return Err(("ProtocolConflict", why));
        }
        if other.hostname == listener.hostname || spoken == Speaks::Tcp {
            let why = format!("listener {} has the port {port} and the hostname already", other.name);
            return Err(("HostnameConflict", why));
        }
    }
    Ok(spoken)
}

/// The kinds of routes that a listener takes, and which of those that it names it cannot.
fn kinds(listener: &Listener, possible: &[Kind]) -> (Vec<Kind>, Option<Refusal>) {
    if listener.kinds.is_empty() {
        return (possible.to_vec(), None);
    }
    let is = |kind: &Kind, (group, name): &(String, String)| group == ROUTES && *name == kind.to_string();
    let taken = possible.iter().filter(|kind| listener.kinds.iter().any(|given| is(kind, given)));
    let taken = taken.copied().collect();
    let other: Vec<String> = listener
        .kinds
        .iter()
        .filter(|given| !possible.iter().any(|kind| is(kind, given)))
        .map(|(group, name)| format!("{name} of group {group:?}"))
        .collect();
    let names: Vec<String> = possible.iter().map(ToString::to_string).collect();
    let why = || format!("takes no {}; write {}", other.join(", "), names.join(" or "));
    let unresolved = (!other.is_empty()).then(|| ("InvalidRouteKinds", why()));
    (taken, unresolved)
}

fn say(gateway: &Gateway, states: &[ListenerState], conditions: &mut Vec<Condition>) {
    let object = ObjectRef::of(Kind::Gateway, &gateway.meta);
    let mut report = Report::new(object.clone(), &gateway.unsupported);
    for (i, state) in states.iter().enumerate() {
        if let Some((reason, why)) = &state.unresolved {
            report.unresolved(reason, format!("spec.listeners[{i}]: {why}"));
        }
    }
    let refused: Vec<String> = states
        .iter()
        .enumerate()
        .filter_map(|(i, state)| Some(format!("spec.listeners[{i}]: {}", state.refusal.as_ref()?.1)))
        .collect();
    if refused.is_empty() {
        report.finish(true, conditions);
    } else if refused.len() == states.len() {
        let why = format!(
            "no listener can be served; write one with protocol HTTP, HTTPS, TLS or TCP; {}",
            refused.join("; ")
        );
        report.refuse("ListenersNotValid", why, conditions);
    } else {
        let mut why = refused.join("; ");
        if !gateway.unsupported.is_empty() {
            why = format!("{why}; no effect: {}", gateway.unsupported.join(", "));
        }
        conditions.push(Condition::new(object, "Accepted", true, "ListenersNotValid", why));
    }
}

/// What a route asks of a gateway.
pub(super) struct Request<'a> {
    /// Its parent.
    pub(super) parent: &'a Reference,
    /// The Gateway that this names.
    pub(super) key: &'a Key,
    /// Kind and namespace of the route.
    pub(super) kind: Kind,
    pub(super) namespace: &'a str,
    /// Its hosts; none: every host.
    pub(super) hostnames: &'a [String],
}

/// The listeners that a route names and that admit it.
///
/// # Errors
/// Why there are none: reason and text.
pub(super) fn listeners(
    context: &Context<'_>,
    states: &BTreeMap<Key, Vec<ListenerState>>,
    request: &Request<'_>,
) -> Result<Vec<wire::GatewayRef>, (&'static str, String)> {
    let Request { parent, key, kind, namespace, hostnames } = request;
    let Some(gateway) = context.objects.gateways.get(key) else {
        return Err(("NoMatchingParent", format!("Gateway {key} does not exist")));
    };
    let Some(states) = states.get(key) else {
        let class = &gateway.class;
        let why = format!(
            "Gateway {key} of class {class} takes no routes; to reach a waypoint, name the Service behind it"
        );
        return Err(("NoMatchingParent", why));
    };
    let named = |(listener, _): &(&Listener, &ListenerState)| {
        let section = parent.section_name.is_empty() || parent.section_name == listener.name;
        section && parent.port.is_none_or(|port| port == listener.port)
    };
    let named: Vec<(&Listener, &ListenerState)> =
        gateway.listeners.iter().zip(states).filter(named).collect();
    if named.is_empty() {
        return Err(("NoMatchingParent", format!("Gateway {key} has no listener of that name and port")));
    }
    let takes = |state: &ListenerState| state.refusal.is_none() && state.kinds.contains(kind);
    let taking: Vec<&Listener> =
        named.into_iter().filter(|(_, state)| takes(state)).map(|(listener, _)| listener).collect();
    if taking.is_empty() {
        let why = format!("no such listener of Gateway {key} takes {kind}; see its status");
        return Err(("NotAllowedByListeners", why));
    }
    let admitting: Vec<&Listener> =
        taking.into_iter().filter(|l| admits(context, l, key, namespace)).collect();
    if admitting.is_empty() {
        let why = format!("Gateway {key} does not admit namespace {namespace}; see its allowedRoutes");
        return Err(("NotAllowedByListeners", why));
    }
    let common = |listener: &&Listener| {
        hostnames.is_empty()
            || listener.hostname.is_empty()
            || hostnames.iter().any(|host| meet(host, &listener.hostname))
    };
    let refs: Vec<wire::GatewayRef> = admitting
        .into_iter()
        .filter(common)
        .map(|listener| wire::GatewayRef {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            listener: listener.name.clone(),
        })
        .collect();
    if refs.is_empty() {
        let why = format!("no hostname is also one of the listeners of Gateway {key}");
        return Err(("NoMatchingListenerHostname", why));
    }
    Ok(refs)
}

fn admits(context: &Context<'_>, listener: &Listener, gateway: &Key, namespace: &str) -> bool {
    match &listener.allowed {
        AllowedNamespaces::All => true,
        AllowedNamespaces::Same => namespace == gateway.namespace,
        AllowedNamespaces::Selector(selector) => {
            context.objects.namespaces.get(namespace).is_some_and(|n| selector.matches(&n.meta.labels))
        }
    }
}

/// Whether there are names that both hosts, which may be `*.domain`, stand for.
fn meet(one: &str, other: &str) -> bool {
    let covers = super::services::covers;
    one == other || covers(one, other) || covers(other, one)
}
