use std::sync::Arc;

use mesh_core::policy::{Conn, Policy, PolicySet, evaluate};
use mesh_core::xds::proto::security::string_match::MatchType;
use mesh_core::xds::proto::security::{Action, Clause, Match, Scope, ServiceAccountMatch, StringMatch};

use crate::convert::Resources;
use crate::testing::resources;

fn policy(spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n{spec}"
    )
}

fn exact(value: &str) -> StringMatch {
    StringMatch { match_type: Some(MatchType::Exact(value.into())) }
}

fn prefix(value: &str) -> StringMatch {
    StringMatch { match_type: Some(MatchType::Prefix(value.into())) }
}

/// The clauses of each rule of `shop/p`.
fn clauses(text: &str) -> Vec<Vec<Clause>> {
    resources(text).authorizations["shop/p"].rules.iter().map(|r| r.clauses.clone()).collect()
}

fn one(m: Match) -> Clause {
    Clause { matches: vec![m] }
}

/// Whether a connection from `identity` to `port` gets through the policies of `resources` that hold for a
/// workload of namespace shop which lists `listed`.
fn allowed(resources: &Resources, listed: &[String], identity: Option<&str>, port: u16) -> bool {
    let policies = resources
        .authorizations
        .iter()
        .filter(|(key, a)| match a.scope() {
            Scope::Global => true,
            Scope::Namespace => a.namespace == "shop",
            Scope::WorkloadSelector => listed.contains(key),
        })
        .map(|(_, a)| Arc::new(Policy::decode(a).unwrap()))
        .collect();
    let conn = Conn {
        src: "10.1.0.9:40000".parse().unwrap(),
        identity: identity.map(|i| i.parse().unwrap()),
        dst: format!("10.1.0.5:{port}").parse().unwrap(),
    };
    evaluate(&PolicySet { policies, unknown: vec![] }, &conn).is_allowed()
}

const FRONTEND: &str = "spiffe://cluster.local/ns/default/sa/frontend";
const OTHER: &str = "spiffe://cluster.local/ns/default/sa/other";

#[test]
fn only_frontend_may_call_backend() {
    // The sample that every introduction to Istio shows.
    let text = policy(
        "  rules:\n    - from:\n        - source:\n            principals: [\"cluster.local/ns/default/sa/frontend\"]\n",
    );
    let resources = resources(&text);
    let p = &resources.authorizations["shop/p"];
    assert_eq!((p.action(), p.scope(), p.dry_run), (Action::Allow, Scope::Namespace, false));
    assert_eq!(
        clauses(&text),
        [[one(Match {
            principals: vec![exact("cluster.local/ns/default/sa/frontend")],
            ..Match::default()
        })]]
    );
    assert_eq!(resources.condition("AuthorizationPolicy shop/p", "ZtunnelAccepted").reason, "Accepted");
    assert!(allowed(&resources, &[], Some(FRONTEND), 80));
    assert!(!allowed(&resources, &[], Some(OTHER), 80));
    assert!(!allowed(&resources, &[], None, 80));
}

#[test]
fn every_connection_level_field_is_carried_over() {
    let text = policy(
        "  action: DENY
  rules:
  - from:
    - source: {namespaces: [a, \"b*\"], notNamespaces: [\"*c\"], ipBlocks: [10.0.0.0/8], notIpBlocks: [10.1.2.3]}
    - source: {serviceAccounts: [x/y, z], notPrincipals: [\"*\"]}
    to:
    - operation: {ports: [\"80\"], notPorts: [\"81\"]}
    when:
    - {key: source.ip, values: [\"fd00::/8\"]}
    - {key: source.namespace, notValues: [d]}
    - {key: source.principal, values: [\"td/ns/a/sa/b\"]}
    - {key: source.serviceAccount, values: [e/f]}
    - {key: destination.ip, notValues: [10.2.0.0/16]}
    - {key: destination.port, values: [\"443\"]}
",
    );
    let rules = clauses(&text);
    let [from, to, ip, namespace, principal, account, destination, port] = rules[0].as_slice() else {
        panic!("{rules:#?}");
    };
    let first = &from.matches[0];
    assert_eq!(first.namespaces, [exact("a"), prefix("b")]);
    assert_eq!(first.not_namespaces[0].match_type, Some(MatchType::Suffix("c".into())));
    assert_eq!((first.source_ips[0].length, first.not_source_ips[0].length), (8, 32));
    let second = &from.matches[1];
    let account_match =
        |ns: &str, sa: &str| ServiceAccountMatch { namespace: ns.into(), service_account: sa.into() };
    assert_eq!(second.service_accounts, [account_match("x", "y"), account_match("shop", "z")]);
    assert_eq!(second.not_principals[0].match_type, Some(MatchType::Presence(())));
    assert_eq!(
        (&to.matches[0].destination_ports, &to.matches[0].not_destination_ports),
        (&vec![80], &vec![81])
    );
    assert_eq!(ip.matches[0].source_ips[0].address.len(), 16);
    assert_eq!(namespace.matches[0].not_namespaces, [exact("d")]);
    assert_eq!(principal.matches[0].principals, [exact("td/ns/a/sa/b")]);
    assert_eq!(account.matches[0].service_accounts, [account_match("e", "f")]);
    assert_eq!(destination.matches[0].not_destination_ips[0].length, 16);
    assert_eq!(port.matches[0].destination_ports, [443]);
}

#[test]
fn an_allow_rule_that_needs_http_is_left_out_so_that_less_is_allowed() {
    let text = policy(
        "  rules:\n  - from: [{source: {principals: [\"cluster.local/ns/default/sa/frontend\"]}}]\n    to: [{operation: {methods: [GET]}}]\n",
    );
    let resources = resources(&text);
    assert!(resources.authorizations["shop/p"].rules.is_empty());
    assert!(!allowed(&resources, &[], Some(FRONTEND), 80), "nothing is allowed");
    let condition = resources.condition("AuthorizationPolicy shop/p", "ZtunnelAccepted");
    assert_eq!((condition.status, condition.reason.as_str()), (true, "UnsupportedValue"));
    assert!(condition.message.contains("rules[0].to[0].operation.methods"), "{}", condition.message);
}

#[test]
fn a_deny_rule_that_needs_http_applies_without_it_so_that_more_is_denied() {
    let deny = |rule: &str| policy(&format!("  action: DENY\n  rules:\n  - {rule}\n"));
    let from = "from: [{source: {principals: [\"cluster.local/ns/default/sa/other\"]}}]";
    // Istio's own conversion denies nothing here.
    let text = deny(&format!("{from}\n    to: [{{operation: {{methods: [DELETE]}}}}]"));
    let converted = resources(&text);
    assert!(!allowed(&converted, &[], Some(OTHER), 80));
    assert!(allowed(&converted, &[], Some(FRONTEND), 80));
    assert!(
        converted.condition("AuthorizationPolicy shop/p", "ZtunnelAccepted").message.contains("denies more")
    );

    let mixed = resources(&deny("to: [{operation: {ports: [\"80\"], paths: [/admin]}}]"));
    assert!(!allowed(&mixed, &[], Some(OTHER), 80));
    assert!(allowed(&mixed, &[], Some(OTHER), 81));

    let one_of_two = resources(&deny("to: [{operation: {methods: [PUT]}}, {operation: {ports: [\"80\"]}}]"));
    assert!(!allowed(&one_of_two, &[], Some(OTHER), 81), "the entry with nothing left matches every port");

    let when = resources(&deny("when: [{key: \"request.headers[x]\", values: [y]}]"));
    assert!(!allowed(&when, &[], Some(OTHER), 80));

    let source =
        resources(&deny("from: [{source: {requestPrincipals: [\"*\"]}}, {source: {namespaces: [a]}}]"));
    assert!(!allowed(&source, &[], Some(OTHER), 80));
}

#[test]
fn trust_domains_are_what_principals_start_with() {
    let text = policy(
        "  rules:\n  - from: [{source: {trustDomains: [partner.example, \"corp*\"], notTrustDomains: [evil]}}]\n",
    );
    let expected = Match {
        principals: vec![prefix("partner.example/"), prefix("corp")],
        not_principals: vec![prefix("evil/")],
        ..Match::default()
    };
    assert_eq!(clauses(&text), [[one(expected)]]);
    let when = policy(
        "  action: DENY\n  rules:\n  - when: [{key: source.trustDomain, notValues: [cluster.local]}]\n",
    );
    let converted = resources(&when);
    assert!(allowed(&converted, &[], Some(OTHER), 80));
    assert!(!allowed(&converted, &[], Some("spiffe://elsewhere/ns/default/sa/other"), 80));
    assert!(!allowed(&converted, &[], None, 80), "no identity is of no trust domain");
}

#[test]
fn a_source_with_principals_and_trust_domains_demands_both() {
    let text = policy(
        "  rules:\n  - from:\n    - source: {principals: [\"*/ns/a/sa/b\"], trustDomains: [one]}\n    - source: {principals: [\"two/ns/a/sa/b\"]}\n    to: [{operation: {ports: [\"80\"]}}]\n",
    );
    let rules = clauses(&text);
    assert_eq!((rules.len(), rules[0].len(), rules[1].len()), (2, 3, 2));
    let converted = resources(&text);
    assert!(allowed(&converted, &[], Some("spiffe://one/ns/a/sa/b"), 80));
    assert!(allowed(&converted, &[], Some("spiffe://two/ns/a/sa/b"), 80));
    assert!(!allowed(&converted, &[], Some("spiffe://three/ns/a/sa/b"), 80));
    assert!(!allowed(&converted, &[], Some("spiffe://one/ns/a/sa/b"), 81));
}

#[test]
fn a_trust_domain_that_cannot_be_compared_makes_the_policy_stricter() {
    let rule = "  rules:\n  - from: [{source: {namespaces: [default], trustDomains: [\"*.example\"]}}]\n";
    assert!(resources(&policy(rule)).authorizations["shop/p"].rules.is_empty(), "ALLOW: left out");
    let deny = resources(&policy(&format!("  action: DENY\n{rule}")));
    assert!(!allowed(&deny, &[], Some(OTHER), 80), "DENY: applies without it");
    let condition = deny.condition("AuthorizationPolicy shop/p", "ZtunnelAccepted");
    assert!(condition.message.contains("trustDomains (suffix match)"), "{}", condition.message);
}

#[test]
fn principals_of_the_mesh_match_in_every_alias_of_its_trust_domain() {
    let settings = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    \
                    trustDomain: new\n    trustDomainAliases: [old, older]\n";
    let expand = |principal: &str| {
        let text = format!(
            "{settings}{}",
            policy(&format!("  rules:\n  - from: [{{source: {{principals: [\"{principal}\"]}}}}]\n"))
        );
        clauses(&text)[0][0].matches[0].principals.clone()
    };
    let all = ["new/ns/a/sa/b", "old/ns/a/sa/b", "older/ns/a/sa/b"].map(exact);
    assert_eq!(expand("new/ns/a/sa/b"), all);
    assert_eq!(expand("old/ns/a/sa/b"), all);
    assert_eq!(expand("cluster.local/ns/a/sa/b"), all, "cluster.local stands for the mesh");
    assert_eq!(expand("foreign/ns/a/sa/b"), [exact("foreign/ns/a/sa/b")]);
    assert_eq!(expand("old/ns/a/*"), ["new/ns/a/", "old/ns/a/", "older/ns/a/"].map(prefix));
    assert_eq!(expand("*/sa/b")[0].match_type, Some(MatchType::Suffix("/sa/b".into())));
}

#[test]
fn scope_selector_and_dry_run_follow_namespace_selector_and_annotation() {
    let pod = |namespace: &str, name: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\nspec: {{containers: []}}\nstatus: {{podIP: 10.0.0.1}}\n"
        )
    };
    let with = |namespace: &str, selector: &str| {
        let text = policy(selector).replace("namespace: shop", &format!("namespace: {namespace}"));
        resources(&format!(
            "{}{}{text}",
            pod("shop", "web"),
            pod("other", "web").replace("10.0.0.1", "10.0.0.2")
        ))
    };
    let select = "  selector: {matchLabels: {app: web}}\n";
    let listed = |r: &Resources, uid: &str| r.workload(uid).authorization_policies.clone();
    let root = with("istio-system", "  action: ALLOW\n");
    assert_eq!(root.authorizations["istio-system/p"].scope(), Scope::Global);
    let root = with("istio-system", select);
    assert_eq!(root.authorizations["istio-system/p"].scope(), Scope::WorkloadSelector);
    assert_eq!(listed(&root, "Kubernetes//Pod/other/web"), ["istio-system/p"]);
    let own = with("shop", select);
    assert_eq!(listed(&own, "Kubernetes//Pod/shop/web"), ["shop/p"]);
    assert!(listed(&own, "Kubernetes//Pod/other/web").is_empty());
    let dry = policy("  action: DENY\n")
        .replace("namespace: shop", "namespace: shop, annotations: {istio.io/dry-run: \"true\"}");
    assert!(resources(&dry).authorizations["shop/p"].dry_run);
}

#[test]
fn what_nodes_do_not_enforce_is_not_sent_and_says_so() {
    for (spec, kind) in [
        ("  action: AUDIT\n", "ZtunnelAccepted"),
        ("  action: CUSTOM\n  provider: {name: x}\n", "ZtunnelAccepted"),
    ] {
        let resources = resources(&policy(spec));
        assert!(resources.authorizations.is_empty(), "{spec}");
        let condition = resources.condition("AuthorizationPolicy shop/p", kind);
        assert_eq!((condition.status, condition.reason.as_str()), (false, "UnsupportedValue"), "{spec}");
    }
}

/// PeerAuthentications (name, namespace, created, spec) and what pod shop/web (app: web) lists; then whether
/// plaintext gets to ports 80 and 81.
fn peers(given: &[(&str, &str, &str, &str)]) -> (Vec<String>, [bool; 2]) {
    let mut text = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\nspec: {containers: []}\nstatus: {podIP: 10.0.0.1}\n".to_owned();
    for (name, namespace, created, spec) in given {
        text += &format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}, creationTimestamp: \"2026-01-{created}T00:00:00Z\"}}\nspec: {{{spec}}}\n"
        );
    }
    let resources = resources(&text);
    assert_eq!(
        resources.authorizations.contains_key("istio-system/istio_converted_static_strict"),
        !given.is_empty()
    );
    let listed = resources.workload("Kubernetes//Pod/shop/web").authorization_policies.clone();
    let plain = [80, 81].map(|port| allowed(&resources, &listed, None, port));
    assert!(allowed(&resources, &listed, Some(OTHER), 80), "identity is always enough");
    (listed, plain)
}

#[test]
fn the_mode_of_a_workload_is_its_own_then_its_namespaces_then_the_meshs() {
    let strict = "mtls: {mode: STRICT}";
    let permissive = "mtls: {mode: PERMISSIVE}";
    let select = "selector: {matchLabels: {app: web}}";
    let is_static = vec!["istio-system/istio_converted_static_strict".to_owned()];
    let none = Vec::<String>::new();
    assert_eq!(peers(&[]), (none.clone(), [true; 2]));
    assert_eq!(peers(&[("m", "istio-system", "01", strict)]), (is_static.clone(), [false; 2]));
    assert_eq!(peers(&[("n", "shop", "01", strict)]).0, is_static);
    assert_eq!(peers(&[("n", "other", "01", strict)]).0, none);
    assert_eq!(peers(&[("m", "istio-system", "01", strict), ("n", "shop", "02", permissive)]).0, none);
    assert_eq!(
        peers(&[("m", "istio-system", "01", strict), ("n", "shop", "02", "mtls: {mode: UNSET}")]).0,
        is_static
    );
    assert_eq!(
        peers(&[("n", "shop", "01", strict), ("w", "shop", "02", &format!("{select}, {permissive}"))]).0,
        none
    );
    assert_eq!(peers(&[("n", "shop", "01", strict), ("w", "shop", "02", select)]).0, is_static);
    assert_eq!(peers(&[("n", "shop", "01", "mtls: {mode: DISABLE}")]).0, none);
    assert_eq!(
        peers(&[("young", "shop", "02", strict), ("old", "shop", "01", permissive)]).0,
        none,
        "the oldest counts"
    );
}

#[test]
fn ports_may_differ_from_their_workload() {
    let select = "selector: {matchLabels: {app: web}}";
    let own = vec!["shop/converted_peer_authentication_w".to_owned()];
    let w = |spec: &str| {
        peers(&[
            ("m", "istio-system", "01", "mtls: {mode: STRICT}"),
            ("w", "shop", "02", &format!("{select}, {spec}")),
        ])
    };
    assert_eq!(
        w("mtls: {mode: STRICT}, portLevelMtls: {81: {mode: PERMISSIVE}}"),
        (own.clone(), [false, true])
    );
    assert_eq!(w("portLevelMtls: {81: {mode: DISABLE}}"), (own.clone(), [false, true]), "inherited STRICT");
    assert_eq!(w("mtls: {mode: PERMISSIVE}, portLevelMtls: {81: {mode: STRICT}}"), (own, [true, false]));
    let (listed, plain) = w("mtls: {mode: STRICT}, portLevelMtls: {81: {mode: STRICT}}");
    assert_eq!((listed[0].as_str(), plain), ("istio-system/istio_converted_static_strict", [false; 2]));
    assert_eq!(w("mtls: {mode: PERMISSIVE}, portLevelMtls: {81: {mode: UNSET}}"), (vec![], [true; 2]));
}

#[test]
fn a_peer_authentication_without_effect_says_so() {
    let text = |name: &str, created: &str, mode: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop, creationTimestamp: \"2026-01-{created}T00:00:00Z\"}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    let resources = resources(&(text("old", "01", "DISABLE") + &text("young", "02", "STRICT")));
    let young = resources.condition("PeerAuthentication shop/young", "ZtunnelAccepted");
    assert_eq!((young.status, young.reason.as_str()), (false, "Conflicted"));
    assert!(resources.conditions.iter().any(|c| c.message.contains("DISABLE is treated as PERMISSIVE")));
}

#[test]
fn a_policy_of_a_workload_that_serves_udp_says_that_it_does_not_hold_there() {
    let served = |protocol: &str, namespace: &str| {
        let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: a}}, action: DENY, rules: [{}]}
";
        let service = format!(
            "
---
apiVersion: v1
kind: Service
metadata: {{name: mixed, namespace: {namespace}}}
spec:
  clusterIP: 10.96.0.9
  selector: {{app: a}}
  ports: [{{name: x, port: 7000, protocol: {protocol}}}, {{name: dns, port: 53, protocol: UDP}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: a, namespace: {namespace}, labels: {{app: a}}}}
spec: {{nodeName: n1, containers: [{{name: main, image: none}}]}}
status: {{phase: Running, podIP: 10.1.0.5}}
"
        );
        let resources = resources(&format!("{policy}{service}"));
        let said = resources.conditions.into_iter().find(|c| c.kind == "undermesh.io/Transports");
        said.map(|condition| condition.message)
    };
    let message = served("UDP", "shop").unwrap();
    assert!(message.contains("(shop/mixed:7000)"), "{message}");
    assert_eq!(served("TCP", "shop"), None);
    assert_eq!(served("UDP", "elsewhere"), None, "the policy selects nothing there");
}
