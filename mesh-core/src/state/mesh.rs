//! The immutable snapshot and its lookups.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use rpds::HashTrieMapSync;

use super::Str;
use super::address::{NamespacedHostname, NetworkAddress};
use super::service::{ServiceEndpoints, Visibility};
use super::workload::{NetworkMode, Workload};
use crate::policy::{Policy, PolicySet, Scope, UnknownPolicy};

/// Settings of a node that lookups and decisions depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshOptions {
    /// Network of this node; empty is the default one.
    pub network: Str,
    /// What a policy does that a workload lists and that is not known.
    pub unknown_policy: UnknownPolicy,
}

impl Default for MeshOptions {
    fn default() -> Self {
        Self { network: "".into(), unknown_policy: UnknownPolicy::default() }
    }
}

/// Everything that a node knows of its mesh at one moment. Immutable; a clone shares everything.
#[derive(Debug, Clone, Default)]
pub struct MeshState {
    pub(super) options: Arc<MeshOptions>,
    /// By uid.
    pub(super) workloads: HashTrieMapSync<Str, Arc<Workload>>,
    /// By `namespace/hostname`.
    pub(super) services: HashTrieMapSync<Str, ServiceEndpoints>,
    /// By name of the network.
    pub(super) networks: HashTrieMapSync<Str, NetworkIndex>,
    /// Keys of services by hostname in lower case, in order of arrival.
    pub(super) hostnames: HashTrieMapSync<Str, Vec<Str>>,
    /// Workloads without an address by `namespace/hostname`.
    pub(super) workload_hostnames: HashTrieMapSync<Str, Vec<Arc<Workload>>>,
    /// Workloads by `namespace/name`.
    pub(super) workload_names: HashTrieMapSync<Str, Vec<Arc<Workload>>>,
    /// By `namespace/name`.
    pub(super) policies: HashTrieMapSync<Str, Arc<Policy>>,
    /// Policies of scope global, by key.
    pub(super) global_policies: Vec<Arc<Policy>>,
    /// Policies of scope namespace by namespace, by key.
    pub(super) namespace_policies: HashTrieMapSync<Str, Vec<Arc<Policy>>>,
    /// Keys that the control plane has removed: known to be gone, unlike keys that have not arrived.
    pub(super) removed_policies: HashTrieMapSync<Str, ()>,
    pub(super) version: u64,
    pub(super) policy_version: u64,
    pub(super) services_version: u64,
}

/// The addresses of one network.
#[derive(Debug, Clone, Default)]
pub(super) struct NetworkIndex {
    pub(super) workloads: HashTrieMapSync<IpAddr, Vec<Arc<Workload>>>,
    /// Keys of services by virtual address, in order of arrival.
    pub(super) vips: HashTrieMapSync<IpAddr, Vec<Str>>,
    pub(super) prefixes: HashTrieMapSync<IpNet, Vec<Str>>,
    /// Lengths in use, per family: what a lookup has to try.
    pub(super) prefix_lengths: BTreeSet<(bool, u8)>,
}

/// What an address or a hostname belongs to.
#[derive(Debug, Clone, Copy)]
pub enum Address<'a> {
    /// A workload.
    Workload(&'a Arc<Workload>),
    /// A service.
    Service(&'a ServiceEndpoints),
}

/// A pod of this node as its enrolment names it: never found by address, so that a pod cannot become another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LocalWorkload {
    key: Str,
    service_account: Str,
    node: Str,
}

impl LocalWorkload {
    /// Namespace, name and service account of the pod, and the name of its node.
    #[must_use]
    pub fn new(namespace: &str, name: &str, service_account: &str, node: &str) -> Self {
        let account = if service_account.is_empty() {
            crate::identity::DEFAULT_SERVICE_ACCOUNT
        } else {
            service_account
        };
        Self { key: name_key(namespace, name), service_account: account.into(), node: node.into() }
    }
}

impl std::fmt::Display for LocalWorkload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.key)
    }
}

/// Hostnames are equal whatever the case (RFC 4343); nearly all are lower-case already.
pub(super) fn lower_case(hostname: &str) -> Cow<'_, str> {
    if hostname.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(hostname.to_ascii_lowercase())
    } else {
        Cow::Borrowed(hostname)
    }
}

/// `namespace/name`.
pub(super) fn name_key(namespace: &str, name: &str) -> Str {
    format!("{namespace}/{name}").into()
}

impl MeshState {
    /// Settings of the node.
    #[must_use]
    pub fn options(&self) -> &MeshOptions {
        &self.options
    }

    /// Grows with every snapshot that differs from the one before.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Grows when a policy came, changed or went, or a workload lists other ones than before: live connections are
    /// evaluated again. (The reference leaves them alone in the second case, so that a change to STRICT may spare
    /// connections that are open.)
    #[must_use]
    pub fn policy_version(&self) -> u64 {
        self.policy_version
    }

    /// Differs where the names of services differ, also between states that have nothing to do with each other: what was
    /// derived from the names alone is still right while this is the same.
    #[must_use]
    pub fn services_version(&self) -> u64 {
        self.services_version
    }

    /// A workload by primary key.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// Every workload, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// How many workloads there are.
    #[must_use]
    pub fn workload_count(&self) -> usize {
        self.workloads.size()
    }

    /// The workload that owns an address. Several on one address: pods first, then those that speak HBONE, then the
    /// first seen. Workloads on the network of their host are never found by address.
    #[must_use]
    pub fn workload_by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let candidates = self.networks.get(network)?.workloads.get(&ip.to_canonical())?;
        first_max_by_key(candidates.iter(), |w| (w.uid.contains("//Pod/"), w.is_hbone()))
    }

    /// The pod that an enrolment names.
    #[must_use]
    pub fn local_workload(&self, local: &LocalWorkload) -> Option<&Arc<Workload>> {
        self.workload_names
            .get(&local.key)?
            .iter()
            .find(|w| w.identity.service_account() == &*local.service_account && w.node == local.node)
    }

    /// Workloads of one name; several kinds of workload may share it.
    pub fn workloads_by_name(&self, namespace: &str, name: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.workload_names.get(&name_key(namespace, name)).into_iter().flatten()
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceEndpoints> {
        self.services.values()
    }

    /// A service by `namespace/hostname`.
    #[must_use]
    pub fn service(&self, key: &str) -> Option<&ServiceEndpoints> {
        self.services.get(key)
    }

    /// The service of a virtual address, as a client of that namespace sees it. An exact address wins over
    /// prefixes. Ranking of several: visible at all, namespace of the client, (longest prefix,) canonical, first
    /// seen.
    #[must_use]
    pub fn service_by_ip(
        &self,
        network: &str,
        ip: IpAddr,
        client: Option<&str>,
    ) -> Option<&ServiceEndpoints> {
        let ip = ip.to_canonical();
        let index = self.networks.get(network)?;
        let exact = index.vips.get(&ip).and_then(|keys| self.best_service(keys, client));
        exact.or_else(|| {
            let max = if ip.is_ipv4() { 32 } else { 128 };
            let prefixes = index.prefix_lengths.range((ip.is_ipv4(), 0)..=(ip.is_ipv4(), max)).rev();
            let matching = prefixes.filter_map(|(_, length)| {
                let net = IpNet::new(ip, *length).ok()?.trunc();
                let service = self.best_service(index.prefixes.get(&net)?, client)?;
                Some((*length, service))
            });
            let rank = |(length, service): &(u8, &ServiceEndpoints)| {
                (client == Some(service.service.host.namespace()), *length, service.service.canonical)
            };
            first_max_by_key(matching, rank).map(|(_, service)| service)
        })
    }

    /// The service of a hostname as a client of that namespace sees it; ranking as for addresses.
    #[must_use]
    pub fn service_by_hostname(&self, hostname: &str, client: Option<&str>) -> Option<&ServiceEndpoints> {
        self.best_service(self.hostnames.get(&*lower_case(hostname))?, client)
    }

    /// All services of a hostname, whoever sees them, in order of arrival.
    pub fn services_by_hostname(&self, hostname: &str) -> impl Iterator<Item = &ServiceEndpoints> {
        let keys = self.hostnames.get(&*lower_case(hostname)).into_iter().flatten();
        keys.filter_map(|key| self.services.get(key))
    }

    /// What an address belongs to: a workload first, then a service.
    #[must_use]
    pub fn address(&self, network: &str, ip: IpAddr, client: Option<&str>) -> Option<Address<'_>> {
        let workload = self.workload_by_ip(network, ip).map(Address::Workload);
        workload.or_else(|| self.service_by_ip(network, ip, client).map(Address::Service))
    }

    /// What a reference to a gateway by hostname means: the service of exactly that namespace and hostname, then a
    /// workload with them.
    #[must_use]
    pub fn named(&self, name: &NamespacedHostname) -> Option<Address<'_>> {
        let service = self.services.get(name.key()).map(Address::Service);
        service.or_else(|| self.workload_hostnames.get(name.key())?.first().map(Address::Workload))
    }

    /// Every policy, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// A policy by `namespace/name`.
    #[must_use]
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// The policies that apply to a workload: global ones, those of its namespace, and those that it lists.
    #[must_use]
    pub fn policies_for(&self, workload: &Workload) -> PolicySet {
        let in_namespace = self.namespace_policies.get(&workload.namespace).into_iter().flatten();
        let mut set = PolicySet {
            policies: self.global_policies.iter().chain(in_namespace).cloned().collect(),
            unknown: Vec::new(),
        };
        for key in &workload.authorization_policies {
            match self.policies.get(key) {
                // Others are in the set already, or meant for another namespace.
                Some(policy) if policy.scope == Scope::WorkloadSelector => set.policies.push(policy.clone()),
                Some(_) => {}
                None if self.removed_policies.contains_key(key) => {}
                None if self.options.unknown_policy == UnknownPolicy::Skip => {
                    tracing::warn!("workload {}: policy {key} is not known and is skipped", workload.uid);
                }
                None => set.unknown.push(key.clone()),
            }
        }
        set
    }

    fn best_service<'a>(&'a self, keys: &[Str], client: Option<&str>) -> Option<&'a ServiceEndpoints> {
        let visible =
            keys.iter().filter_map(|key| self.services.get(key)).filter(|s| s.service.visible_to(client));
        first_max_by_key(visible, |s| (client == Some(s.service.host.namespace()), s.service.canonical))
    }

    /// Whether a service of this address exists that the client may not see; for explanations.
    #[must_use]
    pub fn hidden_service_by_ip(&self, network: &str, ip: IpAddr, client: &str) -> Option<&ServiceEndpoints> {
        let keys = self.networks.get(network)?.vips.get(&ip.to_canonical())?;
        keys.iter()
            .filter_map(|key| self.services.get(key))
            .find(|s| s.service.visibility == Visibility::Namespace && s.service.host.namespace() != client)
    }
}

impl Workload {
    /// Whether lookups by address may find it.
    pub(super) fn is_indexed_by_ip(&self) -> bool {
        self.network_mode == NetworkMode::Standard
    }

    /// Its addresses with their network.
    pub fn network_addresses(&self) -> impl Iterator<Item = NetworkAddress> + '_ {
        self.addresses.iter().map(|ip| NetworkAddress { network: self.network.clone(), ip: *ip })
    }
}

/// The first of those with the greatest key (`Iterator::max_by_key` takes the last).
fn first_max_by_key<T, K: Ord>(items: impl Iterator<Item = T>, key: impl Fn(&T) -> K) -> Option<T> {
    items.reduce(|best, item| if key(&item) > key(&best) { item } else { best })
}
