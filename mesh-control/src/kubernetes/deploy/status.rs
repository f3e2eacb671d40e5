//! What a Gateway says of itself: addresses, `Accepted`, `Programmed`, and each listener. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::status::render::{Said, conditions, same};
use crate::convert::{ListenerState, Mesh};
use crate::model::{Gateway, GatewayHost, Key, Kind, Objects};
use crate::source::kube::observed::Stored;

/// How far a waypoint or gateway is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// Somebody else deploys it: `spec.addresses`.
    Manual,
    /// It cannot be deployed, and why.
    Refused(String),
    /// Its parameters cannot be used, and why.
    Misguided(String),
    /// Deployed; so many of its pods are ready.
    Deployed {
        /// Ready pods.
        ready: i64,
    },
}

/// What is there.
pub(super) struct Present<'a> {
    /// Namespace and name of what is deployed.
    pub(super) place: Key,
    /// What there is to say of each listener of a gateway; none for a waypoint.
    pub(super) listeners: Option<&'a [ListenerState]>,
    pub(super) objects: &'a Objects,
    pub(super) mesh: &'a Mesh,
}

/// The status to apply; none when what is stored is right.
pub(super) fn status(
    gateway: &Gateway,
    stage: &Stage,
    mut said: BTreeMap<String, Said>,
    present: &Present<'_>,
    stored: &Stored,
    now: &str,
) -> Option<Value> {
    let addresses = addresses(gateway, stage, present);
    said.entry("Accepted".into()).or_insert_with(|| good("Accepted", "the waypoint is served"));
    if let Stage::Misguided(why) = stage {
        let accepted = Said { status: false, reason: "InvalidParameters".into(), message: why.clone() };
        said.insert("Accepted".into(), accepted);
    }
    said.insert("Programmed".into(), programmed(stage, &addresses));
    let before = &stored.status;
    let wanted = conditions(&said, &before["conditions"], gateway.meta.generation, now);
    let listeners: Vec<Value> = gateway
        .listeners
        .iter()
        .map(|l| {
            let state = present.listeners.and_then(|all| all.iter().find(|state| state.name == l.name));
            listener(&l.name, state, &said, gateway.meta.generation, before, now)
        })
        .collect();
    let right = same(&wanted, &before["conditions"])
        && list(&before["addresses"]) == addresses
        && same_listeners(&listeners, &before["listeners"]);
    (!right).then(|| json!({ "addresses": addresses, "conditions": wanted, "listeners": listeners }))
}

fn good(reason: &str, message: &str) -> Said {
    Said { status: true, reason: reason.into(), message: message.into() }
}

fn programmed(stage: &Stage, addresses: &[Value]) -> Said {
    let bad = |reason: &str, message: String| Said { status: false, reason: reason.into(), message };
    match stage {
        Stage::Refused(why) | Stage::Misguided(why) => bad("Invalid", why.clone()),
        _ if addresses.is_empty() => bad("AddressNotAssigned", "its Service has no address yet".into()),
        Stage::Manual => good("Programmed", "deployed by its owner; told to callers"),
        Stage::Deployed { ready: 0 } => bad("Pending", "none of its pods is ready yet".into()),
        Stage::Deployed { .. } => good("Programmed", "deployed, ready, and told to callers"),
    }
}

/// Of a waypoint the host name first: it is what callers are told. Of a gateway the load balancer's, or, where it has none,
/// the host name.
fn addresses(gateway: &Gateway, stage: &Stage, present: &Present<'_>) -> Vec<Value> {
    let address = |kind: &str, value: String| json!({ "type": kind, "value": value });
    let of = |host: &GatewayHost| match host {
        GatewayHost::Hostname(name) => address("Hostname", name.clone()),
        GatewayHost::Ip(ip) => address("IPAddress", ip.to_string()),
    };
    match stage {
        Stage::Refused(_) | Stage::Misguided(_) => Vec::new(),
        Stage::Manual => gateway.manual.iter().map(of).collect(),
        Stage::Deployed { .. } => {
            let place = &present.place;
            let Some(service) = present.objects.services.get(place) else { return Vec::new() };
            let host = address("Hostname", present.mesh.hostname(&place.namespace, &place.name));
            if service.load_balancer {
                service.ingress.iter().map(of).collect()
            } else if gateway.is_waypoint() {
                let ips = service.cluster_ips.iter().map(|ip| address("IPAddress", ip.to_string()));
                [host].into_iter().chain(ips).collect()
            } else {
                vec![host]
            }
        }
    }
}

fn listener(
    name: &str,
    state: Option<&ListenerState>,
    gateway: &BTreeMap<String, Said>,
    generation: i64,
    before: &Value,
    now: &str,
) -> Value {
    let said = listener_conditions(state, gateway);
    let old = before["listeners"].as_array().into_iter().flatten().find(|l| l["name"] == *name);
    let old = old.map_or(&Value::Null, |l| &l["conditions"]);
    let kinds = state.map(|state| state.kinds.as_slice()).unwrap_or_default();
    let kind = |kind: &Kind| json!({"group": "gateway.networking.k8s.io", "kind": kind.to_string()});
    json!({
        "name": name,
        "attachedRoutes": state.map_or(0, |state| state.attached),
        "supportedKinds": kinds.iter().map(kind).collect::<Vec<_>>(),
        "conditions": conditions(&said, old, generation, now),
    })
}

/// A waypoint's listener says what its Gateway says; a gateway's what it is itself.
fn listener_conditions(
    state: Option<&ListenerState>,
    gateway: &BTreeMap<String, Said>,
) -> BTreeMap<String, Said> {
    let own = ["Accepted", "Programmed"];
    let mut said: BTreeMap<String, Said> =
        own.iter().filter_map(|kind| Some(((*kind).to_owned(), gateway.get(*kind)?.clone()))).collect();
    said.insert("ResolvedRefs".into(), good("ResolvedRefs", "it names nothing that is not there"));
    let Some(state) = state else { return said };
    let bad = |reason: &str, why: &str| Said { status: false, reason: reason.into(), message: why.into() };
    said.insert("Accepted".into(), good("Accepted", "it is served"));
    said.insert("Conflicted".into(), bad("NoConflicts", "no other listener is in its way"));
    if let Some((reason, why)) = &state.refusal {
        said.insert("Accepted".into(), bad(reason, why));
        said.insert("Programmed".into(), bad("Invalid", why));
        if reason.ends_with("Conflict") {
            said.insert("Conflicted".into(), good(reason, why));
        }
    }
    if let Some((reason, why)) = &state.unresolved {
        said.insert("ResolvedRefs".into(), bad(reason, why));
        if !state.serves {
            said.insert("Programmed".into(), bad("Invalid", why));
        }
    }
    said
}

fn same_listeners(wanted: &[Value], before: &Value) -> bool {
    let before = list(before);
    before.len() == wanted.len()
        && wanted.iter().all(|l| {
            let old = before.iter().find(|b| b["name"] == l["name"]);
            let conditions = l["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
            old.is_some_and(|b| {
                let as_is = |key: &str| b[key] == l[key];
                same(conditions, &b["conditions"]) && as_is("attachedRoutes") && as_is("supportedKinds")
            })
        })
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::super::status::render::merge;
    use super::*;
    use crate::model::ObjectRef;

    const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop, uid: u1, generation: 2}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";
    const SERVICE: &str = "
---
apiVersion: v1
kind: Service
metadata: {name: waypoint, namespace: shop}
spec: {clusterIP: 10.0.0.9, ports: [{port: 15008}]}
";

    fn of(text: &str, stage: &Stage, stored: Value) -> Option<Value> {
        let objects = crate::testing::objects(text);
        let gateway = objects.gateways.values().next().unwrap().clone();
        let stored = Stored {
            uid: String::new(),
            api_version: "v1".into(),
            generation: 2,
            status: stored,
            parents: Value::Null,
        };
        let resources = crate::testing::resources(text);
        let key = gateway.meta.key();
        let present = Present {
            place: super::super::manifest::place(&gateway),
            listeners: resources.attachments.listeners.get(&key).map(Vec::as_slice),
            objects: &objects,
            mesh: &Mesh::default(),
        };
        let object = ObjectRef::of(Kind::Gateway, &gateway.meta);
        let said = merge(resources.conditions.iter().filter(|c| c.object == object && c.kind == "Accepted"));
        status(&gateway, stage, said, &present, &stored, "2026-01-01T00:00:00Z")
    }

    fn condition<'s>(status: &'s Value, kind: &str) -> (&'s str, &'s str) {
        let all = status["conditions"].as_array().unwrap();
        let found = all.iter().find(|c| c["type"] == *kind).unwrap();
        (found["status"].as_str().unwrap(), found["reason"].as_str().unwrap())
    }

    #[test]
    fn a_waypoint_is_programmed_once_it_has_an_address_and_a_ready_pod() {
        let ready = |ready| Stage::Deployed { ready };
        let none = of(GATEWAY, &ready(1), Value::Null).unwrap();
        assert_eq!(condition(&none, "Programmed"), ("False", "AddressNotAssigned"));
        assert_eq!(condition(&none, "Accepted"), ("True", "Accepted"));
        let with = format!("{GATEWAY}{SERVICE}");
        let starting = of(&with, &ready(0), none).unwrap();
        assert_eq!(condition(&starting, "Programmed"), ("False", "Pending"));
        let there = of(&with, &ready(1), starting).unwrap();
        assert_eq!(condition(&there, "Programmed"), ("True", "Programmed"));
        assert_eq!(
            there["addresses"],
            json!([
                {"type": "Hostname", "value": "waypoint.shop.svc.cluster.local"},
                {"type": "IPAddress", "value": "10.0.0.9"},
            ])
        );
        assert_eq!(there["listeners"][0]["conditions"].as_array().unwrap().len(), 3);
        assert_eq!(of(&with, &ready(2), there.clone()), None, "it is written already");
        let refused = of(&with, &Stage::Refused("no image".into()), there).unwrap();
        assert_eq!(condition(&refused, "Programmed"), ("False", "Invalid"));
    }

    #[test]
    fn a_waypoint_that_somebody_deploys_himself_has_the_address_that_he_wrote() {
        let own = GATEWAY.replace(
            "istio-waypoint, ",
            "istio-waypoint, addresses: [{type: Hostname, value: w.shop.svc.cluster.local}], ",
        );
        let status = of(&own, &Stage::Manual, Value::Null).unwrap();
        assert_eq!(status["addresses"][0]["value"], "w.shop.svc.cluster.local");
        assert_eq!(condition(&status, "Programmed"), ("True", "Programmed"));
    }

    const INGRESS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: shop, uid: u1, generation: 2}
spec:
  gatewayClassName: istio
  listeners:
  - {name: a, port: 80, protocol: HTTP, hostname: a.example}
  - {name: b, port: 80, protocol: HTTP, hostname: a.example}
  - {name: c, port: 81, protocol: HTTP, allowedRoutes: {kinds: [{kind: HTTPRoute}, {kind: Odd}]}}
  - {name: d, port: 82, protocol: QUIC}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec: {parentRefs: [{name: in}], hostnames: [a.example], rules: [{backendRefs: [{name: gone, port: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: in-istio, namespace: shop}
spec: {type: LoadBalancer, clusterIP: 10.0.0.9, ports: [{port: 80}]}
status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {hostname: lb.example}]}}
";

    #[test]
    fn a_gateway_says_of_each_listener_whether_it_is_served_and_how_many_routes_it_has() {
        let status = of(INGRESS, &Stage::Deployed { ready: 1 }, Value::Null).unwrap();
        assert_eq!(condition(&status, "Accepted"), ("True", "ListenersNotValid"));
        assert_eq!(condition(&status, "Programmed"), ("True", "Programmed"));
        let values: Vec<&str> =
            status["addresses"].as_array().unwrap().iter().map(|a| a["value"].as_str().unwrap()).collect();
        assert_eq!(values, ["192.0.2.1", "lb.example"], "the load balancer's");
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| &status["listeners"][i]);
        assert_eq!((a["attachedRoutes"].as_u64(), condition(a, "Accepted")), (Some(1), ("True", "Accepted")));
        assert_eq!(condition(a, "Conflicted"), ("False", "NoConflicts"));
        assert_eq!(a["supportedKinds"].as_array().unwrap().len(), 2);
        assert_eq!(
            (b["attachedRoutes"].as_u64(), condition(b, "Accepted")),
            (Some(0), ("False", "HostnameConflict"))
        );
        assert_eq!(condition(b, "Conflicted"), ("True", "HostnameConflict"));
        assert_eq!(condition(b, "Programmed"), ("False", "Invalid"));
        assert_eq!(c["attachedRoutes"], 1);
        assert_eq!(condition(c, "ResolvedRefs"), ("False", "InvalidRouteKinds"));
        assert_eq!(condition(c, "Programmed"), ("True", "Programmed"), "it takes what it can");
        assert_eq!(c["supportedKinds"], json!([{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute"}]));
        assert_eq!(condition(d, "Accepted"), ("False", "UnsupportedProtocol"));
        assert_eq!(d["supportedKinds"], json!([]));
        assert_eq!(of(INGRESS, &Stage::Deployed { ready: 1 }, status.clone()), None);
        let misguided = of(INGRESS, &Stage::Misguided("no such ConfigMap".into()), status).unwrap();
        assert_eq!(condition(&misguided, "Accepted"), ("False", "InvalidParameters"));
        let pending = INGRESS
            .replace("status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {hostname: lb.example}]}}", "");
        let status = of(&pending, &Stage::Deployed { ready: 1 }, Value::Null).unwrap();
        assert_eq!(condition(&status, "Programmed"), ("False", "AddressNotAssigned"));
    }
}
