//! Keys of token issuers that a waypoint fetches, and workloads that take nothing that has not come through it.

use super::programs::need;
use super::shop::enrolled;
use super::waypoint::{SOON, curl, open, server, url};
use super::{Scenario, scenario};
use crate::bed::process::Proc;
use crate::bed::tokens::Tokens;
use crate::bed::{Testbed, wait};
use anyhow::{Context, Result, ensure};
use std::path::Path;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "keys of an issuer are fetched from its server, change with it, and stay while it is away",
        120,
        keys,
    ),
    scenario("a service that requires its waypoint refuses what has not come through it", 90, require),
];

/// Serves the directory of `keys`, and says what it was asked for.
fn issuer(bed: &Testbed, dir: &Path) -> Result<Proc> {
    let argv = ["python3", "-u", "-m", "http.server", "8088", "--directory", &dir.to_string_lossy()];
    bed.pod("outside/site")?.spawn(argv)
}

fn status(bed: &Testbed, token: &str) -> Result<String> {
    let bearer = format!("authorization: Bearer {token}");
    let args = ["-o", "/dev/null", "-w", "%{http_code}", "-H", &bearer, &url("/")];
    curl(bed, "shop/frontend", &args)
}

fn keys() -> Result<()> {
    need("openssl")?;
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    let (old_dir, new_dir, served) = (bed.dir.join("old"), bed.dir.join("new"), bed.dir.join("served"));
    for dir in [&old_dir, &new_dir, &served] {
        std::fs::create_dir_all(dir).context("cannot make a directory")?;
    }
    let old = Tokens::of_key(&old_dir, "old")?;
    let new = Tokens::of_key(&new_dir, "new")?;
    let file = served.join("keys.json");
    std::fs::write(&file, &old.keys).context("cannot write keys")?;
    let mut server = issuer(&bed, &served)?;
    let site = bed.pod("outside/site")?.v4;
    let rule = format!(
        "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: issuer, namespace: shop}}
spec:
  targetRefs: [{{group: '', kind: Service, name: web}}]
  jwtRules: [{{issuer: 'https://issuer.example', jwksUri: 'http://{site}:8088/keys.json'}}]
"
    );
    bed.apply("rule", &rule)?;
    wait::until_true("refusal of a token of another key", SOON, || Ok(status(&bed, &old.foreign)? == "401"))?;
    wait::until_true("keys of the issuer", SOON, || Ok(status(&bed, &old.good)? == "200"))?;
    let asked = |server: &Proc| server.log().matches("GET /keys.json").count();
    ensure!(asked(&server) >= 1, "nobody asked the issuer: {}", server.log());
    ensure!(status(&bed, &old.expired)? == "401", "a token that has expired holds");
    ensure!(status(&bed, &new.good)? == "401", "a token of a key that nobody serves holds");
    // The issuer has another key now: the first token of it has the keys fetched again.
    std::fs::write(served.join("next"), &new.keys).context("cannot write keys")?;
    std::fs::rename(served.join("next"), &file).context("cannot replace keys")?;
    let before = asked(&server);
    wait::until_true("keys of the issuer after it changed them", SOON * 2, || {
        Ok(status(&bed, &new.good)? == "200")
    })?;
    ensure!(asked(&server) > before, "{}", server.log());
    ensure!(status(&bed, &old.good)? == "401", "a token of the key that is gone holds");
    // It goes away: what is known holds, and a key that is not known is refused without a long wait.
    server.kill();
    for _ in 0..5 {
        ensure!(status(&bed, &new.good)? == "200", "the keys went with their server");
        ensure!(status(&bed, &old.good)? == "401", "a token of the key that is gone holds");
    }
    Ok(())
}

fn require() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    enrolled(&bed, &["shop/v1"])?;
    let direct = format!("http://{}/", bed.pod("shop/v1")?.at(8080));
    // From its own node, from another one, and from outside the mesh.
    let clients = ["shop/frontend", "shop/local", "outside/visitor"];
    for client in clients {
        ensure!(curl(&bed, client, &[&direct])?.starts_with("v1 "), "{client} does not reach the pod");
    }
    let annotate = |bed: &mut Testbed, value: &str| {
        bed.edit("Service", "web", |service| {
            service["metadata"]["annotations"]["undermesh.io/require-waypoint"] = value.into();
        })
    };
    annotate(&mut bed, "true")?;
    for client in clients {
        wait::until_true(&format!("refusal of {client}"), SOON, || {
            Ok(curl(&bed, client, &[&direct]).is_err())
        })?;
    }
    let waypoint = bed.pod("shop/wp")?.v4;
    for client in ["shop/frontend", "shop/local"] {
        let said = curl(&bed, client, &[&url("/")])?;
        ensure!(said == format!("v1 {waypoint}\n"), "{client} got {said:?} through the waypoint");
    }
    let why =
        bed.meshctl_any("b", &["why", "shop/local", direct["http://".len()..].trim_end_matches('/')])?;
    ensure!(why.contains("undermesh_require_waypoint_wp.shop"), "{why}");
    annotate(&mut bed, "false")?;
    wait::until_true("pod that is open again", SOON, || Ok(curl(&bed, "shop/frontend", &[&direct]).is_ok()))
}
