//! The CA in a Secret of the root namespace, so that every replica signs with the same key.
//!
//! `cacerts` is a CA that somebody plugged in, as in Istio (`ca-cert.pem`, `ca-key.pem`, `root-cert.pem`,
//! `cert-chain.pem`). Without it `istio-ca-secret` is used; the first replica that finds none creates it. It is only ever
//! created, never overwritten: of two replicas that create it at once one wins, and both read what is there.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, Error};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::ca::authority::{Authority, AuthorityError, SignError, new_root};
use crate::ca::store::CaStore;

/// A CA of the mesh's owner.
const PLUGGED_IN: &str = "cacerts";
/// Our own.
const OWN: &str = "istio-ca-secret";
/// Istio's type of it.
const TYPE: &str = "istio.io/ca-root";
/// The Secrets are looked at again this often.
const REFRESH: Duration = Duration::from_secs(15);
/// Pause while the API server cannot be asked at the start.
const RETRY: Duration = Duration::from_secs(2);

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server.
    #[error("Secret {name}: {cause}")]
    Api {
        /// Namespace and name.
        name: String,
        /// What it says.
        cause: Box<Error>,
    },
    /// The Secret does not make an authority.
    #[error("Secret {name}: {cause}; correct it, or delete it to have a new CA made")]
    Authority {
        /// Namespace and name.
        name: String,
        /// What is wrong.
        cause: AuthorityError,
    },
    /// A key could not be made.
    #[error(transparent)]
    Sign(#[from] SignError),
}

/// Reads and follows the Secrets.
#[derive(Clone)]
pub struct CaSecret {
    api: Api<Secret>,
    namespace: String,
}

impl std::fmt::Debug for CaSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaSecret").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl CaSecret {
    /// The Secrets of a namespace.
    #[must_use]
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned() }
    }

    /// The authority; makes one where there is none.
    ///
    /// # Errors
    /// The API server cannot be asked, or a Secret holds no usable CA.
    pub async fn load(&self, now: SystemTime) -> Result<Authority, SecretError> {
        if let Some(present) = self.present().await? {
            return Ok(present);
        }
        let (cert, key) = new_root("undermesh root", now)?;
        match self.api.create(&PostParams::default(), &own(&cert, &key)).await {
            Ok(secret) => {
                info!(secret = format!("{}/{OWN}", self.namespace), "a new certificate authority was made");
                self.authority(OWN, &secret)
            }
            // Another replica was first; its CA is the mesh's.
            Err(Error::Api(status)) if status.code == 409 => {
                let secret = self.api.get(OWN).await.map_err(|e| self.failed(OWN, e))?;
                self.authority(OWN, &secret)
            }
            Err(error) => Err(self.failed(OWN, error)),
        }
    }

    /// The authority that the Secrets hold.
    async fn present(&self) -> Result<Option<Authority>, SecretError> {
        for name in [PLUGGED_IN, OWN] {
            let secret = self.api.get_opt(name).await.map_err(|e| self.failed(name, e))?;
            if let Some(secret) = secret {
                return self.authority(name, &secret).map(Some);
            }
        }
        Ok(None)
    }

    /// [`CaSecret::load`], waiting for the API server for as long as it takes; none when `stop` becomes true meanwhile.
    ///
    /// # Errors
    /// A Secret holds no usable CA.
    pub async fn wait(&self, stop: &mut watch::Receiver<bool>) -> Result<Option<Authority>, SecretError> {
        loop {
            match self.load(SystemTime::now()).await {
                Ok(authority) => return Ok(Some(authority)),
                Err(error @ SecretError::Api { .. }) => {
                    warn!(%error, "waiting for the certificate authority")
                }
                Err(error) => return Err(error),
            }
            tokio::select! {
                () = sleep(RETRY) => {}
                _ = stop.wait_for(|s| *s) => return Ok(None),
            }
        }
    }

    /// Follows changes. What cannot be used is told, and leaves the authority as it is; so does a Secret that vanishes,
    /// since a new CA would be one that no running workload trusts.
    pub async fn follow(self, store: Arc<CaStore>) {
        loop {
            sleep(REFRESH).await;
            match self.present().await {
                Ok(None) => warn!(
                    namespace = self.namespace,
                    "the Secret of the certificate authority is gone; restore {OWN} or {PLUGGED_IN} from a backup: \
                     the next start makes a new CA, which nobody trusts yet"
                ),
                Ok(Some(authority)) => {
                    let present = store.authority();
                    if present.roots() != authority.roots() || present.chain() != authority.chain() {
                        store.replace(authority);
                    }
                }
                Err(error) => {
                    warn!(%error, "the certificate authority cannot be read again; it stays as it was")
                }
            }
        }
    }

    fn failed(&self, name: &str, cause: Error) -> SecretError {
        SecretError::Api { name: format!("{}/{name}", self.namespace), cause: Box::new(cause) }
    }

    fn authority(&self, name: &str, secret: &Secret) -> Result<Authority, SecretError> {
        read(secret)
            .map_err(|cause| SecretError::Authority { name: format!("{}/{name}", self.namespace), cause })
    }
}

fn own(cert: &str, key: &str) -> Secret {
    let data = [("ca-cert.pem", cert), ("ca-key.pem", key), ("root-cert.pem", cert)];
    let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.as_bytes().to_vec())));
    Secret {
        metadata: ObjectMeta { name: Some(OWN.to_owned()), ..ObjectMeta::default() },
        data: Some(data.into()),
        type_: Some(TYPE.to_owned()),
        ..Secret::default()
    }
}

/// Keys that Istio leaves empty are as good as absent; without a root the CA certificate is the root.
fn read(secret: &Secret) -> Result<Authority, AuthorityError> {
    let text = |name: &str| {
        let bytes = secret.data.as_ref().and_then(|d| d.get(name)).map(|b| b.0.clone()).unwrap_or_default();
        String::from_utf8(bytes).map_err(|e| AuthorityError(format!("{name} is no text: {e}")))
    };
    let (cert, key) = (text("ca-cert.pem")?, text("ca-key.pem")?);
    for (name, value) in [("ca-cert.pem", &cert), ("ca-key.pem", &key)] {
        if value.trim().is_empty() {
            return Err(AuthorityError(format!("{name} is missing")));
        }
    }
    let roots = match text("root-cert.pem")? {
        roots if roots.trim().is_empty() => cert.clone(),
        roots => roots,
    };
    Authority::new(&cert, &key, &text("cert-chain.pem")?, &roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_secret_can_be_read_again_and_one_without_its_parts_says_which() {
        let (cert, key) = new_root("test", SystemTime::now()).unwrap();
        let mut secret = own(&cert, &key);
        let whole = read(&secret).unwrap();
        assert_eq!(whole.roots(), cert.replace("\r\n", "\n"));
        secret.data.as_mut().unwrap().insert("root-cert.pem".into(), ByteString(Vec::new()));
        assert_eq!(read(&secret).unwrap().roots(), whole.roots(), "as Istio writes it");
        secret.data.as_mut().unwrap().remove("ca-key.pem");
        assert_eq!(read(&secret).unwrap_err().to_string(), "ca-key.pem is missing");
    }
}
