//! Evaluation of rules.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::policy::Truth;
use serde_json::Value;

use super::compile::{Check, Principal, Rule, Test, Values};
use super::facts::{Claims, Facts};
use super::text::{Text, truth};

impl Rule {
    /// All parts hold; of each of `from` and `to` one entry is enough. What is compared quickest comes first: most rules
    /// are about other paths.
    pub(super) fn truth(&self, facts: &Facts<'_>) -> Truth {
        let mut least = Truth::True;
        for alternatives in [&self.to, &self.from] {
            if !alternatives.is_empty() {
                least = least.min(max(alternatives.iter().map(|checks| all(checks, facts))));
                if least == Truth::False {
                    return least;
                }
            }
        }
        least.min(all(&self.when, facts))
    }
}

fn all(checks: &[Check], facts: &Facts<'_>) -> Truth {
    let mut least = Truth::True;
    for check in checks {
        least = least.min(check.truth(facts));
        if least == Truth::False {
            break;
        }
    }
    least
}

fn max(truths: impl Iterator<Item = Truth>) -> Truth {
    let mut most = Truth::False;
    for truth in truths {
        most = most.max(truth);
        if most == Truth::True {
            break;
        }
    }
    most
}

impl Check {
    fn truth(&self, facts: &Facts<'_>) -> Truth {
        match (self.test.truth(facts), self.negated) {
            (Truth::True, true) => Truth::False,
            (Truth::False, true) => Truth::True,
            (truth, _) => truth,
        }
    }
}

impl<T> Values<T> {
    fn any(&self, test: impl Fn(&T) -> bool) -> Truth {
        self.most(|value| truth(test(value)))
    }

    fn most(&self, test: impl Fn(&T) -> Truth) -> Truth {
        let most = max(self.list.iter().map(test));
        if self.unreadable { most.max(Truth::Unknown) } else { most }
    }
}

impl Test {
    fn truth(&self, facts: &Facts<'_>) -> Truth {
        match self {
            Self::Principal(_)
            | Self::Namespace(_)
            | Self::ServiceAccount(_)
            | Self::TrustDomain(_)
            | Self::SourceIp(_)
            | Self::DestinationIp(_)
            | Self::Port(_)
            | Self::Sni(_) => self.of_connection(facts),
            Self::Unreadable => Truth::Unknown,
            _ => self.of_request(facts),
        }
    }

    /// What is known of streams, too. Without an identity no value about it matches, readable or not.
    fn of_connection(&self, facts: &Facts<'_>) -> Truth {
        let identity = facts.source.identity.as_ref();
        match (self, identity) {
            (
                Self::Principal(_) | Self::Namespace(_) | Self::ServiceAccount(_) | Self::TrustDomain(_),
                None,
            ) => Truth::False,
            (Self::Principal(values), Some(id)) => values.any(|principal| match principal {
                Principal::Exact { trust_domain, namespace, service_account } => {
                    id.service_account() == &**service_account
                        && id.namespace() == &**namespace
                        && id.trust_domain() == &**trust_domain
                }
                Principal::Text(Text::Present) => true,
                Principal::Text(text) => text.matches(facts.principal().unwrap_or("").as_bytes()),
            }),
            (Self::Namespace(values), Some(id)) => values.any(|text| text.matches(id.namespace().as_bytes())),
            (Self::TrustDomain(values), Some(id)) => {
                values.any(|text| text.matches(id.trust_domain().as_bytes()))
            }
            (Self::ServiceAccount(values), Some(id)) => values
                .any(|(namespace, name)| id.namespace() == &**namespace && id.service_account() == &**name),
            (Self::SourceIp(values), _) => contains(values, facts.source.address.ip()),
            (Self::DestinationIp(values), _) => contains(values, facts.destination.ip()),
            (Self::Port(values), _) => values.any(|port| *port == facts.port),
            (Self::Sni(values), _) => values.any(|text| text.matches_ignoring_case(facts.sni.as_bytes())),
            _ => Truth::Unknown,
        }
    }

    fn of_request(&self, facts: &Facts<'_>) -> Truth {
        let Some(head) = facts.http else { return Truth::Unknown };
        match self {
            Self::RemoteIp(values) => facts.remote_ip().map_or(Truth::Unknown, |ip| contains(values, ip)),
            Self::Host(values) => values.any(|text| text.matches_host(head.authority)),
            Self::Method(values) => values.any(|text| text.matches(head.method.as_str().as_bytes())),
            Self::Path(values) => values.most(|pattern| pattern.truth(facts.path(head))),
            Self::Header { name, values } => values.most(|text| header(text, head, name)),
            Self::RequestPrincipal(values) => match facts.claims {
                Claims::Unknown => Truth::Unknown,
                _ => match facts.request_principal() {
                    Some(principal) => values.any(|text| text.matches(principal.as_bytes())),
                    None => Truth::False,
                },
            },
            Self::Claim { path, values } => match facts.claims {
                Claims::Unknown => Truth::Unknown,
                Claims::None => Truth::False,
                Claims::Known(claims) => {
                    let mut steps = path.iter();
                    let first = steps.next().and_then(|name| claims.get(&**name));
                    let found =
                        first.and_then(|value| steps.try_fold(value, |value, name| value.get(&**name)));
                    found.map_or(Truth::False, |value| values.most(|text| claim(text, value)))
                }
            },
            _ => Truth::Unknown,
        }
    }
}

fn contains(values: &Values<IpNet>, ip: IpAddr) -> Truth {
    let ip = ip.to_canonical();
    values.any(|net| net.contains(&ip))
}

/// A header that is there more than once is joined with commas in Envoy, so that a second line hides the first from a
/// DENY rule. Here the value is unknown where one line matches and the whole does not, or the other way round.
fn header(text: &Text, head: &crate::request::Head<'_>, name: &str) -> Truth {
    match name {
        ":authority" | "host" => return truth(text.matches(head.authority.as_bytes())),
        ":method" => return truth(text.matches(head.method.as_str().as_bytes())),
        ":scheme" => return truth(text.matches(head.scheme.as_bytes())),
        ":path" => {
            return match head.query {
                None => truth(text.matches(head.path.as_bytes())),
                Some(query) => truth(text.matches(format!("{}?{query}", head.path).as_bytes())),
            };
        }
        _ => {}
    }
    let mut lines = head.headers.get_all(name).iter().map(http::HeaderValue::as_bytes);
    match (lines.next(), lines.next()) {
        (None, _) => Truth::False,
        (Some(only), None) => truth(text.matches(only)),
        (Some(first), Some(second)) => {
            let all: Vec<&[u8]> = [first, second].into_iter().chain(lines).collect();
            let joined = text.matches(&all.join(&b','));
            if all.iter().all(|line| text.matches(line) == joined) { truth(joined) } else { Truth::Unknown }
        }
    }
}

/// Claims are texts or lists of texts in Istio. A number or boolean that is written as the value says is unknown: Istio
/// does not compare it, and whoever wrote the policy meant it.
fn claim(text: &Text, value: &Value) -> Truth {
    match value {
        Value::String(string) => truth(text.matches(string.as_bytes())),
        Value::Array(items) => max(items.iter().map(|item| match item {
            Value::Array(_) => Truth::False,
            item => claim(text, item),
        })),
        Value::Number(number) if text.matches(number.to_string().as_bytes()) => Truth::Unknown,
        Value::Bool(flag) if text.matches(if *flag { b"true" } else { b"false" }) => Truth::Unknown,
        Value::Object(_) if *text == Text::Present => Truth::Unknown,
        Value::Number(_) | Value::Bool(_) | Value::Object(_) | Value::Null => Truth::False,
    }
}
