//! A control plane that cannot be believed: what agents make of it, and what traffic notices.

use super::life::Traffic;
use super::shop::{ENROLLED, ONLY_FRONTEND, SHOP, enrolled, refused, talks};
use super::{Scenario, scenario};
use crate::bed::hbone::{Request, Said, ask};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::{Issued, Leaf, Pki};
use crate::bed::relay::{Mode, Relay, behind};
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
    scenario("a plugged-in CA is replaced by another under load and nothing is lost", 120, replaced_ca),
];

const SOON: Duration = Duration::from_secs(30);

/// The shop with a relay between agents and control plane.
pub(super) fn open() -> Result<(Testbed, Pki, Relay)> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let pki = Pki::create(&bed.dir.join("pki"), "mesh test")?;
    let relay = Relay::start(&bed, &pki, &[])?;
    bed.start_mesh(&behind(&pki))?;
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

/// Waits until a node's certificate for an account came with this many roots and is signed by `ca`'s intermediate.
fn signed_by(bed: &Testbed, node: &str, account: &str, ca: &Pki, roots: usize) -> Result<()> {
    let intermediate = std::fs::read_to_string(ca.dir().join("ca-cert.pem")).context("no CA")?;
    wait::until_true(&format!("certificate of {account} on {node} with {roots} roots"), SOON, || {
        let dump: Value = serde_json::from_str(&bed.admin(node, "/config_dump")?).context("no JSON")?;
        let all = dump["certificates"].as_array().context("no certificates in the dump")?;
        let own = all.iter().find(|c| c["identity"].as_str().is_some_and(|id| id.ends_with(account)));
        let own = own.with_context(|| format!("none for {account}"))?;
        let issuer = own.pointer("/certChain/1/pem").and_then(Value::as_str).unwrap_or_default();
        let body = |pem: &str| pem.lines().filter(|line| !line.contains("---")).collect::<String>();
        let count = own["rootCerts"].as_array().map_or(0, Vec::len);
        Ok(body(issuer.trim()) == body(&intermediate) && count == roots)
    })
}

/// As mesh-control's ARCHITECTURE.md tells owners of a CA: both roots first, then the new key, then only the new root.
fn replaced_ca() -> Result<()> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let old = Pki::create(&bed.dir.join("old"), "mesh test")?;
    let new = Pki::create(&bed.dir.join("new"), "mesh test")?;
    let plugged = bed.dir.join("plugged");
    std::fs::create_dir_all(&plugged).context("cannot make a directory")?;
    let put = |name: &str, parts: &[&Pki]| -> Result<()> {
        let read = |pki: &&Pki| std::fs::read_to_string(pki.dir().join(name));
        let text = parts.iter().map(read).collect::<Result<String, _>>().context("no CA")?;
        std::fs::write(plugged.join(".new"), text).context("cannot write the CA")?;
        std::fs::rename(plugged.join(".new"), plugged.join(name)).context("cannot plug the CA in")
    };
    for name in ["ca-key.pem", "ca-cert.pem", "cert-chain.pem", "root-cert.pem"] {
        put(name, &[&old])?;
    }
    let options = MeshOptions {
        control: vec![format!("--ca-dir={}", plugged.display())],
        ..MeshOptions::agent(&["--secret-ttl", "10s"])
    };
    bed.start_mesh(&options)?;
    enrolled(&bed, ENROLLED)?;
    let (to, to6) = (bed.pod("shop/backend")?.at(8080), bed.pod("shop/backend")?.at6(8080));
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    let holders = [("a", "/sa/frontend"), ("a", "/sa/other"), ("b", "/sa/backend")];
    let friend = Leaf::of("URI:spiffe://cluster.local/ns/shop/sa/frontend");
    let [of_old, of_new] = [old.issue("stranger", friend)?, new.issue("stranger", friend)?];
    // A handshake with backend's agent, by somebody who believes what is plugged in now.
    let visit = |certificate: &Issued| -> Result<Said> {
        let tunnel = bed.pod("shop/backend")?.at(15_008);
        let request = [Request::connect(to.to_string(), "hello")];
        let roots = plugged.join("root-cert.pem");
        ask(bed.pod("outside/visitor")?, tunnel, &roots, Some(certificate), &request)
    };
    // Once every node has such certificates, who is welcome, and who is not.
    let phase = |ca: &Pki, roots: usize, welcome: &[&Issued], refused: &[&Issued]| -> Result<()> {
        holders.iter().try_for_each(|(node, account)| signed_by(&bed, node, account, ca, roots))?;
        for certificate in welcome {
            let said = visit(certificate)?;
            ensure!(said.answers.first().is_some_and(|answer| answer.status == Some(200)), "{said:?}");
        }
        for certificate in refused {
            let said = visit(certificate)?;
            ensure!(said.answers.is_empty() && said.error.contains("unknown ca"), "{said:?}");
        }
        Ok(())
    };
    phase(&old, 1, &[&of_old], &[&of_new])?;
    put("root-cert.pem", &[&old, &new])?;
    phase(&old, 2, &[&of_old, &of_new], &[])?;
    // Each of these opens a tunnel that was not there: a handshake of two agents.
    talks(&bed, "shop/other", &to.to_string())?;
    for name in ["cert-chain.pem", "ca-cert.pem", "ca-key.pem"] {
        put(name, &[&new])?;
    }
    phase(&new, 2, &[&of_old, &of_new], &[])?;
    talks(&bed, "shop/other", &to6.to_string())?;
    put("root-cert.pem", &[&new])?;
    phase(&new, 1, &[&of_new], &[&of_old])?;
    talks(&bed, "shop/frontend", &to6.to_string())?;
    traffic.unharmed("another CA")
}
