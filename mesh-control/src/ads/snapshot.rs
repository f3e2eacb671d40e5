//! What is pushed, at one moment: immutable, encoded once, shared by every client.

use std::borrow::{Borrow, Cow};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use mesh_core::xds::proto::discovery::{DeltaDiscoveryResponse, Resource};
use mesh_core::xds::proto::workload::address;
use mesh_core::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, l7};
use prost::Message;
use prost_types::Any;

pub use crate::convert::Entry;
use crate::convert::{Addresses, Confidential, Resources};

/// A kind of resource that is served. Nodes ask for the first two, waypoints for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceType {
    /// `istio.workload.Address`
    Address,
    /// `istio.security.Authorization`
    Authorization,
    /// `undermesh.l7.v1.Route`
    Route,
    /// `undermesh.l7.v1.Destination`
    Destination,
    /// `undermesh.l7.v1.Authorization`
    RequestAuthorization,
    /// `undermesh.l7.v1.Authentication`
    RequestAuthentication,
    /// `undermesh.l7.v1.WorkloadLabels`
    Labels,
    /// `undermesh.l7.v1.Settings`
    Settings,
    /// `undermesh.l7.v1.Credential`
    Credential,
    /// `undermesh.l7.v1.Gateway`
    Gateway,
    /// `undermesh.l7.v1.Telemetry`
    Telemetry,
}

/// How many kinds there are.
const KINDS: usize = 11;

impl ResourceType {
    /// All of them, in the order in which they are sent: certificates before the listeners that name them.
    pub const ALL: [Self; KINDS] = [
        Self::Address,
        Self::Authorization,
        Self::Route,
        Self::Destination,
        Self::RequestAuthorization,
        Self::RequestAuthentication,
        Self::Labels,
        Self::Settings,
        Self::Credential,
        Self::Gateway,
        Self::Telemetry,
    ];

    /// From a type URL.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.url() == url)
    }

    /// The type URL.
    #[must_use]
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
            Self::Route => l7::ROUTE_TYPE,
            Self::Destination => l7::DESTINATION_TYPE,
            Self::RequestAuthorization => l7::AUTHORIZATION_TYPE,
            Self::RequestAuthentication => l7::AUTHENTICATION_TYPE,
            Self::Labels => l7::LABELS_TYPE,
            Self::Settings => l7::SETTINGS_TYPE,
            Self::Credential => l7::CREDENTIAL_TYPE,
            Self::Gateway => l7::GATEWAY_TYPE,
            Self::Telemetry => l7::TELEMETRY_TYPE,
        }
    }

    /// Whether there are resources of this kind that not everybody is told.
    #[must_use]
    pub fn is_confidential(self) -> bool {
        self == Self::Credential
    }

    /// A short name, a metric label: Istio's where it has one.
    #[must_use]
    pub fn short(self) -> &'static str {
        match self {
            Self::Address => "wds",
            Self::Authorization => "wads",
            Self::Route => "um-route",
            Self::Destination => "um-dest",
            Self::RequestAuthorization => "um-authz",
            Self::RequestAuthentication => "um-authn",
            Self::Labels => "um-labels",
            Self::Settings => "um-settings",
            Self::Credential => "um-credential",
            Self::Gateway => "um-gateway",
            Self::Telemetry => "um-telemetry",
        }
    }
}

/// Resources of one type by name.
pub type Entries = BTreeMap<Arc<str>, Arc<Entry>>;

/// What became of a kind from one snapshot to the next.
#[derive(Debug, Default)]
struct Changes {
    /// Where it started.
    from: Arc<Entries>,
    /// What is new, different or gone.
    names: Vec<Arc<str>>,
    /// Of what is there of it, the encoded resources.
    encoded: OnceLock<Bytes>,
}

/// What is new, different or gone for a client.
#[derive(Debug)]
pub struct Changed<'a> {
    /// By name.
    pub names: Cow<'a, [Arc<str>]>,
    /// What is there of it, encoded as a response has it, where others get the same.
    pub shared: Option<Bytes>,
}

/// Names of what is in one of them only or differs in whatever respect (whose a certificate is, too), in their order.
fn difference(before: &Entries, after: &Entries) -> Vec<Arc<str>> {
    let (mut old, mut new) = (before.iter().peekable(), after.iter().peekable());
    let mut names = Vec::new();
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return names,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let gone = old.next_if(|_| order != Ordering::Greater);
        let come = new.next_if(|_| order != Ordering::Less);
        let same = gone.zip(come).is_some_and(|((_, a), (_, b))| Arc::ptr_eq(a, b) || a == b);
        if let Some((name, _)) = come.or(gone).filter(|_| !same) {
            names.push(name.clone());
        }
    }
}

/// Resources as the field of a response that holds them.
fn encode<'a>(kind: ResourceType, entries: impl Iterator<Item = (&'a Arc<str>, &'a Arc<Entry>)>) -> Bytes {
    let mut out = Vec::new();
    for (name, entry) in entries {
        let resources = vec![entry.resource(name, kind)];
        let one = DeltaDiscoveryResponse { resources, ..DeltaDiscoveryResponse::default() };
        out.extend_from_slice(&one.encode_to_vec());
    }
    out.into()
}

/// Everything that is pushed.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counts up; 0 is the snapshot before the source was read, which is never pushed.
    pub number: u64,
    /// When the change was noticed that led to it.
    pub changed_at: Option<Instant>,
    /// By kind; the very same as in the snapshot before where nothing of a kind changed.
    entries: [Arc<Entries>; KINDS],
    /// By kind, what differs from the snapshot before.
    changes: [Changes; KINDS],
    /// By kind, all of them as a response has them.
    encoded: [OnceLock<Bytes>; KINDS],
    /// What the addresses are, to find some of them by something else.
    addresses: Arc<Addresses>,
    index: OnceLock<Index>,
}

/// How on-demand clients find addresses. Those that want all, as nodes do, need none.
#[derive(Debug, Default)]
struct Index {
    /// Alias to name.
    aliases: HashMap<String, Arc<str>>,
    /// Service to its workloads, node to its workloads.
    by_service: HashMap<String, Vec<Arc<str>>>,
    by_node: HashMap<String, Vec<Arc<str>>>,
}

impl Index {
    fn of(addresses: &Addresses) -> Self {
        let mut out = Self::default();
        for (name, resource) in addresses {
            if let Some(address::Type::Workload(workload)) = &resource.message.r#type {
                for service in workload.services.keys() {
                    out.by_service.entry(service.clone()).or_default().push(name.clone());
                }
                if !workload.node.is_empty() {
                    out.by_node.entry(workload.node.clone()).or_default().push(name.clone());
                }
            }
            for alias in &resource.aliases {
                out.aliases.entry(alias.clone()).or_insert_with(|| name.clone());
            }
        }
        out
    }
}

impl Snapshot {
    /// Encodes resources. Entries that did not change are shared with `previous`.
    #[must_use]
    pub fn build(resources: &Resources, previous: &Self) -> Self {
        let mut out =
            Self { number: previous.number + 1, addresses: resources.addresses.clone(), ..Self::default() };
        let l7 = &resources.l7;
        let credential = |secret: &Confidential| {
            Arc::new(Entry::new(&secret.credential, &[], Some(secret.account.clone())))
        };
        for kind in ResourceType::ALL {
            let from = previous.entries(kind).clone();
            let entries = match kind {
                ResourceType::Address => renew(&from, &resources.addresses, |address| address.entry()),
                ResourceType::Authorization => renew(&from, &resources.authorizations, encoded),
                ResourceType::Route => renew(&from, &l7.routes, encoded),
                ResourceType::Destination => renew(&from, &l7.destinations, encoded),
                ResourceType::RequestAuthorization => renew(&from, &l7.authorizations, encoded),
                ResourceType::RequestAuthentication => renew(&from, &l7.authentications, encoded),
                ResourceType::Labels => renew(&from, &l7.labels, |labels| labels.entry()),
                ResourceType::Settings => renew(&from, &l7.settings, encoded),
                ResourceType::Credential => renew(&from, &l7.credentials, credential),
                ResourceType::Gateway => renew(&from, &l7.gateways, encoded),
                ResourceType::Telemetry => renew(&from, &l7.telemetries, encoded),
            };
            let names = difference(&from, &entries);
            out.entries[kind as usize] = if names.is_empty() { from.clone() } else { Arc::new(entries) };
            out.changes[kind as usize] = Changes { from, names, encoded: OnceLock::new() };
        }
        out
    }

    /// Resources of one type.
    #[must_use]
    pub fn entries(&self, kind: ResourceType) -> &Arc<Entries> {
        &self.entries[kind as usize]
    }

    /// Names of resources of a kind that are new, different or gone for whoever has all of `held`. A client that has the
    /// snapshot before, as nearly all have, costs nothing.
    #[must_use]
    pub fn changes(&self, kind: ResourceType, held: &Arc<Entries>) -> Changed<'_> {
        let Changes { from, names, encoded } = &self.changes[kind as usize];
        let all = self.entries(kind);
        if !Arc::ptr_eq(from, held) {
            return Changed { names: Cow::Owned(difference(held, all)), shared: None };
        }
        let there = || names.iter().filter_map(|name| all.get_key_value(name));
        let shared = encoded.get_or_init(|| encode(kind, there())).clone();
        Changed { names: Cow::Borrowed(names), shared: Some(shared) }
    }

    /// All resources of a kind, encoded as a response has them, for who has none.
    #[must_use]
    pub fn encoded(&self, kind: ResourceType) -> Bytes {
        self.encoded[kind as usize].get_or_init(|| encode(kind, self.entries(kind).iter())).clone()
    }

    /// True when a client that has `other` needs nothing.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        self.entries == other.entries
    }

    /// What an on-demand client that asks for `key` (a name, or `<network>/<ip>`) gets: the workload, or the
    /// service and its workloads. Empty when there is no such thing.
    #[must_use]
    pub fn resolve(&self, key: &str) -> Vec<Arc<str>> {
        let name = match self.entries(ResourceType::Address).get_key_value(key) {
            Some((name, _)) => name,
            None => match self.index().aliases.get(key) {
                Some(name) => name,
                None => return Vec::new(),
            },
        };
        let mut names = vec![name.clone()];
        names.extend(self.index().by_service.get(&**name).into_iter().flatten().cloned());
        names
    }

    /// Workloads of a node.
    #[must_use]
    pub fn on_node(&self, node: &str) -> &[Arc<str>] {
        self.index().by_node.get(node).map_or(&[], Vec::as_slice)
    }

    fn index(&self) -> &Index {
        self.index.get_or_init(|| Index::of(&self.addresses))
    }
}

fn encoded(message: &impl Message) -> Arc<Entry> {
    Arc::new(Entry::new(message, &[], None))
}

/// The entries of a kind. What has not changed is the very same as before, and so are names.
fn renew<N, T>(before: &Entries, now: &BTreeMap<N, T>, entry: impl Fn(&T) -> Arc<Entry>) -> Entries
where
    N: Borrow<str>,
{
    let mut before = before.iter().peekable();
    now.iter()
        .map(|(name, resource)| {
            let name: &str = name.borrow();
            // Both are in the order of names.
            while before.next_if(|(known, _)| &***known < name).is_some() {}
            let (known, entry) = (before.next_if(|(known, _)| &***known == name), entry(resource));
            match known {
                Some((name, same)) if *same == entry => (Arc::clone(name), Arc::clone(same)),
                Some((name, _)) => (Arc::clone(name), entry),
                None => (name.into(), entry),
            }
        })
        .collect()
}

impl Entry {
    /// The resource on the wire.
    #[must_use]
    pub fn resource(&self, name: &str, kind: ResourceType) -> Resource {
        Resource {
            version: self.version.clone(),
            resource: Some(Any { type_url: kind.url().to_owned(), value: self.value.clone() }),
            name: name.to_owned(),
            aliases: self.aliases.clone(),
            ttl: None,
        }
    }
}
