//! Peers that speak the tunnel's protocol and are not ours: their certificates, their requests. The mesh's CA is one
//! that the test made, so that it can sign what it likes.

use super::hostile::{agents_ports, unhurt};
use super::shop::{ENROLLED, ONLY_FRONTEND, SHOP, enrolled, refused, talks};
use super::{Scenario, scenario};
use crate::bed::hbone::{Request, Said, ask};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::{Issued, Leaf, Pki};
use crate::bed::{Load, Testbed, Topology, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a client certificate of a foreign CA is refused on the tunnel port", 60, foreign_ca),
    scenario("an expired certificate, and one of tomorrow, are refused on the tunnel port", 60, out_of_time),
    scenario("a certificate without a workload identity is refused on the tunnel port", 60, no_identity),
    scenario("a certificate of another trust domain is refused on the tunnel port", 60, trust_domain),
    scenario("a stranger's CONNECT gets the answer that the protocol names for it", 90, answers),
    scenario("a CONNECT to a listener of the agent itself is refused and starts no loop", 90, own_listeners),
    scenario("oversized headers are refused and hurt nobody", 60, oversized),
    scenario("a stranger's CONNECT is judged by policy on the certificate's identity alone", 60, judged),
    scenario("a revoked certificate is refused, and its open tunnels end", 120, revoked),
];

const SOON: Duration = Duration::from_secs(15);
const FRONTEND: &str = "URI:spiffe://cluster.local/ns/shop/sa/frontend";

/// The shop with a CA that the test made.
pub(super) fn open(agent: impl FnOnce(&Pki) -> Result<Vec<String>>) -> Result<(Testbed, Pki)> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let pki = Pki::create(&bed.dir.join("pki"), "mesh test")?;
    let options = MeshOptions {
        agent: agent(&pki)?,
        control: vec![format!("--ca-dir={}", pki.dir().display())],
        ..MeshOptions::default()
    };
    bed.start_mesh(&options)?;
    enrolled(&bed, ENROLLED)?;
    Ok((bed, pki))
}

fn plain() -> Result<(Testbed, Pki)> {
    open(|_| Ok(Vec::new()))
}

/// Requests to backend's tunnel port from a pod that is not in the mesh.
fn visit(bed: &Testbed, pki: &Pki, with: &Issued, requests: &[Request]) -> Result<Said> {
    let to = bed.pod("shop/backend")?.at(15_008);
    ask(bed.pod("outside/visitor")?, to, &pki.root(), Some(with), requests)
}

/// The proof that a refusal is for its reason: the same with a good certificate gets through.
fn welcome(bed: &Testbed, pki: &Pki) -> Result<()> {
    let good = pki.issue("good", Leaf::of(FRONTEND))?;
    let said =
        visit(bed, pki, &good, &[Request::connect(bed.pod("shop/backend")?.at(8080).to_string(), "hello")])?;
    let answer = said.answers.first().with_context(|| format!("no answer: {said:?}"))?;
    ensure!(answer.status == Some(200) && answer.received == "hello", "{said:?}");
    ensure!(said.server == ["spiffe://cluster.local/ns/shop/sa/backend"], "{:?}", said.server);
    Ok(())
}

/// Lines of the log of backend's agent about the visitor, with a code.
fn lines(bed: &Testbed, code: &str) -> Result<usize> {
    let from = format!("src.addr={}:", bed.pod("outside/visitor")?.v4);
    let code = format!("code=\"{code}\"");
    let log = bed.node("b")?.agent(0)?.log();
    Ok(log.lines().filter(|line| line.contains(&from) && line.contains(&code)).count())
}

/// Waits for that many of them.
fn logged(bed: &Testbed, code: &str, times: usize) -> Result<()> {
    wait::until_true(&format!("line {times} of the agent with {code}"), SOON, || {
        Ok(lines(bed, code)? >= times)
    })
}

/// How many connections of the visitor the application itself has seen.
fn reached(bed: &Testbed) -> Result<usize> {
    let peer = format!("\"peer\":\"{}:", bed.pod("outside/visitor")?.v4);
    Ok(bed.pod("shop/backend")?.log().matches(&peer).count())
}

/// A certificate that must be refused in the handshake: with that alert for the peer and that code in the log.
fn unwelcome(bed: &mut Testbed, pki: &Pki, bad: &Issued, alert: &str, code: &str) -> Result<()> {
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let (before, known) = (reached(bed)?, lines(bed, code)?);
    let said = visit(bed, pki, bad, &[Request::connect(to, "hello")])?;
    ensure!(said.answers.is_empty(), "it was answered: {said:?}");
    ensure!(said.error.contains(alert), "no alert {alert:?} but {said:?}");
    logged(bed, code, known + 1)?;
    ensure!(reached(bed)? == before, "the application saw a connection of the refused peer");
    unhurt(bed)
}

fn foreign_ca() -> Result<()> {
    let (mut bed, pki) = plain()?;
    welcome(&bed, &pki)?;
    // Both claim to be a workload of the mesh; one also has a CA with the names of the mesh's.
    for name in ["another", "mesh test"] {
        let foreign = Pki::create(&bed.dir.join(name), name)?;
        let thief = foreign.issue("thief", Leaf::of(FRONTEND))?;
        unwelcome(&mut bed, &pki, &thief, "unknown ca", "M0106").with_context(|| format!("CA {name:?}"))?;
    }
    Ok(())
}

fn out_of_time() -> Result<()> {
    let (mut bed, pki) = plain()?;
    welcome(&bed, &pki)?;
    let past = Leaf { san: FRONTEND, validity: Some(("20240101000000Z", "20240102000000Z")) };
    unwelcome(&mut bed, &pki, &pki.issue("past", past)?, "expired", "M0104")?;
    let future = Leaf { san: FRONTEND, validity: Some(("20480101000000Z", "20480102000000Z")) };
    unwelcome(&mut bed, &pki, &pki.issue("future", future)?, "certificate", "M0105")
}

fn no_identity() -> Result<()> {
    let (mut bed, pki) = plain()?;
    welcome(&bed, &pki)?;
    let server = pki.issue("server", Leaf::of("DNS:frontend.shop.svc.cluster.local"))?;
    unwelcome(&mut bed, &pki, &server, "certificate", "M0103")?;
    // A SPIFFE id, and none of a workload.
    let other = pki.issue("other", Leaf::of("URI:spiffe://cluster.local/frontend"))?;
    unwelcome(&mut bed, &pki, &other, "certificate", "M0103")
}

fn trust_domain() -> Result<()> {
    let (mut bed, pki) = plain()?;
    welcome(&bed, &pki)?;
    let other = pki.issue("other", Leaf::of("URI:spiffe://other.example/ns/shop/sa/frontend"))?;
    unwelcome(&mut bed, &pki, &other, "certificate", "M0102")
}

fn answers() -> Result<()> {
    let (mut bed, pki) = plain()?;
    let good = pki.issue("good", Leaf::of(FRONTEND))?;
    let backend = bed.pod("shop/backend")?;
    let (echo, site) = (backend.at(8080).to_string(), bed.pod("outside/site")?.at(8080).to_string());
    let closed = backend.at(9).to_string();
    let connect = |to: &str| Request::connect(to, "hello");
    let own = |port| connect(&backend.at(port).to_string());
    // (request, status, code in the log); the answers of the HBONE reference, sections 2.7 and 7.1.
    let cases = [
        (connect(&echo), 200, None),
        (connect("backend.shop.svc.cluster.local:80"), 200, None),
        (connect(&site), 400, Some("M0306")),
        (connect("[fd30::dead]:8080"), 400, Some("M0306")),
        (connect(&closed), 503, Some("M0301")),
        (own(15_001), 503, Some("M0307")),
        (own(15_006), 503, Some("M0307")),
        (own(15_008), 503, Some("M0307")),
        (connect("nobody.shop.svc.cluster.local:80"), 503, Some("M0308")),
        (connect("backend.shop.svc.cluster.local:9"), 503, Some("M0308")),
        (connect("no-port"), 400, Some("M0206")),
        (Request::get(&echo), 400, Some("M0205")),
    ];
    let requests: Vec<Request> = cases.iter().map(|(request, ..)| request.clone()).collect();
    let before = reached(&bed)?;
    let said = visit(&bed, &pki, &good, &requests)?;
    // All on one connection: none of the refusals ended it.
    ensure!(said.error.is_empty() && said.answers.len() == cases.len(), "{said:?}");
    for ((request, status, code), answer) in cases.iter().zip(&said.answers) {
        ensure!(answer.status == Some(*status), "{request:?} was answered with {answer:?}");
        let echo = if *status == 200 { "hello" } else { "" };
        ensure!(answer.received == echo, "{request:?} got {answer:?}");
        if let Some(code) = code {
            let times = cases.iter().filter(|case| case.2 == Some(code)).count();
            logged(&bed, code, times).with_context(|| format!("{request:?}"))?;
        }
    }
    ensure!(reached(&bed)? == before + 2, "the application saw {} connections", reached(&bed)? - before);
    unhurt(&mut bed)
}

fn own_listeners() -> Result<()> {
    let (mut bed, pki) = plain()?;
    welcome(&bed, &pki)?;
    let good = pki.issue("again", Leaf::of(FRONTEND))?;
    let backend = bed.pod("shop/backend")?;
    let own = agents_ports(backend)?;
    let pid = bed.node("b")?.agent(0)?.pid();
    let descriptors = || -> Result<usize> { Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count()) };
    let before = descriptors()?;
    for port in own {
        let requests: Vec<Request> =
            (0..5).map(|_| Request::connect(backend.at(port).to_string(), "hello")).collect();
        let said = visit(&bed, &pki, &good, &requests)?;
        ensure!(said.answers.len() == 5, "port {port}: {said:?}");
        ensure!(said.answers.iter().all(|a| a.received.is_empty()), "port {port} answered: {said:?}");
    }
    let after = descriptors()?;
    ensure!(after < before + 20, "the agent on b has {after} descriptors, {before} before");
    unhurt(&mut bed)
}

fn oversized() -> Result<()> {
    let (mut bed, pki) = plain()?;
    let good = pki.issue("good", Leaf::of(FRONTEND))?;
    let echo = bed.pod("shop/backend")?.at(8080).to_string();
    let before = reached(&bed)?;
    for bytes in [70_000, 4_000_000] {
        let big = Request::connect(&echo, "hello").padded(bytes);
        let said = visit(&bed, &pki, &good, &[big])?;
        let accepted = said.answers.iter().any(|answer| answer.status == Some(200));
        ensure!(!accepted, "headers of {bytes} bytes were accepted: {said:?}");
        // Refused on its stream, or with its connection; not by silence.
        let refused = !said.error.contains("timed out")
            && (!said.error.is_empty()
                || said.goaway.is_some()
                || said.answers.iter().any(|a| a.reset.is_some() || a.status.is_some()));
        ensure!(refused, "{bytes} bytes: {said:?}");
    }
    ensure!(reached(&bed)? == before, "the application saw a refused request");
    welcome(&bed, &pki)?;
    unhurt(&mut bed)
}

fn judged() -> Result<()> {
    let (mut bed, pki) = plain()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    // What a peer says of itself in headers counts for nothing.
    let lie = |request: Request| {
        request
            .with("baggage", "k8s.namespace.name=shop,k8s.pod.name=frontend")
            .with("forwarded", format!("for=\"{}:1\"", "10.30.1.1"))
            .with("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/frontend")
    };
    let other = pki.issue("other", Leaf::of("URI:spiffe://cluster.local/ns/shop/sa/other"))?;
    let before = reached(&bed)?;
    let said = visit(&bed, &pki, &other, &[lie(Request::connect(&to, "hello"))])?;
    ensure!(said.answers.first().is_some_and(|a| a.status == Some(401)), "{said:?}");
    ensure!(reached(&bed)? == before, "the application saw a denied connection");
    logged(&bed, "M0401", 1)?;
    let good = pki.issue("good", Leaf::of(FRONTEND))?;
    let said = visit(&bed, &pki, &good, &[Request::connect(&to, "hello")])?;
    ensure!(said.answers.first().is_some_and(|a| a.status == Some(200)), "{said:?}");
    unhurt(&mut bed)
}

/// The certificate (PEM) that a node holds for a service account.
fn certificate(bed: &Testbed, node: &str, account: &str) -> Result<String> {
    let dump: Value = serde_json::from_str(&bed.admin(node, "/config_dump")?).context("no JSON")?;
    let all = dump["certificates"].as_array().context("no certificates in the dump")?;
    let own = all.iter().find(|c| c["identity"].as_str().is_some_and(|id| id.ends_with(account)));
    let pem = own.and_then(|c| c.pointer("/certChain/0/pem")?.as_str());
    pem.map(str::to_owned).with_context(|| format!("{node} has no certificate for {account}"))
}

fn publish(pki: &Pki, to: &Path) -> Result<()> {
    std::fs::write(to.with_extension("new"), pki.revocations()?).context("cannot write the list")?;
    std::fs::rename(to.with_extension("new"), to).context("cannot put the list into place")
}

fn revoked() -> Result<()> {
    let (bed, pki) = open(|pki| {
        let list = pki.dir().join("list.pem");
        publish(pki, &list)?;
        Ok(vec![format!("--crl={}", list.display())])
    })?;
    let list = pki.dir().join("list.pem");
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let stolen = pki.issue("stolen", Leaf::of(FRONTEND))?;
    let said = visit(&bed, &pki, &stolen, &[Request::connect(&to, "hello")])?;
    ensure!(said.answers.first().is_some_and(|a| a.status == Some(200)), "{said:?}");
    let load =
        |from: &str| Load::start(bed.pod(from)?, &to, &["--shape", "pp", "--conns", "3", "--pause-ms", "5"]);
    let (mut cut, mut kept) = (load("shop/frontend")?, load("shop/other")?);
    for (from, load) in [("shop/frontend", &mut cut), ("shop/other", &mut kept)] {
        ensure!(load.running()?, "the load of {from} did not start");
        talks(&bed, from, &to)?;
    }
    // The client's: of the thief, and of the workload itself.
    let leaf = std::fs::read_to_string(&stolen.chain).context("no certificate")?;
    pki.revoke(&leaf)?;
    pki.revoke(&certificate(&bed, "a", "/sa/frontend")?)?;
    publish(&pki, &list)?;
    wait::until_true("end of the revoked peer's connections", SOON, || Ok(!cut.running()?))?;
    let figures = cut.figures()?;
    ensure!(figures.ops > 0 && figures.errors == 3, "{figures:?}");
    refused(&bed, "shop/frontend", &to)?;
    unwelcome_revoked(&bed, &pki, &stolen, &to)?;
    talks(&bed, "shop/other", &to)?;
    ensure!(kept.running()?, "the connections of another peer ended");
    // The server's: now the client is the one that refuses.
    pki.revoke(&certificate(&bed, "b", "/sa/backend")?)?;
    publish(&pki, &list)?;
    wait::until_true("end of connections to the revoked server", SOON, || Ok(!kept.running()?))?;
    refused(&bed, "shop/other", &to)
}

fn unwelcome_revoked(bed: &Testbed, pki: &Pki, stolen: &Issued, to: &str) -> Result<()> {
    let said = visit(bed, pki, stolen, &[Request::connect(to, "hello")])?;
    ensure!(said.answers.is_empty() && said.error.contains("revoked"), "{said:?}");
    logged(bed, "M0107", 1)
}
