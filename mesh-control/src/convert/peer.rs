//! PeerAuthentication to L4 authorizations.
//!
//! STRICT is a DENY for connections without identity: one static policy that workloads list, and one policy per
//! PeerAuthentication whose ports differ from the rest of the workload.

use std::collections::BTreeMap;

use mesh_core::xds::proto::security as wire;
use mesh_core::xds::proto::security::string_match::MatchType;

use super::Mesh;
use crate::model::{Condition, Kind, MtlsMode, ObjectRef, Objects, PeerAuthentication, selects};

const STATIC_STRICT: &str = "istio_converted_static_strict";

/// A selector, and the policy that the workloads list which it selects.
type Selected = (BTreeMap<String, String>, Option<String>);

/// What each workload has to list.
#[derive(Default)]
pub(super) struct PeerPolicies {
    static_strict: String,
    mesh: Option<MtlsMode>,
    namespaces: BTreeMap<String, MtlsMode>,
    /// By namespace, oldest first.
    selectors: BTreeMap<String, Vec<Selected>>,
}

impl PeerPolicies {
    /// The policy that a workload lists, if any.
    pub(super) fn of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Option<String> {
        let own = self.selectors.get(namespace).into_iter().flatten().find(|(s, _)| selects(s, labels));
        match own {
            Some((_, policy)) => policy.clone(),
            None => (self.inherited(namespace) == MtlsMode::Strict).then(|| self.static_strict.clone()),
        }
    }

    /// The mode of a workload that no PeerAuthentication selects.
    fn inherited(&self, namespace: &str) -> MtlsMode {
        self.namespaces.get(namespace).copied().or(self.mesh).unwrap_or(MtlsMode::Permissive)
    }
}

/// Converts all PeerAuthentications.
pub(super) fn convert(
    objects: &Objects,
    mesh: &Mesh,
    out: &mut BTreeMap<String, wire::Authorization>,
    conditions: &mut Vec<Condition>,
) -> PeerPolicies {
    let mut peers: Vec<&PeerAuthentication> = objects.peer_authentications.values().map(|p| &**p).collect();
    peers.sort_by(|a, b| a.meta.age().cmp(&b.meta.age()));
    let mut index = PeerPolicies {
        static_strict: format!("{}/{STATIC_STRICT}", mesh.root_namespace),
        ..PeerPolicies::default()
    };
    if !peers.is_empty() {
        let rule = rule(vec![without_identity()]);
        out.insert(index.static_strict.clone(), policy(&mesh.root_namespace, STATIC_STRICT, vec![rule]));
    }
    namespace_modes(&peers, mesh, &mut index, conditions);
    for peer in peers.iter().filter(|p| !p.selector.is_empty()) {
        let namespace = &peer.meta.namespace;
        let mode = match peer.mode {
            MtlsMode::Unset => index.inherited(namespace),
            mode => mode,
        };
        let rules = port_rules(peer, mode);
        let listed = match (rules.is_empty(), mode) {
            (true, MtlsMode::Strict) => Some(index.static_strict.clone()),
            (true, _) => None,
            (false, _) => {
                let name = format!("converted_peer_authentication_{}", peer.meta.name);
                let key = format!("{namespace}/{name}");
                out.insert(key.clone(), policy(namespace, &name, rules));
                Some(key)
            }
        };
        index.selectors.entry(namespace.clone()).or_default().push((peer.selector.clone(), listed));
    }
    index
}

/// Mesh and namespace modes; the oldest counts, the others are told.
fn namespace_modes(
    peers: &[&PeerAuthentication],
    mesh: &Mesh,
    index: &mut PeerPolicies,
    conditions: &mut Vec<Condition>,
) {
    let mut winners: BTreeMap<&str, &PeerAuthentication> = BTreeMap::new();
    for peer in peers {
        let object = ObjectRef::of(Kind::PeerAuthentication, &peer.meta);
        let mut say = |status, reason: &str, message: String| {
            conditions.push(Condition::new(object.clone(), "ZtunnelAccepted", status, reason, message));
        };
        if peer.mode == MtlsMode::Disable || peer.ports.values().any(|m| *m == MtlsMode::Disable) {
            let message = "DISABLE is treated as PERMISSIVE: nodes go on accepting and preferring mutual TLS";
            say(true, "UnsupportedValue", message.into());
        }
        if !peer.selector.is_empty() {
            say(true, "Accepted", "attached to nodes".into());
            continue;
        }
        match winners.get(peer.meta.namespace.as_str()) {
            Some(first) => say(
                false,
                "Conflicted",
                format!(
                    "PeerAuthentication {} of the same scope is older and counts instead",
                    first.meta.key()
                ),
            ),
            None => {
                say(true, "Accepted", "attached to nodes".into());
                winners.insert(&peer.meta.namespace, peer);
            }
        }
    }
    for (namespace, peer) in winners.into_iter().filter(|(_, p)| p.mode != MtlsMode::Unset) {
        if namespace == mesh.root_namespace {
            index.mesh = Some(peer.mode);
        } else {
            index.namespaces.insert(namespace.to_owned(), peer.mode);
        }
    }
}

/// Rules of a workload whose ports differ; empty when they do not.
fn port_rules(peer: &PeerAuthentication, mode: MtlsMode) -> Vec<wire::Rule> {
    let ports = |wanted: &[MtlsMode]| -> Vec<u32> {
        peer.ports.iter().filter(|(_, m)| wanted.contains(m)).map(|(p, _)| u32::from(*p)).collect()
    };
    if mode == MtlsMode::Strict {
        let exempt = ports(&[MtlsMode::Permissive, MtlsMode::Disable]);
        if exempt.is_empty() {
            return Vec::new();
        }
        let mut matches = vec![without_identity()];
        matches.extend(
            exempt.iter().map(|p| wire::Match { not_destination_ports: vec![*p], ..wire::Match::default() }),
        );
        return vec![rule(matches)];
    }
    ports(&[MtlsMode::Strict])
        .iter()
        .map(|p| rule(vec![wire::Match { destination_ports: vec![*p], ..without_identity() }]))
        .collect()
}

fn without_identity() -> wire::Match {
    let presence = wire::StringMatch { match_type: Some(MatchType::Presence(())) };
    wire::Match { not_principals: vec![presence], ..wire::Match::default() }
}

/// One clause per match: all must hold.
pub(super) fn rule(matches: Vec<wire::Match>) -> wire::Rule {
    wire::Rule { clauses: matches.into_iter().map(|m| wire::Clause { matches: vec![m] }).collect() }
}

pub(super) fn policy(namespace: &str, name: &str, rules: Vec<wire::Rule>) -> wire::Authorization {
    wire::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Deny.into(),
        rules,
        dry_run: false,
        extensions: Vec::new(),
    }
}
