use super::*;
use crate::testing::load;

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart, version: v1}}
spec: {nodeName: a, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, clusterIP: 10.0.0.1, ports: [{name: http, port: 80}]}
---
";

/// A policy in a namespace that is not in the mesh.
const OUTSIDE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: old}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: old}
spec: {mtls: {mode: STRICT}}
";

fn found(yaml: &str) -> Vec<(Severity, String, String)> {
    let state = load(&format!("{SHOP}{yaml}"));
    let findings = analyze(&state, &Mesh::default(), |_| None);
    findings.into_iter().map(|f| (f.severity, f.code, f.message)).collect()
}

fn codes(yaml: &str) -> Vec<String> {
    found(yaml).into_iter().map(|(_, code, _)| code).collect()
}

#[test]
fn objects_that_are_as_they_should_be_give_no_finding() {
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, rules: [{from: [{source: {namespaces: [shop]}}]}]}
";
    assert_eq!(found(policy), []);
}

#[test]
fn a_document_that_cannot_be_used_is_an_error_that_names_field_and_line() {
    let state = load(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {action: PERMIT}\n",
    );
    let findings = analyze(&state, &Mesh::default(), |_| None);
    let text = findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(text.starts_with("a.yaml:"), "{text}");
    assert!(text.contains("error [Invalid] AuthorizationPolicy shop/p: spec.action: "), "{text}");
}

#[test]
fn a_selector_that_matches_no_workload_is_told_with_its_labels() {
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: crat}}}
";
    let found = found(policy);
    let [(Severity::Warning, code, message)] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(code, "SelectorMatchesNothing");
    assert!(message.contains("app=crat") && message.contains("its namespace"), "{message}");
}

#[test]
fn a_policy_of_the_root_namespace_may_select_workloads_anywhere() {
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: istio-system}
spec: {selector: {matchLabels: {app: cart}}}
";
    assert_eq!(found(policy), []);
}

#[test]
fn a_subset_without_pods_is_told() {
    let rule = |version: &str| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: cart, namespace: shop}}
spec: {{host: cart, subsets: [{{name: one, labels: {{version: v1}}}}, {{name: two, labels: {{version: {version}}}}}]}}
"
        )
    };
    let found = found(&rule("v2"));
    let subset = found.iter().find(|(_, code, _)| code == "SubsetMatchesNothing");
    let message = &subset.unwrap_or_else(|| panic!("{found:?}")).2;
    assert!(message.starts_with("spec.subsets[1]: ") && message.contains("version=v2"), "{message}");
    assert!(!codes(&rule("v1")).contains(&"SubsetMatchesNothing".to_owned()));
}

#[test]
fn a_host_that_is_no_services_is_not_taken_for_one() {
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart, namespace: shop}
spec: {host: cart.shop, subsets: [{name: two, labels: {version: v2}}]}
";
    assert!(!codes(rule).contains(&"SubsetMatchesNothing".to_owned()), "{:?}", found(rule));
}

#[test]
fn a_policy_where_nothing_is_in_the_mesh_is_told_with_the_label_to_set() {
    let found = found(OUTSIDE);
    let [(Severity::Info, code, message)] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(code, "NamespaceNotInMesh");
    assert!(message.contains("kubectl label namespace old istio.io/dataplane-mode=ambient"), "{message}");
}

#[test]
fn a_policy_about_tokens_that_nobody_checks_is_told() {
    let policy = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  targetRefs: [{kind: Service, group: '', name: cart}]
  rules: [{from: [{source: {requestPrincipals: ['*']}}]}]
";
    let issuer = "
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r, namespace: shop}
spec: {targetRefs: [{kind: Service, group: '', name: cart}], jwtRules: [{issuer: i, jwksUri: 'http://cart.shop/jwks'}]}
";
    assert!(codes(policy).contains(&"NoTokenIssuer".to_owned()), "{:?}", found(policy));
    let both = format!("{policy}{issuer}");
    assert!(!codes(&both).contains(&"NoTokenIssuer".to_owned()), "{:?}", found(&both));
}

#[test]
fn an_annotation_keeps_a_finding_quiet_but_not_what_is_refused() {
    let policy = |codes: &str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: shop, annotations: {{galley.istio.io/analyze-suppress: '{codes}'}}}}
spec: {{selector: {{matchLabels: {{app: crat}}}}}}
"
        )
    };
    assert_eq!(codes(&policy("Other, SelectorMatchesNothing")), Vec::<String>::new());
    assert_eq!(codes(&policy("*")), Vec::<String>::new());
    assert_eq!(codes(&policy("Other")), ["SelectorMatchesNothing"]);
}

#[test]
fn the_worst_comes_first() {
    let more = "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: crat}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: q, namespace: shop}
spec: {action: PERMIT}
";
    assert_eq!(codes(&[OUTSIDE, more].concat()), ["Invalid", "SelectorMatchesNothing", "NamespaceNotInMesh"]);
}
