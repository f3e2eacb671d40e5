//! What it costs to find a request's rule among 10 and among 10,000, and to take one more route.
//!
//!     cargo run --release -p mesh-waypoint --example routing [PART OF A LINE'S NAME]
//!
//! Each line is one shape of rules. `last` asks for the last rule over and over; `spread` asks for all of them in turn,
//! so that it also pays for memory that is not in a cache. Times are the least of many interleaved rounds, which are
//! short: what else the machine does is not in them.

use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_core::state::{MeshOptions, MeshState, Service, StateIndex};
use mesh_core::xds::proto::l7::path_match::Kind as Path;
use mesh_core::xds::proto::l7::string_match::Kind as Text;
use mesh_core::xds::proto::{l7, workload as wire};
use mesh_waypoint::config::{Own, Resources};
use mesh_waypoint::request::{Addressed, Head, Source};
use mesh_waypoint::routing::{Routed, Routes};

const FEW: usize = 10;
const MANY: usize = 10_000;
const ROUNDS: usize = 150;
const LOOKUPS: usize = 2_000;

/// Rules of one kind, and requests that fall under the n-th.
struct Shape {
    name: &'static str,
    matching: fn(usize) -> l7::HttpMatch,
    request: fn(usize) -> Request,
}

#[derive(Default)]
struct Request {
    path: String,
    query: Option<String>,
    headers: HeaderMap,
}

fn main() -> Result<(), Box<dyn Error>> {
    // Before anything else: memory that was given back would be used again.
    let memory = memory()?;
    println!(
        "{:<32}{:>10}{:>12}{:>8}{:>10}{:>12}{:>8}",
        "ns per request", "10: last", "10k: last", "ratio", "spread", "spread", "ratio"
    );
    let wanted = std::env::args().nth(1).unwrap_or_default();
    for shape in shapes().into_iter().filter(|shape| shape.name.contains(&wanted)) {
        let few = routes(&shape, FEW)?;
        let many = routes(&shape, MANY)?;
        let (few_last, many_last) = compare(&shape, (&few, FEW), (&many, MANY), |_, count| count - 1)?;
        let (few_all, many_all) = compare(&shape, (&few, FEW), (&many, MANY), |at, _| at % MANY)?;
        println!(
            "{:<32}{few_last:>10.0}{many_last:>12.0}{:>8.2}{few_all:>10.0}{many_all:>12.0}{:>8.2}",
            shape.name,
            many_last / few_last,
            many_all / few_all
        );
    }
    println!();
    println!("{:<64}{:>8} B", "10,000 routes of 10,000 services: memory of each, compiled", memory);
    for (name, change) in changes().into_iter().filter(|(name, _)| name.contains(&wanted)) {
        println!("{name:<64}{:>8.2} ms", change()?.as_secs_f64() * 1e3);
    }
    Ok(())
}

fn shapes() -> [Shape; 8] {
    [
        Shape {
            name: "exact paths",
            matching: |n| path(Path::Exact(format!("/api/v1/item-{n}/detail"))),
            request: |n| get(format!("/api/v1/item-{n}/detail")),
        },
        Shape {
            name: "segment prefixes",
            matching: |n| path(Path::Segments(format!("/api/v1/item-{n}"))),
            request: |n| get(format!("/api/v1/item-{n}/detail")),
        },
        Shape {
            name: "character prefixes",
            matching: |n| path(Path::Prefix(format!("/team-{}/item-{n}/", n % 100))),
            request: |n| get(format!("/team-{}/item-{n}/detail", n % 100)),
        },
        Shape {
            name: "expressions",
            matching: |n| path(Path::Regex(format!("/api/item-{n}/[0-9]+"))),
            request: |n| get(format!("/api/item-{n}/12")),
        },
        Shape {
            name: "one header, one path",
            matching: |n| with_headers(path(Path::Segments("/api".into())), &[("x-tenant", n)]),
            request: |n| with(get("/api/x".into()), &[("x-tenant", n)]),
        },
        Shape {
            name: "100 paths, 100 values of a header",
            matching: |n| {
                with_headers(path(Path::Segments(format!("/api/{}", n / 100))), &[("x-tenant", n % 100)])
            },
            request: |n| with(get(format!("/api/{}/x", n / 100)), &[("x-tenant", n % 100)]),
        },
        Shape {
            name: "two headers without a path",
            matching: |n| with_headers(l7::HttpMatch::default(), &[("x-one", n / 100), ("x-two", n % 100)]),
            request: |n| with(get("/x".into()), &[("x-one", n / 100), ("x-two", n % 100)]),
        },
        Shape {
            name: "a query parameter",
            matching: |n| {
                let value = l7::StringMatch { kind: Some(Text::Exact(n.to_string())), ignore_case: false };
                let query = vec![l7::QueryMatch { name: "tenant".into(), value: Some(value) }];
                l7::HttpMatch { query, ..Default::default() }
            },
            request: |n| Request { query: Some(format!("a=b&tenant={n}&c=d")), ..get("/x".into()) },
        },
    ]
}

fn path(kind: Path) -> l7::HttpMatch {
    let path = l7::PathMatch { kind: Some(kind), ignore_case: false };
    l7::HttpMatch { path: Some(path), ..l7::HttpMatch::default() }
}

fn with_headers(matching: l7::HttpMatch, headers: &[(&str, usize)]) -> l7::HttpMatch {
    let header = |(name, value): &(&str, usize)| l7::HeaderMatch {
        name: (*name).to_owned(),
        value: Some(l7::StringMatch { kind: Some(Text::Exact(value.to_string())), ignore_case: false }),
        ..l7::HeaderMatch::default()
    };
    l7::HttpMatch { headers: headers.iter().map(header).collect(), ..matching }
}

fn get(path: String) -> Request {
    let mut headers = HeaderMap::new();
    for name in ["user-agent", "accept", "x-request-id", "traceparent", "x-b3-traceid"] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static("something"));
    }
    Request { path, headers, query: None }
}

fn with(mut request: Request, headers: &[(&'static str, usize)]) -> Request {
    for (name, value) in headers {
        request.headers.insert(HeaderName::from_static(name), HeaderValue::from(*value));
    }
    request
}

/// One route object for each rule, all of one service.
fn resources(count: usize, route_of: impl Fn(usize) -> l7::Route) -> Resources {
    let named = |n| (format!("VirtualService/shop/v{n:05}"), route_of(n).into());
    Resources { routes: (0..count).map(named).collect(), ..Resources::default() }
}

fn route(n: usize, service: usize, matches: impl Iterator<Item = l7::HttpMatch>) -> l7::Route {
    let parent = l7::ServiceRef { namespace: "shop".into(), hostname: hostname(service), port: 0 };
    let backend = l7::WeightedBackend {
        backend: Some(l7::Backend { service: Some(parent.clone()), ..l7::Backend::default() }),
        weight: 1,
        ..l7::WeightedBackend::default()
    };
    let rule = |matching| l7::HttpRule {
        name: format!("rule-{n}"),
        matches: vec![matching],
        action: Some(l7::http_rule::Action::Forward(l7::Forward { backends: vec![backend.clone()] })),
        ..l7::HttpRule::default()
    };
    l7::Route {
        origin: Some(l7::Origin {
            kind: "VirtualService".into(),
            namespace: "shop".into(),
            name: format!("v{n:05}"),
            created: 0,
        }),
        parents: vec![parent],
        http: matches.map(rule).collect(),
        ..l7::Route::default()
    }
}

fn hostname(service: usize) -> String {
    format!("service-{service}.shop.svc.cluster.local")
}

fn mesh(services: usize) -> Result<MeshState, Box<dyn Error>> {
    let mut index = StateIndex::new(MeshOptions::default());
    for n in 0..services {
        index.insert_service(Service::decode(&wire::Service {
            name: format!("service-{n}"),
            namespace: "shop".into(),
            hostname: hostname(n),
            ..wire::Service::default()
        })?);
    }
    Ok(index.state().clone())
}

fn routes(shape: &Shape, count: usize) -> Result<Routes, Box<dyn Error>> {
    let resources = resources(count, |n| route(n, 0, std::iter::once((shape.matching)(n))));
    Ok(Routes::build(&resources, &mesh(1)?, &Own::default(), &Routes::default()))
}

/// Nanoseconds per request.
fn compare(
    shape: &Shape,
    few: (&Routes, usize),
    many: (&Routes, usize),
    which: fn(usize, usize) -> usize,
) -> Result<(f64, f64), Box<dyn Error>> {
    let source = Source { address: "10.0.0.1:1".parse()?, identity: None, workload: None, labels: None };
    let addressed = Addressed::Service { key: format!("shop/{}", hostname(0)).into(), port: 80 };
    let round = |(routes, count): (&Routes, usize), requests: &[Request], first: usize| {
        let begin = Instant::now();
        for at in 0..LOOKUPS {
            let request = &requests[which(first + at, count)];
            let head = Head {
                source: &source,
                destination: source.address,
                addressed: &addressed,
                method: &Method::GET,
                scheme: "http",
                authority: "service-0",
                path: &request.path,
                query: request.query.as_deref(),
                headers: &request.headers,
                claims: None,
            };
            assert!(matches!(black_box(routes.http(black_box(&head))), Routed::Rule(_)));
        }
        begin.elapsed().as_secs_f64() * 1e9 / LOOKUPS as f64
    };
    // As many requests on both sides: they take their place in the caches, too.
    let of_few: Vec<Request> = (0..MANY).map(|n| (shape.request)(n % few.1)).collect();
    let of_many: Vec<Request> = (0..MANY).map(shape.request).collect();
    let (mut least_few, mut least_many) = (f64::MAX, f64::MAX);
    for at in 0..ROUNDS {
        least_few = least_few.min(round(few, &of_few, at * LOOKUPS));
        least_many = least_many.min(round(many, &of_many, at * LOOKUPS));
    }
    Ok((least_few, least_many))
}

/// Resident bytes of each of many compiled routes, without the resources that they come from.
fn memory() -> Result<usize, Box<dyn Error>> {
    let resident = || -> Result<usize, Box<dyn Error>> {
        let pages = std::fs::read_to_string("/proc/self/statm")?;
        Ok(pages.split(' ').nth(1).unwrap_or_default().parse::<usize>()? * 4096)
    };
    let resources = resources(MANY, |n| route(n, n, std::iter::once(item(n))));
    let mesh = mesh(MANY)?;
    let before = resident()?;
    let routes = black_box(Routes::build(&resources, &mesh, &Own::default(), &Routes::default()));
    let after = resident()?;
    drop(routes);
    Ok(after.saturating_sub(before) / MANY)
}

type Change = fn() -> Result<Duration, Box<dyn Error>>;

/// How long it takes until a change can be looked up.
fn changes() -> [(&'static str, Change); 5] {
    [
        ("10,000 routes of 10,000 services: from nothing", || {
            let resources = resources(MANY, |n| route(n, n, std::iter::once(item(n))));
            time(&mesh(MANY)?, &Resources::default(), &resources)
        }),
        ("10,000 routes of 10,000 services: one more", || {
            let before = resources(MANY, |n| route(n, n, std::iter::once(item(n))));
            one_more(&mesh(MANY)?, before, route(MANY, 7, std::iter::once(item(MANY))))
        }),
        ("10,000 routes of one service: one more", || {
            let before = resources(MANY, |n| route(n, 0, std::iter::once(item(n))));
            one_more(&mesh(1)?, before, route(MANY, 0, std::iter::once(item(MANY))))
        }),
        ("10,000 routes of one service, told apart by a header: one more", || {
            let tenant = |n| std::iter::once(with_headers(l7::HttpMatch::default(), &[("x-tenant", n)]));
            let before = resources(MANY, |n| route(n, 0, tenant(n)));
            one_more(&mesh(1)?, before, route(MANY, 0, tenant(MANY)))
        }),
        ("one route with 10,000 rules: one rule more", || {
            let before = resources(1, |_| route(0, 0, (0..MANY).map(item)));
            one_more(&mesh(1)?, before, route(0, 0, (0..=MANY).map(item)))
        }),
    ]
}

fn item(n: usize) -> l7::HttpMatch {
    path(Path::Exact(format!("/api/v1/item-{n}/detail")))
}

fn one_more(mesh: &MeshState, before: Resources, route: l7::Route) -> Result<Duration, Box<dyn Error>> {
    let mut after = before.clone();
    let name =
        route.origin.as_ref().map_or_else(String::new, |o| format!("{}/{}/{}", o.kind, o.namespace, o.name));
    after.routes.insert(name, route.into());
    time(mesh, &before, &after)
}

/// The least time of a build after another one.
fn time(mesh: &MeshState, before: &Resources, after: &Resources) -> Result<Duration, Box<dyn Error>> {
    let own = Own::default();
    let previous = Routes::build(before, mesh, &own, &Routes::default());
    let mut times = Vec::new();
    for _ in 0..21 {
        let begin = Instant::now();
        let routes = Routes::build(after, mesh, &own, &previous);
        times.push(begin.elapsed());
        drop(black_box(routes));
    }
    Ok(times.into_iter().min().unwrap_or_default())
}
