//! The tables of `docs/api` as text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{EXAMPLES, Effect, Field, ROLES, fields, shown};
use crate::model::Kind;
use crate::tree::documents;

/// Kinds that nothing reads.
const UNREAD: &str = include_str!("unread.yaml");

const HEAD: &str = "<!-- Written by `cargo xtask docs`. Do not edit. -->\n";

/// Pages by file name.
///
/// # Errors
/// An example cannot be read.
pub fn pages() -> Result<BTreeMap<String, String>, String> {
    let mut pages = BTreeMap::new();
    let mut list = String::new();
    for (kind, yaml) in EXAMPLES {
        let fields = fields(*kind, yaml)?;
        let (all, with) = (fields.len(), fields.iter().filter(|field| field.has_effect()).count());
        // Writing to a text cannot fail.
        let _ = writeln!(list, "| [{kind}]({kind}.md) | {} | {with} of {all} |", roles(&fields));
        pages.insert(format!("{kind}.md"), page(*kind, &fields));
    }
    pages.insert("README.md".to_owned(), index(&list)?);
    Ok(pages)
}

fn index(list: &str) -> Result<String, String> {
    let mut text = format!(
        "{HEAD}# Fields of the APIs

For each field of each kind: whether it has an effect on nodes, waypoints and gateways, and which test shows it. What is
written here is what the control plane says in an object's conditions, because it is made of that: fields are those that
its readers know, and whether one has an effect comes from converting an example that has it. A field that is not in its
kind's table is refused as unknown.

`mesh-control fields` prints the same of the version at hand.

| kind | for | fields with an effect |
|---|---|---|
{list}
## Kinds that nothing reads
In a directory of objects they are refused; in a cluster they are not watched.

| kind | why | fields |
|---|---|---|
"
    );
    let unread = documents(UNREAD).into_iter().next().and_then(Result::ok);
    let unread = unread.ok_or("the list of kinds that nothing reads is no YAML")?.to_json();
    for kind in unread.as_array().into_iter().flatten() {
        let of = |name: &str| kind[name].as_str().unwrap_or_default();
        let _ = writeln!(text, "| {} | {} | `{}` |", of("kind"), of("why"), of("fields"));
    }
    Ok(text)
}

fn roles(fields: &[Field]) -> String {
    let has = |role: &&str| fields.iter().any(|field| field.roles.contains_key(*role));
    ROLES.iter().filter(|role| has(role)).copied().collect::<Vec<_>>().join(", ")
}

fn page(kind: Kind, fields: &[Field]) -> String {
    let mut text = format!("{HEAD}# {kind}\n\n| field | ");
    let of: Vec<&str> =
        ROLES.into_iter().filter(|role| fields.iter().any(|f| f.roles.contains_key(role))).collect();
    let _ = writeln!(text, "{} | shown by |\n|---|{}---|", of.join(" | "), "---|".repeat(of.len()));
    for field in fields {
        let cells: Vec<String> = of.iter().map(|role| cell(field.roles.get(role))).collect();
        let test = shown::test(kind, &field.path).filter(|_| field.has_effect()).unwrap_or_default();
        let test = if test.contains(' ') || test.is_empty() { test.to_owned() } else { format!("`{test}`") };
        let path = field.path.trim_start_matches("spec.");
        let _ = writeln!(text, "| `{path}` | {} | {test} |", cells.join(" | "));
    }
    text
}

fn cell(effect: Option<&Effect>) -> String {
    match effect {
        None => String::new(),
        Some(Effect::Yes) => "yes".to_owned(),
        Some(Effect::Untold) => "read".to_owned(),
        Some(Effect::Partly(why)) if why.is_empty() => "partly".to_owned(),
        Some(Effect::Partly(why)) => format!("partly: {}", why.replace('|', "\\|")),
        Some(Effect::No(why)) if why.is_empty() => "no".to_owned(),
        Some(Effect::No(why)) => format!("no: {}", why.replace('|', "\\|")),
    }
}

impl Field {
    pub(super) fn is_untold(&self) -> bool {
        self.roles.values().all(|effect| *effect == Effect::Untold)
    }

    fn has_effect(&self) -> bool {
        self.roles.values().any(|effect| !matches!(effect, Effect::No(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::read;
    use std::path::{Path, PathBuf};

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[test]
    fn the_pages_of_the_apis_are_up_to_date() {
        let dir = root().join("docs/api");
        let pages = pages().unwrap();
        for (name, text) in &pages {
            let there = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
            assert!(there == *text, "docs/api/{name} is out of date: run `cargo xtask docs`");
        }
        for file in std::fs::read_dir(&dir).unwrap() {
            let name = file.unwrap().file_name().into_string().unwrap();
            assert!(pages.contains_key(&name), "docs/api/{name} is of no kind: run `cargo xtask docs`");
        }
    }

    #[test]
    fn every_kind_of_the_apis_that_is_read_has_examples() {
        let ours = ["", "discovery.k8s.io"];
        for info in read::kinds().filter(|info| !ours.contains(&info.group)) {
            assert!(EXAMPLES.iter().any(|(kind, _)| *kind == info.kind), "{} has none", info.kind);
        }
    }

    #[test]
    fn the_tests_that_show_a_field_exist() {
        let mut sources = String::new();
        for dir in ["mesh-core/src", "mesh-control/src/convert", "mesh-waypoint/src", "tests/src/scenarios"] {
            collect(&root().join(dir), &mut sources);
        }
        let named =
            shown::SHOWN.iter().map(|(.., test)| *test).chain(shown::POLICY.iter().map(|(_, test)| *test));
        for test in named {
            let there = if test.contains(' ') { format!("\"{test}\"") } else { format!("fn {test}()") };
            assert!(sources.contains(&there), "there is no test {test:?}");
        }
    }

    fn collect(dir: &Path, text: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, text);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                text.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }

    fn row(page: &str, field: &str) -> String {
        let start = format!("| `{field}` |");
        let pages = pages().unwrap();
        pages[page].lines().find(|line| line.starts_with(&start)).unwrap_or_default().to_owned()
    }

    #[test]
    fn a_table_says_what_the_conditions_say() {
        assert!(row("VirtualService.md", "http[].timeout").contains("| yes | yes |"));
        assert!(row("VirtualService.md", "http[].match[].statPrefix").contains("| no | no |"));
        assert!(row("AuthorizationPolicy.md", "rules[].to[].operation.paths").contains("| no | yes | yes |"));
        assert!(
            row("AuthorizationPolicy.md", "rules[].from[].source.principals").contains("| yes | yes | yes |")
        );
        assert!(row("HTTPRoute.md", "hostnames").contains("| yes |"));
    }
}
