//! How long a proxy takes to start, what it keeps in memory, and what ten thousand routes cost.

use super::load::Load;
use super::peers::{PORT, Peer};
use super::rig::{Rig, Variant, pod_of};
use super::routes::{self, HEADER};
use crate::bed::process::{Proc, Program};
use crate::bed::{run, wait};
use crate::bench::rig::cpu_seconds;
use crate::bench::rows::{Bar, Row};
use anyhow::{Context, Result};
use std::time::{Duration, Instant};

const MIB: f64 = 1024.0 * 1024.0;
/// A process has given back what its start needed after this long.
const STARTED: Duration = Duration::from_secs(12);
/// Connections are idle, and not between two requests, after this long.
const QUIET: Duration = Duration::from_secs(4);
const SOON: Duration = Duration::from_secs(120);
const MANY: &str = "many";
/// Services in one file.
const PART: usize = 400;

/// From a program's start to its first answer, before any of the proxies runs.
///
/// # Errors
/// A proxy does not answer.
pub(super) fn start(rig: &Rig, quick: bool) -> Result<Vec<Row>> {
    let times = if quick { 3 } else { 15 };
    let mut ours = Vec::new();
    let peers: Vec<Peer> = Peer::ALL.into_iter().filter(|peer| peer.program().is_some()).collect();
    let mut theirs = vec![Vec::new(); peers.len()];
    for _ in 0..times {
        ours.push(first_answer(rig, Variant::Ours)?);
        for (peer, times) in peers.iter().zip(&mut theirs) {
            times.push(first_answer(rig, Variant::Peer(*peer))?);
        }
    }
    let mut rows = vec![Row::of("l7.start", "ms", Bar::AtMost(30.0), ours)];
    for (peer, times) in peers.iter().zip(theirs) {
        rows.push(Row::of(&format!("l7.start.{}", peer.name()), "ms", Bar::None, times));
    }
    Ok(rows)
}

/// A gateway counts as started when a request has come through it: its certificate, its configuration and its listener
/// are there by then.
fn first_answer(rig: &Rig, variant: Variant) -> Result<f64> {
    let mut argv: Vec<String> = ["mesh-tests", "tool", "http-start"].map(str::to_owned).to_vec();
    argv.extend([format!("--to=127.0.0.1:{PORT}"), "--path=/item".into(), format!("--header={HEADER}: yes")]);
    argv.push("--".into());
    argv.extend(rig.command(variant)?);
    let text = rig.bed.pod(&pod_of(variant))?.output(Program::from(argv))?;
    text.lines().last().unwrap_or_default().trim().parse().with_context(|| format!("no time: {text:?}"))
}

fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("a proxy has ended")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS is no number")?;
    Ok(kib * 1024.0)
}

/// Waits for memory to stop changing.
fn settled(pid: u32) -> Result<f64> {
    let end = Instant::now() + Duration::from_secs(15);
    let (mut last, mut calm) = (resident(pid)?, 0);
    while calm < 4 && Instant::now() < end {
        run::pause(Duration::from_millis(500))?;
        let now = resident(pid)?;
        calm = if (now - last).abs() < 256.0 * 1024.0 { calm + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// Memory of proxies that have just started and carried a few requests, and of their idle connections.
///
/// # Errors
/// Connections cannot be opened.
pub(super) fn memory(rig: &Rig, quick: bool) -> Result<Vec<Row>> {
    run::pause(STARTED)?;
    let count = if quick { 1_000 } else { 10_000 };
    let mut rows = Vec::new();
    // Of the others only Envoy may have as many connections open within the limit of files.
    for variant in [Variant::Ours, Variant::Peer(Peer::Envoy)] {
        let Some(pid) = rig.pid(variant)? else { continue };
        let suffix =
            if let Variant::Peer(peer) = variant { format!(".{}", peer.name()) } else { String::new() };
        let ours = variant == Variant::Ours;
        let bar = |most: f64| if ours { Bar::AtMost(most) } else { Bar::None };
        let idle = settled(pid)?;
        rows.push(Row::of(&format!("l7.memory.idle{suffix}"), "MiB", bar(12.0), vec![idle / MIB]));
        let held = hold(rig, variant, count)?;
        run::pause(QUIET)?;
        let each = (settled(pid)? - idle) / count as f64 / 1024.0;
        rows.push(Row::of(&format!("l7.memory.connection_{count}{suffix}"), "KiB", bar(5.0), vec![each]));
        drop(held);
    }
    Ok(rows)
}

fn hold(rig: &Rig, variant: Variant, count: usize) -> Result<Proc> {
    let mut argv: Vec<String> = ["mesh-tests", "tool", "http-hold"].map(str::to_owned).to_vec();
    argv.push(format!("--to={}", rig.target(variant, Load::Http1)?));
    argv.extend(["--path=/item".into(), format!("--header={HEADER}: yes"), format!("--conns={count}")]);
    let mut held = rig.bed.pod("bench/client")?.spawn(argv)?;
    wait::until_true(&format!("{count} connections over {variant:?}"), SOON, || {
        if !held.running()? {
            return Err(wait::hopeless(held.log()));
        }
        Ok(held.log().contains(&format!("holding {count}")))
    })?;
    Ok(held)
}

/// Ten thousand routes, each to a destination of its own: what they keep, what the last of them costs, what one more
/// does.
///
/// # Errors
/// The routes do not come into force.
pub(super) fn routes(rig: &mut Rig, quick: bool) -> Result<Vec<Row>> {
    let (count, rounds) = if quick { (1_000, 3) } else { (10_000, 15) };
    let server = rig.bed.pod("bench/server")?.at(routes::SERVER_PORTS[0]);
    rig.bed.apply("many-pod", &routes::many_pod(MANY))?;
    rig.bed.apply(MANY, &routes::gateway(MANY))?;
    // Readers of YAML have a limit of documents in one file.
    for part in (0..count).step_by(PART) {
        let range = part..(part + PART).min(count);
        let yaml = routes::many(MANY, range, count - 1, server);
        rig.bed.write_live(&format!("{MANY}-{part}"), &yaml)?;
    }
    let argv = [rig.gateway_command(MANY)?, vec!["--access-log=false".to_owned()]].concat();
    let pod = rig.bed.pod("bench/many")?;
    let gateway = pod.spawn(Program { cpu: Some(1), ..Program::from(argv) })?;
    let (pid, to) = (gateway.pid(), pod.at(PORT));
    let path = format!("/many/{}/item", count - 1);
    let header = format!("{HEADER}: yes");
    let answers = |path: &str| -> Result<bool> {
        let url = format!("http://{to}{path}");
        let argv = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &header, &url];
        Ok(rig.bed.pod("bench/client")?.run(argv)?.out == "200")
    };
    wait::until_true("the last of many routes in force", SOON, || answers(&path))
        .with_context(|| crate::bed::process::gist(&gateway.log()))?;
    run::pause(STARTED)?;
    let kept = settled(pid)? / MIB;
    let name = format!("l7.routes_{count}");
    let mut rows = vec![Row::of(&format!("{name}.memory"), "MiB", Bar::AtMost(80.0), vec![kept])];

    let (mut ratios, mut noise, mut cost) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        run::check()?;
        let few = rig.run(Variant::Ours, Load::Http1, 1.0)?;
        let many = rig.run_at(Variant::Ours, to, Some(pid), Load::Http1, &path, 1.0)?;
        let again = rig.run(Variant::Ours, Load::Http1, 1.0)?;
        ratios.push(many.served.rate / few.served.rate);
        noise.push(again.served.rate / few.served.rate);
        cost.push((many.cpu / many.served.requests) / (few.cpu / few.served.requests));
    }
    let estimate = crate::bench::stats::Estimate::of(&noise);
    rows.push(Row::ratio(&format!("{name}.rate.vs_10"), Bar::AtLeast(0.9), ratios, estimate));
    rows.push(Row::ratio(&format!("{name}.cpu.vs_10"), Bar::None, cost, None));

    // What the proxy does for one more route, and when that is in force.
    let (mut spent, mut effect) = (Vec::new(), Vec::new());
    for n in 0..if quick { 2 } else { 7 } {
        let more = count + n;
        let yaml = routes::many(MANY, more..more + 1, more, server);
        run::pause(Duration::from_secs(1))?;
        let (begin, before) = (Instant::now(), cpu_seconds(pid)?);
        rig.bed.write_live(&format!("more-{n}"), &yaml)?;
        let path = format!("/many/{more}/item");
        let to_it = rig.bed.pod("bench/client")?;
        let asked = wait_for_route(to_it, to, &path)?;
        effect.push(begin.elapsed().as_secs_f64() * 1e3);
        run::pause(Duration::from_millis(300))?;
        let questions = f64::from(asked) * QUESTION_MS;
        spent.push((cpu_seconds(pid)? - before) * 1e3 - questions);
    }
    rows.push(Row::of(&format!("{name}.add"), "ms of CPU", Bar::AtMost(20.0), spent));
    rows.push(Row::of(&format!("{name}.add.in_force"), "ms", Bar::None, effect));
    Ok(rows)
}

/// What a question for the new route costs the proxy, milliseconds: a request on a connection of its own.
const QUESTION_MS: f64 = 0.1;

/// Asks every few milliseconds until the route answers; how often it asked.
fn wait_for_route(client: &crate::bed::Pod, to: std::net::SocketAddr, path: &str) -> Result<u32> {
    let mut asked = 0;
    let path = path.to_owned();
    client.netns.within(|| {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            asked += 1;
            if super::ask(to, &path).is_ok_and(|status| status == 200) {
                return Ok(asked);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        anyhow::bail!("{path} did not come into force")
    })?
}
