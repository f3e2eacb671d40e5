//! A connection that did not work: code, text and the object that decided. Cheap to clone, since those who wait for
//! one dial share its failure.

use std::fmt;
use std::sync::Arc;

use mesh_core::error::Code;
use mesh_core::policy::{Action, DenyReason, PolicySet};
use mesh_core::telemetry::Failure;
use mesh_core::why::Object;

use crate::certs::CertError;

/// See the module.
#[derive(Debug, Clone)]
pub struct Failed {
    /// The stable code.
    pub code: Code,
    /// The text of the access log's `error`.
    pub text: Arc<str>,
    /// The object that decided, if one did.
    pub decided_by: Option<Arc<str>>,
}

impl Failed {
    /// A failure without a deciding object.
    #[must_use]
    pub fn new(code: Code, text: impl Into<Arc<str>>) -> Self {
        Self { code, text: text.into(), decided_by: None }
    }

    /// A refusal by policy, in the words of Istio's node proxy.
    #[must_use]
    pub fn denied(reason: &DenyReason, policies: &PolicySet) -> Self {
        let text = format!("connection closed due to policy rejection: {reason}");
        Self { decided_by: deciding(reason, policies), ..Self::new(Code::PolicyDenied, text) }
    }

    /// A connection that a changed policy no longer allows.
    #[must_use]
    pub fn policy_changed(reason: &DenyReason, policies: &PolicySet) -> Self {
        let text = "connection closed due to policy change";
        Self { decided_by: deciding(reason, policies), ..Self::new(Code::PolicyChanged, text) }
    }

    /// As the access log takes it.
    #[must_use]
    pub fn to_log(&self) -> Failure {
        Failure { decided_by: self.decided_by.clone(), ..Failure::new(self.code, Arc::clone(&self.text)) }
    }
}

/// The object that denies; where ALLOW policies exist and none matched, those.
fn deciding(reason: &DenyReason, policies: &PolicySet) -> Option<Arc<str>> {
    let keys: Vec<&str> = match reason.policy() {
        Some(key) => vec![key],
        None => {
            let enforced = policies.policies.iter().filter(|p| p.action == Action::Allow && !p.dry_run);
            enforced.map(|p| &*p.key).collect()
        }
    };
    let objects: Vec<String> = keys.into_iter().map(|key| Object::of_policy(key).to_string()).collect();
    (!objects.is_empty()).then(|| objects.join(", ").into())
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failed {}

impl From<CertError> for Failed {
    fn from(error: CertError) -> Self {
        Self::new(Code::NoCertificate, format!("identity error: {error}"))
    }
}

impl From<mesh_core::hbone::Error> for Failed {
    fn from(error: mesh_core::hbone::Error) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
