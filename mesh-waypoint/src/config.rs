//! What the control plane says, as one immutable snapshot.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_core::state::{Locality, MeshState, Str};
use mesh_core::xds::proto::l7;

use crate::observe::Observation;
use crate::ports::{Credentials, Ports};
use crate::routing::{RouteSource, Routes};
use crate::security::Policies;
use crate::security::jwks::KeyStore;
use crate::upstream::Destinations;

/// Labels of a workload.
pub type Labels = BTreeMap<String, String>;

/// Whether what an object of namespace `own` says is for proxies of a namespace (`exportTo`).
pub(crate) fn is_exported(exported_to: &[String], own: &str, namespace: &str) -> bool {
    exported_to.is_empty()
        || exported_to.iter().any(|to| to == "*" || to == namespace || (to == "." && own == namespace))
}

/// Which waypoint this is.
#[derive(Debug, Clone, Default)]
pub struct Own {
    /// Namespace of the Gateway.
    pub namespace: String,
    /// Name of the Gateway.
    pub gateway: String,
    /// Class of the Gateway.
    pub class: String,
    /// Hostname by which services and workloads name it as theirs.
    pub hostname: String,
    /// Network of this process.
    pub network: String,
    /// Where this process runs.
    pub locality: Locality,
    /// Node that this process runs on; empty when unknown.
    pub node: String,
    /// What it does.
    pub role: Role,
}

/// What the process stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Role {
    /// Before services and workloads that are bound to it: takes tunnels of peers.
    #[default]
    Waypoint,
    /// A way into the mesh: takes requests of clients that are no peers, on its Gateway's listeners.
    Gateway,
}

impl Role {
    /// The class of Gateways of this role.
    #[must_use]
    pub const fn class(self) -> &'static str {
        match self {
            Self::Waypoint => "istio-waypoint",
            Self::Gateway => "istio",
        }
    }
}

/// The resources for waypoints as they came, by resource name.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    /// Routes of both API families.
    pub routes: BTreeMap<String, RouteSource>,
    /// Destination rules.
    pub destinations: BTreeMap<String, Arc<l7::Destination>>,
    /// Policies with targets.
    pub authorizations: BTreeMap<String, Arc<l7::Authorization>>,
    /// Token rules with targets.
    pub authentications: BTreeMap<String, Arc<l7::Authentication>>,
    /// Labels by workload uid.
    pub labels: Arc<HashMap<Str, Arc<Labels>>>,
    /// Mesh settings.
    pub settings: Arc<l7::Settings>,
    /// Gateways that are no waypoints.
    pub gateways: BTreeMap<String, Arc<l7::Gateway>>,
    /// Certificates of the Gateway that this process serves.
    pub credentials: Credentials,
    /// What is said of requests.
    pub telemetries: BTreeMap<String, Arc<l7::Telemetry>>,
}

impl Resources {
    /// The Gateway that this process serves, if it is one.
    #[must_use]
    pub fn gateway(&self, own: &Own) -> Option<&Arc<l7::Gateway>> {
        let key = || format!("Gateway/{}/{}", own.namespace, own.gateway);
        if own.role == Role::Gateway { self.gateways.get(&key()) } else { None }
    }
}

/// Which families of resources differ from the last snapshot: the others are taken from it as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools, reason = "a set of families, each of which is asked for by name")]
pub struct Changed {
    /// Routes.
    pub routes: bool,
    /// Destinations.
    pub destinations: bool,
    /// Authorizations and authentications.
    pub policies: bool,
    /// Services: their names and ports, not their endpoints.
    pub services: bool,
    /// Telemetry.
    pub telemetry: bool,
    /// Gateways and their certificates.
    pub ports: bool,
}

impl Changed {
    /// Everything.
    pub const ALL: Self = Self {
        routes: true,
        destinations: true,
        policies: true,
        services: true,
        telemetry: true,
        ports: true,
    };
}

/// Everything a request is decided by, at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// Which waypoint this is.
    pub own: Arc<Own>,
    /// Workloads and services.
    pub mesh: Arc<MeshState>,
    /// Labels by workload uid.
    pub labels: Arc<HashMap<Str, Arc<Labels>>>,
    /// Mesh settings.
    pub settings: Arc<l7::Settings>,
    /// The Gateway that is served, in that role.
    pub gateway: Option<Arc<l7::Gateway>>,
    /// Its ports.
    pub ports: Arc<Ports>,
    /// Rules by service.
    pub routes: Routes,
    /// Policies of destinations.
    pub destinations: Destinations,
    /// Policies of requests.
    pub policies: Arc<Policies>,
    /// What is said of requests.
    pub observation: Arc<Observation>,
}

impl Snapshot {
    /// Puts the resources together; families that have not `changed` come from `last`. Rules with a `jwksUri` find their
    /// keys in `keys`.
    #[must_use]
    pub fn compile(
        own: &Arc<Own>,
        mesh: Arc<MeshState>,
        resources: &Resources,
        changed: Changed,
        last: Option<&Self>,
        keys: &KeyStore,
    ) -> Self {
        let kept = |changed: bool| last.filter(|_| !changed);
        let routes = kept(changed.routes || changed.services).map_or_else(
            || {
                let none = Routes::default();
                Routes::build(resources, &mesh, own, last.map_or(&none, |last| &last.routes))
            },
            |last| last.routes.clone(),
        );
        let destinations = kept(changed.destinations)
            .map_or_else(|| Destinations::build(resources, own), |last| last.destinations.clone());
        let policies = kept(changed.policies).map_or_else(
            || Arc::new(Policies::build(resources, own, keys)),
            |last| Arc::clone(&last.policies),
        );
        let observation = kept(changed.telemetry).map_or_else(
            || Arc::new(Observation::build(resources, own)),
            |last| Arc::clone(&last.observation),
        );
        let gateway = resources.gateway(own).cloned();
        let ports = kept(changed.ports).map_or_else(
            || {
                let last = last.map(|last| &*last.ports);
                Arc::new(Ports::build(gateway.as_deref(), &resources.credentials, last))
            },
            |last| Arc::clone(&last.ports),
        );
        Self {
            own: Arc::clone(own),
            mesh,
            labels: Arc::clone(&resources.labels),
            settings: Arc::clone(&resources.settings),
            gateway,
            ports,
            routes,
            destinations,
            policies,
            observation,
        }
    }
}
