//! The cluster's network: a bridge that joins the control plane and the nodes, one veth to the machine.

use super::layout::{self, Families, Layout, State};
use crate::bed::netns::{self, Netns};
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;

/// The two ends of the link between the machine and the cluster.
struct Link {
    machine: Ipv4Addr,
    cluster: Ipv4Addr,
}

/// A pair of addresses that no device of the machine has a neighbour of.
fn free_link() -> Result<Link> {
    let taken = netns::command("ip", ["-o", "-4", "address"])?;
    (0..=255u8)
        .find(|n| !taken.contains(&format!(" 172.29.{n}.")))
        .map(|n| Link { machine: Ipv4Addr::new(172, 29, n, 1), cluster: Ipv4Addr::new(172, 29, n, 2) })
        .context(
            "every network of 172.29.0.0/16 is in use on this machine: remove clusters that are not needed",
        )
}

/// Makes the namespaces of the control plane and the nodes; returns the address by which the machine reaches the
/// API server. What it makes stays until [`remove`].
pub(super) fn create(layout: &Layout, state: &State) -> Result<Ipv4Addr> {
    let link = free_link()?;
    let prefix = layout.prefix();
    let control = Netns::create(&prefix)?.leave();
    let mut lines = vec![
        "link add br0 type bridge".to_owned(),
        "link set br0 type bridge mcast_snooping 0 forward_delay 0".to_owned(),
    ];
    lines.extend(state.families.of(
        format!("addr add {}/24 dev br0", layout::API),
        format!("addr add {}/64 dev br0 nodad", layout::BRIDGE6),
    ));
    lines.push("link set br0 up".to_owned());
    netns::batch(&control, &lines)?;
    netns::command(
        "ip",
        ["link", "add", &prefix, "type", "veth", "peer", "name", "machine", "netns", &control],
    )?;
    netns::command("ip", ["address", "add", &format!("{}/30", link.machine), "dev", &prefix])?;
    netns::command("ip", ["link", "set", &prefix, "up"])?;
    netns::batch(
        &control,
        &[format!("addr add {}/30 dev machine", link.cluster), "link set machine up".to_owned()],
    )?;
    for node in &state.nodes {
        add_node(layout, state, node)?;
    }
    Ok(link.cluster)
}

/// Makes a node's namespace, on the bridge, with routes to services and to the pods of the others.
pub(super) fn add_node(layout: &Layout, state: &State, node: &str) -> Result<()> {
    let Some(index) = layout::node_index(node) else { bail!("`{node}` is no node's name") };
    let control = layout.prefix();
    let (address, address6) = (layout::node_address(index), layout::node_address6(index));
    let netns = Netns::create(&layout.node_netns(node))?;
    netns.sysctl(&[
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        // Nobody else has these addresses; a probe for one that has would keep each pod waiting.
        ("ipv6/conf/default/accept_dad", "0"),
    ])?;
    let families = state.families;
    let mut lines = vec![format!("link add eth0 type veth peer name {node} netns {control}")];
    lines.extend(
        families
            .of(format!("addr add {address}/24 dev eth0"), format!("addr add {address6}/64 dev eth0 nodad")),
    );
    lines.push("link set eth0 up".to_owned());
    // No way out: a test cluster talks to nobody. Services need some route, or their first packet has no source.
    lines.extend(
        families.of("route add unreachable default".to_owned(), "route add unreachable ::/0".to_owned()),
    );
    lines.extend(families.of(
        format!("route add {} via {}", layout::SERVICES, layout::API),
        format!("route add {} via {}", layout::SERVICES6, layout::BRIDGE6),
    ));
    for index in
        state.nodes.iter().filter(|other| *other != node).filter_map(|other| layout::node_index(other))
    {
        lines.extend(to_pods(families, "add", index));
    }
    netns.batch(&lines)?;
    netns.leave();
    let mut lines = vec![format!("link set {node} master br0 up")];
    // The API server calls webhooks in pods.
    lines.extend(to_pods(families, "replace", index));
    netns::batch(&control, &lines)
}

/// Routes to the pods of a node, by way of it.
fn to_pods(families: Families, verb: &str, index: u8) -> Vec<String> {
    families.of(
        format!("route {verb} {} via {}", layout::pod_cidr(index), layout::node_address(index)),
        format!("route {verb} {} via {}", layout::pod_cidr6(index), layout::node_address6(index)),
    )
}

/// Removes a node's namespace and its place on the bridge.
pub(super) fn remove_node(layout: &Layout, node: &str) -> Result<()> {
    let name = layout.node_netns(node);
    if !there(&name) {
        return Ok(());
    }
    // The kernel takes a namespace apart some time after its name is gone: until then its end of the link, and with it
    // the bridge's, would be in the way of a node that comes back. Deleted by itself, it is gone at once. It is not
    // there where making the node failed halfway.
    if netns::command("ip", ["-n", &name, "link", "show", "eth0"]).is_ok() {
        netns::command("ip", ["-n", &name, "link", "del", "eth0"])?;
    }
    delete(&name)
}

fn there(name: &str) -> bool {
    std::path::Path::new(netns::DIR).join(name).exists()
}

/// Removes the namespaces of a cluster and the machine's veth, those that are there.
pub(super) fn remove(layout: &Layout) -> Result<()> {
    for index in 1..=layout::MOST_NODES {
        remove_node(layout, &layout::node_name(index))?;
    }
    let veth = layout.prefix();
    if std::path::Path::new("/sys/class/net").join(&veth).exists() {
        netns::command("ip", ["link", "del", &veth])?;
    }
    delete(&layout.prefix())
}

fn delete(name: &str) -> Result<()> {
    if !there(name) {
        return Ok(());
    }
    netns::command("ip", ["netns", "del", name]).map(drop)
}
