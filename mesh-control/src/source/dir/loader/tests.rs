use super::*;
use crate::testing::{files, load};

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nspec: {containers: []}\n";

fn policy(action: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n  action: {action}\n"
    )
}

/// Everything that is wrong with a document: line, field, start of the message.
#[track_caller]
fn refused(yaml: &str, expected: &[(usize, &str, &str)]) {
    let state = load(yaml);
    let found: Vec<_> =
        state.problems.iter().map(|p| (p.line, p.field.as_str(), p.message.as_str())).collect();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((line, field, message), (want_line, want_field, want_message)) in found.iter().zip(expected) {
        assert_eq!((line, field), (want_line, want_field), "{found:#?}");
        assert!(message.contains(want_message), "{message:?} does not contain {want_message:?}");
    }
}

#[test]
fn a_bad_document_is_reported_with_line_field_and_fix() {
    refused("kind: Pod\nmetadata: {name: a}\n", &[(1, "apiVersion", "missing; write")]);
    refused("apiVersion: v1\nmetadata: {name: a}\n", &[(1, "kind", "missing")]);
    refused("apiVersion: v1\nkind: Pdo\nmetadata: {name: a}\n", &[(2, "kind", "did you mean Pod?")]);
    refused(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n",
        &[(2, "kind", "unknown kind Deployment")],
    );
    refused(
        "apiVersion: networking.istio.io/v1\nkind: EnvoyFilter\nmetadata: {name: a}\n",
        &[(2, "kind", "not supported yet")],
    );
    refused(
        "apiVersion: v2\nkind: Pod\nmetadata: {name: a}\n",
        &[(1, "apiVersion", "Pod has apiVersion v1")],
    );
    refused("apiVersion: v1\nkind: Pod\nmetadata: {}\n", &[(3, "metadata.name", "missing")]);
    refused("apiVersion: v1\nkind: Pod\nmetadata:\n  name: A_b\n", &[(4, "metadata.name", "no DNS name")]);
    refused(
        "a: 1\n---\nb: [1\n",
        &[(1, "apiVersion", "missing"), (3, "", "is no valid YAML: unclosed bracket '['")],
    );
    refused("just text\n", &[(1, "apiVersion", "missing")]);
}

#[test]
fn a_bad_kubernetes_object_is_reported_with_line_field_and_fix() {
    let service = |spec: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec:\n{spec}");
    refused(
        &service("  ports:\n  - port: 0\n"),
        &[(6, "spec.ports[0].port", "write a number from 1 to 65535")],
    );
    refused(&service("  ports:\n  - port: 70000\n"), &[(6, "spec.ports[0].port", "70000 is no port")]);
    refused(
        &service("  ports:\n  - port: \"80\"\n"),
        &[(6, "spec.ports[0].port", "write it without quotes: 80")],
    );
    refused(
        &service("  ports:\n  - {port: 80, targetPort: \"8080\"}\n"),
        &[(6, "spec.ports[0].targetPort", "write the number without quotes")],
    );
    refused(
        &service("  clusterIP: 10.0.0\n  ports: [{port: 80}]\n"),
        &[(5, "spec.clusterIP", "\"10.0.0\" is no IP address")],
    );
    refused(
        &service("  trafficDistribution: Near\n  ports: [{port: 80}]\n"),
        &[(5, "spec.trafficDistribution", "PreferSameZone")],
    );
    refused(&service("  prots: []\n  ports: [{port: 80}]\n"), &[(5, "spec.prots", "did you mean `ports`?")]);
    refused(
        &service("  ports:\n  - port: 80\n  - port: 81\n"),
        &[(6, "spec.ports[0].name", "names each of them"), (7, "spec.ports[1].name", "names each of them")],
    );
    refused(&service("  type: ClusterIP\n"), &[(4, "spec.ports", "at least one port")]);
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}\nstatus:\n  podIP: 1.2.3\n  phase: Runing\n",
        &[(6, "status.podIP", "no IP address"), (7, "status.phase", "\"Runing\" is no phase")],
    );
}

#[test]
fn a_bad_policy_is_reported_with_line_field_and_fix() {
    let rules = |rules: &str| format!("{}  rules:\n{rules}", policy("ALLOW"));
    refused(&policy("PERMIT"), &[(5, "spec.action", "unknown variant `PERMIT`")]);
    refused(
        &rules("  - from:\n    - source:\n        principals: [\"spiffe://a/ns/b/sa/c\"]\n"),
        &[(9, "spec.rules[0].from[0].source.principals[0]", "without spiffe://: a/ns/b/sa/c")],
    );
    refused(
        &rules("  - from:\n    - source:\n        principals: [\"a*b\"]\n"),
        &[(9, "spec.rules[0].from[0].source.principals[0]", "has * inside")],
    );
    refused(&rules("  - from:\n    - source: {}\n"), &[(8, "spec.rules[0].from[0].source", "is empty")]);
    refused(
        &rules("  - from:\n    - source: {ipBlocks: [10.0.0.0/33]}\n"),
        &[(8, "spec.rules[0].from[0].source.ipBlocks[0]", "neither an IP address nor a CIDR")],
    );
    refused(
        &rules("  - to:\n    - operation: {ports: [\"http\"]}\n"),
        &[(8, "spec.rules[0].to[0].operation.ports[0]", "\"http\" is no port")],
    );
    refused(
        &rules("  - to:\n    - operation: {ports: [80]}\n"),
        &[(8, "spec.rules[0].to[0].operation.ports[0]", "write it in quotes: \"80\"")],
    );
    refused(
        &rules("  - when:\n    - {key: source.ipp, values: [\"1.2.3.4\"]}\n"),
        &[(8, "spec.rules[0].when[0].key", "source.ip,")],
    );
    refused(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec:\n  mtls: {mode: STRIKT}\n",
        &[(5, "spec.mtls.mode", "unknown variant `STRIKT`, expected one of")],
    );
    refused(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec:\n  portLevelMtls:\n    8080: {mode: STRICT}\n",
        &[(5, "spec.portLevelMtls", "needs spec.selector.matchLabels")],
    );
}

#[test]
fn a_bad_entry_gateway_or_setting_is_reported_with_line_field_and_fix() {
    let entry = |spec: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e}}\nspec:\n{spec}"
        )
    };
    let port = "  ports: [{number: 443, name: tls, protocol: TLS}]\n";
    refused(&entry(&format!("  hosts: [\"a b\"]\n{port}")), &[(5, "spec.hosts[0]", "is no host")]);
    refused(&entry(port), &[(4, "spec.hosts", "at least one host")]);
    refused(
        &entry(&format!("  hosts: [a.com]\n  resolution: STATIC\n  endpoints: [{{address: b.com}}]\n{port}")),
        &[(7, "spec.endpoints[0].address", "resolution STATIC needs IP addresses")],
    );
    refused(
        &entry("  hosts: [a.com]\n  ports: [{number: 443, name: x, protocol: QUIC}]\n"),
        &[(6, "spec.ports[0].protocol", "\"QUIC\" is unknown")],
    );
    refused(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w}\nspec:\n  listeners:\n  - {name: mesh, port: 15008, protocol: HBONE}\n",
        &[(4, "spec.gatewayClassName", "istio-waypoint")],
    );
    refused(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    trustDomian: x\n  undermesh: |\n    sameNode: quick\n    excludedCIDRs: [10.0.0.0/40]\n",
        &[
            (5, "data.mesh.trustDomian", "did you mean `trustDomain`?"),
            (7, "data.undermesh.sameNode", "unknown variant `quick`"),
        ],
    );
    refused(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  undermesh: |\n    excludedCIDRs: [10.0.0.0/40]\n    excludedPorts: [0]\n",
        &[
            (5, "data.undermesh.excludedCIDRs[0]", "is no CIDR"),
            (5, "data.undermesh.excludedPorts[0]", "0 is no port"),
        ],
    );
}

#[test]
fn the_last_good_version_of_an_object_stays_in_force_until_it_is_good_again_or_gone() {
    let mut loader = Loader::new("istio-system");
    let good = policy("DENY");
    let state = loader.load(files(&[("p.yaml", &good)])).unwrap();
    assert_eq!((state.objects.authorization_policies.len(), state.problems.len()), (1, 0));

    let state = loader.load(files(&[("p.yaml", &policy("DENI"))])).unwrap();
    assert_eq!(state.objects.authorization_policies.len(), 1);
    assert_eq!(state.problems[0].consequence, "its last good version stays in force");

    assert!(loader.load(files(&[("p.yaml", &policy("DENI"))])).is_none(), "nothing changed");

    let state = loader.load(files(&[("p.yaml", "apiVersion: [\n")])).unwrap();
    assert_eq!(state.objects.authorization_policies.len(), 1, "half-written");
    assert!(state.problems[0].consequence.contains("stay in force"));

    let state = loader.load(files(&[("p.yaml", &policy("ALLOW"))])).unwrap();
    let now = state.objects.authorization_policies.values().next().unwrap();
    assert_eq!((now.action, state.problems.len()), (crate::model::Action::Allow, 0));

    let state = loader.load(files(&[])).unwrap();
    assert_eq!(state.objects.authorization_policies.len(), 0);
}

#[test]
fn a_bad_object_leaves_the_others_of_its_file_alone() {
    let state = load(&format!("{POD}---\n{}", policy("DENI")));
    assert_eq!((state.objects.pods.len(), state.objects.authorization_policies.len()), (1, 0));
    assert!(state.problems[0].consequence.contains("neither allows nor denies"));
    let text = state.problems[0].to_string();
    assert!(
        text.starts_with("a.yaml:10: AuthorizationPolicy shop/p: spec.action: unknown variant"),
        "{text}"
    );
}

#[test]
fn a_file_that_cannot_be_read_keeps_its_objects() {
    let mut loader = Loader::new("istio-system");
    loader.load(files(&[("a.yaml", POD)])).unwrap();
    let gone = [("a.yaml".to_owned(), Err("Input/output error".to_owned()))].into();
    let state = loader.load(gone).unwrap();
    assert_eq!((state.objects.pods.len(), state.problems[0].line), (1, 0));
}

#[test]
fn an_object_in_two_places_is_reported_and_the_first_counts() {
    let second = POD.replace("containers: []", "containers: [], nodeName: b");
    let state = Loader::new("istio-system").load(files(&[("a.yaml", POD), ("b.yaml", &second)])).unwrap();
    assert_eq!(state.objects.pods.values().next().unwrap().node, "");
    assert!(state.problems[0].message.contains("already defined in a.yaml:1"), "{:?}", state.problems);
}

#[test]
fn an_object_may_move_to_another_file_and_lists_are_unfolded() {
    let mut loader = Loader::new("istio-system");
    loader.load(files(&[("a.yaml", POD)])).unwrap();
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: p, namespace: shop}\n  spec: {containers: []}\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: q}\n  spec: {containers: []}\n";
    let state = loader.load(files(&[("b.yaml", list)])).unwrap();
    let keys: Vec<String> = state.objects.pods.keys().map(ToString::to_string).collect();
    assert_eq!((keys, state.problems.len()), (vec!["default/q".into(), "shop/p".into()], 0));
}

#[test]
fn files_without_an_object_that_is_in_force_can_be_left_alone() {
    let mut loader = Loader::new("istio-system");
    let (pod, both) = (files(&[("a.yaml", POD)]), format!("{POD}---\n{}", policy("DENY")));
    loader.load(files(&[("a.yaml", &both)])).unwrap();
    assert!(loader.load_unless_lost(pod.clone()).is_err(), "the first half of a move to another file");
    assert!(loader.load(files(&[("a.yaml", &both)])).is_none(), "that changed something");
    let moved = loader.load_unless_lost(files(&[("a.yaml", POD), ("b.yaml", &policy("ALLOW"))]));
    assert!(moved.unwrap().is_some(), "the whole move");
    let state = loader.load(pod).unwrap();
    assert_eq!((state.objects.pods.len(), state.objects.authorization_policies.len()), (1, 0));
}

#[test]
fn the_last_good_policy_survives_a_restart_and_what_is_gone_does_not_come_back() {
    let settings = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {a: \"1\"}}\n";
    let mut first = Loader::new("istio-system");
    first.load(files(&[("p.yaml", &policy("DENY")), ("n.yaml", settings), ("pod.yaml", POD)])).unwrap();
    let kept = serde_json::to_string(&first.remembered()).unwrap();

    let mut second = Loader::new("istio-system");
    second.restore(&serde_json::from_str::<Vec<Remembered>>(&kept).unwrap());
    let state = second.load(files(&[("p.yaml", &policy("DENI")), ("pod.yaml", POD)])).unwrap();
    let policies: Vec<_> = state.objects.authorization_policies.values().map(|p| p.action).collect();
    assert_eq!(policies, [crate::model::Action::Deny]);
    assert_eq!(state.problems[0].consequence, "its last good version stays in force");
    assert!(state.objects.namespaces.is_empty(), "its file is gone");
    assert_eq!(second.remembered().len(), 1);
}

#[test]
fn of_secrets_only_those_are_in_force_that_a_gateway_may_name_and_does() {
    use crate::testing::{certificate, secret};
    let gateway = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: in, namespace: shop}\nspec: {gatewayClassName: istio, listeners: [{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}, {name: cert, namespace: bank}, {name: opaque}]}}]}\n";
    let pair = certificate("a.example");
    let opaque = secret("shop", "opaque", &pair).replace("kubernetes.io/tls", "Opaque");
    let all = [
        gateway,
        &secret("shop", "cert", &pair),
        &secret("shop", "another", &pair),
        &secret("bank", "cert", &pair),
        &opaque,
    ];
    let state = load(&all.concat());
    assert!(state.problems.is_empty(), "{:?}", state.problems);
    let held: Vec<String> = state.objects.credentials.keys().map(ToString::to_string).collect();
    assert_eq!(held, ["shop/cert"], "the others are nobody's business");
}

#[test]
fn a_certificate_that_becomes_useless_stays_as_it_was_and_says_what_is_wrong() {
    use crate::testing::{certificate, secret};
    let gateway = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: in, namespace: shop}\nspec: {gatewayClassName: istio, listeners: [{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}]}\n";
    let (good, other) = (certificate("a.example"), certificate("a.example"));
    let mut loader = Loader::new("istio-system");
    let mut held = |pair: &(String, String)| {
        let state =
            loader.load(files(&[("g.yaml", gateway), ("s.yaml", &secret("shop", "cert", pair))])).unwrap();
        let held = Arc::clone(state.objects.credentials.values().next().unwrap());
        (held.pair.as_ref().map(|pair| pair.key.clone()), held.problem.clone())
    };
    assert_eq!(held(&good), (Some(good.1.clone()), None));
    for _ in 0..2 {
        let (key, problem) = held(&(good.0.clone(), other.1.clone()));
        assert_eq!(key, Some(good.1.clone()), "the last good one");
        assert!(problem.unwrap().contains("is not the one of the first certificate"));
        let (key, problem) = held(&(good.0.clone(), "junk".to_owned()));
        assert!(key == Some(good.1.clone()) && problem.is_some());
    }
    assert_eq!(held(&other), (Some(other.1.clone()), None));
}
