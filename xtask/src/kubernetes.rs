//! Kubernetes's own programs, built once from their Go modules at the versions that `tests/k8s/go.mod` pins.

use crate::{paths, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a cluster is made of, in the order in which it is built: what shares most with the others first.
const PROGRAMS: &[&str] =
    &["kubectl", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"];

/// Go compiles Kubernetes 1.34 from here on; an older one that can fetch its successor does so.
const OLDEST_GO: (u32, u32) = (1, 21);

/// The module that pins the versions.
pub(crate) fn module() -> PathBuf {
    paths::root().join("tests/k8s")
}

/// The pinned version of a module, as `v1.2.3`.
pub(crate) fn pinned(go_mod: &str, module: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let line = line.trim().trim_start_matches("require ");
        let version = line.strip_prefix(module)?.strip_prefix(' ')?.split_whitespace().next()?;
        version.starts_with('v').then(|| version.to_owned())
    })
}

/// The version of Kubernetes that is pinned.
fn version() -> Result<String> {
    let path = module().join("go.mod");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    pinned(&text, "k8s.io/kubernetes")
        .with_context(|| format!("{} names no k8s.io/kubernetes", path.display()))
}

/// Where the programs are, or will be.
pub(crate) fn dir() -> Result<PathBuf> {
    Ok(paths::cache()?.join("kubernetes").join(version()?))
}

/// Whether all of them are there.
pub(crate) fn built() -> bool {
    dir().is_ok_and(|dir| PROGRAMS.iter().all(|name| dir.join(name).is_file()))
}

/// Builds what is not there; returns the directory.
pub(crate) fn build() -> Result<PathBuf> {
    let dir = dir()?;
    let missing: Vec<&&str> = PROGRAMS.iter().filter(|name| !dir.join(name).is_file()).collect();
    if missing.is_empty() {
        return Ok(dir);
    }
    needs_go()?;
    let version = version()?;
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (n, name) in missing.iter().enumerate() {
        run::step(&format!(
            "Kubernetes {version}: building {name} ({} of {}; all of it takes some 15 minutes, once)",
            n + 1,
            missing.len()
        ));
        go(&module(), &format!("k8s.io/kubernetes/cmd/{name}"), &stamp(&version), &dir.join(name))?;
    }
    Ok(dir)
}

/// A program of another project, in a module of ours that pins it.
struct Other {
    /// Its name, for people and, with the version, as a file.
    name: &'static str,
    /// Our module, below the root.
    module: &'static str,
    /// The module that is pinned there, and the package that becomes the program.
    pinned: &'static str,
    package: &'static str,
    minutes: u8,
}

impl Other {
    /// Builds it if it is not there; returns its path.
    fn build(&self) -> Result<PathBuf> {
        let module = paths::root().join(self.module);
        let path = module.join("go.mod");
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let version = pinned(&text, self.pinned)
            .with_context(|| format!("{} names no {}", path.display(), self.pinned))?;
        let out = paths::cache()?.join(format!("kubernetes/{}-{version}", self.name));
        if !out.is_file() {
            needs_go()?;
            run::step(&format!("{} {version}: building (some {} minutes, once)", self.name, self.minutes));
            go(&module, self.package, "-s -w", &out)?;
        }
        Ok(out)
    }
}

/// The cluster's DNS, without what a test cluster does not ask of it.
pub(crate) fn dns() -> Result<PathBuf> {
    let pinned = "github.com/coredns/coredns";
    Other { name: "coredns", module: "tests/k8s/dns", pinned, package: ".", minutes: 3 }.build()
}

/// Helm, which the chart is compared with.
pub(crate) fn helm() -> Result<PathBuf> {
    let (pinned, package) = ("helm.sh/helm/v3", "helm.sh/helm/v3/cmd/helm");
    Other { name: "helm", module: "tests/helm", pinned, package, minutes: 5 }.build()
}

/// kube-router, which holds network policies on the nodes of scenarios that have some.
pub(crate) fn network_policies() -> Result<PathBuf> {
    let pinned = "github.com/cloudnativelabs/kube-router/v2";
    let package = "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router";
    Other { name: "kube-router", module: "tests/k8s/netpol", pinned, package, minutes: 2 }.build()
}

/// Definitions of kinds that others publish, by module, and where they are in it.
const DEFINITIONS: &[(&str, &str)] = &[
    ("sigs.k8s.io/gateway-api@v1.6.3", "config/crd/standard"),
    ("istio.io/api@v1.31.4", "kubernetes/customresourcedefinitions.gen.yaml"),
];

/// The definitions of the Gateway API and of Istio as they are published: a directory of YAML files.
pub(crate) fn definitions() -> Result<PathBuf> {
    let dir = paths::cache()?.join("kubernetes/definitions");
    for (module, inside) in DEFINITIONS {
        let out = dir.join(module.replace('/', "_"));
        if out.is_dir() {
            continue;
        }
        needs_go()?;
        run::step(&format!("definitions of {module}"));
        let text =
            run::output(Command::new("go").args(["mod", "download", "-json", module]).current_dir("/"))
                .with_context(|| format!("cannot fetch the module {module}"))?;
        let told: serde_json::Value = serde_json::from_str(&text).context("go told no JSON")?;
        let from = Path::new(told["Dir"].as_str().context("go told no directory")?).join(inside);
        let unfinished = out.with_extension("unfinished");
        std::fs::create_dir_all(&unfinished)
            .with_context(|| format!("cannot make {}", unfinished.display()))?;
        for file in yaml_files(&from)? {
            let name = file.file_name().context("a file without a name")?;
            std::fs::copy(&file, unfinished.join(name))
                .with_context(|| format!("cannot copy {}", file.display()))?;
        }
        std::fs::rename(&unfinished, &out).with_context(|| format!("cannot move {}", out.display()))?;
    }
    Ok(dir)
}

fn yaml_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(files.filter(|file| file.extension().is_some_and(|ext| ext == "yaml")).collect())
}

/// The program that holds a pod's namespaces; small enough to be built anew.
pub(crate) fn pause() -> Result<PathBuf> {
    needs_go()?;
    let out = paths::target()?.join("images/pause");
    go(&module(), "./pause", "-s -w", &out)?;
    Ok(out)
}

/// Linker flags that make programs say their version, which clients and servers compare.
fn stamp(version: &str) -> String {
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        flags += &format!(
            " -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor} \
             -X {package}.gitTreeState=clean"
        );
    }
    flags
}

/// `go build`, behind everything else that the machine does; complete or not there at all.
pub(crate) fn go(module: &Path, package: &str, flags: &str, out: &Path) -> Result<()> {
    go_command(module, &["build"], package, flags, out)
}

/// `go test -c`: the program that runs a package's tests.
pub(crate) fn go_tests(module: &Path, out: &Path) -> Result<()> {
    go_command(module, &["test", "-c"], ".", "", out)
}

fn go_command(module: &Path, verb: &[&str], package: &str, flags: &str, out: &Path) -> Result<()> {
    let parent = out.parent().context("a program needs a directory")?;
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let unfinished =
        parent.join(format!("{}.unfinished", out.file_name().unwrap_or_default().to_string_lossy()));
    let mut nice = Command::new("nice");
    nice.args(["-n", "10", "go"])
        .args(verb)
        .args(["-p", "2", "-trimpath", "-ldflags", flags, "-o"])
        .arg(&unfinished)
        .arg(package)
        .current_dir(module)
        .env("CGO_ENABLED", "0");
    run::check(&mut nice).with_context(|| {
        "Go modules come through GOPROXY (see `go env GOPROXY`); without a network they must be in its cache"
    })?;
    std::fs::rename(&unfinished, out).with_context(|| format!("cannot move {}", out.display()))
}

/// Says which Go is missing before it fails.
pub(crate) fn needs_go() -> Result<()> {
    if !run::have("go") {
        bail!(
            "Kubernetes for the tests is built with Go, which is not in PATH: run `cargo xtask cluster up` as root, or \
             install Go {}.{} or newer (golang-go)",
            OLDEST_GO.0,
            OLDEST_GO.1
        );
    }
    let text = run::output(Command::new("go").arg("version"))?;
    if go_version(&text).is_some_and(|version| version < OLDEST_GO) {
        bail!(
            "{} is too old to build Kubernetes: install {}.{} or newer (golang-1.24 from your distribution's backports)",
            text.trim(),
            OLDEST_GO.0,
            OLDEST_GO.1
        );
    }
    Ok(())
}

/// From `go version go1.26.8 linux/amd64`.
fn go_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split_whitespace().find_map(|word| word.strip_prefix("go1."))?;
    Some((1, version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_version_is_read_from_either_form_of_require() {
        let text = "module m\n\nrequire k8s.io/kubernetes v1.34.4\n\nrequire (\n\tk8s.io/api v0.34.4 // indirect\n)\n\
                    replace (\n\tk8s.io/kubernetes-not v9.9.9\n)\n";
        assert_eq!(pinned(text, "k8s.io/kubernetes").as_deref(), Some("v1.34.4"));
        assert_eq!(pinned(text, "k8s.io/api").as_deref(), Some("v0.34.4"));
        assert_eq!(pinned(text, "k8s.io/other"), None);
    }

    #[test]
    fn versions_of_go_are_compared_as_numbers() {
        assert_eq!(go_version("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(go_version("go version go1.9 linux/amd64"), Some((1, 9)));
        assert!(go_version("go version go1.19rc2 linux/amd64") < Some(OLDEST_GO));
        assert_eq!(go_version("gccgo"), None);
    }
}
