//! What a choice of an endpoint costs, and what a change of configuration does.
//!
//!     cargo run --release -p mesh-waypoint --example pick

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::state::{MeshOptions, StateIndex, Str};
use mesh_core::xds::proto::{l7, workload as wire};
use mesh_waypoint::config::{Own, Resources};
use mesh_waypoint::upstream::{ClusterKey, Clusters, Destinations, Limit, Outcome, PickContext, View};

const PICKS: u32 = 200_000;

fn main() -> Result<(), mesh_core::state::DecodeError> {
    println!("{:>9}  {:<24} {:>9} {:>9}", "endpoints", "algorithm", "pick ns", "whole ns");
    for endpoints in [10, 100, 10_000] {
        for (name, balancer) in algorithms() {
            let (index, resources) = mesh(1, endpoints, &balancer)?;
            let clusters = applied(index, &resources);
            let (pick, whole) = measure(&clusters);
            println!("{endpoints:>9}  {name:<24} {pick:>9.0} {whole:>9.0}");
        }
    }
    println!();
    for services in [100, 10_000] {
        change(services)?;
    }
    Ok(())
}

fn algorithms() -> Vec<(&'static str, l7::LoadBalancer)> {
    use l7::consistent_hash::{Key, Table};
    use l7::load_balancer::{Algorithm, Simple};
    let of = |algorithm| l7::LoadBalancer { algorithm: Some(algorithm), ..l7::LoadBalancer::default() };
    let simple = |simple: Simple| of(Algorithm::Simple(simple.into()));
    let hash =
        |table| of(Algorithm::ConsistentHash(l7::ConsistentHash { key: Some(Key::SourceIp(true)), table }));
    vec![
        ("round robin", simple(Simple::RoundRobin)),
        ("least request", simple(Simple::LeastRequest)),
        ("random", simple(Simple::Random)),
        ("ring hash", hash(Some(Table::Ring(1024)))),
        ("maglev", hash(Some(Table::Maglev(65_537)))),
    ]
}

/// Nanoseconds of a pick, and of all that a request asks: cluster, permit, pick, report.
fn measure(clusters: &Clusters) -> (f64, f64) {
    let key = key(0);
    let now = Instant::now();
    let mut rng = fastrand::Rng::with_seed(1);
    let cluster = clusters.cluster(&key, now).expect("the service is there");
    let context = |n: u32| PickContext { hash: Some(u64::from(n) << 40 | 7), ..PickContext::new(now) };
    let pick = fastest(|n| {
        black_box(cluster.pick(&context(n), &mut rng).expect("an endpoint"));
    });
    let whole = fastest(|n| {
        let cluster = clusters.cluster(black_box(&key), now).expect("the service is there");
        let permit = cluster.admit(Limit::Request, now);
        let picked = cluster.pick(&context(n), &mut rng).expect("an endpoint");
        picked.report(Outcome::Status(200), now);
        black_box((permit.is_ok(), picked));
    });
    (pick, whole)
}

/// Nanoseconds of one call in the fastest of ten rounds.
fn fastest(mut call: impl FnMut(u32)) -> f64 {
    let round = |call: &mut dyn FnMut(u32)| {
        let began = Instant::now();
        (0..PICKS).for_each(call);
        began.elapsed()
    };
    let best = (0..10).map(|_| round(&mut call)).min().unwrap_or_default();
    best.as_nanos() as f64 / f64::from(PICKS)
}

/// What it takes to have one rule more when so many services are in use.
fn change(services: usize) -> Result<(), mesh_core::state::DecodeError> {
    let (mut index, mut resources) = mesh(services, 3, &l7::LoadBalancer::default())?;
    let own = Arc::new(Own { namespace: "shop".into(), ..Own::default() });
    let clusters = Clusters::new(Instant::now());
    let apply = |index: &mut StateIndex, resources: &Resources| {
        let began = Instant::now();
        let destinations = Destinations::build(resources, &own);
        let indexed = began.elapsed();
        let view = View::new(own.clone(), index.snapshot(), Arc::new(HashMap::new()), destinations);
        clusters.apply(view, Instant::now());
        (indexed, began.elapsed())
    };
    apply(&mut index, &resources);
    let began = Instant::now();
    for n in 0..services {
        black_box(clusters.cluster(&key(n), began).expect("the service is there"));
    }
    let made = began.elapsed();
    let changed = Arc::new(rule(services / 2, &l7::LoadBalancer::default()));
    resources.destinations.insert(format!("DestinationRule/shop/s{}", services / 2), changed);
    let (indexed, applied) = apply(&mut index, &resources);
    let millis = |duration: Duration| duration.as_secs_f64() * 1000.0;
    println!(
        "{services} services and rules: all clusters made in {:.1} ms; one rule changed: indexed in {:.1} ms, applied in {:.1} ms",
        millis(made),
        millis(indexed),
        millis(applied)
    );
    Ok(())
}

fn key(n: usize) -> ClusterKey {
    ClusterKey::service(&Str::from(format!("shop/{}", host(n))), 80, "")
}

fn host(n: usize) -> String {
    format!("s{n}.shop.svc.cluster.local")
}

fn applied(mut index: StateIndex, resources: &Resources) -> Clusters {
    let own = Own { namespace: "shop".into(), ..Own::default() };
    let now = Instant::now();
    let clusters = Clusters::new(now);
    let destinations = Destinations::build(resources, &own);
    clusters.apply(View::new(Arc::new(own), index.snapshot(), Arc::new(HashMap::new()), destinations), now);
    clusters
}

/// So many services with so many endpoints each, and a rule with outlier detection for each.
fn mesh(
    services: usize,
    endpoints: usize,
    balancer: &l7::LoadBalancer,
) -> Result<(StateIndex, Resources), mesh_core::state::DecodeError> {
    let mut index = StateIndex::new(MeshOptions::default());
    let mut resources = Resources::default();
    for n in 0..services {
        let service = wire::Service {
            name: format!("s{n}"),
            namespace: "shop".into(),
            hostname: host(n),
            ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
            ..wire::Service::default()
        };
        let service = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        index.apply_address("", &service)?;
        for pod in 0..endpoints {
            let at = n * endpoints + pod;
            let workload = wire::Workload {
                uid: format!("Kubernetes//Pod/shop/s{n}-{pod}"),
                name: format!("s{n}-{pod}"),
                namespace: "shop".into(),
                addresses: vec![vec![10, (at >> 16) as u8, (at >> 8) as u8, at as u8]],
                tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
                services: [(format!("shop/{}", host(n)), wire::PortList::default())].into(),
                ..wire::Workload::default()
            };
            let workload = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) };
            index.apply_address("", &workload)?;
        }
        resources.destinations.insert(format!("DestinationRule/shop/s{n}"), Arc::new(rule(n, balancer)));
    }
    Ok((index, resources))
}

fn rule(n: usize, balancer: &l7::LoadBalancer) -> l7::Destination {
    let policy = l7::TrafficPolicy {
        load_balancer: Some(balancer.clone()),
        outlier_detection: Some(l7::OutlierDetection::default()),
        ..l7::TrafficPolicy::default()
    };
    l7::Destination {
        origin: Some(l7::Origin {
            kind: "DestinationRule".into(),
            namespace: "shop".into(),
            name: format!("s{n}"),
            created: 1,
        }),
        hostname: host(n),
        policy: Some(policy),
        ..l7::Destination::default()
    }
}
