//! The cluster's certificates, made with openssl, and the kubeconfigs that use them.

use super::layout::{self, Layout, State};
use crate::bed::netns;
use anyhow::{Context, Result};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// A client by its file name, and its user and groups as a certificate says them.
const CLIENTS: &[(&str, &str)] = &[
    ("kubelet-client", "/O=system:masters/CN=apiserver-kubelet-client"),
    ("admin", "/O=system:masters/CN=admin"),
    ("controllers", "/CN=system:kube-controller-manager"),
    ("scheduler", "/CN=system:kube-scheduler"),
    ("proxy", "/CN=system:kube-proxy"),
    ("policies", "/O=system:masters/CN=network-policies"),
];

/// Makes everything below `pki/`, and the kubeconfigs.
pub(super) fn create(layout: &Layout, state: &State) -> Result<()> {
    let State { nodes, host, families, .. } = state;
    let dir = layout.path("pki");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    openssl(
        &dir,
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=um-cluster -keyout ca.key \
         -out ca.crt",
    )?;
    openssl(&dir, "genrsa -out sa.key 2048")?;
    openssl(&dir, "rsa -in sa.key -pubout -out sa.pub")?;
    let names = format!(
        "subjectAltName=IP:127.0.0.1,IP:{host},IP:{},IP:{},IP:{},IP:{},DNS:localhost,DNS:kubernetes,\
         DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local",
        layout::API,
        layout::BRIDGE6,
        layout::FIRST_SERVICE,
        layout::FIRST_SERVICE6
    );
    issue(&dir, "apiserver", "/CN=kube-apiserver", "serverAuth", Some(&names))?;
    for (name, subject) in CLIENTS {
        issue(&dir, name, subject, "clientAuth", None)?;
    }
    for node in nodes {
        issue(&dir, node, &format!("/O=system:nodes/CN=system:node:{node}"), "clientAuth", None)?;
    }
    let inside =
        ["controllers", "scheduler", "proxy", "policies"].into_iter().chain(nodes.iter().map(String::as_str));
    for name in inside {
        kubeconfig(layout, name, families.api())?;
    }
    kubeconfig(layout, "admin", IpAddr::from(*host))
}

fn issue(dir: &Path, name: &str, subject: &str, usage: &str, names: Option<&str>) -> Result<()> {
    let usage = format!("extendedKeyUsage={usage}");
    let (key, crt) = (format!("{name}.key"), format!("{name}.crt"));
    let mut args: Vec<&str> =
        "req -x509 -CA ca.crt -CAkey ca.key -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
         -days 365 -addext basicConstraints=critical,CA:FALSE"
            .split(' ')
            .filter(|arg| !arg.is_empty())
            .collect();
    args.extend(["-subj", subject, "-addext", &usage, "-keyout", &key, "-out", &crt]);
    if let Some(names) = names {
        args.extend(["-addext", names]);
    }
    run(dir, &args)
}

fn openssl(dir: &Path, line: &str) -> Result<()> {
    run(dir, &line.split(' ').filter(|arg| !arg.is_empty()).collect::<Vec<_>>())
}

fn run(dir: &Path, args: &[&str]) -> Result<()> {
    let dir = dir.to_string_lossy();
    let argv = ["-C", &*dir, "openssl"].into_iter().chain(args.iter().copied());
    netns::command("env", argv).with_context(|| format!("openssl {}", args.join(" "))).map(drop)
}

fn kubeconfig(layout: &Layout, name: &str, server: IpAddr) -> Result<()> {
    let server = SocketAddr::new(server, layout::API_PORT);
    let pki = layout.path("pki");
    let pki = pki.display();
    let text = format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: um, cluster: {{server: \"https://{server}\", certificate-authority: {pki}/ca.crt}}}}]
users: [{{name: {name}, user: {{client-certificate: {pki}/{name}.crt, client-key: {pki}/{name}.key}}}}]
contexts: [{{name: um, context: {{cluster: um, user: {name}}}}}]
current-context: um
"
    );
    let path = layout.path(&format!("{name}.kubeconfig"));
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
