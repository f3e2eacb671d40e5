//! Tokens: where they are, whether they hold, what they say.
//!
//! Semantics: Istio's RequestAuthentication as its proxy does it. A request without a token passes. A request passes if
//! the tokens in the places of one rule hold for this rule; all of them have to, as the application may read any of them.
//! Otherwise it is refused. What a rule gives out in headers is always taken out of what clients send.

mod cache;
mod locations;
#[cfg(test)]
mod tests;
mod token;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use mesh_core::xds::proto::l7;
use serde_json::{Map, Value};

use super::jwks::{KeySet, KeySource, KeyStore, SignatureError};
use super::{Problem, object_name};
use crate::request::Head;
use cache::RuleId;
use locations::{Locations, Removal};
pub use token::TokenError;
use token::{Times, Token};

/// Of fetching keys (Istio's default).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Claims that are lists in one text, for every rule (Istio).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// What tokens say about a request that may proceed.
#[derive(Debug, Clone, Default)]
pub struct Authenticated {
    /// The payload of the token, with space-delimited claims as lists; for [`Head::claims`].
    pub claims: Option<Arc<Map<String, Value>>>,
    /// To be applied before the request goes on.
    pub edits: Edits,
}

impl Authenticated {
    /// `request.auth.principal`, `iss/sub`; none without a token, or if one of the two is missing.
    #[must_use]
    pub fn principal(&self) -> Option<String> {
        let text = |name| self.claims.as_ref()?.get(name)?.as_str().filter(|text| !text.is_empty());
        Some(format!("{}/{}", text("iss")?, text("sub")?))
    }
}

/// What becomes of the headers and the query of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits {
    strip: Arc<[HeaderName]>,
    removal: Removal,
    set: Vec<(HeaderName, HeaderValue)>,
}

impl Edits {
    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.strip.is_empty() && self.removal == Removal::default() && self.set.is_empty()
    }

    /// Changes the headers.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in self.strip.iter().chain(&self.removal.headers) {
            headers.remove(name);
        }
        if let Some(cookies) = &self.removal.cookies {
            headers.remove(header::COOKIE);
            for line in cookies {
                headers.append(header::COOKIE, line.clone());
            }
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
    }

    /// The query to go on with, if it changes; an empty one means none.
    #[must_use]
    pub fn query(&self) -> Option<&str> {
        self.removal.query.as_deref()
    }
}

/// Why a request is refused, and the answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong with the token.
    pub error: TokenError,
    /// Of `www-authenticate`: the URL of the request.
    realm: String,
}

impl Refusal {
    /// 401; 403 for an audience, as in Envoy.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self.error {
            TokenError::AudienceNotAllowed => StatusCode::FORBIDDEN,
            _ => StatusCode::UNAUTHORIZED,
        }
    }

    /// The body, plain text.
    #[must_use]
    pub fn body(&self) -> String {
        self.error.to_string()
    }

    /// The value of `www-authenticate`.
    #[must_use]
    pub fn www_authenticate(&self) -> HeaderValue {
        let text = format!("Bearer realm=\"{}\", error=\"invalid_token\"", self.realm);
        // The realm has been cleaned.
        HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("Bearer error=\"invalid_token\""))
    }

    /// Envoy's response code details.
    #[must_use]
    pub fn details(&self) -> String {
        let words = self.error.to_string().replace(|c: char| c.is_ascii_whitespace(), "_");
        format!("jwt_authn_access_denied{{{words}}}")
    }
}

/// The token rules of one service.
#[derive(Debug, Default)]
pub(super) struct Rules {
    rules: Vec<Arc<Rule>>,
    /// Headers that rules give out.
    strip: Arc<[HeaderName]>,
}

/// One rule, compiled.
#[derive(Debug)]
pub(super) struct Rule {
    id: RuleId,
    issuer: String,
    audiences: Vec<String>,
    locations: Locations,
    keys: Keys,
    forward: bool,
    payload_header: Option<HeaderName>,
    claim_headers: Vec<(HeaderName, String)>,
    space_delimited: Vec<String>,
}

#[derive(Debug)]
enum Keys {
    Inline(Arc<KeySet>),
    Remote(Arc<KeySource>),
    /// None can be had: no token holds.
    Absent,
}

/// What a token that holds says.
#[derive(Debug)]
struct Held {
    times: Times,
    /// It was verified with these.
    keys: Arc<KeySet>,
    claims: Arc<Map<String, Value>>,
    /// What the rule gives out of it.
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Reads the rules of one object; they are shared by all services that it applies to.
pub(super) fn read(
    authentication: &l7::Authentication,
    keys: &KeyStore,
    problems: &mut Vec<Problem>,
) -> Vec<Arc<Rule>> {
    let object = object_name(authentication.origin.as_ref());
    let rules = authentication.rules.iter().enumerate();
    let read = rules.map(|(i, rule)| {
        Arc::new(Rule::new(rule, keys, &mut |field, message| {
            let field = format!("jwtRules[{i}].{field}");
            problems.push(Problem { object: object.clone(), field, message });
        }))
    });
    read.collect()
}

impl Rules {
    pub(super) fn new(rules: Vec<Arc<Rule>>) -> Self {
        let strip = rules.iter().flat_map(|rule| {
            rule.payload_header.iter().chain(rule.claim_headers.iter().map(|(name, _)| name)).cloned()
        });
        Self { strip: strip.collect(), rules }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    pub(super) async fn authenticate(
        &self,
        head: &Head<'_>,
        now: SystemTime,
    ) -> Result<Authenticated, Refusal> {
        let mut worst: Option<TokenError> = None;
        for rule in &self.rules {
            let tokens = rule.locations.tokens(head);
            if tokens.is_empty() {
                continue;
            }
            match rule.verify_all(&tokens, now).await {
                Ok(held) => {
                    let removal =
                        if rule.forward { Removal::default() } else { rule.locations.removal(head) };
                    let edits = Edits { strip: Arc::clone(&self.strip), removal, set: held.headers.clone() };
                    return Ok(Authenticated { claims: Some(Arc::clone(&held.claims)), edits });
                }
                // That another rule is for another issuer says nothing.
                Err(error) if worst.is_none_or(|worst| worst == TokenError::UnknownIssuer) => {
                    worst = Some(error)
                }
                Err(_) => {}
            }
        }
        match worst {
            Some(error) => Err(Refusal { error, realm: realm(head) }),
            None => {
                let edits = Edits { strip: Arc::clone(&self.strip), ..Edits::default() };
                Ok(Authenticated { claims: None, edits })
            }
        }
    }
}

impl Rule {
    fn new(rule: &l7::JwtRule, store: &KeyStore, report: &mut dyn FnMut(&str, String)) -> Self {
        const REFUSED: &str = "every token of this rule is refused";
        let timeout = rule.timeout.and_then(|timeout| Duration::try_from(timeout).ok());
        let timeout = timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(DEFAULT_TIMEOUT);
        let mut keys = match (rule.jwks.as_str(), rule.jwks_uri.as_str()) {
            ("", "") => {
                report("jwksUri", format!("is missing, as is jwks: {REFUSED}"));
                Keys::Absent
            }
            ("", uri) => Keys::Remote(store.source(uri, timeout)),
            (text, _) => match KeySet::read(text.as_bytes()) {
                Ok(keys) => {
                    for why in keys.skipped() {
                        report("jwks", format!("{why}; tokens that need this key are refused"));
                    }
                    Keys::Inline(Arc::new(keys))
                }
                Err(error) => {
                    report("jwks", format!("{error}; {REFUSED}"));
                    Keys::Absent
                }
            },
        };
        if rule.issuer.is_empty() {
            report("issuer", format!("is empty: {REFUSED}"));
            keys = Keys::Absent;
        }
        let locations = Locations::of(rule).unwrap_or_else(|(field, name)| {
            report(
                field,
                format!("{name:?} is no name of a header; the default places are looked at, and {REFUSED}"),
            );
            keys = Keys::Absent;
            Locations::usual()
        });
        let mut header = |field: &str, name: &str| {
            let parsed = HeaderName::try_from(name).ok();
            if parsed.is_none() {
                report(field, format!("{name:?} is no name of a header; it is left out"));
            }
            parsed
        };
        let payload_header = match rule.output_payload_to_header.as_str() {
            "" => None,
            name => header("outputPayloadToHeader", name),
        };
        let claim_headers = rule
            .output_claim_to_headers
            .iter()
            .filter_map(|out| Some((header("outputClaimToHeaders", &out.header)?, out.claim.clone())));
        let extra = rule.space_delimited_claims.iter().map(String::as_str);
        Self {
            id: RuleId::new(),
            issuer: rule.issuer.clone(),
            audiences: rule.audiences.iter().map(|text| token::plain_audience(text).to_owned()).collect(),
            claim_headers: claim_headers.collect(),
            locations,
            keys,
            forward: rule.forward_original_token,
            payload_header,
            space_delimited: SPACE_DELIMITED.into_iter().chain(extra).map(str::to_owned).collect(),
        }
    }

    /// What the first token says, if all hold.
    async fn verify_all(&self, tokens: &[Cow<'_, str>], now: SystemTime) -> Result<Arc<Held>, TokenError> {
        let mut first = None;
        for token in tokens {
            let held = self.verify(token, now).await?;
            first.get_or_insert(held);
        }
        first.ok_or(TokenError::BadFormat)
    }

    async fn verify(&self, text: &str, now: SystemTime) -> Result<Arc<Held>, TokenError> {
        if let Some(held) = cache::get(self.id, text)
            && self.keys.are(&held.keys)
        {
            held.times.check(now)?;
            return Ok(held);
        }
        let token = Token::read(text)?;
        if token.issuer() != self.issuer {
            return Err(TokenError::UnknownIssuer);
        }
        let times = token.times();
        times.check(now)?;
        token.check_audience(&self.audiences)?;
        let keys = self.keys.verify(&token).await?;
        let headers = self.headers(text, &token.claims);
        let held = Arc::new(Held { times, keys, headers, claims: Arc::new(self.with_lists(token.claims)) });
        cache::put(self.id, text, &held);
        Ok(held)
    }

    fn headers(&self, text: &str, claims: &Map<String, Value>) -> Vec<(HeaderName, HeaderValue)> {
        let payload = self.payload_header.as_ref().and_then(|name| {
            let payload = text.split('.').nth(1).unwrap_or("");
            Some((name.clone(), HeaderValue::from_str(payload).ok()?))
        });
        let claims = self
            .claim_headers
            .iter()
            .filter_map(|(name, claim)| Some((name.clone(), claim_header(claims, claim)?)));
        payload.into_iter().chain(claims).collect()
    }

    fn with_lists(&self, mut claims: Map<String, Value>) -> Map<String, Value> {
        for name in &self.space_delimited {
            if let Some(value) = claims.get_mut(name)
                && let Some(text) = value.as_str()
            {
                *value = text.split(' ').filter(|word| !word.is_empty()).collect();
            }
        }
        claims
    }
}

impl Keys {
    /// Whether these are the keys in force.
    fn are(&self, keys: &Arc<KeySet>) -> bool {
        match self {
            Self::Inline(own) => Arc::ptr_eq(own, keys),
            Self::Remote(source) => source.has(keys),
            Self::Absent => false,
        }
    }

    /// The keys with one of which the token was signed.
    async fn verify(&self, token: &Token<'_>) -> Result<Arc<KeySet>, TokenError> {
        let source = match self {
            Self::Absent => return Err(TokenError::JwksFetch),
            Self::Inline(keys) => return check_signature(token, keys).map(|()| Arc::clone(keys)),
            Self::Remote(source) => source,
        };
        let keys = source.keys().await.ok_or(TokenError::JwksFetch)?;
        match check_signature(token, &keys) {
            Ok(()) => Ok(keys),
            Err(TokenError::NoKey) => {
                // The issuer may have a new key.
                source.refresh().await;
                let keys = source.keys().await.ok_or(TokenError::JwksFetch)?;
                check_signature(token, &keys).map(|()| keys)
            }
            Err(error) => Err(error),
        }
    }
}

fn check_signature(token: &Token<'_>, keys: &KeySet) -> Result<(), TokenError> {
    let checked =
        keys.verify(token.algorithm, token.key_id.as_deref(), token.signed.as_bytes(), &token.signature);
    checked.map_err(|error| match error {
        SignatureError::NoKey => TokenError::NoKey,
        SignatureError::Mismatch => TokenError::VerificationFails,
    })
}

/// A claim as a header: texts, numbers and booleans as they are, lists and objects as JSON in base64url. `a.b` is a claim
/// in a claim, unless there is one of this name.
fn claim_header(claims: &Map<String, Value>, name: &str) -> Option<HeaderValue> {
    let nested = || {
        let mut names = name.split('.');
        let first = claims.get(names.next()?)?;
        names.try_fold(first, |value, name| value.get(name))
    };
    let text = match claims.get(name).or_else(nested)? {
        Value::String(text) => text.clone(),
        Value::Null => return None,
        value @ (Value::Bool(_) | Value::Number(_)) => value.to_string(),
        value => URL_SAFE_NO_PAD.encode(value.to_string()),
    };
    // A claim with control characters stays out, as it would become more than one header.
    HeaderValue::from_str(&text).ok()
}

/// The URL of the request, at most 256 characters, without what would end the quotes.
fn realm(head: &Head<'_>) -> String {
    const LONGEST: usize = 256;
    let Head { scheme, authority, path, .. } = head;
    let url = format!("{scheme}://{authority}{path}");
    url.chars().filter(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\')).take(LONGEST).collect()
}
