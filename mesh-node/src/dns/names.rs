//! Which hostnames of the mesh a queried name may mean.
//!
//! A pod's resolver tries a short name with each entry of its search list, so that the agent is asked for
//! `api.example.com.shop.svc.cluster.local` before `api.example.com`. Taking the search list off again answers the
//! first question already. Names are lower case and without the final dot here.

#[cfg(test)]
mod tests;

use hickory_proto::rr::Name;

/// Entries of a search list that are looked at: what Kubernetes allows.
pub const MAX_SEARCH: usize = 32;

/// The suffix of Kubernetes names, for example `cluster.local`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterDomain {
    domain: String,
    services: String,
}

impl ClusterDomain {
    /// Takes a domain with or without a final dot, in any case.
    #[must_use]
    pub fn new(domain: &str) -> Self {
        let domain = normal(domain);
        Self { services: join("svc", &domain), domain }
    }

    /// Whether a hostname is one of a Kubernetes service: such a service without an address is headless.
    #[must_use]
    pub fn holds(&self, hostname: &str) -> bool {
        strip(hostname, &self.services).is_some()
    }

    /// The search list of a pod that brings none: what the kubelet writes for `dnsPolicy: ClusterFirst`.
    #[must_use]
    pub fn default_search(&self, namespace: &str) -> Vec<String> {
        vec![join(namespace, &self.services), self.services.clone(), self.domain.clone()]
    }
}

/// Brings a search list into the form of this module; empty entries (`.`) and those beyond [`MAX_SEARCH`] go.
#[must_use]
pub fn normal_search(list: &[String]) -> Vec<String> {
    list.iter().map(|entry| normal(entry)).filter(|entry| !entry.is_empty()).take(MAX_SEARCH).collect()
}

/// A hostname that the query may mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// What to look up.
    pub hostname: String,
    /// If a search domain was taken off: how many leading labels of the queried name are left.
    pub stripped: Option<usize>,
}

/// The queried name as text, or nothing if it can be no hostname (the root, or bytes that hostnames do not have).
#[must_use]
pub fn text(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label {
            match byte {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'*' => text.push(char::from(*byte)),
                b'A'..=b'Z' => text.push(char::from(byte.to_ascii_lowercase())),
                _ => return None,
            }
        }
    }
    (!text.is_empty()).then_some(text)
}

/// The hostnames that `name` may mean for a client, best first, each once: as queried, completed as Kubernetes
/// would, and both again without each search domain.
#[must_use]
pub fn candidates(name: &str, namespace: &str, domain: &ClusterDomain, search: &[String]) -> Vec<Candidate> {
    let mut list: Vec<Candidate> = Vec::with_capacity(8);
    let mut add = |hostname: String, stripped: Option<usize>| {
        if !list.iter().any(|known| known.hostname == hostname) {
            list.push(Candidate { hostname, stripped });
        }
    };
    let stripped =
        search.iter().filter_map(|suffix| strip(name, suffix)).map(|rest| (rest, Some(labels(rest))));
    for (base, left) in std::iter::once((name, None)).chain(stripped) {
        add(base.to_owned(), left);
        for expanded in expand(base, namespace, domain) {
            add(expanded, left);
        }
    }
    list
}

/// What a client may have left off: the namespace, `svc`, the cluster's domain. Names of one more label are pods
/// with a hostname (`<pod>.<service>…`).
fn expand(name: &str, namespace: &str, domain: &ClusterDomain) -> Vec<String> {
    let in_namespace = || join(&join(name, namespace), &domain.services);
    let in_services = || join(name, &domain.services);
    let in_domain = || join(name, &domain.domain);
    let names_svc = strip(name, "svc").is_some();
    match labels(name) {
        1 => vec![in_namespace()],
        2 => vec![in_services(), in_namespace()],
        3 if names_svc => vec![in_domain(), in_services()],
        3 => vec![in_services()],
        4 if names_svc => vec![in_domain()],
        _ => Vec::new(),
    }
}

/// The wildcard hosts that cover a hostname, longest first: `*.b.c`, `*.c` for `a.b.c`.
pub fn wildcards(hostname: &str) -> impl Iterator<Item = String> + '_ {
    hostname.match_indices('.').map(|(dot, _)| format!("*{}", &hostname[dot..]))
}

/// What is before `.suffix`, if there is anything.
fn strip<'a>(name: &'a str, suffix: &str) -> Option<&'a str> {
    name.strip_suffix(suffix)?.strip_suffix('.').filter(|rest| !rest.is_empty())
}

fn labels(name: &str) -> usize {
    name.split('.').count()
}

fn join(left: &str, right: &str) -> String {
    if right.is_empty() { left.to_owned() } else { format!("{left}.{right}") }
}

fn normal(domain: &str) -> String {
    domain.trim_matches('.').to_ascii_lowercase()
}
