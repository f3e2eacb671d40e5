//! `why SRC DST[:PORT]`: every node explains from its view, one answer comes out. With `/udp` behind the port the answer
//! is the same for all: that is not the mesh's.

use futures_util::future::join_all;
use http::StatusCode;
use mesh_core::admin::UDP_NOT_COVERED;
use mesh_core::why::{Explanation, NameError, Outcome, Question, Verdict, merge};
use serde::Serialize;

use crate::ask::{AskError, Role, Server, query_value};
use crate::cli::{Global, WhyArgs};
use crate::endpoint::Places;
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

/// What a node answers.
enum View {
    Explanation(Box<Explanation>),
    /// A name means nothing to that node.
    Unknown(NameError),
}

/// Runs the command.
pub async fn run(places: &Places, global: &Global, args: &WhyArgs) -> Report {
    let (dst, udp) = protocol(&args.dst);
    // Mistakes in what was typed are told without asking anybody.
    let question = match Question::new(&args.src, dst, None) {
        Ok(question) => question,
        Err(error) => return Report::failed(Exit::Usage, error.to_string()),
    };
    if udp {
        let datagrams = Datagrams::new(args, question.port);
        return Report::new(global.output, &datagrams, || {
            vec![Block::Line(Tone::Warn, datagrams.summary.clone())]
        });
    }
    let path = path(&question);
    let views = join_all(places.nodes.iter().map(|endpoint| {
        let server = Server { endpoint, role: Role::Node, timeout: places.timeout, proof: None };
        ask(server, &path)
    }));
    let (mut explanations, mut unknown, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for view in views.await {
        match view {
            Ok(View::Explanation(explanation)) => explanations.push(*explanation),
            Ok(View::Unknown(error)) => unknown.push(error),
            Err(error) => errors.push(error),
        }
    }
    let Some(explanation) = merge(explanations) else {
        return match unknown.first() {
            Some(error) => Report::failed(Exit::Usage, name_error(error)),
            None => Report::default().unanswered(Exit::Unreachable, &errors),
        };
    };
    let exit = if explanation.verdict == Verdict::Allowed { Exit::Fine } else { Exit::No };
    // The answer stands; a node that could have known more is worth a line.
    Report::new(global.output, &explanation, || blocks(&explanation))
        .exit(exit)
        .unanswered(Exit::Fine, &errors)
}

/// Takes `/tcp` or `/udp` off a destination with a port; says whether it was `/udp`.
fn protocol(dst: &str) -> (&str, bool) {
    let with_port = |dst: &str| dst.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match dst.rsplit_once('/') {
        Some((rest, "udp")) if with_port(rest) => (rest, true),
        Some((rest, "tcp")) if with_port(rest) => (rest, false),
        _ => (dst, false),
    }
}

/// What becomes of datagrams.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Datagrams {
    source: String,
    destination: String,
    protocol: &'static str,
    /// Whether the mesh takes them.
    captured: bool,
    summary: String,
}

impl Datagrams {
    fn new(args: &WhyArgs, port: Option<u16>) -> Self {
        let captured = port == Some(53);
        let what = if captured {
            "DNS queries of enrolled pods are answered by the node, or forwarded to the server that was asked \
             (dnsCapture)"
        } else {
            UDP_NOT_COVERED
        };
        let summary = format!("{} -> {}: {what}", args.src, args.dst);
        Self { source: args.src.clone(), destination: args.dst.clone(), protocol: "udp", captured, summary }
    }
}

fn path(question: &Question) -> String {
    let port = question.port.map_or_else(String::new, |port| format!("&port={port}"));
    // An IPv6 address is bracketed, so that its last group is not taken for a port.
    let dst = if question.dst.parse::<std::net::Ipv6Addr>().is_ok() {
        format!("[{}]", question.dst)
    } else {
        question.dst.clone()
    };
    format!("/why?src={}&dst={}{port}", query_value(&question.src), query_value(&dst))
}

async fn ask(server: Server<'_>, path: &str) -> Result<View, AskError> {
    let reply = server.get(path).await?;
    if reply.status == StatusCode::NOT_FOUND
        && let Ok(error) = serde_json::from_slice(&reply.body)
    {
        return Ok(View::Unknown(error));
    }
    server.parse(path, &reply).map(|explanation| View::Explanation(Box::new(explanation)))
}

fn name_error(error: &NameError) -> String {
    if error.suggestions.is_empty() {
        return error.to_string();
    }
    format!("{error}\n  did you mean: {}?", error.suggestions.join(", "))
}

fn blocks(explanation: &Explanation) -> Vec<Block> {
    let tone = if explanation.verdict == Verdict::Allowed { Tone::Good } else { Tone::Bad };
    let mut blocks = vec![Block::Line(tone, explanation.summary.clone())];
    if let Some(object) = &explanation.decided_by {
        blocks.push(Block::Line(Tone::Plain, format!("decided by: {object}")));
    }
    if let Some(fix) = &explanation.fix {
        blocks.push(Block::Line(Tone::Plain, format!("fix: {fix}")));
    }
    blocks.push(Block::Gap);
    let mut table = Table::new(&["STAGE", "OUTCOME", "FOUND"]);
    for step in &explanation.steps {
        let tone = match step.outcome {
            Outcome::Ok => Tone::Good,
            Outcome::Warn => Tone::Warn,
            Outcome::Blocked => Tone::Bad,
            Outcome::Elsewhere => Tone::Plain,
        };
        table.row([
            step.stage.as_str().into(),
            Cell::new(step.outcome.as_str(), tone),
            step.detail.clone().into(),
        ]);
        // The fix of the deciding step stands at the top already.
        if let Some(fix) = step.fix.as_ref().filter(|fix| Some(*fix) != explanation.fix.as_ref()) {
            table.more(format!("fix: {fix}"));
        }
    }
    blocks.push(Block::Table(table));
    blocks.push(Block::Gap);
    blocks.push(Block::Line(Tone::Plain, format!("as seen by node {}", explanation.node)));
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_told_from_a_name_with_a_slash() {
        assert_eq!(protocol("shop/b:5353/udp"), ("shop/b:5353", true));
        assert_eq!(protocol("[fd00::1]:80/tcp"), ("[fd00::1]:80", false));
        assert_eq!(protocol("shop/udp"), ("shop/udp", false), "a service of that name");
        assert_eq!(protocol("shop/b:80"), ("shop/b:80", false));
    }

    #[test]
    fn a_question_survives_the_way_into_a_query() {
        let path = |dst| path(&Question::new("shop/a", dst, None).unwrap());
        assert_eq!(path("shop/b:80"), "/why?src=shop%2Fa&dst=shop%2Fb&port=80");
        assert_eq!(path("[fd00::1]:80"), "/why?src=shop%2Fa&dst=%5Bfd00%3A%3A1%5D&port=80");
        assert_eq!(path("fd00::1"), "/why?src=shop%2Fa&dst=%5Bfd00%3A%3A1%5D");
    }
}
