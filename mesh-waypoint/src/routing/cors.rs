//! Requests from scripts of other origins (Fetch standard, section 3.2), as Envoy's filter answers them.

use std::time::Duration;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method};
use mesh_core::xds::proto::l7;

use super::matching::ValueTest;
use super::pattern::Patterns;
use super::problem::Invalid;

/// What other origins may do.
#[derive(Debug, Clone)]
pub struct Cors {
    origins: Vec<ValueTest>,
    methods: Allowed,
    headers: Allowed,
    expose: Option<HeaderValue>,
    max_age: Option<HeaderValue>,
    credentials: bool,
    forward_unmatched: bool,
}

#[derive(Debug, Clone)]
enum Allowed {
    Unsaid,
    Any,
    These(HeaderValue),
}

impl Cors {
    pub(super) fn compile(
        msg: &l7::Cors,
        max_age: Option<Duration>,
        patterns: &Patterns,
    ) -> Result<Self, Invalid> {
        let origins = msg.allow_origins.iter().enumerate();
        let origins = origins
            .map(|(at, origin)| ValueTest::compile_at(&format!("allow_origins[{at}]"), origin, patterns))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            origins,
            methods: Allowed::compile(&msg.allow_methods, "allow_methods")?,
            headers: Allowed::compile(&msg.allow_headers, "allow_headers")?,
            expose: list(&msg.expose_headers, "expose_headers")?,
            max_age: max_age.map(|age| HeaderValue::from(age.as_secs())),
            credentials: msg.allow_credentials,
            forward_unmatched: msg.forward_unmatched_preflights,
        })
    }

    /// The headers of a 200 without body, if the request is a question for leave that is answered here.
    #[must_use]
    pub fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<HeaderMap> {
        let requested = headers.get(ACCESS_CONTROL_REQUEST_METHOD).filter(|value| !value.is_empty())?;
        if *method != Method::OPTIONS || headers.get(ORIGIN).is_none_or(HeaderValue::is_empty) {
            return None;
        }
        let mut answer = HeaderMap::new();
        let Some(origin) = self.allowed_origin(headers) else {
            return (!self.forward_unmatched).then_some(answer);
        };
        self.allow(origin, &mut answer);
        let asked = headers.get(ACCESS_CONTROL_REQUEST_HEADERS);
        if let Some(methods) = self.methods.answer(self.credentials, Some(requested)) {
            answer.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        if let Some(headers) = self.headers.answer(self.credentials, asked) {
            answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers);
        }
        // Browsers ask for it of the response itself only; the Gateway API and Istio's proxies say it here, too.
        if let Some(expose) = &self.expose {
            answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
        if let Some(age) = &self.max_age {
            answer.insert(ACCESS_CONTROL_MAX_AGE, age.clone());
        }
        Some(answer)
    }

    /// The origin of a request, if it is an allowed one: to be kept for [`Self::edit_response`].
    #[must_use]
    pub fn allowed_origin<'a>(&self, headers: &'a HeaderMap) -> Option<&'a HeaderValue> {
        let origin = headers.get(ORIGIN)?;
        self.origins.iter().any(|test| test.test(origin.as_bytes())).then_some(origin)
    }

    /// Says in a response that the origin may read it, whatever the application said.
    pub fn edit_response(&self, origin: &HeaderValue, response: &mut HeaderMap) {
        self.allow(origin, response);
        if let Some(expose) = &self.expose {
            response.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }

    fn allow(&self, origin: &HeaderValue, headers: &mut HeaderMap) {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        // The answer is not the same for every origin: caches must know.
        let says_so = |value: &HeaderValue| {
            let mut words = value.as_bytes().split(|b| *b == b',').map(<[u8]>::trim_ascii);
            words.any(|word| word == b"*" || word.eq_ignore_ascii_case(b"origin"))
        };
        if !headers.get_all(VARY).iter().any(says_so) {
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
    }
}

impl Allowed {
    fn compile(values: &[String], field: &str) -> Result<Self, Invalid> {
        if values.iter().any(|value| value == "*") {
            return Ok(Self::Any);
        }
        Ok(list(values, field)?.map_or(Self::Unsaid, Self::These))
    }

    /// With credentials a `*` would be taken by its letter (Fetch standard): what is asked for is said instead.
    fn answer(&self, credentials: bool, asked: Option<&HeaderValue>) -> Option<HeaderValue> {
        match self {
            Self::Unsaid => None,
            Self::Any if credentials => asked.cloned(),
            Self::Any => Some(HeaderValue::from_static("*")),
            Self::These(values) => Some(values.clone()),
        }
    }
}

fn list(values: &[String], field: &str) -> Result<Option<HeaderValue>, Invalid> {
    if values.is_empty() {
        return Ok(None);
    }
    let reason = "has characters that no header may have";
    HeaderValue::try_from(values.join(",")).ok().map(Some).ok_or_else(|| Invalid::new(field, reason))
}
