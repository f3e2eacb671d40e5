//! One rule, ready to be applied.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use mesh_core::state::{MeshState, Service, ServiceEndpoints, Str};
use mesh_core::xds::proto::l7;

use super::cors::Cors;
use super::fault::{Fault, Mirror, Share, http_status};
use super::headers::HeaderEdits;
use super::pattern::Patterns;
use super::problem::Invalid;
use super::rewrite::{Redirect, Rewrite};
use crate::config::Own;

/// A rule: what becomes of the requests that fall under it.
#[derive(Debug)]
pub struct Rule {
    /// `<Kind>/<namespace>/<name>` of its object.
    pub resource: Str,
    /// Unique in its object.
    pub name: Str,
    /// Where requests end.
    pub action: Action,
    /// Edits of requests; see [`Self::edit_request`].
    pub request_headers: HeaderEdits,
    /// Edits of responses; see [`Self::edit_response`].
    pub response_headers: HeaderEdits,
    /// Change of path and authority.
    pub rewrite: Option<Box<Rewrite>>,
    /// Copies of requests.
    pub mirrors: Box<[Mirror]>,
    /// What other origins may do.
    pub cors: Option<Box<Cors>>,
    /// What is injected.
    pub fault: Option<Box<Fault>>,
    /// Of the whole request; absent: none.
    pub timeout: Option<Duration>,
    /// Absent: the mesh's default.
    pub retry: Option<Arc<l7::Retry>>,
    /// By what requests of one session are kept together.
    pub session: Option<Arc<l7::SessionPersistence>>,
    /// How many requests there may be.
    pub rate_limit: Option<RateLimit>,
    /// Requests that fell under it since it was compiled.
    pub hits: AtomicU64,
}

/// Where requests end.
#[derive(Debug)]
pub enum Action {
    /// At one of these.
    Forward(Forward),
    /// Here, with another address.
    Redirect(Box<Redirect>),
    /// Here, with this.
    Respond(DirectResponse),
    /// Here, with 500 and this reason: something in the rule cannot be honoured.
    Invalid(Str),
}

/// Services with their shares.
#[derive(Debug, Clone)]
pub struct Forward {
    /// In their order.
    pub backends: Box<[WeightedBackend]>,
    total: u64,
}

/// A service with its share of a rule's requests, and what is done to these.
#[derive(Debug, Clone)]
pub struct WeightedBackend {
    /// Where to.
    pub backend: Backend,
    /// Relative to the sum of all.
    pub weight: u32,
    /// Edits of requests; see [`Rule::edit_request`].
    pub request_headers: HeaderEdits,
    /// Edits of responses; see [`Rule::edit_response`].
    pub response_headers: HeaderEdits,
    /// Beside those of the rule.
    pub mirrors: Box<[Mirror]>,
    /// Answers instead.
    pub redirect: Option<Box<Redirect>>,
    /// Instead of that of the rule.
    pub rewrite: Option<Box<Rewrite>>,
}

/// A service to send to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Complete.
    pub hostname: Str,
    /// `namespace/hostname`, if the namespace is known.
    pub key: Option<Str>,
    /// Service port, if it is said.
    pub port: Option<u16>,
    /// Name of a subset of the service's destination.
    pub subset: Option<Str>,
    /// Why this cannot be used: the answer is 500.
    pub invalid: Option<Str>,
}

/// An answer that is given here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectResponse {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub body: Bytes,
}

/// How many requests there may be, and whose bucket that is.
#[derive(Debug, Clone, PartialEq)]
pub struct RateLimit {
    /// Of the rule: one that is read again keeps its bucket.
    pub name: Str,
    /// Checked.
    pub limit: l7::RateLimit,
}

/// What a rule's parts are compiled with: fields without effect are collected, and what is fatal ends its part.
pub(super) struct Compiler<'a> {
    pub(super) patterns: &'a Patterns,
    pub(super) without_effect: Vec<Invalid>,
}

impl Rule {
    /// The edits of the backend come before those of the rule (Envoy: from the most specific outwards).
    pub fn edit_request(&self, backend: Option<&WeightedBackend>, headers: &mut HeaderMap) {
        if let Some(backend) = backend {
            backend.request_headers.apply(headers);
        }
        self.request_headers.apply(headers);
    }

    /// In the order of [`Self::edit_request`].
    pub fn edit_response(&self, backend: Option<&WeightedBackend>, headers: &mut HeaderMap) {
        if let Some(backend) = backend {
            backend.response_headers.apply(headers);
        }
        self.response_headers.apply(headers);
    }

    /// The rewrite that counts for requests to a backend.
    #[must_use]
    pub fn rewrite_for<'a>(&'a self, backend: Option<&'a WeightedBackend>) -> Option<&'a Rewrite> {
        backend.and_then(|backend| backend.rewrite.as_deref()).or(self.rewrite.as_deref())
    }

    /// The authority that requests to a backend get: a `Host` header that is set wins over a rewrite.
    #[must_use]
    pub fn authority_for<'a>(
        &'a self,
        backend: Option<&'a WeightedBackend>,
    ) -> Option<&'a http::uri::Authority> {
        let of_backend = backend.and_then(|backend| backend.request_headers.authority());
        let set = self.request_headers.authority().or(of_backend);
        set.or_else(|| self.rewrite_for(backend)?.authority.as_ref())
    }
}

impl Forward {
    /// A backend by weight; `random` is uniform. `None` where no backend gets anything: the answer is 500.
    #[must_use]
    pub fn pick_backend(&self, random: u64) -> Option<&WeightedBackend> {
        let mut at = random.checked_rem(self.total)?;
        self.backends.iter().find(|backend| match at.checked_sub(u64::from(backend.weight)) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        })
    }

    /// No backend at all.
    pub(super) fn none() -> Self {
        Self { backends: [].into(), total: 0 }
    }

    pub(super) fn compile(backends: &[l7::WeightedBackend], cx: &mut Compiler<'_>) -> Result<Self, Invalid> {
        let compile = |(at, msg)| cx.weighted_backend(msg).map_err(|e| e.within(format!("backends[{at}]")));
        let backends: Box<[_]> = backends.iter().enumerate().map(compile).collect::<Result<_, _>>()?;
        let total = backends.iter().map(|backend| u64::from(backend.weight)).sum();
        Ok(Self { backends, total })
    }
}

impl Backend {
    pub(super) fn compile(msg: Option<&l7::Backend>) -> Result<Self, Invalid> {
        let text = |text: &str| (!text.is_empty()).then(|| Str::from(text));
        let msg = msg.cloned().unwrap_or_default();
        let invalid = text(&msg.invalid);
        let service = msg.service.unwrap_or_default();
        if service.hostname.is_empty() && invalid.is_none() {
            return Err(Invalid::new("backend.service.hostname", "is needed"));
        }
        let port = u16::try_from(service.port).ok().ok_or_else(|| {
            Invalid::new("backend.service.port", format!("{} is no port (1 to 65535)", service.port))
        })?;
        let hostname = service.hostname.to_ascii_lowercase();
        let key = (!service.namespace.is_empty()).then(|| format!("{}/{hostname}", service.namespace).into());
        Ok(Self {
            hostname: hostname.into(),
            key,
            port: (port != 0).then_some(port),
            subset: text(&msg.subset),
            invalid,
        })
    }

    /// The service, if it is known. Where the namespace is not said, the one that the waypoint's namespace sees.
    #[must_use]
    pub fn service<'m>(&self, mesh: &'m MeshState, own: &Own) -> Option<&'m ServiceEndpoints> {
        match &self.key {
            Some(key) => mesh.service(key),
            None => mesh.service_by_hostname(&self.hostname, Some(&own.namespace)),
        }
    }

    /// The service port: the one that is said, else the only one, else the one that the request was addressed to.
    #[must_use]
    pub fn port(&self, service: &Service, addressed: u16) -> u16 {
        let only = || (service.ports.len() == 1).then(|| service.ports.keys().next().copied()).flatten();
        self.port.or_else(only).unwrap_or(addressed)
    }
}

impl Compiler<'_> {
    /// All of a rule but its matches.
    pub(super) fn rule(&mut self, resource: &Str, msg: &l7::HttpRule, errors: &mut Vec<Invalid>) -> Rule {
        let request_headers = keep(self.edits(msg.request_headers.as_ref(), "request_headers", true), errors);
        let response_headers =
            keep(self.edits(msg.response_headers.as_ref(), "response_headers", false), errors);
        let rewrite = keep(self.rewrite(msg.rewrite.as_ref()), errors);
        let mirrors = keep(self.mirrors(&msg.mirrors), errors);
        let fault = msg.fault.as_ref().map(Fault::compile).transpose();
        let action = self.action(msg.action.as_ref()).unwrap_or_else(|error| {
            errors.push(error);
            Action::Invalid("".into())
        });
        let named = || format!("{resource}/{}", msg.name).into();
        let rate_limit = msg.rate_limit.as_ref().map(|limit| RateLimit::compile(named(), limit));
        Rule {
            resource: resource.clone(),
            name: msg.name.as_str().into(),
            action,
            request_headers,
            response_headers,
            rewrite,
            mirrors,
            cors: keep(self.cors(msg.cors.as_ref()), errors),
            fault: keep(fault.map_err(|e| e.within("fault")), errors).map(Box::new),
            timeout: keep(duration(msg.timeout.as_ref(), "timeout"), errors).filter(|t| !t.is_zero()),
            retry: msg.retry.clone().map(Arc::new),
            session: msg.session.clone().map(Arc::new),
            rate_limit: keep(rate_limit.transpose(), errors),
            hits: AtomicU64::new(0),
        }
    }

    fn action(&mut self, msg: Option<&l7::http_rule::Action>) -> Result<Action, Invalid> {
        use l7::http_rule::Action as Wire;
        match msg {
            None => Err(Invalid::new("action", "has none: forward, redirect or direct_response is needed")),
            Some(Wire::Forward(forward)) => {
                let forward = Forward::compile(&forward.backends, self).map_err(|e| e.within("forward"))?;
                Ok(Action::Forward(forward))
            }
            Some(Wire::Redirect(redirect)) => {
                let redirect = Redirect::compile(redirect).map_err(|e| e.within("redirect"))?;
                Ok(Action::Redirect(Box::new(redirect)))
            }
            Some(Wire::DirectResponse(response)) => Ok(Action::Respond(DirectResponse {
                status: http_status(response.status, "direct_response.status")?,
                body: response.body.clone().into(),
            })),
        }
    }

    fn weighted_backend(&mut self, msg: &l7::WeightedBackend) -> Result<WeightedBackend, Invalid> {
        let redirect = msg.redirect.as_ref().map(Redirect::compile).transpose();
        Ok(WeightedBackend {
            backend: Backend::compile(msg.backend.as_ref())?,
            weight: msg.weight,
            request_headers: self.edits(msg.request_headers.as_ref(), "request_headers", true)?,
            response_headers: self.edits(msg.response_headers.as_ref(), "response_headers", false)?,
            mirrors: self.mirrors(&msg.mirrors)?,
            redirect: redirect.map_err(|e| e.within("redirect"))?.map(Box::new),
            rewrite: self.rewrite(msg.rewrite.as_ref())?,
        })
    }

    fn edits(
        &mut self,
        msg: Option<&l7::HeaderEdits>,
        field: &str,
        of_request: bool,
    ) -> Result<HeaderEdits, Invalid> {
        let mut without_effect = Vec::new();
        let edits = HeaderEdits::compile(msg, of_request, &mut without_effect);
        self.without_effect.extend(without_effect.into_iter().map(|e| e.within(field)));
        edits.map_err(|e| e.within(field))
    }

    fn rewrite(&self, msg: Option<&l7::Rewrite>) -> Result<Option<Box<Rewrite>>, Invalid> {
        let rewrite = msg.map(|msg| Rewrite::compile(msg, self.patterns)).transpose();
        Ok(rewrite.map_err(|e| e.within("rewrite"))?.map(Box::new))
    }

    fn mirrors(&self, msgs: &[l7::Mirror]) -> Result<Box<[Mirror]>, Invalid> {
        let compile = |(at, msg): (usize, &l7::Mirror)| {
            let backend = Backend::compile(msg.backend.as_ref());
            let mirror = backend
                .and_then(|backend| Ok(Mirror { backend, share: Share::compile(msg.parts_per_million)? }));
            mirror.map_err(|e| e.within(format!("mirrors[{at}]")))
        };
        msgs.iter().enumerate().map(compile).collect()
    }

    fn cors(&self, msg: Option<&l7::Cors>) -> Result<Option<Box<Cors>>, Invalid> {
        let Some(msg) = msg else { return Ok(None) };
        let max_age = duration(msg.max_age.as_ref(), "cors.max_age")?;
        let cors = Cors::compile(msg, max_age, self.patterns).map_err(|e| e.within("cors"))?;
        Ok(Some(Box::new(cors)))
    }
}

impl RateLimit {
    fn compile(name: Str, msg: &l7::RateLimit) -> Result<Self, Invalid> {
        let per = duration(msg.per.as_ref(), "rate_limit.per")?.unwrap_or_default();
        if per.is_zero() || msg.tokens == 0 {
            return Err(Invalid::new("rate_limit", "`tokens` and `per` must be more than 0"));
        }
        Ok(Self { name, limit: *msg })
    }
}

/// A duration of the wire; negative ones are errors.
pub(super) fn duration(
    msg: Option<&prost_types::Duration>,
    field: &str,
) -> Result<Option<Duration>, Invalid> {
    let convert = |msg: &prost_types::Duration| {
        Duration::try_from(*msg).ok().ok_or_else(|| Invalid::new(field, "is negative; 0 s or more is right"))
    };
    msg.map(convert).transpose()
}

/// The value, or the default after taking note of the error.
fn keep<T: Default>(result: Result<T, Invalid>, errors: &mut Vec<Invalid>) -> T {
    result.unwrap_or_else(|error| {
        errors.push(error);
        T::default()
    })
}
