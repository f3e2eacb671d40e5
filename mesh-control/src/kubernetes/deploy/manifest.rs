//! What a waypoint or gateway is made of: a service account, a Deployment, a Service. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::convert::Mesh;
use crate::model::{Gateway, GatewayHost, Key};

/// Names the Gateway on everything that is deployed for it.
pub(super) use crate::model::istio_gateway::GATEWAY_NAME as NAME_LABEL;
/// Says that a controller deployed it.
pub(super) const MANAGED_LABEL: &str = "gateway.istio.io/managed";
/// Its value for waypoints.
const MANAGED_WAYPOINT: &str = "istio.io-mesh-controller";
/// Its value for gateways.
const MANAGED_GATEWAY: &str = "istio.io-gateway-controller";
/// Both.
pub(super) const MANAGED: [&str; 2] = [MANAGED_WAYPOINT, MANAGED_GATEWAY];
/// The type of the Service.
const SERVICE_TYPE: &str = "networking.istio.io/service-type";
/// Protocols that a gateway serves, and what its Service's ports are called.
const SERVED: [(&str, &str); 4] = [("HTTP", "http"), ("HTTPS", "https"), ("TLS", "tls"), ("TCP", "tcp")];
const HBONE: u16 = 15008;
const READINESS: u16 = 15021;

/// What is deployed, in this order.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Manifests {
    pub(super) service_account: Value,
    pub(super) deployment: Value,
    pub(super) service: Value,
}

/// Namespace and name of what is deployed.
pub(super) fn place(gateway: &Gateway) -> Key {
    Key::new(&gateway.meta.namespace, gateway.deployed_name())
}

/// The objects for a Gateway.
pub(super) fn manifests(gateway: &Gateway, mesh: &Mesh, image: &str) -> Manifests {
    let labels = labels(gateway);
    let name = place(gateway).name;
    let metadata = json!({
        "name": name,
        "namespace": gateway.meta.namespace,
        "labels": labels,
        "annotations": gateway.infrastructure_annotations,
        "ownerReferences": [{
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "name": gateway.meta.name, "uid": gateway.meta.uid, "controller": true,
        }],
    });
    let selector = json!({ NAME_LABEL: gateway.meta.name });
    let spec = if gateway.is_waypoint() { waypoint_service(gateway) } else { gateway_service(gateway) };
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
    service["spec"]["selector"] = selector.clone();
    Manifests {
        service_account: json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}),
        deployment: json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata,
            "spec": {
                "selector": {"matchLabels": selector},
                "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "template": {
                    "metadata": {"labels": labels, "annotations": pod_annotations(gateway)},
                    "spec": pod(gateway, mesh, image),
                },
            },
        }),
        service,
    }
}

fn waypoint_service(gateway: &Gateway) -> Value {
    json!({
        "type": service_type(gateway, "ClusterIP"),
        "ipFamilyPolicy": "PreferDualStack",
        "trafficDistribution": "PreferClose",
        "ports": [
            {"name": "status-port", "port": READINESS, "protocol": "TCP", "targetPort": READINESS},
            {"name": "mesh", "port": port(gateway), "protocol": "TCP", "targetPort": HBONE},
        ],
    })
}

fn gateway_service(gateway: &Gateway) -> Value {
    let mut ports =
        vec![json!({"name": "status-port", "port": READINESS, "protocol": "TCP", "targetPort": READINESS})];
    for (port, protocol) in listener_ports(gateway) {
        let name = format!("{protocol}-{port}");
        ports.push(json!({"name": name, "port": port, "protocol": "TCP", "targetPort": port}));
    }
    let mut spec = json!({
        "type": service_type(gateway, "LoadBalancer"), "ipFamilyPolicy": "PreferDualStack", "ports": ports,
    });
    let asked = gateway.manual.iter().find_map(|host| match host {
        GatewayHost::Ip(ip) => Some(ip.to_string()),
        GatewayHost::Hostname(_) => None,
    });
    if let Some(ip) = asked {
        spec["loadBalancerIP"] = ip.into();
    }
    spec
}

/// Ports of the listeners that a gateway serves. Several listeners may share one.
fn listener_ports(gateway: &Gateway) -> BTreeMap<u16, &'static str> {
    let mut ports = BTreeMap::new();
    for listener in &gateway.listeners {
        if let Some((_, name)) = SERVED.iter().find(|(protocol, _)| *protocol == listener.protocol) {
            ports.entry(listener.port).or_insert(*name);
        }
    }
    ports
}

fn service_type<'g>(gateway: &'g Gateway, default: &'g str) -> &'g str {
    gateway.meta.annotation(SERVICE_TYPE).unwrap_or(default)
}

/// Where callers find its tunnel.
fn port(gateway: &Gateway) -> u16 {
    gateway.listeners.iter().find(|l| l.protocol == "HBONE").map_or(HBONE, |l| l.port)
}

fn labels(gateway: &Gateway) -> BTreeMap<String, String> {
    let mut labels = gateway.infrastructure_labels.clone();
    let managed = if gateway.is_waypoint() { MANAGED_WAYPOINT } else { MANAGED_GATEWAY };
    let own = [
        (NAME_LABEL, gateway.meta.name.as_str()),
        ("gateway.networking.k8s.io/gateway-class-name", &gateway.class),
        (MANAGED_LABEL, managed),
        ("istio.io/dataplane-mode", "none"),
        ("sidecar.istio.io/inject", "false"),
        ("service.istio.io/canonical-name", &gateway.meta.name),
        ("service.istio.io/canonical-revision", "latest"),
    ];
    labels.extend(own.map(|(key, value)| (key.to_owned(), value.to_owned())));
    labels
}

fn pod_annotations(gateway: &Gateway) -> BTreeMap<String, String> {
    let scrape = [
        ("prometheus.io/scrape", "true"),
        ("prometheus.io/port", "15020"),
        ("prometheus.io/path", "/stats/prometheus"),
    ];
    let mut annotations: BTreeMap<String, String> =
        scrape.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    annotations.extend(gateway.infrastructure_annotations.clone());
    annotations
}

fn pod(gateway: &Gateway, mesh: &Mesh, image: &str) -> Value {
    let field =
        |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let text = |name: &str, value: &str| json!({"name": name, "value": value});
    let (role, sysctls) = if gateway.is_waypoint() {
        ("waypoint", json!([]))
    } else {
        // A gateway listens on the ports of its listeners, such as 80, and has no capabilities.
        ("gateway", json!([{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]))
    };
    json!({
        "serviceAccountName": gateway.account().name,
        // Longer than it lets requests go on.
        "terminationGracePeriodSeconds": 45,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": 1337, "runAsGroup": 1337, "fsGroup": 1337, "sysctls": sysctls,
        },
        "containers": [{
            "name": role,
            "image": image,
            "imagePullPolicy": "IfNotPresent",
            "args": ["run"],
            "env": [
                text("GATEWAY_NAME", &gateway.meta.name),
                text("GATEWAY_CLASS", &gateway.class),
                text("UM_ROLE", role),
                field("POD_NAME", "metadata.name"),
                field("POD_NAMESPACE", "metadata.namespace"),
                field("NODE_NAME", "spec.nodeName"),
                field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
                text("TRUST_DOMAIN", &mesh.trust_domain),
                text("CLUSTER_ID", &mesh.cluster_id),
                text("CLUSTER_DOMAIN", &mesh.cluster_domain),
                text("XDS_ADDRESS", &format!("https://istiod.{}.svc:15012", mesh.root_namespace)),
                text("XDS_ROOT_CA", "/var/run/secrets/istio/root-cert.pem"),
                text("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token"),
            ],
            "ports": [
                {"name": "metrics", "containerPort": 15020, "protocol": "TCP"},
                {"name": "status-port", "containerPort": READINESS, "protocol": "TCP"},
            ],
            "readinessProbe": {"httpGet": {"path": "/healthz/ready", "port": READINESS}, "periodSeconds": 2},
            "resources": {
                "requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "1Gi"},
            },
            "securityContext": {
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumeMounts": [
                {"name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true},
                {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true},
            ],
        }],
        "volumes": [
            {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": {
                "audience": "istio-ca", "expirationSeconds": 43_200, "path": "istio-token",
            }}]}},
            {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop, uid: u1}
spec:
  gatewayClassName: istio-waypoint
  infrastructure: {labels: {team: a, istio.io/dataplane-mode: ambient}, annotations: {note: b}}
  listeners: [{name: mesh, port: 15009, protocol: HBONE}]
";

    #[test]
    fn a_waypoint_has_its_labels_its_identity_and_its_owner() {
        let objects = crate::testing::objects(GATEWAY);
        let gateway = objects.gateways.values().next().unwrap();
        let made = manifests(gateway, &Mesh::default(), "registry/waypoint:1");
        for object in [&made.service_account, &made.deployment, &made.service] {
            let meta = &object["metadata"];
            assert_eq!(meta["ownerReferences"][0]["uid"], "u1");
            assert_eq!(meta["labels"][NAME_LABEL], "waypoint");
            assert_eq!(meta["labels"]["team"], "a");
            assert_eq!(meta["labels"]["istio.io/dataplane-mode"], "none", "a waypoint is never captured");
            assert_eq!(meta["annotations"]["note"], "b");
        }
        let spec = &made.deployment["spec"]["template"]["spec"];
        assert_eq!(spec["serviceAccountName"], "waypoint");
        assert_eq!(spec["containers"][0]["image"], "registry/waypoint:1");
        assert_eq!(made.service["spec"]["ports"][1]["port"], 15009);
        assert_eq!(made.service["spec"]["ports"][1]["targetPort"], 15008);
    }

    const INGRESS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: shop, uid: u1, annotations: {networking.istio.io/service-type: NodePort}}
spec:
  gatewayClassName: istio
  addresses: [{type: IPAddress, value: 192.0.2.1}]
  listeners:
  - {name: one, port: 80, protocol: HTTP, hostname: a.example}
  - {name: two, port: 80, protocol: HTTP, hostname: b.example}
  - {name: three, port: 8080, protocol: HTTP}
  - {name: four, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}
  - {name: five, port: 443, protocol: TLS, hostname: d.example, tls: {mode: Passthrough}}
  - {name: six, port: 5353, protocol: UDP}
";

    #[test]
    fn a_gateway_has_a_service_with_the_ports_of_its_listeners_and_its_class_in_its_name() {
        let objects = crate::testing::objects(INGRESS);
        let gateway = objects.gateways.values().next().unwrap();
        let made = manifests(gateway, &Mesh::default(), "registry/waypoint:1");
        for object in [&made.service_account, &made.deployment, &made.service] {
            assert_eq!(object["metadata"]["name"], "in-istio");
            assert_eq!(object["metadata"]["labels"][MANAGED_LABEL], MANAGED_GATEWAY);
        }
        let ports: Vec<u64> = made.service["spec"]["ports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["port"].as_u64().unwrap())
            .collect();
        assert_eq!(ports, [15021, 80, 443, 8080], "those that are served, each once");
        assert_eq!(made.service["spec"]["ports"][2]["name"], "https-443");
        assert_eq!(made.service["spec"]["type"], "NodePort");
        assert_eq!(made.service["spec"]["loadBalancerIP"], "192.0.2.1");
        assert_eq!(made.service["spec"]["selector"][NAME_LABEL], "in");
        let pod = &made.deployment["spec"]["template"]["spec"];
        assert_eq!(pod["serviceAccountName"], "in-istio");
        let role = pod["containers"][0]["env"].as_array().unwrap().iter().find(|e| e["name"] == "UM_ROLE");
        assert_eq!(role.unwrap()["value"], "gateway");
        assert_eq!(pod["securityContext"]["sysctls"][0]["value"], "0", "it may listen on port 80");
    }

    /// Whatever the manifest sets, the waypoint's command line has to know.
    #[test]
    fn every_variable_is_one_that_the_waypoint_reads() {
        let objects = crate::testing::objects(GATEWAY);
        let gateway = objects.gateways.values().next().unwrap();
        let made = manifests(gateway, &Mesh::default(), "x");
        #[derive(clap::Parser)]
        struct Waypoint {
            #[command(flatten)]
            _args: mesh_waypoint::cli::RunArgs,
        }
        let command = <Waypoint as clap::CommandFactory>::command();
        let known: Vec<String> =
            command.get_arguments().filter_map(|a| a.get_env()?.to_str().map(str::to_owned)).collect();
        let containers = &made.deployment["spec"]["template"]["spec"]["containers"];
        for variable in containers[0]["env"].as_array().unwrap() {
            let name = variable["name"].as_str().unwrap();
            assert!(known.iter().any(|k| k == name), "{name} is none of {known:?}");
        }
    }
}
