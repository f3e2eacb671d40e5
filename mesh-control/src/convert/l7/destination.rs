//! DestinationRules.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::l7 as wire;

use super::super::Context;
use super::report::{Report, waypoints};
use super::services::{Services, complete, covers};
use super::{L7, exported, origin, resource_name};
use crate::model::{Kind, ObjectRef};

pub(super) fn convert(context: &mut Context<'_>, services: &Services, out: &mut L7) {
    for rule in context.objects.destination_rules.values() {
        let object = ObjectRef::of(Kind::DestinationRule, &rule.meta);
        let mut report = Report::new(object.clone(), &rule.unsupported);
        if rule.selective {
            let why = "spec.workloadSelector makes it a rule for certain clients, and a waypoint is none of them; no \
                       effect until it is removed";
            report.refuse("UnsupportedValue", why, &mut context.conditions);
            continue;
        }
        let hostname = complete(&rule.host, &rule.meta.namespace, context.mesh);
        let exported_to = exported(&rule.export_to, &rule.meta.namespace, &mut report);
        if !hostname.starts_with('*')
            && let Some(why) = services.missing(&hostname, 0)
        {
            report.unresolved("HostNotFound", format!("spec.host: {why}"));
        }
        for (i, port) in rule.policy.iter().flat_map(|p| &p.ports).enumerate() {
            let known = services.matching(&hostname).any(|s| s.ports.contains(&port.port));
            if !known && services.matching(&hostname).next().is_some() {
                let place = format!("spec.trafficPolicy.portLevelSettings[{i}].port");
                report.unresolved("PortNotFound", format!("{place}: {hostname} has no port {}", port.port));
            }
        }
        let destination = wire::Destination {
            origin: Some(origin(Kind::DestinationRule, &rule.meta)),
            hostname: hostname.clone(),
            exported_to,
            policy: rule.policy.clone(),
            subsets: rule.subsets.clone(),
        };
        out.destinations.insert(resource_name(&object), destination);
        report.finish(true, &mut context.conditions);
        waypoints(&object, &[hostname], services, &mut context.conditions);
    }
}

/// Subsets that rules have for hosts.
#[derive(Debug)]
pub(super) struct Subsets<'a> {
    by_host: BTreeMap<&'a str, BTreeSet<&'a str>>,
}

impl<'a> Subsets<'a> {
    pub(super) fn of(out: &'a L7) -> Self {
        let mut by_host: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for rule in out.destinations.values() {
            by_host.entry(&rule.hostname).or_default().extend(rule.subsets.iter().map(|s| s.name.as_str()));
        }
        Self { by_host }
    }

    /// Whether some rule has this subset for the host.
    pub(super) fn has(&self, hostname: &str, subset: &str) -> bool {
        let in_wildcards = || {
            let wildcards = self.by_host.iter().filter(|(host, _)| host.starts_with('*'));
            wildcards.filter(|(host, _)| covers(host, hostname)).any(|(_, found)| found.contains(subset))
        };
        self.by_host.get(hostname).is_some_and(|found| found.contains(subset)) || in_wildcards()
    }
}
