//! Reading policies.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use super::text::{PathPattern, Text};
use crate::security::path::with_equal_escapes;
use crate::security::{Problem, object_name};

/// Points to the trust domain of the mesh, whatever it is called.
const TRUST_DOMAIN_POINTER: &str = "cluster.local";

#[derive(Debug)]
pub(in crate::security) struct Policy {
    /// `namespace/name`.
    pub(super) key: Str,
    pub(super) action: Action,
    /// Of CUSTOM.
    pub(super) provider: Str,
    pub(super) dry_run: bool,
    /// One is enough.
    pub(super) rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// All parts hold.
#[derive(Debug, Default)]
pub(super) struct Rule {
    /// One entry is enough; no entries hold.
    pub(super) from: Vec<Vec<Check>>,
    /// One entry is enough; no entries hold.
    pub(super) to: Vec<Vec<Check>>,
    /// All hold.
    pub(super) when: Vec<Check>,
}

#[derive(Debug)]
pub(super) struct Check {
    pub(super) negated: bool,
    pub(super) test: Test,
}

/// One value has to match.
#[derive(Debug)]
pub(super) enum Test {
    Principal(Values<Principal>),
    Namespace(Values<Text>),
    ServiceAccount(Values<(Box<str>, Box<str>)>),
    TrustDomain(Values<Text>),
    RequestPrincipal(Values<Text>),
    SourceIp(Values<IpNet>),
    RemoteIp(Values<IpNet>),
    DestinationIp(Values<IpNet>),
    Port(Values<u16>),
    Host(Values<Text>),
    Method(Values<Text>),
    Path(Values<PathPattern>),
    Header {
        name: Box<str>,
        values: Values<Text>,
    },
    Claim {
        path: Vec<Box<str>>,
        values: Values<Text>,
    },
    Sni(Values<Text>),
    /// Something that this version does not know.
    Unreadable,
}

#[derive(Debug)]
pub(super) struct Values<T> {
    pub(super) list: Vec<T>,
    /// Whether there were others.
    pub(super) unreadable: bool,
}

#[derive(Debug)]
pub(super) enum Principal {
    Exact { trust_domain: Box<str>, namespace: Box<str>, service_account: Box<str> },
    Text(Text),
}

/// Reads a policy; what cannot be read is unknown to evaluation, and in `problems`.
pub(in crate::security) fn policy(
    policy: &l7::Authorization,
    settings: &l7::Settings,
    problems: &mut Vec<Problem>,
) -> Policy {
    let origin = policy.origin.as_ref();
    let (namespace, name) = origin.map_or(("", ""), |origin| (&origin.namespace, &origin.name));
    let mut reader = Reader { object: object_name(origin), namespace, settings, problems };
    let action = match l7::authorization::Action::try_from(policy.action) {
        Ok(l7::authorization::Action::Allow) => Some(Action::Allow),
        Ok(l7::authorization::Action::Deny) => Some(Action::Deny),
        Ok(l7::authorization::Action::Audit) => Some(Action::Audit),
        Ok(l7::authorization::Action::Custom) => Some(Action::Custom),
        Err(_) => {
            reader.report("action", "is not known to this version; the policy denies everything".to_owned());
            None
        }
    };
    if action == Some(Action::Custom) && provider(settings, &policy.provider).is_none() {
        reader.report(
            "provider.name",
            format!(
                "{:?} is no extension provider of the mesh settings with a service; what matches is denied",
                policy.provider
            ),
        );
    }
    let rules = policy.rules.iter().enumerate().map(|(i, rule)| reader.rule(&format!("rules[{i}]"), rule));
    Policy {
        key: format!("{namespace}/{name}").into(),
        rules: if action.is_some() { rules.collect() } else { vec![Rule::default()] },
        action: action.unwrap_or(Action::Deny),
        provider: policy.provider.as_str().into(),
        dry_run: policy.dry_run && action.is_some(),
    }
}

/// The provider of this name; one without a service cannot be asked, whatever it says about failures.
pub(super) fn provider<'s>(settings: &'s l7::Settings, name: &str) -> Option<&'s l7::Provider> {
    settings.providers.iter().find(|provider| provider.name == name && provider.service.is_some())
}

struct Reader<'a> {
    object: String,
    /// Of the policy.
    namespace: &'a str,
    settings: &'a l7::Settings,
    problems: &'a mut Vec<Problem>,
}

/// Reads the values of one field.
type Read<'a> = fn(&mut Reader<'a>, &str, &[String]) -> Test;

impl<'a> Reader<'a> {
    fn report(&mut self, field: &str, message: String) {
        self.problems.push(Problem { object: self.object.clone(), field: field.to_owned(), message });
    }

    fn unreadable(&mut self, field: &str, what: &str) {
        self.report(
            field,
            format!("{what}; the rule allows nothing by it, and a DENY or CUSTOM rule matches"),
        );
    }

    fn rule(&mut self, at: &str, rule: &l7::AuthorizationRule) -> Rule {
        Rule {
            from: self.entries(&format!("{at}.from"), &rule.from, Self::source),
            to: self.entries(&format!("{at}.to"), &rule.to, Self::operation),
            when: self
                .entries(&format!("{at}.when"), &rule.when, Self::condition)
                .into_iter()
                .flatten()
                .collect(),
        }
    }

    fn entries<T>(
        &mut self,
        at: &str,
        entries: &[T],
        read: impl Fn(&mut Self, &str, &T) -> Vec<Check>,
    ) -> Vec<Vec<Check>> {
        let mut list = Vec::with_capacity(entries.len());
        for (i, entry) in entries.iter().enumerate() {
            let field = format!("{at}[{i}]");
            let mut checks = read(self, &field, entry);
            // Istio refuses such an entry, so that nobody can have meant "anything" by it.
            if checks.is_empty() {
                self.unreadable(&field, "has no fields that this version knows");
                checks.push(Check { negated: false, test: Test::Unreadable });
            }
            list.push(checks);
        }
        list
    }

    fn both(&mut self, checks: &mut Vec<Check>, at: &str, fields: [(&str, &[String]); 2], read: Read<'a>) {
        for ((name, raw), negated) in fields.into_iter().zip([false, true]) {
            if !raw.is_empty() {
                checks.push(Check { negated, test: read(self, &format!("{at}.{name}"), raw) });
            }
        }
    }

    fn source(&mut self, at: &str, from: &l7::PolicySource) -> Vec<Check> {
        let mut checks = Vec::new();
        let c = &mut checks;
        self.both(c, at, [("ipBlocks", &from.ip_blocks), ("notIpBlocks", &from.not_ip_blocks)], |r, f, v| {
            Test::SourceIp(r.prefixes(f, v))
        });
        self.both(
            c,
            at,
            [("namespaces", &from.namespaces), ("notNamespaces", &from.not_namespaces)],
            |r, f, v| Test::Namespace(r.patterns(f, v)),
        );
        let fields: [(&str, &[String]); 2] =
            [("serviceAccounts", &from.service_accounts), ("notServiceAccounts", &from.not_service_accounts)];
        self.both(c, at, fields, |r, f, v| Test::ServiceAccount(r.accounts(f, v)));
        let fields: [(&str, &[String]); 2] =
            [("trustDomains", &from.trust_domains), ("notTrustDomains", &from.not_trust_domains)];
        self.both(c, at, fields, |r, f, v| Test::TrustDomain(r.patterns(f, v)));
        self.both(
            c,
            at,
            [("principals", &from.principals), ("notPrincipals", &from.not_principals)],
            |r, f, v| Test::Principal(r.principals(f, v)),
        );
        let fields: [(&str, &[String]); 2] =
            [("remoteIpBlocks", &from.remote_ip_blocks), ("notRemoteIpBlocks", &from.not_remote_ip_blocks)];
        self.both(c, at, fields, |r, f, v| Test::RemoteIp(r.prefixes(f, v)));
        let fields: [(&str, &[String]); 2] = [
            ("requestPrincipals", &from.request_principals),
            ("notRequestPrincipals", &from.not_request_principals),
        ];
        self.both(c, at, fields, |r, f, v| Test::RequestPrincipal(r.patterns(f, v)));
        checks
    }

    fn operation(&mut self, at: &str, to: &l7::Operation) -> Vec<Check> {
        let mut checks = Vec::new();
        let c = &mut checks;
        self.both(c, at, [("ports", &to.ports), ("notPorts", &to.not_ports)], |r, f, v| {
            Test::Port(r.ports(f, v))
        });
        self.both(c, at, [("methods", &to.methods), ("notMethods", &to.not_methods)], |r, f, v| {
            Test::Method(r.patterns(f, v))
        });
        self.both(c, at, [("paths", &to.paths), ("notPaths", &to.not_paths)], |r, f, v| {
            Test::Path(r.values(f, v, |text| PathPattern::read(&with_equal_escapes(text))))
        });
        self.both(c, at, [("hosts", &to.hosts), ("notHosts", &to.not_hosts)], |r, f, v| {
            Test::Host(r.patterns(f, v))
        });
        checks
    }

    fn condition(&mut self, at: &str, when: &l7::Condition) -> Vec<Check> {
        let mut checks = Vec::new();
        for (name, raw, negated) in [("values", &when.values, false), ("notValues", &when.not_values, true)] {
            if !raw.is_empty() {
                let test = self.key(at, &when.key, &format!("{at}.{name}"), raw);
                checks.push(Check { negated, test });
            }
        }
        checks
    }

    /// The attributes of <https://istio.io/latest/docs/reference/config/security/conditions/>.
    fn key(&mut self, at: &str, key: &str, field: &str, raw: &[String]) -> Test {
        match key {
            "source.ip" => Test::SourceIp(self.prefixes(field, raw)),
            "remote.ip" => Test::RemoteIp(self.prefixes(field, raw)),
            "source.namespace" => Test::Namespace(self.patterns(field, raw)),
            "source.serviceAccount" => Test::ServiceAccount(self.accounts(field, raw)),
            "source.trustDomain" => Test::TrustDomain(self.patterns(field, raw)),
            "source.principal" => Test::Principal(self.principals(field, raw)),
            "request.auth.principal" => Test::RequestPrincipal(self.patterns(field, raw)),
            "request.auth.audiences" => self.claim(&["aud"], field, raw),
            "request.auth.presenter" => self.claim(&["azp"], field, raw),
            "destination.ip" => Test::DestinationIp(self.prefixes(field, raw)),
            "destination.port" => Test::Port(self.ports(field, raw)),
            "connection.sni" => Test::Sni(self.patterns(field, raw)),
            _ => {
                if let Some(rest) = key.strip_prefix("request.headers")
                    && let Some([name]) = brackets(rest).as_deref()
                {
                    let values = self.values(field, raw, Text::literal);
                    return Test::Header { name: name.to_ascii_lowercase().into(), values };
                }
                if let Some(rest) = key.strip_prefix("request.auth.claims")
                    && let Some(path) = brackets(rest)
                {
                    return self.claim(&path, field, raw);
                }
                self.unreadable(
                    &format!("{at}.key"),
                    &format!("{key:?} is no attribute that this version knows"),
                );
                Test::Unreadable
            }
        }
    }

    fn claim(&mut self, path: &[&str], field: &str, raw: &[String]) -> Test {
        let values = self.values(field, raw, Text::literal);
        Test::Claim { path: path.iter().map(|name| (*name).into()).collect(), values }
    }

    fn values<T>(
        &mut self,
        field: &str,
        raw: &[String],
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Values<T> {
        let mut values = Values { list: Vec::with_capacity(raw.len()), unreadable: false };
        for (i, text) in raw.iter().enumerate() {
            match read(text) {
                Ok(value) => values.list.push(value),
                Err(error) => {
                    values.unreadable = true;
                    self.unreadable(&format!("{field}[{i}]"), &error);
                }
            }
        }
        values
    }

    fn patterns(&mut self, field: &str, raw: &[String]) -> Values<Text> {
        self.values(field, raw, Text::pattern)
    }

    fn prefixes(&mut self, field: &str, raw: &[String]) -> Values<IpNet> {
        self.values(field, raw, |text| {
            let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
            let net = net.ok_or_else(|| {
                format!("{text:?} is no address or prefix; write for example 10.0.0.0/8 or 2001:db8::1")
            })?;
            Ok(canonical(net))
        })
    }

    fn ports(&mut self, field: &str, raw: &[String]) -> Values<u16> {
        self.values(field, raw, |text| match text.parse::<u16>() {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(format!("{text:?} is no port; give a number from 1 to 65535")),
        })
    }

    fn accounts(&mut self, field: &str, raw: &[String]) -> Values<(Box<str>, Box<str>)> {
        let own = self.namespace;
        self.values(field, raw, |text| {
            let (namespace, name) = text.split_once('/').unwrap_or((own, text));
            let plain = |part: &str| !part.is_empty() && !part.contains(['*', '/']);
            if plain(namespace) && plain(name) {
                Ok((namespace.into(), name.into()))
            } else {
                Err(format!("{text:?} is no service account; write NAMESPACE/NAME or NAME, without *"))
            }
        })
    }

    fn principals(&mut self, field: &str, raw: &[String]) -> Values<Principal> {
        let domains = trust_domains(self.settings);
        let mut values = self.values(field, raw, |text| Ok(principals(text, Text::pattern(text)?, &domains)));
        let list = values.list.drain(..).flatten().collect();
        Values { list, unreadable: values.unreadable }
    }
}

/// The trust domains that are one: of the mesh, and its aliases.
fn trust_domains(settings: &l7::Settings) -> Vec<&str> {
    let own = match settings.trust_domain.as_str() {
        "" => mesh_core::identity::DEFAULT_TRUST_DOMAIN,
        domain => domain,
    };
    std::iter::once(own).chain(settings.trust_domain_aliases.iter().map(String::as_str)).collect()
}

/// The principals that a value stands for: a whole identity of the mesh's trust domain, of an alias or of
/// `cluster.local` stands for the same account in each of them; anything else for itself. As in Istio.
fn principals(value: &str, text: Text, domains: &[&str]) -> Vec<Principal> {
    let parts: Vec<&str> = value.split('/').collect();
    let &[domain, "ns", namespace, "sa", service_account] = &parts[..] else {
        return vec![Principal::Text(text)];
    };
    let suffix = domain.strip_prefix('*');
    let means = |own: &&str| suffix.map_or(domain == *own, |suffix| own.ends_with(suffix));
    if !(domain == TRUST_DOMAIN_POINTER || domains.iter().any(means)) {
        return vec![exact(value, text)];
    }
    let mut list = Vec::new();
    if suffix.is_some() {
        // Also matches domains that are none of the aliases.
        list.push(Principal::Text(text));
    }
    for own in domains {
        let value = format!("{own}/ns/{namespace}/sa/{service_account}");
        if let Ok(text) = Text::pattern(&value) {
            list.push(exact(&value, text));
        }
    }
    list
}

fn exact(value: &str, text: Text) -> Principal {
    let parts: Vec<&str> = value.split('/').collect();
    match (&parts[..], &text) {
        (&[trust_domain, "ns", namespace, "sa", service_account], Text::Exact(_)) => Principal::Exact {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        },
        _ => Principal::Text(text),
    }
}

/// `[a][b]` as `a`, `b`.
fn brackets(text: &str) -> Option<Vec<&str>> {
    let mut names = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = rest.strip_prefix('[')?.split_once(']')?;
        if name.is_empty() {
            return None;
        }
        names.push(name);
        rest = after;
    }
    (!names.is_empty()).then_some(names)
}

/// A prefix of v4-mapped addresses is one of IPv4, as addresses are compared in that form.
fn canonical(net: IpNet) -> IpNet {
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.addr().to_ipv4_mapped() {
            Some(v4) => ipnet::Ipv4Net::new(v4, v6.prefix_len() - 96).map_or(net, IpNet::V4),
            None => net,
        },
        net => net,
    }
}
