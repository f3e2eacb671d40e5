//! What tracing has told: events as JSON lines, and the connections that are open.

use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use mesh_core::admin::http::{Ask, Reply, json, reply, text};
use mesh_core::flows::{self, Filter, Flow, Kind};

use super::Admin;
use crate::sys;
use crate::trace::told::Told;

/// Events that are shown without a number.
const LAST: usize = 100;
/// A wait is shorter than what a connection of the admin port may take.
const LONGEST_WAIT: u64 = 50;
/// Events that come this close after the first go with it.
const TOGETHER: Duration = Duration::from_millis(50);

fn number(ask: &Ask, name: &str) -> Result<Option<u64>, Box<Reply>> {
    match ask.parameter(name).map(|value| value.parse()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err(Box::new(text(
            StatusCode::BAD_REQUEST,
            format!("{name}: give a number of events or seconds\n"),
        ))),
    }
}

fn off() -> Reply {
    text(
        StatusCode::NOT_FOUND,
        "nothing is traced on this node: the agent runs with --trace false, or its log says why\n",
    )
}

/// `?last=N`: the last events. `?since=N`: those after event N; `&wait=S`: waits for the first of them. Beside these,
/// the conditions of [`Filter`].
pub(super) async fn flows(admin: Rc<Admin>, ask: Ask) -> Reply {
    let Some(tracer) = &admin.tracer else { return off() };
    let filter = match Filter::parse(|name| ask.parameter(name)) {
        Ok(filter) => filter,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    let (since, last, wait) = match (number(&ask, "since"), number(&ask, "last"), number(&ask, "wait")) {
        (Ok(since), Ok(last), Ok(wait)) => (since, last, wait.unwrap_or(0).min(LONGEST_WAIT)),
        (Err(problem), ..) | (_, Err(problem), _) | (_, _, Err(problem)) => return *problem,
    };
    let (found, mark) = match since {
        None => tracer.last(last.map_or(LAST, |last| usize::try_from(last).unwrap_or(LAST)), &filter),
        Some(mut since) => {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(wait);
            loop {
                let (found, mark) = tracer.read(since, &filter);
                if !found.is_empty() || mark.forgotten > 0 || tokio::time::Instant::now() >= deadline {
                    break (found, mark);
                }
                since = mark.next;
                if tokio::time::timeout_at(deadline, tracer.flows().after(since)).await.is_ok() {
                    tokio::time::sleep(TOGETHER).await;
                }
            }
        }
    };
    reply(StatusCode::OK, "application/jsonlines", flows::write(&found, mark))
}

/// Connections that are open now, as events of kind `connect` (on their way), `established` or `accepted`.
pub(super) fn sockets(admin: &Admin) -> Reply {
    let Some(tracer) = &admin.tracer else { return off() };
    let now = sys::monotonic_ns();
    let at_us = crate::trace::run::wall_us();
    let node = &admin.shared.config.node.name;
    let mut open: Vec<Flow> = Vec::new();
    for live in tracer.live() {
        let mut told = Told { at_us, ..Told::of_live(&live) };
        told.kind = match (live.side, live.established) {
            (flows::Side::Server, _) => Kind::Accepted,
            (_, true) => Kind::Established,
            (_, false) => Kind::Connect,
        };
        told.numbers.duration_us = Some(now.saturating_sub(live.opened_ns) / 1000);
        open.push(told.flow(0, node, tracer.names()));
    }
    open.sort_by_key(|flow| std::cmp::Reverse(flow.duration_us));
    json(&open)
}

/// Turns tracing on or off.
pub(super) fn turn(admin: &Admin, ask: &Ask) -> Reply {
    let Some(tracer) = &admin.tracer else { return off() };
    let on = match ask.parameter("on").as_deref() {
        Some("true") => true,
        Some("false") => false,
        _ => return text(StatusCode::BAD_REQUEST, "give ?on=true or ?on=false\n"),
    };
    tracer.turn(on);
    text(StatusCode::OK, format!("flow tracing: {on}\n"))
}
