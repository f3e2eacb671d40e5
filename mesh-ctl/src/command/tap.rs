//! `tap`: requests at waypoints, as they end.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use mesh_core::tap::{Batch, Filter, Tapped};
use tokio::sync::mpsc;

use super::flows::{Print, span};
use crate::ask::{AskError, Role, Server, query_value};
use crate::cli::{Format, Global, TapArgs};
use crate::endpoint::Endpoint;
use crate::output::{Exit, Report};
use crate::table::Tone;

/// How long a waypoint is asked to wait for something new.
const WAIT: Duration = Duration::from_secs(20);
/// A waypoint that does not answer is asked again after this long.
const AGAIN: Duration = Duration::from_secs(1);

/// What a waypoint says, or that it says nothing.
enum Heard {
    Batch(Batch),
    Silent(AskError),
}

/// Runs until nobody reads any more, enough was shown, or no waypoint can be asked.
pub async fn run(global: &Global, args: &TapArgs, colour: bool, print: Print<'_>) -> Report {
    let filter = match args.filter() {
        Ok(filter) => filter,
        Err(problem) => return Report::failed(Exit::Usage, problem),
    };
    if matches!(global.output, Format::Yaml | Format::Hubble) {
        return Report::failed(Exit::Usage, "requests are printed as lines: -o table or -o json");
    }
    let waypoints = args.at.endpoints();
    let listener = name();
    let path = |since: u64, wait: Duration| {
        let mut all: Vec<String> = vec![
            format!("listener={listener}"),
            format!("since={since}"),
            format!("wait={}", wait.as_secs()),
        ];
        all.extend(filter.parameters().iter().map(|(name, value)| format!("{name}={}", query_value(value))));
        format!("/tap?{}", all.join("&"))
    };
    // Once without waiting: it begins to listen, or says why not.
    let server = |endpoint| Server { endpoint, role: Role::Waypoint, timeout: global.timeout, proof: None };
    let first = path(0, Duration::ZERO);
    let begun: Vec<Result<Batch, AskError>> = join_all(waypoints.iter().map(|at| {
        let server = server(at);
        let first = &first;
        async move { server.json(first).await }
    }))
    .await;
    let (listening, errors) = sort(&waypoints, begun);
    if listening.is_empty() {
        return Report::default().unanswered(Exit::Unreachable, &errors);
    }
    let (told, mut waiting) = mpsc::channel(64);
    let asks = listening.into_iter().map(|(at, batch)| {
        let (told, path) = (told.clone(), &path);
        follow(Server { timeout: global.timeout + WAIT, ..server(at) }, batch, told, path)
    });
    let asks = join_all(asks);
    drop(told);
    let lines = Lines { json: global.output == Format::Json, colour, headers: &filter };
    let mut left = args.max.unwrap_or(u64::MAX);
    let show = async {
        let head = lines.head() + &errors.iter().map(|e| lines.note(&e.to_string())).collect::<String>();
        if !print(&head) {
            return;
        }
        while let Some(heard) = waiting.recv().await {
            let text = match heard {
                Heard::Silent(error) => lines.note(&format!("{}: {}", error.endpoint, error.problem)),
                Heard::Batch(batch) => {
                    let lost = match batch.lost {
                        0 => String::new(),
                        lost => lines.note(&format!("{lost} requests found no room and are not shown")),
                    };
                    let some = usize::try_from(left).unwrap_or(usize::MAX).min(batch.requests.len());
                    left -= some as u64;
                    batch.requests[..some].iter().map(|request| lines.text(request)).collect::<String>()
                        + &lost
                }
            };
            if !print(&text) || left == 0 {
                return;
            }
        }
    };
    if args.max != Some(0) {
        tokio::select! {
            _ended = asks => {}
            () = show => {}
        }
    }
    Report::default()
}

/// Who listens, for the waypoint: the same from visit to visit, and nobody else.
fn name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{}-{now:x}", std::process::id())
}

fn sort(
    waypoints: &[Endpoint],
    begun: Vec<Result<Batch, AskError>>,
) -> (Vec<(&Endpoint, Batch)>, Vec<AskError>) {
    let (mut listening, mut errors) = (Vec::new(), Vec::new());
    for (at, result) in waypoints.iter().zip(begun) {
        match result {
            Ok(batch) => listening.push((at, batch)),
            Err(error) => errors.push(error),
        }
    }
    (listening, errors)
}

/// Tells of everything that comes, until nobody listens.
async fn follow(
    server: Server<'_>,
    first: Batch,
    told: mpsc::Sender<Heard>,
    path: &impl Fn(u64, Duration) -> String,
) {
    let (mut since, mut silent) = (first.next, false);
    let mut heard = Heard::Batch(first);
    loop {
        let nothing = matches!(&heard, Heard::Batch(batch) if batch.requests.is_empty() && batch.lost == 0);
        if !nothing && told.send(heard).await.is_err() {
            return;
        }
        heard = loop {
            match server.json::<Batch>(&path(since, WAIT)).await {
                Ok(batch) => {
                    (since, silent) = (batch.next, false);
                    break Heard::Batch(batch);
                }
                Err(error) if !std::mem::replace(&mut silent, true) => {
                    // It may have been replaced by another, which counts from the beginning.
                    since = 0;
                    break Heard::Silent(error);
                }
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
    }
}

/// Requests in words, or as they are.
struct Lines<'a> {
    json: bool,
    colour: bool,
    headers: &'a Filter,
}

impl Lines<'_> {
    fn head(&self) -> String {
        if self.json {
            return String::new();
        }
        let title = format!(
            "{:<12}  {:<6}  {:<3}  {:<8}  {:<44}  {:<34}  {}",
            "TIME", "METHOD", "", "TOOK", "HOST AND PATH", "FROM", "TO"
        );
        Tone::Title.paint(&title, self.colour) + "\n"
    }

    /// What is no request: on a line of its own where people read, nowhere where scripts do.
    fn note(&self, text: &str) -> String {
        if self.json { String::new() } else { Tone::Warn.paint(text, self.colour) + "\n" }
    }

    fn text(&self, request: &Tapped) -> String {
        if self.json {
            // This type cannot fail to be written.
            return serde_json::to_string(request).unwrap_or_default() + "\n";
        }
        let tone = match request.status {
            0 | 500.. => Tone::Bad,
            400..=499 => Tone::Warn,
            _ if request.grpc_status.is_some_and(|status| status != 0) => Tone::Warn,
            _ => Tone::Plain,
        };
        let from = if request.source.is_empty() { &request.source_address } else { &request.source };
        let identity = request.identity.rsplit_once("/ns/").map_or("", |(_, rest)| rest);
        let from = if identity.is_empty() { from.clone() } else { format!("{from} as {identity}") };
        let line = format!(
            "{:<12}  {:<6}  {:<3}  {:<8}  {:<44}  {:<34}  {}",
            clock(request.at_us),
            request.method,
            request.status,
            span(request.duration_us),
            format!("{}{}", request.host, request.path),
            from,
            found(request),
        );
        let mut text = tone.paint(line.trim_end(), self.colour) + "\n";
        if self.headers.headers {
            for (mark, headers) in [(">", &request.request_headers), ("<", &request.response_headers)] {
                for (name, value) in headers {
                    text += &Tone::Plain.paint(&format!("    {mark} {name}: {value}"), self.colour);
                    text.push('\n');
                }
            }
        }
        text
    }
}

/// Where it went, and what is remarkable about it.
fn found(request: &Tapped) -> String {
    let mut parts = Vec::new();
    match (&*request.endpoint, &*request.endpoint_address) {
        ("", "") => parts.push("nowhere".to_owned()),
        ("", address) => parts.push(address.to_owned()),
        (name, _) => parts.push(name.to_owned()),
    }
    if !request.route.is_empty() {
        parts.push(format!("by {}", request.route));
    }
    if let Some(status) = request.grpc_status {
        parts.push(format!("grpc {status}"));
    }
    if request.retries > 0 {
        parts.push(format!("{} retries", request.retries));
    }
    if request.flags != "-" {
        parts.push(request.flags.clone());
    }
    if !request.details.is_empty() && request.details != "via_upstream" {
        parts.push(request.details.clone());
    }
    parts.join(", ")
}

/// The time of day, in UTC.
fn clock(at_us: u64) -> String {
    let at = UNIX_EPOCH + Duration::from_micros(at_us);
    let text = humantime::format_rfc3339_millis(at).to_string();
    text.split_once('T').map_or(text.clone(), |(_, time)| time.trim_end_matches('Z').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_asked_for_what_where_it_went_and_what_was_wrong() {
        let request = Tapped {
            at_us: 1_700_000_000_123_000,
            method: "GET".into(),
            host: "web".into(),
            path: "/pay".into(),
            source: "shop/frontend-7d".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/frontend".into(),
            status: 503,
            flags: "URX".into(),
            details: "via_upstream".into(),
            duration_us: 1500,
            route: "VirtualService/shop/web 0".into(),
            endpoint: "shop/v2".into(),
            retries: 2,
            ..Tapped::default()
        };
        let lines = Lines { json: false, colour: false, headers: &Filter::default() };
        let text = lines.text(&request);
        for part in [
            "22:13:20.123",
            "503",
            "web/pay",
            "shop/frontend-7d as shop/sa/frontend",
            "shop/v2, by VirtualService/shop/web 0, 2 retries, URX",
            "1.5ms",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("via_upstream"));
    }
}
