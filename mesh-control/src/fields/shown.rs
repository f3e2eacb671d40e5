//! Which test shows that a field does what its API says: a scenario on real traffic where there is one, else a test of
//! the crate that does it. The longest prefix counts.

use crate::model::Kind;

/// Kind, prefix of the path, name of the test.
pub(super) const SHOWN: &[(Kind, &str, &str)] = &[
    (Kind::VirtualService, "spec", "every_part_of_a_match_is_carried_over"),
    (Kind::VirtualService, "spec.hosts", "a VirtualService splits requests 80 to 20 between two versions"),
    (
        Kind::VirtualService,
        "spec.gateways",
        "an Istio Gateway serves HTTP, HTTPS, TLS and TCP at the proxies that it selects",
    ),
    (Kind::VirtualService, "spec.exportTo", "a_virtual_service_counts_where_it_is_exported_to"),
    (
        Kind::VirtualService,
        "spec.http[].route",
        "a VirtualService splits requests 80 to 20 between two versions",
    ),
    (
        Kind::VirtualService,
        "spec.http[].route[].headers",
        "edits_of_the_rule_come_after_those_of_the_backend",
    ),
    (Kind::VirtualService, "spec.http[].headers", "headers_are_removed_then_set_then_added"),
    (
        Kind::VirtualService,
        "spec.http[].match",
        "all_conditions_of_a_match_must_hold_and_one_match_is_enough",
    ),
    (
        Kind::VirtualService,
        "spec.http[].match[].headers",
        "a header takes a request to another version than everybody's",
    ),
    (
        Kind::VirtualService,
        "spec.http[].match[].withoutHeaders",
        "headers_match_by_value_presence_and_absence",
    ),
    (
        Kind::VirtualService,
        "spec.http[].match[].uri",
        "paths_match_whole_by_characters_by_segments_or_by_expression",
    ),
    (
        Kind::VirtualService,
        "spec.http[].match[].ignoreUriCase",
        "paths_match_whole_by_characters_by_segments_or_by_expression",
    ),
    (Kind::VirtualService, "spec.http[].match[].scheme", "methods_schemes_and_authorities_match_as_texts"),
    (Kind::VirtualService, "spec.http[].match[].method", "methods_schemes_and_authorities_match_as_texts"),
    (Kind::VirtualService, "spec.http[].match[].authority", "methods_schemes_and_authorities_match_as_texts"),
    (
        Kind::VirtualService,
        "spec.http[].match[].queryParams",
        "of_query_parameters_the_first_of_a_name_counts",
    ),
    (Kind::VirtualService, "spec.http[].match[].port", "the_port_is_that_of_the_service"),
    (Kind::VirtualService, "spec.http[].match[].source", "a_source_is_known_by_its_certificate_and_labels"),
    (Kind::VirtualService, "spec.http[].match[].name", "a_match_says_its_name_and_what_of_the_path_it_took"),
    (
        Kind::VirtualService,
        "spec.http[].redirect",
        "faults, redirects, direct answers and CORS are what the VirtualService says",
    ),
    (Kind::VirtualService, "spec.http[].redirect.derivePort", "a_redirect_derives_its_port_as_it_is_told"),
    (Kind::VirtualService, "spec.http[].redirect.port", "a_redirect_derives_its_port_as_it_is_told"),
    (
        Kind::VirtualService,
        "spec.http[].directResponse",
        "faults, redirects, direct answers and CORS are what the VirtualService says",
    ),
    (
        Kind::VirtualService,
        "spec.http[].fault",
        "faults, redirects, direct answers and CORS are what the VirtualService says",
    ),
    (
        Kind::VirtualService,
        "spec.http[].corsPolicy",
        "faults, redirects, direct answers and CORS are what the VirtualService says",
    ),
    (
        Kind::VirtualService,
        "spec.http[].corsPolicy.unmatchedPreflights",
        "a_preflight_of_another_origin_is_sent_on_or_answered_without_leave",
    ),
    (
        Kind::VirtualService,
        "spec.http[].corsPolicy.allowCredentials",
        "wildcards_name_what_is_asked_for_where_credentials_are_allowed",
    ),
    (
        Kind::VirtualService,
        "spec.http[].delegate",
        "the_rules_of_a_delegate_hold_within_the_rule_that_delegates",
    ),
    (
        Kind::VirtualService,
        "spec.http[].rewrite",
        "faults, redirects, direct answers and CORS are what the VirtualService says",
    ),
    (Kind::VirtualService, "spec.http[].timeout", "a_request_ends_with_its_timeout_and_a_try_with_its_own"),
    (
        Kind::VirtualService,
        "spec.http[].retries",
        "requests that a failing pod and a dead one get are answered by the others",
    ),
    (
        Kind::VirtualService,
        "spec.http[].retries.perTryTimeout",
        "a_request_ends_with_its_timeout_and_a_try_with_its_own",
    ),
    (Kind::VirtualService, "spec.http[].retries.retryOn", "each_condition_covers_what_envoy_documents"),
    (
        Kind::VirtualService,
        "spec.http[].retries.backoff",
        "the_backoff_doubles_up_to_ten_times_its_base_with_full_jitter",
    ),
    (Kind::VirtualService, "spec.http[].retries.retryRemoteLocalities", "a_retry_may_leave_its_locality"),
    (Kind::VirtualService, "spec.http[].retries.retryIgnorePreviousHosts", "where_again_is_as_the_rule_says"),
    (Kind::VirtualService, "spec.http[].mirror", "a_copy_of_a_request_goes_to_the_mirror_with_its_body"),
    (Kind::VirtualService, "spec.http[].mirrorPercent", "mirrors_take_their_share_of_requests"),
    (Kind::VirtualService, "spec.tcp", "connections_fall_under_the_first_rule_that_matches"),
    (
        Kind::VirtualService,
        "spec.tls",
        "connections_have_rules_too_and_server_names_count_where_they_are_the_services_own",
    ),
    (Kind::DestinationRule, "spec", "outliers_budgets_ports_and_subsets_are_carried_over"),
    (Kind::DestinationRule, "spec.host", "a VirtualService splits requests 80 to 20 between two versions"),
    (Kind::DestinationRule, "spec.subsets", "a VirtualService splits requests 80 to 20 between two versions"),
    (Kind::DestinationRule, "spec.subsets[].trafficPolicy", "a_subset_replaces_the_parts_that_it_has"),
    (Kind::DestinationRule, "spec.exportTo", "a_rule_counts_where_it_is_exported_to"),
    (Kind::DestinationRule, "spec.workloadSelector", "what_has_no_effect_or_names_nothing_is_told"),
    (
        Kind::PeerAuthentication,
        "spec.mtls",
        "STRICT refuses plaintext from outside the mesh, PERMISSIVE accepts it",
    ),
    (
        Kind::PeerAuthentication,
        "spec.selector",
        "the_mode_of_a_workload_is_its_own_then_its_namespaces_then_the_meshs",
    ),
    (
        Kind::PeerAuthentication,
        "spec.portLevelMtls",
        "a port-level exception opens one port of a STRICT workload",
    ),
    (Kind::RequestAuthentication, "spec", "every_field_of_a_token_rule_is_carried_over"),
    (
        Kind::RequestAuthentication,
        "spec.targetRef",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (Kind::RequestAuthentication, "spec.selector", "every_field_of_a_token_rule_is_carried_over"),
    (
        Kind::RequestAuthentication,
        "spec.jwtRules[].issuer",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (
        Kind::RequestAuthentication,
        "spec.jwtRules[].jwks",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (
        Kind::RequestAuthentication,
        "spec.jwtRules[].jwksUri",
        "many_requests_for_the_keys_of_one_uri_are_one_fetch",
    ),
    (
        Kind::RequestAuthentication,
        "spec.jwtRules[].timeout",
        "a_server_that_is_silent_costs_the_timeout_once",
    ),
    (
        Kind::RequestAuthentication,
        "spec.jwtRules[].audiences",
        "audiences_are_compared_without_scheme_and_last_slash",
    ),
    (
        Kind::RequestAuthentication,
        "spec.jwtRules[].from",
        "tokens_are_found_where_the_rule_says_and_only_there",
    ),
    (Kind::AuthorizationPolicy, "spec", "every_field_of_a_policy_is_carried_over_as_it_is_written"),
    (Kind::AuthorizationPolicy, "spec.selector", "only frontend may call backend"),
    (
        Kind::AuthorizationPolicy,
        "spec.targetRef",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (Kind::AuthorizationPolicy, "spec.action", "a DENY policy wins over an ALLOW policy"),
    (Kind::AuthorizationPolicy, "spec.provider", "custom_policies_that_match_ask_each_provider_once"),
    (Kind::AuthorizationPolicy, "spec.rules[].from[].source.principals", "only frontend may call backend"),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notPrincipals",
        "principals_are_compared_whole_or_by_one_end",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.namespaces",
        "policies match ports, namespaces and address blocks",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notNamespaces",
        "namespaces_accounts_and_trust_domains_are_those_of_the_certificate",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.serviceAccounts",
        "namespaces_accounts_and_trust_domains_are_those_of_the_certificate",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notServiceAccounts",
        "namespaces_accounts_and_trust_domains_are_those_of_the_certificate",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.trustDomains",
        "a_source_with_principals_and_trust_domains_demands_both",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notTrustDomains",
        "namespaces_accounts_and_trust_domains_are_those_of_the_certificate",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.ipBlocks",
        "policies match ports, namespaces and address blocks",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notIpBlocks",
        "ip_blocks_are_prefixes_of_the_peer_whatever_its_form",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.remoteIpBlocks",
        "the_remote_address_is_the_one_that_the_trusted_proxies_have_seen",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notRemoteIpBlocks",
        "the_remote_address_is_the_one_that_the_trusted_proxies_have_seen",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.requestPrincipals",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].from[].source.notRequestPrincipals",
        "request_principals_are_issuer_and_subject",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.methods",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (Kind::AuthorizationPolicy, "spec.rules[].to[].operation.notMethods", "methods_are_compared_as_they_are"),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.paths",
        "tokens, identities, methods and paths decide at a waypoint, however a path is written",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.notPaths",
        "path_templates_match_whole_segments",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.hosts",
        "hosts_are_compared_whatever_their_case_and_port",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.notHosts",
        "hosts_are_compared_whatever_their_case_and_port",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.ports",
        "policies match ports, namespaces and address blocks",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].to[].operation.notPorts",
        "ports_are_those_that_were_addressed",
    ),
    (
        Kind::AuthorizationPolicy,
        "spec.rules[].when",
        "keys_of_source_and_destination_mean_what_the_fields_mean",
    ),
    (
        Kind::ServiceEntry,
        "spec.exportTo",
        "a_service_entry_is_seen_where_it_is_exported_to_as_far_as_that_can_be_told",
    ),
    (Kind::ServiceEntry, "spec", "a ServiceEntry leads to a server outside the mesh, by address and by name"),
    (
        Kind::ServiceEntry,
        "spec.resolution",
        "a ServiceEntry whose server has only a name is resolved on the client's node",
    ),
    (Kind::ServiceEntry, "spec.workloadSelector", "a_workload_selector_makes_pods_endpoints_of_an_entry"),
    (
        Kind::ServiceEntry,
        "spec.endpoints",
        "a_service_entry_has_one_service_per_host_and_workloads_for_its_endpoints",
    ),
    (Kind::WorkloadEntry, "spec", "workload_entries_are_workloads_with_their_own_identity_and_ports"),
    (Kind::WorkloadEntry, "spec.labels", "a WorkloadEntry is an endpoint of the service that selects it"),
    (Kind::WorkloadEntry, "spec.address", "a WorkloadEntry is an endpoint of the service that selects it"),
    (
        Kind::Telemetry,
        "spec",
        "every_section_of_a_telemetry_is_told_and_what_has_no_effect_is_in_its_condition",
    ),
    (
        Kind::Telemetry,
        "spec.tracing",
        "a request's spans reach Jaeger over OTLP and Zipkin, in the client's own trace",
    ),
    (
        Kind::Telemetry,
        "spec.metrics",
        "Telemetry turns metrics off, takes labels away and adds those that it computes",
    ),
    (
        Kind::Telemetry,
        "spec.accessLogging",
        "Telemetry and the mesh settings decide which requests have a line, and what it says",
    ),
    (Kind::HTTPRoute, "spec", "an_http_route_says_what_it_matches"),
    (
        Kind::HTTPRoute,
        "spec.parentRefs",
        "an HTTPRoute sends paths and headers where it says, before any VirtualService",
    ),
    (
        Kind::HTTPRoute,
        "spec.parentRefs[].sectionName",
        "a_gateway_is_told_with_its_listeners_for_http_and_the_routes_that_they_admit",
    ),
    (Kind::HTTPRoute, "spec.hostnames", "a_gateways_listener_takes_the_routes_of_the_most_specific_host"),
    (
        Kind::HTTPRoute,
        "spec.useDefaultGateways",
        "fields_without_effect_and_filters_that_cannot_be_applied_are_named",
    ),
    (
        Kind::HTTPRoute,
        "spec.rules[].matches",
        "an HTTPRoute sends paths and headers where it says, before any VirtualService",
    ),
    (Kind::HTTPRoute, "spec.rules[].matches[].queryParams", "of_query_parameters_the_first_of_a_name_counts"),
    (
        Kind::HTTPRoute,
        "spec.rules[].backendRefs",
        "an HTTPRoute sends paths and headers where it says, before any VirtualService",
    ),
    (Kind::HTTPRoute, "spec.rules[].backendRefs[].namespace", "a_backend_of_another_namespace_needs_a_grant"),
    (
        Kind::HTTPRoute,
        "spec.rules[].backendRefs[].filters",
        "filters_of_a_rule_and_of_a_backend_are_carried_over",
    ),
    (Kind::HTTPRoute, "spec.rules[].filters", "filters_of_a_rule_and_of_a_backend_are_carried_over"),
    (
        Kind::HTTPRoute,
        "spec.rules[].filters[].urlRewrite",
        "an HTTPRoute sends paths and headers where it says, before any VirtualService",
    ),
    (
        Kind::HTTPRoute,
        "spec.rules[].filters[].requestRedirect",
        "an HTTPRoute sends paths and headers where it says, before any VirtualService",
    ),
    (
        Kind::HTTPRoute,
        "spec.rules[].filters[].responseHeaderModifier",
        "an HTTPRoute sends paths and headers where it says, before any VirtualService",
    ),
    (Kind::HTTPRoute, "spec.rules[].timeouts", "timeouts_retries_and_sessions_are_carried_over"),
    (Kind::HTTPRoute, "spec.rules[].retry", "timeouts_retries_and_sessions_are_carried_over"),
    (
        Kind::HTTPRoute,
        "spec.rules[].sessionPersistence",
        "a_session_stays_with_its_endpoint_while_that_takes_requests",
    ),
    (Kind::GRPCRoute, "spec", "a_grpc_route_matches_methods_as_paths"),
    (
        Kind::GRPCRoute,
        "spec.rules[].backendRefs[].filters",
        "filters_of_a_rule_and_of_a_backend_are_carried_over",
    ),
    (Kind::GRPCRoute, "spec.rules[].filters", "filters_of_a_rule_and_of_a_backend_are_carried_over"),
    (
        Kind::GRPCRoute,
        "spec.rules[].sessionPersistence",
        "a_session_stays_with_its_endpoint_while_that_takes_requests",
    ),
    (Kind::TCPRoute, "spec", "routes_of_connections_have_weights_and_tls_routes_the_name_of_the_service"),
    (Kind::TLSRoute, "spec", "routes_of_connections_have_weights_and_tls_routes_the_name_of_the_service"),
    (Kind::ReferenceGrant, "spec", "a_backend_of_another_namespace_needs_a_grant"),
    (Kind::GatewayClass, "spec", "a_class_of_any_name_is_served_while_it_has_a_controller_of_ours"),
    (Kind::Gateway, "spec", "a_gateway_is_told_with_its_listeners_for_http_and_the_routes_that_they_admit"),
    (
        Kind::IstioGateway,
        "spec",
        "an Istio Gateway serves HTTP, HTTPS, TLS and TCP at the proxies that it selects",
    ),
    (
        Kind::IstioGateway,
        "spec.servers[].tls",
        "an Istio Gateway lets in clients with a certificate of the right authority and name only",
    ),
    (
        Kind::IstioGateway,
        "spec.servers[].tls.httpsRedirect",
        "an Istio Gateway serves HTTP, HTTPS, TLS and TCP at the proxies that it selects",
    ),
    (
        Kind::IstioGateway,
        "spec.servers[].tls.m",
        "certificates_are_those_of_the_proxies_namespace_and_go_to_their_account",
    ),
    (
        Kind::IstioGateway,
        "spec.servers[].tls.mode",
        "an Istio Gateway lets in clients with a certificate of the right authority and name only",
    ),
    (
        Kind::IstioGateway,
        "spec.servers[].hosts",
        "a_virtual_service_is_bound_where_host_and_namespace_are_right",
    ),
    (Kind::IstioGateway, "spec.servers[].port", "a_port_is_that_of_the_proxies_service_where_it_has_it"),
    (Kind::Gateway, "spec.listeners[].allowedRoutes", "a_waypoint_admits_the_namespaces_of_its_listener"),
    (
        Kind::Gateway,
        "spec.listeners[].tls",
        "a_certificate_is_told_to_the_proxies_of_its_gateway_and_the_listener_names_it",
    ),
];

/// The same for the parts of a DestinationRule's policies, wherever they stand.
pub(super) const POLICY: &[(&str, &str)] = &[
    ("connectionPool", "every_limit_of_a_connection_pool_is_carried_over"),
    (
        "connectionPool.tcp.maxConnections",
        "requests_beyond_the_limit_are_refused_and_those_beyond_the_connections_wait",
    ),
    (
        "connectionPool.http.http1MaxPendingRequests",
        "each_limit_holds_and_a_permit_that_is_dropped_makes_room",
    ),
    (
        "connectionPool.http.http2MaxRequests",
        "requests_beyond_the_limit_are_refused_and_those_beyond_the_connections_wait",
    ),
    ("connectionPool.http.maxRetries", "each_limit_holds_and_a_permit_that_is_dropped_makes_room"),
    ("loadBalancer", "every_way_of_balancing_is_carried_over"),
    ("loadBalancer.simple", "least_request_takes_the_less_loaded_of_two"),
    ("loadBalancer.consistentHash", "a_key_keeps_its_endpoint_and_requests_without_one_go_anywhere"),
    (
        "loadBalancer.consistentHash.httpCookie",
        "a_cookie_is_given_to_a_client_that_has_none_and_hashes_as_it_comes_back",
    ),
    (
        "loadBalancer.localityLbSetting",
        "requests_stay_near_and_go_further_step_by_step_when_what_is_near_fails",
    ),
    (
        "loadBalancer.localityLbSetting.distribute",
        "a_distribution_gives_each_locality_its_share_and_others_nothing",
    ),
    ("loadBalancer.localityLbSetting.failover", "failover_rules_send_a_region_to_another_one"),
    (
        "loadBalancer.localityLbSetting.failoverPriority",
        "failover_priority_goes_by_the_labels_that_are_shared_in_their_order",
    ),
    ("loadBalancer.zoneAwareLbSetting", "zone_aware_requests_stay_in_the_zone_as_far_as_it_can_take_them"),
    ("loadBalancer.warmup", "a_new_endpoint_gets_its_full_share_only_after_its_warmup"),
    ("outlierDetection", "five_errors_in_a_row_eject_and_a_success_starts_the_count_anew"),
    ("outlierDetection.consecutive5xxErrors", "meshctl shows which endpoint fails, and that it is ejected"),
    ("outlierDetection.baseEjectionTime", "an_ejection_takes_the_base_time_as_often_as_there_were_ejections"),
    ("outlierDetection.maxEjectionPercent", "the_share_of_ejected_endpoints_stays_below_its_maximum"),
    ("outlierDetection.minHealthPercent", "with_too_few_left_ejections_are_disregarded"),
    ("outlierDetection.consecutiveGatewayErrors", "gateway_errors_have_a_limit_of_their_own"),
    ("tls", "an_application_with_tls_is_reached_by_it_if_it_proves_its_name"),
    ("proxyProtocol", "what_has_no_effect_or_names_nothing_is_told"),
    ("tunnel", "what_has_no_effect_or_names_nothing_is_told"),
    ("retryBudget", "a_retry_budget_takes_the_place_of_max_retries"),
];

/// The part of a policy, or of a filter, that a field is, wherever that stands.
pub(super) fn part(kind: Kind, path: &str) -> Option<&str> {
    let places: &[&str] = match kind {
        Kind::DestinationRule => &["trafficPolicy.portLevelSettings[].", "trafficPolicy."],
        Kind::HTTPRoute | Kind::GRPCRoute => &["rules[].backendRefs[].filters[].", "rules[].filters[]."],
        _ => &[],
    };
    places.iter().filter_map(|at| path.split_once(at)).map(|(_, part)| part).next()
}

/// The test of a field.
pub(super) fn test(kind: Kind, path: &str) -> Option<&'static str> {
    let part = part(kind, path);
    let policy = POLICY.iter().filter(|(prefix, _)| part.is_some_and(|part| part.starts_with(prefix)));
    if let Some((_, test)) = policy.max_by_key(|(prefix, _)| prefix.len()) {
        return Some(test);
    }
    let all = SHOWN.iter().filter(|(of, prefix, _)| *of == kind && path.starts_with(prefix));
    all.max_by_key(|(_, prefix, _)| prefix.len()).map(|(.., test)| *test)
}
