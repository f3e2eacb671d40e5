//! Which objects' rules count for a service, and in what order.

use std::net::IpAddr;
use std::sync::Arc;

use super::compiled::{CompiledRoute, Entry, Family};
use super::index::Index;
use super::tcp::{TcpEntry, TcpRule};
use crate::config::{Own, is_exported};
use crate::request::Source;

/// An object that names a service, and the port that it names; 0 is every port.
pub(super) type Named = (Arc<CompiledRoute>, u16);

/// The rules of a service.
#[derive(Debug)]
pub(super) struct ServiceRules {
    /// What it was built from, in the order of precedence.
    named: Vec<Named>,
    /// Ports that some object names, in order.
    ports: Vec<(u16, PortRules)>,
    /// Every other port.
    others: PortRules,
}

/// The rules of a service's port.
#[derive(Debug)]
pub(super) struct PortRules {
    /// Absent: there are none.
    pub(super) http: Option<Index>,
    tcp: Vec<Arc<TcpEntry>>,
}

/// Whether an object may say anything about a service: a VirtualService of the service's namespace or the waypoint's that is
/// exported to the waypoint's; of the Gateway API those of the service's namespace (producer routes, GAMMA).
pub(super) fn counts(route: &CompiledRoute, service_namespace: &str, own: &Own) -> bool {
    let namespace = route.namespace();
    let near = namespace == service_namespace
        || (route.family == Family::VirtualService && namespace == own.namespace);
    near && is_exported(&route.source.exported_to, namespace, &own.namespace)
}

impl ServiceRules {
    /// `named` is in the order of precedence and has only what counts for the service.
    pub(super) fn build(named: Vec<Named>, previous: Option<&Arc<Self>>) -> Arc<Self> {
        if let Some(previous) = previous.filter(|previous| same(&previous.named, &named)) {
            return previous.clone();
        }
        let mut ports: Vec<u16> = named.iter().map(|(_, port)| *port).filter(|port| *port != 0).collect();
        ports.sort_unstable();
        ports.dedup();
        let ports = ports.into_iter().map(|port| (port, PortRules::build(&named, port))).collect();
        let others = PortRules::build(&named, 0);
        Arc::new(Self { named, ports, others })
    }

    /// The objects that it was built from, in the order of precedence.
    pub(super) fn named(&self) -> &[Named] {
        &self.named
    }

    /// The rules of every port; those of the ports that nobody names come last, as port 0.
    pub(super) fn all_ports(&self) -> impl Iterator<Item = (u16, &PortRules)> {
        let named = self.ports.iter().map(|(port, rules)| (*port, rules));
        named.chain([(0, &self.others)])
    }

    pub(super) fn port(&self, port: u16) -> &PortRules {
        match self.ports.binary_search_by_key(&port, |(port, _)| *port) {
            Ok(at) => &self.ports[at].1,
            Err(_) => &self.others,
        }
    }
}

fn same(one: &[Named], other: &[Named]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| Arc::ptr_eq(&a.0, &b.0) && a.1 == b.1)
}

impl PortRules {
    fn build(named: &[Named], port: u16) -> Self {
        let mut routes: Vec<&CompiledRoute> = Vec::with_capacity(named.len());
        for (route, of) in named {
            // An object may name the service as a whole and one of its ports.
            let seen = routes.last().is_some_and(|last| std::ptr::eq(*last, &**route));
            if (*of == 0 || *of == port) && !seen {
                routes.push(route);
            }
        }
        Self { http: http_index(&routes), tcp: tcp_entries(&routes) }
    }

    /// The rules for connections, in their order.
    pub(super) fn tcp_entries(&self) -> &[Arc<TcpEntry>] {
        &self.tcp
    }

    /// The first rule for a connection, to a service of this name or to a gateway.
    pub(super) fn tcp(
        &self,
        hostname: Option<&str>,
        port: u16,
        source: &Source,
        destination: IpAddr,
    ) -> Option<&Arc<TcpRule>> {
        let found = self.tcp.iter().find(|entry| entry.test(hostname, port, source, destination));
        found.map(|entry| &entry.rule)
    }
}

/// HTTPRoutes and GRPCRoutes compete by how specific their matches are; VirtualServices follow one another, and do not
/// count where there is one of those.
fn http_index(routes: &[&CompiledRoute]) -> Option<Index> {
    let of = |family| routes.iter().filter(move |route| route.family == family);
    let entries = |family| -> Vec<Arc<Entry>> {
        of(family).flat_map(|route| &route.http).flat_map(|rule| &rule.entries).cloned().collect()
    };
    let entries = if of(Family::GatewayHttp).next().is_some() {
        let mut entries = entries(Family::GatewayHttp);
        // Stable: age, name and position decide what is left.
        entries.sort_by_key(|entry| entry.specificity);
        entries
    } else {
        entries(Family::VirtualService)
    };
    (!entries.is_empty()).then(|| Index::build(entries))
}

/// TLSRoutes come before TCPRoutes, and VirtualServices do not count where there is one of those.
fn tcp_entries(routes: &[&CompiledRoute]) -> Vec<Arc<TcpEntry>> {
    let of = |family| routes.iter().filter(move |route| route.family == family);
    let entries = |family| of(family).flat_map(|route| &route.tcp).cloned();
    let gateway = of(Family::GatewayTls).chain(of(Family::GatewayTcp)).next().is_some();
    if gateway {
        entries(Family::GatewayTls).chain(entries(Family::GatewayTcp)).collect()
    } else {
        entries(Family::VirtualService).collect()
    }
}
