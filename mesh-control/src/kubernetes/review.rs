//! Who a caller is, by its projected service-account token: the API server checks it (`TokenReview`, audience
//! `istio-ca`), and the pod that it is bound to says which node it is on.
//!
//! What the API server said is remembered for a short time, by the token's digest; where the pod is, is looked up anew each
//! time. A token whose pod is gone is refused by the API server itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::timeout;

use super::remembered::Remembered;
use crate::auth::{AUDIENCE, Caller};
use crate::hub::Hub;
use crate::model::{Key, Objects};

/// A token that was good is good for this long without asking again.
pub(super) const GOOD_FOR: Duration = Duration::from_secs(30);
/// A token that was refused is refused for this long without asking again.
pub(super) const BAD_FOR: Duration = Duration::from_secs(5);
/// The API server answers within this, or the caller comes again.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Why a token says nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReviewError {
    /// It is not good enough, and why (for the log).
    #[error("{0}")]
    Refused(String),
    /// The API server could not be asked.
    #[error(
        "TokenReview: {0}; the API server has to be there, and this account needs create on tokenreviews"
    )]
    Unavailable(String),
}

fn refused(why: impl Into<String>) -> ReviewError {
    ReviewError::Refused(why.into())
}

/// What the API server says of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reviewed {
    namespace: String,
    service_account: String,
    pod: String,
    pod_uid: String,
    /// Newer API servers say on which node the pod is.
    node: Option<String>,
}

type Answer = Result<Arc<Reviewed>, ReviewError>;

/// Checks tokens.
pub struct Reviewer {
    api: Api<TokenReview>,
    hub: Arc<Hub>,
    agents: Vec<Key>,
    remembered: Remembered<Vec<u8>, Answer>,
}

impl std::fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reviewer").field("agents", &self.agents).finish_non_exhaustive()
    }
}

impl Reviewer {
    /// `agents` are the service accounts of node agents, by namespace and name.
    #[must_use]
    pub fn new(client: Client, hub: Arc<Hub>, agents: Vec<Key>) -> Self {
        Self { api: Api::all(client), hub, agents, remembered: Remembered::default() }
    }

    /// Who sent a token.
    ///
    /// # Errors
    /// It is refused, or the API server cannot be asked.
    pub async fn caller(&self, token: &str) -> Result<Caller, ReviewError> {
        let reviewed = self.reviewed(token).await?;
        caller(&reviewed, self.hub.published().objects(), &self.agents)
    }

    async fn reviewed(&self, token: &str) -> Answer {
        let key = digest(&SHA256, token.as_bytes()).as_ref().to_vec();
        if let Some(answer) = self.remembered.get(&key) {
            return answer;
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let unavailable = |cause: String| ReviewError::Unavailable(cause);
        let review = timeout(ANSWER, self.api.create(&PostParams::default(), &review))
            .await
            .map_err(|_elapsed| unavailable(format!("no answer in {} s", ANSWER.as_secs())))?
            .map_err(|e| unavailable(e.to_string()))?;
        let answer = accept(&review.status.unwrap_or_default()).map(Arc::new).map_err(refused);
        self.remembered.put(key, answer.clone(), if answer.is_ok() { GOOD_FOR } else { BAD_FOR });
        answer
    }
}

/// Reads the API server's answer.
fn accept(status: &TokenReviewStatus) -> Result<Reviewed, String> {
    if status.authenticated != Some(true) {
        let why = status.error.as_deref().unwrap_or("the API server does not say why");
        return Err(format!("not authenticated: {why}"));
    }
    // An API server that does not know audiences authenticates a token for any.
    if !status.audiences.iter().flatten().any(|a| a == AUDIENCE) {
        return Err(format!("the token is not for audience {AUDIENCE}"));
    }
    let user = status.user.as_ref().ok_or("no user")?;
    if !user.groups.iter().flatten().any(|g| g == "system:serviceaccounts") {
        return Err("not a service account".into());
    }
    let name = user.username.as_deref().unwrap_or_default();
    let (namespace, service_account) = match name.split(':').collect::<Vec<_>>()[..] {
        ["system", "serviceaccount", namespace, account] => (namespace.to_owned(), account.to_owned()),
        _ => return Err(format!("{name:?} is not system:serviceaccount:<namespace>:<name>")),
    };
    let no_extra = BTreeMap::new();
    let extra = user.extra.as_ref().unwrap_or(&no_extra);
    let one = |key: &str| extra.get(key).and_then(|values| values.first()).filter(|v| !v.is_empty()).cloned();
    let unbound = "the token is bound to no pod; use a projected token";
    Ok(Reviewed {
        namespace,
        service_account,
        pod: one(POD_NAME).ok_or(unbound)?,
        pod_uid: one(POD_UID).ok_or(unbound)?,
        node: one(NODE_NAME),
    })
}

/// Where the token's pod is, and what it may do.
fn caller(reviewed: &Reviewed, objects: &Objects, agents: &[Key]) -> Result<Caller, ReviewError> {
    let key = Key::new(&reviewed.namespace, &reviewed.pod);
    // The watch may be behind the API server: then what it says itself counts.
    let known = objects.pods.get(&key).filter(|pod| pod.meta.uid == reviewed.pod_uid && !pod.node.is_empty());
    if let Some(pod) = known
        && pod.service_account != reviewed.service_account
    {
        return Err(refused(format!("pod {key} runs as {}", pod.service_account)));
    }
    let node = known
        .map(|pod| pod.node.clone())
        .or_else(|| reviewed.node.clone())
        .ok_or_else(|| refused(format!("pod {key} with uid {} is not known yet", reviewed.pod_uid)))?;
    let account = Key::new(&reviewed.namespace, &reviewed.service_account);
    Ok(Caller {
        node,
        namespace: account.namespace.clone(),
        service_account: account.name.clone(),
        agent: agents.contains(&account),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: agent-1, namespace: istio-system, uid: u1}
spec: {nodeName: n1, serviceAccountName: undermesh-node, containers: []}
";

    fn status() -> TokenReviewStatus {
        let extra = [(POD_NAME, "agent-1"), (POD_UID, "u1"), (NODE_NAME, "n9")];
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![AUDIENCE.into()]),
            user: Some(UserInfo {
                username: Some("system:serviceaccount:istio-system:undermesh-node".into()),
                groups: Some(vec!["system:serviceaccounts".into()]),
                extra: Some(extra.map(|(k, v)| (k.to_owned(), vec![v.to_owned()])).into()),
                ..UserInfo::default()
            }),
            ..TokenReviewStatus::default()
        }
    }

    fn agents() -> Vec<Key> {
        vec![Key::new("istio-system", "undermesh-node")]
    }

    #[test]
    fn a_pods_token_says_its_account_and_the_watch_says_its_node() {
        let objects = crate::testing::objects(PODS);
        let found = caller(&accept(&status()).unwrap(), &objects, &agents()).unwrap();
        assert_eq!((found.node.as_str(), found.agent), ("n1", true));
        assert_eq!(found.service_account, "undermesh-node");
        let other = caller(&accept(&status()).unwrap(), &objects, &[]).unwrap();
        assert!(!other.agent, "no trusted account");
    }

    #[test]
    fn a_pod_that_the_watch_has_not_seen_is_where_the_api_server_says() {
        let mut reviewed = accept(&status()).unwrap();
        let none = Objects::default();
        assert_eq!(caller(&reviewed, &none, &agents()).unwrap().node, "n9");
        // A pod of the same name that is another one says nothing.
        reviewed.pod_uid = "u2".into();
        assert_eq!(caller(&reviewed, &crate::testing::objects(PODS), &agents()).unwrap().node, "n9");
        reviewed.node = None;
        let why = caller(&reviewed, &none, &agents()).unwrap_err().to_string();
        assert!(why.contains("is not known yet"), "{why}");
    }

    #[test]
    fn tokens_that_prove_too_little_are_refused() {
        let with = |change: fn(&mut TokenReviewStatus)| {
            let mut status = status();
            change(&mut status);
            accept(&status).unwrap_err()
        };
        assert!(with(|s| s.authenticated = Some(false)).contains("not authenticated"));
        assert!(with(|s| s.audiences = None).contains("audience"));
        assert!(with(|s| s.audiences = Some(vec!["api".into()])).contains("audience"));
        assert!(with(|s| s.user.as_mut().unwrap().groups = None).contains("service account"));
        assert!(with(|s| s.user.as_mut().unwrap().username = Some("admin".into())).contains("admin"));
        assert!(with(|s| s.user.as_mut().unwrap().extra = None).contains("bound to no pod"));
    }

    #[test]
    fn a_pod_that_runs_as_another_account_is_refused() {
        let objects = crate::testing::objects(&PODS.replace("undermesh-node", "other"));
        let why = caller(&accept(&status()).unwrap(), &objects, &agents()).unwrap_err().to_string();
        assert!(why.contains("runs as other"), "{why}");
    }
}
