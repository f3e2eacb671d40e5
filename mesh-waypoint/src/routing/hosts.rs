//! Rules of a gateway's listeners, by port and host.

use std::borrow::Cow;
use std::sync::Arc;

use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use super::quick::QuickMap;
use super::rewrite::split_port;
use super::table::ServiceRules;

/// Listeners' rules are compiled as those of services are, under names that no service has.
const MARK: char = ':';

/// The name of a listener's host among those of services.
pub(super) fn key(port: u16, host: &str) -> Str {
    format!("{MARK}{port}/{host}").into()
}

/// Rules by port and host.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    ports: Vec<(u16, PortHosts)>,
}

#[derive(Debug, Default)]
struct PortHosts {
    exact: QuickMap<Str, Arc<ServiceRules>>,
    /// By what follows the `*`: the longest that fits counts.
    wildcards: QuickMap<Str, Arc<ServiceRules>>,
    any: Option<Arc<ServiceRules>>,
}

impl Hosts {
    /// Takes out of all rules those of listeners.
    pub(super) fn of(services: &QuickMap<Str, Arc<ServiceRules>>) -> Self {
        let mut hosts = Self::default();
        for (key, rules) in services {
            let Some((port, host)) = key.strip_prefix(MARK).and_then(|key| key.split_once('/')) else {
                continue;
            };
            let Ok(port) = port.parse() else { continue };
            let at = hosts.ports.iter().position(|(known, _)| *known == port).unwrap_or_else(|| {
                hosts.ports.push((port, PortHosts::default()));
                hosts.ports.len() - 1
            });
            let known = &mut hosts.ports[at].1;
            match host.strip_prefix('*') {
                Some("") => known.any = Some(Arc::clone(rules)),
                Some(suffix) => drop(known.wildcards.insert(suffix.into(), Arc::clone(rules))),
                None => drop(known.exact.insert(host.into(), Arc::clone(rules))),
            }
        }
        hosts
    }

    /// The rules for a request to a port: those of its host, else of the longest wildcard that covers it.
    pub(super) fn find(&self, port: u16, authority: &str) -> Option<&Arc<ServiceRules>> {
        let hosts = &self.ports.iter().find(|(known, _)| *known == port)?.1;
        let (host, _) = split_port(authority);
        let host = if host.bytes().any(|b| b.is_ascii_uppercase()) {
            Cow::Owned(host.to_ascii_lowercase())
        } else {
            Cow::Borrowed(host)
        };
        let wildcard = || {
            let dots = host.match_indices('.').filter(|(at, _)| *at > 0);
            dots.map(|(at, _)| &host[at..]).find_map(|suffix| hosts.wildcards.get(suffix))
        };
        let wildcard = || if hosts.wildcards.is_empty() { None } else { wildcard() };
        hosts.exact.get(&*host).or_else(wildcard).or(hosts.any.as_ref())
    }
}

/// The hosts that a route's rules take of a listener.
pub(super) fn common(listener: &l7::gateway::Listener, hostnames: &[String]) -> Vec<String> {
    let own = if listener.hostname.is_empty() { "*" } else { &listener.hostname };
    if hostnames.is_empty() {
        return vec![own.to_ascii_lowercase()];
    }
    let both = hostnames.iter().filter_map(|host| {
        let narrower = if host == own || covers(own, host) {
            host
        } else if covers(host, own) {
            &listener.hostname
        } else {
            return None;
        };
        Some(narrower.to_ascii_lowercase())
    });
    both.collect()
}

/// Whether requests for a host are another listener's, whose hostname is a narrower one on the same port: of all listeners
/// that a request fits, only the narrowest takes it, also where another's route has the narrower host.
pub(super) fn is_of_narrower(
    listener: &l7::gateway::Listener,
    all: &[l7::gateway::Listener],
    host: &str,
) -> bool {
    let own = if listener.hostname.is_empty() { "*" } else { &listener.hostname };
    all.iter().any(|other| {
        let (theirs, host) = (other.hostname.to_ascii_lowercase(), host.to_ascii_lowercase());
        let narrower = !theirs.is_empty() && theirs != *own && covers(own, &theirs);
        other.port == listener.port && narrower && (theirs == host || covers(&theirs, &host))
    })
}

/// Whether a host, which may be `*` or `*.domain`, stands for another.
fn covers(host: &str, other: &str) -> bool {
    host.strip_prefix('*').is_some_and(|suffix| other.len() > suffix.len() && other.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(hostname: &str) -> l7::gateway::Listener {
        l7::gateway::Listener {
            name: "http".into(),
            port: 80,
            hostname: hostname.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_host_is_taken_by_the_narrowest_listener_of_its_port() {
        let all = ["", "*.example.com", "*.foo.example.com", "abc.foo.example.com"].map(listener);
        let taken = |own: usize, host: &str| !is_of_narrower(&all[own], &all, host);
        assert!(taken(0, "bar.com") && taken(0, "*"));
        assert!(!taken(0, "bar.example.com") && !taken(0, "*.example.com"));
        assert!(taken(1, "bar.example.com") && !taken(1, "bar.foo.example.com"));
        assert!(taken(2, "bar.foo.example.com") && !taken(2, "abc.foo.example.com"));
        assert!(taken(3, "abc.foo.example.com"));
        let elsewhere = [listener(""), l7::gateway::Listener { port: 81, ..listener("a.example") }];
        assert!(!is_of_narrower(&elsewhere[0], &elsewhere, "a.example"), "another port is no rival");
    }

    #[test]
    fn of_a_listeners_and_a_routes_hosts_the_narrower_counts() {
        let both = |own: &str, hosts: &[&str]| {
            let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
            common(&listener(own), &hosts)
        };
        assert_eq!(both("", &[]), ["*"]);
        assert_eq!(both("a.example", &[]), ["a.example"]);
        assert_eq!(both("", &["A.example", "*.b.example"]), ["a.example", "*.b.example"]);
        assert_eq!(both("*.example", &["a.example", "b.test"]), ["a.example"]);
        assert_eq!(both("a.example", &["*.example"]), ["a.example"]);
        assert_eq!(both("*.example", &["*.a.example", "example"]), ["*.a.example"]);
    }
}
