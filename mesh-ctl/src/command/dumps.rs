//! Lists out of the nodes' config dumps. Every node knows the whole mesh, so that one answer is enough; an object
//! that several nodes know is listed once.

use std::collections::BTreeMap;

use mesh_core::admin::ConfigDump;
use mesh_core::why::suggest;

use crate::ask::{self, AskError};
use crate::cli::Filter;
use crate::endpoint::{Endpoint, Places};
use crate::output::{Exit, Report};

/// What the nodes answered.
pub(super) struct Dumps {
    pub(super) answers: Vec<(Endpoint, ConfigDump)>,
    pub(super) errors: Vec<AskError>,
}

impl Dumps {
    pub(super) async fn fetch(places: &Places) -> Self {
        let asked = ask::nodes(&places.nodes, "/config_dump", places.timeout).await;
        Self { answers: asked.answers, errors: asked.errors }
    }

    /// One missing answer matters only when there is no other.
    pub(super) fn exit(&self) -> Exit {
        if self.answers.is_empty() { Exit::Unreachable } else { Exit::Fine }
    }

    /// Objects of all answers, one of each key, in order of the keys.
    pub(super) fn merged<T>(
        &mut self,
        take: impl Fn(&mut ConfigDump) -> Vec<T>,
        key: impl Fn(&T) -> (String, String),
    ) -> Vec<T> {
        let mut merged = BTreeMap::new();
        for (_, dump) in &mut self.answers {
            for item in take(dump) {
                merged.entry(key(&item)).or_insert(item);
            }
        }
        merged.into_values().collect()
    }
}

/// What an object is called, for filters.
pub(super) struct Names<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    /// Other names by which it may be asked for.
    pub(super) aliases: Vec<&'a str>,
}

/// Objects that a filter selects.
///
/// # Errors
/// A name was asked for that nothing has: the report says so and suggests others.
pub(super) fn select<T>(
    items: Vec<T>,
    filter: &Filter,
    what: &str,
    names: impl Fn(&T) -> Names<'_>,
) -> Result<Vec<T>, Report> {
    let typed = filter.name.as_deref();
    // `namespace/name` is how everything else prints names.
    let (namespace, name) = match typed.and_then(|name| name.split_once('/')) {
        Some((namespace, name)) => (Some(namespace), Some(name)),
        None => (filter.namespace.as_deref(), typed),
    };
    let all: Vec<String> = items.iter().map(|item| full(&names(item))).collect();
    let selected: Vec<T> = items
        .into_iter()
        .filter(|item| {
            let names = names(item);
            let called = |wanted: &str| names.name == wanted || names.aliases.contains(&wanted);
            namespace.is_none_or(|wanted| names.namespace == wanted) && name.is_none_or(called)
        })
        .collect();
    let Some(name) = name.filter(|_| selected.is_empty()) else { return Ok(selected) };
    let wanted = namespace.map_or_else(|| name.to_owned(), |namespace| format!("{namespace}/{name}"));
    let within = namespace.map_or_else(String::new, |namespace| format!(" in namespace {namespace}"));
    let error = format!("there is no {what} {name:?}{within}{}", did_you_mean(&wanted, &all));
    Err(Report::failed(Exit::Usage, error))
}

fn full(names: &Names<'_>) -> String {
    format!("{}/{}", names.namespace, names.name)
}

/// The names that were perhaps meant, as the second line of an error; nothing when none is near.
fn did_you_mean(wanted: &str, all: &[String]) -> String {
    let near = if wanted.contains('/') {
        suggest(wanted, all.iter().map(String::as_str))
    } else {
        // Without a namespace the names alone are compared.
        let near = suggest(wanted, all.iter().filter_map(|full| full.split_once('/')).map(|(_, name)| name));
        all.iter()
            .filter(|full| near.iter().any(|n| full.ends_with(&format!("/{n}"))))
            .take(3)
            .cloned()
            .collect()
    };
    if near.is_empty() { String::new() } else { format!("\n  did you mean: {}?", near.join(", ")) }
}

/// `no services`, `no services in namespace shop`.
pub(super) fn none(what: &str, filter: &Filter) -> String {
    filter
        .namespace
        .as_ref()
        .map_or_else(|| format!("no {what}"), |ns| format!("no {what} in namespace {ns}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(
        namespace: Option<&str>,
        name: Option<&str>,
    ) -> Result<Vec<(&'static str, &'static str)>, String> {
        let items = vec![("shop", "frontend-1"), ("shop", "backend-1"), ("bank", "frontend-1")];
        let filter = Filter { name: name.map(str::to_owned), namespace: namespace.map(str::to_owned) };
        select(items, &filter, "workload", |(namespace, name)| Names {
            namespace,
            name,
            aliases: name.strip_suffix("-1").into_iter().collect(),
        })
        .map_err(|report| report.finish(false).errors)
    }

    #[test]
    fn filters_are_a_namespace_a_name_or_both() {
        assert_eq!(pick(None, None).unwrap().len(), 3);
        assert_eq!(pick(Some("shop"), None).unwrap().len(), 2);
        assert_eq!(pick(None, Some("frontend-1")).unwrap().len(), 2);
        assert_eq!(pick(None, Some("bank/frontend-1")).unwrap(), [("bank", "frontend-1")]);
        assert_eq!(pick(Some("shop"), Some("frontend")).unwrap(), [("shop", "frontend-1")], "by its alias");
        assert_eq!(pick(Some("none"), None).unwrap(), []);
    }

    #[test]
    fn a_name_that_nothing_has_is_an_error_with_suggestions() {
        let error = pick(Some("shop"), Some("frontned-1")).unwrap_err();
        assert!(error.contains("no workload \"frontned-1\" in namespace shop"), "{error}");
        assert!(error.contains("did you mean: shop/frontend-1"), "{error}");
        let error = pick(None, Some("bakcend-1")).unwrap_err();
        assert!(error.contains("did you mean: shop/backend-1?"), "{error}");
        assert!(!pick(None, Some("zzzzzzzz")).unwrap_err().contains("did you mean"));
    }
}
