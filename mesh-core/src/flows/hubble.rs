//! Events in the JSON of Hubble (`hubble observe -o json`), so that scripts for it work.
//!
//! Shape and names: `flow.proto` and `observer.proto` of Cilium's API, as protobuf's JSON writes them. A connection's
//! event becomes one flow of its direction; what Hubble has no word for (the kernel's drop reasons, paths, round trip
//! times) is in `Summary`.

use std::net::SocketAddr;

use serde_json::{Map, Value, json};

use super::{Flow, Kind, Party, Side, Verdict};

/// Cilium's types of monitor messages.
const TYPE_DROP: u8 = 1;
const TYPE_TRACE: u8 = 4;
const TYPE_POLICY_VERDICT: u8 = 5;
const TYPE_ACCESS_LOG: u8 = 129;
/// `DropReason.POLICY_DENIED`.
const POLICY_DENIED: u32 = 133;

/// One line of `hubble observe -o json`.
#[must_use]
pub fn line(flow: &Flow) -> Value {
    let time = time(flow.at_us);
    json!({ "flow": body(flow, &time), "node_name": flow.node, "time": time })
}

fn time(at_us: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_micros(at_us);
    humantime::format_rfc3339_micros(at).to_string()
}

fn body(flow: &Flow, time: &str) -> Value {
    let mut body = Map::new();
    let mut put = |name: &str, value: Value| {
        body.insert(name.to_owned(), value);
    };
    put("time", time.into());
    put("uuid", uuid(flow).into());
    put("verdict", verdict(flow).into());
    if matches!(flow.verdict, Verdict::Denied | Verdict::Dropped) {
        let denied = flow.verdict == Verdict::Denied;
        put("drop_reason", (if denied { POLICY_DENIED } else { 0 }).into());
        put("drop_reason_desc", (if denied { "POLICY_DENIED" } else { "DROP_REASON_UNKNOWN" }).into());
    }
    if let Some(ip) = ip(flow) {
        put("IP", ip);
    }
    put("l4", l4(flow));
    put("source", endpoint(&flow.source));
    put("destination", endpoint(&flow.destination));
    let dns = flow.dns.as_ref();
    put("Type", (if dns.is_some() { "L7" } else { "L3_L4" }).into());
    put("node_name", flow.node.clone().into());
    if !flow.service.is_empty() {
        put("destination_names", json!([flow.service]));
        let mut labels = flow.service.split('.');
        let (name, namespace) = (labels.next().unwrap_or_default(), labels.next().unwrap_or_default());
        put("destination_service", json!({ "name": name, "namespace": namespace }));
    }
    if let Some(dns) = dns {
        let query = format!("{}.", dns.query);
        put(
            "l7",
            json!({
                "type": "RESPONSE",
                "latency_ns": (flow.latency_us.unwrap_or_default() * 1000).to_string(),
                "dns": { "query": query, "rcode": rcode(&dns.answer), "qtypes": [dns.query_type] },
            }),
        );
    }
    put("event_type", json!({ "type": event_type(flow) }));
    put("traffic_direction", (if flow.side == Side::Server { "INGRESS" } else { "EGRESS" }).into());
    put("is_reply", false.into());
    put("Summary", summary(flow).into());
    Value::Object(body)
}

/// Stable for an event: its node, number and connection.
fn uuid(flow: &Flow) -> String {
    let node = flow.node.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let (high, low) = (node, flow.seq ^ flow.at_us << 20);
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xfff,
        low >> 48 & 0xfff,
        low & 0xffff_ffff_ffff
    )
}

const fn verdict(flow: &Flow) -> &'static str {
    match flow.verdict {
        Verdict::Forwarded => "FORWARDED",
        Verdict::Denied | Verdict::Dropped => "DROPPED",
        Verdict::Failed => "ERROR",
    }
}

const fn event_type(flow: &Flow) -> u8 {
    match (flow.kind, flow.verdict) {
        (Kind::Drop, _) => TYPE_DROP,
        (Kind::Dns, _) => TYPE_ACCESS_LOG,
        (_, Verdict::Denied) => TYPE_POLICY_VERDICT,
        _ => TYPE_TRACE,
    }
}

fn rcode(answer: &str) -> u8 {
    match answer {
        "FORMERR" => 1,
        "SERVFAIL" => 2,
        "NXDOMAIN" => 3,
        "NOTIMP" => 4,
        "REFUSED" => 5,
        _ => 0,
    }
}

fn ip(flow: &Flow) -> Option<Value> {
    let (from, to) = (flow.source.address?, flow.destination.address?);
    let version = if from.is_ipv4() { "IPv4" } else { "IPv6" };
    let mut ip = json!({
        "source": from.ip().to_string(), "destination": to.ip().to_string(), "ipVersion": version,
    });
    if matches!(flow.path, super::Path::Tunnel | super::Path::Waypoint) {
        ip["encrypted"] = true.into();
    }
    Some(ip)
}

fn l4(flow: &Flow) -> Value {
    let port = |address: Option<SocketAddr>| address.map_or(0, |address| address.port());
    let ports = json!({
        "source_port": port(flow.source.address), "destination_port": port(flow.destination.address),
    });
    if flow.protocol != "tcp" {
        return json!({ "UDP": ports });
    }
    let mut tcp = ports;
    let flags: &[&str] = match flow.kind {
        Kind::Connect => &["SYN"],
        Kind::Established | Kind::Accepted => &["SYN", "ACK"],
        Kind::ResetSent | Kind::ResetReceived => &["RST"],
        Kind::Closed if flow.closed_with == "rst" => &["RST"],
        Kind::Closed => &["ACK", "FIN"],
        _ => &[],
    };
    if !flags.is_empty() {
        tcp["flags"] =
            flags.iter().map(|flag| ((*flag).to_owned(), true.into())).collect::<Map<_, _>>().into();
    }
    json!({ "TCP": tcp })
}

fn endpoint(party: &Party) -> Value {
    if party.pod.is_empty() {
        return json!({ "labels": ["reserved:world"] });
    }
    let mut endpoint = json!({
        "namespace": party.namespace,
        "labels": [format!("k8s:io.kubernetes.pod.namespace={}", party.namespace)],
        "pod_name": party.pod,
    });
    if !party.workload.is_empty() {
        endpoint["workloads"] = json!([{ "name": party.workload }]);
    }
    endpoint
}

fn summary(flow: &Flow) -> String {
    let mut parts = vec![format!("{} {}", flow.protocol.to_uppercase(), flow.kind.as_str())];
    if flow.path != super::Path::Unknown {
        parts.push(format!("path={}", flow.path.as_str()));
    }
    for (name, value) in [("reason", &flow.reason), ("policy", &flow.policy)] {
        if !value.is_empty() {
            parts.push(format!("{name}={value}"));
        }
    }
    if let Some(latency) = flow.latency_us {
        parts.push(format!("latency={latency}us"));
    }
    if let Some(dns) = &flow.dns {
        parts.push(format!("{} {} {}", dns.query_type, dns.query, dns.answer));
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::{Dns, Path};

    fn flow() -> Flow {
        let party = |pod: &str, address: &str| Party {
            address: address.parse().ok(),
            namespace: "shop".into(),
            pod: pod.into(),
            workload: pod.into(),
            ..Party::default()
        };
        Flow {
            seq: 1,
            at_us: 1_000_000,
            node: "a".into(),
            kind: Kind::Drop,
            verdict: Verdict::Dropped,
            path: Path::Tunnel,
            protocol: "tcp".into(),
            source: party("cart", "10.0.0.1:4000"),
            destination: party("pay", "10.0.0.2:8080"),
            service: "pay.shop.svc.cluster.local".into(),
            reason: "NETFILTER_DROP".into(),
            ..Flow::default()
        }
    }

    #[test]
    fn a_drop_has_the_fields_that_scripts_for_hubble_read() {
        let line = line(&flow());
        assert_eq!(line["time"], "1970-01-01T00:00:01.000000Z");
        assert_eq!(line["node_name"], "a");
        let flow = &line["flow"];
        for (pointer, expected) in [
            ("/verdict", json!("DROPPED")),
            ("/drop_reason_desc", json!("DROP_REASON_UNKNOWN")),
            ("/IP/source", json!("10.0.0.1")),
            ("/IP/ipVersion", json!("IPv4")),
            ("/l4/TCP/destination_port", json!(8080)),
            ("/source/pod_name", json!("cart")),
            ("/destination/namespace", json!("shop")),
            ("/destination/workloads/0/name", json!("pay")),
            ("/destination_service/name", json!("pay")),
            ("/Type", json!("L3_L4")),
            ("/event_type/type", json!(1)),
            ("/traffic_direction", json!("EGRESS")),
            ("/Summary", json!("TCP drop path=tunnel reason=NETFILTER_DROP")),
        ] {
            assert_eq!(flow.pointer(pointer), Some(&expected), "{pointer} of {flow}");
        }
    }

    #[test]
    fn a_denial_is_a_policy_verdict_and_a_dns_answer_is_layer_seven() {
        let denied =
            line(&Flow { kind: Kind::Proxied, verdict: Verdict::Denied, side: Side::Server, ..flow() });
        assert_eq!(denied.pointer("/flow/drop_reason_desc"), Some(&json!("POLICY_DENIED")));
        assert_eq!(denied.pointer("/flow/event_type/type"), Some(&json!(5)));
        assert_eq!(denied.pointer("/flow/traffic_direction"), Some(&json!("INGRESS")));
        let dns = Dns { query: "a.b".into(), query_type: "A".into(), answer: "NXDOMAIN".into(), local: true };
        let asked = Flow {
            kind: Kind::Dns,
            verdict: Verdict::Forwarded,
            protocol: "dns".into(),
            latency_us: Some(3),
            dns: Some(dns),
            ..flow()
        };
        let asked = line(&asked);
        assert_eq!(asked.pointer("/flow/Type"), Some(&json!("L7")));
        assert_eq!(asked.pointer("/flow/l7/dns/query"), Some(&json!("a.b.")));
        assert_eq!(asked.pointer("/flow/l7/dns/rcode"), Some(&json!(3)));
        assert_eq!(asked.pointer("/flow/l7/latency_ns"), Some(&json!("3000")));
        assert!(asked.pointer("/flow/l4/UDP").is_some());
    }
}
