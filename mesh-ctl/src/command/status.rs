//! `status`: nodes, agents, enrolled pods, the workload feed, certificates and the control plane at a glance.

use std::time::SystemTime;

use mesh_core::admin::{NodeStatus, Phase, Pod, PodState, Upstream};
use serde::Serialize;

use super::control::{self, Control};
use super::{join, since, span};
use crate::ask::{self, AskError};
use crate::cli::{Global, StatusArgs};
use crate::endpoint::{Endpoint, Places};
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    healthy: bool,
    control: Option<&'a Control>,
    nodes: Vec<Node<'a>>,
    unreachable: Vec<&'a AskError>,
}

#[derive(Serialize)]
struct Node<'a> {
    endpoint: String,
    #[serde(flatten)]
    status: &'a NodeStatus,
}

/// Runs the command.
pub async fn run(places: &Places, global: &Global, args: &StatusArgs) -> Report {
    let (nodes, control) = futures_util::join!(
        ask::nodes::<NodeStatus>(&places.nodes, "/status", places.timeout),
        control::fetch(places),
    );
    // Without a name there may well be no control plane on this machine: that is no error, and is said.
    let (control, mut unreachable, absent) = match control {
        Ok(control) => (Some(control), vec![], None),
        Err(error) if places.control_was_named => (None, vec![error], None),
        Err(error) => (None, vec![], Some(error)),
    };
    unreachable.extend(nodes.errors);
    let problems = problems(&nodes.answers, control.as_ref());
    let healthy = problems.is_empty() && unreachable.is_empty();
    let document = Document {
        healthy,
        control: control.as_ref(),
        nodes: nodes.answers.iter().map(|(e, status)| Node { endpoint: e.to_string(), status }).collect(),
        unreachable: unreachable.iter().chain(&absent).collect(),
    };
    Report::new(global.output, &document, || {
        let mut blocks = control_blocks(control.as_ref(), absent.as_ref());
        if !nodes.answers.is_empty() {
            if !blocks.is_empty() {
                blocks.push(Block::Gap);
            }
            blocks.push(node_table(&nodes.answers));
        }
        blocks.extend(agent_table(&nodes.answers));
        blocks.extend(pod_table(&nodes.answers, args.pods));
        blocks.extend(list("PROBLEMS", &problems));
        blocks.extend(list("NOTES", &notes(&nodes.answers, control.as_ref())));
        blocks
    })
    .exit(if problems.is_empty() { Exit::Fine } else { Exit::No })
    .unanswered(Exit::Unreachable, &unreachable)
}

fn list(title: &str, lines: &[String]) -> Vec<Block> {
    if lines.is_empty() {
        return Vec::new();
    }
    let head = [Block::Gap, Block::Line(Tone::Title, title.to_owned())];
    head.into_iter().chain(lines.iter().map(|line| Block::Line(Tone::Plain, line.clone()))).collect()
}

/// What is worth to know without being a problem; what several nodes say, once.
fn notes(nodes: &[(Endpoint, NodeStatus)], control: Option<&Control>) -> Vec<String> {
    let mut notes: Vec<String> = Vec::new();
    for note in nodes.iter().flat_map(|(_, node)| &node.capture.not_covered) {
        if !notes.contains(note) {
            notes.push(note.clone());
        }
    }
    notes.extend(control.map(Control::notes).unwrap_or_default());
    notes
}

/// Everything that is not as it should be, one line each.
fn problems(nodes: &[(Endpoint, NodeStatus)], control: Option<&Control>) -> Vec<String> {
    let mut problems = Vec::new();
    for (endpoint, node) in nodes {
        let name = name_of(endpoint, node);
        problems.extend(node.pending.iter().map(|pending| format!("{name}: not ready: {pending}")));
        problems.extend(node.capture.problems.iter().map(|problem| format!("{name}: settings: {problem}")));
        for (what, upstream) in [("workload feed", &node.xds), ("certificate authority", &node.ca)] {
            // Nobody asks an authority for certificates while the node has no pods of the mesh.
            let unused = what == "certificate authority" && upstream.since_ms == 0;
            if let Some(problem) = &upstream.problem {
                problems.push(format!("{name}: {what} {}: {problem}", upstream.address));
            } else if !upstream.connected && !unused {
                problems.push(format!("{name}: {what} {}: not connected", upstream.address));
            }
        }
        let failed = node.pods.iter().filter(|pod| pod.state == PodState::Failed);
        problems.extend(failed.map(|pod| {
            let why = pod.problem.as_deref().unwrap_or("no reason given");
            format!("{name}: pod {}/{} is not captured: {why}", pod.namespace, pod.name)
        }));
        let lost = node.certificates.get("Unavailable").copied().unwrap_or(0);
        if lost > 0 {
            problems
                .push(format!("{name}: {lost} identities have no usable certificate, see `meshctl certs`"));
        }
    }
    if let Some(control) = control {
        if !control.ready {
            problems.push(format!("control plane: not ready: {}", control.not_ready));
        }
        problems.extend(control.problems().into_iter().map(|problem| format!("control plane: {problem}")));
    }
    problems
}

fn name_of(endpoint: &Endpoint, node: &NodeStatus) -> String {
    if node.node.is_empty() { endpoint.to_string() } else { node.node.clone() }
}

/// Usable certificates and all identities.
fn certificates(node: &NodeStatus) -> (usize, usize) {
    (node.certificates.get("Available").copied().unwrap_or(0), node.certificates.values().sum())
}

fn yes_no(yes: bool) -> Cell {
    if yes { Cell::new("yes", Tone::Good) } else { Cell::new("no", Tone::Bad) }
}

fn control_blocks(control: Option<&Control>, absent: Option<&AskError>) -> Vec<Block> {
    let Some(control) = control else {
        let default =
            |e: &AskError| format!("control plane: none at {}; name one with --control", e.endpoint);
        return absent.map(|error| Block::Line(Tone::Warn, default(error))).into_iter().collect();
    };
    let mut table =
        Table::new(&["CONTROL PLANE", "VERSION", "READY", "NODES", "IN SYNC", "ROOT EXPIRES", "PROBLEMS"]);
    let synced = control.clients.iter().filter(|client| client.is_synced()).count();
    let connected = control.nodes.iter().filter(|node| node.connected).count();
    let root = control.root_left(SystemTime::now()).map(|left| format!("in {}", span(left)));
    let problems = control.problems().len();
    table.row([
        control.endpoint.clone().into(),
        control.version.clone().into(),
        yes_no(control.ready),
        share(connected, control.nodes.len()),
        share(synced, control.clients.len()),
        root.unwrap_or_default().into(),
        Cell::new(problems.to_string(), if problems == 0 { Tone::Plain } else { Tone::Warn }),
    ]);
    vec![Block::Table(table)]
}

fn node_table(nodes: &[(Endpoint, NodeStatus)]) -> Block {
    let mut table = Table::new(&[
        "NODE",
        "VERSION",
        "READY",
        "UP",
        "PODS",
        "FEED",
        "RESOURCES",
        "CA",
        "CERTIFICATES",
        "FAIL",
        "SAME NODE",
    ]);
    for (endpoint, node) in nodes {
        let captured = node.pods.iter().filter(|pod| pod.state == PodState::Captured).count();
        let goes = |pod: &&Pod| matches!(pod.state, PodState::Releasing | PodState::Left);
        let wanted = node.pods.iter().filter(|pod| !goes(pod)).count();
        let (usable, all) = certificates(node);
        let resources: usize = node.xds.resources.values().sum();
        table.row([
            name_of(endpoint, node).into(),
            node.version.clone().into(),
            yes_no(node.is_ready()),
            since(node.started_ms).into(),
            share(captured, wanted),
            upstream(&node.xds, "never reached"),
            resources.to_string().into(),
            upstream(&node.ca, "not asked yet"),
            share(usable, all),
            node.fail.clone().into(),
            node.same_node.clone().into(),
        ]);
    }
    Block::Table(table)
}

fn share(part: usize, all: usize) -> Cell {
    Cell::new(format!("{part}/{all}"), if part < all { Tone::Warn } else { Tone::Plain })
}

/// `never` is for one that was never heard of.
fn upstream(upstream: &Upstream, never: &str) -> Cell {
    match (upstream.connected, upstream.since_ms) {
        (true, _) => Cell::new("connected", Tone::Good),
        (false, 0) => Cell::new(never, Tone::Warn),
        (false, ms) => Cell::new(format!("lost {} ago", since(ms)), Tone::Bad),
    }
}

/// Only when a node has more than the one agent that answered, or that one is not serving.
fn agent_table(nodes: &[(Endpoint, NodeStatus)]) -> Vec<Block> {
    let mut table = Table::new(&["NODE", "AGENT", "VERSION", "PHASE", "FOR", "UP", "CONNECTIONS"]);
    for (endpoint, node) in nodes {
        let usual = node.agents.iter().all(|agent| agent.phase == Phase::Serving) && node.agents.len() == 1;
        for agent in node.agents.iter().filter(|_| !usual) {
            let phase = if agent.phase == Phase::Serving { Tone::Good } else { Tone::Warn };
            table.row([
                name_of(endpoint, node).into(),
                agent.pid.to_string().into(),
                agent.version.clone().into(),
                Cell::new(agent.phase.as_str(), phase),
                since(agent.since_ms).into(),
                since(agent.started_ms).into(),
                agent.connections.to_string().into(),
            ]);
        }
    }
    if table.is_empty() { vec![] } else { vec![Block::Gap, Block::Table(table)] }
}

/// Pods that are not captured, or all of them.
fn pod_table(nodes: &[(Endpoint, NodeStatus)], all: bool) -> Vec<Block> {
    let mut table = Table::new(&["NODE", "NAMESPACE", "POD", "STATE", "ADDRESSES", "PROBLEM"]);
    for (endpoint, node) in nodes {
        let shown = |pod: &&Pod| all || pod.state != PodState::Captured;
        for pod in node.pods.iter().filter(shown) {
            let tone = match pod.state {
                PodState::Captured => Tone::Good,
                PodState::Pending | PodState::Releasing | PodState::Left => Tone::Warn,
                PodState::Failed => Tone::Bad,
            };
            table.row([
                name_of(endpoint, node).into(),
                pod.namespace.clone().into(),
                pod.name.clone().into(),
                Cell::new(pod.state.as_str(), tone),
                // Link-local addresses stand for nothing outside of the pod.
                join(pod.addresses.iter().filter(|address| !address.starts_with("fe80:"))).into(),
                pod.problem.clone().unwrap_or_default().into(),
            ]);
        }
    }
    if table.is_empty() { vec![] } else { vec![Block::Gap, Block::Table(table)] }
}
