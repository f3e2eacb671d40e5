//! What the relay answers, on the debug port and on its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use http::request::Parts;
use mesh_core::admin::http::{NODE_HEADER, Reply, parameter, reply, text};
use mesh_core::flows::{self, Filter, Flow, Mark};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};

use super::facts::Facts;
use super::gate::{Gate, Origin, Refusal, Sight};
use super::graph::Shown;
use super::questions::{Agents, Answer, NoAnswer};
use super::ring::{Lines, Relay};
use crate::ads::seconds;

include!(concat!(env!("OUT_DIR"), "/map.rs"));

/// Events that are shown without a number.
const LAST: usize = 100;
/// Events that one answer holds at most.
const MOST_IN_ANSWER: usize = 10_000;
/// Events that are looked through at once.
const CHUNK: usize = 2_000;
/// A wait is shorter than what a connection may take.
const LONGEST_WAIT: u64 = 50;
/// Events that come this close after the first go with it.
const TOGETHER: Duration = Duration::from_millis(50);

/// What is answered, and to whom.
#[derive(Debug, Clone)]
pub struct Web {
    /// The events.
    pub relay: Arc<Relay>,
    /// The agents that answer for their nodes.
    pub agents: Arc<Agents>,
    /// What is said beside events; none where only events are relayed.
    pub facts: Option<Facts>,
    /// Who may see them.
    pub gate: Gate,
    /// Readers that wait, so that they leave room for everybody else who asks the same port.
    pub waiting: Arc<Semaphore>,
}

/// Readers that wait at once.
pub const WAITING: usize = 32;

/// What the paths are for, as the index says.
pub const INDEX: &str = "\
/map                the mesh as a page
/flows/graph?seconds=60&until=   who talks to whom, with figures; until is in seconds since 1970
/flows?last=        what happened to connections and packets on all nodes, as JSON lines; goes on with ?since=&wait=
/flows/service?of=NAMESPACE/NAME   a service or workload: pods, certificates, policies, routes
/flows/config       objects, what is wrong with them, and how many proxies have them
/flows/strict       which namespaces could be STRICT, by the plain text of the last hour
/nodes              nodes whose agents are connected
/nodes/NODE/PATH    what a node's agent answers at PATH: /status, /why?src=&dst=&port=, /sockets, /certs, ...; /help lists them
/flows/nodes        which nodes tell, and how much they could not
";

/// Whether the relay answers at a path.
#[must_use]
pub fn is_path(path: &str) -> bool {
    ["/flows", "/map", "/nodes"]
        .into_iter()
        .any(|of| path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

fn refuse(refusal: &Refusal) -> Reply {
    text(refusal.status(), format!("{refusal}\n"))
}

/// A number of a query.
fn number(query: &str, name: &str) -> Result<Option<u64>, Box<Reply>> {
    match parameter(query, name).map(|value| value.parse()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => {
            let value = parameter(query, name).unwrap_or_default();
            let problem = format!("{name}={value}: give a number of events or seconds\n");
            Err(Box::new(text(StatusCode::BAD_REQUEST, problem)))
        }
    }
}

impl Web {
    /// The answer to a GET.
    pub async fn answer(&self, request: &Parts, origin: Origin) -> Reply {
        if request.uri.path().starts_with("/map") {
            return page(request.uri.path());
        }
        let sight = match self.gate.admit(origin, &request.headers).await {
            Ok(sight) => sight,
            Err(refusal) => return refuse(&refusal),
        };
        let query = request.uri.query().unwrap_or_default();
        if let Some(rest) = request.uri.path().strip_prefix("/nodes") {
            return self.nodes(rest, query, &sight).await;
        }
        match request.uri.path() {
            "/flows" => self.flows(query, &sight).await,
            "/flows/graph" => self.graph(query, &sight).await,
            "/flows/nodes" => mesh_core::admin::http::json(&self.relay.nodes()),
            path => match &self.facts {
                Some(facts) => self.told(facts, path, query, &sight).await,
                None => text(StatusCode::NOT_FOUND, format!("{path} is unknown; there are\n{INDEX}")),
            },
        }
    }

    /// Which agents there are, or what one of them answers. What it answers itself has [`NODE_HEADER`].
    async fn nodes(&self, path: &str, query: &str, sight: &Sight) -> Reply {
        if let Err(refusal) = sight.everything() {
            return refuse(&refusal);
        }
        let path = path.trim_start_matches('/');
        if path.is_empty() {
            return mesh_core::admin::http::json(&self.agents.nodes());
        }
        let (node, path) = path.split_once('/').unwrap_or((path, "help"));
        let target = if query.is_empty() { format!("/{path}") } else { format!("/{path}?{query}") };
        match self.agents.ask(node, &target).await {
            Ok(answer) => passed_on(node, answer),
            Err(error) => {
                let status = match error {
                    NoAnswer::Unknown { .. } => StatusCode::NOT_FOUND,
                    NoAnswer::Gone(_) => StatusCode::BAD_GATEWAY,
                    NoAnswer::Late(_) => StatusCode::GATEWAY_TIMEOUT,
                };
                text(status, format!("{error}\n"))
            }
        }
    }

    /// What there is beside events.
    async fn told(&self, facts: &Facts, path: &str, query: &str, sight: &Sight) -> Reply {
        let answer = match path {
            "/flows/service" => self.service(facts, query, sight).await,
            "/flows/config" => self.config(facts, sight).await,
            "/flows/strict" => self.strict(facts, sight).await,
            path => Ok(text(StatusCode::NOT_FOUND, format!("{path} is unknown; there are\n{INDEX}"))),
        };
        answer.unwrap_or_else(|refusal| refuse(&refusal))
    }

    async fn service(&self, facts: &Facts, query: &str, sight: &Sight) -> Result<Reply, Refusal> {
        let of = parameter(query, "of").unwrap_or_default();
        let Some((namespace, name)) =
            of.split_once('/').filter(|(space, name)| !space.is_empty() && !name.is_empty())
        else {
            let problem = format!("of={of}: give NAMESPACE/NAME of a service or workload\n");
            return Ok(text(StatusCode::BAD_REQUEST, problem));
        };
        sight.namespace(namespace).await?;
        let mut page = facts.page(namespace, name);
        let filter = Filter::parse(|field| match field {
            "verdict" => Some("denied".to_owned()),
            "to" => Some(of.to_string()),
            _ => None,
        });
        if let Ok(filter) = filter {
            let reading = Reading { relay: &self.relay, filter: &filter, sight, known: BTreeMap::new() };
            for found in reading.last(1_000).await?.0 {
                let Ok(flow) = serde_json::from_slice::<Flow>(&found.line) else { continue };
                page.denied_by(&flow.policy);
            }
        }
        Ok(mesh_core::admin::http::json(&page))
    }

    async fn config(&self, facts: &Facts, sight: &Sight) -> Result<Reply, Refusal> {
        let mut configuration = facts.configuration();
        let mut seen = Vec::new();
        let mut known = BTreeMap::new();
        for object in configuration.objects {
            let namespace = object.object.key.namespace.as_str();
            if sight.sees([namespace, namespace], &mut known).await? {
                seen.push(object);
            }
        }
        configuration.objects = seen;
        Ok(mesh_core::admin::http::json(&configuration))
    }

    async fn strict(&self, facts: &Facts, sight: &Sight) -> Result<Reply, Refusal> {
        let edges = self.relay.graph(seconds(SystemTime::now()), 3600);
        let mut seen = Vec::new();
        let mut known = BTreeMap::new();
        for space in facts.spaces(&edges) {
            if sight.sees([&space.namespace, &space.namespace], &mut known).await? {
                seen.push(space);
            }
        }
        Ok(mesh_core::admin::http::json(&Spaces { namespaces: seen }))
    }

    async fn graph(&self, query: &str, sight: &Sight) -> Reply {
        let (until, span) = match (number(query, "until"), number(query, "seconds")) {
            (Ok(until), Ok(span)) => (until, span.unwrap_or(60).min(3600)),
            (Err(problem), _) | (_, Err(problem)) => return *problem,
        };
        let now = seconds(SystemTime::now());
        let until = until.unwrap_or(now).min(now);
        let mut edges = Vec::new();
        let mut known = BTreeMap::new();
        for shown in self.relay.graph(until, span) {
            let ends = [shown.edge.source.namespace.as_str(), shown.edge.destination.namespace.as_str()];
            match sight.sees(ends, &mut known).await {
                Ok(true) => edges.push(shown),
                Ok(false) => {}
                Err(refusal) => return refuse(&refusal),
            }
        }
        mesh_core::admin::http::json(&Drawn { until, seconds: span, edges })
    }

    async fn flows(&self, query: &str, sight: &Sight) -> Reply {
        if self.relay.limits().per_node == 0 {
            let fix = "this control plane asks nodes for no events: start it with --relay-events";
            return text(StatusCode::NOT_FOUND, format!("{fix}\n"));
        }
        let filter = match Filter::parse(|name| parameter(query, name)) {
            Ok(filter) => filter,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let (since, last, wait) = match (number(query, "since"), number(query, "last"), number(query, "wait"))
        {
            (Ok(since), Ok(last), Ok(wait)) => (since, last, wait.unwrap_or(0).min(LONGEST_WAIT)),
            (Err(problem), ..) | (_, Err(problem), _) | (_, _, Err(problem)) => return *problem,
        };
        if let Some(namespace) = &filter.namespace
            && let Err(refusal) = sight.namespace(namespace).await
        {
            return refuse(&refusal);
        }
        let _permit = match self.waiting.try_acquire() {
            Err(_) if wait > 0 => {
                let problem =
                    format!("{WAITING} readers wait for events already; come again, or ask without wait\n");
                return text(StatusCode::SERVICE_UNAVAILABLE, problem);
            }
            permit => permit.ok(),
        };
        let reading = Reading { relay: &self.relay, filter: &filter, sight, known: BTreeMap::new() };
        let read = match since {
            Some(since) => reading.since(since, Duration::from_secs(wait)).await,
            None => reading.last(last.and_then(|last| usize::try_from(last).ok()).unwrap_or(LAST)).await,
        };
        match read {
            Ok((mut found, mark)) => {
                found.sort_by_key(|found| found.at_us);
                let mut body: Vec<u8> = Vec::new();
                for found in &found {
                    body.extend_from_slice(&found.line);
                    body.push(b'\n');
                }
                flows::end(&mut body, mark);
                reply(StatusCode::OK, "application/jsonlines", body)
            }
            Err(refusal) => refuse(&refusal),
        }
    }
}

/// A node's answer as it came.
fn passed_on(node: &str, answer: Answer) -> Reply {
    let Answer { status, content_type, body } = answer;
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut reply = reply(status, "application/octet-stream", body);
    if let Ok(kind) = http::HeaderValue::try_from(content_type) {
        reply.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    }
    if let Ok(node) = http::HeaderValue::try_from(node) {
        reply.headers_mut().insert(NODE_HEADER, node);
    }
    reply
}

/// The map's page and what belongs to it. It holds nothing of the mesh: it asks for that as anybody else does.
fn page(path: &str) -> Reply {
    let name = path.strip_prefix("/map").unwrap_or(path).trim_start_matches('/');
    let name = if name.is_empty() { "index.html" } else { name };
    if PAGE.is_empty() {
        return text(
            StatusCode::NOT_FOUND,
            "this mesh-control was built without the map: `cargo xtask build` builds it in\n",
        );
    }
    let Some((_, body)) = PAGE.iter().find(|(known, _)| *known == name) else {
        return text(StatusCode::NOT_FOUND, format!("{path} is unknown; the map is at /map\n"));
    };
    let kind = match name.rsplit('.').next() {
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        _ => "text/html; charset=utf-8",
    };
    let mut answer = reply(StatusCode::OK, kind, *body);
    for (name, value) in [
        // The graph library writes a style sheet of its own.
        (
            "content-security-policy",
            "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
        ),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-cache"),
    ] {
        answer.headers_mut().insert(name, http::HeaderValue::from_static(value));
    }
    answer
}

/// Who talks to whom.
#[derive(Debug, Serialize)]
struct Drawn {
    until: u64,
    seconds: u64,
    edges: Vec<Shown>,
}

/// What could be STRICT.
#[derive(Debug, Serialize)]
struct Spaces {
    namespaces: Vec<super::facts::Space>,
}

/// An event that was asked for and may be seen.
struct Found {
    at_us: u64,
    line: Arc<[u8]>,
}

/// One answer in the making.
struct Reading<'a> {
    relay: &'a Relay,
    filter: &'a Filter,
    sight: &'a Sight,
    known: BTreeMap<String, bool>,
}

impl Reading<'_> {
    async fn choose(&mut self, lines: Lines) -> Result<Vec<Found>, Refusal> {
        // Others have their turn between two chunks.
        tokio::task::yield_now().await;
        let mut found = Vec::new();
        for (_, line) in lines {
            // It was read when it came.
            let Ok(flow) = serde_json::from_slice::<Flow>(&line) else { continue };
            let ends = [flow.source.namespace.as_str(), flow.destination.namespace.as_str()];
            if self.filter.wants(&flow) && self.sight.sees(ends, &mut self.known).await? {
                found.push(Found { at_us: flow.at_us, line });
            }
        }
        Ok(found)
    }

    /// What comes after an event; waits for the first.
    async fn since(mut self, mut since: u64, wait: Duration) -> Result<(Vec<Found>, Mark), Refusal> {
        let deadline = Instant::now() + wait;
        let (mut found, mut forgotten) = (Vec::new(), 0);
        loop {
            let (lines, mark) = self.relay.since(since, CHUNK);
            let whole = lines.len() < CHUNK;
            found.extend(self.choose(lines).await?);
            forgotten += mark.forgotten;
            let mark = Mark { forgotten, ..mark };
            since = mark.next;
            if found.len() >= MOST_IN_ANSWER || whole && (!found.is_empty() || forgotten > 0) {
                return Ok((found, mark));
            }
            if !whole {
                continue;
            }
            if timeout_at(deadline, self.relay.after(since)).await.is_err() {
                return Ok((found, mark));
            }
            sleep(TOGETHER).await;
        }
    }

    /// The newest events.
    async fn last(mut self, count: usize) -> Result<(Vec<Found>, Mark), Refusal> {
        let count = count.min(MOST_IN_ANSWER);
        let (mut lines, mark) = self.relay.until(None, if count == 0 { 0 } else { CHUNK });
        let mut found: Vec<Found> = Vec::new();
        while let Some((oldest, _)) = lines.first() {
            let before = oldest - 1;
            let mut chosen = self.choose(lines).await?;
            chosen.append(&mut found);
            found = chosen;
            if found.len() >= count {
                break;
            }
            lines = self.relay.until(Some(before), CHUNK).0;
        }
        let surplus = found.len().saturating_sub(count);
        found.drain(..surplus);
        Ok((found, mark))
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use http_body_util::BodyExt as _;
    use mesh_core::flows::{Party, Verdict};

    use super::super::ring::Limits;
    use super::*;
    use crate::metrics::Metrics;

    fn web() -> Web {
        let relay = Arc::new(Relay::new(Limits::default(), Arc::new(Metrics::new())));
        for seq in 1..=5_000 {
            let verdict = if seq % 1000 == 0 { Verdict::Denied } else { Verdict::Forwarded };
            let source = Party { namespace: "shop".into(), pod: "cart".into(), ..Party::default() };
            let flow = Flow { seq, at_us: seq, node: "a".into(), verdict, source, ..Flow::default() };
            relay.take("a", &flows::lines([&flow]), 0, 0).unwrap();
        }
        Web {
            relay,
            agents: Arc::default(),
            facts: None,
            gate: Gate::Alone,
            waiting: Arc::new(Semaphore::new(1)),
        }
    }

    async fn get(web: &Web, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).header("host", "localhost").body(()).unwrap().into_parts().0;
        let answer = web.answer(&request, Origin::Machine).await;
        let status = answer.status();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    async fn read(web: &Web, path: &str) -> (Vec<u64>, Mark) {
        let (status, body) = get(web, path).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let (flows, mark) = flows::parse(body.as_bytes()).unwrap();
        (flows.iter().map(|flow| flow.seq).collect(), mark)
    }

    #[tokio::test]
    async fn filters_hold_for_the_last_events_and_for_those_after_one() {
        let web = web();
        let (seen, mark) = read(&web, "/flows?last=2").await;
        assert_eq!((seen, mark.next), (vec![4999, 5000], 5000));
        assert_eq!(read(&web, "/flows?last=2&verdict=denied").await.0, [4000, 5000]);
        assert_eq!(read(&web, "/flows?last=9&verdict=denied").await.0, [1000, 2000, 3000, 4000, 5000]);
        assert_eq!(read(&web, "/flows?last=0").await, (vec![], mark));
        assert_eq!(read(&web, "/flows?since=3500&verdict=denied").await, (vec![4000, 5000], mark));
        assert_eq!(read(&web, "/flows?since=0&pod=other/cart").await, (vec![], mark));
        assert_eq!(read(&web, "/flows?since=0").await.0.len(), 5000);
    }

    #[tokio::test]
    async fn who_waits_gets_the_next_event_that_fits_and_nobody_waits_for_ever() {
        let web = web();
        let (seen, mark) = read(&web, "/flows?since=5000&wait=1").await;
        assert_eq!((seen, mark.next), (vec![], 5000));
        let relay = web.relay.clone();
        let later = async move {
            sleep(Duration::from_millis(100)).await;
            let flow = Flow { seq: 1, node: "b".into(), ..Flow::default() };
            relay.take("b", &flows::lines([&flow]), 0, 0).unwrap();
        };
        let another = async {
            sleep(Duration::from_millis(50)).await;
            (get(&web, "/flows?since=5000&wait=20").await, get(&web, "/flows?last=1").await)
        };
        let (read, (), (refused, now)) =
            tokio::join!(read(&web, "/flows?since=5000&wait=20"), later, another);
        assert_eq!((read.0, read.1.next), (vec![1], 5001));
        assert_eq!((refused.0, now.0), (StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK));
    }

    #[tokio::test]
    async fn what_cannot_be_answered_says_what_would_be_right() {
        let web = web();
        for (path, hint) in [
            ("/flows?last=x", "last=x: give a number"),
            ("/flows?since=-1", "since=-1: give a number"),
            ("/flows?verdict=bad", "give one of forwarded, denied"),
            ("/flows/x", "/flows?last="),
            ("/flows/graph?seconds=x", "seconds=x: give a number"),
            ("/map/nothing", "map"),
        ] {
            let (status, body) = get(&web, path).await;
            assert!(status.is_client_error() && body.contains(hint), "{path}: {status} {body}");
        }
        let limits = Limits { per_node: 0, ..Limits::default() };
        let relay = Arc::new(Relay::new(limits, Arc::new(Metrics::new())));
        let off = Web { relay, ..web };
        assert!(get(&off, "/flows").await.1.contains("--relay-events"));
    }
}
