//! `certs`: certificates of workload identities. Each node holds those of its own pods.

use std::time::SystemTime;

use mesh_core::admin::{Certificate, ConfigDump};
use mesh_core::identity::SpiffeId;
use serde::Serialize;

use super::dumps::{Dumps, Names, none, select};
use super::span;
use crate::cli::{Filter, Global};
use crate::endpoint::{Endpoint, Places};
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

/// A certificate with the node that holds it.
#[derive(Debug, Serialize)]
struct Held {
    node: String,
    #[serde(flatten)]
    certificate: Certificate,
}

/// Runs the command.
pub async fn run(places: &Places, global: &Global, filter: &Filter) -> Report {
    let mut dumps = Dumps::fetch(places).await;
    if dumps.answers.is_empty() {
        return Report::default().unanswered(dumps.exit(), &dumps.errors);
    }
    let mut all: Vec<Held> = Vec::new();
    for (endpoint, dump) in &mut dumps.answers {
        let node = node_name(endpoint, dump);
        let certificates = std::mem::take(&mut dump.certificates);
        all.extend(certificates.into_iter().map(|certificate| Held { node: node.clone(), certificate }));
    }
    all.sort_by(|a, b| (&a.certificate.identity, &a.node).cmp(&(&b.certificate.identity, &b.node)));
    // Identities are SPIFFE URIs; what is none has no namespace, and is listed all the same.
    let identities: Vec<Option<SpiffeId>> =
        all.iter().map(|held| held.certificate.identity.parse().ok()).collect();
    let with_identity: Vec<(Held, Option<SpiffeId>)> = all.into_iter().zip(identities).collect();
    let held = match select(with_identity, filter, "certificate", names) {
        Ok(selected) => selected.into_iter().map(|(held, _)| held).collect::<Vec<_>>(),
        Err(report) => return report,
    };
    let now = SystemTime::now();
    let bad = held.iter().any(|h| judge(&h.certificate, now).1 == Tone::Bad);
    // Another node's certificates are nowhere else to be had: one that does not answer leaves a gap.
    Report::new(global.output, &held, || blocks(&held, filter, now))
        .exit(if bad { Exit::No } else { Exit::Fine })
        .unanswered(Exit::Unreachable, &dumps.errors)
}

fn names((held, identity): &(Held, Option<SpiffeId>)) -> Names<'_> {
    let identity = identity.as_ref();
    Names {
        namespace: identity.map_or("", SpiffeId::namespace),
        name: identity.map_or(&held.certificate.identity, SpiffeId::service_account),
        aliases: vec![&held.certificate.identity],
    }
}

/// As the dump's config says, else the endpoint.
fn node_name(endpoint: &Endpoint, dump: &ConfigDump) -> String {
    let name = ["/localNode", "/node/name"].iter().find_map(|at| dump.config.pointer(at)?.as_str());
    name.map_or_else(|| endpoint.to_string(), str::to_owned)
}

/// When it expires, and what to think of it.
fn judge(certificate: &Certificate, now: SystemTime) -> (String, Tone) {
    let Some(leaf) = certificate.cert_chain.first() else { return (String::new(), Tone::Bad) };
    let moment = |text: &str| humantime::parse_rfc3339_weak(text).ok();
    match (moment(&leaf.valid_from), moment(&leaf.expiration_time)) {
        (_, None) => (leaf.expiration_time.clone(), Tone::Warn),
        (_, Some(end)) if end <= now => {
            (format!("expired {} ago", span(now.duration_since(end).unwrap_or_default())), Tone::Bad)
        }
        (begin, Some(end)) => {
            let left = end.duration_since(now).unwrap_or_default();
            let life = begin.and_then(|begin| end.duration_since(begin).ok()).unwrap_or(left);
            // Renewal is due at half of the life: little left means that it does not work.
            let late = certificate.problem.is_some() || left < life / 4;
            (format!("in {}", span(left)), if late { Tone::Warn } else { Tone::Good })
        }
    }
}

fn blocks(held: &[Held], filter: &Filter, now: SystemTime) -> Vec<Block> {
    if held.is_empty() {
        return vec![Block::Line(Tone::Plain, none("certificates", filter))];
    }
    let mut table = Table::new(&["NODE", "IDENTITY", "STATE", "EXPIRES", "VALID FROM", "SERIAL", "PROBLEM"]);
    for Held { node, certificate } in held {
        let (expires, tone) = judge(certificate, now);
        let leaf = certificate.cert_chain.first();
        let state = if certificate.state == "Available" { Tone::Plain } else { Tone::Bad };
        table.row([
            node.clone().into(),
            certificate.identity.clone().into(),
            Cell::new(certificate.state.clone(), state),
            Cell::new(expires, tone),
            leaf.map_or_else(String::new, |leaf| leaf.valid_from.clone()).into(),
            leaf.map_or_else(String::new, |leaf| leaf.serial_number.clone()).into(),
            certificate.problem.clone().unwrap_or_default().into(),
        ]);
    }
    vec![Block::Table(table)]
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use mesh_core::admin::CertificateInfo;

    use super::*;

    #[test]
    fn a_certificate_is_judged_by_what_is_left_of_its_life() {
        let day = |n: u64| UNIX_EPOCH + Duration::from_secs(n * 86_400);
        let time = |at: SystemTime| humantime::format_rfc3339_seconds(at).to_string();
        let of = |end: SystemTime, problem: Option<&str>| Certificate {
            cert_chain: vec![CertificateInfo {
                valid_from: time(day(0)),
                expiration_time: time(end),
                ..CertificateInfo::default()
            }],
            problem: problem.map(str::to_owned),
            ..Certificate::default()
        };
        let now = day(100);
        assert_eq!(judge(&of(day(90), None), now), ("expired 10d ago".into(), Tone::Bad));
        assert_eq!(judge(&of(day(110), None), now), ("in 10d".into(), Tone::Warn), "a tenth is left");
        assert_eq!(judge(&of(day(300), None), now), ("in 200d".into(), Tone::Good));
        assert_eq!(judge(&of(day(300), Some("refused")), now).1, Tone::Warn);
        assert_eq!(judge(&Certificate::default(), now), (String::new(), Tone::Bad), "there is none");
    }
}
