//! Kubernetes-shaped YAML as the testbed needs it: the pods in it, with the commands that they run.
//!
//! A pod's containers have no image here: `command` and `args` are programs of this machine. Everything else passes
//! through to the control plane untouched.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A pod as its manifest asks for it.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// Its object, without status.
    pub object: Value,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// The node that runs it.
    pub node: String,
    /// Programs to run, one per container.
    pub commands: Vec<Vec<String>>,
    /// Ports that probes of the node's kubelet ask.
    pub probe_ports: Vec<u16>,
    /// Ports that must listen before the pod counts as ready.
    pub ready_ports: Vec<u16>,
}

impl PodSpec {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// A stable id made from the name; good enough for one machine.
    pub fn uid(&self) -> String {
        if let Some(uid) = self.object.pointer("/metadata/uid").and_then(Value::as_str) {
            return uid.to_owned();
        }
        let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        for byte in self.key().bytes() {
            hash = (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B);
        }
        let hex = format!("{hash:032x}");
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }

    /// The object with uid and a running pod's status.
    pub fn with_status(&self, v4: Ipv4Addr, v6: Option<Ipv6Addr>, host: IpAddr, ready: bool) -> Value {
        let mut object = self.object.clone();
        object["metadata"]["uid"] = json!(self.uid());
        let ips: Vec<Value> = [Some(IpAddr::V4(v4)), v6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
            .map(|ip| json!({"ip": ip}))
            .collect();
        object["status"] = json!({
            "phase": "Running",
            "podIP": v4,
            "podIPs": ips,
            "hostIP": host,
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        });
        object
    }
}

/// The documents of a YAML text.
///
/// # Errors
/// It is no YAML.
pub fn documents(yaml: &str) -> Result<Vec<Value>> {
    let docs: Vec<Value> =
        serde_saphyr::from_multiple(yaml).map_err(|e| anyhow::anyhow!("bad YAML: {e}\n{yaml}"))?;
    Ok(docs.into_iter().filter(|doc| !doc.is_null()).collect())
}

/// Documents as YAML again.
///
/// # Errors
/// Never for documents that were YAML.
pub fn write(docs: &[Value]) -> Result<String> {
    let texts: Result<Vec<String>, _> = docs.iter().map(serde_saphyr::to_string).collect();
    Ok(texts.context("cannot write YAML")?.join("---\n"))
}

/// Whether a document is a Pod.
pub fn is_pod(doc: &Value) -> bool {
    doc.get("kind").and_then(Value::as_str) == Some("Pod")
}

/// Reads a Pod document.
///
/// # Errors
/// A field that the testbed needs is missing; the message names it.
pub fn pod(doc: &Value) -> Result<PodSpec> {
    let text = |path: &str| doc.pointer(path).and_then(Value::as_str).map(str::to_owned);
    let name = text("/metadata/name").context("a Pod without metadata.name")?;
    let node = text("/spec/nodeName").with_context(|| format!("pod {name}: spec.nodeName is missing"))?;
    let empty = Vec::new();
    let containers = doc.pointer("/spec/containers").and_then(Value::as_array).unwrap_or(&empty);
    let mut commands = Vec::new();
    let mut probe_ports = Vec::new();
    let mut ready_ports = Vec::new();
    for container in containers {
        let argv: Vec<String> = ["command", "args"]
            .iter()
            .filter_map(|key| container.get(key)?.as_array())
            .flatten()
            .map(word)
            .collect();
        if !argv.is_empty() {
            commands.push(argv);
        }
        for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
            let Some(probe) = container.get(probe) else { continue };
            let port = probe.pointer("/tcpSocket/port").or_else(|| probe.pointer("/httpGet/port"));
            probe_ports.extend(port.and_then(|port| port_number(container, port)));
        }
        for port in container.get("ports").and_then(Value::as_array).unwrap_or(&empty) {
            if port.get("protocol").and_then(Value::as_str).unwrap_or("TCP") == "TCP" {
                ready_ports.extend(
                    port.get("containerPort").and_then(Value::as_u64).and_then(|p| u16::try_from(p).ok()),
                );
            }
        }
    }
    Ok(PodSpec {
        object: doc.clone(),
        namespace: text("/metadata/namespace").unwrap_or_else(|| "default".to_owned()),
        service_account: text("/spec/serviceAccountName").unwrap_or_else(|| "default".to_owned()),
        name,
        node,
        commands,
        probe_ports,
        ready_ports,
    })
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn port_number(container: &Value, port: &Value) -> Option<u16> {
    if let Some(number) = port.as_u64() {
        return u16::try_from(number).ok();
    }
    let named = container.get("ports")?.as_array()?.iter().find(|p| p.get("name") == Some(port))?;
    u16::try_from(named.get("containerPort")?.as_u64()?).ok()
}

/// A Node object.
pub fn node(name: &str, addresses: &[IpAddr], labels: &[(String, String)]) -> Value {
    let labels: Map<String, Value> = labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    let addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"addresses": addresses},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec:
  nodeName: a
  serviceAccountName: frontend
  containers:
  - name: main
    image: none
    command: [nginx]
    args: [-c, 1]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: http}}
---
";

    #[test]
    fn a_pod_says_what_runs_where_and_which_ports_matter() {
        let docs = documents(POD).unwrap();
        let pod = pod(&docs[0]).unwrap();
        assert_eq!(pod.key(), "shop/web");
        assert_eq!(pod.commands, [["nginx", "-c", "1"]]);
        assert_eq!(
            (pod.probe_ports.as_slice(), pod.ready_ports.as_slice()),
            ([8080].as_slice(), [8080].as_slice())
        );
        assert_eq!(pod.uid().len(), 36);
    }

    #[test]
    fn a_running_pod_survives_being_written_and_read() {
        let docs = documents(POD).unwrap();
        let spec = pod(&docs[0]).unwrap();
        let running = spec.with_status([10, 30, 1, 1].into(), None, IpAddr::from([172, 30, 0, 11]), true);
        let again = documents(&write(&[running]).unwrap()).unwrap();
        assert_eq!(again[0].pointer("/status/podIP"), Some(&json!("10.30.1.1")));
        assert_eq!(again[0].pointer("/spec/nodeName"), Some(&json!("a")));
    }
}
