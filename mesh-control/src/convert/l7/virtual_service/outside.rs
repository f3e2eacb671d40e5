//! VirtualServices at gateways: which of their rules count at a server, and for which hosts.

use mesh_core::xds::proto::l7 as wire;

use super::super::istio_gateway::{Bound, Takes};
use super::super::{exported_to, origin};
use super::{At, Place, Report, Scope};
use crate::model::l7::MESH_GATEWAY;
use crate::model::{Key, Kind, VirtualService};

/// What a VirtualService comes to at gateways.
#[derive(Debug, Default)]
pub(super) struct Outside {
    /// Without names.
    pub(super) routes: Vec<wire::Route>,
    /// Routes that redirect, and further hosts that they have to be for: a rule for a host of its own would come before.
    pub(super) redirected: Vec<(String, Vec<String>)>,
    /// Why it is at none of the gateways that it names.
    pub(super) without: Vec<String>,
}

/// The Gateway that `gateways` names, from an object of a namespace.
pub(super) fn gateway_key(name: &str, namespace: &str) -> Key {
    match name.split_once('/') {
        Some((namespace, name)) => Key::new(namespace, name),
        None => Key::new(namespace, name),
    }
}

impl Scope<'_> {
    /// Its rules at each server that it is bound to.
    pub(super) fn outside(&self, service: &VirtualService, hosts: &[String], report: &mut Report) -> Outside {
        let mut out = Outside::default();
        let namespace = &service.meta.namespace;
        let visible = exported_to(&service.export_to, namespace);
        for (i, name) in service.gateways.iter().enumerate().filter(|(_, name)| *name != MESH_GATEWAY) {
            let key = gateway_key(name, namespace);
            let servers = match self.servers.of(&key) {
                Ok(servers) => servers,
                Err(why) => {
                    report.unresolved("GatewayNotFound", format!("spec.gateways[{i}]: {why}"));
                    out.without.push(why);
                    continue;
                }
            };
            let mut met = false;
            for bound in servers {
                let common = bound.common(hosts, namespace);
                let is_visible = visible.iter().any(|to| to == "*" || *to == bound.proxies.namespace);
                if common.is_empty() || !is_visible {
                    continue;
                }
                met = true;
                self.at_server(service, bound, common, &mut out, report);
            }
            if !met {
                let why = format!(
                    "spec.gateways[{i}]: no server of {} {key} is for its hosts and namespace",
                    Kind::IstioGateway
                );
                out.without.push(why.clone());
                report.overruled(why);
            }
        }
        out
    }

    fn at_server(
        &self,
        service: &VirtualService,
        bound: &Bound,
        common: Vec<String>,
        out: &mut Outside,
        report: &mut Report,
    ) {
        let route = |http, tcp, hostnames| wire::Route {
            origin: Some(origin(Kind::VirtualService, &service.meta)),
            http,
            tcp,
            gateways: bound.listeners.clone(),
            hostnames,
            ..wire::Route::default()
        };
        match bound.takes {
            Takes::Http => {
                let http = self.http_rules(service, At::Server(bound), report);
                if !http.is_empty() {
                    let further = bound.redirect.iter().map(|name| (name.clone(), common.clone()));
                    out.redirected.extend(further);
                    out.add(route(http, Vec::new(), common));
                }
            }
            Takes::Tcp => {
                let tcp = self.tcp_rules(service, At::Server(bound), report);
                if !tcp.is_empty() {
                    out.add(route(Vec::new(), tcp, common));
                }
            }
            Takes::Tls => {
                for (hostnames, rule) in self.passed(service, bound, report) {
                    out.add(route(Vec::new(), vec![rule], hostnames));
                }
            }
        }
    }

    /// Rules for TLS that is passed on, each with the names that clients ask for.
    fn passed(
        &self,
        service: &VirtualService,
        bound: &Bound,
        report: &mut Report,
    ) -> Vec<(Vec<String>, wire::TcpRule)> {
        let mut rules = Vec::new();
        for (i, rule) in service.tls.iter().enumerate() {
            let field = format!("spec.tls[{i}]");
            let place = Place { namespace: &service.meta.namespace, field: &field, at: At::Server(bound) };
            for given in &rule.matches {
                let names = bound.common(&given.wire.sni_hosts, &service.meta.namespace);
                let mut one = rule.clone();
                one.matches = vec![given.clone()];
                one.matches[0].wire.sni_hosts.clear();
                let Some(mut converted) = self.tcp(&one, &place, report).filter(|_| !names.is_empty()) else {
                    continue;
                };
                converted.name = format!("rule-{i}");
                rules.push((names, converted));
            }
        }
        rules
    }
}

impl Outside {
    /// The same rules for the same hosts are told of once.
    fn add(&mut self, route: wire::Route) {
        let same = |known: &&mut wire::Route| {
            known.hostnames == route.hostnames && known.http == route.http && known.tcp == route.tcp
        };
        match self.routes.iter_mut().find(same) {
            Some(known) => known.gateways.extend(route.gateways),
            None => self.routes.push(route),
        }
    }
}
