//! Grafana dashboards and alert rules for Prometheus: written from one table ([`mesh`], [`parts`], [`alerts`]) into
//! `deploy/`, so that a metric that changes its name is changed in one place. A scenario of the testbed runs every query on a
//! real Prometheus.
//!
//! Queries name no job: which process is which is known by its `istio_build`.

mod alerts;
mod mesh;
mod parts;

use crate::{paths, run};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::PathBuf;

/// How a panel shows its figures.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Lines over time, half of the width.
    Lines,
    /// The newest figure, a sixth of the width.
    Figure,
}

struct Panel {
    title: &'static str,
    /// What it means, for who sees it for the first time.
    help: &'static str,
    /// Grafana's name of the unit.
    unit: &'static str,
    look: Look,
    /// Query and legend.
    queries: &'static [(&'static str, &'static str)],
}

const fn lines(
    title: &'static str,
    unit: &'static str,
    help: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, help, unit, look: Look::Lines, queries }
}

const fn figure(
    title: &'static str,
    unit: &'static str,
    help: &'static str,
    queries: &'static [(&'static str, &'static str)],
) -> Panel {
    Panel { title, help, unit, look: Look::Figure, queries }
}

/// What is chosen at the top: the values of a label.
struct Choice {
    name: &'static str,
    title: &'static str,
    query: &'static str,
}

struct Row {
    title: &'static str,
    panels: &'static [Panel],
}

struct Dashboard {
    /// Name of the file, and with `undermesh-` before it Grafana's uid.
    name: &'static str,
    title: &'static str,
    choices: &'static [Choice],
    rows: &'static [Row],
}

const DASHBOARDS: &[&Dashboard] = &[
    &mesh::MESH,
    &mesh::SERVICE,
    &mesh::WORKLOAD,
    &parts::NODE,
    &parts::WAYPOINT,
    &parts::CONTROL,
    &parts::FLOWS,
];

/// Columns of Grafana's grid.
const WIDTH: u32 = 24;

fn datasource() -> Value {
    json!({"type": "prometheus", "uid": "${datasource}"})
}

fn choice(choice: &Choice) -> Value {
    json!({
        "name": choice.name, "label": choice.title, "type": "query", "datasource": datasource(),
        "query": {"query": choice.query, "refId": choice.name}, "definition": choice.query,
        "refresh": 2, "sort": 1, "multi": true, "includeAll": true, "allValue": ".*",
        "current": {"selected": true, "text": ["All"], "value": ["$__all"]},
    })
}

fn panel(panel: &Panel, id: u32, place: Value) -> Value {
    let targets: Vec<Value> = ('A'..)
        .zip(panel.queries)
        .map(|(name, (query, legend))| {
            let instant = panel.look == Look::Figure;
            json!({
                "refId": name.to_string(), "datasource": datasource(), "expr": query, "legendFormat": legend,
                "instant": instant, "range": !instant,
            })
        })
        .collect();
    let (kind, options) = match panel.look {
        Look::Lines => (
            "timeseries",
            json!({"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}),
        ),
        Look::Figure => (
            "stat",
            json!({"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "textMode": "auto"}),
        ),
    };
    json!({
        "id": id, "type": kind, "title": panel.title, "description": panel.help, "gridPos": place,
        "datasource": datasource(), "targets": targets, "options": options,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
    })
}

fn dashboard(dashboard: &Dashboard) -> Value {
    let mut panels = Vec::new();
    let (mut id, mut y) = (0, 0);
    for row in dashboard.rows {
        id += 1;
        panels.push(json!({
            "id": id, "type": "row", "title": row.title, "collapsed": false, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }));
        y += 1;
        let (mut x, mut height) = (0, 0);
        for each in row.panels {
            let (w, h) = if each.look == Look::Lines { (12, 8) } else { (4, 4) };
            if x + w > WIDTH {
                (x, y) = (0, y + height);
                height = 0;
            }
            id += 1;
            panels.push(panel(each, id, json!({"x": x, "y": y, "w": w, "h": h})));
            x += w;
            height = height.max(h);
        }
        y += height;
    }
    let source =
        json!({"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"});
    let choices = [source].into_iter().chain(dashboard.choices.iter().map(choice));
    json!({
        "uid": format!("undermesh-{}", dashboard.name), "title": dashboard.title, "tags": ["undermesh"],
        "schemaVersion": 39, "version": 1, "editable": true, "refresh": "10s", "timezone": "browser",
        "time": {"from": "now-30m", "to": "now"}, "graphTooltip": 1,
        "templating": {"list": choices.collect::<Vec<_>>()},
        "links": [{"type": "dashboards", "title": "Undermesh", "tags": ["undermesh"], "asDropdown": true,
                   "includeVars": false, "keepTime": true}],
        "annotations": {"list": []}, "panels": panels,
    })
}

/// Every file with its text.
fn files() -> Result<Vec<(PathBuf, String)>> {
    let deploy = paths::root().join("deploy");
    let mut files = Vec::new();
    for each in DASHBOARDS {
        let text =
            serde_json::to_string_pretty(&dashboard(each)).context("a dashboard cannot be written")? + "\n";
        files.push((deploy.join(format!("dashboards/{}.json", each.name)), text));
    }
    files.push((deploy.join("alerts/undermesh.yaml"), alerts::rules()));
    files.push((deploy.join("alerts/undermesh-test.yaml"), alerts::tests()));
    Ok(files)
}

/// Files whose text is another than it should be.
fn stale() -> Result<Vec<PathBuf>> {
    let written = files()?.into_iter();
    let stale = written.filter(|(path, text)| std::fs::read_to_string(path).ok().as_ref() != Some(text));
    Ok(stale.map(|(path, _)| path).collect())
}

/// Writes all files, or says which are not up to date.
pub(crate) fn run(check: bool) -> Result<()> {
    if check {
        let stale = stale()?;
        if stale.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = stale.iter().map(|path| path.display().to_string()).collect();
        bail!("not up to date, run `cargo xtask dashboards`: {}", names.join(", "));
    }
    for (path, text) in files()? {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    run::step("dashboards and alerts are written to deploy/");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_in_deploy_are_those_of_the_table() {
        assert_eq!(stale().unwrap(), [] as [PathBuf; 0], "run `cargo xtask dashboards`");
    }

    #[test]
    fn every_panel_says_what_it_means_and_panels_lie_beside_each_other() {
        for each in DASHBOARDS {
            let written = dashboard(each);
            let panels = written["panels"].as_array().unwrap();
            let mut taken = std::collections::BTreeSet::new();
            for panel in panels {
                let of = |field: &str| panel["gridPos"][field].as_u64().unwrap();
                for (x, y) in (of("x")..of("x") + of("w"))
                    .flat_map(|x| (of("y")..of("y") + of("h")).map(move |y| (x, y)))
                {
                    assert!(
                        x < u64::from(WIDTH) && taken.insert((x, y)),
                        "{}: {}",
                        each.name,
                        panel["title"]
                    );
                }
                assert!(
                    panel["type"] == "row" || panel["description"].as_str().unwrap().len() > 10,
                    "{panel}"
                );
            }
        }
    }
}
