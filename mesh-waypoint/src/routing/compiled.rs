//! One object's rules, compiled. What did not change is shared with the object's last version.

use std::cmp::Reverse;
use std::sync::{Arc, Weak};

use aws_lc_rs::digest::SHA256;
use mesh_core::state::Str;
use mesh_core::xds::proto::l7;
use prost::Message as _;

use super::matching::{Match, PathTest, Text};
use super::pattern::Patterns;
use super::problem::{Invalid, Problem};
use super::rule::{Action, Compiler, Rule};
use super::tcp::TcpEntry;

/// Which API an object is of: what decides its place among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    /// TLSRoutes come before TCPRoutes.
    GatewayTls,
    GatewayTcp,
    GatewayHttp,
    VirtualService,
}

/// A route object.
#[derive(Debug)]
pub(super) struct CompiledRoute {
    /// What it was compiled from: the same one is not compiled again.
    told: Weak<l7::Route>,
    /// That without its rules.
    pub(super) source: l7::Route,
    pub(super) resource: Str,
    pub(super) family: Family,
    pub(super) http: Vec<Arc<CompiledRule>>,
    pub(super) tcp: Vec<Arc<TcpEntry>>,
    /// Beside those of the HTTP rules.
    pub(super) problems: Vec<Problem>,
}

/// A rule with its matches.
#[derive(Debug)]
pub(super) struct CompiledRule {
    /// Of what it was compiled from.
    digest: Digest,
    pub(super) entries: Box<[Arc<Entry>]>,
    pub(super) problems: Vec<Problem>,
}

/// One match of a rule.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) matching: Match,
    pub(super) specificity: Specificity,
    pub(super) rule: Arc<Rule>,
}

/// The Gateway API's order of matches, as Istio completes it: exact path, longest prefix, then regular expressions; with
/// a method; most headers; most query parameters. The most specific is the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Specificity {
    path: (Reverse<u8>, Reverse<u32>),
    method: Reverse<bool>,
    headers: Reverse<u32>,
    query: Reverse<u32>,
}

impl Specificity {
    fn of(msg: &l7::HttpMatch) -> Self {
        use l7::path_match::Kind;
        let length = |text: &str| u32::try_from(text.len()).unwrap_or(u32::MAX);
        let (kind, length) = match msg.path.as_ref().and_then(|path| path.kind.as_ref()) {
            Some(Kind::Exact(text)) => (2, length(text)),
            Some(Kind::Prefix(text) | Kind::Segments(text)) => (1, length(text.trim_end_matches('/'))),
            // No path is the prefix `/`.
            None => (1, 0),
            Some(Kind::Regex(text)) => (0, length(text)),
        };
        let count = |n: usize| Reverse(u32::try_from(n).unwrap_or(u32::MAX));
        Self {
            path: (Reverse(kind), Reverse(length)),
            method: Reverse(msg.method.is_some()),
            headers: count(msg.headers.len()),
            query: count(msg.query.len()),
        }
    }
}

impl CompiledRoute {
    pub(super) fn compile(
        resource: &str,
        source: &Arc<l7::Route>,
        patterns: &Patterns,
        previous: Option<&Arc<Self>>,
    ) -> Arc<Self> {
        if let Some(previous) = previous.filter(|previous| previous.told.as_ptr() == Arc::as_ptr(source)) {
            return previous.clone();
        }
        let resource = Str::from(resource);
        let family = match source.origin.as_ref().map_or("", |origin| origin.kind.as_str()) {
            "HTTPRoute" | "GRPCRoute" => Family::GatewayHttp,
            "TCPRoute" => Family::GatewayTcp,
            "TLSRoute" => Family::GatewayTls,
            _ => Family::VirtualService,
        };
        let previous = previous.map(Arc::as_ref).filter(|previous| previous.family == family);
        let http = compile_rules(&resource, source, family, patterns, previous);
        let mut problems = Vec::new();
        for (at, parent) in source.parents.iter().enumerate() {
            if parent.port > u32::from(u16::MAX) {
                let reason = format!("{} is no port (0 to 65535); the parent is left out", parent.port);
                let error = Invalid::new(format!("parents[{at}].port"), reason);
                problems.push(problem(&resource, "", error, false));
            }
        }
        let tcp = source.tcp.iter().map(|rule| {
            let (entry, errors) = TcpEntry::compile(&resource, rule, patterns);
            problems.extend(errors.into_iter().map(|(e, fatal)| problem(&resource, &rule.name, e, fatal)));
            Arc::new(entry)
        });
        let tcp = tcp.collect();
        let told = Arc::downgrade(source);
        let source = l7::Route {
            origin: source.origin.clone(),
            parents: source.parents.clone(),
            gateways: source.gateways.clone(),
            hostnames: source.hostnames.clone(),
            exported_to: source.exported_to.clone(),
            http: Vec::new(),
            tcp: Vec::new(),
        };
        Arc::new(Self { told, source, resource, family, http, tcp, problems })
    }

    /// Namespace of the object.
    pub(super) fn namespace(&self) -> &str {
        self.source.origin.as_ref().map_or("", |origin| &origin.namespace)
    }

    /// Older objects come first, then those whose `namespace/name` is less.
    pub(super) fn precedence(&self) -> (i64, &str, &str, &str) {
        let origin = self.source.origin.as_ref();
        origin.map_or((0, "", "", &*self.resource), |o| (o.created, &*o.namespace, &*o.name, &*self.resource))
    }
}

/// Rules at the beginning and at the end that did not change are taken over: a change of one rule among thousands costs
/// what that rule costs.
fn compile_rules(
    resource: &Str,
    source: &l7::Route,
    family: Family,
    patterns: &Patterns,
    previous: Option<&CompiledRoute>,
) -> Vec<Arc<CompiledRule>> {
    let old = previous.map_or(&[][..], |previous| &previous.http);
    let mut buffer = Vec::new();
    let rules: Vec<_> = source.http.iter().map(|rule| (digest(rule, &mut buffer), rule)).collect();
    let is_same = |((new, _), old): &(&(Digest, &l7::HttpRule), &Arc<CompiledRule>)| *new == old.digest;
    let same = rules.iter().zip(old).take_while(is_same).count();
    let shorter = rules.len().min(old.len());
    let ends = rules.iter().rev().zip(old.iter().rev()).take(shorter - same);
    let same_end = ends.take_while(is_same).count();
    let middle = &rules[same..rules.len() - same_end];
    let mut compiled = Vec::with_capacity(rules.len());
    compiled.extend_from_slice(&old[..same]);
    let compile = |(digest, rule): &(Digest, &l7::HttpRule)| {
        Arc::new(CompiledRule::compile(resource, rule, *digest, family, patterns))
    };
    compiled.extend(middle.iter().map(compile));
    compiled.extend_from_slice(&old[old.len() - same_end..]);
    compiled
}

/// Stands for a rule as it was told: two with the same do the same. Ten thousand rules as they were told take twice the memory
/// of what is made of them.
type Digest = [u8; 16];

fn digest(rule: &l7::HttpRule, buffer: &mut Vec<u8>) -> Digest {
    buffer.clear();
    // A vector has room.
    let _ = rule.encode(buffer);
    let whole = aws_lc_rs::digest::digest(&SHA256, buffer);
    let mut digest = Digest::default();
    digest.iter_mut().zip(whole.as_ref()).for_each(|(own, byte)| *own = *byte);
    digest
}

impl CompiledRule {
    fn compile(
        resource: &Str,
        msg: &l7::HttpRule,
        digest: Digest,
        family: Family,
        patterns: &Patterns,
    ) -> Self {
        let mut errors = Vec::new();
        let everything = [l7::HttpMatch::default()];
        let matches = if msg.matches.is_empty() { &everything[..] } else { &msg.matches };
        let mut compiled = Vec::with_capacity(matches.len());
        for (at, matching) in matches.iter().enumerate() {
            let mut invalid = Vec::new();
            let mut this = Match::compile(matching, patterns, &mut invalid);
            errors.extend(invalid.into_iter().map(|e| e.within(format!("matches[{at}]"))));
            if family == Family::GatewayHttp && matches!(this.path, PathTest::Any) {
                // No path is the prefix `/`, of segments: what a prefix is replaced in.
                this.path = PathTest::Segments(Text::new("", false));
            }
            compiled.push((this, Specificity::of(matching)));
        }
        let mut cx = Compiler { patterns, without_effect: Vec::new() };
        let mut rule = cx.rule(resource, msg, &mut errors);
        let without_effect = cx.without_effect.into_iter().map(|e| problem(resource, &msg.name, e, false));
        let mut problems: Vec<_> = without_effect.collect();
        if let Some(first) = errors.first() {
            rule.action = Action::Invalid(format!("{}: {}", first.field, first.reason).into());
            problems.extend(errors.into_iter().map(|e| problem(resource, &msg.name, e, true)));
        }
        let rule = Arc::new(rule);
        let entry = |(matching, specificity)| Arc::new(Entry { matching, specificity, rule: rule.clone() });
        Self { digest, entries: compiled.into_iter().map(entry).collect(), problems }
    }
}

fn problem(resource: &Str, rule: &str, error: Invalid, fatal: bool) -> Problem {
    Problem { resource: resource.clone(), rule: rule.into(), field: error.field, reason: error.reason, fatal }
}
