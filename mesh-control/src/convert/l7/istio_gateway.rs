//! Gateways of Istio: their servers become listeners of the proxies that they select, to which VirtualServices are bound
//! (see [`super::virtual_service`]).
//!
//! A port in the clear is one listener for every host, as Istio merges the servers of such a port; of a port for TLS every
//! host is one, because the name that a client asks for decides which certificate it gets.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::l7 as wire;
use wire::gateway::{Inside, Listener};
use wire::http_rule::Action;
use wire::listener_tls::Mode;

use super::super::Context;
use super::report::Report;
use super::services::covers;
use super::{Confidential, L7, credentials, origin, resource_name};
use crate::model::istio_gateway::{Proxies, Server, ServerHost, ServerProtocol, ServerTls, ServerTlsMode};
use crate::model::{Condition, IstioGateway, Key, Kind, ObjectRef};

/// A server at the proxies of one gateway: VirtualServices can be bound to it.
#[derive(Debug)]
pub(super) struct Bound {
    /// The Gateway whose it is.
    pub(super) gateway: Key,
    /// Port as the Gateway has it, which rules are compared with.
    pub(super) port: u16,
    /// Whose proxies they are.
    pub(super) proxies: Key,
    /// Labels of those.
    pub(super) labels: Vec<BTreeMap<String, String>>,
    /// Which rules count.
    pub(super) takes: Takes,
    /// The route that sends clients to HTTPS first.
    pub(super) redirect: Option<String>,
    /// What it is on the wire.
    pub(super) listeners: Vec<wire::GatewayRef>,
    hosts: Vec<ServerHost>,
}

/// Which rules of a VirtualService count at a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    /// `http`.
    Http,
    /// `tcp`.
    Tcp,
    /// `tls`.
    Tls,
}

impl Bound {
    /// The hosts that this has in common with a VirtualService of a namespace, each the narrower of both.
    pub(super) fn common(&self, hosts: &[String], namespace: &str) -> Vec<String> {
        let mut found = Vec::new();
        let admits = |own: &&ServerHost| own.namespace == "*" || own.namespace == namespace;
        for own in self.hosts.iter().filter(admits).map(|own| &own.host) {
            for host in hosts {
                if host == own || covers(own, host) {
                    found.push(host.clone());
                } else if covers(host, own) {
                    found.push(own.clone());
                }
            }
        }
        found.sort();
        found.dedup();
        found
    }
}

/// The servers of all Gateways, by Gateway.
#[derive(Debug, Default)]
pub(super) struct Servers(BTreeMap<Key, Vec<Bound>>);

impl Servers {
    /// # Errors
    /// Why nothing can be bound to a Gateway.
    pub(super) fn of(&self, gateway: &Key) -> Result<&[Bound], String> {
        match self.0.get(gateway).map(Vec::as_slice) {
            None => Err(format!("{} {gateway} does not exist", Kind::IstioGateway)),
            Some([]) => Err(format!("{} {gateway} serves nobody; see its conditions", Kind::IstioGateway)),
            Some(servers) => Ok(servers),
        }
    }
}

/// Converts all of them. The listeners of the Gateway API's Gateways are in `out` already, and come first.
pub(super) fn convert(context: &mut Context<'_>, out: &mut L7) -> Servers {
    let mut servers = Servers::default();
    if context.objects.istio_gateways.is_empty() {
        return servers;
    }
    let mut conditions = Vec::new();
    let proxies = context.objects.gateway_proxies();
    let mut ports = Ports::of(out);
    let mut gateways: Vec<_> = context.objects.istio_gateways.values().collect();
    gateways.sort_by_key(|gateway| gateway.meta.age());
    for gateway in gateways {
        let scope = Scope { context, gateway, proxies: &proxies };
        let bound = scope.convert(&mut ports, out, &mut conditions);
        servers.0.insert(gateway.meta.key(), bound);
    }
    context.conditions.extend(conditions);
    servers
}

/// What a port of a gateway's proxies is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    Http,
    Stream,
    Secure,
}

impl Taken {
    const fn text(self) -> &'static str {
        match self {
            Self::Http => "HTTP",
            Self::Stream => "TCP",
            Self::Secure => "TLS",
        }
    }
}

/// Ports of all proxies.
#[derive(Debug, Default)]
struct Ports {
    taken: BTreeMap<(Key, u32), Taken>,
    /// Hosts of listeners for TLS.
    hosts: BTreeSet<(Key, u32, String)>,
}

impl Ports {
    fn of(out: &L7) -> Self {
        let mut ports = Self::default();
        for gateway in out.gateways.values() {
            let Some(origin) = &gateway.origin else { continue };
            let key = Key::new(&origin.namespace, &origin.name);
            for listener in &gateway.listeners {
                let taken = match (&listener.tls, listener.inside()) {
                    (Some(_), _) => Taken::Secure,
                    (None, Inside::Http) => Taken::Http,
                    (None, Inside::Stream) => Taken::Stream,
                };
                if taken == Taken::Secure {
                    ports.hosts.insert((key.clone(), listener.port, host_of(&listener.hostname)));
                }
                ports.taken.insert((key.clone(), listener.port), taken);
            }
        }
        ports
    }

    /// # Errors
    /// It is taken for something else.
    fn take(&mut self, proxies: &Key, port: u32, wanted: Taken) -> Result<(), String> {
        let taken = *self.taken.entry((proxies.clone(), port)).or_insert(wanted);
        if taken == wanted {
            return Ok(());
        }
        Err(format!("port {port} of {proxies} is there for {} already; take another", taken.text()))
    }
}

fn host_of(hostname: &str) -> String {
    if hostname.is_empty() { "*".to_owned() } else { hostname.to_ascii_lowercase() }
}

/// What the conversion of one Gateway looks at.
struct Scope<'a> {
    context: &'a Context<'a>,
    gateway: &'a IstioGateway,
    proxies: &'a BTreeMap<Key, Proxies<'a>>,
}

impl Scope<'_> {
    fn convert(&self, ports: &mut Ports, out: &mut L7, conditions: &mut Vec<Condition>) -> Vec<Bound> {
        let object = ObjectRef::of(Kind::IstioGateway, &self.gateway.meta);
        let mut report = Report::new(object, &self.gateway.unsupported);
        let selector = &self.gateway.selector;
        let is_for =
            |(key, proxies): &(&Key, &Proxies<'_>)| self.context.objects.selects(self.gateway, key, proxies);
        let selected: Vec<_> = self.proxies.iter().filter(is_for).collect();
        if selected.is_empty() {
            let wanted: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let why = format!(
                "spec.selector selects no gateway: no pod with the label {} has also {}",
                crate::model::istio_gateway::GATEWAY_NAME,
                if wanted.is_empty() { "no other".to_owned() } else { wanted.join(", ") }
            );
            report.refuse("NoMatchingProxies", why, conditions);
            return Vec::new();
        }
        let mut bound = Vec::new();
        let (mut refused, mut unserved) = (Vec::new(), Vec::new());
        for (i, server) in self.gateway.servers.iter().enumerate() {
            let field = format!("spec.servers[{i}]");
            if let Some(why) = &server.refused {
                unserved.push(why.clone());
                continue;
            }
            for (key, proxies) in &selected {
                let at = At { key, proxies, index: i, field: &field };
                match self.server(server, &at, ports, out, &mut report) {
                    Ok(one) => bound.push(one),
                    Err(why) => refused.push(format!("{field}: {why}")),
                }
            }
        }
        if bound.is_empty() {
            unserved.extend(refused);
            report.refuse("ListenersNotValid", unserved.join("; "), conditions);
        } else {
            unserved.into_iter().for_each(|why| report.unsupported(why));
            refused.into_iter().for_each(|why| report.overruled(why));
            report.finish(true, conditions);
        }
        bound
    }

    /// A server at the proxies of one gateway.
    ///
    /// # Errors
    /// Why it is not served there.
    fn server(
        &self,
        server: &Server,
        at: &At<'_>,
        ports: &mut Ports,
        out: &mut L7,
        report: &mut Report,
    ) -> Result<Bound, String> {
        let mut listeners = Vec::new();
        for port in self.context.objects.ports_behind(at.proxies, server.port) {
            listeners.extend(match &server.tls {
                None => vec![plain(server, at, u32::from(port), ports)?],
                Some(tls) => self.secure(server, tls, at, u32::from(port), ports, out, report)?,
            });
        }
        let takes = match (server.protocol, server.tls.as_ref().map(|tls| tls.mode)) {
            (_, Some(ServerTlsMode::Passthrough)) => Takes::Tls,
            (ServerProtocol::Http | ServerProtocol::Https, _) => Takes::Http,
            (ServerProtocol::Tcp | ServerProtocol::Tls, _) => Takes::Tcp,
        };
        let references: Vec<wire::GatewayRef> = listeners.iter().map(|of| at.reference(&of.name)).collect();
        let redirect = server.https_redirect.then(|| self.redirect(server, at, &references, out));
        tell(at.key, listeners, out);
        Ok(Bound {
            gateway: self.gateway.meta.key(),
            port: server.port,
            proxies: at.key.clone(),
            labels: at.proxies.pods.iter().map(|pod| pod.meta.labels.clone()).collect(),
            takes,
            redirect,
            listeners: references,
            hosts: server.hosts.clone(),
        })
    }

    /// The route that sends clients of a server to HTTPS, but for those that a trusted proxy has taken by it.
    fn redirect(&self, server: &Server, at: &At<'_>, listeners: &[wire::GatewayRef], out: &mut L7) -> String {
        let object = ObjectRef::of(Kind::IstioGateway, &self.gateway.meta);
        let name = format!("{}/{}@{}", resource_name(&object), at.index, at.key);
        let exact = wire::string_match::Kind::Exact("https".to_owned());
        let secure = wire::HeaderMatch {
            name: "x-forwarded-proto".to_owned(),
            value: Some(wire::StringMatch { kind: Some(exact), ignore_case: false }),
            invert: true,
            ..wire::HeaderMatch::default()
        };
        let rule = wire::HttpRule {
            name: "https-redirect".to_owned(),
            matches: vec![wire::HttpMatch { headers: vec![secure], ..wire::HttpMatch::default() }],
            action: Some(Action::Redirect(wire::Redirect {
                scheme: "https".to_owned(),
                derive_port: wire::redirect::DerivePort::FromProtocolDefault.into(),
                ..wire::Redirect::default()
            })),
            ..wire::HttpRule::default()
        };
        // Older than whatever is bound to the server: it comes first.
        let origin = wire::Origin { created: i64::MIN, ..origin(Kind::IstioGateway, &self.gateway.meta) };
        let route = wire::Route {
            origin: Some(origin),
            http: vec![rule],
            gateways: listeners.to_vec(),
            hostnames: server.hosts.iter().map(|own| own.host.clone()).collect(),
            ..wire::Route::default()
        };
        out.routes.insert(name.clone(), route);
        name
    }

    /// Listeners for the hosts of a server with TLS. One host that is another server's is left out.
    #[allow(clippy::too_many_arguments, reason = "what is read, what is written and what is said")]
    fn secure(
        &self,
        server: &Server,
        tls: &ServerTls,
        at: &At<'_>,
        port: u32,
        ports: &mut Ports,
        out: &mut L7,
        report: &mut Report,
    ) -> Result<Vec<Listener>, String> {
        ports.take(at.key, port, Taken::Secure)?;
        let mut listeners = Vec::new();
        let told = self.tls(tls, at, out, report);
        let inside = if server.protocol == ServerProtocol::Tls { Inside::Stream } else { Inside::Http };
        let shared = format!("istio/{}/{}", self.gateway.meta.key(), at.index);
        let hosts: BTreeSet<&str> = server.hosts.iter().map(|own| own.host.as_str()).collect();
        for host in hosts {
            if !ports.hosts.insert((at.key.clone(), port, host.to_owned())) {
                let why = format!("{host} at port {port} of {} is another server's already", at.key);
                report.overruled(format!("{}.hosts: {why}", at.field));
                continue;
            }
            listeners.push(Listener {
                name: format!("{shared}/{port}/{host}"),
                port,
                hostname: if host == "*" { String::new() } else { host.to_owned() },
                tls: Some(told.clone()),
                inside: inside.into(),
                server: format!("{shared}/{port}"),
            });
        }
        if listeners.is_empty() {
            return Err(format!("all of its hosts at port {port} of {} are other servers'", at.key));
        }
        Ok(listeners)
    }

    /// How TLS ends. Without a certificate, or the roots of clients' where those have to show one, the listener is told of
    /// with none: it serves nobody.
    fn tls(&self, tls: &ServerTls, at: &At<'_>, out: &mut L7, report: &mut Report) -> wire::ListenerTls {
        if tls.mode == ServerTlsMode::Passthrough {
            return wire::ListenerTls { mode: Mode::Passthrough.into(), ..wire::ListenerTls::default() };
        }
        let mut told = wire::ListenerTls {
            mode: Mode::Terminate.into(),
            min_version: tls.min.into(),
            max_version: tls.max.into(),
            ..wire::ListenerTls::default()
        };
        let clients = match tls.mode {
            ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual => {
                let secrets = tls.root_secrets().into_iter().map(|name| Key::new(&at.key.namespace, name));
                match credentials::roots(self.context, &secrets.collect::<Vec<_>>()) {
                    Ok((roots, revocations)) => Some(wire::ClientCertificates {
                        roots,
                        revocations,
                        subject_alt_names: tls.subject_alt_names.clone(),
                        optional: tls.mode == ServerTlsMode::OptionalMutual,
                    }),
                    Err(why) => {
                        report.unresolved("InvalidCertificateRef", format!("{}.tls: {why}", at.field));
                        return told;
                    }
                }
            }
            _ => None,
        };
        told.clients = clients;
        for name in &tls.credentials {
            let key = Key::new(&at.key.namespace, name);
            match credentials::any(self.context, at.key, &key) {
                Ok((found, problem)) => {
                    let problem =
                        problem.map(|why| format!("{}.tls: {why}; the last good one is in force", at.field));
                    problem.into_iter().for_each(|why| report.unresolved("InvalidCertificateRef", why));
                    told.credentials.push(found.0.clone());
                    if let Some(account) = at.proxies.account() {
                        out.credentials.insert(found.0, Confidential { account, credential: found.1 });
                    }
                }
                Err(why) => {
                    report.unresolved("InvalidCertificateRef", format!("{}.tls: {why}", at.field));
                }
            }
        }
        told
    }
}

/// Where a server is served.
struct At<'a> {
    /// The gateway whose proxies they are.
    key: &'a Key,
    proxies: &'a Proxies<'a>,
    index: usize,
    field: &'a str,
}

impl At<'_> {
    fn reference(&self, listener: &str) -> wire::GatewayRef {
        wire::GatewayRef {
            namespace: self.key.namespace.clone(),
            name: self.key.name.clone(),
            listener: listener.to_owned(),
        }
    }
}

/// The listener of a port in the clear, which all servers of the port have in common.
fn plain(server: &Server, at: &At<'_>, port: u32, ports: &mut Ports) -> Result<Listener, String> {
    let (taken, inside) = match server.protocol {
        ServerProtocol::Tcp => (Taken::Stream, Inside::Stream),
        _ => (Taken::Http, Inside::Http),
    };
    ports.take(at.key, port, taken)?;
    Ok(Listener { name: format!("istio/{port}"), port, inside: inside.into(), ..Listener::default() })
}

/// Tells the proxies of a gateway of listeners, those that are not told of yet.
fn tell(proxies: &Key, listeners: Vec<Listener>, out: &mut L7) {
    let told = out.gateways.entry(format!("{}/{proxies}", Kind::Gateway)).or_default();
    for listener in listeners {
        if !told.listeners.iter().any(|known| known.name == listener.name) {
            told.listeners.push(listener);
        }
    }
}
