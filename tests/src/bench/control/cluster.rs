//! The same mesh in a real API server: etcd and kube-apiserver in a network namespace of their own, without a node.

use super::{CHANGING, NAMESPACES, PATIENCE, address, namespaces, pod, service};
use crate::bed::netns;
use crate::cluster::kubectl::Kubectl;
use crate::cluster::{Layout, life};
use anyhow::{Context, Result, bail};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Clients that fill the API server at once: each keeps to some fifty requests a second.
const CLIENTS: usize = 12;
/// Objects that a client is given at once, which it may write without a pause.
const AT_ONCE: usize = 250;

/// A running API server; ends on drop.
pub(super) struct Api {
    layout: Layout,
    kubectl: Kubectl,
}

impl Api {
    /// Starts one from Kubernetes's programs and fills it.
    ///
    /// # Errors
    /// It does not start, or refuses an object.
    pub(super) fn start(programs: PathBuf, pods: usize) -> Result<Self> {
        let layout = Layout::of("bench")?;
        life::up_api(&layout, programs)?;
        let api = Self { kubectl: life::kubectl(&layout)?, layout };
        api.create(&namespaces())?;
        api.create("apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n")?;
        let services: Vec<String> = (0..pods / 10).map(service).collect();
        api.at_once(&services, |text| api.create(text))?;
        let mut objects: Vec<String> = (0..pods).map(|n| pod(n, &address(n))).collect();
        objects.push(pod(CHANGING, "10.250.0.1"));
        api.at_once(&objects, |text| api.create(text))?;
        api.at_once(&objects, |text| {
            let args = ["apply", "--server-side", "--force-conflicts", "--subresource=status", "-f", "-"];
            api.kubectl.feed(&args, text).map(drop)
        })?;
        Ok(api)
    }

    fn create(&self, text: &str) -> Result<()> {
        self.kubectl.feed(&["create", "-f", "-"], text).map(drop)
    }

    fn at_once(&self, objects: &[String], put: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
        let next = std::sync::atomic::AtomicUsize::new(0);
        let texts: Vec<String> = objects.chunks(AT_ONCE).map(<[String]>::concat).collect();
        std::thread::scope(|scope| {
            let work = || -> Result<()> {
                while let Some(text) = texts.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    put(text)?;
                }
                Ok(())
            };
            let threads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(work)).collect();
            for thread in threads {
                let Ok(done) = thread.join() else { bail!("filling the API server panicked") };
                done?;
            }
            Ok(())
        })
    }

    /// What the control plane is started with.
    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubectl.kubeconfig
    }

    /// Puts one pod at another address: one request, by a client that has to start and to connect first.
    pub(super) fn change(&self, turn: usize) -> Result<()> {
        let address = format!("10.250.0.{}", turn % 200 + 2);
        let body = serde_json::json!({"status": {"podIP": address, "podIPs": [{"ip": address}]}}).to_string();
        let n = CHANGING;
        let server = SocketAddr::new(IpAddr::V4(self.layout.state()?.host), crate::cluster::layout::API_PORT);
        let url = format!("https://{server}/api/v1/namespaces/ns-{}/pods/pod-{n}/status", n % NAMESPACES);
        let pki = |name: &str| self.layout.path("pki").join(name).display().to_string();
        let (ca, certificate, key) = (pki("ca.crt"), pki("admin.crt"), pki("admin.key"));
        let limit = PATIENCE.as_secs().to_string();
        netns::command(
            "curl",
            [
                "--silent",
                "--show-error",
                "--fail",
                "--max-time",
                &limit,
                "--cacert",
                &ca,
                "--cert",
                &certificate,
            ]
            .into_iter()
            .chain(["--key", &key, "-X", "PATCH", "-H", "content-type: application/merge-patch+json"])
            .chain(["-o", "/dev/null", "--data", &body, &url]),
        )
        .context("a change was refused")
        .map(drop)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Err(error) = life::down(&self.layout) {
            eprintln!("warning: the API server is not gone: {error:#}");
        }
    }
}

/// Kubernetes's programs, where they are.
pub(super) fn programs() -> Option<PathBuf> {
    let dir = PathBuf::from(std::env::var_os("UM_KUBERNETES").filter(|dir| !dir.is_empty())?);
    dir.join("kube-apiserver").is_file().then_some(dir)
}
