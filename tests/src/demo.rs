//! The demo: the mesh at work on two nodes, told step by step, with every claim checked as it is made.
//!
//! A claim that does not hold is shown as such, and the demo ends with failure.

mod layer7;
mod seen;
mod shop;
mod story;

use crate::bed::mesh::MeshOptions;
use crate::bed::{Load, Testbed, Topology, net, run, wait};
use crate::tools::load::Figures;
use anyhow::Result;
use rustix::process::Signal;
use shop::{ENROLLED, ONLY_FRONTEND, SHOP};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use story::Story;

/// How to show it.
#[derive(clap::Args)]
pub struct Args {
    /// End after the summary, on a terminal too
    #[arg(long)]
    no_wait: bool,
}

const SOON: Duration = Duration::from_secs(15);

/// Tells the story; whether every claim held.
///
/// # Errors
/// The testbed or the mesh does not start.
pub fn run(args: &Args) -> Result<bool> {
    let mut story = Story::default();
    story.chapter("Two nodes and a small shop, without a mesh");
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    story.say("Every box is a network namespace; the programs in the pods are unmodified:");
    story.show(shop::PICTURE);
    if let Err(error) = told(&mut bed, &mut story) {
        println!("{}", bed.explain());
        return Err(error);
    }
    let good = story.summary();
    if std::io::stdin().is_terminal() && !args.no_wait {
        println!(
            "\nThe shop stays open for exploration until you press Enter:\n{}",
            crate::scenarios::guide(&bed)?
        );
        wait_for_enter()?;
    }
    Ok(good)
}

fn told(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    let options = MeshOptions::default();
    bed.start_mesh(&options)?;
    let customers = shop::customers(bed)?;
    in_the_clear(bed, story)?;
    join(bed, story)?;
    let visits = customers.stop()?;
    unharmed(story, "joining the mesh", &visits);
    policy(bed, story)?;
    seen::seen(bed, story)?;
    upgrade(bed, story, &options)?;
    crash(bed, story, &options)?;
    layer7::tell(bed, story)?;
    figures(bed, story)
}

fn in_the_clear(bed: &Testbed, story: &mut Story) -> Result<()> {
    story.say("Customers arrive every few milliseconds, and keep coming during all that follows.");
    let segments = shop::watch(bed)?;
    let line = segments.iter().find_map(|s| shop::http_line(&s.payload));
    story.say("On the wire between the nodes, everybody can read along:");
    story.show(&format!("    {}", line.clone().unwrap_or_default()));
    story.claim("before the mesh, requests are readable on the wire", line.is_some(), "");
    Ok(())
}

fn join(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.chapter("The shop joins the mesh: one label, no restart");
    story.show("    kubectl label namespace shop istio.io/dataplane-mode=ambient     (here: the same line in a YAML file)");
    let start = Instant::now();
    bed.label("Namespace", "shop", "istio.io/dataplane-mode", Some("ambient"))?;
    bed.wait_enrolled(ENROLLED)?;
    story.say(&format!(
        "{} pods on two nodes were captured within {} ms.",
        ENROLLED.len(),
        start.elapsed().as_millis()
    ));
    let segments = shop::watch(bed)?;
    let readable = segments.iter().filter(|s| shop::http_line(&s.payload).is_some()).count();
    let tunnel: Vec<_> =
        segments.iter().filter(|s| s.to.port() == 15_008 && s.payload.starts_with(&[0x17, 3, 3])).collect();
    story.say(&format!(
        "The wire again, for one second: {} segments, {readable} readable; this is what one looks like now:",
        segments.len()
    ));
    if let Some(segment) = tunnel.first() {
        let hex: Vec<String> = segment.payload.iter().take(24).map(|byte| format!("{byte:02x}")).collect();
        story.show(&format!(
            "    {} -> {}  TLS 1.3 application data  {} ...",
            segment.from,
            segment.to,
            hex.join(" ")
        ));
    }
    story.claim(
        "after it, requests between nodes are TLS to port 15008",
        !tunnel.is_empty(),
        "no TLS on the wire",
    );
    let old = "connections that were open before may still be readable until they end";
    story.claim(
        "no new request is readable on the wire",
        readable == 0,
        &format!("{readable} readable segments; {old}"),
    );
    let seen = bed.pod("shop/customer")?.output([
        "curl",
        "-sS",
        &format!("http://{}/", bed.pod("shop/frontend")?.at(8080)),
    ])?;
    let own = bed.pod("shop/customer")?.v4.to_string();
    story.say(&format!(
        "Servers still see their true clients: frontend says its client is {}.",
        shop::client_of(&seen)
    ));
    story.claim(
        "source addresses are preserved",
        shop::client_of(&seen) == own,
        &format!("it is {own}: {seen}"),
    );
    Ok(())
}

fn unharmed(story: &mut Story, what: &str, visits: &Figures) {
    story.say(&format!("{} requests during it, {} failed.", visits.ops, visits.errors));
    let why = &visits.first_error;
    story.claim(
        &format!("{what} failed no request of {}", visits.ops),
        visits.errors == 0 && visits.ops > 0,
        why,
    );
}

fn policy(bed: &mut Testbed, story: &mut Story) -> Result<()> {
    story.chapter("Only frontend may call backend");
    story.show(ONLY_FRONTEND);
    bed.apply("policy", ONLY_FRONTEND)?;
    let url = format!("http://{}/", bed.pod("shop/backend")?.at(8080));
    let ask = |bed: &Testbed, from: &str| -> Result<(bool, String)> {
        let done = bed.pod(from)?.run(["curl", "-sS", "-m", "5", &url])?;
        Ok((done.status.success(), format!("{}{}", done.out.trim(), done.err.trim())))
    };
    wait::until_true("policy in force", SOON, || Ok(!ask(bed, "shop/intruder")?.0))?;
    for (from, allowed) in [("shop/frontend", true), ("shop/intruder", false), ("outside/visitor", false)] {
        let (worked, said) = ask(bed, from)?;
        let word = if worked { "allowed" } else { "denied" };
        story.show(&format!("    {from:<16} curl backend   {word:<8} {said}"));
        let wanted = if allowed { "allowed" } else { "denied" };
        story.claim(&format!("{from} is {wanted}"), worked == allowed, &said);
    }
    story.say("Why? The mesh says who decided:");
    let text = bed.meshctl_any("b", &["why", "shop/intruder", "shop/backend:80"])?;
    story.show(&indent(&text));
    story.claim("meshctl why names the policy", text.contains("only-frontend"), "it does not");
    Ok(())
}

fn upgrade(bed: &mut Testbed, story: &mut Story, options: &MeshOptions) -> Result<()> {
    story.chapter("Both agents are upgraded under load");
    let customers = shop::customers(bed)?;
    let held = shop::held(bed)?;
    for node in ["a", "b"] {
        let start = Instant::now();
        bed.start_agent(node, options)?;
        bed.wait_agent_ready(node)?;
        let old = bed.node(node)?.agents.len() - 2;
        bed.node(node)?.agent(old)?.signal(Signal::TERM)?;
        story.say(&format!(
            "node {node}: the new agent took over after {} ms; the old one drains.",
            start.elapsed().as_millis()
        ));
        run::pause(Duration::from_secs(1))?;
    }
    unharmed(story, "the upgrade", &customers.stop()?);
    let held = held.stop()?;
    let why = &held.first_error;
    story.claim(
        "connections that were open before are still alive",
        held.errors == 0 && held.alive == shop::HELD,
        why,
    );
    Ok(())
}

fn crash(bed: &mut Testbed, story: &mut Story, options: &MeshOptions) -> Result<()> {
    story.chapter("An agent is killed (kill -9) under load");
    let to = bed.pod("shop/stock")?.at(8081);
    shop::warm(bed, "shop/backend", to)?;
    let fast = Load::start(
        bed.pod("shop/backend")?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "4", "--pause-ms", "1"],
    )?;
    wait::until_true("fast-path connections", SOON, || {
        Ok(net::established(&bed.pod("shop/backend")?.netns)?.iter().any(|(_, remote)| *remote == to))
    })?;
    let start = Instant::now();
    bed.kill_agent("b")?;
    let leak = bed.capture("a")?;
    let done = bed.pod("shop/frontend")?.run([
        "curl",
        "-sS",
        "-m",
        "2",
        &format!("http://{}/", bed.pod("shop/backend")?.at(8080)),
    ])?;
    let readable = leak.stop()?.iter().filter(|s| shop::http_line(&s.payload).is_some()).count();
    story.claim(
        "with the agent dead, nothing goes out in the clear",
        readable == 0 && !done.status.success(),
        &done.out,
    );
    bed.start_agent("b", options)?;
    bed.wait_agent_ready("b")?;
    wait::until_true("traffic after the crash", SOON, || {
        let url = format!("http://{}/", bed.pod("shop/backend")?.at(8080));
        Ok(bed.pod("shop/frontend")?.run(["curl", "-sS", "-m", "2", &url])?.status.success())
    })?;
    story.say(&format!("New connections between nodes work again after {} ms.", start.elapsed().as_millis()));
    let fast = fast.stop()?;
    story.say(&format!(
        "On the fast path {} round trips went on meanwhile, {} failed.",
        fast.ops, fast.errors
    ));
    story.claim(
        "fast-path connections did not notice",
        fast.errors == 0 && fast.alive == 4,
        &fast.first_error,
    );
    Ok(())
}

fn figures(bed: &Testbed, story: &mut Story) -> Result<()> {
    story.chapter("What it costs");
    story.show(&format!("    {:<34} {:>14} {:>12} {:>12}", "", "bulk Gbit/s", "64 B p50", "64 B p99"));
    let rows = [
        ("same node, outside the mesh", "outside/visitor", "outside/site"),
        ("same node, fast path", "shop/backend", "shop/stock"),
        ("between nodes, outside the mesh", "outside/visitor", "outside/far"),
        ("between nodes, tunnel", "shop/frontend", "shop/stock"),
    ];
    for (what, from, to) in rows {
        let to = bed.pod(to)?;
        if what.ends_with("fast path") {
            shop::warm(bed, from, to.at(8081))?;
            shop::warm(bed, from, to.at(8082))?;
        }
        let argv = |port: u16, shape: &str| {
            ["--to", &to.at(port).to_string(), "--shape", shape].map(str::to_owned).to_vec()
        };
        let bulk = crate::bed::load::measure(bed.pod(from)?, None, &argv(8082, "bulk"), 1.0)?;
        let pp = crate::bed::load::measure(bed.pod(from)?, None, &argv(8081, "pp"), 1.0)?;
        story.show(&format!(
            "    {what:<34} {:>14.1} {:>9.0} us {:>9.0} us",
            bulk.gbits(),
            pp.p50_us,
            pp.p99_us
        ));
    }
    story.say("(one run on a busy machine; `cargo xtask bench l4` measures properly)");
    Ok(())
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

fn wait_for_enter() -> Result<()> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = std::io::stdin().read_line(&mut line);
        let _ = send.send(());
    });
    while receive.recv_timeout(Duration::from_millis(200)).is_err() {
        run::check()?;
    }
    Ok(())
}
