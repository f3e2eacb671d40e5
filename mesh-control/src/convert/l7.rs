//! What waypoints are told beside the workload API: one resource per object, with names completed.
//!
//! Nothing is decided here that depends on which waypoint reads it: which objects count for a service, and in which
//! order, is the waypoint's business. What can be told of an object at once is said in its conditions.

mod credentials;
mod delegate;
mod destination;
mod gateway;
mod gateway_route;
mod istio_gateway;
mod report;
mod security;
mod services;
mod settings;
mod telemetry;
mod virtual_service;

pub(crate) use services::complete;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::xds::proto::l7 as wire;

use super::{Context, Resource, Resources};
use crate::model::{Key, Kind, Meta, ObjectRef};
pub(super) use gateway::is_one as is_gateway;
use report::Report;
use services::Services;

/// Resources for waypoints, by resource name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct L7 {
    /// VirtualServices, HTTPRoutes, GRPCRoutes, TCPRoutes, TLSRoutes.
    pub routes: BTreeMap<String, wire::Route>,
    /// DestinationRules.
    pub destinations: BTreeMap<String, wire::Destination>,
    /// AuthorizationPolicies with targets.
    pub authorizations: BTreeMap<String, wire::Authorization>,
    /// RequestAuthentications with targets.
    pub authentications: BTreeMap<String, wire::Authentication>,
    /// Labels, by workload uid.
    pub labels: BTreeMap<Arc<str>, Arc<Resource<wire::WorkloadLabels>>>,
    /// The one named `mesh`.
    pub settings: BTreeMap<String, wire::Settings>,
    /// Gateways that are served as such.
    pub gateways: BTreeMap<String, wire::Gateway>,
    /// Certificates of those, each for its own proxies only.
    pub credentials: BTreeMap<String, Confidential>,
    /// Telemetry objects.
    pub telemetries: BTreeMap<String, wire::Telemetry>,
}

/// What only the proxies of one service account are told.
#[derive(Debug, Clone, PartialEq)]
pub struct Confidential {
    /// Namespace and name of the service account.
    pub account: Key,
    /// The secret.
    pub credential: wire::Credential,
}

/// Name of the settings.
pub(crate) const SETTINGS: &str = "mesh";

/// Converts everything that is for waypoints. The services are those that the other parts have made.
pub(super) fn convert(context: &mut Context<'_>, resources: &mut Resources) {
    let services = Services::new(context, resources);
    let mut out = std::mem::take(&mut resources.l7);
    destination::convert(context, &services, &mut out);
    resources.attachments.listeners = gateway::convert(context, &mut out);
    gateway_route::convert(context, &services, &mut resources.attachments, &mut out);
    let servers = istio_gateway::convert(context, &mut out);
    virtual_service::convert(context, &services, &servers, &mut out);
    security::convert(context, &services, &mut out);
    telemetry::convert(context, &services, &mut out);
    out.settings.insert(SETTINGS.to_owned(), settings::settings(context));
    resources.l7 = out;
}

/// `<Kind>/<namespace>/<name>`.
fn resource_name(object: &ObjectRef) -> String {
    format!("{}/{}", object.kind, object.key)
}

fn origin(kind: Kind, meta: &Meta) -> wire::Origin {
    wire::Origin {
        kind: kind.to_string(),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        created: meta.created.unwrap_or_default(),
    }
}

/// `exportTo` with names of namespaces; everywhere where it says nothing.
fn exported_to(given: &[String], namespace: &str) -> Vec<String> {
    if given.is_empty() {
        return vec!["*".to_owned()];
    }
    let name = |to: &String| if [".", "~"].contains(&to.as_str()) { namespace } else { to }.to_owned();
    given.iter().map(name).collect()
}

/// The same of an object of which there is something to report.
fn exported(given: &[String], namespace: &str, report: &mut Report) -> Vec<String> {
    if given.iter().any(|to| to == "~") {
        report.unsupported("spec.exportTo[~] (to nobody: counts in its own namespace only)");
    }
    exported_to(given, namespace)
}

/// Gives every rule a name of its own.
fn name_rules<T>(rules: &mut [T], of: impl Fn(&mut T) -> &mut String) {
    let mut used = BTreeSet::new();
    for (i, rule) in rules.iter_mut().enumerate() {
        let name = of(rule);
        if name.is_empty() || used.contains(name) {
            let stem = if name.is_empty() { "rule" } else { name.as_str() };
            *name = format!("{stem}-{i}");
        }
        used.insert(name.clone());
    }
}
