//! Which destination rules apply to a host, and the policy that they come to for one port and subset.
//!
//! Order (Istio): rules of the waypoint's namespace, else those of the service's namespace, else those of the root
//! namespace, each as far as they are exported to the waypoint's namespace; within a namespace the most specific host;
//! rules of one host are merged, the older one's policy and subsets first. Policies of other kinds that attach to a service
//! (BackendTLSPolicy and the like) fill what those rules leave open.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use mesh_core::xds::proto::l7;

use super::policy::{Parts, Policy};
use crate::config::{Own, Resources, is_exported};

const RULE: &str = "DestinationRule";

/// Policies of all destinations.
#[derive(Debug, Clone, Default)]
pub struct Destinations(Arc<Index>);

#[derive(Debug, Default)]
struct Index {
    own_namespace: String,
    settings: Arc<l7::Settings>,
    /// Destination rules by their namespace.
    rules: HashMap<String, Hosts>,
    /// Other policies, by the namespace of the service.
    attached: HashMap<String, Hosts>,
}

/// Objects by host in lower case, oldest first; wildcards keep their `*.`.
#[derive(Debug, Default)]
struct Hosts(HashMap<String, Vec<Arc<l7::Destination>>>);

/// Hosts whose rules differ between two versions.
#[derive(Debug)]
pub(super) enum Changes {
    /// Perhaps all of them.
    All,
    /// These, in lower case.
    Hosts(HashSet<String>),
}

impl Changes {
    pub(super) fn touch(&self, hostname: &str) -> bool {
        match self {
            Self::All => true,
            Self::Hosts(hosts) if hosts.is_empty() => false,
            Self::Hosts(hosts) => hosts.contains(hostname) || hosts.contains(&hostname.to_ascii_lowercase()),
        }
    }
}

/// What applies to one host.
#[derive(Debug, Clone, Default)]
pub(super) struct Rules {
    rules: Vec<Arc<l7::Destination>>,
    attached: Vec<Arc<l7::Destination>>,
    settings: Arc<l7::Settings>,
}

impl Destinations {
    /// Indexes the destinations that the waypoint may see.
    #[must_use]
    pub fn build(resources: &Resources, own: &Own) -> Self {
        let mut index = Index {
            own_namespace: own.namespace.clone(),
            settings: resources.settings.clone(),
            ..Index::default()
        };
        for destination in resources.destinations.values() {
            let Some(origin) = &destination.origin else { continue };
            let of_kind = if origin.kind == RULE { &mut index.rules } else { &mut index.attached };
            match of_kind.get_mut(&origin.namespace) {
                Some(hosts) => hosts.insert(destination),
                None => of_kind.entry(origin.namespace.clone()).or_default().insert(destination),
            }
        }
        for hosts in index.rules.values_mut().chain(index.attached.values_mut()) {
            hosts.sort();
        }
        Self(Arc::new(index))
    }

    /// The hosts whose rules may be others than in an earlier version.
    pub(super) fn changes_since(&self, earlier: &Self) -> Changes {
        let (new, old) = (&*self.0, &*earlier.0);
        if new.own_namespace != old.own_namespace || !Arc::ptr_eq(&new.settings, &old.settings) {
            return Changes::All;
        }
        let mut hosts = HashSet::new();
        let none = Hosts::default();
        for (new, old) in [(&new.rules, &old.rules), (&new.attached, &old.attached)] {
            for (namespace, of_new) in new {
                of_new.differ(old.get(namespace).unwrap_or(&none), &mut hosts);
            }
            for (namespace, of_old) in old {
                of_old.differ(new.get(namespace).unwrap_or(&none), &mut hosts);
            }
        }
        // A wildcard may be meant for any host.
        if hosts.iter().any(|host| host.starts_with('*')) { Changes::All } else { Changes::Hosts(hosts) }
    }

    /// The rules of a host, of a service of this namespace.
    pub(super) fn rules(&self, namespace: &str, hostname: &str) -> Rules {
        let Index { own_namespace, settings, .. } = &*self.0;
        let hostname = hostname.to_ascii_lowercase();
        let root = &settings.root_namespace;
        let of = |place: &str, private: bool| {
            let hosts = self.0.rules.get(place)?;
            hosts.most_specific(&hostname, |rule| {
                exported(rule, own_namespace) && (!private || is_private(rule))
            })
        };
        // In the root namespace a rule is meant for everybody, so that its public ones come last for a waypoint there, too.
        let rules = of(own_namespace, own_namespace == root)
            .or_else(|| of(namespace, false))
            .or_else(|| of(root, false))
            .unwrap_or_default();
        let attached = self.0.attached.get(namespace).and_then(|hosts| hosts.0.get(&hostname));
        Rules { rules, attached: attached.cloned().unwrap_or_default(), settings: settings.clone() }
    }

    /// The policy of what no rule is for.
    pub(super) fn mesh_policy(&self) -> Policy {
        Parts::default().finish(&self.0.settings, Vec::new())
    }

    /// What applies where no rule does.
    pub(super) fn no_rules(&self) -> Rules {
        Rules { settings: self.0.settings.clone(), ..Rules::default() }
    }
}

impl Hosts {
    fn insert(&mut self, destination: &Arc<l7::Destination>) {
        self.0.entry(destination.hostname.to_ascii_lowercase()).or_default().push(destination.clone());
    }

    fn sort(&mut self) {
        let age = |d: &Arc<l7::Destination>| {
            let origin = d.origin.clone().unwrap_or_default();
            // Objects without an age are younger than all that have one.
            let created = if origin.created == 0 { i64::MAX } else { origin.created };
            (created, origin.namespace, origin.name)
        };
        for list in self.0.values_mut().filter(|list| list.len() > 1) {
            list.sort_by_cached_key(age);
        }
    }

    /// Adds the hosts of these that are not the same in the others.
    fn differ(&self, others: &Self, hosts: &mut HashSet<String>) {
        for (host, list) in &self.0 {
            if !others.0.get(host).is_some_and(|others| same(list, others)) {
                hosts.insert(host.clone());
            }
        }
    }

    /// The rules of the most specific host for which there are any that `wanted` says yes to.
    fn most_specific(
        &self,
        hostname: &str,
        wanted: impl Fn(&l7::Destination) -> bool,
    ) -> Option<Vec<Arc<l7::Destination>>> {
        let of = |host: &str| {
            let rules: Vec<_> = self.0.get(host)?.iter().filter(|rule| wanted(rule)).cloned().collect();
            (!rules.is_empty()).then_some(rules)
        };
        of(hostname).or_else(|| {
            // A service's host may be a wildcard itself, and then has been looked for already.
            let bare = hostname.strip_prefix("*.").unwrap_or(hostname);
            let suffixes = bare.match_indices('.').map(|(at, _)| &bare[at..]);
            suffixes.map(|suffix| format!("*{suffix}")).chain(["*".to_owned()]).find_map(|host| of(&host))
        })
    }
}

fn exported(rule: &l7::Destination, namespace: &str) -> bool {
    let own = rule.origin.as_ref().map_or("", |origin| &origin.namespace);
    is_exported(&rule.exported_to, own, namespace)
}

fn is_private(rule: &l7::Destination) -> bool {
    let own = rule.origin.as_ref().map_or("", |origin| &origin.namespace);
    !rule.exported_to.is_empty() && rule.exported_to.iter().all(|to| to == "." || to == own)
}

/// Whether these are the same versions of the same objects.
fn same(a: &[Arc<l7::Destination>], b: &[Arc<l7::Destination>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

/// The name of an object, `Kind/namespace/name`.
fn name(destination: &l7::Destination) -> String {
    let origin = destination.origin.clone().unwrap_or_default();
    format!("{}/{}/{}", origin.kind, origin.namespace, origin.name)
}

impl Rules {
    /// Whether these are the same versions of the same objects.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        same(&self.rules, &other.rules)
            && same(&self.attached, &other.attached)
            && Arc::ptr_eq(&self.settings, &other.settings)
    }

    /// The labels of a subset.
    pub(super) fn subset_labels(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        self.subset(name).map(|subset| &subset.labels)
    }

    /// Names of all subsets.
    pub(super) fn subsets(&self) -> Vec<String> {
        self.rules.iter().flat_map(|rule| &rule.subsets).map(|subset| subset.name.clone()).collect()
    }

    /// The policy of a port, and of a subset where it is not empty.
    pub(super) fn policy(&self, port: u16, subset: &str) -> Policy {
        let mut parts = Parts::default();
        let base = self.rules.iter().find_map(|rule| rule.policy.as_ref());
        let own = self.subset(subset).and_then(|subset| subset.policy.as_ref());
        for policy in base.into_iter().chain(own) {
            parts.overlay(policy, port);
        }
        for policy in self.attached.iter().filter_map(|attached| attached.policy.as_ref()) {
            parts.underlay(policy, port);
        }
        let origins = self.rules.iter().chain(&self.attached).map(|d| name(d)).collect();
        parts.finish(&self.settings, origins)
    }

    /// Of two subsets of one name the older object's counts.
    fn subset(&self, name: &str) -> Option<&l7::Subset> {
        self.rules
            .iter()
            .flat_map(|rule| &rule.subsets)
            .find(|subset| !name.is_empty() && subset.name == name)
    }
}
