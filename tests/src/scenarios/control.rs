//! A control plane that cannot be believed: what agents make of it, and what traffic notices.

use super::life::Traffic;
use super::shop::{ENROLLED, ONLY_FRONTEND, SHOP, enrolled, refused, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::Pki;
use crate::bed::relay::{BEHIND, Mode, Relay};
use crate::bed::{Testbed, Topology, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "a control plane that talks nonsense changes nothing, and its next good word counts",
        120,
        nonsense,
    ),
    scenario("a control plane that another CA vouches for is not believed", 90, other_root),
];

const SOON: Duration = Duration::from_secs(30);

/// The shop with a relay between agents and control plane.
fn open() -> Result<(Testbed, Pki, Relay)> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let pki = Pki::create(&bed.dir.join("pki"), "mesh test")?;
    let relay = Relay::start(&bed, &pki, &[])?;
    let options = MeshOptions {
        control: vec![format!("--ca-dir={}", pki.dir().display())],
        control_port: Some(BEHIND),
        ..MeshOptions::default()
    };
    bed.start_mesh(&options)?;
    enrolled(&bed, ENROLLED)?;
    Ok((bed, pki, relay))
}

/// What an agent says of its control plane.
fn xds(bed: &Testbed, node: &str) -> Result<Value> {
    let status: Value = serde_json::from_str(&bed.admin(node, "/status")?).context("/status is no JSON")?;
    Ok(status["xds"].clone())
}

/// Waits until both agents name a problem with these words.
fn complain(bed: &Testbed, words: &[&str]) -> Result<()> {
    for node in ["a", "b"] {
        let mut last = Value::Null;
        wait::until_true(&format!("problem with {words:?} on {node}"), SOON, || {
            last = xds(bed, node)?;
            let problem = last["problem"].as_str().unwrap_or_default();
            Ok(words.iter().all(|word| problem.contains(word)))
        })
        .with_context(|| format!("it said {last}"))?;
    }
    Ok(())
}

/// Waits until both agents have nothing to complain of.
fn content(bed: &Testbed) -> Result<()> {
    for node in ["a", "b"] {
        wait::until_true(&format!("{node} at peace with its control plane"), SOON, || {
            let xds = xds(bed, node)?;
            Ok(xds["connected"] == true && xds["problem"].is_null())
        })?;
    }
    Ok(())
}

fn nonsense() -> Result<()> {
    let (mut bed, pki, mut relay) = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let (traffic, local) = (Traffic::start(&bed, "shop/frontend")?, Traffic::start(&bed, "shop/local")?);
    for (mode, words) in
        [(Mode::Resource, &["rejected"][..]), (Mode::Bytes, &["decode"][..]), (Mode::Cut, &[][..])]
    {
        relay.order(mode)?;
        // A change that would deny `other`: it arrives as nonsense.
        bed.apply("policy", ONLY_FRONTEND)?;
        wait::until_true("message of the relay to both agents", SOON, || Ok(relay.passed(mode) >= 2))?;
        if !words.is_empty() {
            complain(&bed, words).with_context(|| format!("{mode:?}"))?;
        }
        talks(&bed, "shop/other", &to).with_context(|| format!("{mode:?}"))?;
        talks(&bed, "shop/local", &to).with_context(|| format!("{mode:?}"))?;
        // What is said properly afterwards counts. What an agent refused is told again on its next stream.
        relay.order(Mode::Pass)?;
        if mode == Mode::Resource {
            drop(relay);
            relay = Relay::start(&bed, &pki, &[])?;
        }
        wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))
            .with_context(|| format!("{mode:?}"))?;
        content(&bed)?;
        bed.remove("policy")?;
        wait::until("policy gone", SOON, || talks(&bed, "shop/other", &to).map(Some))?;
    }
    traffic.unharmed("nonsense")?;
    local.unharmed("nonsense, on one node")
}

fn other_root() -> Result<()> {
    let (mut bed, pki, relay) = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    drop(relay);
    let foreign = Pki::create(&bed.dir.join("foreign"), "foreign")?;
    let relay = Relay::start(&bed, &foreign, &[])?;
    bed.apply("policy", ONLY_FRONTEND)?;
    complain(&bed, &["certificate"])?;
    talks(&bed, "shop/other", &to)?;
    talks(&bed, "shop/local", &to)?;
    ensure!(!relay.process.log().contains("a configuration stream"), "it was asked: {}", relay.process.log());
    drop(relay);
    let _relay = Relay::start(&bed, &pki, &[])?;
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    content(&bed)?;
    traffic.unharmed("a foreign control plane")
}
