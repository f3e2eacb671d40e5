//! Which events somebody wants to see. The words are those of `meshctl flows` and of the query of `/flows`.

use super::{ConnectionId, Flow, Kind, Party, Path, Verdict};

/// Conditions; all that are given have to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Either end is in this namespace.
    pub namespace: Option<String>,
    /// Either end is this pod or workload: a name, or `namespace/name`.
    pub pod: Option<String>,
    /// The client is.
    pub from: Option<String>,
    /// The server is.
    pub to: Option<String>,
    /// The service that was asked for: its hostname or the first labels of it.
    pub service: Option<String>,
    /// Part of either end's identity.
    pub identity: Option<String>,
    /// The server's port.
    pub port: Option<u16>,
    /// What became of it.
    pub verdict: Option<Verdict>,
    /// What carried it.
    pub path: Option<Path>,
    /// What the event says.
    pub kind: Option<Kind>,
    /// Part of the reason.
    pub reason: Option<String>,
    /// Connected or answered no faster than this, microseconds.
    pub latency_us: Option<u64>,
    /// `tcp`, `udp` or `dns`.
    pub protocol: Option<String>,
    /// One connection.
    pub connection: Option<ConnectionId>,
}

/// A condition that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value}: {expected}")]
pub struct FilterError {
    name: &'static str,
    value: String,
    expected: String,
}

/// The names of the conditions.
pub const NAMES: [&str; 14] = [
    "namespace",
    "pod",
    "from",
    "to",
    "service",
    "identity",
    "port",
    "verdict",
    "path",
    "kind",
    "reason",
    "latency",
    "protocol",
    "connection",
];

fn word<T: Copy>(
    name: &'static str,
    value: &str,
    all: &[T],
    text: impl Fn(T) -> &'static str,
) -> Result<T, FilterError> {
    all.iter().copied().find(|item| text(*item) == value).ok_or_else(|| {
        let words: Vec<&str> = all.iter().map(|item| text(*item)).collect();
        FilterError { name, value: value.to_owned(), expected: format!("give one of {}", words.join(", ")) }
    })
}

impl Filter {
    /// Reads the conditions of a query; empty ones are none.
    ///
    /// # Errors
    /// A value that does not fit its name, with what would.
    pub fn parse(parameter: impl Fn(&str) -> Option<String>) -> Result<Self, FilterError> {
        let text = |name: &str| parameter(name).filter(|value| !value.is_empty());
        let number = |name: &'static str, expected: &str| {
            let parse = |value: String| {
                value.parse::<u64>().map_err(|_no_number| FilterError {
                    name,
                    value: value.clone(),
                    expected: expected.to_owned(),
                })
            };
            text(name).map(parse).transpose()
        };
        let port = number("port", "give a number from 1 to 65535")?;
        let port = port.map(u16::try_from).transpose().map_err(|_too_large| FilterError {
            name: "port",
            value: text("port").unwrap_or_default(),
            expected: "give a number from 1 to 65535".to_owned(),
        })?;
        let connection = text("connection").map(|value| {
            value.parse().map_err(|expected| FilterError { name: "connection", value, expected })
        });
        Ok(Self {
            namespace: text("namespace"),
            pod: text("pod"),
            from: text("from"),
            to: text("to"),
            service: text("service"),
            identity: text("identity"),
            port,
            verdict: text("verdict")
                .map(|v| word("verdict", &v, &Verdict::ALL, Verdict::as_str))
                .transpose()?,
            path: text("path").map(|v| word("path", &v, &Path::ALL, Path::as_str)).transpose()?,
            kind: text("kind").map(|v| word("kind", &v, &Kind::ALL, Kind::as_str)).transpose()?,
            reason: text("reason"),
            latency_us: number("latency", "give microseconds as a number")?,
            protocol: text("protocol")
                .map(|v| word("protocol", &v, &["tcp", "udp", "dns"], |p| p))
                .transpose()?
                .map(str::to_owned),
            connection: connection.transpose()?,
        })
    }

    /// The conditions as names and values of a query.
    #[must_use]
    pub fn parameters(&self) -> Vec<(&'static str, String)> {
        let text = |value: &Option<String>| value.clone();
        let all = [
            ("namespace", text(&self.namespace)),
            ("pod", text(&self.pod)),
            ("from", text(&self.from)),
            ("to", text(&self.to)),
            ("service", text(&self.service)),
            ("identity", text(&self.identity)),
            ("port", self.port.map(|port| port.to_string())),
            ("verdict", self.verdict.map(|verdict| verdict.as_str().to_owned())),
            ("path", self.path.map(|path| path.as_str().to_owned())),
            ("kind", self.kind.map(|kind| kind.as_str().to_owned())),
            ("reason", text(&self.reason)),
            ("latency", self.latency_us.map(|latency| latency.to_string())),
            ("protocol", text(&self.protocol)),
            ("connection", self.connection.map(|id| id.to_string())),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Whether an event is wanted.
    #[must_use]
    pub fn wants(&self, flow: &Flow) -> bool {
        let ends = [&flow.source, &flow.destination];
        let any = |wanted: &Option<String>, is: &dyn Fn(&Party, &str) -> bool| {
            wanted.as_deref().is_none_or(|wanted| ends.iter().any(|end| is(end, wanted)))
        };
        let one =
            |wanted: &Option<String>, end: &Party| wanted.as_deref().is_none_or(|name| is_named(end, name));
        let part = |wanted: &Option<String>, text: &str| {
            wanted
                .as_deref()
                .is_none_or(|part| text.to_ascii_lowercase().contains(&part.to_ascii_lowercase()))
        };
        any(&self.namespace, &|end, name| end.namespace == name)
            && any(&self.pod, &is_named)
            && one(&self.from, &flow.source)
            && one(&self.to, &flow.destination)
            && self.service.as_deref().is_none_or(|name| is_service(&flow.service, name))
            && any(&self.identity, &|end, part| end.identity.contains(part))
            && self.port.is_none_or(|port| self.is_port(flow, port))
            && self.verdict.is_none_or(|verdict| flow.verdict == verdict)
            && self.path.is_none_or(|path| flow.path == path)
            && self.kind.is_none_or(|kind| flow.kind == kind)
            && part(&self.reason, &flow.reason)
            && self.latency_us.is_none_or(|least| flow.latency_us.is_some_and(|latency| latency >= least))
            && self.protocol.as_deref().is_none_or(|protocol| flow.protocol == protocol)
            && self.connection.is_none_or(|id| flow.connection == Some(id))
    }

    #[allow(clippy::unused_self, reason = "reads as the other conditions do")]
    fn is_port(&self, flow: &Flow, port: u16) -> bool {
        let ports = [flow.destination.address, flow.asked];
        ports.into_iter().flatten().any(|address| address.port() == port)
    }
}

/// A pod, its owner, or an address, alone or with the namespace before it.
fn is_named(end: &Party, name: &str) -> bool {
    let of_pod = |namespace: Option<&str>, name: &str| {
        namespace.is_none_or(|namespace| end.namespace == namespace)
            && !name.is_empty()
            && (end.pod == name || end.workload == name)
    };
    match name.split_once('/') {
        Some((namespace, "")) => end.namespace == namespace,
        Some((namespace, name)) => of_pod(Some(namespace), name),
        None => of_pod(None, name) || end.address.is_some_and(|address| address.ip().to_string() == name),
    }
}

/// `pay`, `pay.shop` and `pay.shop.svc.cluster.local` all mean that service, and so does `shop/pay`.
fn is_service(hostname: &str, name: &str) -> bool {
    let dotted = match name.split_once('/') {
        Some((namespace, name)) => format!("{name}.{namespace}"),
        None => name.to_owned(),
    };
    hostname.strip_prefix(&dotted).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> Flow {
        let party = |pod: &str, workload: &str, address: &str| Party {
            address: address.parse().ok(),
            namespace: "shop".into(),
            pod: pod.into(),
            workload: workload.into(),
            identity: format!("spiffe://cluster.local/ns/shop/sa/{workload}"),
            node: "a".into(),
        };
        Flow {
            kind: Kind::Drop,
            verdict: Verdict::Dropped,
            path: Path::Tunnel,
            protocol: "tcp".into(),
            source: party("cart-1", "cart", "10.0.0.1:4000"),
            destination: party("pay-1", "pay", "10.0.0.2:8080"),
            asked: "10.96.0.1:80".parse().ok(),
            service: "pay.shop.svc.cluster.local".into(),
            reason: "NETFILTER_DROP".into(),
            latency_us: Some(1500),
            connection: Some(ConnectionId(7)),
            ..Flow::default()
        }
    }

    fn filter(query: &[(&str, &str)]) -> Result<Filter, FilterError> {
        let find = |name: &str| query.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        Filter::parse(find)
    }

    #[test]
    fn each_condition_tells_what_it_means_from_what_it_does_not() {
        let cases: [(&str, &[&str], &[&str]); 14] = [
            ("namespace", &["shop"], &["other", "sho"]),
            ("pod", &["cart-1", "pay", "shop/pay-1", "10.0.0.2", "shop/"], &["car", "other/pay", "10.0.0.3"]),
            ("from", &["cart", "shop/cart-1"], &["pay"]),
            ("to", &["pay"], &["cart", "shop/cart"]),
            ("service", &["pay", "shop/pay", "pay.shop", "pay.shop.svc.cluster.local"], &["pa", "pay.other"]),
            ("identity", &["sa/cart", "spiffe://cluster.local"], &["sa/other"]),
            ("port", &["8080", "80"], &["4000"]),
            ("verdict", &["dropped"], &["forwarded"]),
            ("path", &["tunnel"], &["fast"]),
            ("kind", &["drop"], &["closed"]),
            ("reason", &["netfilter", "DROP"], &["NO_SOCKET"]),
            ("latency", &["1500", "3"], &["1501"]),
            ("protocol", &["tcp"], &["dns"]),
            ("connection", &["0000000000000007"], &["0000000000000008"]),
        ];
        for (name, right, wrong) in cases {
            for value in right {
                assert!(filter(&[(name, value)]).unwrap().wants(&flow()), "{name}={value}");
            }
            for value in wrong {
                assert!(!filter(&[(name, value)]).unwrap().wants(&flow()), "{name}={value}");
            }
        }
        let both = [("pod", "cart"), ("verdict", "forwarded")];
        assert!(!filter(&both).unwrap().wants(&flow()), "all conditions have to hold");
    }

    #[test]
    fn a_condition_that_cannot_be_read_names_what_would_be_right() {
        for (name, value, hint) in [
            ("verdict", "DROPPED", "give one of forwarded, denied, dropped, failed"),
            ("path", "quick", "fast, tunnel, waypoint, plain"),
            ("kind", "x", "connect"),
            ("port", "70000", "1 to 65535"),
            ("port", "http", "1 to 65535"),
            ("latency", "5ms", "microseconds"),
            ("protocol", "sctp", "tcp, udp, dns"),
            ("connection", "7", "16 hex digits"),
        ] {
            let error = filter(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(hint) && error.contains(name) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn a_filter_survives_the_way_through_a_query() {
        let query: Vec<(&str, &str)> = vec![
            ("namespace", "shop"),
            ("port", "80"),
            ("verdict", "denied"),
            ("latency", "20"),
            ("connection", "00000000000000ff"),
        ];
        let filter = filter(&query).unwrap();
        let parameters = filter.parameters();
        let find = |name: &str| parameters.iter().find(|(key, _)| *key == name).map(|(_, v)| v.clone());
        assert_eq!(Filter::parse(find).unwrap(), filter);
        assert!(parameters.iter().all(|(name, _)| NAMES.contains(name)));
    }
}
