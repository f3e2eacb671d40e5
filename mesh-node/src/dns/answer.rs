//! The decision about one query: an answer from the model of the mesh, or whether another server has to be asked.
//!
//! Rules are those of Istio ambient's DNS proxy. Two rules protect applications: a name that the mesh knows is
//! never denied (no address of the wanted family is an empty answer, not NXDOMAIN, which would end a resolver's
//! search for the other family too), and a service without an address that is no headless Kubernetes service is
//! left to the real DNS.
//!
//! Other than there, an endpoint of a headless service is left out if it is on another network than the client:
//! its address would reach nobody, or somebody else.

#[cfg(test)]
mod tests;

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use mesh_core::state::{MeshState, ServiceEndpoints, Workload};

use super::names::{self, Candidate, ClusterDomain};

/// How long a client may keep an answer, in seconds (Istio's value).
pub const TTL: u32 = 30;
/// The largest UDP query that is read whole; told to clients in EDNS.
pub const MAX_PAYLOAD: u16 = 4096;

/// What holds for every query of an agent.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Suffix of Kubernetes names.
    pub domain: ClusterDomain,
    /// Among services of one hostname, one of this namespace wins over the first, after the client's own namespace
    /// and canonical ones (Istio's `PREFERED_SERVICE_NAMESPACE`).
    pub preferred_namespace: Option<String>,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// The workload of the pod.
    pub workload: &'a Workload,
    /// Its search list, normalised ([`names::normal_search`]).
    pub search: &'a [String],
}

/// What to do with a query.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Send this.
    Reply(Box<Message>),
    /// Ask the server that the application asked.
    Forward,
}

/// Decides about a query with exactly one question. Without a client (the pod's workload is not known) the answer
/// is SERVFAIL, which makes resolvers try again. `rng` shuffles addresses.
#[must_use]
pub fn answer(
    query: &Message,
    client: Option<Client<'_>>,
    state: &MeshState,
    rules: &Rules,
    rng: &mut fastrand::Rng,
) -> Outcome {
    let Some(client) = client else { return reply(failure(query, ResponseCode::ServFail)) };
    let Some(question) = query.queries.first() else { return reply(failure(query, ResponseCode::FormErr)) };
    let family = Family::of(question.query_type());
    let (Some(family), OpCode::Query, DNSClass::IN) =
        (family, query.metadata.op_code, question.query_class())
    else {
        return Outcome::Forward;
    };
    let Some(found) = names::text(question.name()).and_then(|name| find(&name, client, state, rules)) else {
        return Outcome::Forward;
    };
    let mut addresses = found.addresses(family, &client.workload.network);
    rng.shuffle(&mut addresses);
    let mut message = response(query);
    message.metadata.authoritative = true;
    message.insert_answers(found.records(question.name(), &addresses));
    reply(message)
}

fn reply(message: Message) -> Outcome {
    Outcome::Reply(Box::new(message))
}

/// An answer without records.
#[must_use]
pub fn failure(query: &Message, code: ResponseCode) -> Message {
    let mut message = response(query);
    message.metadata.response_code = code;
    message
}

/// The start of every answer: id, flags and question of the query, EDNS if the client speaks it (RFC 6891, 6.1.1).
fn response(query: &Message) -> Message {
    let mut message = Message::response(query.metadata.id, query.metadata.op_code);
    message.metadata = Metadata::response_from_request(&query.metadata);
    message.metadata.recursion_available = true;
    message.add_queries(query.queries.iter().cloned());
    if let Some(theirs) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_PAYLOAD).set_dnssec_ok(theirs.flags().dnssec_ok);
        message.set_edns(edns);
    }
    message
}

/// Address family of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(kind: RecordType) -> Option<Self> {
        match kind {
            RecordType::A => Some(Self::V4),
            RecordType::AAAA => Some(Self::V6),
            _ => None,
        }
    }

    fn has(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }
}

/// The service that a name means.
struct Found<'a> {
    service: &'a ServiceEndpoints,
    candidate: Candidate,
    by_wildcard: bool,
}

fn find<'a>(name: &str, client: Client<'_>, state: &'a MeshState, rules: &Rules) -> Option<Found<'a>> {
    for candidate in names::candidates(name, &client.workload.namespace, &rules.domain, client.search) {
        if let Some(service) = best(&candidate.hostname, client.workload, state, rules) {
            return Some(Found { service, candidate, by_wildcard: false });
        }
        let by_wildcard =
            names::wildcards(&candidate.hostname).find_map(|host| best(&host, client.workload, state, rules));
        if let Some(service) = by_wildcard {
            return Some(Found { service, candidate, by_wildcard: true });
        }
    }
    None
}

/// The service of exactly this hostname that the client sees and that can be answered: it has an address, or is
/// headless. Of several: own namespace, canonical, preferred namespace, first seen.
fn best<'a>(
    hostname: &str,
    client: &Workload,
    state: &'a MeshState,
    rules: &Rules,
) -> Option<&'a ServiceEndpoints> {
    let rank = |candidate: &ServiceEndpoints| {
        let namespace = candidate.service.host.namespace();
        let preferred = rules.preferred_namespace.as_deref() == Some(namespace);
        (namespace == &*client.namespace, candidate.service.canonical, preferred)
    };
    state
        .services_by_hostname(hostname)
        .filter(|s| s.service.visible_to(Some(&client.namespace)))
        .filter(|s| !s.service.vips.is_empty() || rules.domain.holds(s.service.host.hostname()))
        .reduce(|best, other| if rank(other) > rank(best) { other } else { best })
}

impl Found<'_> {
    /// Addresses of one family that the client can dial: virtual ones of its network, else one per endpoint that
    /// takes traffic.
    fn addresses(&self, family: Family, network: &str) -> Vec<IpAddr> {
        let service = &self.service.service;
        let wanted = |ip: &IpAddr| family.has(*ip) && service.ip_families.allow(*ip);
        if service.vips.is_empty() {
            let endpoints = self.service.endpoints().filter(|e| &*e.workload.network == network);
            endpoints.filter_map(|e| e.workload.addresses.iter().copied().find(wanted)).collect()
        } else {
            let vips = service.vips.iter().filter(|vip| &*vip.network == network);
            vips.map(|vip| vip.ip).filter(wanted).collect()
        }
    }

    /// The answer section. A name from which a search domain was taken becomes an alias of the shorter one, so that
    /// the client learns it; a wildcard has no name of its own and answers as asked.
    fn records(&self, asked: &Name, addresses: &[IpAddr]) -> Vec<Record> {
        if addresses.is_empty() {
            return Vec::new();
        }
        let shorter = self.candidate.stripped.filter(|_| !self.by_wildcard);
        let shorter = shorter.and_then(|labels| Name::from_labels(asked.iter().take(labels)).ok());
        let owner = shorter.as_ref().unwrap_or(asked);
        let alias = shorter
            .as_ref()
            .map(|name| Record::from_rdata(asked.clone(), TTL, RData::CNAME(CNAME(name.clone()))));
        let records = addresses.iter().map(|ip| match ip {
            IpAddr::V4(ip) => Record::from_rdata(owner.clone(), TTL, RData::A(A(*ip))),
            IpAddr::V6(ip) => Record::from_rdata(owner.clone(), TTL, RData::AAAA(AAAA(*ip))),
        });
        alias.into_iter().chain(records).collect()
    }
}
