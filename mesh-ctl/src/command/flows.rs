//! `flows`, `trace` and `sockets`: what happens to connections, from every node at once, or from the control plane's relay.

mod line;

pub(super) use line::span;

use std::time::Duration;

use futures_util::future::join_all;
use mesh_core::flows::{self, Filter, Flow, Mark, hubble};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::ask::{self, AskError, Role, Server, query_value};
use crate::cli::{FlowsArgs, Format, Global, SocketsArgs, TraceArgs};
use crate::endpoint::{Endpoint, Places};
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

/// How long a node is asked to wait for something new.
const WAIT: Duration = Duration::from_secs(20);
/// A node that does not answer is asked again after this long.
const AGAIN: Duration = Duration::from_secs(1);
/// All events that a node keeps.
const ALL: usize = 10_000;

/// Takes what is printed; says whether anybody still reads.
pub type Print<'a> = &'a mut dyn FnMut(&str) -> bool;

fn path(filter: &Filter, more: &[(&str, String)]) -> String {
    let mut all: Vec<(&str, String)> = filter.parameters();
    all.extend_from_slice(more);
    let query: Vec<String> =
        all.iter().map(|(name, value)| format!("{name}={}", query_value(value))).collect();
    format!("/flows?{}", query.join("&"))
}

/// Who is asked for events: every node, or the relay for all of them.
fn sources(places: &Places) -> Vec<Server<'_>> {
    let timeout = places.timeout;
    if places.relay {
        let proof = Some(&places.proof);
        return vec![Server { endpoint: &places.control, role: Role::Control, timeout, proof }];
    }
    let node = |endpoint| Server { endpoint, role: Role::Node, timeout, proof: None };
    places.nodes.iter().map(node).collect()
}

async fn read(server: Server<'_>, path: &str) -> Result<(Vec<Flow>, Mark), AskError> {
    let reply = server.get(path).await?;
    if reply.status != http::StatusCode::OK {
        // As for any other answer that is none.
        return Err(server
            .parse::<Vec<Flow>>(path, &reply)
            .err()
            .unwrap_or_else(|| unreachable_reply(&server)));
    }
    flows::parse(&reply.body).map_err(|problem| AskError {
        endpoint: server.endpoint.to_string(),
        role: server.role,
        problem,
        fix: "compare the versions with `meshctl version`".to_owned(),
    })
}

fn unreachable_reply(server: &Server<'_>) -> AskError {
    AskError {
        endpoint: server.endpoint.to_string(),
        role: server.role,
        problem: "an answer without a meaning".to_owned(),
        fix: "compare the versions with `meshctl version`".to_owned(),
    }
}

/// Events of all nodes in the order in which they happened, with what each node says of its ring.
struct Seen {
    flows: Vec<Flow>,
    marks: Vec<(Endpoint, Mark)>,
    errors: Vec<AskError>,
}

async fn ask(places: &Places, filter: &Filter, last: usize) -> Seen {
    let path = path(filter, &[("last", last.to_string())]);
    let answers = join_all(sources(places).into_iter().map(|server| {
        let path = &path;
        async move { (server.endpoint.clone(), read(server, path).await) }
    }));
    let mut seen = Seen { flows: Vec::new(), marks: Vec::new(), errors: Vec::new() };
    for (endpoint, answer) in answers.await {
        match answer {
            Ok((flows, mark)) => {
                seen.flows.extend(flows);
                seen.marks.push((endpoint, mark));
            }
            Err(error) => seen.errors.push(error),
        }
    }
    seen.flows.sort_by_key(|flow| flow.at_us);
    let surplus = seen.flows.len().saturating_sub(last);
    seen.flows.drain(..surplus);
    seen
}

/// Events as lines, one JSON document each.
fn documents(flows: &[Flow], format: Format) -> String {
    let mut text = String::new();
    for flow in flows {
        let line = match format {
            Format::Hubble => serde_json::to_string(&hubble::line(flow)),
            _ => serde_json::to_string(flow),
        };
        // These types cannot fail to be written.
        text.push_str(&line.unwrap_or_default());
        text.push('\n');
    }
    text
}

/// Runs `flows` without `--follow`.
pub async fn run(places: &Places, global: &Global, args: &FlowsArgs) -> Report {
    let filter = match args.filter() {
        Ok(filter) => filter,
        Err(problem) => return Report::failed(Exit::Usage, problem),
    };
    let seen = ask(places, &filter, args.last.unwrap_or(20)).await;
    let report = match global.output {
        Format::Json | Format::Hubble => Report::text(documents(&seen.flows, global.output)),
        Format::Table | Format::Yaml => Report::new(global.output, &seen.flows, || {
            if seen.flows.is_empty() {
                return vec![Block::Line(Tone::Plain, "nothing that fits has happened lately".to_owned())];
            }
            vec![Block::Table(table(&seen.flows))]
        }),
    };
    let sum = |of: fn(&Mark) -> u64| -> u64 { seen.marks.iter().map(|(_, mark)| of(mark)).sum() };
    let (lost, held_back) = (sum(|mark| mark.lost), sum(|mark| mark.held_back));
    let report = if lost > 0 { report.error(Exit::Fine, lost_text(lost)) } else { report };
    let report = if held_back > 0 { report.error(Exit::Fine, held_back_text(held_back)) } else { report };
    report.unanswered(Exit::Unreachable, &seen.errors)
}

fn lost_text(lost: u64) -> String {
    format!(
        "{lost} events found no room in the kernel's ring since the agents started: sample with --trace-sample"
    )
}

fn held_back_text(held_back: u64) -> String {
    format!(
        "{held_back} events stayed on their nodes, which the relay asks for so many in a second at most: ask the nodes, or \
         raise --relay-events"
    )
}

fn table(flows: &[Flow]) -> Table {
    let mut table = Table::new(&line::TITLES);
    for flow in flows {
        table.row(line::cells(flow));
    }
    table
}

/// One node, or the relay, that is followed.
struct Followed<'a> {
    server: Server<'a>,
    since: u64,
    /// Told once, until it answers again.
    is_silent: bool,
}

impl Followed<'_> {
    async fn next(&self, filter: &Filter, timeout: Duration) -> Result<(Vec<Flow>, Mark), AskError> {
        let wait = WAIT.as_secs().to_string();
        let path = path(filter, &[("since", self.since.to_string()), ("wait", wait)]);
        read(Server { timeout: timeout + WAIT, ..self.server }, &path).await
    }

    /// Tells of everything that comes, until nobody listens.
    async fn go_on(mut self, filter: &Filter, timeout: Duration, told: mpsc::Sender<Heard>) {
        loop {
            let heard = match self.next(filter, timeout).await {
                Ok((flows, mark)) => {
                    let missed = if self.is_silent { 0 } else { mark.forgotten };
                    (self.since, self.is_silent) = (mark.next, false);
                    Heard::Flows(flows, missed)
                }
                Err(error) => {
                    if std::mem::replace(&mut self.is_silent, true) {
                        tokio::time::sleep(AGAIN).await;
                        continue;
                    }
                    Heard::Silent(error)
                }
            };
            let nothing = matches!(&heard, Heard::Flows(flows, 0) if flows.is_empty());
            if !nothing && told.send(heard).await.is_err() {
                return;
            }
        }
    }
}

/// Runs `flows --follow` until nobody reads any more or no node can be asked.
pub async fn follow(
    places: &Places,
    global: &Global,
    args: &FlowsArgs,
    colour: bool,
    print: Print<'_>,
) -> Report {
    let filter = match args.filter() {
        Ok(filter) => filter,
        Err(problem) => return Report::failed(Exit::Usage, problem),
    };
    let seen = ask(places, &filter, args.last.unwrap_or(0)).await;
    if seen.marks.is_empty() {
        return Report::default().unanswered(Exit::Unreachable, &seen.errors);
    }
    let lines = line::Lines::new(global.output, colour);
    if !print(&(lines.head() + &lines.text(&seen.flows))) {
        return Report::default();
    }
    let (told, mut waiting) = mpsc::channel(64);
    let show = async {
        while let Some(next) = waiting.recv().await {
            let text = match next {
                Heard::Flows(flows, 0) => lines.text(&flows),
                Heard::Flows(flows, missed) => {
                    lines.note(&format!("{missed} events were missed")) + &lines.text(&flows)
                }
                Heard::Silent(error) => lines.note(&error.problem),
            };
            if !print(&text) {
                return;
            }
        }
    };
    tokio::select! {
        () = watch_from(places, &filter, &seen.marks, told) => {}
        () = show => {}
    }
    Report::default()
}

/// What a node that is followed says.
#[derive(Debug)]
pub enum Heard {
    /// New events, and how many were forgotten before they were asked for.
    Flows(Vec<Flow>, u64),
    /// It does not answer: told once, until it does again.
    Silent(AskError),
}

/// Follows every node from now on, until nobody listens any more.
pub async fn watch(places: &Places, filter: &Filter, told: mpsc::Sender<Heard>) {
    let seen = ask(places, filter, 0).await;
    for error in seen.errors {
        if told.send(Heard::Silent(error)).await.is_err() {
            return;
        }
    }
    watch_from(places, filter, &seen.marks, told).await;
}

async fn watch_from(places: &Places, filter: &Filter, marks: &[(Endpoint, Mark)], told: mpsc::Sender<Heard>) {
    let tasks = sources(places).into_iter().map(|server| {
        let mark = marks.iter().find(|(asked, _)| asked == server.endpoint).map(|(_, mark)| mark.next);
        let node = Followed { server, since: mark.unwrap_or(0), is_silent: mark.is_none() };
        node.go_on(filter, places.timeout, told.clone())
    });
    let tasks = join_all(tasks);
    // Only the nodes hold the channel: it closes with the last of them.
    drop(told);
    tasks.await;
}

/// Runs `trace CONNECTION`: everything that any node knows of one connection, in order.
pub async fn trace(places: &Places, global: &Global, args: &TraceArgs) -> Report {
    let filter = Filter { connection: Some(args.connection), ..Filter::default() };
    let seen = ask(places, &filter, ALL).await;
    if seen.flows.is_empty() && seen.errors.is_empty() {
        let problem = format!(
            "no node remembers connection {}: ids are in `meshctl flows -o json`, `meshctl sockets` and the access log",
            args.connection
        );
        return Report::failed(Exit::Usage, problem);
    }
    let report = match global.output {
        Format::Json | Format::Hubble => Report::text(documents(&seen.flows, global.output)),
        Format::Table | Format::Yaml => Report::new(global.output, &seen.flows, || story(&seen.flows)),
    };
    report.unanswered(Exit::Unreachable, &seen.errors)
}

/// One connection for a person: who, then what happened when, counted from its beginning.
fn story(flows: &[Flow]) -> Vec<Block> {
    let Some(first) = flows.first() else { return Vec::new() };
    let mut blocks = vec![Block::Line(Tone::Title, line::headline(flows)), Block::Gap];
    let mut table = Table::new(&["AFTER", "NODE", "SIDE", "EVENT", "PATH", "FOUND"]);
    for flow in flows {
        table.row([
            line::span(flow.at_us.saturating_sub(first.at_us)).into(),
            flow.node.clone().into(),
            line::side(flow.side).into(),
            Cell::new(flow.kind.as_str(), line::tone(flow)),
            flow.path.as_str().into(),
            line::detail(flow).into(),
        ]);
    }
    blocks.push(Block::Table(table));
    blocks
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Sockets<'a> {
    sockets: Vec<&'a Flow>,
}

/// Runs `sockets`: connections that are open now.
pub async fn sockets(places: &Places, global: &Global, args: &SocketsArgs) -> Report {
    let filter = match args.select.filter() {
        Ok(filter) => filter,
        Err(problem) => return Report::failed(Exit::Usage, problem),
    };
    let asked = ask::nodes::<Vec<Flow>>(&places.nodes, "/sockets", places.timeout).await;
    let all: Vec<&Flow> =
        asked.answers.iter().flat_map(|(_, flows)| flows).filter(|flow| filter.wants(flow)).collect();
    let document = Sockets { sockets: all };
    Report::new(global.output, &document, || {
        let mut table = Table::new(&[
            "NODE",
            "SIDE",
            "STATE",
            "PATH",
            "SOURCE",
            "DESTINATION",
            "FOR",
            "PROCESS",
            "CONNECTION",
        ]);
        for flow in &document.sockets {
            let state = if flow.kind == flows::Kind::Connect { "opening" } else { "established" };
            table.row([
                flow.node.clone().into(),
                line::side(flow.side).into(),
                state.into(),
                flow.path.as_str().into(),
                line::source(flow).into(),
                line::destination(flow).into(),
                flow.duration_us.map(line::span).unwrap_or_default().into(),
                line::process(flow).into(),
                flow.connection.map(|id| id.to_string()).unwrap_or_default().into(),
            ]);
        }
        if table.is_empty() {
            return vec![Block::Line(Tone::Plain, "no connection that fits is open".to_owned())];
        }
        vec![Block::Table(table)]
    })
    .unanswered(Exit::Unreachable, &asked.errors)
}
