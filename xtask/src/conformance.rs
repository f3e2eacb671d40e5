//! The Gateway API's conformance suite: its program and the images of its pods, built from the Go modules that
//! `tests/conformance` pins.

use crate::build::Built;
use crate::{cluster, images, kubernetes, paths, run};
use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const SUITE: &str = "sigs.k8s.io/gateway-api/conformance";
/// Where the suite's pods have their images from, as its manifests name them.
const ECHO: &str = "registry.k8s.io/gateway-api/";
const DNS: &str = "registry.k8s.io/coredns/coredns";

fn module() -> PathBuf {
    paths::root().join("tests/conformance")
}

/// The command that runs the suite on a cluster, with everything that it needs.
pub(crate) fn command(built: Built, args: &[String]) -> Result<Command> {
    if let Some(why) = cluster::unable() {
        bail!("no cluster can run here: {why}");
    }
    let parts = cluster::parts(built)?;
    let suite = build()?;
    let mut command = parts.command(&["k8s", "conformance"])?;
    command.args(args).env("UM_CONFORMANCE", suite);
    Ok(command)
}

/// Builds what is missing; returns the directory of the suite's program and of its images.
fn build() -> Result<PathBuf> {
    kubernetes::needs_go()?;
    let text = std::fs::read_to_string(module().join("go.mod")).context("cannot read the suite's go.mod")?;
    let version = kubernetes::pinned(&text, SUITE).context("go.mod does not name the suite")?;
    // How they are made is part of what was made.
    let made_by = Sha256::new()
        .chain_update(include_bytes!("conformance.rs"))
        .chain_update(include_bytes!("images.rs"));
    let made_by: String = made_by.finalize().iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let dir = paths::cache()?.join("kubernetes").join(format!("conformance-{version}-{made_by}"));
    let all = ["echo-basic", "echo-advanced", "suite-dns"];
    let has = |image: &str| dir.join(format!("images/{image}.tar")).is_file();
    if all.into_iter().all(has) {
        return Ok(dir);
    }
    std::fs::create_dir_all(dir.join("images")).with_context(|| format!("cannot make {}", dir.display()))?;
    run::step(&format!("conformance suite {version}: building (some ten minutes, once)"));
    kubernetes::go_tests(&module(), &dir.join("suite"))?;
    let manifests = manifests(&downloaded(&module(), SUITE)?)?;
    let makers = [basic, advanced, dns];
    for (make, _) in makers.into_iter().zip(all).filter(|(_, image)| !has(image)) {
        make(&dir, &manifests)?.write(&dir.join("images"))?;
    }
    Ok(dir)
}

/// The DNS server that the suite's base has among its backends.
fn dns(dir: &Path, manifests: &str) -> Result<images::Image> {
    let program = dir.join("coredns");
    kubernetes::go(&kubernetes::module().join("dns"), ".", "-s -w", &program)?;
    let names = references(manifests, DNS);
    // It binds port 53, for which published images of it have a capability on the file.
    Ok(images::foreign("suite-dns", names, &["/coredns"], images::ROOT, &[("/coredns", program)]))
}

/// The echo server of the profiles for gateways.
fn basic(dir: &Path, manifests: &str) -> Result<images::Image> {
    let program = dir.join("echo-basic");
    kubernetes::go(&module(), &format!("{SUITE}/echo-basic"), "-s -w", &program)?;
    let names = references(manifests, &format!("{ECHO}echo-basic"));
    Ok(images::foreign("echo-basic", names, &["/echo-basic"], images::NOBODY, &[("/echo-basic", program)]))
}

/// The echo server and client of the profiles for meshes: those of Istio's own tests, with the certificate that these use.
fn advanced(dir: &Path, manifests: &str) -> Result<images::Image> {
    let module = module().join("echo");
    let mut files = Vec::new();
    for (name, at) in [("server", "/usr/local/bin/server"), ("client", "/usr/local/bin/client")] {
        let program = dir.join(format!("echo-{name}"));
        kubernetes::go(&module, &format!("istio.io/istio/pkg/test/echo/cmd/{name}"), "-s -w", &program)?;
        files.push((at, program));
    }
    let certificates = downloaded(&module, "istio.io/istio")?.join("tests/testdata/certs/dns");
    files.push(("/cert.crt", certificates.join("cert-chain.pem")));
    files.push(("/cert.key", certificates.join("key.pem")));
    let names = references(manifests, &format!("{ECHO}echo-advanced"));
    Ok(images::foreign("echo-advanced", names, &["/usr/local/bin/server"], images::NOBODY, &files))
}

/// Where Go has a module's files.
fn downloaded(module: &Path, name: &str) -> Result<PathBuf> {
    let text = run::output(
        Command::new("go")
            .args(["mod", "download", "-json", name])
            .current_dir(module)
            .env("GOFLAGS", "-mod=mod"),
    )
    .with_context(|| format!("cannot fetch the module {name}"))?;
    let told: serde_json::Value = serde_json::from_str(&text).context("go told no JSON")?;
    Ok(PathBuf::from(told["Dir"].as_str().context("go told no directory")?))
}

/// Every manifest of the suite, one after the other.
fn manifests(suite: &Path) -> Result<String> {
    let mut text = String::new();
    for dir in ["base", "mesh", "tests", "tests/mesh"] {
        let dir = suite.join(dir);
        let entries = std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if path.extension().is_some_and(|ext| ext == "yaml") {
                text += &std::fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
            }
        }
    }
    Ok(text)
}

/// Every name by which manifests ask for an image of the suite.
fn references(manifests: &str, image: &str) -> Vec<String> {
    let prefix = format!("{image}:");
    let words = manifests.split_whitespace().filter(|word| word.starts_with(&prefix));
    words.map(str::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_every_name_that_manifests_ask_for_once() {
        let text = "image: registry.k8s.io/gateway-api/echo-basic:v1\n  image: registry.k8s.io/gateway-api/echo-basic:v2\n\
                    image: registry.k8s.io/gateway-api/echo-basic:v1\nimage: registry.k8s.io/gateway-api/echo-advanced:v1\n";
        let expected = ["v1", "v2"].map(|tag| format!("registry.k8s.io/gateway-api/echo-basic:{tag}"));
        assert_eq!(references(text, &format!("{ECHO}echo-basic")), expected);
    }
}
