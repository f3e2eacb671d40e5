//! Gateways of Istio: what is to be served by the proxies that they select. And those proxies.
//!
//! Field meaning: `istio.io/api` networking/v1 Gateway.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7::listener_tls::Version;

use super::{Key, Meta, Objects, Pod, TargetPort, Transport, selects};

/// Label of pods: the gateway that they are proxies of, by which they ask for what they serve.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// A Gateway of `networking.istio.io`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstioGateway {
    /// Metadata.
    pub meta: Meta,
    /// `selector`: labels of proxies' pods, in any namespace; empty selects every gateway.
    pub selector: BTreeMap<String, String>,
    /// `servers`.
    pub servers: Vec<Server>,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}

/// One entry of `servers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// `port.number`: that of the proxies' Service where it has it, else of the proxies.
    pub port: u16,
    /// `port.protocol`.
    pub protocol: ServerProtocol,
    /// `hosts`.
    pub hosts: Vec<ServerHost>,
    /// `tls.httpsRedirect`.
    pub https_redirect: bool,
    /// `tls`, where TLS is spoken.
    pub tls: Option<ServerTls>,
    /// Why it cannot be served as it is meant.
    pub refused: Option<String>,
}

/// What is spoken at a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerProtocol {
    /// HTTP, HTTP2, GRPC and GRPC-WEB.
    Http,
    /// HTTPS.
    Https,
    /// TLS.
    Tls,
    /// TCP and MONGO.
    Tcp,
}

/// One entry of `hosts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerHost {
    /// Namespace of the VirtualServices that may be bound; `*` is every.
    pub namespace: String,
    /// `*`, `*.domain` or a name.
    pub host: String,
}

/// `tls` of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// `mode`.
    pub mode: ServerTlsMode,
    /// `credentialName`, `credentialNames`: Secrets of the proxies' namespace.
    pub credentials: Vec<String>,
    /// `caCertCredentialName`; empty: the Secret with the certificate has the roots, or the one with `-cacert` behind its
    /// name.
    pub client_roots: String,
    /// `subjectAltNames`.
    pub subject_alt_names: Vec<String>,
    /// `minProtocolVersion`.
    pub min: Version,
    /// `maxProtocolVersion`.
    pub max: Version,
}

/// `tls.mode`, as far as it is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum ServerTlsMode {
    Passthrough,
    Simple,
    Mutual,
    OptionalMutual,
}

impl ServerTls {
    /// Names of the Secrets that may have the roots of clients' certificates, the first that is there counts.
    #[must_use]
    pub fn root_secrets(&self) -> Vec<String> {
        if !matches!(self.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual) {
            return Vec::new();
        }
        if !self.client_roots.is_empty() {
            return vec![self.client_roots.clone()];
        }
        let own = self.credentials.iter();
        own.flat_map(|name| [format!("{name}-cacert"), name.clone()]).collect()
    }
}

/// The proxies of one gateway.
#[derive(Debug, Clone)]
pub struct Proxies<'a> {
    /// Their pods.
    pub pods: Vec<&'a Pod>,
}

impl Proxies<'_> {
    /// Whether a selector is for them.
    #[must_use]
    pub fn are_selected(&self, selector: &BTreeMap<String, String>) -> bool {
        self.pods.iter().any(|pod| selects(selector, &pod.meta.labels))
    }

    /// Who they prove to be: keys are told to nobody else.
    #[must_use]
    pub fn account(&self) -> Option<Key> {
        let pod = self.pods.first()?;
        Some(Key::new(&pod.meta.namespace, &pod.service_account))
    }
}

impl Objects {
    /// The proxies of gateways by namespace and the gateway's name. Waypoints are none.
    #[must_use]
    pub fn gateway_proxies(&self) -> BTreeMap<Key, Proxies<'_>> {
        let mut all: BTreeMap<Key, Proxies<'_>> = BTreeMap::new();
        for pod in self.pods.values().filter(|pod| !pod.terminal) {
            let Some(name) = pod.meta.label(GATEWAY_NAME) else { continue };
            let key = Key::new(&pod.meta.namespace, name);
            if self.gateways.get(&key).is_some_and(|gateway| gateway.is_waypoint()) {
                continue;
            }
            all.entry(key).or_insert_with(|| Proxies { pods: Vec::new() }).pods.push(pod);
        }
        all
    }

    /// Whether a Gateway is for the proxies of a gateway.
    #[must_use]
    pub fn selects(&self, gateway: &IstioGateway, key: &Key, proxies: &Proxies<'_>) -> bool {
        let scoped = self.settings.as_ref().is_some_and(|s| s.undermesh.scope_gateway_to_namespace);
        (!scoped || key.namespace == gateway.meta.namespace) && proxies.are_selected(&gateway.selector)
    }

    /// Ports at which proxies listen for what is sent to a port of theirs: a Service of theirs that has the port says to
    /// which of the pods' it goes; without one it is the port itself.
    #[must_use]
    pub fn ports_behind(&self, proxies: &Proxies<'_>, port: u16) -> Vec<u16> {
        let mut found = Vec::new();
        for pod in &proxies.pods {
            let of_pod = |selector: &BTreeMap<String, String>| {
                !selector.is_empty() && selects(selector, &pod.meta.labels)
            };
            let services = self
                .services
                .values()
                .filter(|service| service.meta.namespace == pod.meta.namespace && of_pod(&service.selector));
            let ports = services.flat_map(|service| &service.ports);
            for of in ports.filter(|of| of.port == port && of.transport == Transport::Tcp) {
                found.extend(match &of.target {
                    TargetPort::Number(number) => Some(*number),
                    TargetPort::Name(name) => pod.ports.get(&(name.clone(), Transport::Tcp)).copied(),
                });
            }
        }
        if found.is_empty() {
            found.push(port);
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}
