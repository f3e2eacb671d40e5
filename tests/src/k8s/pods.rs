//! Pods of the scenarios, as YAML.

/// The image of every pod: this program, a shell, and programs that others wrote.
pub(super) const IMAGE: &str = "docker.io/undermesh/mesh-tests:dev";

/// The port of every server.
pub(super) const PORT: &str = "8080";

/// A pod of a node that runs a program; its name is also its label `app`.
pub(super) fn pod(name: &str, node: &str, argv: &[&str]) -> String {
    let command = serde_json::json!(argv);
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {IMAGE}
    imagePullPolicy: IfNotPresent
    command: {command}
"
    )
}

/// A pod with a web service on port 8080 that says who asked; ready once it answers.
pub(super) fn web(name: &str, node: &str) -> String {
    pod(name, node, &["mesh-tests", "tool", "web", "--name", name, "--port", PORT])
        + "    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
"
}

/// A pod that waits for programs to be run in it.
pub(super) fn client(name: &str, node: &str) -> String {
    pod(name, node, &["sleep", "infinity"])
}

/// A service of port 80 in front of a pod's port 8080.
pub(super) fn service(name: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}
"
    )
}
