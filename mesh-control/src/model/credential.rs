//! Certificates of gateways, which are in Secrets, and which of those anybody may name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::l7::Reference;
use super::{ClientMode, Gateway, Key, ListenerTls, Meta, Objects};

/// API group of Gateways and routes.
const GATEWAYS: &str = "gateway.networking.k8s.io";

/// A Secret with a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// Metadata.
    pub meta: Meta,
    /// It is of type kubernetes.io/tls, as the Gateway API wants it; Istio's Gateways may name others.
    pub is_tls: bool,
    /// PEM: who issues clients' certificates (`ca.crt`, `cacert`).
    pub roots: Option<String>,
    /// PEM: which of those are revoked (`ca.crl`, `crl`).
    pub revocations: Option<String>,
    /// The last that was in order, if there was one.
    pub pair: Option<Arc<Pair>>,
    /// What is wrong with what is there now, and what would be right.
    pub problem: Option<String>,
}

/// A certificate with its chain, and its key: checked to belong together.
#[derive(Clone, PartialEq, Eq)]
pub struct Pair {
    /// PEM, the leaf first.
    pub chain: String,
    /// PEM.
    pub key: String,
}

/// Keys are never printed.
impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pair")
    }
}

impl Credential {
    /// The same after an earlier version: while what is there now cannot be used, the last that could is.
    #[must_use]
    pub fn over(self: Arc<Self>, earlier: Option<&Arc<Self>>) -> Arc<Self> {
        match earlier.and_then(|earlier| earlier.pair.clone()) {
            Some(pair) if self.pair.is_none() => Arc::new(Self { pair: Some(pair), ..Self::clone(&self) }),
            _ => self,
        }
    }
}

/// The Secret that a Gateway names.
///
/// # Errors
/// It names something else.
pub fn secret_of(reference: &Reference, gateway: &Gateway) -> Result<Key, String> {
    if !matches!(reference.group.as_str(), "" | "core") || reference.kind != "Secret" {
        return Err(format!(
            "{} of group {:?} holds no certificate; name a Secret (group \"\") of type kubernetes.io/tls",
            reference.kind, reference.group
        ));
    }
    let own = &gateway.meta.namespace;
    Ok(Key::new(if reference.namespace.is_empty() { own } else { &reference.namespace }, &reference.name))
}

/// The Secrets that are read.
pub type NamedSecrets = BTreeMap<Key, SecretTypes>;

/// The types of Secrets that somebody means who names one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecretTypes {
    /// kubernetes.io/tls.
    Tls,
    /// Opaque, too.
    Any,
}

impl Objects {
    /// The Secrets that gateways name and may name: no other is read.
    #[must_use]
    pub fn named_secrets(&self) -> NamedSecrets {
        let gateways = self.gateways.values().filter(|gateway| gateway.gateway_controller().is_some());
        let named = gateways.flat_map(|gateway| {
            let references = gateway.listeners.iter().filter_map(|listener| listener.tls.as_ref());
            let references = references.flat_map(|tls| &tls.certificates);
            references.filter_map(move |reference| {
                let key = secret_of(reference, gateway).ok()?;
                self.may_name("Gateway", &gateway.meta.namespace, "Secret", &key).then_some(key)
            })
        });
        let mut named: NamedSecrets = named.map(|key| (key, SecretTypes::Tls)).collect();
        for gateway in self.gateways.values().filter(|gateway| gateway.gateway_controller().is_some()) {
            let asking = gateway.listeners.iter().filter_map(|listener| listener.tls.as_ref());
            let beside = asking.flat_map(|tls| self.root_secrets(tls, gateway));
            for key in beside {
                named.entry(key).or_insert(SecretTypes::Any);
            }
        }
        if self.istio_gateways.is_empty() {
            return named;
        }
        let proxies = self.gateway_proxies();
        for gateway in self.istio_gateways.values() {
            let of = gateway.servers.iter().filter_map(|server| server.tls.as_ref());
            let of = of.flat_map(|tls| tls.credentials.iter().cloned().chain(tls.root_secrets()));
            let of: Vec<String> = of.collect();
            // As Istio has it: of the proxies' namespace, whoever wrote the Gateway.
            let selected = proxies.iter().filter(|(key, proxies)| self.selects(gateway, key, proxies));
            for (key, _) in selected {
                let keys = of.iter().map(|name| Key::new(&key.namespace, name));
                named.extend(keys.map(|key| (key, SecretTypes::Any)));
            }
        }
        named
    }

    /// The Secrets that may have the roots of the certificates that clients of a listener have to show, those that its Gateway
    /// may name: one with `-cacert` behind the name of the certificate's, or that one itself.
    #[must_use]
    pub fn root_secrets(&self, tls: &ListenerTls, gateway: &Gateway) -> Vec<Key> {
        if !matches!(tls.clients, ClientMode::Required | ClientMode::Optional) {
            return Vec::new();
        }
        let own = tls.certificates.iter().filter_map(|reference| secret_of(reference, gateway).ok());
        let both = own.flat_map(|key| [Key::new(&key.namespace, format!("{}-cacert", key.name)), key]);
        both.filter(|key| self.may_name("Gateway", &gateway.meta.namespace, "Secret", key)).collect()
    }

    /// Whether objects of a kind of the Gateway API and a namespace may name an object of a core kind: one of their own
    /// namespace, or one that a ReferenceGrant there lets them name.
    #[must_use]
    pub fn may_name(&self, kind: &str, namespace: &str, wanted: &str, key: &Key) -> bool {
        let grants = || self.reference_grants.values().filter(|g| g.meta.namespace == key.namespace);
        let mut granted = grants().filter(|g| {
            let from = g.from.iter().any(|(group, k, ns)| group == GATEWAYS && k == kind && ns == namespace);
            from && g.to.iter().any(|(group, kind, only)| {
                matches!(group.as_str(), "" | "core")
                    && kind == wanted
                    && only.as_deref().is_none_or(|only| only == key.name)
            })
        });
        namespace == key.namespace || granted.next().is_some()
    }
}
