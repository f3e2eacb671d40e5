//! Tests of the upstream side: a small mesh, its rules, and what comes of them.

mod balance;
mod destinations;
mod hashing;
mod limits;
mod locality;
mod outlier;
mod rate;
mod retry;
mod threads;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::state::{Locality, MeshOptions, StateIndex, Str};
use mesh_core::xds::proto::{l7, workload as wire};

use super::*;
use crate::config::{Labels, Own, Resources};

const WEB: &str = "shop/web.shop.svc.cluster.local";
const HOST: &str = "web.shop.svc.cluster.local";

/// A mesh under construction, with the clusters of a waypoint of namespace `shop` in region r1, zone a, subzone 1.
struct World {
    index: StateIndex,
    resources: Resources,
    own: Arc<Own>,
    clusters: Clusters,
    start: Instant,
    rng: fastrand::Rng,
}

impl World {
    fn new() -> Self {
        let start = Instant::now();
        let settings = l7::Settings { root_namespace: "istio-system".into(), ..l7::Settings::default() };
        let own = Own {
            namespace: "shop".into(),
            gateway: "waypoint".into(),
            locality: place("r1/a/1"),
            node: "n1".into(),
            ..Own::default()
        };
        Self {
            index: StateIndex::new(MeshOptions::default()),
            resources: Resources { settings: Arc::new(settings), ..Resources::default() },
            own: Arc::new(own),
            clusters: Clusters::new(start),
            start,
            rng: fastrand::Rng::with_seed(7),
        }
    }

    /// Service `web` with port 80 and so many endpoints, `web-0` and so on.
    fn with_endpoints(count: usize) -> Self {
        let mut world = Self::new();
        world.service(service());
        for n in 0..count {
            world.pod(pod(n));
        }
        world
    }

    fn service(&mut self, service: wire::Service) {
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        self.index.apply_address("", &address).unwrap();
    }

    fn pod(&mut self, workload: wire::Workload) {
        let address = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) };
        self.index.apply_address("", &address).unwrap();
    }

    fn remove(&mut self, n: usize) {
        self.index.remove_address(&uid(n));
    }

    fn labels(&mut self, n: usize, labels: &[(&str, &str)]) {
        let labels: Labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Arc::make_mut(&mut self.resources.labels).insert(uid(n).into(), Arc::new(labels));
    }

    fn rule(&mut self, rule: l7::Destination) {
        let origin = rule.origin.clone().unwrap();
        let name = format!("{}/{}/{}", origin.kind, origin.namespace, origin.name);
        self.resources.destinations.insert(name, Arc::new(rule));
    }

    /// The rule of `web` with this policy.
    fn policy(&mut self, policy: l7::TrafficPolicy) {
        self.rule(l7::Destination { policy: Some(policy), ..rule("shop", "web") });
    }

    fn settings(&mut self, change: impl FnOnce(&mut l7::Settings)) {
        change(Arc::make_mut(&mut self.resources.settings));
    }

    fn at(&self, millis: u64) -> Instant {
        self.start + Duration::from_millis(millis)
    }

    /// Takes over everything that was changed.
    fn apply(&mut self, millis: u64) {
        let destinations = Destinations::build(&self.resources, &self.own);
        let labels = self.resources.labels.clone();
        let view = View::new(self.own.clone(), self.index.snapshot(), labels, destinations);
        self.clusters.apply(view, self.at(millis));
    }

    /// Port 80 of `web`, after taking over what was changed.
    fn web(&mut self) -> Arc<Cluster> {
        self.apply(0);
        self.subset("").unwrap()
    }

    fn subset(&self, subset: &str) -> Result<Arc<Cluster>, UnknownCluster> {
        self.clusters.cluster(&key(subset), self.start)
    }

    /// The name of the endpoint that one request goes to.
    fn pick(&mut self, cluster: &Arc<Cluster>) -> String {
        self.pick_with(cluster, &PickContext::new(self.start))
    }

    fn pick_with(&mut self, cluster: &Arc<Cluster>, context: &PickContext<'_>) -> String {
        name(&cluster.pick(context, &mut self.rng).unwrap())
    }

    /// How many of so many requests each endpoint gets; each ends before the next.
    fn spread(&mut self, cluster: &Arc<Cluster>, millis: u64, requests: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        let context = PickContext::new(self.at(millis));
        for _ in 0..requests {
            *counts.entry(self.pick_with(cluster, &context)).or_default() += 1;
        }
        counts
    }

    /// Names of the endpoints that get requests.
    fn used(&mut self, cluster: &Arc<Cluster>, millis: u64) -> Vec<String> {
        self.spread(cluster, millis, 400).into_keys().collect()
    }

    /// Picks until an endpoint takes the request, and tells how it went.
    fn report(&mut self, cluster: &Arc<Cluster>, n: usize, outcomes: &[Outcome], millis: u64) {
        let now = self.at(millis);
        for outcome in outcomes {
            let picked = loop {
                let picked = cluster.pick(&PickContext::new(now), &mut self.rng).unwrap();
                if name(&picked) == format!("web-{n}") {
                    break picked;
                }
            };
            picked.report(*outcome, now);
        }
    }
}

fn key(subset: &str) -> ClusterKey {
    ClusterKey::service(&Str::from(WEB), 80, subset)
}

fn name(picked: &Picked) -> String {
    picked.endpoint().workload.as_ref().map_or_else(String::new, |workload| workload.name.to_string())
}

fn uid(n: usize) -> String {
    format!("Kubernetes//Pod/shop/web-{n}")
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn pod(n: usize) -> wire::Workload {
    wire::Workload {
        uid: uid(n),
        name: format!("web-{n}"),
        namespace: "shop".into(),
        addresses: vec![bytes(&format!("10.0.{}.{}", n / 250, n % 250 + 1))],
        service_account: "web".into(),
        node: "n9".into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        services: [(WEB.to_owned(), wire::PortList::default())].into(),
        ..wire::Workload::default()
    }
}

/// The same with a weight.
fn weighted(n: usize, capacity: u32) -> wire::Workload {
    wire::Workload { capacity: Some(capacity), ..pod(n) }
}

/// The same in `region/zone/subzone`.
fn placed(n: usize, place: &str) -> wire::Workload {
    let mut parts = place.split('/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    wire::Workload {
        locality: Some(wire::Locality { region: next(), zone: next(), subzone: next() }),
        ..pod(n)
    }
}

fn place(place: &str) -> Locality {
    let mut parts = place.split('/');
    let mut next = || parts.next().unwrap_or_default().into();
    Locality { region: next(), zone: next(), subzone: next() }
}

fn service() -> wire::Service {
    wire::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: HOST.into(),
        ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..wire::Service::default()
    }
}

/// A destination rule for `web` without content.
fn rule(namespace: &str, name: &str) -> l7::Destination {
    let origin = l7::Origin {
        kind: "DestinationRule".into(),
        namespace: namespace.into(),
        name: name.into(),
        created: 1,
    };
    l7::Destination { origin: Some(origin), hostname: HOST.into(), ..l7::Destination::default() }
}

fn simple(algorithm: l7::load_balancer::Simple) -> l7::LoadBalancer {
    l7::LoadBalancer {
        algorithm: Some(l7::load_balancer::Algorithm::Simple(algorithm.into())),
        ..l7::LoadBalancer::default()
    }
}

fn balanced(load_balancer: l7::LoadBalancer) -> l7::TrafficPolicy {
    l7::TrafficPolicy { load_balancer: Some(load_balancer), ..l7::TrafficPolicy::default() }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// Every endpoint may be ejected.
fn detecting() -> l7::OutlierDetection {
    l7::OutlierDetection { max_ejection_percent: Some(100), ..l7::OutlierDetection::default() }
}
