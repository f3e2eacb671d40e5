//! Rules for connections.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ipnet::IpNet;
use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use super::matching::source_namespace;
use super::pattern::Patterns;
use super::problem::Invalid;
use super::rule::{Compiler, Forward};
use crate::request::Source;

/// A rule: where connections that fall under it go.
#[derive(Debug)]
pub struct TcpRule {
    /// `<Kind>/<namespace>/<name>` of its object.
    pub resource: Str,
    /// Unique in its object.
    pub name: Str,
    /// Services with their shares.
    pub forward: Forward,
    /// Why the rule cannot be honoured: its connections are reset.
    pub invalid: Option<Str>,
    /// Connections that fell under it since it was compiled.
    pub hits: AtomicU64,
}

/// A rule with its matches.
#[derive(Debug)]
pub(super) struct TcpEntry {
    matches: Vec<TcpMatch>,
    pub(super) rule: Arc<TcpRule>,
}

#[derive(Debug)]
struct TcpMatch {
    /// 0 is every port.
    port: u16,
    /// Names that a TLS client asks for.
    hosts: Vec<Box<str>>,
    subnets: Vec<IpNet>,
    source_subnets: Vec<IpNet>,
    source_namespace: Box<str>,
    source_labels: BTreeMap<String, String>,
}

impl TcpEntry {
    /// The rule, and what is wrong in it with whether that is fatal.
    pub(super) fn compile(
        resource: &Str,
        msg: &l7::TcpRule,
        patterns: &Patterns,
    ) -> (Self, Vec<(Invalid, bool)>) {
        let mut errors = Vec::new();
        let matches = msg.matches.iter().enumerate().map(|(at, matching)| {
            TcpMatch::compile(matching, &mut |e: Invalid| errors.push(e.within(format!("matches[{at}]"))))
        });
        let matches = matches.collect();
        let mut cx = Compiler { patterns, without_effect: Vec::new() };
        let forward = Forward::compile(&msg.backends, &mut cx).unwrap_or_else(|error| {
            errors.push(error);
            Forward::none()
        });
        let invalid = errors.first().map(|error| format!("{}: {}", error.field, error.reason).into());
        let rule = Arc::new(TcpRule {
            resource: resource.clone(),
            name: msg.name.as_str().into(),
            forward,
            invalid,
            hits: AtomicU64::new(0),
        });
        let without_effect = cx.without_effect.into_iter().map(|error| (error, false));
        let all = errors.into_iter().map(|error| (error, true)).chain(without_effect);
        (Self { matches, rule }, all.collect())
    }

    /// What its matches ask for, for people.
    pub(super) fn describe(&self) -> Vec<String> {
        self.matches.iter().map(TcpMatch::describe).filter(|text| !text.is_empty()).collect()
    }

    /// Whether a connection to a port of a service, or of a gateway, falls under the rule.
    pub(super) fn test(
        &self,
        hostname: Option<&str>,
        port: u16,
        source: &Source,
        destination: IpAddr,
    ) -> bool {
        self.matches.is_empty()
            || self.matches.iter().any(|matching| matching.test(hostname, port, source, destination))
    }
}

impl TcpMatch {
    fn compile(msg: &l7::TcpMatch, error: &mut dyn FnMut(Invalid)) -> Self {
        let port = u16::try_from(msg.port).unwrap_or_else(|_| {
            error(Invalid::new("port", format!("{} is no port (0 to 65535)", msg.port)));
            0
        });
        let mut nets = |field: &str, given: &[String]| {
            let mut nets = Vec::new();
            for subnet in given {
                let address = || subnet.parse::<IpAddr>().map(IpNet::from);
                match subnet.parse::<IpNet>().or_else(|_| address()) {
                    Ok(net) => nets.push(net),
                    Err(_) => {
                        error(Invalid::new(field, format!("{subnet:?} is no address, nor address/length")));
                    }
                }
            }
            nets
        };
        let subnets = nets("destination_subnets", &msg.destination_subnets);
        let source_subnets = nets("source_subnets", &msg.source_subnets);
        Self {
            port,
            hosts: msg.sni_hosts.iter().map(|host| host.to_ascii_lowercase().into()).collect(),
            subnets,
            source_subnets,
            source_namespace: msg.source_namespace.as_str().into(),
            source_labels: msg.source_labels.clone(),
        }
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        if self.port != 0 {
            parts.push(format!("port {}", self.port));
        }
        if !self.hosts.is_empty() {
            parts.push(format!("name {}", self.hosts.join(" or ")));
        }
        parts.extend(self.subnets.iter().map(|subnet| format!("destination {subnet}")));
        parts.extend(self.source_subnets.iter().map(|subnet| format!("source {subnet}")));
        if !self.source_namespace.is_empty() {
            parts.push(format!("source namespace is {}", self.source_namespace));
        }
        parts.extend(self.source_labels.iter().map(|(key, value)| format!("source label {key} is {value}")));
        parts.join(", ")
    }

    /// The name that a TLS client asks for is not read here: a rule for the service's own name, and no other, counts
    /// (Istio at waypoints).
    fn test(&self, hostname: Option<&str>, port: u16, source: &Source, destination: IpAddr) -> bool {
        let host = match (&*self.hosts, hostname) {
            ([], _) | (_, None) => true,
            ([host], Some(hostname)) => **host == *hostname,
            _ => false,
        };
        let within =
            |nets: &[IpNet], address| nets.is_empty() || nets.iter().any(|net| net.contains(&address));
        let labels = |(key, value): (&String, &String)| {
            source.labels.as_ref().and_then(|labels| labels.get(key)) == Some(value)
        };
        host && (self.port == 0 || self.port == port)
            && within(&self.subnets, destination)
            && within(&self.source_subnets, source.address.ip())
            && (self.source_namespace.is_empty() || source_namespace(source) == Some(&self.source_namespace))
            && self.source_labels.iter().all(labels)
    }
}
