//! AuthorizationPolicies and RequestAuthentications with targets, and those with a selector or for a namespace where they
//! are for gateways: their proxies are workloads as others are, which waypoints are not.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::target::Kind as Target;

use super::super::Context;
use super::services::Services;
use super::{L7, origin, resource_name};
use crate::model::istio_gateway::Proxies;
use crate::model::l7::Reference;
use crate::model::{Action, AuthorizationPolicy, Condition, Key, Kind, Meta, ObjectRef};

const ACCEPTED: &str = "WaypointAccepted";
/// Class of the gateways that are waypoints.
const WAYPOINT_CLASS: &str = "istio-waypoint";
/// Keys of conditions that read what other filters of Envoy have left behind.
const FILTER_KEYS: &str = "experimental.envoy.filters.";

pub(super) fn convert(context: &mut Context<'_>, services: &Services, out: &mut L7) {
    let mut conditions = Vec::new();
    let gateways = Gateways::of(context);
    for policy in context.objects.authorization_policies.values() {
        let object = ObjectRef::of(Kind::AuthorizationPolicy, &policy.meta);
        let (targets, mut condition) = if policy.targets.is_empty() {
            // What other workloads do with it, nodes say.
            let Some(found) = gateways.selected(&object, &policy.meta, &policy.selector) else { continue };
            found
        } else {
            targets(context, services, &object, &policy.meta, &policy.targets)
        };
        let rules = rules(policy, &mut condition);
        conditions.push(condition);
        conditions.extend(provider(context, policy, &object));
        if targets.is_empty() {
            continue;
        }
        let action = match policy.action {
            Action::Allow => wire::authorization::Action::Allow,
            Action::Deny => wire::authorization::Action::Deny,
            Action::Audit => wire::authorization::Action::Audit,
            Action::Custom => wire::authorization::Action::Custom,
        };
        let authorization = wire::Authorization {
            origin: Some(origin(Kind::AuthorizationPolicy, &policy.meta)),
            targets,
            action: action.into(),
            provider: policy.provider.clone(),
            dry_run: policy.dry_run,
            rules,
        };
        out.authorizations.insert(resource_name(&object), authorization);
    }
    for given in context.objects.request_authentications.values() {
        let object = ObjectRef::of(Kind::RequestAuthentication, &given.meta);
        let (targets, condition) = if given.targets.is_empty() {
            let Some(found) = gateways.selected(&object, &given.meta, &given.selector) else {
                let what = if given.selector.is_empty() {
                    "has no targetRefs"
                } else {
                    "has a selector, which selects no gateway"
                };
                let why = format!(
                    "{what}, and only waypoints and gateways check tokens; name a Service or Gateway in spec.targetRefs"
                );
                conditions.push(Condition::new(object, ACCEPTED, false, "UnsupportedValue", why));
                continue;
            };
            found
        } else {
            targets(context, services, &object, &given.meta, &given.targets)
        };
        conditions.push(condition);
        if targets.is_empty() {
            continue;
        }
        let authentication = wire::Authentication {
            origin: Some(origin(Kind::RequestAuthentication, &given.meta)),
            targets,
            rules: given.rules.clone(),
        };
        out.authentications.insert(resource_name(&object), authentication);
    }
    context.conditions.extend(conditions);
}

/// The proxies of gateways, as workloads that policies are for.
struct Gateways<'a> {
    proxies: BTreeMap<Key, Proxies<'a>>,
    root_namespace: &'a str,
}

impl<'a> Gateways<'a> {
    fn of(context: &'a Context<'_>) -> Self {
        let objects = context.objects;
        let some =
            !objects.istio_gateways.is_empty() || objects.gateways.values().any(|g| super::is_gateway(g));
        let proxies = if some { objects.gateway_proxies() } else { BTreeMap::new() };
        Self { proxies, root_namespace: &context.mesh.root_namespace }
    }

    /// Those that a selector is for: in its object's namespace, or in every one where that is the root namespace. None where
    /// there are none.
    fn selected(
        &self,
        object: &ObjectRef,
        meta: &Meta,
        selector: &BTreeMap<String, String>,
    ) -> Option<(Vec<wire::Target>, Condition)> {
        let within = |key: &Key| meta.namespace == self.root_namespace || meta.namespace == key.namespace;
        let selected = self.proxies.iter().filter(|(key, of)| within(key) && of.are_selected(selector));
        let keys: Vec<&Key> = selected.map(|(key, _)| key).collect();
        let first = keys.first()?;
        let names: Vec<String> = keys.iter().map(ToString::to_string).collect();
        let message = match names.len() {
            1 => format!("bound to gateway {first}"),
            _ => format!("bound to gateways {}", names.join(", ")),
        };
        let target = |key: &&Key| wire::Target {
            kind: Target::Gateway.into(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            hostnames: Vec::new(),
        };
        let condition = Condition::new(object.clone(), ACCEPTED, true, "Accepted", message);
        Some((keys.iter().map(target).collect(), condition))
    }
}

/// CUSTOM needs a provider of the mesh settings; waypoints refuse what would go to one that is not there.
fn provider(context: &Context<'_>, policy: &AuthorizationPolicy, object: &ObjectRef) -> Option<Condition> {
    let providers = context.objects.settings.as_ref().map(|s| s.waypoints.providers.as_slice());
    let known = providers.unwrap_or_default().iter().any(|p| p.name == policy.provider);
    if policy.action != Action::Custom || known {
        return None;
    }
    let why = format!(
        "spec.provider.name: MeshConfig has no extensionProviders entry {:?}; what the rules match is denied",
        policy.provider
    );
    Some(Condition::new(object.clone(), "ResolvedRefs", false, "ProviderNotFound", why))
}

/// A condition that no waypoint can evaluate makes the policy stricter: ALLOW and AUDIT lose the rule, DENY and CUSTOM
/// lose the condition.
fn rules(policy: &AuthorizationPolicy, condition: &mut Condition) -> Vec<wire::AuthorizationRule> {
    let mut rules = policy.requests.clone();
    let mut found = Vec::new();
    let unknown = |c: &wire::Condition| c.key.starts_with(FILTER_KEYS);
    for (i, rule) in rules.iter().enumerate() {
        let keys = rule.when.iter().enumerate().filter(|(_, c)| unknown(c));
        found.extend(keys.map(|(w, c)| format!("spec.rules[{i}].when[{w}] ({})", c.key)));
    }
    if found.is_empty() {
        return rules;
    }
    let how = if matches!(policy.action, Action::Allow | Action::Audit) {
        rules.retain(|rule| !rule.when.iter().any(unknown));
        "rules that use them are left out"
    } else {
        rules.iter_mut().for_each(|rule| rule.when.retain(|c| !unknown(c)));
        "the rules apply without them"
    };
    condition.message =
        format!("{}; waypoints cannot evaluate {}, {how}", condition.message, found.join(", "));
    rules
}

/// Targets that there are, and the one condition that speaks for all of them.
pub(super) fn targets(
    context: &Context<'_>,
    services: &Services,
    object: &ObjectRef,
    meta: &Meta,
    given: &[Reference],
) -> (Vec<wire::Target>, Condition) {
    let mut targets = Vec::new();
    let mut bound = Vec::new();
    let mut failures: Vec<(&'static str, String)> = Vec::new();
    for reference in given {
        match target(context, services, meta, reference) {
            Ok((target, to)) => {
                targets.push(target);
                match to {
                    Ok(to) => bound.push(to),
                    Err(why) => failures.push(("AncestorNotBound", why)),
                }
            }
            Err(failure) => failures.push(failure),
        }
    }
    bound.sort();
    bound.dedup();
    let wrong: Vec<&str> = failures.iter().map(|(_, why)| why.as_str()).collect();
    let wrong = wrong.join("; ");
    let (status, reason, message) = match (bound.is_empty(), failures.first()) {
        (false, None) => (true, "Accepted", format!("bound to {}", bound.join(", "))),
        (false, Some(_)) => (true, "PartiallyInvalid", format!("bound to {}; {wrong}", bound.join(", "))),
        (true, Some((reason, _))) => (false, *reason, wrong),
        (true, None) => (false, "TargetNotFound", "has no targets".to_owned()),
    };
    (targets, Condition::new(object.clone(), ACCEPTED, status, reason, message))
}

/// The target, and the waypoint that it is bound to or why there is none.
type Found = (wire::Target, Result<String, String>);

fn target(
    context: &Context<'_>,
    services: &Services,
    meta: &Meta,
    reference: &Reference,
) -> Result<Found, (&'static str, String)> {
    let (namespace, name) = (&meta.namespace, &reference.name);
    let key = Key::new(namespace, name);
    let missing = || ("TargetNotFound", format!("{} {key} does not exist", reference.kind));
    let on_wire = |kind: Target, hostnames: Vec<String>| wire::Target {
        kind: kind.into(),
        namespace: if kind == Target::GatewayClass { String::new() } else { namespace.clone() },
        name: name.clone(),
        hostnames,
    };
    match reference.kind.as_str() {
        "GatewayClass" => {
            let root = &context.mesh.root_namespace;
            if namespace != root {
                let why = format!("GatewayClass {name} can be a target in the root namespace {root} only");
                return Err(("Invalid", why));
            }
            if name != WAYPOINT_CLASS {
                let why = format!("GatewayClass {name} is no class of waypoints; write {WAYPOINT_CLASS}");
                return Err(("Invalid", why));
            }
            Ok((on_wire(Target::GatewayClass, Vec::new()), Ok(format!("class {name}"))))
        }
        "Gateway" => {
            let gateway = context.objects.gateways.get(&key).ok_or_else(missing)?;
            if !context.waypoints.is_one(&key) && !super::is_gateway(gateway) {
                let class = &gateway.class;
                let why = format!("Gateway {key} is of class {class}, which is not served");
                return Err(("Invalid", why));
            }
            Ok((on_wire(Target::Gateway, Vec::new()), Ok(key.to_string())))
        }
        kind => {
            let (kind, hostnames) = if kind == "Service" {
                context.objects.services.get(&key).ok_or_else(missing)?;
                (Target::Service, vec![context.mesh.hostname(namespace, name)])
            } else {
                let entry = context.objects.service_entries.get(&key).ok_or_else(missing)?;
                (Target::ServiceEntry, entry.hosts.clone())
            };
            let mut of = hostnames.iter().flat_map(|h| services.of(h)).filter(|s| s.namespace == *namespace);
            let to = of.find(|s| s.bound).and_then(|s| s.asked.as_ref()).map(ToString::to_string);
            let to = to.ok_or_else(|| format!("{} {key} has no waypoint", reference.kind));
            Ok((on_wire(kind, hostnames), to))
        }
    }
}
