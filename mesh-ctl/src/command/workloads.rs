//! `workloads`: what the mesh knows of pods and other workloads.

use mesh_core::admin::Workload;

use super::dumps::{Dumps, Names, none, select};
use super::join;
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
    let all = dumps.merged(
        |dump| std::mem::take(&mut dump.workloads),
        |w| (format!("{}/{}", w.namespace, w.name), w.uid.clone()),
    );
    match select(all, filter, "workload", names) {
        Ok(workloads) => Report::new(global.output, &workloads, || blocks(&workloads, filter)),
        Err(report) => report,
    }
    .unanswered(dumps.exit(), &dumps.errors)
}

fn names(w: &Workload) -> Names<'_> {
    Names { namespace: &w.namespace, name: &w.name, aliases: vec![&w.workload_name, &w.uid] }
}

fn blocks(workloads: &[Workload], filter: &Filter) -> Vec<Block> {
    if workloads.is_empty() {
        return vec![Block::Line(Tone::Plain, none("workloads", filter))];
    }
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "ADDRESS",
        "NODE",
        "PROTOCOL",
        "HEALTH",
        "SERVICE ACCOUNT",
        "SERVICES",
    ]);
    for w in workloads {
        let protocol = if w.protocol == "HBONE" { Tone::Good } else { Tone::Plain };
        let health = if w.status == "Healthy" { Tone::Plain } else { Tone::Warn };
        // `namespace/hostname`: the first label says it, the rest is in -o yaml.
        let service = |key: &String| {
            let host = key.split_once('/').map_or(key.as_str(), |(_, host)| host);
            host.split_once('.').map_or(host, |(name, _)| name).to_owned()
        };
        table.row([
            w.namespace.clone().into(),
            w.name.clone().into(),
            join(&w.workload_ips).into(),
            w.node.clone().into(),
            Cell::new(w.protocol.clone(), protocol),
            Cell::new(w.status.clone(), health),
            w.service_account.clone().into(),
            join(w.services.iter().map(service)).into(),
        ]);
    }
    vec![Block::Table(table)]
}
