//! Public keys of an issuer (RFC 7517), and the check of signatures with them (RFC 7518).

use aws_lc_rs::signature::{self, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

/// Signature algorithms. There is no `none`, and no HMAC: keys here are public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::security) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
}

impl Algorithm {
    const RSA: [Self; 6] = [Self::Rs256, Self::Rs384, Self::Rs512, Self::Ps256, Self::Ps384, Self::Ps512];

    /// By its name in `alg`.
    pub(in crate::security) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }

    fn rsa(self) -> Option<&'static RsaParameters> {
        Some(match self {
            Self::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
            Self::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
            Self::Es256 | Self::Es384 | Self::Es512 | Self::EdDsa => return None,
        })
    }
}

/// The keys of one document.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
    /// Keys that cannot be used, with the reason.
    skipped: Vec<String>,
}

#[derive(Debug)]
struct Key {
    id: Option<Box<str>>,
    /// An algorithm that this key does not have here cannot be used with it, whatever a token says.
    verifiers: Vec<(Algorithm, ParsedPublicKey)>,
}

/// Why a document of keys cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Not JSON.
    #[error("is no JSON: {0}")]
    NotJson(String),
    /// Not a set of keys.
    #[error("has no list \"keys\"")]
    NoKeys,
    /// Keys, but none to verify with.
    #[error("has no public key that can be used{}", .0.iter().map(|why| format!("; {why}")).collect::<String>())]
    NoneUsable(Vec<String>),
}

/// Why a signature does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::security) enum SignatureError {
    /// No key has the token's key id and algorithm: the issuer may have a new one.
    NoKey,
    /// A key has, and the signature is not its own.
    Mismatch,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

impl KeySet {
    /// Reads a JWK set. Keys of kinds that cannot be used are left out.
    ///
    /// # Errors
    /// Not a set of keys, or none that can be used.
    pub fn read(text: &[u8]) -> Result<Self, KeySetError> {
        let document: serde_json::Value =
            serde_json::from_slice(text).map_err(|error| KeySetError::NotJson(error.to_string()))?;
        let list = document.get("keys").and_then(serde_json::Value::as_array).ok_or(KeySetError::NoKeys)?;
        let mut set = Self { keys: Vec::new(), skipped: Vec::new() };
        for (i, value) in list.iter().enumerate() {
            let key =
                Jwk::deserialize(value).map_err(|error| error.to_string()).and_then(|jwk| Key::new(&jwk));
            match key {
                Ok(key) => set.keys.push(key),
                Err(why) => set.skipped.push(format!("keys[{i}]: {why}")),
            }
        }
        if set.keys.is_empty() { Err(KeySetError::NoneUsable(set.skipped)) } else { Ok(set) }
    }

    /// Keys that cannot be used, with the reason.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Whether a key made the signature. Where token and key both have an id, the ids must be equal.
    pub(in crate::security) fn verify(
        &self,
        algorithm: Algorithm,
        id: Option<&str>,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), SignatureError> {
        let mut error = SignatureError::NoKey;
        for key in &self.keys {
            if let (Some(id), Some(own)) = (id, key.id.as_deref())
                && id != own
            {
                continue;
            }
            for (_, verifier) in key.verifiers.iter().filter(|(own, _)| *own == algorithm) {
                match verifier.verify_sig(message, signature) {
                    Ok(()) => return Ok(()),
                    Err(_) => error = SignatureError::Mismatch,
                }
            }
        }
        Err(error)
    }
}

impl Key {
    fn new(jwk: &Jwk) -> Result<Self, String> {
        if jwk.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("is not for signatures (use)".to_owned());
        }
        let only = match jwk.alg.as_deref() {
            None => None,
            Some(name) => {
                Some(Algorithm::named(name).ok_or_else(|| format!("alg {name:?} is not supported"))?)
            }
        };
        let all = match jwk.kty.as_str() {
            "RSA" => rsa(jwk)?,
            "EC" => vec![elliptic(jwk)?],
            "OKP" => vec![edwards(jwk)?],
            other => return Err(format!("kty {other:?} is not supported; RSA, EC and OKP are")),
        };
        let verifiers: Vec<_> =
            all.into_iter().filter(|(own, _)| only.is_none_or(|only| only == *own)).collect();
        if verifiers.is_empty() {
            return Err(format!("alg {:?} does not fit kty {:?}", jwk.alg.as_deref().unwrap_or(""), jwk.kty));
        }
        Ok(Self { id: jwk.kid.as_deref().filter(|id| !id.is_empty()).map(Into::into), verifiers })
    }
}

fn rsa(jwk: &Jwk) -> Result<Vec<(Algorithm, ParsedPublicKey)>, String> {
    let (n, e) = (number("n", jwk.n.as_deref())?, number("e", jwk.e.as_deref())?);
    // Shorter ones are refused when a signature is checked, where nobody reads the reason.
    if n.len() < 256 {
        return Err("the modulus has less than 2048 bits".to_owned());
    }
    let key = RsaPublicKeyComponents { n: &n, e: &e };
    Algorithm::RSA
        .into_iter()
        .filter_map(|algorithm| Some((algorithm, algorithm.rsa()?)))
        .map(|(algorithm, parameters)| {
            let parsed = key.to_parsed_public_key(parameters).map_err(|error| error.to_string())?;
            Ok((algorithm, parsed))
        })
        .collect()
}

fn elliptic(jwk: &Jwk) -> Result<(Algorithm, ParsedPublicKey), String> {
    let curve = jwk.crv.as_deref().unwrap_or("");
    let (algorithm, verifier, size): (_, &'static dyn signature::VerificationAlgorithm, usize) = match curve {
        "P-256" => (Algorithm::Es256, &signature::ECDSA_P256_SHA256_FIXED, 32),
        "P-384" => (Algorithm::Es384, &signature::ECDSA_P384_SHA384_FIXED, 48),
        "P-521" => (Algorithm::Es512, &signature::ECDSA_P521_SHA512_FIXED, 66),
        other => return Err(format!("crv {other:?} is not supported; P-256, P-384 and P-521 are")),
    };
    let mut point = vec![4];
    for (name, coordinate) in [("x", &jwk.x), ("y", &jwk.y)] {
        let coordinate = bytes(name, coordinate.as_deref())?;
        if coordinate.len() != size {
            return Err(format!("{name} has {} bytes instead of {size}", coordinate.len()));
        }
        point.extend_from_slice(&coordinate);
    }
    let parsed = ParsedPublicKey::new(verifier, &point).map_err(|error| error.to_string())?;
    Ok((algorithm, parsed))
}

fn edwards(jwk: &Jwk) -> Result<(Algorithm, ParsedPublicKey), String> {
    match jwk.crv.as_deref() {
        Some("Ed25519") => {}
        other => return Err(format!("crv {:?} is not supported; Ed25519 is", other.unwrap_or(""))),
    }
    let x = bytes("x", jwk.x.as_deref())?;
    let parsed = ParsedPublicKey::new(&signature::ED25519, &x).map_err(|error| error.to_string())?;
    Ok((Algorithm::EdDsa, parsed))
}

fn bytes(name: &str, text: Option<&str>) -> Result<Vec<u8>, String> {
    let text = text.ok_or_else(|| format!("has no {name}"))?;
    // Some issuers pad, against RFC 7515.
    URL_SAFE_NO_PAD
        .decode(text.trim_end_matches('='))
        .map_err(|error| format!("{name} is no base64url: {error}"))
}

/// A big-endian number without leading zeros, which some issuers write.
fn number(name: &str, text: Option<&str>) -> Result<Vec<u8>, String> {
    let bytes = bytes(name, text)?;
    let start = bytes.iter().position(|b| *b != 0).ok_or_else(|| format!("{name} is zero"))?;
    Ok(bytes[start..].to_vec())
}
