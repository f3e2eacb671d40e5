//! Requests and policies for tests.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_core::xds::proto::l7;
use serde_json::{Map, Value};

use super::jwks::{KeyStore, Roots};
use super::{Policies, ServicePolicies};
use crate::config::{Own, Resources};
use crate::request::{Addressed, Head, Source};

/// The service that requests of tests go to.
pub(super) const SERVICE: &str = "shop/cart.shop.svc.cluster.local";

/// A request that owns what its head points to.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) source: Source,
    pub(super) destination: SocketAddr,
    pub(super) addressed: Addressed,
    pub(super) method: Method,
    pub(super) authority: String,
    pub(super) path: String,
    pub(super) query: Option<String>,
    pub(super) headers: HeaderMap,
    pub(super) claims: Option<Map<String, Value>>,
}

impl Case {
    /// GET of a path of the cart service at port 80, by `web` of namespace `front`.
    pub(super) fn get(path: &str) -> Self {
        Self {
            source: Source {
                address: "10.1.2.3:40000".parse().unwrap(),
                identity: Some("spiffe://cluster.local/ns/front/sa/web".parse().unwrap()),
                workload: None,
                labels: None,
            },
            destination: "10.96.0.7:80".parse().unwrap(),
            addressed: Addressed::Service { key: SERVICE.into(), port: 80 },
            method: Method::GET,
            authority: "cart.shop".into(),
            path: path.into(),
            query: None,
            headers: HeaderMap::new(),
            claims: None,
        }
    }

    pub(super) fn from(mut self, identity: &str) -> Self {
        self.source.identity = (!identity.is_empty()).then(|| identity.parse().unwrap());
        self
    }

    pub(super) fn at(mut self, address: &str) -> Self {
        self.source.address.set_ip(address.parse().unwrap());
        self
    }

    pub(super) fn host(mut self, authority: &str) -> Self {
        self.authority = authority.into();
        self
    }

    pub(super) fn method(mut self, method: &str) -> Self {
        self.method = method.parse().unwrap();
        self
    }

    pub(super) fn port(mut self, number: u16) -> Self {
        let (Addressed::Service { port, .. }
        | Addressed::Workload { port, .. }
        | Addressed::Gateway { port }) = &mut self.addressed;
        *port = number;
        self
    }

    pub(super) fn query(mut self, query: &str) -> Self {
        self.query = Some(query.into());
        self
    }

    /// One more line.
    pub(super) fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers
            .append(HeaderName::try_from(name).unwrap(), HeaderValue::from_bytes(value.as_ref()).unwrap());
        self
    }

    pub(super) fn claims(mut self, claims: Value) -> Self {
        let Value::Object(claims) = claims else { panic!("claims are an object") };
        self.claims = Some(claims);
        self
    }

    pub(super) fn head(&self) -> Head<'_> {
        Head {
            source: &self.source,
            destination: self.destination,
            addressed: &self.addressed,
            method: &self.method,
            scheme: "http",
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            claims: self.claims.as_ref(),
        }
    }
}

pub(super) fn own() -> Own {
    Own {
        namespace: "shop".into(),
        gateway: "waypoint".into(),
        class: "istio-waypoint".into(),
        ..Own::default()
    }
}

pub(super) fn origin(kind: &str, namespace: &str, name: &str) -> Option<l7::Origin> {
    Some(l7::Origin { kind: kind.into(), namespace: namespace.into(), name: name.into(), created: 0 })
}

/// The target that stands for [`SERVICE`].
pub(super) fn service_target() -> l7::Target {
    l7::Target {
        kind: l7::target::Kind::Service.into(),
        namespace: "shop".into(),
        name: "cart".into(),
        hostnames: vec!["cart.shop.svc.cluster.local".into()],
    }
}

pub(super) fn gateway_target(namespace: &str, name: &str) -> l7::Target {
    let kind = l7::target::Kind::Gateway.into();
    l7::Target { kind, namespace: namespace.into(), name: name.into(), hostnames: Vec::new() }
}

pub(super) fn class_target(name: &str) -> l7::Target {
    let kind = l7::target::Kind::GatewayClass.into();
    l7::Target { kind, namespace: String::new(), name: name.into(), hostnames: Vec::new() }
}

/// A policy for [`SERVICE`].
pub(super) fn policy(
    name: &str,
    action: l7::authorization::Action,
    rules: Vec<l7::AuthorizationRule>,
) -> l7::Authorization {
    l7::Authorization {
        origin: origin("AuthorizationPolicy", "shop", name),
        targets: vec![service_target()],
        action: action.into(),
        rules,
        ..l7::Authorization::default()
    }
}

/// A rule that matches everything.
pub(super) fn anything() -> l7::AuthorizationRule {
    l7::AuthorizationRule::default()
}

pub(super) fn from(source: l7::PolicySource) -> l7::AuthorizationRule {
    l7::AuthorizationRule { from: vec![source], ..Default::default() }
}

pub(super) fn to(operation: l7::Operation) -> l7::AuthorizationRule {
    l7::AuthorizationRule { to: vec![operation], ..Default::default() }
}

pub(super) fn when(key: &str, values: &[&str], not_values: &[&str]) -> l7::AuthorizationRule {
    let condition =
        l7::Condition { key: key.into(), values: strings(values), not_values: strings(not_values) };
    l7::AuthorizationRule { when: vec![condition], ..Default::default() }
}

pub(super) fn strings(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

pub(super) fn resources(
    authorizations: impl IntoIterator<Item = l7::Authorization>,
    authentications: impl IntoIterator<Item = l7::Authentication>,
    settings: l7::Settings,
) -> Resources {
    // Names of one width keep the order in which they are given.
    let name = |i: usize| format!("{i:03}");
    Resources {
        authorizations: authorizations.into_iter().enumerate().map(|(i, p)| (name(i), Arc::new(p))).collect(),
        authentications: authentications
            .into_iter()
            .enumerate()
            .map(|(i, a)| (name(i), Arc::new(a)))
            .collect(),
        settings: Arc::new(settings),
        ..Resources::default()
    }
}

/// Without a fetcher that runs.
pub(super) fn build(resources: &Resources) -> Policies {
    Policies::build(resources, &own(), &KeyStore::new(Roots::System).0)
}

/// What applies to [`SERVICE`] with these policies.
pub(super) fn policies(
    authorizations: impl IntoIterator<Item = l7::Authorization>,
    settings: l7::Settings,
) -> Arc<ServicePolicies> {
    let policies = build(&resources(authorizations, [], settings));
    Arc::clone(policies.for_service(&Case::get("/").addressed))
}
