//! The control plane's processes: etcd, API server, controllers, scheduler, in the cluster's own network namespace.

use super::cgroups;
use super::layout::{self, Families, Layout, State};
use crate::bed::{cgroup, netns, wait};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// etcd and the API server.
pub(super) fn start_api(layout: &Layout, state: &State) -> Result<()> {
    let data = layout.path("etcd");
    let etcd = format!(
        "--data-dir={} --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
         --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380 \
         --initial-cluster=default=http://127.0.0.1:2380 --unsafe-no-fsync --logger=zap",
        data.display()
    );
    start(layout, "etcd", Path::new("etcd"), &etcd)?;
    start_apiserver(layout, state)
}

/// The API server, on the data that etcd has.
pub(super) fn start_apiserver(layout: &Layout, state: &State) -> Result<()> {
    let pki = layout.path("pki");
    let pki = pki.display();
    let certificates = layout.path("apiserver");
    // Without nodes there are no controllers, which would make the accounts that pods need.
    let admission = if state.nodes.is_empty() { "--disable-admission-plugins=ServiceAccount" } else { "" };
    // The one address that listens on both families.
    let any = if state.families == Families::Ipv4 { "0.0.0.0" } else { "::" };
    let arguments = format!(
        "--etcd-servers=http://127.0.0.1:2379 --bind-address={any} --advertise-address={api} --secure-port={port} \
         --service-cluster-ip-range={services} --client-ca-file={pki}/ca.crt --tls-cert-file={pki}/apiserver.crt \
         --tls-private-key-file={pki}/apiserver.key --cert-dir={certificates} \
         --service-account-key-file={pki}/sa.pub --service-account-signing-key-file={pki}/sa.key \
         --service-account-issuer=https://kubernetes.default.svc \
         --kubelet-client-certificate={pki}/kubelet-client.crt --kubelet-client-key={pki}/kubelet-client.key \
         --kubelet-preferred-address-types=InternalIP --authorization-mode=Node,RBAC \
         --enable-admission-plugins=NodeRestriction {admission} --allow-privileged=true --enable-aggregator-routing=true --v=1",
        port = layout::API_PORT,
        api = state.families.api(),
        services = state.families.list(layout::SERVICES, layout::SERVICES6),
        certificates = certificates.display(),
    );
    start(layout, "kube-apiserver", &state.binaries.join("kube-apiserver"), &arguments)
}

/// What works on the API server's objects; to be started once it is ready.
pub(super) fn start_controllers(layout: &Layout, state: &State) -> Result<()> {
    let pki = layout.path("pki");
    let common = |name: &str| {
        let config = layout.path(&format!("{name}.kubeconfig"));
        let config = config.display();
        format!(
            "--kubeconfig={config} --authentication-kubeconfig={config} --authorization-kubeconfig={config} \
             --leader-elect=false --bind-address=127.0.0.1 --cert-dir={} --v=1",
            layout.path(&format!("{name}-serving")).display()
        )
    };
    let pki = pki.display();
    let arguments = format!(
        "{} --service-account-private-key-file={pki}/sa.key --root-ca-file={pki}/ca.crt \
         --cluster-signing-cert-file={pki}/ca.crt --cluster-signing-key-file={pki}/ca.key \
         --use-service-account-credentials=true --cluster-cidr={} --allocate-node-cidrs=false \
         --node-monitor-grace-period=16s",
        common("controllers"),
        state.families.list(layout::PODS, layout::PODS6)
    );
    let program = state.binaries.join("kube-controller-manager");
    start(layout, "kube-controller-manager", &program, &arguments)?;
    start(layout, "kube-scheduler", &state.binaries.join("kube-scheduler"), &common("scheduler"))
}

/// The names of the control plane's processes.
pub(super) const PROCESSES: &[&str] =
    &["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// Starts a process that outlives us, in the cluster's network namespace and a cgroup of its own.
fn start(layout: &Layout, name: &str, program: &Path, arguments: &str) -> Result<()> {
    let below = format!("{}/{name}", layout.prefix());
    cgroups::create(&below)?;
    let netns = Path::new(netns::DIR).join(layout.prefix());
    let mut command = detached(layout, name)?;
    command.arg("in").arg("--netns").arg(netns).arg("--cgroup").arg(cgroup::mount()?.join(&below));
    command.arg("--").arg(program).args(arguments.split(' ').filter(|argument| !argument.is_empty()));
    command.spawn().with_context(|| format!("cannot start {name}"))?;
    // From here on, an empty cgroup means that it ended.
    wait::until_true(&format!("start of {name}"), Duration::from_secs(10), || running(layout, name))
}

/// A command of this program in a session of its own, with its output in a log: it does not end with us. Its process id
/// is that of what it becomes.
pub(super) fn detached(layout: &Layout, log: &str) -> Result<Command> {
    let own = std::env::current_exe().context("cannot find the own path")?;
    let path = layout.log(log);
    let out = std::fs::File::options().create(true).append(true).open(&path);
    let out = out.with_context(|| format!("cannot write {}", path.display()))?;
    let err = out.try_clone().context("cannot share a log file")?;
    let mut command = Command::new("setsid");
    command.arg(own).stdin(Stdio::null()).stdout(out).stderr(err).current_dir("/");
    command.env_remove("UM_PARENT");
    Ok(command)
}

/// Ends a process of the control plane at once.
pub(super) fn end(layout: &Layout, name: &str) -> Result<()> {
    cgroups::remove(&format!("{}/{name}", layout.prefix()))
}

/// Whether a process of the control plane runs.
pub(super) fn running(layout: &Layout, name: &str) -> Result<bool> {
    cgroups::populated(&format!("{}/{name}", layout.prefix()))
}
