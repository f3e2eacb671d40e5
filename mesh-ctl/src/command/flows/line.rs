//! An event in words.

use mesh_core::flows::{Flow, Kind, Party, Path, Side, Verdict, hubble};

use crate::cli::Format;
use crate::table::{Cell, Tone};

/// Columns of a list of events.
pub(super) const TITLES: [&str; 8] =
    ["TIME", "NODE", "EVENT", "VERDICT", "PATH", "SOURCE", "DESTINATION", "FOUND"];
/// Their widths while events come one by one; what is longer is not cut.
const WIDTHS: [usize; 7] = [12, 10, 14, 9, 8, 30, 34];

/// What an event means to who looks for trouble.
pub(super) fn tone(flow: &Flow) -> Tone {
    match (flow.verdict, flow.kind) {
        (Verdict::Denied | Verdict::Dropped | Verdict::Failed, _) => Tone::Bad,
        (_, Kind::Retransmit | Kind::ResetSent | Kind::ResetReceived) => Tone::Warn,
        (_, Kind::Closed) if flow.closed_with != "fin" => Tone::Warn,
        (_, Kind::Dns) if flow.dns.as_ref().is_some_and(|dns| dns.answer != "NOERROR") => Tone::Warn,
        _ => Tone::Plain,
    }
}

fn party(end: &Party, with_port: bool) -> String {
    match end.address.filter(|_| with_port) {
        Some(address) if end.pod.is_empty() => address.to_string(),
        Some(address) => format!("{}:{}", end.label(), address.port()),
        None => end.label(),
    }
}

/// The client, with its port.
pub(super) fn source(flow: &Flow) -> String {
    party(&flow.source, true)
}

/// The server, and the service that was asked for where the endpoint is not known.
pub(super) fn destination(flow: &Flow) -> String {
    if flow.destination.pod.is_empty() && !flow.service.is_empty() {
        let mut labels = flow.service.split('.');
        let (name, namespace) = (labels.next().unwrap_or_default(), labels.next().unwrap_or_default());
        let port = flow.destination.address.map(|address| format!(":{}", address.port()));
        return format!("{namespace}/{name} (service){}", port.unwrap_or_default());
    }
    party(&flow.destination, true)
}

pub(super) const fn side(side: Side) -> &'static str {
    match side {
        Side::Client => "client",
        Side::Server => "server",
        Side::Node => "node",
    }
}

/// A span in a unit that suits it.
pub(in super::super) fn span(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{}.{}ms", us / 1000, us % 1000 / 100),
        1_000_000..120_000_000 => format!("{}.{}s", us / 1_000_000, us % 1_000_000 / 100_000),
        _ => format!("{}m", us / 60_000_000),
    }
}

/// A number of bytes in a unit that suits it.
fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{} kB", count / 1000),
        10_000_000..10_000_000_000 => format!("{} MB", count / 1_000_000),
        _ => format!("{} GB", count / 1_000_000_000),
    }
}

/// `curl[4711]`.
pub(super) fn process(flow: &Flow) -> String {
    flow.process.as_ref().map(|p| format!("{}[{}]", p.command, p.pid)).unwrap_or_default()
}

/// What the event found, in words.
pub(super) fn detail(flow: &Flow) -> String {
    let mut parts: Vec<String> = Vec::new();
    if let Some(dns) = &flow.dns {
        let local = if dns.local { "" } else { " (forwarded)" };
        parts.push(format!("{} {} {}{local}", dns.query_type, dns.query, dns.answer));
    }
    if !flow.closed_with.is_empty() {
        parts.push(format!("{} by {}", flow.closed_with, flow.closed_by));
    }
    if !flow.reason.is_empty() {
        parts.push(flow.reason.clone());
    }
    if !flow.policy.is_empty() {
        parts.push(format!("policy {}", flow.policy));
    }
    if let Some(latency) = flow.latency_us {
        parts.push(format!("in {}", span(latency)));
    }
    if let (Some(up), Some(down)) = (flow.bytes_to_server, flow.bytes_to_client) {
        parts.push(format!("{} up, {} down", bytes(up), bytes(down)));
    }
    if let Some(duration) = flow.duration_us {
        parts.push(format!("after {}", span(duration)));
    }
    if let Some(rtt) = flow.srtt_us.filter(|rtt| *rtt > 0) {
        parts.push(format!("rtt {}", span(u64::from(rtt))));
    }
    if let Some(again) = flow.retransmits.filter(|again| *again > 0) {
        parts.push(format!("{again} retransmitted"));
    }
    if let Some(unacked) = flow.unacked.filter(|unacked| *unacked > 0) {
        parts.push(format!("{unacked} unacknowledged"));
    }
    if flow.count > 1 {
        parts.push(format!("{} times", flow.count));
    }
    if flow.kind == Kind::Connect {
        let process = process(flow);
        parts.extend((!process.is_empty()).then_some(process));
    }
    if !flow.detail.is_empty() {
        parts.push(flow.detail.clone());
    }
    parts.join(", ")
}

/// The time of day, UTC, with milliseconds.
fn time(flow: &Flow) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_micros(flow.at_us);
    let text = humantime::format_rfc3339_millis(at).to_string();
    text.split('T').nth(1).and_then(|time| time.strip_suffix('Z')).unwrap_or(&text).to_owned()
}

pub(super) fn cells(flow: &Flow) -> [Cell; 8] {
    let tone = tone(flow);
    [
        time(flow).into(),
        flow.node.clone().into(),
        Cell::new(flow.kind.as_str(), tone),
        Cell::new(flow.verdict.as_str(), tone),
        (if flow.path == Path::Unknown { "" } else { flow.path.as_str() }).into(),
        source(flow).into(),
        (if flow.kind == Kind::Dns { String::new() } else { destination(flow) }).into(),
        detail(flow).into(),
    ]
}

/// Who a connection is between, as far as any event knows.
pub(super) fn headline(flows: &[Flow]) -> String {
    let best = |end: fn(&Flow) -> &Party| {
        let known = flows.iter().map(end).find(|party| !party.pod.is_empty());
        known.or_else(|| flows.first().map(end)).map(Party::label).unwrap_or_default()
    };
    let service = flows.iter().map(|flow| flow.service.as_str()).find(|service| !service.is_empty());
    let id = flows.iter().find_map(|flow| flow.connection).map(|id| id.to_string()).unwrap_or_default();
    let service = service.map(|service| format!(", {service}")).unwrap_or_default();
    format!("{id}: {} -> {}{service}", best(|flow| &flow.source), best(|flow| &flow.destination))
}

/// Events one by one.
pub(super) struct Lines {
    format: Format,
    colour: bool,
}

impl Lines {
    pub(super) const fn new(format: Format, colour: bool) -> Self {
        Self { format, colour }
    }

    fn row(&self, cells: impl IntoIterator<Item = (String, Tone)>) -> String {
        let mut line = String::new();
        for (index, (text, tone)) in cells.into_iter().enumerate() {
            let text = if text.is_empty() { "-".to_owned() } else { text };
            let width = WIDTHS.get(index).copied().unwrap_or(0);
            let space = " ".repeat(width.saturating_sub(text.chars().count()) + 2);
            line.push_str(&tone.paint(&text, self.colour));
            line.push_str(&space);
        }
        line.trim_end().to_owned() + "\n"
    }

    pub(super) fn head(&self) -> String {
        match self.format {
            Format::Table => self.row(TITLES.map(|title| (title.to_owned(), Tone::Title))),
            _ => String::new(),
        }
    }

    pub(super) fn text(&self, flows: &[Flow]) -> String {
        let line = |flow: &Flow| match self.format {
            Format::Table => self.row(cells(flow).map(Cell::into_parts)),
            Format::Hubble => hubble::line(flow).to_string() + "\n",
            // These types cannot fail to be written.
            Format::Json => serde_json::to_string(flow).unwrap_or_default() + "\n",
            Format::Yaml => format!("---\n{}", serde_saphyr::to_string(flow).unwrap_or_default()),
        };
        flows.iter().map(line).collect()
    }

    /// Something that is no event: for people only, so that programs read nothing but events.
    pub(super) fn note(&self, text: &str) -> String {
        match self.format {
            Format::Table => Tone::Warn.paint(&format!("# {text}"), self.colour) + "\n",
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::flows::Dns;

    fn flow() -> Flow {
        let party = |pod: &str, address: &str| Party {
            address: address.parse().ok(),
            namespace: "shop".into(),
            pod: pod.into(),
            ..Party::default()
        };
        Flow {
            at_us: 3_661_002_000,
            node: "a".into(),
            kind: Kind::Closed,
            path: Path::Fast,
            source: party("cart", "10.0.0.1:4000"),
            destination: party("pay", "10.0.0.2:8080"),
            closed_by: "server".into(),
            closed_with: "rst".into(),
            bytes_to_server: Some(1200),
            bytes_to_client: Some(25_000),
            duration_us: Some(1_250_000),
            srtt_us: Some(420),
            retransmits: Some(2),
            ..Flow::default()
        }
    }

    #[test]
    fn an_event_is_one_line_that_says_who_what_and_why() {
        let lines = Lines::new(Format::Table, false);
        let text = lines.text(&[flow()]);
        let expected = "01:01:01.002  a           closed          forwarded  fast      shop/cart:4000                  \
                        shop/pay:8080                       rst by server, 1200 B up, 25 kB down, after 1.2s, rtt 420us, 2 retransmitted\n";
        assert_eq!(text, expected);
        assert_eq!(tone(&flow()), Tone::Warn);
        let head = lines.head();
        assert_eq!(head.find("FOUND"), text.find("rst by"), "columns line up");
    }

    #[test]
    fn what_is_not_known_is_an_address_or_a_service() {
        let mut outside = flow();
        outside.destination = Party { address: "203.0.113.7:443".parse().ok(), ..Party::default() };
        assert_eq!(destination(&outside), "203.0.113.7:443");
        outside.service = "pay.shop.svc.cluster.local".into();
        assert_eq!(destination(&outside), "shop/pay (service):443");
        let dns =
            Dns { query: "x.y".into(), query_type: "A".into(), answer: "NXDOMAIN".into(), local: false };
        let asked = Flow { kind: Kind::Dns, dns: Some(dns), latency_us: Some(90), ..Flow::default() };
        assert_eq!(detail(&asked), "A x.y NXDOMAIN (forwarded), in 90us");
        assert_eq!(tone(&asked), Tone::Warn);
    }

    #[test]
    fn programs_get_one_document_a_line_and_no_notes() {
        for format in [Format::Json, Format::Hubble] {
            let lines = Lines::new(format, true);
            assert_eq!(lines.head() + &lines.note("lost"), "");
            let text = lines.text(&[flow(), flow()]);
            assert_eq!(text.lines().count(), 2);
            for line in text.lines() {
                serde_json::from_str::<serde_json::Value>(line).unwrap();
            }
        }
    }
}
