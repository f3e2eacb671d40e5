//! Waypoints in the testbed: a Gateway of class `istio-waypoint`, and the product's process for it in a pod of its own.

use super::mesh::PATIENCE;
use super::process;
use super::testbed::Testbed;
use super::{net, netns, run, wait};
use anyhow::{Context, Result};
use std::net::Ipv4Addr;

/// A waypoint to deploy.
#[derive(Debug, Clone)]
pub struct Waypoint {
    /// Namespace of the Gateway.
    pub namespace: String,
    /// Name of the Gateway; also of its pod, Service and service account.
    pub name: String,
    /// Node of its pod.
    pub node: String,
    /// Address of its Service.
    pub cluster_ip: Ipv4Addr,
    /// What it stands before: service, workload, all.
    pub accepts: String,
    /// More arguments of `mesh-waypoint run`.
    pub args: Vec<String>,
}

impl Waypoint {
    /// `shop/wp` on a node, before services and workloads.
    pub fn of_shop(node: &str) -> Self {
        Self {
            namespace: "shop".into(),
            name: "wp".into(),
            node: node.into(),
            cluster_ip: Ipv4Addr::new(10, 96, 0, 77),
            accepts: "all".into(),
            args: Vec::new(),
        }
    }

    /// `namespace/name` of its pod.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn yaml(&self, command: &str) -> String {
        let Self { namespace, name, node, cluster_ip, accepts, .. } = self;
        format!(
            "
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{istio.io/dataplane-mode: none, gateway.networking.k8s.io/gateway-name: {name}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers: [{{name: main, image: none, command: {command}, ports: [{{containerPort: 15008}}]}}]
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{gateway.networking.k8s.io/gateway-name: {name}}}
spec:
  clusterIP: {cluster_ip}
  clusterIPs: [{cluster_ip}]
  selector: {{gateway.networking.k8s.io/gateway-name: {name}}}
  ports: [{{name: hbone, port: 15008}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: {namespace}, labels: {{istio.io/waypoint-for: {accepts}}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
status:
  addresses: [{{type: Hostname, value: {name}.{namespace}.svc.cluster.local}}]
"
        )
    }
}

impl Testbed {
    /// Deploys a waypoint and waits until it is ready. The control plane must run.
    ///
    /// # Errors
    /// The binary is missing, it ends, or it does not become ready.
    pub fn deploy_waypoint(&mut self, waypoint: &Waypoint) -> Result<()> {
        let Waypoint { namespace, name, node, args, .. } = waypoint;
        let mut argv = self.waypoint_command(namespace, name, node)?;
        if !args.iter().any(|arg| arg.starts_with("--workers")) {
            argv.push("--workers=2".to_owned());
        }
        argv.extend(args.iter().cloned());
        let command = serde_json::to_string(&argv).context("a command is text")?;
        self.apply(&format!("waypoint-{namespace}-{name}"), &waypoint.yaml(&command))?;
        self.wait_waypoint_ready(&waypoint.key())
    }

    /// What runs the proxy of a Gateway, as the service account of its name; a waypoint unless arguments are added.
    ///
    /// # Errors
    /// The binary is missing, or there is no token.
    pub fn waypoint_command(&self, namespace: &str, name: &str, node: &str) -> Result<Vec<String>> {
        let token = self.dir.join(format!("{namespace}.{name}.token"));
        let text = self.service_account_token(node, namespace, name)?;
        std::fs::write(&token, text).context("cannot write the token")?;
        Ok(vec![
            run::binary("mesh-waypoint")?.to_string_lossy().into_owned(),
            "run".to_owned(),
            format!("--gateway={name}"),
            format!("--namespace={namespace}"),
            format!("--node={node}"),
            format!("--xds=https://{}:15012", net::underlay_v4(net::CONTROL)),
            "--xds-hostname=istiod.istio-system.svc".to_owned(),
            format!("--token={}", token.display()),
            format!("--root-cert={}", self.state_dir().join("root-cert.pem").display()),
        ])
    }

    /// Waits until a waypoint says that it is ready.
    ///
    /// # Errors
    /// It ends or does not become ready.
    pub fn wait_waypoint_ready(&mut self, key: &str) -> Result<()> {
        wait::until_true(&format!("ready waypoint {key}"), PATIENCE, || {
            let pod = self.pods.get_mut(key).with_context(|| format!("no pod {key}"))?;
            for program in &mut pod.programs {
                if !program.running()? {
                    let log = process::gist(&program.log());
                    return Err(wait::hopeless(format!("mesh-waypoint ended: {log}")));
                }
            }
            self.at_waypoint(key, 15_021, "/healthz/ready").map(|_| true)
        })
    }

    /// GET of a waypoint's own port by curl.
    ///
    /// # Errors
    /// No answer, or a failure.
    pub fn at_waypoint(&self, key: &str, port: u16, path: &str) -> Result<String> {
        let enter = format!("--net={}", self.pod(key)?.netns.path().display());
        let url = format!("http://127.0.0.1:{port}{path}");
        netns::command("nsenter", [enter.as_str(), "curl", "-sfS", &url])
    }

    /// The value of a sample of a waypoint's metrics that has all of these parts; 0 when there is none.
    ///
    /// # Errors
    /// No answer.
    pub fn waypoint_metric(&self, key: &str, name: &str, with: &[&str]) -> Result<f64> {
        let text = self.at_waypoint(key, 15_020, "/metrics")?;
        let mine = text.lines().filter(|line| {
            line.starts_with(&format!("{name}{{")) && with.iter().all(|part| line.contains(part))
        });
        Ok(mine.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}
