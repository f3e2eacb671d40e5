//! Who may see which events.
//!
//! Without a cluster: who is on this machine, and who has a client certificate of the CA that the operator named, sees all.
//! In a cluster the API server decides, for each bearer token: who may `get` `pods/log` in all namespaces sees all; who may
//! in some sees events whose source or destination is in one of them. Events travel in the clear to this machine only.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, StatusCode, header};

use crate::kubernetes::review::ReviewError;
use crate::kubernetes::viewers::{Viewer, Viewers};

/// Where a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// This machine, in the clear.
    Machine,
    /// Somewhere else, in the clear.
    Network,
    /// Over TLS; with a client certificate, where one is asked for.
    Tls,
}

impl Origin {
    /// Of a connection in the clear.
    #[must_use]
    pub fn of(peer: IpAddr) -> Self {
        if peer.to_canonical().is_loopback() { Self::Machine } else { Self::Network }
    }
}

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// In the clear from elsewhere.
    #[error(
        "events go to other machines over TLS only: ask https://HOST:PORT of --listen-relay, or forward this port (kubectl \
         port-forward)"
    )]
    Clear,
    /// Another site's page in a browser on this machine.
    #[error("host {0:?} is not this machine; ask by localhost or an address")]
    Host(String),
    /// No token.
    #[error(
        "a bearer token of the cluster is needed: meshctl --token FILE (kubectl create token ACCOUNT -n NAMESPACE)"
    )]
    NoToken,
    /// A token that is not good.
    #[error("the bearer token was refused: {0}")]
    Token(String),
    /// Not allowed.
    #[error("{user} may not get pods/log in namespace {namespace}, and so not see its events")]
    Namespace {
        /// Who.
        user: String,
        /// Where.
        namespace: String,
    },
    /// Not allowed to see what belongs to all.
    #[error(
        "{0} may not get pods/log in all namespaces, and so not ask nodes' agents; `flows`, `trace` and `top` show the events \
         of namespaces where it may"
    )]
    Nodes(String),
    /// The API server cannot say.
    #[error("who may see events cannot be found out now: {0}")]
    Unknown(String),
}

impl Refusal {
    /// The status that goes with it.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Clear | Self::Host(_) | Self::Namespace { .. } | Self::Nodes(_) => StatusCode::FORBIDDEN,
            Self::NoToken | Self::Token(_) => StatusCode::UNAUTHORIZED,
            Self::Unknown(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<ReviewError> for Refusal {
    fn from(error: ReviewError) -> Self {
        match error {
            ReviewError::Refused(why) => Self::Token(why),
            ReviewError::Unavailable(why) => Self::Unknown(why),
        }
    }
}

/// What decides.
#[derive(Debug, Clone)]
pub enum Gate {
    /// The operator's settings alone.
    Alone,
    /// The API server.
    Cluster(Arc<Viewers>),
}

/// What somebody may see.
#[derive(Debug, Clone)]
pub enum Sight {
    /// Everything.
    All,
    /// Some namespaces.
    Some(Arc<Viewers>, Arc<Viewer>),
}

impl Gate {
    /// What whoever sent a request may see.
    ///
    /// # Errors
    /// Nothing, and why.
    pub async fn admit(&self, origin: Origin, headers: &HeaderMap) -> Result<Sight, Refusal> {
        match origin {
            Origin::Network => return Err(Refusal::Clear),
            Origin::Machine => local_host(headers)?,
            Origin::Tls => {}
        }
        let Self::Cluster(viewers) = self else { return Ok(Sight::All) };
        let header = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = header
            .and_then(|h| h.strip_prefix("Bearer ").or_else(|| h.strip_prefix("bearer ")))
            .ok_or(Refusal::NoToken)?;
        let viewer = viewers.viewer(token.trim()).await?;
        if viewers.may(&viewer, "").await? {
            return Ok(Sight::All);
        }
        Ok(Sight::Some(viewers.clone(), viewer))
    }
}

/// A name that leads here only for a page of somebody else's is refused: a browser would let that page read the answer.
fn local_host(headers: &HeaderMap) -> Result<(), Refusal> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    if name.is_empty() || name == "localhost" || name.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    Err(Refusal::Host(host.to_owned()))
}

impl Sight {
    /// Refuses who asks for a namespace that is not to be seen, instead of showing nothing.
    ///
    /// # Errors
    /// It may not be seen, or that cannot be found out.
    pub async fn namespace(&self, namespace: &str) -> Result<(), Refusal> {
        match self {
            Self::Some(viewers, viewer) if !viewers.may(viewer, namespace).await? => {
                Err(Refusal::Namespace { user: viewer.user.clone(), namespace: namespace.to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Refuses who may not see everything: what a node's agent says is not sorted by namespaces.
    ///
    /// # Errors
    /// Some namespaces may not be seen.
    pub fn everything(&self) -> Result<(), Refusal> {
        match self {
            Self::All => Ok(()),
            Self::Some(_, viewer) => Err(Refusal::Nodes(viewer.user.clone())),
        }
    }

    /// Whether what is between two namespaces may be seen. `known` remembers namespaces during one answer.
    ///
    /// # Errors
    /// It cannot be found out.
    pub async fn sees(&self, ends: [&str; 2], known: &mut BTreeMap<String, bool>) -> Result<bool, Refusal> {
        let Self::Some(viewers, viewer) = self else { return Ok(true) };
        for namespace in ends {
            if namespace.is_empty() {
                continue;
            }
            let may = match known.get(namespace) {
                Some(may) => *may,
                None => {
                    let may = viewers.may(viewer, namespace).await?;
                    known.insert(namespace.to_owned(), may);
                    may
                }
            };
            if may {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::HOST, http::HeaderValue::from_static(host))])
    }

    #[tokio::test]
    async fn without_a_cluster_only_this_machine_and_holders_of_a_certificate_see_events() {
        let refusal = async |origin, name| Gate::Alone.admit(origin, &host(name)).await.err();
        for name in ["localhost:15014", "127.0.0.1:15014", "[::1]:15014"] {
            assert_eq!(refusal(Origin::Machine, name).await, None, "{name}");
        }
        assert_eq!(refusal(Origin::Tls, "istiod.istio-system.svc").await, None);
        let rebound = refusal(Origin::Machine, "evil.example:15014").await.unwrap();
        assert!(rebound.to_string().contains("evil.example"), "{rebound}");
        assert_eq!(refusal(Origin::Network, "10.0.0.1:15014").await, Some(Refusal::Clear));
        assert_eq!(Origin::of("::ffff:127.0.0.1".parse().unwrap()), Origin::Machine);
        assert_eq!(Origin::of("10.0.0.1".parse().unwrap()), Origin::Network);
    }
}
