//! Who may see the events of which namespaces: whoever may `get` `pods/log` there. The API server says who sent a token
//! (`TokenReview`, for itself as the audience) and what that user may do (`SubjectAccessReview`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec, SubjectAccessReviewStatus,
};
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::timeout;

use super::remembered::Remembered;
use super::review::{ANSWER, BAD_FOR, GOOD_FOR, ReviewError};

/// Somebody whom the API server knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Viewer {
    /// Name.
    pub user: String,
    uid: Option<String>,
    groups: Vec<String>,
    extra: BTreeMap<String, Vec<String>>,
    /// Of the token; what was found out is remembered by it.
    digest: Vec<u8>,
}

/// Asks the API server, and remembers what it said for a short time.
pub struct Viewers {
    tokens: Api<TokenReview>,
    access: Api<SubjectAccessReview>,
    viewers: Remembered<Vec<u8>, Result<Arc<Viewer>, ReviewError>>,
    rights: Remembered<(Vec<u8>, String), bool>,
}

impl std::fmt::Debug for Viewers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Viewers")
    }
}

impl Viewers {
    /// Asks by this client.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self {
            tokens: Api::all(client.clone()),
            access: Api::all(client),
            viewers: Remembered::default(),
            rights: Remembered::default(),
        }
    }

    /// Who sent a token.
    ///
    /// # Errors
    /// It is refused, or the API server cannot be asked.
    pub async fn viewer(&self, token: &str) -> Result<Arc<Viewer>, ReviewError> {
        let digest = digest(&SHA256, token.as_bytes()).as_ref().to_vec();
        if let Some(answer) = self.viewers.get(&digest) {
            return answer;
        }
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: None },
            ..TokenReview::default()
        };
        let review = timeout(ANSWER, self.tokens.create(&PostParams::default(), &review))
            .await
            .map_err(|_elapsed| ReviewError::Unavailable(format!("no answer in {} s", ANSWER.as_secs())))?
            .map_err(|error| ReviewError::Unavailable(error.to_string()))?;
        let answer = read(review.status.unwrap_or_default(), digest.clone()).map_err(ReviewError::Refused);
        let answer = answer.map(Arc::new);
        self.viewers.put(digest, answer.clone(), if answer.is_ok() { GOOD_FOR } else { BAD_FOR });
        answer
    }

    /// Whether somebody may see a namespace; the empty one is all of them.
    ///
    /// # Errors
    /// The API server cannot be asked.
    pub async fn may(&self, viewer: &Viewer, namespace: &str) -> Result<bool, ReviewError> {
        let key = (viewer.digest.clone(), namespace.to_owned());
        if let Some(may) = self.rights.get(&key) {
            return Ok(may);
        }
        let review =
            SubjectAccessReview { spec: question(viewer, namespace), ..SubjectAccessReview::default() };
        let unavailable = |cause: String| ReviewError::Unavailable(format!("SubjectAccessReview: {cause}"));
        let review = timeout(ANSWER, self.access.create(&PostParams::default(), &review))
            .await
            .map_err(|_elapsed| unavailable(format!("no answer in {} s", ANSWER.as_secs())))?
            .map_err(|error| unavailable(error.to_string()))?;
        let may = allowed(review.status.as_ref());
        self.rights.put(key, may, RIGHTS_FOR);
        Ok(may)
    }
}

/// A right that was taken away is gone within this.
const RIGHTS_FOR: Duration = GOOD_FOR;

fn allowed(status: Option<&SubjectAccessReviewStatus>) -> bool {
    status.is_some_and(|status| status.allowed && status.denied != Some(true))
}

fn question(viewer: &Viewer, namespace: &str) -> SubjectAccessReviewSpec {
    let text = |text: &str| Some(text.to_owned());
    SubjectAccessReviewSpec {
        user: text(&viewer.user),
        uid: viewer.uid.clone(),
        groups: Some(viewer.groups.clone()),
        extra: Some(viewer.extra.clone()),
        resource_attributes: Some(ResourceAttributes {
            namespace: text(namespace),
            verb: text("get"),
            resource: text("pods"),
            subresource: text("log"),
            ..ResourceAttributes::default()
        }),
        ..SubjectAccessReviewSpec::default()
    }
}

fn read(status: TokenReviewStatus, digest: Vec<u8>) -> Result<Viewer, String> {
    if status.authenticated != Some(true) {
        return Err(status.error.unwrap_or_else(|| "the API server does not know it".to_owned()));
    }
    let user = status.user.ok_or("no user")?;
    Ok(Viewer {
        user: user.username.filter(|name| !name.is_empty()).ok_or("a user without a name")?,
        uid: user.uid,
        groups: user.groups.unwrap_or_default(),
        extra: user.extra.unwrap_or_default(),
        digest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_asked_about_as_the_api_server_described_it() {
        let user = k8s_openapi::api::authentication::v1::UserInfo {
            username: Some("jane".into()),
            groups: Some(vec!["team".into()]),
            ..Default::default()
        };
        let status = TokenReviewStatus { authenticated: Some(true), user: Some(user), ..Default::default() };
        let viewer = read(status, vec![1]).unwrap();
        let asked = question(&viewer, "shop");
        assert_eq!((asked.user.as_deref(), asked.groups), (Some("jane"), Some(vec!["team".to_owned()])));
        let resource = asked.resource_attributes.unwrap();
        let words = [resource.verb, resource.resource, resource.subresource, resource.namespace];
        assert_eq!(words.map(Option::unwrap), ["get", "pods", "log", "shop"]);
        assert!(read(TokenReviewStatus::default(), vec![]).is_err());
        assert!(!allowed(None));
    }
}
