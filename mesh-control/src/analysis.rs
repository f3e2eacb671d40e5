//! What is wrong, or likely not meant, in a set of objects: the same findings for files and for clusters, for
//! `mesh-control check` and `meshctl analyze`.
//!
//! Three things make findings: what a source could not use, the conditions of the conversion (so that status and
//! analysis never disagree), and [`lints`] for what is valid, converts, and does nothing.

pub mod input;
mod lints;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::Serialize;

use crate::convert::{Mesh, convert};
use crate::model::{Condition, ObjectRef, Objects};
use crate::source::{Problem, State};

/// Annotation of Istio that keeps findings of an object quiet: codes, separated by commas, or `*`.
const SUPPRESS: &str = "galley.istio.io/analyze-suppress";

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Something has no effect, or another than it seems to have.
    Warning,
    /// The object is refused, or cannot do what it is for.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// One CamelCase word for programs: the condition's reason, or the lint's name.
    pub code: String,
    /// The object; none for a document that is no object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// File and line; empty for objects of a cluster.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub place: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Finding {
    /// About an object.
    fn of(severity: Severity, code: &str, object: ObjectRef, message: impl Into<String>) -> Self {
        Self {
            severity,
            code: code.to_owned(),
            object: Some(object),
            place: String::new(),
            message: message.into(),
        }
    }

    fn of_problem(problem: &Problem) -> Self {
        let line = if problem.line > 0 { format!(":{}", problem.line) } else { String::new() };
        let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
        Self {
            severity: Severity::Error,
            code: "Invalid".to_owned(),
            object: problem.object.clone(),
            place: format!("{}{line}", problem.file),
            message: format!("{field}{}", problem.message),
        }
    }

    /// What a condition says, when that is more than that all is well.
    fn of_condition(condition: &Condition) -> Option<Self> {
        let severity = match condition.reason.as_str() {
            // A waypoint that runs has to say so; nothing runs where files are looked at.
            "AddressNotAssigned" | "Pending" => return None,
            "UnsupportedValue" | "Conflicted" | "InvalidValue" | "HostnameConflict" => Severity::Warning,
            _ if condition.status == (condition.kind == "istio.io/WaypointMissing") => Severity::Error,
            "ListenersNotValid" => Severity::Warning,
            _ => return None,
        };
        Some(Self::of(severity, &condition.reason, condition.object.clone(), condition.message.clone()))
    }
}

/// As compilers write it, so that editors find the place.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        write!(f, "{} [{}]", self.severity, self.code)?;
        if let Some(object) = &self.object {
            write!(f, " {object}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// All findings, the worst first. `defaults` is what the mesh settings override; `place` says where an object was read.
#[must_use]
pub fn analyze(state: &State, defaults: &Mesh, place: impl Fn(&ObjectRef) -> Option<String>) -> Vec<Finding> {
    let objects = &state.objects;
    let mesh = defaults.with_settings(objects);
    let resources = convert(objects, &mesh, &Default::default());
    let mut findings: Vec<Finding> = state.problems.iter().map(Finding::of_problem).collect();
    findings.extend(resources.conditions.iter().filter_map(Finding::of_condition));
    findings.extend(lints::all(objects, &mesh));
    findings.retain(|finding| !suppressed(finding, objects));
    for finding in &mut findings {
        if finding.place.is_empty() {
            finding.place = finding.object.as_ref().and_then(&place).unwrap_or_default();
        }
    }
    findings.sort_by(|a, b| {
        let order = |finding: &Finding| (finding.object.clone(), finding.code.clone());
        b.severity.cmp(&a.severity).then_with(|| order(a).cmp(&order(b)))
    });
    findings.dedup();
    findings
}

/// Whether the object's owner has seen it and does not want to be told again. What is refused is always told.
fn suppressed(finding: &Finding, objects: &Objects) -> bool {
    let Some(meta) = finding.object.as_ref().and_then(|object| objects.meta(object)) else { return false };
    finding.code != "Invalid"
        && meta
            .annotation(SUPPRESS)
            .is_some_and(|codes| codes.split(',').map(str::trim).any(|c| c == "*" || c == finding.code))
}
