//! The API server, for commands that change or look at a cluster: objects as JSON, whatever their kind.

use std::path::Path;

use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

/// Name under which fields are owned.
const MANAGER: &str = "meshctl";

/// Why the cluster cannot be asked, or says no.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// No cluster is named.
    #[error("no cluster to talk to: {0}; give --kubeconfig FILE, or set KUBECONFIG")]
    Config(String),
    /// The API server refused, or was not reached.
    #[error("cannot {action} {object}: {problem}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: String,
        /// What the API server, or the network, said.
        problem: String,
    },
    /// Something of ours that is no object.
    #[error("{0} has no apiVersion, kind or name")]
    Shape(String),
}

/// A connection.
#[derive(Clone)]
pub struct Cluster {
    client: kube::Client,
}

/// What names an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `apps/v1`.
    pub api_version: String,
    /// `DaemonSet`.
    pub kind: String,
    /// None for cluster-wide objects.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

impl Reference {
    /// Names any object.
    #[must_use]
    pub fn new(api_version: &str, kind: &str, namespace: Option<&str>, name: &str) -> Self {
        Self {
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        }
    }

    /// Names an object by its own fields.
    ///
    /// # Errors
    /// One of them is missing.
    pub fn of(object: &Value) -> Result<Self, ClusterError> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let (Some(api_version), Some(kind), Some(name)) =
            (text("/apiVersion"), text("/kind"), text("/metadata/name"))
        else {
            return Err(ClusterError::Shape(object.to_string().chars().take(80).collect()));
        };
        Ok(Self::new(api_version, kind, text("/metadata/namespace"), name))
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

impl Cluster {
    /// Connects to the cluster of a file, of `KUBECONFIG`, of `~/.kube/config`, or the one that this runs in.
    ///
    /// # Errors
    /// There is none, or its description cannot be used.
    pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Self, ClusterError> {
        let failed = |error: &dyn std::error::Error| ClusterError::Config(causes(error));
        let options =
            KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
        let config = match (kubeconfig, context) {
            (Some(path), _) => {
                let file = Kubeconfig::read_from(path).map_err(|e| failed(&e))?;
                kube::Config::from_custom_kubeconfig(file, &options).await.map_err(|e| failed(&e))?
            }
            (None, Some(_)) => kube::Config::from_kubeconfig(&options).await.map_err(|e| failed(&e))?,
            (None, None) => kube::Config::infer().await.map_err(|e| failed(&e))?,
        };
        let client = kube::Client::try_from(config).map_err(|e| failed(&e))?;
        Ok(Self { client })
    }

    fn api(&self, object: &Reference) -> Api<DynamicObject> {
        let (group, version) = object.api_version.rsplit_once('/').unwrap_or(("", &object.api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &object.kind));
        match &object.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// The server's version, such as `v1.34.4`.
    ///
    /// # Errors
    /// It cannot be asked.
    pub async fn version(&self) -> Result<String, ClusterError> {
        let version = self.client.apiserver_version().await;
        version.map(|v| v.git_version).map_err(|e| refused("ask", "the API server's version", &e))
    }

    /// The connection, for what reads more than single objects.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        self.client.clone()
    }

    /// Makes an object what it should be (server-side apply).
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn apply(&self, object: &Value) -> Result<(), ClusterError> {
        let reference = Reference::of(object)?;
        let parameters = PatchParams::apply(MANAGER).force();
        let applied = self.api(&reference).patch(&reference.name, &parameters, &Patch::Apply(object)).await;
        applied.map(drop).map_err(|e| refused("apply", &reference.to_string(), &e))
    }

    /// An object as it is; none if there is none, or no such kind.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn get(&self, object: &Reference) -> Result<Option<Value>, ClusterError> {
        let found = self.api(object).get_opt(&object.name).await;
        let found = found.map_err(|e| refused("read", &object.to_string(), &e))?;
        Ok(found.and_then(|found| serde_json::to_value(found).ok()))
    }

    /// Objects of a kind, in one namespace or all, that match a label selector.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn list(
        &self,
        api_version: &str,
        kind: &str,
        namespace: Option<&str>,
        labels: &str,
    ) -> Result<Vec<Value>, ClusterError> {
        let reference = Reference::new(api_version, kind, namespace, "");
        let listed = self.api(&reference).list(&ListParams::default().labels(labels)).await;
        let listed = listed.map_err(|e| refused("list", &format!("{kind} objects"), &e))?;
        Ok(listed.items.into_iter().filter_map(|item| serde_json::to_value(item).ok()).collect())
    }

    /// Deletes an object; says whether there was one. Pods get `grace` seconds where given.
    ///
    /// # Errors
    /// The API server refuses.
    pub async fn delete(&self, object: &Reference, grace: Option<u32>) -> Result<bool, ClusterError> {
        let mut parameters = DeleteParams::background();
        parameters.grace_period_seconds = grace;
        match self.api(object).delete(&object.name, &parameters).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(refused("delete", &object.to_string(), &error)),
        }
    }

    /// Whether the caller may do something.
    ///
    /// # Errors
    /// The API server cannot be asked.
    pub async fn may(&self, verb: &str, group: &str, resource: &str) -> Result<bool, ClusterError> {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {},
            "spec": {"resourceAttributes": {"verb": verb, "group": group, "resource": resource}},
        });
        let kind = Reference::new("authorization.k8s.io/v1", "SelfSubjectAccessReview", None, "");
        let failed = |problem: String| ClusterError::Refused {
            action: "ask",
            object: "what the caller may do".to_owned(),
            problem,
        };
        let review: DynamicObject = serde_json::from_value(review).map_err(|e| failed(e.to_string()))?;
        let answer = self.api(&kind).create(&kube::api::PostParams::default(), &review).await;
        let answer = answer.map_err(|e| failed(causes(&e)))?;
        Ok(answer.data.pointer("/status/allowed").and_then(Value::as_bool).unwrap_or(false))
    }
}

fn refused(action: &'static str, object: &str, error: &kube::Error) -> ClusterError {
    let problem = match error {
        kube::Error::Api(status) => status.message.clone(),
        other => causes(other),
    };
    ClusterError::Refused { action, object: object.to_owned(), problem }
}

/// An error with its causes: the outermost text of transport errors says nothing.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_named_by_its_own_fields() {
        let object = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "a", "namespace": "n"}});
        assert_eq!(Reference::of(&object).unwrap().to_string(), "DaemonSet n/a");
        let error = Reference::of(&json!({"kind": "Secret"})).unwrap_err().to_string();
        assert!(error.contains("has no apiVersion, kind or name"), "{error}");
    }
}
