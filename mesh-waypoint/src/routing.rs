//! Which rule a request falls under, and what the rule does to it.
//!
//! [`Routes`] is compiled from the route objects of both API families and finds the [`Rule`] of a request; the rule says
//! what becomes of it. Nothing here waits, keeps time or draws random numbers: those are arguments.
//!
//! | module | for |
//! |---|---|
//! | `compiled` | one object's rules, shared with its last version where they did not change |
//! | `table` | which objects count for a service, and in what order |
//! | `index` | the first match among many, at a cost that does not grow with those that do not match |
//! | `matching`, `pattern` | what a match asks for |
//! | `rule` | what a rule does: backends by weight, and the parts below |
//! | `headers`, `rewrite`, `cors`, `fault` | edits, rewrites and redirects, other origins, faults and mirrors |
//! | `tcp` | rules for connections |
//! | `problem` | what is wrong with an object's rules |

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_core::state::{MeshState, Str};

use crate::config::{Own, Resources};
use crate::request::{Addressed, Head, Source};

mod compiled;
mod cors;
mod fault;
mod headers;
mod index;
mod matching;
mod pattern;
mod problem;
mod rewrite;
mod rule;
mod table;
mod tcp;
#[cfg(test)]
mod tests;

use compiled::CompiledRoute;
pub use cors::Cors;
pub use fault::{Abort, Fault, Injected, Mirror, Share, shadow_authority};
pub use headers::HeaderEdits;
pub use matching::MatchedPath;
pub use problem::Problem;
pub use rewrite::{Redirect, Rewrite, RewriteError};
pub use rule::{Action, Backend, DirectResponse, Forward, RateLimit, Rule, WeightedBackend};
use table::{Named, ServiceRules};
pub use tcp::TcpRule;

/// Rules of all services, compiled. A clone shares everything.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    /// By name of the resource.
    objects: Arc<BTreeMap<String, Arc<CompiledRoute>>>,
    /// By `namespace/hostname`; only services that have rules.
    services: Arc<HashMap<Str, Arc<ServiceRules>>>,
    patterns: pattern::Patterns,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy)]
pub enum Routed<'a> {
    /// What the rule says.
    Rule(Matched<'a>),
    /// There are no rules: it goes where it is addressed to.
    Default,
    /// There are rules, and none is for it: 404.
    NotFound,
}

/// A rule, and what of the request it has matched.
#[derive(Debug, Clone, Copy)]
pub struct Matched<'a> {
    /// The rule.
    pub rule: &'a Arc<Rule>,
    /// What a prefix is replaced in, by rewrites and redirects.
    pub path: MatchedPath,
    /// Name of the match; mostly empty.
    pub match_name: &'a str,
}

impl Routes {
    /// Compiles all rules; what did not change since `previous` is shared with it.
    #[must_use]
    pub fn build(resources: &Resources, mesh: &MeshState, own: &Own, previous: &Self) -> Self {
        let patterns = previous.patterns.clone();
        let compile = |(name, route): (&String, &Arc<_>)| {
            let known = previous.objects.get(name);
            (name.clone(), CompiledRoute::compile(name, route, &patterns, known))
        };
        let objects: BTreeMap<_, _> = resources.routes.iter().map(compile).collect();
        let services = name_services(&objects, mesh, own).into_iter().map(|(key, named)| {
            let rules = ServiceRules::build(named, previous.services.get(&key));
            (key, rules)
        });
        let services = services.collect();
        Self { objects: Arc::new(objects), services: Arc::new(services), patterns }
    }

    /// The rule of a request.
    #[must_use]
    pub fn http(&self, head: &Head<'_>) -> Routed<'_> {
        // Rules are for services: what is sent to a workload itself goes there.
        let Addressed::Service { key, port } = head.addressed else { return Routed::Default };
        let index = self.services.get(key).and_then(|rules| rules.port(*port).http.as_ref());
        let Some(index) = index else { return Routed::Default };
        match index.find(head, *port) {
            Some((entry, path)) => {
                Routed::Rule(Matched { rule: &entry.rule, path, match_name: &entry.matching.name })
            }
            None => Routed::NotFound,
        }
    }

    /// The rule of a connection whose bytes are not looked into. `None`: it goes where it is addressed to.
    #[must_use]
    pub fn tcp(
        &self,
        addressed: &Addressed,
        source: &Source,
        destination: std::net::IpAddr,
    ) -> Option<&Arc<TcpRule>> {
        let Addressed::Service { key, port } = addressed else { return None };
        let hostname = key.split_once('/').map_or("", |(_, hostname)| hostname);
        self.services.get(key)?.port(*port).tcp(hostname, *port, source, destination)
    }

    /// What is wrong with the rules, by object.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.objects.values().flat_map(|object| {
            object.problems.iter().chain(object.http.iter().flat_map(|rule| &rule.problems))
        })
    }
}

/// The objects that count for each service, in the order of precedence.
fn name_services(
    objects: &BTreeMap<String, Arc<CompiledRoute>>,
    mesh: &MeshState,
    own: &Own,
) -> HashMap<Str, Vec<Named>> {
    let mut sorted: Vec<_> = objects.values().collect();
    sorted.sort_by_key(|route| route.precedence());
    let mut named: HashMap<Str, Vec<Named>> = HashMap::new();
    for route in sorted {
        for parent in &route.source.parents {
            let Ok(port) = u16::try_from(parent.port) else { continue };
            let mut add = |service: &mesh_core::state::Service| {
                let host = &service.host;
                let namespace = parent.namespace.is_empty() || parent.namespace == host.namespace();
                if namespace && table::counts(route, host.namespace(), own) {
                    named.entry(host.key().clone()).or_default().push((route.clone(), port));
                }
            };
            match parent.hostname.strip_prefix('*') {
                // A service may itself be a wildcard; a name with `*.` in front covers those within.
                Some(suffix) => {
                    let covered = mesh.services().filter(|s| s.service.host.hostname().ends_with(suffix));
                    covered.for_each(|service| add(&service.service));
                }
                None => mesh.services_by_hostname(&parent.hostname).for_each(|s| add(&s.service)),
            }
        }
    }
    named
}
