//! `version`: of meshctl, of each node's agent, of the control plane.

use mesh_core::admin::NodeStatus;
use serde::Serialize;

use super::control;
use crate::ask;
use crate::cli::{Global, VersionArgs};
use crate::endpoint::Places;
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

#[derive(Serialize)]
struct Entry {
    component: &'static str,
    name: String,
    version: String,
}

/// Runs the command. Versions that differ are marked, and are no error: upgrades pass through that state.
pub async fn run(places: &Places, global: &Global, args: &VersionArgs) -> Report {
    let own = env!("CARGO_PKG_VERSION");
    let mut entries = vec![Entry { component: "meshctl", name: String::new(), version: own.to_owned() }];
    let mut errors = Vec::new();
    if !args.client {
        let (nodes, control) = futures_util::join!(
            ask::nodes::<NodeStatus>(&places.nodes, "/status", places.timeout),
            control::fetch_version(places),
        );
        for (endpoint, node) in nodes.answers {
            let name = if node.node.is_empty() { endpoint.to_string() } else { node.node };
            entries.push(Entry { component: "mesh-node", name, version: node.version });
        }
        errors = nodes.errors;
        match control {
            Ok(version) => {
                let name = places.control.to_string();
                entries.push(Entry { component: "mesh-control", name, version });
            }
            Err(error) if places.control_was_named => errors.push(error),
            // None on this machine, and none was named.
            Err(_) => {}
        }
    }
    Report::new(global.output, &entries, || {
        let mut table = Table::new(&["COMPONENT", "VERSION", "WHERE"]);
        for entry in &entries {
            let tone = if entry.version == own { Tone::Plain } else { Tone::Warn };
            let version = Cell::new(entry.version.clone(), tone);
            table.row([entry.component.into(), version, entry.name.clone().into()]);
        }
        vec![Block::Table(table)]
    })
    .unanswered(Exit::Unreachable, &errors)
}
