use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use super::*;

fn release() -> Release {
    Release { name: "undermesh".into(), namespace: "istio-system".into(), service: "meshctl".into() }
}

fn with(sets: &[&str]) -> Value {
    sets.iter().fold(defaults().unwrap(), |base, given| values::merged(base, values::set(given).unwrap()))
}

fn name(object: &Value) -> String {
    let text = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    format!("{} {}", text("/kind"), text("/metadata/name"))
}

fn names(values: &Value) -> BTreeSet<String> {
    objects(&release(), values).unwrap().iter().map(name).collect()
}

/// All values that change what is rendered.
const EVERYTHING: [&str; 10] = [
    "createNamespace=true",
    "ingressGateway.enabled=true",
    "egressGateway.enabled=true",
    "image.tag=v9",
    "image.pullSecrets=[one, two]",
    "mesh.network=n1",
    "mesh.config={accessLogFile: /dev/stdout, trustDomainAliases: [old.example]}",
    "mesh.settings={sameNode: tunnel, excludedPorts: [22]}",
    "node.env={RUST_LOG: debug}",
    "node.cniBinDir=",
];

#[test]
fn the_components_of_an_istio_installation_are_rendered_and_nothing_is_injected() {
    let small = names(&defaults().unwrap());
    for expected in [
        "ServiceAccount istiod",
        "ServiceAccount undermesh-node",
        "Service istiod",
        "Deployment istiod",
        "DaemonSet undermesh-node",
        "ConfigMap istio",
        "ClusterRole istiod-istio-system",
        "ClusterRoleBinding istiod-istio-system",
        "ValidatingWebhookConfiguration undermesh-validator-istio-system",
    ] {
        assert!(small.contains(expected), "{expected} is missing: {small:?}");
    }
    let all = names(&with(&EVERYTHING));
    let added: Vec<_> = all.difference(&small).map(String::as_str).collect();
    let gateways = [
        "Deployment istio-egressgateway",
        "Deployment istio-ingressgateway",
        "Namespace istio-system",
        "Service istio-egressgateway",
        "Service istio-ingressgateway",
        "ServiceAccount istio-egressgateway",
        "ServiceAccount istio-ingressgateway",
    ];
    assert_eq!(added, gateways);
    assert!(!all.iter().any(|name| name.starts_with("Mutating")));
}

#[test]
fn the_control_plane_has_the_ports_of_istios_and_one_for_events() {
    let objects = objects(&release(), &defaults().unwrap()).unwrap();
    let service = objects.iter().find(|o| name(o) == "Service istiod").unwrap();
    let ports: Vec<_> = service["spec"]["ports"].as_array().unwrap().to_vec();
    let expected = json!([
        {"name": "grpc-xds", "port": 15010, "protocol": "TCP"},
        {"name": "https-dns", "port": 15012, "protocol": "TCP"},
        {"name": "https-webhook", "port": 443, "targetPort": 15017, "protocol": "TCP"},
        {"name": "http-monitoring", "port": 15014, "protocol": "TCP"},
        {"name": "https-flows", "port": 15016, "protocol": "TCP"},
    ]);
    assert_eq!(Value::Array(ports), expected);
}

#[test]
fn an_agent_has_no_credentials_of_the_api_and_time_to_drain() {
    let objects = objects(&release(), &with(&["node.drainSeconds=600"])).unwrap();
    let daemon = objects.iter().find(|o| name(o) == "DaemonSet undermesh-node").unwrap();
    let pod = &daemon["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["terminationGracePeriodSeconds"], 630);
    assert!(pod.get("hostNetwork").is_none());
    assert_eq!(
        daemon["spec"]["updateStrategy"]["rollingUpdate"],
        json!({"maxSurge": 1, "maxUnavailable": 0})
    );
    let bound = objects.iter().filter(|o| name(o).contains("Binding"));
    for subject in bound.flat_map(|o| o["subjects"].as_array().unwrap()) {
        assert_eq!(subject["name"], "istiod", "nobody else has a role");
    }
}

#[test]
fn values_that_the_schema_refuses_are_named() {
    let error =
        objects(&release(), &with(&["node.drainSeconds=x", "control.replica=2"])).unwrap_err().to_string();
    assert!(error.contains("node.drainSeconds: is \"x\", must be a whole number"), "{error}");
    assert!(error.contains("control.replica: is not known; known are"), "{error}");
}

#[test]
fn every_template_of_the_chart_is_embedded_and_every_value_is_in_the_schema() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/undermesh/templates");
    let files: BTreeSet<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| format!("templates/{}", entry.unwrap().file_name().to_str().unwrap()))
        .filter(|name| !name.ends_with(".txt"))
        .collect();
    assert_eq!(files, TEMPLATES.iter().map(|(name, _)| (*name).to_owned()).collect());
    let schema = embedded(SCHEMA).unwrap();
    for (section, values) in defaults().unwrap().as_object().unwrap() {
        let known = &schema["properties"][section];
        assert!(known.is_object(), "{section}");
        for key in values.as_object().into_iter().flatten().map(|(key, _)| key) {
            assert!(known["properties"][key].is_object(), "{section}.{key}");
        }
    }
}

/// What an object is, whatever made it.
fn plain(mut object: Value) -> Value {
    if let Some(labels) = object.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove("app.kubernetes.io/managed-by");
    }
    // Texts that are YAML themselves may be written in several ways.
    if object["kind"] == "ConfigMap" {
        for text in object["data"].as_object_mut().unwrap().values_mut() {
            *text = serde_saphyr::from_str(text.as_str().unwrap()).unwrap();
        }
    }
    object
}

#[test]
#[ignore = "needs helm, which UM_HELM names: `cargo xtask test k8s` builds it and runs this"]
fn the_chart_renders_to_what_helm_renders_it_to() {
    let helm = std::env::var("UM_HELM").expect("UM_HELM names helm");
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/undermesh");
    for sets in [&[][..], &EVERYTHING[..]] {
        let given = with(sets);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_string(&given).unwrap()).unwrap();
        let mut helm = Command::new(&helm);
        helm.args(["template", "undermesh", "--kube-version", "1.34"])
            .arg(&chart)
            .args(["-n", "istio-system", "-f"])
            .arg(file.path());
        let output = helm.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let by_name = |objects: Vec<Value>| {
            objects.into_iter().map(|o| (name(&o), plain(o))).collect::<std::collections::BTreeMap<_, _>>()
        };
        let theirs = text.split("\n---").filter(|d| has_content(d.trim_start_matches("---")));
        let theirs: Vec<Value> =
            theirs.map(|d| serde_saphyr::from_str(d.trim_start_matches("---")).unwrap()).collect();
        let (ours, theirs) = (by_name(objects(&release(), &given).unwrap()), by_name(theirs));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
        for (name, object) in &theirs {
            assert_eq!(&ours[name], object, "{name}");
        }
    }
}
