//! Telemetry objects: those of namespaces and the mesh, and those with targets.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::xds::proto::l7 as wire;

use super::super::Context;
use super::security::targets;
use super::services::Services;
use super::{L7, origin, resource_name};
use crate::model::{Condition, Key, Kind, ObjectRef, Telemetry};

const ACCEPTED: &str = "WaypointAccepted";
/// Providers that Istio's MeshConfig has without being asked.
const BUILT_IN: [&str; 2] = ["envoy", "prometheus"];

pub(super) fn convert(context: &mut Context<'_>, services: &Services, out: &mut L7) {
    let mut conditions = Vec::new();
    let oldest = oldest(context);
    for given in context.objects.telemetries.values() {
        let object = ObjectRef::of(Kind::Telemetry, &given.meta);
        if !given.selector.is_empty() {
            let why =
                "has a selector, which never means a waypoint; name a Service or Gateway in spec.targetRefs";
            conditions.push(Condition::new(object, ACCEPTED, false, "UnsupportedValue", why));
            continue;
        }
        if let Some(first) = oldest.get(&given.meta.namespace)
            && given.targets.is_empty()
            && *first != given.meta.key()
        {
            let why = format!("{first} is older and has no targets either; of several the oldest counts");
            conditions.push(Condition::new(object, ACCEPTED, false, "Conflicted", why));
            continue;
        }
        let (named, mut condition) = if given.targets.is_empty() {
            let of = if given.meta.namespace == context.mesh.root_namespace {
                "the mesh".to_owned()
            } else {
                format!("namespace {}", given.meta.namespace)
            };
            let message = format!("told to waypoints of {of}");
            (Vec::new(), Condition::new(object.clone(), ACCEPTED, true, "Accepted", message))
        } else {
            targets(context, services, &object, &given.meta, &given.targets)
        };
        if !given.unsupported.is_empty() {
            condition.message = format!("{}; no effect: {}", condition.message, given.unsupported.join(", "));
            if condition.status && condition.reason == "Accepted" {
                "UnsupportedValue".clone_into(&mut condition.reason);
            }
        }
        conditions.push(condition);
        conditions.extend(providers(context, given, &object));
        if named.is_empty() && !given.targets.is_empty() {
            continue;
        }
        let telemetry = wire::Telemetry {
            origin: Some(origin(Kind::Telemetry, &given.meta)),
            targets: named,
            tracing: given.tracing.clone(),
            metrics: given.metrics.clone(),
            access_logging: given.access_logging.clone(),
        };
        out.telemetries.insert(resource_name(&object), telemetry);
    }
    context.conditions.extend(conditions);
}

/// Of the objects without selector and targets, which one counts in each namespace.
fn oldest(context: &Context<'_>) -> BTreeMap<String, Key> {
    let mut found: BTreeMap<String, (i64, Key)> = BTreeMap::new();
    let whole = |t: &&Arc<Telemetry>| t.targets.is_empty() && t.selector.is_empty();
    for given in context.objects.telemetries.values().filter(whole) {
        let age = (given.meta.created.unwrap_or_default(), given.meta.key());
        let known = found.entry(given.meta.namespace.clone()).or_insert_with(|| age.clone());
        if age < *known {
            *known = age;
        }
    }
    found.into_iter().map(|(namespace, (_, key))| (namespace, key)).collect()
}

/// Providers have to be those of MeshConfig, and of a kind that waypoints speak.
fn providers(context: &Context<'_>, given: &Telemetry, object: &ObjectRef) -> Option<Condition> {
    let settings = context.objects.settings.as_ref().map(|settings| &settings.waypoints);
    let names = |of: fn(&wire::Settings) -> Vec<&str>| settings.map(of).unwrap_or_default();
    let known = [
        names(|s| s.tracers.iter().map(|t| t.name.as_str()).collect()),
        names(|s| s.scraped.iter().map(String::as_str).collect()),
        names(|s| s.loggers.iter().map(|l| l.name.as_str()).collect()),
    ];
    let asked = [
        ("tracing", given.tracing.iter().map(|t| &t.providers).collect::<Vec<_>>()),
        ("metrics", given.metrics.iter().map(|m| &m.providers).collect()),
        ("accessLogging", given.access_logging.iter().map(|l| &l.providers).collect()),
    ];
    let mut missing = Vec::new();
    for ((section, entries), known) in asked.into_iter().zip(&known) {
        for (i, providers) in entries.into_iter().enumerate() {
            let unknown = |name: &&String| {
                let built_in = section != "tracing" && BUILT_IN.contains(&name.as_str());
                !known.contains(&name.as_str()) && !built_in
            };
            missing.extend(providers.iter().filter(unknown).map(|name| {
                format!(
                    "spec.{section}[{i}].providers: MeshConfig has no such extensionProviders entry {name:?}"
                )
            }));
        }
    }
    let why = missing.join("; ");
    (!why.is_empty()).then(|| Condition::new(object.clone(), "ResolvedRefs", false, "ProviderNotFound", why))
}
