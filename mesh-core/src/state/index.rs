//! The builder of snapshots, on the control runtime.
//!
//! Resources arrive in any order: an endpoint may come before its service (it is staged), a service update keeps
//! the endpoints that are attached, a workload update replaces the workload and its endpoints entirely.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use indexmap::IndexMap;
use rpds::HashTrieMapSync;

use super::address::NetworkCidr;
use super::mesh::{MeshOptions, MeshState, NetworkIndex, lower_case, name_key};
use super::service::{Endpoint, Service, ServiceEndpoints};
use super::shared::Shared;
use super::workload::Workload;
use super::{DecodeError, Problem, Str};
use crate::policy::{Policy, Scope};
use crate::state::decode::Context;
use crate::xds::proto::{security, workload as wire};

/// Removed policy keys that are remembered before those that no workload lists are forgotten.
const REMOVED_POLICIES_KEPT: usize = 1024;

/// Up to so many endpoints no room is kept for more.
const FEW_ENDPOINTS: usize = 3;

/// Endpoints by workload uid.
type Endpoints = IndexMap<Str, Endpoint>;

/// The mutable model: takes adds and removes, hands out snapshots.
#[derive(Debug, Default)]
pub struct StateIndex {
    state: MeshState,
    /// Endpoints of services that are not known, by service key.
    staged: HashMap<Str, Endpoints>,
    shared: Shared,
    changed: bool,
}

impl StateIndex {
    /// An empty model.
    #[must_use]
    pub fn new(options: MeshOptions) -> Self {
        Self { state: MeshState { options: Arc::new(options), ..MeshState::default() }, ..Self::default() }
    }

    /// The model as it is now. Costs no more than a few reference counts.
    pub fn snapshot(&mut self) -> Arc<MeshState> {
        if std::mem::take(&mut self.changed) {
            self.state.version += 1;
            self.shared.sweep();
        }
        Arc::new(self.state.clone())
    }

    /// The model as it is now, for reading in place.
    #[must_use]
    pub fn state(&self) -> &MeshState {
        &self.state
    }

    /// Keys of services that endpoints wait for, with how many.
    pub fn staged(&self) -> impl Iterator<Item = (&Str, usize)> {
        self.staged.iter().map(|(key, endpoints)| (key, endpoints.len()))
    }

    /// Takes an Address resource.
    ///
    /// # Errors
    /// Rejected resources change nothing: the last version of the object stays.
    pub fn apply_address(&mut self, name: &str, address: &wire::Address) -> Result<(), DecodeError> {
        match &address.r#type {
            Some(wire::address::Type::Workload(workload)) => {
                self.insert_workload(Workload::decode(workload)?)
            }
            Some(wire::address::Type::Service(service)) => self.insert_service(Service::decode(service)?),
            None => {
                let cx = Context { kind: "address", key: name };
                return Err(cx.error("type", Problem::Missing("`workload` or `service`")));
            }
        }
        Ok(())
    }

    /// Takes an Authorization resource.
    ///
    /// # Errors
    /// Rejected resources change nothing: the last version of the policy stays in force.
    pub fn apply_policy(&mut self, policy: &security::Authorization) -> Result<(), DecodeError> {
        self.insert_policy(Policy::decode(policy)?);
        Ok(())
    }

    /// Removes what an Address resource name means: a workload by uid, else a service by `namespace/hostname` (no
    /// further slash). Unknown names change nothing: the control plane may answer a question with them.
    pub fn remove_address(&mut self, name: &str) {
        if self.state.workloads.contains_key(name) {
            self.remove_workload(name);
        } else if name.split_once('/').is_some_and(|(_, rest)| !rest.contains('/')) {
            self.remove_service(name);
        }
    }

    /// Adds or entirely replaces a workload.
    pub fn insert_workload(&mut self, mut workload: Workload) {
        self.shared.workload(&mut workload);
        let workload = Arc::new(workload);
        let previous = self.state.workloads.get(&workload.uid).cloned();
        if previous.as_deref() == Some(&*workload) {
            return;
        }
        self.changed = true;
        if let Some(previous) = &previous {
            if previous.authorization_policies != workload.authorization_policies {
                self.state.policy_version += 1;
            }
            self.unindex_workload(previous);
            let kept = |key: &Str| workload.services.iter().any(|(k, _)| k == key);
            for (key, _) in previous.services.iter().filter(|(key, _)| !kept(key)) {
                self.detach(key, &previous.uid);
            }
        }
        for (key, ports) in &workload.services {
            self.attach(key, Endpoint { workload: workload.clone(), ports: ports.clone() });
        }
        self.index_workload(&workload);
        self.state.workloads.insert_mut(workload.uid.clone(), workload);
    }

    /// Removes a workload and its endpoints.
    pub fn remove_workload(&mut self, uid: &str) {
        let Some(previous) = self.state.workloads.get(uid).cloned() else { return };
        self.changed = true;
        self.unindex_workload(&previous);
        for (key, _) in &previous.services {
            self.detach(key, uid);
        }
        self.state.workloads.remove_mut(uid);
    }

    /// Adds a service, or replaces it and keeps its endpoints.
    pub fn insert_service(&mut self, mut service: Service) {
        self.shared.service(&mut service);
        let key = service.host.key().clone();
        let previous = self.state.services.get(&key).cloned();
        if previous.as_ref().is_some_and(|previous| *previous.service == service) {
            return;
        }
        self.changed = true;
        let endpoints = match previous {
            Some(previous) => {
                self.unindex_vips(&previous.service, &service);
                previous.endpoints
            }
            None => {
                self.state.services_version = next_services_version();
                push(&mut self.state.hostnames, lower_case(service.host.hostname()).into(), key.clone());
                Arc::new(self.staged.remove(&key).unwrap_or_default())
            }
        };
        self.index_vips(&service);
        self.state.services.insert_mut(key, ServiceEndpoints { service: Arc::new(service), endpoints });
    }

    /// Removes a service; its endpoints wait for it to come back.
    pub fn remove_service(&mut self, key: &str) {
        let Some(previous) = self.state.services.get(key).cloned() else { return };
        self.changed = true;
        let service = &previous.service;
        for vip in &service.vips {
            let key = service.host.key();
            self.edit_network(&vip.network, |index| drop_from(&mut index.vips, &vip.ip, |k| k == key));
        }
        for vip in &service.cidr_vips {
            self.drop_prefix(vip, service.host.key());
        }
        drop_from(&mut self.state.hostnames, &*lower_case(service.host.hostname()), |k| &**k == key);
        self.state.services_version = next_services_version();
        self.state.services.remove_mut(key);
        if !previous.endpoints.is_empty() {
            self.staged.insert(service.host.key().clone(), Arc::unwrap_or_clone(previous.endpoints));
        }
    }

    /// Adds or replaces a policy.
    pub fn insert_policy(&mut self, policy: Policy) {
        if self.state.policies.get(&policy.key).is_some_and(|previous| **previous == policy) {
            return;
        }
        self.drop_policy(&policy.key.clone());
        self.state.removed_policies.remove_mut(&policy.key);
        self.policies_changed();
        let policy = Arc::new(policy);
        match policy.scope {
            Scope::Global => insert_sorted(&mut self.state.global_policies, &policy),
            Scope::Namespace => {
                let namespace = &policy.namespace;
                let mut list = self.state.namespace_policies.get(namespace).cloned().unwrap_or_default();
                insert_sorted(&mut list, &policy);
                self.state.namespace_policies.insert_mut(namespace.clone(), list);
            }
            Scope::WorkloadSelector => {}
        }
        self.state.policies.insert_mut(policy.key.clone(), policy);
    }

    /// Removes a policy. Workloads that still list it are not denied for it: it is known to be gone.
    pub fn remove_policy(&mut self, key: &str) {
        let known = self.drop_policy(key);
        if !known && self.state.removed_policies.contains_key(key) {
            return;
        }
        if self.state.removed_policies.size() >= REMOVED_POLICIES_KEPT {
            self.forget_unlisted_removed_policies();
        }
        self.state.removed_policies.insert_mut(key.into(), ());
        self.policies_changed();
    }

    fn policies_changed(&mut self) {
        self.changed = true;
        self.state.policy_version += 1;
    }

    fn drop_policy(&mut self, key: &str) -> bool {
        let Some(previous) = self.state.policies.get(key).cloned() else { return false };
        match previous.scope {
            Scope::Global => self.state.global_policies.retain(|p| &*p.key != key),
            Scope::Namespace => {
                drop_from(&mut self.state.namespace_policies, &previous.namespace, |p| &*p.key == key);
            }
            Scope::WorkloadSelector => {}
        }
        self.state.policies.remove_mut(key)
    }

    fn forget_unlisted_removed_policies(&mut self) {
        let mut kept = HashTrieMapSync::default();
        for key in self.state.workloads.values().flat_map(|w| &w.authorization_policies) {
            if self.state.removed_policies.contains_key(key) {
                kept.insert_mut(key.clone(), ());
            }
        }
        self.state.removed_policies = kept;
    }

    fn attach(&mut self, key: &Str, endpoint: Endpoint) {
        let uid = endpoint.workload.uid.clone();
        let endpoints = match self.state.services.get_mut(key) {
            Some(service) => Arc::make_mut(&mut service.endpoints),
            None => self.staged.entry(key.clone()).or_default(),
        };
        endpoints.insert(uid, endpoint);
        // Most services have few endpoints, and there are many of them.
        if endpoints.len() <= FEW_ENDPOINTS {
            endpoints.shrink_to_fit();
        }
    }

    fn detach(&mut self, key: &Str, uid: &str) {
        if let Some(service) = self.state.services.get_mut(key) {
            Arc::make_mut(&mut service.endpoints).swap_remove(uid);
        } else if let Some(endpoints) = self.staged.get_mut(key) {
            endpoints.swap_remove(uid);
            if endpoints.is_empty() {
                self.staged.remove(key);
            }
        }
    }

    fn index_workload(&mut self, workload: &Arc<Workload>) {
        if workload.is_indexed_by_ip() {
            self.edit_network(&workload.network, |index| {
                for ip in &workload.addresses {
                    push(&mut index.workloads, *ip, workload.clone());
                }
            });
        }
        if let Some(hostname) = &workload.hostname {
            let key = name_key(&workload.namespace, hostname);
            push(&mut self.state.workload_hostnames, key, workload.clone());
        }
        let key = name_key(&workload.namespace, &workload.name);
        push(&mut self.state.workload_names, key, workload.clone());
    }

    fn unindex_workload(&mut self, workload: &Workload) {
        let is_it = |w: &Arc<Workload>| w.uid == workload.uid;
        if workload.is_indexed_by_ip() {
            self.edit_network(&workload.network, |index| {
                for ip in &workload.addresses {
                    drop_from(&mut index.workloads, ip, is_it);
                }
            });
        }
        if let Some(hostname) = &workload.hostname {
            drop_from(&mut self.state.workload_hostnames, &*name_key(&workload.namespace, hostname), is_it);
        }
        drop_from(&mut self.state.workload_names, &*name_key(&workload.namespace, &workload.name), is_it);
    }

    fn index_vips(&mut self, service: &Service) {
        let key = service.host.key();
        for vip in &service.vips {
            self.edit_network(&vip.network, |index| push_once(&mut index.vips, vip.ip, key));
        }
        for vip in &service.cidr_vips {
            self.edit_network(&vip.network, |index| {
                push_once(&mut index.prefixes, vip.cidr, key);
                index.prefix_lengths.insert((vip.cidr.addr().is_ipv4(), vip.cidr.prefix_len()));
            });
        }
    }

    /// Drops the addresses that the new version lacks; those that stay keep their place in the order of arrival.
    fn unindex_vips(&mut self, old: &Service, new: &Service) {
        let key = old.host.key();
        for vip in old.vips.iter().filter(|vip| !new.vips.contains(vip)) {
            self.edit_network(&vip.network, |index| drop_from(&mut index.vips, &vip.ip, |k| k == key));
        }
        for vip in old.cidr_vips.iter().filter(|vip| !new.cidr_vips.contains(vip)) {
            self.drop_prefix(vip, key);
        }
    }

    fn drop_prefix(&mut self, vip: &NetworkCidr, key: &Str) {
        self.edit_network(&vip.network, |index| {
            drop_from(&mut index.prefixes, &vip.cidr, |k| k == key);
            let shape = |net: &ipnet::IpNet| (net.addr().is_ipv4(), net.prefix_len());
            if !index.prefixes.keys().any(|net| shape(net) == shape(&vip.cidr)) {
                index.prefix_lengths.remove(&shape(&vip.cidr));
            }
        });
    }

    fn edit_network(&mut self, network: &Str, edit: impl FnOnce(&mut NetworkIndex)) {
        if let Some(index) = self.state.networks.get_mut(network) {
            edit(index);
        } else {
            let mut index = NetworkIndex::default();
            edit(&mut index);
            self.state.networks.insert_mut(network.clone(), index);
        }
    }
}

/// Never the same twice in a process.
fn next_services_version() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

fn push<K, V>(map: &mut HashTrieMapSync<K, Vec<V>>, key: K, value: V)
where
    K: Clone + Eq + Hash,
    V: Clone,
{
    match map.get_mut(&key) {
        Some(list) => list.push(value),
        None => {
            map.insert_mut(key, vec![value]);
        }
    }
}

fn push_once<K: Clone + Eq + Hash>(map: &mut HashTrieMapSync<K, Vec<Str>>, key: K, value: &Str) {
    if !map.get(&key).is_some_and(|list| list.contains(value)) {
        push(map, key, value.clone());
    }
}

/// Removes the values that `is_it` names, and the key with the last of them.
fn drop_from<K, Q, V>(map: &mut HashTrieMapSync<K, Vec<V>>, key: &Q, is_it: impl Fn(&V) -> bool)
where
    K: Clone + Eq + Hash + Borrow<Q>,
    Q: Eq + Hash + ?Sized,
    V: Clone,
{
    let Some(list) = map.get_mut(key) else { return };
    list.retain(|value| !is_it(value));
    if list.is_empty() {
        map.remove_mut(key);
    }
}

/// Keeps a list in the order of keys, so that the policy that is named for a denial does not depend on arrival.
fn insert_sorted(list: &mut Vec<Arc<Policy>>, policy: &Arc<Policy>) {
    let at = list.partition_point(|other| other.key < policy.key);
    list.insert(at, policy.clone());
}
