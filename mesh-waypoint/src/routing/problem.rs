//! What is wrong with an object's rules.

use std::fmt::Display;

use mesh_core::state::Str;

/// A part of a rule that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: rule {rule:?}: {field}: {reason}{}", self.effect())]
pub struct Problem {
    /// Name of the resource: `<Kind>/<namespace>/<name>`.
    pub resource: Str,
    /// Name of the rule.
    pub rule: Str,
    /// Path of the field in the rule.
    pub field: String,
    /// What is wrong, and what would be right.
    pub reason: String,
    /// Whether the rule answers 500 for it; else it works without the field.
    pub fatal: bool,
}

impl Problem {
    fn effect(&self) -> &'static str {
        if self.fatal { "; requests under this rule are answered with 500" } else { "; it has no effect" }
    }
}

/// A field that cannot be used, seen from inside its message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Invalid {
    pub(super) field: String,
    pub(super) reason: String,
}

impl Invalid {
    pub(super) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// Seen from one message further out.
    pub(super) fn within(self, outer: impl Display) -> Self {
        Self { field: format!("{outer}.{}", self.field), reason: self.reason }
    }
}
