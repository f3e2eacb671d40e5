//! What is said of requests: which Telemetry resources apply to a service, put together in Istio's order.
//!
//! Pure: resources in, one [`Observed`] per service, namespace, or for all that nothing else names, out.
//!
//! | module | for |
//! |---|---|
//! | `merge` | sections of several resources, the later ones over the earlier |
//! | [`tracing`] | which requests have spans, and where those go |
//! | [`logs`] | lines of the access log |
//! | [`metrics`] | which metrics there are, and with which labels |
//! | [`facts`] | what layouts and expressions read of a request |

pub mod facts;
pub mod logs;
mod merge;
pub mod metrics;
#[cfg(test)]
mod tests;
pub mod tracing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use self::logs::Logs;
use self::metrics::Metrics;
use self::tracing::Tracing;
use crate::config::{Own, Resources};
use crate::request::Addressed;
use crate::security::{Problem, attach};

/// What is said of the requests to one service.
#[derive(Debug, Default)]
pub struct Observed {
    /// None: contexts of traces go by untouched.
    pub tracing: Option<Arc<Tracing>>,
    /// Lines of the access log.
    pub logs: Logs,
    /// Metrics.
    pub metrics: Metrics,
}

/// What is said of requests, for all services.
#[derive(Debug, Default)]
pub struct Observation {
    /// By `namespace/hostname`, the hostname in lower case: services that are targets.
    services: BTreeMap<Str, Arc<Observed>>,
    /// Namespaces with Telemetry of their own.
    namespaces: BTreeMap<Str, Arc<Observed>>,
    /// Everything else.
    common: Arc<Observed>,
    problems: Vec<Problem>,
}

impl Observation {
    /// Puts the resources together.
    #[must_use]
    pub fn build(resources: &Resources, own: &Own) -> Self {
        let mut problems = Vec::new();
        let layers = Layers::of(resources, own, &mut problems);
        let providers = merge::Providers::new(&resources.settings, own, &mut problems);
        let merged = |namespace: &str, service: Option<&str>| {
            Arc::new(merge::merge(&layers.of_service(own, namespace, service), &providers))
        };
        let common = merged(&own.namespace, None);
        let of_namespace = |namespace: &Str| (namespace.clone(), merged(namespace, None));
        let namespaces = layers.by_namespace.keys().map(of_namespace).collect();
        let of_service = |key: &Str| {
            let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
            (key.clone(), merged(namespace, Some(key)))
        };
        let services = layers.targeted.iter().map(of_service).collect();
        Self { services, namespaces, common, problems }
    }

    /// What is said of requests to what a connection was opened to.
    #[must_use]
    pub fn of(&self, addressed: &Addressed) -> &Arc<Observed> {
        if self.services.is_empty() && self.namespaces.is_empty() {
            return &self.common;
        }
        let namespace = match addressed {
            Addressed::Service { key, .. } => {
                if let Some(found) = self.services.get(key) {
                    return found;
                }
                key.split_once('/').map_or("", |(namespace, _)| namespace)
            }
            Addressed::Workload { workload, .. } => &workload.namespace,
            Addressed::Gateway { .. } => "",
        };
        self.namespaces.get(namespace).unwrap_or(&self.common)
    }

    /// What could not be honoured as it is written.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// Telemetry resources by what they are attached to.
#[derive(Debug, Default)]
struct Layers<'a> {
    root: Option<&'a l7::Telemetry>,
    /// Without targets, by namespace; not those of the root namespace.
    by_namespace: BTreeMap<Str, &'a l7::Telemetry>,
    /// With targets, the oldest first: of all that goes through this proxy, or of services.
    with_targets: Vec<(bool, Vec<Str>, &'a l7::Telemetry)>,
    /// Services that are targets.
    targeted: BTreeSet<Str>,
}

impl<'a> Layers<'a> {
    fn of(resources: &'a Resources, own: &Own, problems: &mut Vec<Problem>) -> Self {
        let settings = &*resources.settings;
        let mut all: Vec<&l7::Telemetry> = resources.telemetries.values().map(|held| &**held).collect();
        let origin = |held: &'a l7::Telemetry| {
            held.origin.as_ref().map_or((0, ""), |origin| (origin.created, origin.name.as_str()))
        };
        all.sort_by_key(|held| origin(held));
        let mut layers = Self::default();
        for held in all {
            let namespace = held.origin.as_ref().map_or("", |origin| origin.namespace.as_str());
            if !held.targets.is_empty() {
                let attachment = attach(&held.targets, held.origin.as_ref(), own, settings, problems);
                layers.targeted.extend(attachment.services.iter().cloned());
                layers.with_targets.push((attachment.everything, attachment.services, held));
            } else if namespace == settings.root_namespace {
                // Of several the oldest counts, as in Istio.
                layers.root.get_or_insert(held);
            } else {
                layers.by_namespace.entry(namespace.into()).or_insert(held);
            }
        }
        layers
    }

    /// Those of one service, the most general first (Istio's order at waypoints).
    fn of_service(&self, own: &Own, namespace: &str, service: Option<&str>) -> Vec<&'a l7::Telemetry> {
        let mut layers: Vec<&l7::Telemetry> = self.root.into_iter().collect();
        layers.extend(self.by_namespace.get(own.namespace.as_str()));
        if namespace != own.namespace {
            layers.extend(self.by_namespace.get(namespace));
        }
        // What is attached to the gateway comes before what is attached to the service.
        layers.extend(self.with_targets.iter().filter(|(all, ..)| *all).map(|(.., held)| held));
        let named =
            |services: &[Str]| service.is_some_and(|key| services.iter().any(|known| **known == *key));
        let with = self.with_targets.iter().filter(|(all, services, _)| !all && named(services));
        layers.extend(with.map(|(.., held)| held));
        layers
    }
}
