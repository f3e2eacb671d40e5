//! The Helm chart that this binary embeds, and what becomes of it with an operator's values.
//!
//! | module | for |
//! |---|---|
//! | [`template`] | the template language, as far as the chart uses it |
//! | [`values`] | values: defaults, files, `--set` |
//! | [`schema`] | what values may be |

pub mod schema;
pub mod template;
pub mod values;

use serde_json::{Value, json};

use template::{TemplateError, Templates};

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../deploy/charts/undermesh/", $name)))),*]
    };
}

/// The templates, in no order that matters.
const TEMPLATES: [(&str, &str); 9] = files![
    "templates/_names.tpl",
    "templates/namespace.yaml",
    "templates/mesh.yaml",
    "templates/rbac.yaml",
    "templates/control.yaml",
    "templates/node.yaml",
    "templates/validation.yaml",
    "templates/ingress.yaml",
    "templates/egress.yaml",
];
/// Definitions of Istio's kinds: made where they are absent, left alone where they are there, as Helm does.
const DEFINITIONS: (&str, &str) = files!["crds/istio.yaml"][0];
const META: (&str, &str) = files!["Chart.yaml"][0];
const VALUES: (&str, &str) = files!["values.yaml"][0];
const SCHEMA: (&str, &str) = files!["values.schema.json"][0];

/// Order in which kinds are made; others come last but one, what may stop others comes last.
const ORDER: [&str; 10] = [
    "Namespace",
    "CustomResourceDefinition",
    "ServiceAccount",
    "ConfigMap",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "Service",
    "Deployment",
];
const LAST: &str = "ValidatingWebhookConfiguration";

/// Why the chart does not become objects.
#[derive(Debug, thiserror::Error)]
pub enum ChartError {
    /// A template.
    #[error("the chart: {0}")]
    Template(#[from] TemplateError),
    /// What came out of one.
    #[error("the chart: {file} becomes no YAML with these values: {problem}")]
    Yaml {
        /// The template.
        file: String,
        /// Why.
        problem: String,
    },
    /// A part that is embedded cannot be read.
    #[error("the chart: {file}: {problem}")]
    Embedded {
        /// The file.
        file: &'static str,
        /// Why.
        problem: String,
    },
    /// Values that the schema refuses.
    #[error("{}", .0.join("\n"))]
    Values(Vec<String>),
}

/// Where and under which name the mesh is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Name of the release.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// What installs it: the label `app.kubernetes.io/managed-by`.
    pub service: String,
}

/// Values of the chart where nothing is given.
///
/// # Errors
/// The embedded file cannot be read.
pub fn defaults() -> Result<Value, ChartError> {
    embedded(VALUES)
}

fn embedded((file, text): (&'static str, &str)) -> Result<Value, ChartError> {
    serde_saphyr::from_str(text).map_err(|error| ChartError::Embedded { file, problem: error.to_string() })
}

/// The version of the mesh that the chart installs.
///
/// # Errors
/// The embedded file cannot be read.
pub fn app_version() -> Result<String, ChartError> {
    let meta = embedded(META)?;
    Ok(meta.get("appVersion").and_then(Value::as_str).unwrap_or_default().to_owned())
}

/// The definitions of kinds that the chart brings.
///
/// # Errors
/// The embedded file cannot be read.
pub fn definitions() -> Result<Vec<Value>, ChartError> {
    let (file, text) = DEFINITIONS;
    documents(file, text)
}

fn documents(file: &str, text: &str) -> Result<Vec<Value>, ChartError> {
    let unreadable = |problem: String| ChartError::Yaml { file: file.to_owned(), problem };
    text.split("\n---")
        .filter(|document| has_content(document))
        .map(|document| serde_saphyr::from_str(document).map_err(|error| unreadable(error.to_string())))
        .collect()
}

/// The objects of the chart with these values (complete, as [`values::merged`] makes them), in the order in which they
/// are made.
///
/// # Errors
/// Values that the schema refuses, each with its path; a template that cannot be rendered with them.
pub fn objects(release: &Release, values: &Value) -> Result<Vec<Value>, ChartError> {
    let problems = schema::problems(&embedded(SCHEMA)?, values);
    if !problems.is_empty() {
        return Err(ChartError::Values(problems));
    }
    let meta = embedded(META)?;
    let root = json!({
        "Values": values,
        "Release": {"Name": release.name, "Namespace": release.namespace, "Service": release.service},
        "Chart": {"Name": meta.get("name"), "Version": meta.get("version"), "AppVersion": meta.get("appVersion")},
    });
    let mut templates = Templates::default();
    for (name, text) in TEMPLATES {
        templates.add(name, text)?;
    }
    let mut objects = Vec::new();
    for (file, text) in templates.render(&root)? {
        objects.extend(documents(&file, &text)?);
    }
    objects.sort_by_key(|object| place(object.get("kind").and_then(Value::as_str).unwrap_or_default()));
    Ok(objects)
}

fn has_content(document: &str) -> bool {
    document.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
}

fn place(kind: &str) -> usize {
    let known = ORDER.iter().position(|ordered| *ordered == kind);
    known.unwrap_or(if kind == LAST { usize::MAX } else { ORDER.len() })
}

#[cfg(test)]
mod tests;
