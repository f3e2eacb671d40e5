//! gRPC: the client and server of grpc-go's own benchmark, one call after the other on eight connections, and messages
//! on open streams.

use super::peers::{PORT, Peer};
use super::rig::{LOAD_CPU, Rig, Variant, pod_of};
use super::routes::GRPC_PORT;
use crate::bed::process::{self, Program};
use crate::bed::{run, wait};
use crate::bench::rig::cpu_seconds;
use crate::bench::rows::{Bar, Row};
use crate::bench::stats::Estimate;
use anyhow::{Context, Result};
use std::time::Duration;

const MISSING: &str =
    "no client and server of grpc-go's benchmark: `cargo xtask bench l7` builds them where there is Go";

/// Both shapes.
const SHAPES: [&str; 2] = ["unary", "streaming"];

/// CPU seconds of the proxy per 10,000 messages.
fn cost(rig: &Rig, variant: Variant, shape: &str, seconds: f64) -> Result<f64> {
    let client = process::find("grpc-bench-client").context(MISSING)?.display().to_string();
    let whole = format!("{:.0}", seconds.max(1.0));
    // It connects to this host only, so that it runs beside the proxy.
    let argv = [
        client,
        format!("-port={PORT}"),
        format!("-rpc_type={shape}"),
        "-r=8".into(),
        "-c=2".into(),
        "-req=128".into(),
        "-resp=128".into(),
        "-w=1".into(),
        format!("-d={whole}"),
        format!("-test_name={}", profile(rig, "client")),
    ];
    let pid = rig.pid(variant)?.context("the proxy does not run")?;
    let before = cpu_seconds(pid)?;
    let pod = rig.bed.pod(&pod_of(variant))?;
    let done = pod.run(Program { cpu: Some(LOAD_CPU), ..Program::from(argv) })?;
    let cpu = cpu_seconds(pid)? - before;
    let text = format!("{}{}", done.out, done.err);
    let rate = text.lines().find_map(|line| line.split("qps:").nth(1));
    let rate = rate.with_context(|| format!("{variant:?}, {shape}: the client said {text:?}"))?;
    let rate: f64 = rate.trim().parse().with_context(|| format!("no rate: {text:?}"))?;
    // It warms up for a second as it goes on afterwards, and both cost the proxy the same.
    let time = 1.0 + seconds.max(1.0).round();
    Ok(cpu * 1e4 / (rate * time))
}

/// Both programs leave profiles of this name in the directory for temporary files.
fn profile(rig: &Rig, of: &str) -> String {
    let run = rig.bed.dir.file_name().unwrap_or_default().to_string_lossy();
    format!("{run}-grpc-{of}")
}

fn remove_profiles(rig: &Rig) {
    for of in ["client", "server"] {
        for kind in ["cpu", "mem"] {
            let _ = std::fs::remove_file(format!("/tmp/{}.{kind}", profile(rig, of)));
        }
    }
}

/// Its rows.
///
/// # Errors
/// The client fails.
pub(super) fn rows(rig: &Rig, rounds: usize, seconds: f64) -> Result<Vec<Row>> {
    let name = |shape: &str| format!("l7.grpc_{shape}.cpu.vs_envoy");
    let bar = Bar::AtMost(0.35);
    let skipped = |why: &str| SHAPES.map(|shape| Row::skipped(&name(shape), "ratio", bar, why)).to_vec();
    let (Some(server), Some(_)) = (process::find("grpc-bench-server"), process::find("grpc-bench-client"))
    else {
        return Ok(skipped(MISSING));
    };
    if Peer::Envoy.program().is_none() {
        return Ok(skipped(Peer::Envoy.missing()));
    }
    let pod = rig.bed.pod("bench/server")?;
    let argv = [
        server.display().to_string(),
        format!("-port={GRPC_PORT}"),
        format!("-test_name={}", profile(rig, "server")),
    ];
    let _server = pod.spawn(Program { cpu: Some(LOAD_CPU), ..Program::from(argv) })?;
    wait::until_true("server of gRPC", Duration::from_secs(20), || pod.listening(GRPC_PORT))?;
    let mut rows = Vec::new();
    for shape in SHAPES {
        let (mut ratios, mut noise, mut ours) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            run::check()?;
            let own = cost(rig, Variant::Ours, shape, seconds)?;
            let envoy = cost(rig, Variant::Peer(Peer::Envoy), shape, seconds)?;
            let again = cost(rig, Variant::Ours, shape, seconds)?;
            ratios.push(own / envoy);
            noise.push(again / own);
            ours.push(own);
        }
        rows.push(Row::ratio(&name(shape), bar, ratios, Estimate::of(&noise)));
        rows.push(Row::of(&format!("l7.grpc_{shape}.cpu"), "s/10k", Bar::None, ours));
    }
    remove_profiles(rig);
    Ok(rows)
}
