//! JSON web tokens (RFC 7515, RFC 7519): reading, and what makes one invalid.

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use crate::security::jwks::Algorithm;

/// How far the clocks of issuer and waypoint may be apart (Envoy's default).
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Why a token is not accepted; the texts are Envoy's, which clients and dashboards look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not three parts.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    BadFormat,
    /// Header.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBase64,
    /// Header.
    #[error("Jwt header is an invalid JSON")]
    HeaderJson,
    /// Header.
    #[error("Jwt header [alg] field is required and must be a string")]
    HeaderAlg,
    /// `none`, HMAC, or unknown.
    #[error("Jwt header [alg] is not supported")]
    UnsupportedAlg,
    /// Header.
    #[error("Jwt header [kid] field is not a string")]
    HeaderKid,
    /// The issuer demands something that this version does not do (RFC 7515, 4.1.11). Envoy does not look.
    #[error("Jwt header [crit] is not supported")]
    Critical,
    /// Payload.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBase64,
    /// Payload.
    #[error("Jwt payload is an invalid JSON")]
    PayloadJson,
    /// Payload.
    #[error("Jwt payload [iss] field is not a string")]
    Iss,
    /// Payload.
    #[error("Jwt payload [sub] field is not a string")]
    Sub,
    /// Payload.
    #[error("Jwt payload [nbf] field is not an integer")]
    Nbf,
    /// Payload.
    #[error("Jwt payload [exp] field is not an integer")]
    Exp,
    /// Payload.
    #[error("Jwt payload [aud] field is not a string or string list")]
    Aud,
    /// Signature.
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBase64,
    /// Before `nbf`.
    #[error("Jwt not yet valid")]
    NotYetValid,
    /// After `exp`.
    #[error("Jwt is expired")]
    Expired,
    /// No rule has this issuer.
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    /// The rule has audiences, and none of the token's is one of them.
    #[error("Audiences in Jwt are not allowed")]
    AudienceNotAllowed,
    /// No key made the signature.
    #[error("Jwt verification fails")]
    VerificationFails,
    /// No key for the token's key id and algorithm.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    /// No keys to verify with.
    #[error("Jwks remote fetch is failed")]
    JwksFetch,
}

/// A token that has been read, and not verified.
#[derive(Debug)]
pub(super) struct Token<'t> {
    pub(super) algorithm: Algorithm,
    pub(super) key_id: Option<String>,
    /// What the signature is of.
    pub(super) signed: &'t str,
    pub(super) signature: Vec<u8>,
    pub(super) claims: Map<String, Value>,
}

impl<'t> Token<'t> {
    pub(super) fn read(text: &'t str) -> Result<Self, TokenError> {
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenError::BadFormat)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::BadFormat)?;
        if payload.contains('.') {
            return Err(TokenError::BadFormat);
        }
        let (algorithm, key_id) = read_header(header)?;
        let json = decode(payload).ok_or(TokenError::PayloadBase64)?;
        let Ok(Value::Object(claims)) = serde_json::from_slice(&json) else {
            return Err(TokenError::PayloadJson);
        };
        for (name, error) in [("iss", TokenError::Iss), ("sub", TokenError::Sub)] {
            if claims.get(name).is_some_and(|value| !value.is_string()) {
                return Err(error);
            }
        }
        for (name, error) in [("nbf", TokenError::Nbf), ("exp", TokenError::Exp)] {
            if claims.get(name).is_some_and(|value| !value.as_f64().is_some_and(|seconds| seconds >= 0.0)) {
                return Err(error);
            }
        }
        let is_text_or_texts = |value: &Value| match value {
            Value::Array(items) => items.iter().all(Value::is_string),
            value => value.is_string(),
        };
        if !claims.get("aud").is_none_or(is_text_or_texts) {
            return Err(TokenError::Aud);
        }
        let signature = decode(signature).ok_or(TokenError::SignatureBase64)?;
        Ok(Self { algorithm, key_id, signed, signature, claims })
    }

    pub(super) fn issuer(&self) -> &str {
        self.claims.get("iss").and_then(Value::as_str).unwrap_or("")
    }

    pub(super) fn times(&self) -> Times {
        let time = |name| self.claims.get(name).and_then(Value::as_f64);
        Times { not_before: time("nbf"), expires: time("exp") }
    }

    /// Whether the token is meant for one of these (each without scheme and last slash); for anyone if there are none.
    pub(super) fn check_audience(&self, allowed: &[String]) -> Result<(), TokenError> {
        let is_allowed = |value: &Value| {
            value.as_str().is_some_and(|text| allowed.iter().any(|audience| audience == plain_audience(text)))
        };
        let found = match self.claims.get("aud") {
            Some(Value::Array(items)) => items.iter().any(is_allowed),
            Some(value) => is_allowed(value),
            None => false,
        };
        if found || allowed.is_empty() { Ok(()) } else { Err(TokenError::AudienceNotAllowed) }
    }
}

/// When a token holds, in seconds since the epoch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    not_before: Option<f64>,
    /// Without it a token holds for ever.
    expires: Option<f64>,
}

impl Times {
    pub(super) fn check(&self, now: SystemTime) -> Result<(), TokenError> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let skew = CLOCK_SKEW.as_secs_f64();
        if self.not_before.is_some_and(|not_before| not_before > now + skew) {
            return Err(TokenError::NotYetValid);
        }
        if self.expires.is_some_and(|expires| now > expires + skew) {
            return Err(TokenError::Expired);
        }
        Ok(())
    }
}

/// Envoy compares audiences without scheme and last slash.
pub(super) fn plain_audience(audience: &str) -> &str {
    let audience =
        audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    audience.strip_suffix('/').unwrap_or(audience)
}

fn read_header(header: &str) -> Result<(Algorithm, Option<String>), TokenError> {
    let json = decode(header).ok_or(TokenError::HeaderBase64)?;
    let Ok(Value::Object(fields)) = serde_json::from_slice(&json) else {
        return Err(TokenError::HeaderJson);
    };
    let algorithm = fields.get("alg").and_then(Value::as_str).ok_or(TokenError::HeaderAlg)?;
    let algorithm = Algorithm::named(algorithm).ok_or(TokenError::UnsupportedAlg)?;
    let key_id = match fields.get("kid") {
        None => None,
        Some(Value::String(id)) => (!id.is_empty()).then(|| id.clone()),
        Some(_) => return Err(TokenError::HeaderKid),
    };
    if fields.contains_key("crit") {
        return Err(TokenError::Critical);
    }
    Ok((algorithm, key_id))
}

fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}
