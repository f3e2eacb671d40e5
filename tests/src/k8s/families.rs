//! Clusters whose pods and services have addresses of both families, or of IPv6 alone.

use super::mesh::{self, MODE, STRICT};
use super::plain::{self, asked};
use super::{Bed, Scenario, Space, scenario};
use super::{node, pods, waypoint};
use crate::bed::wait;
use crate::cluster::layout::Families;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "where pods have addresses of both families, each leads through the mesh and is under its policies",
        180,
        both,
    ),
    scenario(
        "on a cluster of IPv6 alone the mesh does all of this: it hides, allows, denies, routes and leaves no trace",
        600,
        six,
    ),
];

type Run = fn(&Bed) -> Result<()>;

/// The same scenarios on a cluster of its own, whose nodes, pods and services have no address but of IPv6.
fn six(bed: &Bed) -> Result<()> {
    let bed = bed.another("six", Families::Ipv6)?;
    let nodes = bed.kubectl.json(&["get", "nodes"])?;
    for node in nodes["items"].as_array().into_iter().flatten() {
        let internal = node["status"]["addresses"].as_array().into_iter().flatten();
        let internal: Vec<&Value> = internal.filter(|address| address["type"] == "InternalIP").collect();
        let six = |address: &&Value| address["address"].as_str().is_some_and(|text| text.contains(':'));
        ensure!(!internal.is_empty() && internal.iter().all(six), "a node has other addresses: {internal:?}");
    }
    let scenarios: [(&str, Run); 6] = [
        ("pods without the mesh", plain::talk),
        ("installation", mesh::install),
        ("a label", mesh::label),
        ("policies and probes", mesh::policy),
        ("a waypoint", waypoint::gateway),
        ("uninstallation", node::uninstall),
    ];
    for (what, run) in scenarios {
        run(&bed).context(what)?;
    }
    Ok(())
}

const SOON: Duration = Duration::from_secs(30);
/// Port of tunnels.
const HBONE: &str = ":15008";

fn addresses(list: &Value) -> Result<Vec<IpAddr>> {
    let texts =
        list.as_array().into_iter().flatten().filter_map(|one| one.as_str().or_else(|| one["ip"].as_str()));
    texts.map(|text| text.parse().with_context(|| format!("no address: {text}"))).collect()
}

fn of_pod(space: &Space<'_>, pod: &str) -> Result<Vec<IpAddr>> {
    let both = addresses(&space.get("pod", pod)?["status"]["podIPs"])?;
    ensure!(both.len() == 2, "{pod} has no addresses of both families: {both:?}");
    Ok(both)
}

fn both(bed: &Bed) -> Result<()> {
    bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    let outside = bed.space(&[])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let service = pods::service("web").replace("spec: {", "spec: {ipFamilyPolicy: RequireDualStack, ");
    space.apply(&[pods::client("client", a), pods::web("web", b), service].concat())?;
    outside.apply(&pods::client("visitor", a))?;
    space.wait_ready(&["client", "web"])?;
    outside.wait_ready(&["visitor"])?;
    space.wait_captured(&["client", "web"], true)?;
    let (own, server) = (of_pod(&space, "client")?, of_pod(&space, "web")?);

    for to in &server {
        let url = format!("http://{}/", SocketAddr::new(*to, 8080));
        // A pod's endpoint reaches the other node a moment after it is ready.
        let (_, client) = wait::until(&format!("answer from {url}"), SOON, || {
            asked(&space.curl("client", &url)?).map(Some)
        })?;
        let same = own.iter().find(|own| own.is_ipv4() == to.is_ipv4());
        ensure!(client.parse().ok().as_ref() == same, "{url} was asked by {client} instead of {same:?}");
    }
    let services = addresses(&space.get("service", "web")?["spec"]["clusterIPs"])?;
    ensure!(services.len() == 2, "the service has {services:?}");
    for to in &services {
        let url = format!("http://{}/", SocketAddr::new(*to, 80));
        let (name, client) = wait::until(&format!("answer from {url}"), SOON, || {
            asked(&space.curl("client", &url)?).map(Some)
        })?;
        let client: IpAddr = client.parse().with_context(|| format!("no address: {client}"))?;
        ensure!(name == "web" && own.contains(&client), "{url} was answered by {name}, which saw {client}");
    }

    // Not one of these went beside the tunnel, and without one there is no answer over either family.
    let open = space.exec("web", &["ss", "-Htn", "state", "established"])?;
    ensure!(open.contains(HBONE), "the server's pod has no tunnel: {open}");
    space.apply(STRICT)?;
    for to in &server {
        let url = format!("http://{}/", SocketAddr::new(*to, 8080));
        wait::until_true(&format!("refusal of plain text at {url}"), SOON, || {
            Ok(outside.curl("visitor", &url).is_err())
        })?;
        space.curl("client", &url)?;
    }
    Ok(())
}
