//! Who a client is: a bearer token that this control plane signed, bound to a node; in a cluster, a token of the API
//! server, bound to a pod ([`crate::kubernetes::review`]).
//!
//! The claims are those of a Kubernetes service-account token (audience `istio-ca`), so that an agent sends it
//! the way stock ztunnel sends its projected token.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::KeyPair;
use serde::{Deserialize, Serialize};
use tonic::Status;
use tonic::metadata::MetadataMap;
use tracing::{debug, warn};

use crate::ads::seconds;
use crate::files;
use crate::kubernetes::review::{ReviewError, Reviewer};

const ISSUER: &str = "undermesh-control";
pub(crate) const AUDIENCE: &str = "istio-ca";
const KEY_FILE: &str = "token-key.pem";

/// A client that proved who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Node that the token is bound to.
    pub node: String,
    /// Namespace of its service account.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// It is a node's agent: it gets certificates for the pods of its node, and says which of them it captured.
    pub agent: bool,
}

/// Why there is no token key.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The key file cannot be read or written.
    #[error("token key {path}: {cause}")]
    File {
        /// The file.
        path: String,
        /// The operating system's reason.
        cause: std::io::Error,
    },
    /// The key file holds no usable key.
    #[error("token key {path}: {cause}; delete it to get a new one (every node then needs a new token)")]
    Key {
        /// The file.
        path: String,
        /// What is wrong.
        cause: String,
    },
    /// Signing failed.
    #[error("cannot sign the token: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: Vec<String>,
    sub: String,
    iat: u64,
    nbf: u64,
    exp: u64,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Binding,
}

/// The part of a bound service-account token that names its node.
#[derive(Debug, Serialize, Deserialize)]
struct Binding {
    namespace: String,
    node: Named,
    serviceaccount: Named,
}

#[derive(Debug, Serialize, Deserialize)]
struct Named {
    name: String,
}

/// Signs and checks tokens (ES256).
#[derive(Clone)]
pub struct TokenKey {
    encoding: EncodingKey,
    decoding: DecodingKey,
    validation: Validation,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

impl TokenKey {
    /// Reads the key of a state directory; the first call makes one.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds no P-256 key.
    pub fn open(state_dir: &Path) -> Result<Self, TokenError> {
        let path = state_dir.join(KEY_FILE);
        let place = || path.display().to_string();
        let file = |cause| TokenError::File { path: place(), cause };
        let key = |cause: String| TokenError::Key { path: place(), cause };
        if !path.exists() {
            files::create_private_dir(state_dir).map_err(file)?;
            let pair = KeyPair::generate().map_err(|e| key(e.to_string()))?;
            files::create_new(&path, pair.serialize_pem().as_bytes()).map_err(file)?;
        }
        let pem = std::fs::read_to_string(&path).map_err(file)?;
        let pair = KeyPair::from_pem(&pem).map_err(|e| key(e.to_string()))?;
        let encoding = EncodingKey::from_ec_pem(pem.as_bytes()).map_err(|e| key(e.to_string()))?;
        let decoding =
            DecodingKey::from_ec_pem(pair.public_key_pem().as_bytes()).map_err(|e| key(e.to_string()))?;
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        validation.validate_nbf = true;
        Ok(Self { encoding, decoding, validation })
    }

    /// A token for a node's agent.
    ///
    /// # Errors
    /// Signing failed.
    pub fn issue(&self, caller: &Caller, ttl: Duration, now: SystemTime) -> Result<String, TokenError> {
        let now = seconds(now);
        let Caller { node, namespace, service_account, .. } = caller;
        let claims = Claims {
            iss: ISSUER.into(),
            aud: vec![AUDIENCE.into()],
            sub: format!("system:serviceaccount:{namespace}:{service_account}"),
            iat: now,
            nbf: now.saturating_sub(60),
            exp: now.saturating_add(ttl.as_secs()),
            kubernetes: Binding {
                namespace: namespace.clone(),
                node: Named { name: node.clone() },
                serviceaccount: Named { name: service_account.clone() },
            },
        };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &self.encoding)?)
    }

    /// Checks a token.
    ///
    /// # Errors
    /// Why it is not accepted, in clear; callers show it to nobody but the log.
    pub fn verify(&self, token: &str) -> Result<Caller, String> {
        let claims = jsonwebtoken::decode::<Claims>(token, &self.decoding, &self.validation)
            .map_err(|e| e.to_string())?
            .claims;
        let Binding { namespace, node, serviceaccount } = claims.kubernetes;
        let subject = format!("system:serviceaccount:{namespace}:{}", serviceaccount.name);
        if claims.sub != subject {
            return Err(format!("subject {} does not fit {subject}", claims.sub));
        }
        if node.name.is_empty() {
            return Err("names no node".into());
        }
        Ok(Caller { node: node.name, namespace, service_account: serviceaccount.name, agent: true })
    }
}

/// Who may use a listener.
#[derive(Debug, Clone)]
pub enum Access {
    /// Everyone who reaches it (15010, loopback by default).
    Open,
    /// Holders of a token (15012).
    Token(Arc<TokenKey>),
    /// Holders of a token of the cluster's API server (15012).
    Review(Arc<Reviewer>),
}

impl Access {
    /// The caller of a request; none on an open listener.
    ///
    /// # Errors
    /// `Unauthenticated`, without telling why; `Unavailable` when it could not be found out.
    pub async fn caller(&self, metadata: &MetadataMap) -> Result<Option<Caller>, Status> {
        if matches!(self, Self::Open) {
            return Ok(None);
        }
        let refuse = |why: &str| {
            debug!(why, "token refused");
            Status::unauthenticated("a valid bearer token is required")
        };
        let header = metadata.get("authorization").ok_or_else(|| refuse("no authorization header"))?;
        let token = header
            .to_str()
            .ok()
            .and_then(|h| h.strip_prefix("Bearer ").or_else(|| h.strip_prefix("bearer ")))
            .ok_or_else(|| refuse("no bearer token"))?
            .trim();
        match self {
            Self::Open => Ok(None),
            Self::Token(key) => key.verify(token).map(Some).map_err(|why| refuse(&why)),
            Self::Review(reviewer) => match reviewer.caller(token).await {
                Ok(caller) => Ok(Some(caller)),
                Err(ReviewError::Refused(why)) => Err(refuse(&why)),
                Err(error @ ReviewError::Unavailable(_)) => {
                    warn!(%error, "a token cannot be checked");
                    Err(Status::unavailable("tokens cannot be checked now"))
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(node: &str) -> Caller {
        Caller {
            node: node.into(),
            namespace: "istio-system".into(),
            service_account: "mesh-node".into(),
            agent: true,
        }
    }

    #[test]
    fn a_token_says_which_node_it_is_bound_to_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let token = TokenKey::open(dir.path())
            .unwrap()
            .issue(&caller("node-a"), Duration::from_secs(60), SystemTime::now())
            .unwrap();
        assert_eq!(TokenKey::open(dir.path()).unwrap().verify(&token), Ok(caller("node-a")));
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(dir.path().join(KEY_FILE)).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn expired_foreign_and_altered_tokens_are_refused() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = TokenKey::open(dir.path()).unwrap();
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        let expired = key.issue(&caller("a"), Duration::from_secs(60), hour_ago).unwrap();
        assert!(key.verify(&expired).unwrap_err().contains("Expired"), "{:?}", key.verify(&expired));
        let foreign = TokenKey::open(other.path()).unwrap();
        let foreign = foreign.issue(&caller("b"), Duration::from_secs(60), SystemTime::now()).unwrap();
        assert!(key.verify(&foreign).is_err());
        let good = key.issue(&caller("a"), Duration::from_secs(60), SystemTime::now()).unwrap();
        let mut parts: Vec<&str> = good.split('.').collect();
        let swapped: Vec<&str> = foreign.split('.').collect();
        parts[1] = swapped[1];
        assert!(key.verify(&parts.join(".")).is_err());
        assert!(key.verify("").is_err());
    }
}
