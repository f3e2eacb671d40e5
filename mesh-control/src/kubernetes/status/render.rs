//! Conditions in the shape of each kind's status, and whether what is stored has to change: pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::convert::{MESH_CONTROLLER, ParentState};
use crate::model::{Condition, GATEWAY_CLASSES, Kind, ObjectRef};
use crate::source::kube::observed::Stored;

/// Whether the proxies have what an object says.
pub(in crate::kubernetes) const PROGRAMMED: &str = "undermesh.io/Programmed";
/// Whether the services of a route have a waypoint: nothing that a gateway asks.
const RESOLVED_WAYPOINTS: &str = "ResolvedWaypoints";
/// Condition types that we write. One that is stored and no longer said is taken away.
const OURS: &[&str] = &[
    "Accepted",
    "ResolvedRefs",
    "Conflicted",
    RESOLVED_WAYPOINTS,
    "Programmed",
    "ZtunnelAccepted",
    "WaypointAccepted",
    "istio.io/WaypointBound",
    "istio.io/WaypointMissing",
    "undermesh.io/Enrolled",
    PROGRAMMED,
    "undermesh.io/Transports",
];
/// What the API allows.
const LONGEST_MESSAGE: usize = 32_000;

/// What is said under one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kubernetes) struct Said {
    pub(in crate::kubernetes) status: bool,
    pub(in crate::kubernetes) reason: String,
    pub(in crate::kubernetes) message: String,
}

/// One entry per type: what was said last is last, the first bad thing gives the reason.
pub(in crate::kubernetes) fn merge<'c>(
    conditions: impl Iterator<Item = &'c Condition>,
) -> BTreeMap<String, Said> {
    let mut all: BTreeMap<String, Said> = BTreeMap::new();
    for c in conditions {
        let Some(said) = all.get_mut(&c.kind) else {
            let said = Said { status: c.status, reason: c.reason.clone(), message: c.message.clone() };
            all.insert(c.kind.clone(), said);
            continue;
        };
        if said.status && (!c.status || said.reason == "Accepted") {
            (said.status, said.reason) = (c.status, c.reason.clone());
        }
        if !said.message.contains(&c.message) {
            said.message = format!("{}; {}", said.message, c.message);
        }
    }
    for said in all.values_mut().filter(|s| s.message.len() > LONGEST_MESSAGE) {
        let end = (0..=LONGEST_MESSAGE).rev().find(|i| said.message.is_char_boundary(*i)).unwrap_or_default();
        said.message.truncate(end);
    }
    all
}

/// Conditions as they are stored, with the time of the last transition kept where there was none.
pub(in crate::kubernetes) fn conditions(
    said: &BTreeMap<String, Said>,
    stored: &Value,
    generation: i64,
    now: &str,
) -> Vec<Value> {
    let before = |kind: &str| stored.as_array().into_iter().flatten().find(|c| c["type"] == *kind);
    let one = |(kind, said): (&String, &Said)| {
        let status = if said.status { "True" } else { "False" };
        let since = before(kind).filter(|c| c["status"] == *status).map(|c| &c["lastTransitionTime"]);
        let since = since.and_then(Value::as_str).unwrap_or(now);
        let mut condition = json!({
            "type": kind, "status": status, "reason": said.reason, "message": said.message,
            "lastTransitionTime": since,
        });
        // Services have none, and the API server does not store a zero.
        if generation > 0 {
            condition["observedGeneration"] = generation.into();
        }
        condition
    };
    said.iter().map(one).collect()
}

fn is_ours(condition: &Value) -> bool {
    condition["type"].as_str().is_some_and(|t| OURS.contains(&t))
}

/// Whether the stored conditions of ours are these, in any order. Numbers may be stored as text.
pub(in crate::kubernetes) fn same(wanted: &[Value], stored: &Value) -> bool {
    let plain = |c: &Value| {
        let mut fields: Map<String, Value> = c.as_object().cloned().unwrap_or_default();
        fields.remove("lastProbeTime");
        let generation = fields.remove("observedGeneration").map(|g| g.to_string().replace('"', ""));
        fields.insert("observedGeneration".into(), generation.filter(|g| g != "0").into());
        (c["type"].as_str().unwrap_or_default().to_owned(), fields)
    };
    let wanted: BTreeMap<_, _> = wanted.iter().map(plain).collect();
    let stored = stored.as_array().into_iter().flatten().filter(|c| is_ours(c));
    stored.map(plain).collect::<BTreeMap<_, _>>() == wanted
}

/// The status to apply to an object, none when what is stored is right. `parents` is what there is to say of those of a
/// route; none: it cannot be read.
pub(in crate::kubernetes) fn status(
    object: &ObjectRef,
    said: &BTreeMap<String, Said>,
    parents: Option<&[ParentState]>,
    stored: &Stored,
    now: &str,
) -> Option<Value> {
    match object.kind {
        // Gateways are written by who deploys them.
        Kind::Gateway => None,
        Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute | Kind::TLSRoute => {
            route(said, parents, stored, now)
        }
        Kind::Service => {
            let before = &stored.status["conditions"];
            let wanted = conditions(said, before, stored.generation, now);
            // The list is a map by type: what others wrote is theirs.
            (!same(&wanted, before)).then(|| json!({ "conditions": wanted }))
        }
        _ => {
            let before = &stored.status["conditions"];
            let wanted = conditions(said, before, stored.generation, now);
            if same(&wanted, before) {
                return None;
            }
            // The list is one value: what others wrote has to be written with it.
            let others = before.as_array().into_iter().flatten().filter(|c| !is_ours(c)).cloned();
            let all: Vec<Value> = others.chain(wanted).collect();
            Some(json!({ "conditions": all }))
        }
    }
}

/// A parent that a route of the mesh has: traffic to a service.
fn is_mesh(parent: &Value) -> bool {
    let kind = parent["kind"].as_str().unwrap_or("Gateway");
    let group = parent["group"].as_str().unwrap_or("gateway.networking.k8s.io");
    matches!((group, kind), ("" | "core", "Service") | ("networking.istio.io", "ServiceEntry"))
}

fn route(
    said: &BTreeMap<String, Said>,
    parents: Option<&[ParentState]>,
    stored: &Stored,
    now: &str,
) -> Option<Value> {
    let none = Vec::new();
    let before = stored.status["parents"].as_array().unwrap_or(&none);
    let written = stored.parents.as_array().unwrap_or(&none);
    let ours = |entry: &Value| {
        let name = entry["controllerName"].as_str().unwrap_or_default();
        GATEWAY_CLASSES.iter().map(|(_, known)| *known).chain([MESH_CONTROLLER]).find(|known| *known == name)
    };
    let unread: Vec<ParentState>;
    let states = match parents {
        Some(states) => states,
        None => {
            // Those of the mesh, and those that had a status before.
            let of = |parent: &Value| {
                let had = before.iter().filter(|e| same_parent(&e["parentRef"], parent)).find_map(ours);
                had.or(is_mesh(parent).then_some(MESH_CONTROLLER))
            };
            let state = |(index, parent)| Some(ParentState { index, controller: of(parent)?, refusal: None });
            unread = written.iter().enumerate().filter_map(state).collect();
            &unread
        }
    };
    let mut changed = false;
    let mut wanted: Vec<Value> = Vec::new();
    for state in states {
        let Some(parent) = written.get(state.index) else { continue };
        let same_entry =
            |e: &&Value| e["controllerName"] == *state.controller && same_parent(&e["parentRef"], parent);
        let old = before.iter().find(same_entry).map_or(&Value::Null, |e| &e["conditions"]);
        let list = conditions(&of_parent(said, state, is_mesh(parent)), old, stored.generation, now);
        changed |= !same(&list, old);
        wanted.push(json!({ "parentRef": parent, "controllerName": state.controller, "conditions": list }));
    }
    changed |= before.iter().filter_map(ours).count() != wanted.len();
    changed.then(|| {
        let others = before.iter().filter(|e| ours(e).is_none()).cloned();
        json!({ "parents": others.chain(wanted).collect::<Vec<_>>() })
    })
}

/// What is said of the route as a whole, with what came of one parent.
fn of_parent(said: &BTreeMap<String, Said>, state: &ParentState, mesh: bool) -> BTreeMap<String, Said> {
    let mut own = said.clone();
    if !mesh {
        own.remove(RESOLVED_WAYPOINTS);
    }
    if let Some((reason, why)) = &state.refusal {
        let refused = Said { status: false, reason: (*reason).to_owned(), message: why.clone() };
        own.insert("Accepted".to_owned(), refused);
    } else if let Some(accepted) = own.get_mut("Accepted").filter(|a| a.status && a.reason == "Conflicted") {
        // That is what another parent says.
        accepted.reason = "Accepted".to_owned();
    }
    own
}

/// The API server fills in group and kind where it knows them.
fn same_parent(a: &Value, b: &Value) -> bool {
    let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_owned();
    ["group", "kind", "namespace", "name", "sectionName"].iter().all(|key| text(a, key) == text(b, key))
        && a["port"] == b["port"]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Key;

    const NOW: &str = "2026-01-02T00:00:00Z";
    const BEFORE: &str = "2026-01-01T00:00:00Z";

    fn object(kind: Kind) -> ObjectRef {
        ObjectRef { kind, key: Key::new("shop", "a") }
    }

    fn said(kind: Kind, all: &[(&str, bool, &str, &str)]) -> BTreeMap<String, Said> {
        let all: Vec<Condition> =
            all.iter().map(|(t, ok, reason, m)| Condition::new(object(kind), t, *ok, reason, *m)).collect();
        merge(all.iter())
    }

    fn stored(status: Value) -> Stored {
        let api_version = "v1".into();
        Stored { uid: String::new(), api_version, generation: 3, status, parents: Value::Null }
    }

    #[test]
    fn what_is_said_twice_of_one_type_becomes_one_condition_with_the_worst_reason() {
        let all = said(
            Kind::Service,
            &[
                ("Accepted", true, "Accepted", "fine"),
                ("Accepted", true, "UnsupportedValue", "no effect: x"),
                ("Accepted", false, "Conflicted", "host taken"),
            ],
        );
        assert_eq!(all.len(), 1);
        let accepted = &all["Accepted"];
        assert_eq!((accepted.status, accepted.reason.as_str()), (false, "Conflicted"));
        assert_eq!(accepted.message, "fine; no effect: x; host taken");
    }

    #[test]
    fn what_is_stored_already_is_not_written_again() {
        let kind = Kind::AuthorizationPolicy;
        let said = said(kind, &[("ZtunnelAccepted", true, "Accepted", "attached")]);
        let first = status(&object(kind), &said, None, &stored(Value::Null), NOW).unwrap();
        assert_eq!(first["conditions"][0]["lastTransitionTime"], NOW);
        assert_eq!(first["conditions"][0]["observedGeneration"], 3);
        assert_eq!(status(&object(kind), &said, None, &stored(first.clone()), "later"), None);
        // A generation that is stored as text is the same number.
        let mut text = first.clone();
        text["conditions"][0]["observedGeneration"] = "3".into();
        assert_eq!(status(&object(kind), &said, None, &stored(text), "later"), None);
        let newer = Stored { generation: 4, ..stored(first) };
        let again = status(&object(kind), &said, None, &newer, "later").unwrap();
        assert_eq!(again["conditions"][0]["observedGeneration"], 4);
        assert_eq!(again["conditions"][0]["lastTransitionTime"], NOW, "no transition");
    }

    #[test]
    fn an_object_without_generations_is_not_written_again_for_the_lack_of_one() {
        let said = said(Kind::Service, &[("istio.io/WaypointBound", true, "WaypointAccepted", "attached")]);
        let without = |status| Stored { generation: 0, ..stored(status) };
        let first = status(&object(Kind::Service), &said, None, &without(Value::Null), NOW).unwrap();
        assert!(first["conditions"][0].get("observedGeneration").is_none(), "{first}");
        assert_eq!(status(&object(Kind::Service), &said, None, &without(first), "later"), None);
    }

    #[test]
    fn what_others_wrote_stays_and_what_is_no_longer_said_goes() {
        let before = json!({"conditions": [
            {"type": "Reconciled", "status": "True", "reason": "R", "message": "", "lastTransitionTime": BEFORE},
            {"type": "istio.io/WaypointBound", "status": "True", "reason": "W", "message": "", "lastTransitionTime": BEFORE},
        ]});
        let empty = BTreeMap::new();
        let entry = status(&object(Kind::ServiceEntry), &empty, None, &stored(before.clone()), NOW).unwrap();
        let kinds: Vec<&str> =
            entry["conditions"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["Reconciled"]);
        let service = status(&object(Kind::Service), &empty, None, &stored(before), NOW).unwrap();
        assert_eq!(service, json!({"conditions": []}), "applied without ours; others' are not ours to write");
    }

    #[test]
    fn a_routes_status_is_said_per_parent_and_only_of_parents_of_the_mesh() {
        let kind = Kind::HTTPRoute;
        let said = said(kind, &[("Accepted", true, "Accepted", "told to waypoints")]);
        let parents = json!([
            {"group": "", "kind": "Service", "name": "web", "port": 80},
            {"name": "ingress"},
        ]);
        let foreign = json!({"parentRef": {"name": "ingress"}, "controllerName": "other", "conditions": []});
        let route = |status: Value| Stored { parents: parents.clone(), ..stored(status) };
        let first = status(&object(kind), &said, None, &route(json!({"parents": [foreign]})), NOW).unwrap();
        let list = first["parents"].as_array().unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0], foreign);
        assert_eq!(list[1]["parentRef"], parents[0]);
        assert_eq!(list[1]["controllerName"], MESH_CONTROLLER);
        assert_eq!(list[1]["conditions"][0]["type"], "Accepted");
        assert_eq!(status(&object(kind), &said, None, &route(first.clone()), "later"), None);
        // A parent that was taken out of the route is taken out of its status.
        let without = Stored { parents: json!([{"name": "ingress"}]), ..stored(first) };
        let last = status(&object(kind), &said, None, &without, NOW).unwrap();
        assert_eq!(last["parents"], json!([foreign]));
    }

    #[test]
    fn each_parent_says_what_came_of_it_under_the_name_of_its_controller() {
        let kind = Kind::HTTPRoute;
        let said = said(
            kind,
            &[
                ("Accepted", true, "Conflicted", "spec.parentRefs[2]: no such listener"),
                ("ResolvedRefs", true, "ResolvedRefs", "all there"),
                ("ResolvedWaypoints", true, "ResolvedWaypoints", "all have one"),
            ],
        );
        let state = |index, controller, refusal| ParentState { index, controller, refusal };
        let refusal = Some(("NoMatchingParent", "no such listener".to_owned()));
        let states = [
            state(0, MESH_CONTROLLER, None),
            state(1, "undermesh.io/gateway-controller", None),
            state(2, "istio.io/gateway-controller", refusal),
        ];
        let parents = json!([
            {"group": "", "kind": "Service", "name": "web"},
            {"name": "ours"},
            {"name": "ingress", "sectionName": "gone"},
            {"name": "theirs"},
        ]);
        let route = |status: Value| Stored { parents: parents.clone(), ..stored(status) };
        let first = status(&object(kind), &said, Some(&states), &route(Value::Null), NOW).unwrap();
        let list = first["parents"].as_array().unwrap();
        let short = |entry: &Value| -> Vec<String> {
            let all = entry["conditions"].as_array().unwrap().iter();
            all.map(|c| format!("{} {} {}", c["type"], c["status"], c["reason"]).replace('"', "")).collect()
        };
        assert_eq!(list.len(), 3, "what another controller's gateway says is not ours to write");
        assert_eq!(short(&list[0])[0], "Accepted True Accepted");
        assert_eq!(short(&list[0]).len(), 3);
        assert_eq!(list[1]["controllerName"], "undermesh.io/gateway-controller");
        assert_eq!(short(&list[1]), ["Accepted True Accepted", "ResolvedRefs True ResolvedRefs"]);
        assert_eq!(short(&list[2])[0], "Accepted False NoMatchingParent");
        assert_eq!(status(&object(kind), &said, Some(&states), &route(first), "later"), None);
    }
}
