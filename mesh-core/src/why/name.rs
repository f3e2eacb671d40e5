//! From what people type to the objects that they mean.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::suggest::suggest;
use crate::state::{MeshState, ServiceEndpoints, Workload};

/// Who wants to connect to whom, as typed.
///
/// A reference is one of `namespace/name` (a service, else a pod, else the owner of pods, such as a Deployment),
/// `service/namespace/name`, `workload/namespace/name`, a hostname, an IP address, a workload uid, or a bare `name`
/// (for a destination: in the source's namespace; for a source: when only one namespace has it).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The workload that connects.
    pub src: String,
    /// Workload, service or address to connect to.
    pub dst: String,
    /// Port as the client uses it.
    pub port: Option<u16>,
}

/// Why what was typed is no question.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// One end is missing.
    #[error("the {0} is empty; give namespace/name, a hostname or an address")]
    Empty(&'static str),
    /// The text after the colon is no port.
    #[error("{dst:?}: {port:?} is no port; give a number from 1 to 65535")]
    Port {
        /// The destination as typed.
        dst: String,
        /// The part that should be a port.
        port: String,
    },
    /// Two ports were given.
    #[error("{dst:?} and port {port} name different ports; give one")]
    TwoPorts {
        /// The destination as typed.
        dst: String,
        /// The other port.
        port: u16,
    },
}

impl Question {
    /// Reads `SRC`, `DST[:PORT]` and a port given separately.
    ///
    /// # Errors
    /// An end is empty, or the port is no port or given twice.
    pub fn new(src: &str, dst: &str, port: Option<u16>) -> Result<Self, QuestionError> {
        let (name, in_dst) = split_port(dst)?;
        if src.is_empty() {
            return Err(QuestionError::Empty("source"));
        }
        if name.is_empty() {
            return Err(QuestionError::Empty("destination"));
        }
        if let (Some(a), Some(b)) = (in_dst, port)
            && a != b
        {
            return Err(QuestionError::TwoPorts { dst: dst.to_owned(), port: b });
        }
        if port == Some(0) {
            return Err(QuestionError::Port { dst: dst.to_owned(), port: "0".to_owned() });
        }
        Ok(Self { src: src.to_owned(), dst: name.to_owned(), port: in_dst.or(port) })
    }
}

/// Takes `:PORT` off a reference. A bare IPv6 address has no port; with one it is written in brackets.
fn split_port(dst: &str) -> Result<(&str, Option<u16>), QuestionError> {
    let (name, port) = match dst.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, "")) => return Ok((ip, None)),
        Some((ip, rest)) => (ip, rest.strip_prefix(':').unwrap_or(rest)),
        None if dst.parse::<IpAddr>().is_ok() => return Ok((dst, None)),
        None => match dst.rsplit_once(':') {
            Some(parts) => parts,
            None => return Ok((dst, None)),
        },
    };
    match port.parse() {
        Ok(number) if number > 0 => Ok((name, Some(number))),
        _ => Err(QuestionError::Port { dst: dst.to_owned(), port: port.to_owned() }),
    }
}

/// Why a reference names nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{role} {name:?}: {problem}")]
#[serde(rename_all = "camelCase")]
pub struct NameError {
    /// `source` or `destination`.
    pub role: String,
    /// What was typed.
    pub name: String,
    /// What is wrong, and what would be right.
    pub problem: String,
    /// Names that were perhaps meant, best first.
    pub suggestions: Vec<String>,
}

/// What a destination is.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// A workload, by name or by its own address.
    Workload(Arc<Workload>),
    /// A service, by name or by its virtual address.
    Service(ServiceEndpoints),
    /// An address that the mesh knows nothing about.
    Address(IpAddr),
}

/// The kind that a reference insists on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Only {
    Any,
    Service,
    Workload,
}

/// A reference in its parts.
struct Reference<'a> {
    only: Only,
    namespace: Option<&'a str>,
    name: &'a str,
}

impl<'a> Reference<'a> {
    fn read(text: &'a str) -> Self {
        let (only, rest) = match text.split_once('/') {
            Some(("service" | "svc", rest)) if rest.contains('/') => (Only::Service, rest),
            Some(("workload" | "pod", rest)) if rest.contains('/') => (Only::Workload, rest),
            _ => (Only::Any, text),
        };
        match rest.split_once('/') {
            Some((namespace, name)) => Self { only, namespace: Some(namespace), name },
            None => Self { only, namespace: None, name: rest },
        }
    }
}

/// The workload that a source names.
pub(super) fn source(state: &MeshState, text: &str) -> Result<Arc<Workload>, NameError> {
    if let Some(workload) = state.workload(text) {
        return Ok(workload.clone());
    }
    let error = |problem: String, suggestions| NameError {
        role: "source".to_owned(),
        name: text.to_owned(),
        problem,
        suggestions,
    };
    if let Ok(ip) = text.parse::<IpAddr>() {
        let network = &state.options().network;
        return state.workload_by_ip(network, ip).cloned().ok_or_else(|| {
            error(
                "no workload of this node's network has this address; only workloads can be a source".into(),
                vec![],
            )
        });
    }
    let reference = Reference::read(text);
    if reference.only == Only::Service {
        return Err(error("a service opens no connections; name a workload".into(), vec![]));
    }
    let found = pods(state, reference.namespace, reference.name);
    let namespaces: Vec<&str> = {
        let mut all: Vec<&str> = found.iter().map(|w| &*w.namespace).collect();
        all.dedup();
        all
    };
    match (found.first(), namespaces.len()) {
        (Some(workload), 1) => Ok((*workload).clone()),
        (Some(_), _) => {
            let full = namespaces.iter().map(|ns| format!("{ns}/{}", reference.name)).collect();
            Err(error("several namespaces have a workload of this name; name one of them".into(), full))
        }
        (None, _) => {
            Err(error("no workload has this name; give namespace/name".into(), near_workloads(state, text)))
        }
    }
}

/// What a destination names, as a client like `client` sees it.
pub(super) fn destination(state: &MeshState, text: &str, client: &Workload) -> Result<Target, NameError> {
    if let Some(workload) = state.workload(text) {
        return Ok(Target::Workload(workload.clone()));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(by_address(state, ip, client));
    }
    let reference = Reference::read(text);
    let namespace = reference.namespace.unwrap_or(&client.namespace);
    if reference.only != Only::Workload
        && let Some(service) = service(state, &reference, namespace, client)
    {
        return Ok(Target::Service(service.clone()));
    }
    if reference.only != Only::Service
        && let Some(workload) = pods(state, Some(namespace), reference.name).first()
    {
        return Ok(Target::Workload((*workload).clone()));
    }
    let what = match reference.only {
        Only::Any => "service or workload",
        Only::Service => "service",
        Only::Workload => "workload",
    };
    let names: Vec<String> = service_names(state).chain(workload_names(state)).collect();
    let wanted = format!("{namespace}/{}", reference.name);
    Err(NameError {
        role: "destination".to_owned(),
        name: text.to_owned(),
        problem: format!("no {what} has this name in namespace {namespace}; give namespace/name"),
        suggestions: suggest(&wanted, names.iter().map(String::as_str)),
    })
}

fn by_address(state: &MeshState, ip: IpAddr, client: &Workload) -> Target {
    let service = state.service_by_ip(&client.network, ip, Some(&client.namespace));
    match (service, state.workload_by_ip(&client.network, ip)) {
        (Some(service), _) => Target::Service(service.clone()),
        (None, Some(workload)) => Target::Workload(workload.clone()),
        (None, None) => Target::Address(ip),
    }
}

fn service<'a>(
    state: &'a MeshState,
    reference: &Reference<'_>,
    namespace: &str,
    client: &Workload,
) -> Option<&'a ServiceEndpoints> {
    if reference.namespace.is_none()
        && let Some(service) = state.service_by_hostname(reference.name, Some(&client.namespace))
    {
        return Some(service);
    }
    let mut found: Vec<_> = state
        .services()
        .filter(|s| s.service.host.namespace() == namespace)
        .filter(|s| &*s.service.name == reference.name || s.service.host.hostname() == reference.name)
        .collect();
    // One name may stand for several hostnames (a ServiceEntry); the first one by name is always the same.
    found.sort_by(|a, b| a.service.host.key().cmp(b.service.host.key()));
    found.first().copied()
}

/// Pods of a name, else pods of an owner of that name; ordered by namespace and uid.
fn pods<'a>(state: &'a MeshState, namespace: Option<&str>, name: &str) -> Vec<&'a Arc<Workload>> {
    let within = |w: &&Arc<Workload>| namespace.is_none_or(|ns| &*w.namespace == ns);
    let ordered = |mut list: Vec<&'a Arc<Workload>>| {
        list.sort_by(|a, b| (&a.namespace, &a.uid).cmp(&(&b.namespace, &b.uid)));
        list
    };
    let exact = ordered(state.workloads().filter(within).filter(|w| &*w.name == name).collect());
    if !exact.is_empty() {
        return exact;
    }
    ordered(state.workloads().filter(within).filter(|w| &*w.workload_name == name).collect())
}

fn near_workloads(state: &MeshState, wanted: &str) -> Vec<String> {
    let names: Vec<String> = workload_names(state).collect();
    suggest(wanted, names.iter().map(String::as_str))
}

fn workload_names(state: &MeshState) -> impl Iterator<Item = String> + '_ {
    state.workloads().map(|w| format!("{}/{}", w.namespace, w.name))
}

fn service_names(state: &MeshState) -> impl Iterator<Item = String> + '_ {
    state.services().map(|s| format!("{}/{}", s.service.host.namespace(), s.service.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_taken_off_names_and_addresses_of_both_families() {
        for (dst, name, port) in [
            ("shop/backend:8080", "shop/backend", Some(8080)),
            ("shop/backend", "shop/backend", None),
            ("10.0.0.1:80", "10.0.0.1", Some(80)),
            ("10.0.0.1", "10.0.0.1", None),
            ("[fd00::1]:80", "fd00::1", Some(80)),
            ("[fd00::1]", "fd00::1", None),
            ("fd00::1", "fd00::1", None),
        ] {
            let question = Question::new("shop/frontend", dst, None).unwrap();
            assert_eq!((question.dst.as_str(), question.port), (name, port), "{dst}");
        }
    }

    #[test]
    fn what_is_no_question_says_what_is_wrong() {
        for (src, dst, port, expected) in [
            ("", "b", None, "the source is empty"),
            ("a", "", None, "the destination is empty"),
            ("a", "b:http", None, "\"http\" is no port"),
            ("a", "b:0", None, "\"0\" is no port"),
            ("a", "b:70000", None, "is no port"),
            ("a", "b", Some(0), "is no port"),
            ("a", "b:80", Some(81), "different ports"),
        ] {
            let error = Question::new(src, dst, port).unwrap_err().to_string();
            assert!(error.contains(expected), "{dst}: {error}");
        }
        assert!(Question::new("a", "b:80", Some(80)).is_ok(), "the same port twice is one port");
    }
}
