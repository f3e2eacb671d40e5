//! SPIFFE identities: who a workload is, independent of where it runs.
//!
//! The form is Istio's: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The trust domain of a mesh that sets none.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// The service account of a pod that names none.
pub const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// A workload identity. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<Parts>);

#[derive(PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Parts {
    trust_domain: Box<str>,
    namespace: Box<str>,
    service_account: Box<str>,
}

/// Why a string is no workload identity of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
pub struct InvalidSpiffeId {
    value: String,
}

impl SpiffeId {
    /// Whether somebody else holds the very same.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Builds an identity; empty trust domain and service account take Istio's defaults.
    #[must_use]
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        let or = |s: &str, default: &str| if s.is_empty() { default.into() } else { s.into() };
        Self(Arc::new(Parts {
            trust_domain: or(trust_domain, DEFAULT_TRUST_DOMAIN),
            namespace: namespace.into(),
            service_account: or(service_account, DEFAULT_SERVICE_ACCOUNT),
        }))
    }

    /// The trust domain, for example `cluster.local`.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.0.trust_domain
    }

    /// The Kubernetes namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// The Kubernetes service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.0.service_account
    }

    /// The form in which policies name principals: the URI without `spiffe://`.
    #[must_use]
    pub fn principal(&self) -> String {
        let Parts { trust_domain, namespace, service_account } = &*self.0;
        format!("{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { trust_domain, namespace, service_account } = &*self.0;
        let parts = ["spiffe://", trust_domain, "/ns/", namespace, "/sa/", service_account];
        parts.into_iter().try_for_each(|part| f.write_str(part))
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidSpiffeId { value: value.to_owned() };
        let path = value.strip_prefix("spiffe://").ok_or_else(invalid)?;
        let parts: Vec<&str> = path.split('/').collect();
        match parts[..] {
            [td, "ns", ns, "sa", sa] if !td.is_empty() && !ns.is_empty() && !sa.is_empty() => {
                Ok(Self::new(td, ns, sa))
            }
            _ => Err(invalid()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_prints_as_it_parses() {
        let text = "spiffe://example.org/ns/shop/sa/cart";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("example.org", "shop", "cart")
        );
        assert_eq!(id.to_string(), text);
        assert_eq!(id.principal(), "example.org/ns/shop/sa/cart");
    }

    #[test]
    fn anything_but_the_five_parts_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/ns//sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }
}
