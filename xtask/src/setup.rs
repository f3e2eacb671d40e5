//! Installs what is missing. Every step looks first and does nothing when there is nothing to do.
//!
//! Programs come from the distribution and from crates.io, by name; nothing is downloaded from a web site.

use crate::bpf::{self, Toolchain};
use crate::{kubernetes, paths, run};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// A program that something needs, and the Debian package it comes from.
struct Need {
    program: &'static str,
    package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// What the build needs.
const BUILD: &[Need] = &[
    need("cc", "gcc"),
    need("c++", "g++"),
    need("cmake", "cmake"),
    need("make", "make"),
    need("node", "nodejs"),
    need("npm", "npm"),
];

/// What the testbed needs to lay out nodes and pods, and to look at them from outside.
const TESTBED: &[Need] = &[
    need("ip", "iproute2"),
    need("tc", "iproute2"),
    need("ss", "iproute2"),
    need("sysctl", "procps"),
    need("chrt", "util-linux"),
    need("setpriv", "util-linux"),
    need("tcpdump", "tcpdump"),
    need("nft", "nftables"),
    need("taskset", "util-linux"),
    need("valgrind", "valgrind"),
];

/// Programs that we did not write, which run in pods.
const PODS: &[Need] = &[
    need("curl", "curl"),
    need("nginx", "nginx-light"),
    need("iperf3", "iperf3"),
    need("redis-server", "redis-server"),
    need("redis-cli", "redis-tools"),
    need("psql", "postgresql-client"),
    need("h2load", "nghttp2-client"),
    need("wrk", "wrk"),
    need("python3", "python3"),
    need("dig", "bind9-dnsutils"),
    need("openssl", "openssl"),
    need("faketime", "faketime"),
    need("prometheus", "prometheus"),
    need("promtool", "prometheus"),
    need("chromium", "chromium"),
];

/// What a cluster of real nodes needs; only those who start one.
const CLUSTER: &[Need] = &[
    need("etcd", "etcd-server"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    need("iptables", "iptables"),
    need("ipset", "ipset"),
    need("nsenter", "util-linux"),
    need("go", "golang-go"),
];

const BPF_LINKER: &str = "0.13.0";

/// Runs every step of the setup.
pub(crate) fn run() -> Result<()> {
    packages(&[postgres_server(), python("h2", "python3-h2"), python("grpc", "python3-grpcio")])?;
    compiler()?;
    linker()?;
    mounts()?;
    run::step("setup: everything is there");
    Ok(())
}

/// Installs what a cluster needs beside all that.
pub(crate) fn cluster() -> Result<()> {
    let plugins = (!Path::new("/usr/lib/cni/ptp").is_file()).then_some("containernetworking-plugins");
    missing_of(CLUSTER.iter(), &[plugins])?;
    kubernetes::needs_go()
}

/// Where Debian puts PostgreSQL's server, which is in nobody's PATH.
fn postgres_server() -> Option<&'static str> {
    let installed = std::fs::read_dir("/usr/lib/postgresql")
        .is_ok_and(|mut versions| versions.any(|v| v.is_ok_and(|v| v.path().join("bin/postgres").is_file())));
    (!installed && !run::have("postgres")).then_some("postgresql")
}

/// A library for the distribution's own python, which need not be the one in PATH.
fn python(module: &str, package: &'static str) -> Option<&'static str> {
    let import = format!("import {module}");
    let there = run::output(Command::new("/usr/bin/python3").args(["-c", &import])).is_ok();
    (!there).then_some(package)
}

fn root_or(packages: &[String]) -> Result<()> {
    let uid = run::output(Command::new("id").arg("-u"))?;
    if uid.trim() != "0" {
        bail!("missing packages, and only root can install them: apt-get install {}", packages.join(" "));
    }
    if !run::have("apt-get") {
        bail!("this setup knows Debian and Ubuntu; install what corresponds to: {}", packages.join(" "));
    }
    Ok(())
}

fn packages(extra: &[Option<&str>]) -> Result<()> {
    missing_of([BUILD, TESTBED, PODS].into_iter().flatten(), extra)
}

fn missing_of<'a>(needs: impl Iterator<Item = &'a Need>, extra: &[Option<&str>]) -> Result<()> {
    let mut missing: Vec<String> =
        needs.filter(|need| !run::have(need.program)).map(|need| need.package.to_owned()).collect();
    missing.extend(extra.iter().flatten().map(|package| (*package).to_owned()));
    missing.sort();
    missing.dedup();
    if missing.is_empty() {
        run::step("packages: all there");
        return Ok(());
    }
    install(&missing)
}

pub(crate) fn install(packages: &[String]) -> Result<()> {
    root_or(packages)?;
    run::step(&format!("installing {}", packages.join(" ")));
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y", "install", "--no-install-recommends"]);
    // Servers that packages would start on install are for pods, not for this machine.
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists() && std::fs::write(policy, "#!/bin/sh\nexit 101\n").is_ok();
    if ours {
        let _ = run::output(Command::new("chmod").arg("+x").arg(policy));
    }
    let result = run::check(Command::new("apt-get").args(["-q", "update"]))
        .and_then(|()| run::check(apt.args(packages)))
        .with_context(|| {
            format!("could not install {}; install them by hand and run again", packages.join(" "))
        });
    if ours {
        let _ = std::fs::remove_file(policy);
    }
    result
}

fn available(package: &str) -> bool {
    run::output(Command::new("apt-cache").args(["policy", package]))
        .is_ok_and(|text| text.lines().any(|line| line.contains("Candidate:") && !line.contains("(none)")))
}

fn compiler() -> Result<()> {
    if Toolchain::find().is_none() {
        if run::have("apt-get") {
            run::check(Command::new("apt-get").args(["-q", "update"]))?;
        }
        if available("libstd-rust-web-dev-bpf") {
            install(&["rustc-web".to_owned(), "libstd-rust-web-dev-bpf".to_owned()])?;
        } else {
            run::step(&format!("installing {} with rust-src through rustup", bpf::NIGHTLY));
            let mut rustup = Command::new("rustup");
            rustup.args([
                "toolchain",
                "install",
                bpf::NIGHTLY,
                "--profile",
                "minimal",
                "--component",
                "rust-src",
            ]);
            run::check(&mut rustup).context(
                "the kernel programs need Debian's rustc-web with libstd-rust-web-dev-bpf, or rustup with a network",
            )?;
        }
    }
    let toolchain = Toolchain::find().context("a compiler was installed but cannot be found")?;
    let (version, llvm) = toolchain.versions()?;
    run::step(&format!("kernel programs: {version}, LLVM {llvm}"));
    Ok(())
}

fn linker() -> Result<()> {
    let toolchain = Toolchain::find().context("no compiler for the kernel programs")?;
    let (_, llvm) = toolchain.versions()?;
    match bpf::linker_llvm()? {
        Some(have) if have >= llvm => {
            run::step(&format!("bpf-linker: there, LLVM {have}"));
            return Ok(());
        }
        Some(have) => {
            run::step(&format!("bpf-linker has LLVM {have}, the compiler {llvm}: building another"))
        }
        None => run::step("bpf-linker: building (about a minute)"),
    }
    let dev = format!("llvm-{llvm}-dev");
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("bin/llvm-config").is_file() {
        if !available(&dev) {
            bail!(
                "bpf-linker must be built against LLVM {llvm} or newer, and this distribution has no {dev}: \
                 add a source that has it (apt.llvm.org has) and run again"
            );
        }
        install(&[dev, format!("libpolly-{llvm}-dev"), "libzstd-dev".to_owned(), "zlib1g-dev".to_owned()])?;
    }
    let tools = paths::tools()?;
    let mut cargo = Command::new("cargo");
    cargo
        .args([
            "install",
            "bpf-linker",
            "--version",
            BPF_LINKER,
            "--no-default-features",
            "--force",
            "--locked",
        ])
        .args(["--features", &format!("llvm-{llvm}"), "--root"])
        .arg(&tools)
        .env("LLVM_PREFIX", &prefix)
        .env("CARGO_TARGET_DIR", paths::target()?.join("bpf-linker"));
    run::check(&mut cargo)?;
    std::fs::write(tools.join("bpf-linker.llvm"), format!("{llvm}\n"))
        .context("cannot note the linker's LLVM")
}

/// The file systems that capture needs, on machines (containers) where nothing has mounted them.
fn mounts() -> Result<()> {
    let mounted = std::fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let has = |kind: &str| mounted.lines().any(|line| line.split(' ').nth(2) == Some(kind));
    for (kind, at) in [("cgroup2", "/run/undermesh/cgroup2"), ("bpf", "/sys/fs/bpf")] {
        if has(kind) {
            continue;
        }
        run::step(&format!("mounting {kind} at {at}"));
        std::fs::create_dir_all(at).with_context(|| format!("cannot create {at}"))?;
        run::check(Command::new("mount").args(["-t", kind, kind, at])).with_context(|| {
            format!("{kind} is not mounted, and mounting it needs root and CAP_SYS_ADMIN")
        })?;
    }
    Ok(())
}
