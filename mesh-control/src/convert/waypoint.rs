//! Which waypoint stands before a service or a workload.
//!
//! Labels, traffic types, admission and canaries as Istio's ambient mode reads them. One rule differs: a
//! waypoint that was asked for and is not there leaves Istio's traffic to flow around it; here the object keeps
//! an address that leads nowhere, so that its traffic fails until the waypoint is there.

use std::collections::BTreeMap;

use mesh_core::xds::proto::workload::{
    GatewayAddress, NamespacedHostname, NetworkAddress, WeightedWaypoint, gateway_address,
};

use super::{Context, Mesh, ip_bytes};
use crate::model::{
    AllowedNamespaces, Condition, Gateway, GatewayHost, Key, Kind, Meta, ObjectRef, Objects,
    WAYPOINT_CLASSES, controller_of,
};

const HBONE_PORT: u32 = 15008;
const CANARY: &str = "istio.io/use-waypoint-canary";
const BOUND: &str = "istio.io/WaypointBound";

/// What traffic is addressed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Traffic {
    Service,
    Workload,
}

struct Waypoint {
    address: Option<GatewayAddress>,
    allowed: AllowedNamespaces,
    services: bool,
    workloads: bool,
}

/// Every Gateway that is a waypoint.
pub(super) struct Waypoints {
    by_key: BTreeMap<Key, Waypoint>,
}

/// What an object is bound to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Binding {
    pub(super) waypoint: Option<GatewayAddress>,
    pub(super) weighted: Vec<WeightedWaypoint>,
    /// The Gateway that a label names, whether the object could be bound to it or not.
    pub(super) asked: Option<Key>,
    /// The Gateway that takes a share.
    canary: Option<Key>,
}

impl Binding {
    /// The Gateways that traffic goes through, or would.
    pub(super) fn gateways(&self) -> Vec<Key> {
        self.asked.iter().chain(&self.canary).cloned().collect()
    }
}

/// Says what has no effect in classes of ours.
fn classes(objects: &Objects, conditions: &mut Vec<Condition>) {
    for class in objects.gateway_classes.values().filter(|class| !class.unsupported.is_empty()) {
        if controller_of(&class.meta.name, Some(&class.controller)).is_some() {
            let object = ObjectRef::of(Kind::GatewayClass, &class.meta);
            let none = class.unsupported.join(", ");
            let message =
                format!("no effect: {none}; write spec.infrastructure.parametersRef of the Gateway");
            conditions.push(Condition::new(object, "Accepted", true, "UnsupportedValue", message));
        }
    }
}

impl Waypoints {
    pub(super) fn new(
        objects: &Objects,
        mesh: &Mesh,
        network: &str,
        conditions: &mut Vec<Condition>,
    ) -> Self {
        classes(objects, conditions);
        let mut by_key = BTreeMap::new();
        for gateway in objects.gateways.values().filter(|gateway| !super::l7::is_gateway(gateway)) {
            let listener =
                gateway.listeners.iter().find(|l| l.protocol == "HBONE" || l.protocol == "istio.io/PROXY");
            if !gateway.is_waypoint() && (listener.is_none() || gateway.class.starts_with("istio-east")) {
                conditions.push(Condition::new(
                    ObjectRef::of(Kind::Gateway, &gateway.meta),
                    "Accepted",
                    false,
                    "UnsupportedValue",
                    format!(
                        "class {} is not served; write {} for a waypoint, istio for a gateway",
                        gateway.class,
                        WAYPOINT_CLASSES.iter().map(|(class, _)| *class).collect::<Vec<_>>().join(" or ")
                    ),
                ));
                continue;
            }
            let accepts = gateway.meta.label("istio.io/waypoint-for").unwrap_or("service");
            if !["service", "workload", "all", "none"].contains(&accepts) {
                conditions.push(Condition::new(
                    ObjectRef::of(Kind::Gateway, &gateway.meta),
                    "Accepted",
                    false,
                    "InvalidValue",
                    format!(
                        "label istio.io/waypoint-for is {accepts:?}; write service, workload, all or none (taken as service)"
                    ),
                ));
            }
            if gateway
                .meta
                .annotation("ambient.istio.io/waypoint-inbound-binding")
                .is_some_and(|v| v != "NONE")
            {
                conditions.push(Condition::new(
                    ObjectRef::of(Kind::Gateway, &gateway.meta),
                    "Accepted",
                    true,
                    "UnsupportedValue",
                    "annotation ambient.istio.io/waypoint-inbound-binding has no effect: the waypoint receives HBONE",
                ));
            }
            if !gateway.unsupported.is_empty() {
                conditions.push(Condition::new(
                    ObjectRef::of(Kind::Gateway, &gateway.meta),
                    "Accepted",
                    true,
                    "UnsupportedValue",
                    format!("no effect: {}", gateway.unsupported.join(", ")),
                ));
            }
            let waypoint = Waypoint {
                address: address(gateway, listener.map_or(HBONE_PORT, |l| u32::from(l.port)), network),
                allowed: listener.map_or(AllowedNamespaces::Same, |l| l.allowed.clone()),
                services: !matches!(accepts, "workload" | "none"),
                workloads: matches!(accepts, "workload" | "all"),
            };
            if waypoint.address.is_none() {
                conditions.push(Condition::new(
                    ObjectRef::of(Kind::Gateway, &gateway.meta),
                    "Programmed",
                    false,
                    "AddressNotAssigned",
                    format!(
                        "has no address; write spec.addresses with type Hostname and value {}",
                        mesh.hostname(&gateway.meta.namespace, &gateway.meta.name)
                    ),
                ));
            }
            by_key.insert(gateway.meta.key(), waypoint);
        }
        Self { by_key }
    }

    /// True for a Gateway that is a waypoint.
    pub(super) fn is_one(&self, gateway: &Key) -> bool {
        self.by_key.contains_key(gateway)
    }

    /// True for the pods and services that make up a waypoint.
    pub(super) fn is_part_of_one(&self, meta: &Meta) -> bool {
        meta.label("gateway.istio.io/managed").is_some()
            || meta
                .label(crate::model::istio_gateway::GATEWAY_NAME)
                .is_some_and(|name| self.by_key.contains_key(&Key::new(&meta.namespace, name)))
    }
}

/// The host name is preferred: it lets the caller choose a family and a healthy instance.
fn address(gateway: &Gateway, port: u32, network: &str) -> Option<GatewayAddress> {
    let hostname = gateway.addresses.iter().find_map(|a| match a {
        GatewayHost::Hostname(host) => Some(hostname(&gateway.meta.namespace, host)),
        GatewayHost::Ip(_) => None,
    });
    let ip = gateway.addresses.iter().find_map(|a| match a {
        GatewayHost::Ip(ip) => Some(gateway_address::Destination::Address(NetworkAddress {
            network: network.to_owned(),
            address: ip_bytes(*ip),
            length: None,
        })),
        GatewayHost::Hostname(_) => None,
    });
    let destination = hostname.or(ip)?;
    Some(GatewayAddress { destination: Some(destination), hbone_mtls_port: port })
}

fn hostname(namespace: &str, host: &str) -> gateway_address::Destination {
    gateway_address::Destination::Hostname(NamespacedHostname {
        namespace: namespace.to_owned(),
        hostname: host.to_owned(),
    })
}

enum Outcome {
    Bound(GatewayAddress),
    /// Asked for, not there: traffic fails.
    NotReady(GatewayAddress, String),
    /// Not attached, with the reason for people when there is something to say.
    Refused(Option<(&'static str, String)>),
}

/// Binds an object by its labels, else by its namespace's.
pub(super) fn bind(context: &mut Context<'_>, object: &ObjectRef, meta: &Meta, traffic: Traffic) -> Binding {
    if context.waypoints.is_part_of_one(meta) {
        return Binding::default();
    }
    let namespace = context.objects.namespaces.get(&meta.namespace).map(|n| n.meta.clone());
    let on_object = meta.label("istio.io/use-waypoint").is_some();
    let holder = match (&namespace, on_object) {
        (_, true) => meta,
        (Some(namespace), false) => namespace,
        (None, false) => return Binding::default(),
    };
    let Some(key) = reference(holder, "istio.io/use-waypoint", &meta.namespace) else {
        return Binding::default();
    };
    let mut binding = Binding { asked: Some(key.clone()), ..Binding::default() };
    let (status, reason, mut message) = match attach(context, &key, meta, traffic, on_object) {
        Outcome::Bound(address) => {
            binding.waypoint = Some(address);
            (true, "WaypointAccepted", format!("Successfully attached to waypoint {key}"))
        }
        Outcome::NotReady(address, why) => {
            binding.waypoint = Some(address);
            (false, "WaypointIsNotReady", why)
        }
        Outcome::Refused(Some((reason, why))) => (false, reason, why),
        Outcome::Refused(None) => return binding,
    };
    if status {
        let (weighted, note) = canary(context, holder, &key, meta, traffic, &binding);
        if !weighted.is_empty() {
            binding.canary = reference(holder, CANARY, &meta.namespace);
        }
        binding.weighted = weighted;
        message.push_str(&note);
    }
    context.conditions.push(Condition::new(object.clone(), BOUND, status, reason, message));
    binding
}

/// The waypoint that a label names; `none` names none.
fn reference(holder: &Meta, label: &str, namespace: &str) -> Option<Key> {
    let name = holder.label(label).filter(|n| *n != "none" && !n.is_empty())?;
    let namespace = holder.label(&format!("{label}-namespace")).unwrap_or(namespace);
    Some(Key::new(namespace, name))
}

fn attach(context: &Context<'_>, key: &Key, meta: &Meta, traffic: Traffic, on_object: bool) -> Outcome {
    let nowhere = || GatewayAddress {
        destination: Some(hostname(&key.namespace, &context.mesh.hostname(&key.namespace, &key.name))),
        hbone_mtls_port: HBONE_PORT,
    };
    let Some(waypoint) = context.waypoints.by_key.get(key) else {
        // What the missing waypoint would accept is unknown; the default is traffic to services.
        if traffic == Traffic::Workload && !on_object {
            return Outcome::Refused(None);
        }
        return Outcome::NotReady(
            nowhere(),
            format!("Gateway {key} does not exist; traffic fails until it does"),
        );
    };
    let accepts = match traffic {
        Traffic::Service => waypoint.services,
        Traffic::Workload => waypoint.workloads,
    };
    if !accepts {
        let why = format!(
            "waypoint {key} does not accept traffic to {}; see its label istio.io/waypoint-for",
            if traffic == Traffic::Service { "services" } else { "workloads" }
        );
        return Outcome::Refused(on_object.then_some(("UnsupportedTrafficType", why)));
    }
    let admitted = match &waypoint.allowed {
        AllowedNamespaces::All => true,
        AllowedNamespaces::Same => meta.namespace == key.namespace,
        AllowedNamespaces::Selector(selector) => {
            context.objects.namespaces.get(&meta.namespace).is_some_and(|n| selector.matches(&n.meta.labels))
        }
    };
    if !admitted {
        let why =
            format!("waypoint {key} does not admit namespace {}; see its allowedRoutes", meta.namespace);
        return Outcome::Refused(Some(("AttachmentDenied", why)));
    }
    match &waypoint.address {
        Some(address) => Outcome::Bound(address.clone()),
        None => Outcome::NotReady(
            nowhere(),
            format!("waypoint {key} has no address yet; traffic fails until it has"),
        ),
    }
}

/// Splits traffic between the waypoint and a canary read from the same object.
fn canary(
    context: &Context<'_>,
    holder: &Meta,
    primary: &Key,
    meta: &Meta,
    traffic: Traffic,
    binding: &Binding,
) -> (Vec<WeightedWaypoint>, String) {
    let Some(key) = reference(holder, CANARY, &meta.namespace) else {
        return (Vec::new(), String::new());
    };
    if key == *primary {
        return (Vec::new(), "; CanarySameAsPrimary: the canary is the waypoint itself".into());
    }
    let weight = match holder.annotation("istio.io/use-waypoint-canary-weight").map(str::parse::<u32>) {
        None => 0,
        Some(Ok(weight)) if weight <= 100 => weight,
        Some(_) => {
            return (Vec::new(), "; CanaryInvalidWeight: write a percentage from 0 to 100".into());
        }
    };
    match attach(context, &key, meta, traffic, true) {
        Outcome::Bound(address) => {
            let split = [(binding.waypoint.clone(), 100 - weight), (Some(address), weight)];
            let split = split.map(|(destination, weight)| WeightedWaypoint { destination, weight });
            (split.into(), format!("; {weight} % goes to canary {key}"))
        }
        Outcome::NotReady(_, why) | Outcome::Refused(Some((_, why))) => {
            (Vec::new(), format!("; no canary: {why}"))
        }
        Outcome::Refused(None) => (Vec::new(), String::new()),
    }
}
