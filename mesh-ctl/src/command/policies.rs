//! `policies`: L4 policies as nodes enforce them, named as what the user wrote.

use mesh_core::admin::Policy;
use mesh_core::why::Object;

use super::dumps::{Dumps, Names, none, select};
use crate::cli::{Filter, Global};
use crate::endpoint::Places;
use crate::output::{Block, Report};
use crate::table::{Cell, Table, Tone};

/// Runs the command.
pub async fn run(places: &Places, global: &Global, filter: &Filter) -> Report {
    let mut dumps = Dumps::fetch(places).await;
    if dumps.answers.is_empty() {
        return Report::default().unanswered(dumps.exit(), &dumps.errors);
    }
    let all =
        dumps.merged(|dump| std::mem::take(&mut dump.policies), |p| (p.namespace.clone(), p.name.clone()));
    let all: Vec<(Policy, Object)> = all.into_iter().map(with_object).collect();
    match select(all, filter, "policy", names) {
        Ok(policies) => {
            let document: Vec<&Policy> = policies.iter().map(|(policy, _)| policy).collect();
            Report::new(global.output, &document, || blocks(&policies, filter))
        }
        Err(report) => report,
    }
    .unanswered(dumps.exit(), &dumps.errors)
}

/// With the object that the user wrote.
fn with_object(policy: Policy) -> (Policy, Object) {
    let object = Object::of_policy(&format!("{}/{}", policy.namespace, policy.name));
    (policy, object)
}

fn names((policy, object): &(Policy, Object)) -> Names<'_> {
    Names { namespace: &policy.namespace, name: &policy.name, aliases: vec![&object.name] }
}

fn blocks(policies: &[(Policy, Object)], filter: &Filter) -> Vec<Block> {
    if policies.is_empty() {
        return vec![Block::Line(Tone::Plain, none("policies", filter))];
    }
    let mut table = Table::new(&["NAMESPACE", "NAME", "KIND", "ACTION", "APPLIES TO", "RULES", "MODE"]);
    for (policy, object) in policies {
        let applies = match policy.scope.as_str() {
            "Global" => "all workloads",
            "Namespace" => "its namespace",
            "WorkloadSelector" => "selected workloads",
            other => other,
        };
        let mode = if policy.dry_run { Cell::new("dry-run", Tone::Warn) } else { "enforced".into() };
        let action = if policy.action == "Deny" { Tone::Bad } else { Tone::Good };
        table.row([
            policy.namespace.clone().into(),
            object.name.clone().into(),
            object.kind.clone().into(),
            Cell::new(policy.action.clone(), action),
            applies.into(),
            policy.rules.len().to_string().into(),
            mode,
        ]);
    }
    vec![Block::Table(table)]
}
