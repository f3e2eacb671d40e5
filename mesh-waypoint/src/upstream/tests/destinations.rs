//! Which rule applies, and what it comes to.

use super::*;

fn with_connections(max: u32) -> Option<l7::TrafficPolicy> {
    let pool = l7::ConnectionPool { max_connections: Some(max), ..l7::ConnectionPool::default() };
    Some(l7::TrafficPolicy { connection_pool: Some(pool), ..l7::TrafficPolicy::default() })
}

/// A rule whose `maxConnections` tells it from the others.
fn marked(namespace: &str, host: &str, max: u32) -> l7::Destination {
    l7::Destination {
        hostname: host.into(),
        policy: with_connections(max),
        ..rule(namespace, &format!("{namespace}-{max}"))
    }
}

/// The mark of the rule that applies for a waypoint of this namespace to a service of namespace `shop`.
fn winner(own: &str, rules: Vec<l7::Destination>) -> Option<u32> {
    let mut world = World::with_endpoints(1);
    world.own = Arc::new(Own { namespace: own.into(), ..Own::default() });
    for rule in rules {
        world.rule(rule);
    }
    world.web().policy().limits.connections
}

#[test]
fn the_waypoints_namespace_comes_before_the_services_and_the_root_comes_last() {
    let rules = || vec![marked("edge", HOST, 1), marked("shop", HOST, 2), marked("istio-system", HOST, 3)];
    assert_eq!(winner("edge", rules()), Some(1));
    assert_eq!(winner("edge", rules()[1..].to_vec()), Some(2));
    assert_eq!(winner("edge", rules()[2..].to_vec()), Some(3));
    assert_eq!(winner("edge", vec![marked("other", HOST, 4)]), None, "other namespaces do not count");
}

#[test]
fn a_wildcard_near_by_wins_over_an_exact_host_far_away_and_the_longest_one_in_a_namespace() {
    let near = marked("edge", "*.local", 1);
    assert_eq!(winner("edge", vec![near, marked("shop", HOST, 2)]), Some(1));
    let by_length = vec![
        marked("shop", "*", 1),
        marked("shop", "*.local", 2),
        marked("shop", "*.shop.svc.cluster.local", 3),
        marked("shop", "*.web.shop.svc.cluster.local", 4),
    ];
    assert_eq!(winner("edge", by_length.clone()), Some(3));
    assert_eq!(winner("edge", by_length[..1].to_vec()), Some(1));
}

#[test]
fn a_rule_counts_where_it_is_exported_to() {
    let exported = |to: &[&str]| l7::Destination {
        exported_to: to.iter().map(|to| (*to).to_owned()).collect(),
        ..marked("shop", HOST, 1)
    };
    assert_eq!(winner("edge", vec![exported(&["*"])]), Some(1));
    assert_eq!(winner("edge", vec![exported(&["other", "edge"])]), Some(1));
    assert_eq!(winner("edge", vec![exported(&["other"])]), None);
    assert_eq!(winner("edge", vec![exported(&["shop"])]), None);
    assert_eq!(winner("shop", vec![exported(&["."])]), Some(1));
    let hidden = l7::Destination { exported_to: vec!["shop".into()], ..marked("shop", HOST, 1) };
    let root = marked("istio-system", HOST, 2);
    assert_eq!(winner("edge", vec![hidden, root]), Some(2), "a hidden rule does not hide others");
}

#[test]
fn in_the_root_namespace_public_rules_come_after_those_of_the_service() {
    let rules = || vec![marked("istio-system", HOST, 1), marked("shop", HOST, 2)];
    assert_eq!(winner("istio-system", rules()), Some(2));
    let private = l7::Destination { exported_to: vec![".".into()], ..marked("istio-system", HOST, 1) };
    assert_eq!(winner("istio-system", vec![private, marked("shop", HOST, 2)]), Some(1));
}

#[test]
fn rules_of_one_host_are_merged_and_the_older_ones_policy_and_subsets_count() {
    let subset = |name: &str, max| l7::Subset {
        name: name.into(),
        policy: with_connections(max),
        ..l7::Subset::default()
    };
    let mut old = marked("shop", HOST, 1);
    old.origin.as_mut().unwrap().name = "z".into();
    old.subsets = vec![subset("v1", 10)];
    let mut young = marked("shop", HOST, 2);
    young.origin.as_mut().unwrap().created = 5;
    young.subsets = vec![subset("v1", 20), subset("v2", 30)];
    let mut world = World::with_endpoints(1);
    world.rule(young);
    world.rule(old);
    let connections = |cluster: Arc<Cluster>| cluster.policy().limits.connections;
    assert_eq!(connections(world.web()), Some(1));
    assert_eq!(connections(world.subset("v1").unwrap()), Some(10));
    assert_eq!(connections(world.subset("v2").unwrap()), Some(30));
}

#[test]
fn a_subset_replaces_the_parts_that_it_has() {
    let mut world = World::with_endpoints(1);
    let base = l7::TrafficPolicy { outlier_detection: Some(detecting()), ..with_connections(5).unwrap() };
    let subset = |name: &str, policy| l7::Subset { name: name.into(), policy, ..l7::Subset::default() };
    world.rule(l7::Destination {
        policy: Some(base),
        subsets: vec![
            subset("plain", None),
            subset("random", Some(balanced(simple(l7::load_balancer::Simple::Random)))),
        ],
        ..rule("shop", "web")
    });
    let base = world.web().policy();
    assert_eq!(*world.subset("plain").unwrap().policy(), *base);
    let random = world.subset("random").unwrap().policy();
    assert_eq!(random.balancer.algorithm, Algorithm::Random);
    assert_eq!((random.limits, random.outlier), (base.limits, base.outlier));
}

#[test]
fn settings_of_a_port_replace_four_parts_altogether_and_fall_back_to_the_mesh_not_to_the_rule() {
    let mut world = World::with_endpoints(1);
    let port = l7::PortPolicy {
        port: 80,
        load_balancer: Some(simple(l7::load_balancer::Simple::RoundRobin)),
        ..l7::PortPolicy::default()
    };
    let other = l7::PortPolicy { port: 81, ..port.clone() };
    let budget = l7::RetryBudget { percent: Some(50.0), ..l7::RetryBudget::default() };
    let base = |ports| l7::TrafficPolicy {
        outlier_detection: Some(detecting()),
        retry_budget: Some(budget),
        ports,
        ..with_connections(5).unwrap()
    };
    world.policy(base(vec![other]));
    let policy = world.web().policy();
    assert_eq!((policy.limits.connections, policy.balancer.algorithm), (Some(5), Algorithm::LeastRequest));

    world.policy(base(vec![port]));
    let policy = world.web().policy();
    assert_eq!(policy.balancer.algorithm, Algorithm::RoundRobin);
    assert_eq!((policy.limits.connections, policy.outlier), (None, None), "not inherited");
    assert_eq!(policy.limits.retry_budget.unwrap().percent, 50.0, "not a part that ports have");

    world.settings(|settings| {
        settings.default_connection_pool = with_connections(7).unwrap().connection_pool;
        settings.default_outlier_detection = Some(detecting());
    });
    let policy = world.web().policy();
    assert_eq!((policy.limits.connections, policy.outlier.is_some()), (Some(7), true));
}

#[test]
fn a_block_of_a_rule_replaces_the_meshs_block_whole() {
    let mut world = World::with_endpoints(1);
    world.settings(|settings| {
        settings.connect_timeout = seconds(3);
        settings.default_connection_pool = Some(l7::ConnectionPool {
            max_connections: Some(7),
            max_retries: Some(8),
            ..l7::ConnectionPool::default()
        });
    });
    assert_eq!(world.web().policy().limits.retries, Some(8));
    world.policy(with_connections(5).unwrap());
    let policy = world.web().policy();
    assert_eq!((policy.limits.connections, policy.limits.retries), (Some(5), None));
    assert_eq!(policy.connection.connect_timeout, Duration::from_secs(3));
}

#[test]
fn a_policy_of_another_kind_fills_what_the_rule_leaves_open() {
    use l7::client_tls::Mode;
    let tls = |mode: Mode, sni: &str| l7::ClientTls {
        mode: mode.into(),
        sni: sni.into(),
        ..l7::ClientTls::default()
    };
    let mut world = World::with_endpoints(1);
    let mut attached = rule("shop", "backend");
    attached.origin.as_mut().unwrap().kind = "BackendTLSPolicy".into();
    attached.policy =
        Some(l7::TrafficPolicy { tls: Some(tls(Mode::Simple, "a")), ..l7::TrafficPolicy::default() });
    world.rule(attached);
    assert_eq!(world.web().policy().tls.as_ref().unwrap().sni, "a");
    world.policy(with_connections(5).unwrap());
    let policy = world.web().policy();
    assert_eq!((policy.limits.connections, policy.tls.as_ref().unwrap().sni.as_str()), (Some(5), "a"));
    world.policy(l7::TrafficPolicy { tls: Some(tls(Mode::Mutual, "b")), ..l7::TrafficPolicy::default() });
    assert_eq!(world.web().policy().tls.as_ref().unwrap().sni, "b");
    world.policy(l7::TrafficPolicy { tls: Some(tls(Mode::Disable, "")), ..l7::TrafficPolicy::default() });
    assert_eq!(world.web().policy().tls, None, "said by the rule, and counts");
    world.policy(l7::TrafficPolicy { tls: Some(tls(Mode::IstioMutual, "")), ..l7::TrafficPolicy::default() });
    assert_eq!(world.web().policy().tls, None, "the tunnel is that");
}

#[test]
fn tls_settings_stay_the_same_object_while_they_say_the_same() {
    let mut world = World::with_endpoints(1);
    let tls = |sni: &str| l7::TrafficPolicy {
        tls: Some(l7::ClientTls {
            mode: l7::client_tls::Mode::Simple.into(),
            sni: sni.into(),
            ..l7::ClientTls::default()
        }),
        ..l7::TrafficPolicy::default()
    };
    world.policy(tls("a"));
    let web = world.web();
    let policy = web.policy();
    let before = policy.tls.clone().unwrap();
    // Connections are pooled by them, and an endpoint that comes is no reason to open others.
    world.pod(pod(7));
    let web = world.web();
    assert!(!Arc::ptr_eq(&policy, &web.policy()), "it was not built again");
    assert!(Arc::ptr_eq(&before, web.policy().tls.as_ref().unwrap()));
    world.policy(tls("b"));
    assert!(!Arc::ptr_eq(&before, world.web().policy().tls.as_ref().unwrap()));
}

#[test]
fn tls_settings_that_cannot_be_used_are_not_taken_for_none() {
    let mut world = World::with_endpoints(1);
    let tls = l7::ClientTls { invalid: "secret shop/web is missing".into(), ..l7::ClientTls::default() };
    world.policy(l7::TrafficPolicy { tls: Some(tls), ..l7::TrafficPolicy::default() });
    let cluster = world.web();
    let picked = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    assert_eq!(picked.endpoint().tls.as_ref().unwrap().invalid, "secret shop/web is missing");
}

#[test]
fn what_nobody_says_is_as_in_the_api() {
    let mut world = World::with_endpoints(1);
    let policy = world.web().policy();
    assert_eq!(policy.limits, Limits::default(), "no limits");
    assert_eq!(policy.outlier, None);
    assert_eq!(policy.balancer.algorithm, Algorithm::LeastRequest);
    assert_eq!(policy.connection.connect_timeout, Duration::from_secs(10));
    assert_eq!(policy.connection.tcp_idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(policy.connection.http_idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(policy.connection.max_requests_per_connection, None);
    world.policy(l7::TrafficPolicy {
        outlier_detection: Some(l7::OutlierDetection::default()),
        connection_pool: Some(l7::ConnectionPool {
            max_connections: Some(0),
            http_idle_timeout: seconds(0),
            ..l7::ConnectionPool::default()
        }),
        retry_budget: Some(l7::RetryBudget::default()),
        load_balancer: Some(l7::LoadBalancer {
            warmup: Some(l7::load_balancer::Warmup { duration: seconds(60), ..Default::default() }),
            zone_aware: Some(l7::load_balancer::ZoneAware { enabled: true, min_cluster_size: 0 }),
            ..l7::LoadBalancer::default()
        }),
        ..l7::TrafficPolicy::default()
    });
    let policy = world.web().policy();
    let outlier = policy.outlier.unwrap();
    assert_eq!((outlier.consecutive_5xx, outlier.consecutive_gateway_errors), (5, 0));
    assert_eq!(outlier.consecutive_local_failures, None);
    assert_eq!(outlier.interval, Duration::from_secs(10));
    assert_eq!(outlier.base_ejection_time, Duration::from_secs(30));
    assert_eq!((outlier.max_ejection_percent, outlier.min_health_percent), (10, 0));
    assert_eq!(policy.limits.connections, None, "0 is no limit");
    assert_eq!(policy.connection.http_idle_timeout, None, "0 is never");
    let budget = RetryBudget { percent: 20.0, interval: Duration::ZERO, min_concurrency: 3 };
    assert_eq!(policy.limits.retry_budget, Some(budget));
    let warmup = Warmup { duration: Duration::from_secs(60), minimum_percent: 10.0, aggression: 1.0 };
    assert_eq!(policy.balancer.warmup, Some(warmup));
    assert_eq!(policy.balancer.zone_aware, Some(6));
}

#[test]
fn what_is_not_there_is_an_error_that_says_what_is() {
    let mut world = World::with_endpoints(1);
    let v1 = l7::Subset { name: "v1".into(), ..l7::Subset::default() };
    let cluster = |world: &World, key: &ClusterKey| world.clusters.cluster(key, world.start);
    assert!(cluster(&world, &key("")).is_err(), "nothing is known before the first snapshot");
    world.rule(l7::Destination { subsets: vec![v1], ..rule("shop", "web") });
    world.web();
    let error = world.subset("v2").unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "no destination rule that applies to service {WEB} defines the subset \"v2\"; defined are: v1"
        )
    );
    let error = cluster(&world, &ClusterKey::service(&WEB.into(), 81, "")).unwrap_err();
    assert_eq!(error.to_string(), format!("service {WEB} has no port 81; it has 80"));
    let service: Str = "shop/none".into();
    let error = cluster(&world, &ClusterKey::service(&service, 80, "")).unwrap_err();
    assert_eq!(error, UnknownCluster::Service(service.clone()));
    let error = cluster(&world, &ClusterKey::workload(&service, 80)).unwrap_err();
    assert_eq!(error, UnknownCluster::Workload(service));
}

#[test]
fn a_subset_has_the_endpoints_with_its_labels_as_they_are_now() {
    let mut world = World::with_endpoints(3);
    world.labels(0, &[("app", "web"), ("version", "v1")]);
    world.labels(1, &[("app", "web"), ("version", "v2")]);
    let labels = [("app".to_owned(), "web".to_owned()), ("version".to_owned(), "v1".to_owned())].into();
    let subset = l7::Subset { name: "v1".into(), labels, ..l7::Subset::default() };
    world.rule(l7::Destination { subsets: vec![subset], ..rule("shop", "web") });
    world.apply(0);
    let cluster = world.subset("v1").unwrap();
    assert_eq!(world.used(&cluster, 0), ["web-0"]);
    world.labels(2, &[("app", "web"), ("version", "v1")]);
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), ["web-0", "web-2"]);
    world.labels(0, &[("app", "web")]);
    world.labels(2, &[]);
    world.apply(2);
    let error = cluster.pick(&PickContext::new(world.at(2)), &mut world.rng).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("no healthy endpoint of {WEB}:80 (subset v1): 3 endpoints, 3 without the subset's labels")
    );
}

#[test]
fn a_changed_rule_reaches_the_clusters_it_is_for_and_leaves_the_tables_of_others() {
    let other_host = "api.shop.svc.cluster.local";
    let mut world = World::with_endpoints(2);
    world.service(wire::Service { name: "api".into(), hostname: other_host.into(), ..service() });
    let web = world.web();
    let key = ClusterKey::service(&format!("shop/{other_host}").into(), 80, "");
    let other = world.clusters.cluster(&key, world.start).unwrap();
    let connections = |cluster: &Arc<Cluster>| cluster.policy().limits.connections;
    let tables = |cluster: &Arc<Cluster>| Arc::as_ptr(&cluster.snapshot());
    let before = (tables(&web), tables(&other));

    world.rule(marked("shop", HOST, 1));
    world.apply(1);
    assert_eq!((connections(&web), connections(&other)), (Some(1), None));
    assert_eq!(tables(&other), before.1, "not built anew");
    let changed = tables(&web);
    world.apply(2);
    assert_eq!((tables(&web), tables(&other)), (changed, before.1), "nothing changed, nothing was built");

    world.rule(marked("shop", "*.SVC.cluster.local", 2));
    world.apply(3);
    assert_eq!((connections(&web), connections(&other)), (Some(1), Some(2)));
    world.resources.destinations.retain(|_, rule| rule.hostname != HOST);
    world.apply(4);
    assert_eq!((connections(&web), connections(&other)), (Some(2), Some(2)));
    world.resources.destinations.clear();
    world.apply(5);
    assert_eq!((connections(&web), connections(&other)), (None, None));
    world
        .settings(|settings| settings.default_connection_pool = with_connections(7).unwrap().connection_pool);
    world.apply(6);
    assert_eq!((connections(&web), connections(&other)), (Some(7), Some(7)));
}

#[test]
fn the_subset_of_a_rule_that_is_gone_is_not_served_any_more() {
    let mut world = World::with_endpoints(1);
    let subset = l7::Subset { name: "v1".into(), ..l7::Subset::default() };
    world.rule(l7::Destination { subsets: vec![subset], ..rule("shop", "web") });
    world.apply(0);
    let cluster = world.subset("v1").unwrap();
    world.resources.destinations.clear();
    world.apply(1);
    assert!(matches!(world.subset("v1"), Err(UnknownCluster::Subset { .. })));
    assert!(
        cluster.pick(&PickContext::new(world.start), &mut world.rng).is_ok(),
        "who has it may end with it"
    );
}
