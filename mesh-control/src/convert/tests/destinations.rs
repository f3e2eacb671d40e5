use mesh_core::xds::proto::l7 as wire;
use wire::client_tls::Mode;
use wire::connection_pool::UpgradePolicy;
use wire::consistent_hash::{Key, Table};
use wire::load_balancer::{Algorithm, Simple};

use super::virtual_services::{WAYPOINT, problems, service};
use crate::convert::Resources;
use crate::testing::resources;

fn rule(spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: web, namespace: shop}}\nspec:\n{spec}"
    )
}

fn with(spec: &str) -> Resources {
    resources(&format!("{WAYPOINT}{}{}", service("web"), rule(spec)))
}

fn destination(resources: &Resources) -> &wire::Destination {
    &resources.l7.destinations["DestinationRule/shop/web"]
}

/// The policy of a rule with only this in its `trafficPolicy`.
fn policy(text: &str) -> wire::TrafficPolicy {
    let resources = with(&format!("  host: web\n  trafficPolicy: {{{text}}}\n"));
    destination(&resources).policy.clone().unwrap()
}

#[test]
fn every_limit_of_a_connection_pool_is_carried_over() {
    let pool = policy(
        "connectionPool: {tcp: {maxConnections: 7, connectTimeout: 30ms, tcpKeepalive: {probes: 3, time: 7200s, interval: 75s}, maxConnectionDuration: 1h, idleTimeout: 5m}, http: {http1MaxPendingRequests: 1, http2MaxRequests: 2, maxRequestsPerConnection: 3, maxRetries: 4, idleTimeout: 6s, h2UpgradePolicy: UPGRADE, useClientProtocol: true, maxConcurrentStreams: 5, http2KeepAlive: {interval: 10s, timeout: 2s}}}",
    )
    .connection_pool
    .unwrap();
    assert_eq!((pool.max_connections, pool.connect_timeout.unwrap().nanos), (Some(7), 30_000_000));
    let keepalive = pool.keepalive.unwrap();
    assert_eq!(
        (keepalive.probes, keepalive.time.unwrap().seconds, keepalive.interval.unwrap().seconds),
        (3, 7200, 75)
    );
    assert_eq!(
        (pool.max_connection_duration.unwrap().seconds, pool.tcp_idle_timeout.unwrap().seconds),
        (3600, 300)
    );
    assert_eq!((pool.http1_max_pending_requests, pool.http2_max_requests), (Some(1), Some(2)));
    assert_eq!((pool.max_requests_per_connection, pool.max_retries), (Some(3), Some(4)));
    assert_eq!((pool.http_idle_timeout.unwrap().seconds, pool.h2_upgrade()), (6, UpgradePolicy::Upgrade));
    assert_eq!((pool.use_client_protocol, pool.max_concurrent_streams), (true, Some(5)));
    assert_eq!(
        (pool.http2_keepalive_interval.unwrap().seconds, pool.http2_keepalive_timeout.unwrap().seconds),
        (10, 2)
    );
    let zero = policy("connectionPool: {http: {maxRequestsPerConnection: 0}}").connection_pool.unwrap();
    assert_eq!(zero.max_requests_per_connection, None, "0 is no limit");
}

#[test]
fn every_way_of_balancing_is_carried_over() {
    let simple =
        |word: &str| policy(&format!("loadBalancer: {{simple: {word}}}")).load_balancer.unwrap().algorithm;
    for (word, expected) in [
        ("UNSPECIFIED", Simple::Unspecified),
        ("LEAST_CONN", Simple::LeastRequest),
        ("LEAST_REQUEST", Simple::LeastRequest),
        ("ROUND_ROBIN", Simple::RoundRobin),
        ("RANDOM", Simple::Random),
        ("PASSTHROUGH", Simple::Passthrough),
    ] {
        assert_eq!(simple(word), Some(Algorithm::Simple(expected.into())), "{word}");
    }
    let hash = |text: &str| match policy(&format!("loadBalancer: {{consistentHash: {{{text}}}}}"))
        .load_balancer
        .unwrap()
        .algorithm
    {
        Some(Algorithm::ConsistentHash(hash)) => (hash.key.unwrap(), hash.table.unwrap()),
        other => panic!("{other:?}"),
    };
    assert_eq!(hash("httpHeaderName: X-User"), (Key::Header("x-user".into()), Table::Ring(0)));
    assert_eq!(
        hash("useSourceIp: true, ringHash: {minimumRingSize: 9}"),
        (Key::SourceIp(true), Table::Ring(9))
    );
    assert_eq!(
        hash("httpQueryParameterName: q, maglev: {tableSize: 101}"),
        (Key::QueryParameter("q".into()), Table::Maglev(101))
    );
    let (Key::Cookie(cookie), _) =
        hash("httpCookie: {name: user, path: /, ttl: 0s, attributes: [{name: SameSite, value: Strict}]}")
    else {
        panic!()
    };
    assert_eq!((cookie.name.as_str(), cookie.path.as_str(), cookie.ttl.unwrap().seconds), ("user", "/", 0));
    assert_eq!(cookie.attributes[0].value, "Strict");
    let balancer = policy(
        "loadBalancer: {localityLbSetting: {enabled: true, distribute: [{from: r/z/*, to: {r/z/*: 70, r/y/*: 30}}]}, zoneAwareLbSetting: {enabled: true, minClusterSize: 4}, warmup: {duration: 30s, minimumPercent: 5, aggression: 2}}",
    )
    .load_balancer
    .unwrap();
    let locality = balancer.locality.unwrap();
    assert_eq!((locality.enabled, locality.distribute[0].to["r/y/*"]), (Some(true), 30));
    assert_eq!(balancer.zone_aware.unwrap().min_cluster_size, 4);
    let warmup = balancer.warmup.unwrap();
    assert_eq!(
        (warmup.duration.unwrap().seconds, warmup.minimum_percent, warmup.aggression),
        (30, Some(5.0), Some(2.0))
    );
    let failover = policy("loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}], failoverPriority: [x, y=z]}, warmupDurationSecs: 10s}").load_balancer.unwrap();
    let locality = failover.locality.unwrap();
    assert_eq!((locality.failover[0].to.as_str(), locality.failover_priority.len()), ("b", 2));
    assert_eq!(failover.warmup.unwrap().duration.unwrap().seconds, 10);
}

#[test]
fn outliers_budgets_ports_and_subsets_are_carried_over() {
    let given = policy(
        "outlierDetection: {consecutive5xxErrors: 1, consecutiveGatewayErrors: 0, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 3, interval: 1s, baseEjectionTime: 2m, maxEjectionPercent: 100, minHealthPercent: 50}, retryBudget: {percent: 12.5, budgetInterval: 1s, minRetryConcurrency: 4}, proxyProtocol: {version: V2}, portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: RANDOM}}]",
    );
    let outlier = given.outlier_detection.unwrap();
    assert_eq!((outlier.consecutive_5xx, outlier.consecutive_gateway_errors), (Some(1), Some(0)));
    assert_eq!((outlier.split_local_errors, outlier.consecutive_local_failures), (true, Some(3)));
    assert_eq!((outlier.interval.unwrap().seconds, outlier.base_ejection_time.unwrap().seconds), (1, 120));
    assert_eq!((outlier.max_ejection_percent, outlier.min_health_percent), (Some(100), Some(50)));
    let budget = given.retry_budget.unwrap();
    assert_eq!(
        (budget.percent, budget.interval.unwrap().seconds, budget.min_concurrency),
        (Some(12.5), 1, Some(4))
    );
    assert_eq!(given.proxy_protocol.unwrap().version, 2);
    assert_eq!(given.ports[0].port, 80);
    assert_eq!(
        given.ports[0].load_balancer.clone().unwrap().algorithm,
        Some(Algorithm::Simple(Simple::Random.into()))
    );
    let resources = with(
        "  host: web\n  exportTo: [., other]\n  subsets: [{name: v1, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}]\n",
    );
    let destination = destination(&resources);
    assert_eq!(destination.exported_to, ["shop", "other"]);
    assert!(destination.subsets[0].policy.is_some());
}

#[test]
fn tls_that_needs_what_cannot_be_had_fails_rather_than_asks_for_less() {
    let tls = |text: &str| policy(&format!("tls: {{{text}}}")).tls.unwrap();
    let simple = tls("mode: SIMPLE, sni: a.example, subjectAltNames: [a.example]");
    assert_eq!((simple.mode(), simple.system_roots, simple.invalid.as_str()), (Mode::Simple, true, ""));
    assert_eq!((simple.sni.as_str(), simple.subject_alt_names.len()), ("a.example", 1));
    let insecure = tls("mode: SIMPLE, insecureSkipVerify: true");
    assert!(insecure.insecure_skip_verify && !insecure.system_roots);
    let secret = tls("mode: MUTUAL, credentialName: client");
    assert!(secret.invalid.contains("Secret client cannot be had"), "{}", secret.invalid);
    assert!(!secret.system_roots);
    let files = tls("mode: MUTUAL, clientCertificate: /c, privateKey: /k");
    assert!(files.invalid.contains("clientCertificate, privateKey"), "{}", files.invalid);
    assert_eq!(tls("mode: DISABLE").mode(), Mode::Disable);
    assert!(tls("mode: SIMPLE, caCertificates: system").system_roots);
    let istio = with("  host: web\n  trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}\n");
    assert_eq!(destination(&istio).policy.clone().unwrap().tls.unwrap().mode(), Mode::IstioMutual);
    assert!(istio.condition("DestinationRule shop/web", "Accepted").message.contains("ISTIO_MUTUAL"));
}

#[test]
fn what_has_no_effect_or_names_nothing_is_told() {
    let resources = with(
        "  host: web\n  trafficPolicy: {tunnel: {targetHost: a, targetPort: 1}, outlierDetection: {consecutiveErrors: 1, outlierDetectionHttpErrorCodes: [500]}, loadBalancer: {simple: RANDOM, warmup: {duration: 1s}, zoneAwareLbSetting: {failoverPriority: [a]}}, portLevelSettings: [{port: {number: 81}}], tls: {mode: MUTUAL, credentialName: x}}\n",
    );
    let condition = resources.condition("DestinationRule shop/web", "Accepted");
    assert_eq!((condition.status, condition.reason.as_str()), (true, "UnsupportedValue"));
    for part in [
        "spec.trafficPolicy.tunnel",
        "outlierDetection.consecutiveErrors",
        "outlierDetectionHttpErrorCodes",
        "loadBalancer.warmup",
        "zoneAwareLbSetting.failoverPriority",
        "Secret x cannot be had",
    ] {
        assert!(condition.message.contains(part), "{part}: {}", condition.message);
    }
    let refs = resources.condition("DestinationRule shop/web", "ResolvedRefs");
    assert!(
        !refs.status
            && refs.message.contains("portLevelSettings[0].port: web.shop.svc.cluster.local has no port 81"),
        "{refs:?}"
    );
    let nobody = with("  host: nobody\n");
    assert!(
        nobody
            .condition("DestinationRule shop/web", "ResolvedRefs")
            .message
            .contains("nobody.shop.svc.cluster.local names no service")
    );
    let selective = with("  host: web\n  workloadSelector: {matchLabels: {a: b}}\n");
    assert!(selective.l7.destinations.is_empty());
    let condition = selective.condition("DestinationRule shop/web", "Accepted");
    assert!(!condition.status && condition.message.contains("workloadSelector"), "{condition:?}");
}

#[test]
fn what_is_wrong_is_refused_with_the_field_and_what_would_be_right() {
    for (spec, expected) in [
        ("  host: ''\n", "spec.host: missing"),
        (
            "  host: web\n  subsets: [{name: a}, {name: a}]\n",
            "spec.subsets[1].name: \"a\" is the name of another subset",
        ),
        (
            "  host: web\n  trafficPolicy: {loadBalancer: {simple: BEST}}\n",
            "spec.trafficPolicy.loadBalancer.simple: unknown variant `BEST`",
        ),
        (
            "  host: web\n  trafficPolicy: {loadBalancer: {consistentHash: {}}}\n",
            "spec.trafficPolicy.loadBalancer.consistentHash: has 0 keys; write one of httpHeaderName",
        ),
        (
            "  host: web\n  trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {a: 99}}]}}}\n",
            "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to: adds up to 99; shares are of 100",
        ),
        (
            "  host: web\n  trafficPolicy: {connectionPool: {tcp: {maxConnections: -1}}}\n",
            "spec.trafficPolicy.connectionPool.tcp.maxConnections: -1 is out of range",
        ),
        (
            "  host: web\n  trafficPolicy: {tls: {mode: MUTUAL}}\n",
            "spec.trafficPolicy.tls.mode: MUTUAL needs clientCertificate and privateKey, or credentialName",
        ),
        (
            "  host: web\n  trafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}\n",
            "spec.trafficPolicy.outlierDetection.maxEjectionPercent: 101 is no percentage",
        ),
    ] {
        let found = problems(&rule(spec));
        assert!(found.iter().any(|f| f.starts_with(expected)), "{spec}: {found:#?}");
    }
}
