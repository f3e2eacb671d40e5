//! A connection that did not work: code, text and the object that decided. Cheap to clone, since those who wait for
//! one dial share its failure.

use std::fmt;
use std::sync::Arc;

use mesh_core::error::Code;
use mesh_core::policy::DenyReason;
use mesh_core::telemetry::Failure;

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
    pub fn denied(reason: &DenyReason) -> Self {
        Self {
            code: Code::PolicyDenied,
            text: format!("connection closed due to policy rejection: {reason}").into(),
            decided_by: reason.policy().map(|p| Arc::from(&**p)),
        }
    }

    /// As the access log takes it.
    #[must_use]
    pub fn to_log(&self) -> Failure {
        Failure::new(self.code, Arc::clone(&self.text))
    }

    /// A connection that a changed policy no longer allows.
    #[must_use]
    pub fn policy_changed(reason: &DenyReason) -> Self {
        Self {
            code: Code::PolicyChanged,
            text: "connection closed due to policy change".into(),
            decided_by: reason.policy().map(|p| Arc::from(&**p)),
        }
    }
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
