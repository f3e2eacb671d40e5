//! `waypoint routes` and `waypoint endpoints`: what waypoints decide by, and what they have counted.

use mesh_core::admin::waypoint::{Cluster, ClusterEndpoint, DestinationEntry, RouteTable, RuleEntry};
use serde::Serialize;

use crate::ask::{self, Asked, Role};
use crate::cli::{Global, RoutesArgs};
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

/// What one waypoint answered.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer<T> {
    waypoint: String,
    #[serde(flatten)]
    of: T,
}

#[derive(Serialize)]
struct Routes {
    routes: Vec<RouteTable>,
}

#[derive(Serialize)]
struct Clusters {
    clusters: Vec<Cluster>,
}

fn exit<T>(asked: &Asked<T>) -> Exit {
    if asked.answers.is_empty() { Exit::Unreachable } else { Exit::Fine }
}

fn wanted(args: &RoutesArgs, name: &str) -> bool {
    args.host.as_ref().is_none_or(|host| name.contains(host.as_str()))
}

/// Runs `waypoint routes`.
pub async fn routes(global: &Global, args: &RoutesArgs) -> Report {
    let at = args.at.endpoints();
    let asked: Asked<Vec<RouteTable>> = ask::each(&at, Role::Waypoint, "/routes", global.timeout).await;
    let (exit, errors) = (exit(&asked), asked.errors);
    let answers: Vec<Answer<Routes>> = asked
        .answers
        .into_iter()
        .map(|(endpoint, mut routes)| {
            routes.retain(|table| wanted(args, &table.host));
            Answer { waypoint: endpoint.to_string(), of: Routes { routes } }
        })
        .collect();
    if answers.is_empty() {
        return Report::default().unanswered(exit, &errors);
    }
    Report::new(global.output, &answers, || {
        sections(&answers, |answer| {
            let mut blocks = Vec::new();
            for table in &answer.of.routes {
                let port = if table.port == 0 { String::new() } else { format!(" port {}", table.port) };
                blocks.push(Block::Line(Tone::Title, format!("{}{port}", table.host)));
                blocks.push(Block::Table(rules(&table.rules)));
            }
            if blocks.is_empty() {
                let text = "no rules: requests go to the endpoints of the service that they name";
                blocks.push(Block::Line(Tone::Plain, text.to_owned()));
            }
            blocks
        })
    })
    .unanswered(exit, &errors)
}

/// Under a line for each waypoint, where there are several.
fn sections<T>(answers: &[Answer<T>], of: impl Fn(&Answer<T>) -> Vec<Block>) -> Vec<Block> {
    let mut blocks = Vec::new();
    for answer in answers {
        if answers.len() > 1 {
            blocks.push(Block::Line(Tone::Title, format!("waypoint at {}", answer.waypoint)));
        }
        blocks.extend(of(answer));
    }
    blocks
}

fn rules(rules: &[RuleEntry]) -> Table {
    let mut table = Table::new(&["#", "HITS", "OBJECT", "RULE", "MATCH", "TO"]);
    for (at, rule) in rules.iter().enumerate() {
        let mut to: Vec<String> = destinations(&rule.destinations);
        to.extend((!rule.answer.is_empty()).then(|| rule.answer.clone()));
        to.extend(rule.policies.iter().cloned());
        let bad = rule.destinations.iter().any(|to| !to.invalid.is_empty()) || rule.answer.contains(": ");
        let tone = if bad { Tone::Bad } else { Tone::Plain };
        let matches =
            if rule.matches.is_empty() { "everything".to_owned() } else { rule.matches.join("; or ") };
        let mut to = to.into_iter();
        table.row([
            (at + 1).to_string().into(),
            rule.hits.to_string().into(),
            rule.object.clone().into(),
            rule.rule.clone().into(),
            matches.into(),
            Cell::new(to.next().unwrap_or_default(), tone),
        ]);
        to.for_each(|more| table.more(Cell::new(more, tone)));
    }
    table
}

/// With their shares, where there are several.
fn destinations(all: &[DestinationEntry]) -> Vec<String> {
    let total: u64 = all.iter().map(|to| u64::from(to.weight)).sum();
    let one = |to: &DestinationEntry| {
        let mut text = to.service.clone();
        if to.port != 0 {
            text.push_str(&format!(":{}", to.port));
        }
        if !to.subset.is_empty() {
            text.push_str(&format!(" subset {}", to.subset));
        }
        if all.len() > 1 || total == 0 {
            let percent = (u64::from(to.weight) * 100).checked_div(total).unwrap_or(0);
            text.push_str(&format!(" {percent} %"));
        }
        if !to.invalid.is_empty() {
            text.push_str(&format!(" (unusable: {})", to.invalid));
        }
        text
    };
    all.iter().map(one).collect()
}

/// Runs `waypoint endpoints`.
pub async fn endpoints(global: &Global, args: &RoutesArgs) -> Report {
    let at = args.at.endpoints();
    let asked: Asked<Vec<Cluster>> = ask::each(&at, Role::Waypoint, "/clusters", global.timeout).await;
    let (exit, errors) = (exit(&asked), asked.errors);
    let answers: Vec<Answer<Clusters>> = asked
        .answers
        .into_iter()
        .map(|(endpoint, mut clusters)| {
            clusters.retain(|cluster| wanted(args, &cluster.cluster));
            clusters.sort_by(|a, b| a.cluster.cmp(&b.cluster));
            Answer { waypoint: endpoint.to_string(), of: Clusters { clusters } }
        })
        .collect();
    if answers.is_empty() {
        return Report::default().unanswered(exit, &errors);
    }
    Report::new(global.output, &answers, || {
        sections(&answers, |answer| {
            let clusters = &answer.of.clusters;
            if clusters.is_empty() {
                return vec![Block::Line(Tone::Plain, "no backend has been used yet".to_owned())];
            }
            clusters.iter().flat_map(cluster).collect()
        })
    })
    .unanswered(exit, &errors)
}

fn cluster(cluster: &Cluster) -> [Block; 2] {
    let by = if cluster.policies.is_empty() {
        String::new()
    } else {
        format!(", {}", cluster.policies.join(", "))
    };
    let refused = if cluster.overflows == 0 {
        String::new()
    } else {
        format!(", {} refused by limits", cluster.overflows)
    };
    let title = format!(
        "{}  {}{by}{refused}",
        cluster.cluster,
        cluster.algorithm.split([' ', '{', '(']).next().unwrap_or_default()
    );
    let mut table = Table::new(&[
        "ENDPOINT", "ADDRESS", "STATE", "REQUESTS", "FAILURES", "ACTIVE", "WEIGHT", "LEVEL", "LOCALITY",
        "OVER",
    ]);
    for endpoint in &cluster.endpoints {
        table.row(row(endpoint));
    }
    [Block::Line(Tone::Title, title), Block::Table(table)]
}

fn row(endpoint: &ClusterEndpoint) -> [Cell; 10] {
    let state = match endpoint.outlier.ejected_for_ms {
        0 => Cell::new("taking", Tone::Good),
        ms => Cell::new(format!("ejected for {}s more", ms.div_ceil(1000)), Tone::Bad),
    };
    let failures = if endpoint.failures == 0 { Tone::Plain } else { Tone::Warn };
    let locality = endpoint.locality.as_deref().unwrap_or_default().trim_end_matches('/');
    [
        endpoint.name.clone().into(),
        format!("{}:{}", endpoint.address, endpoint.port).into(),
        state,
        endpoint.requests.to_string().into(),
        Cell::new(endpoint.failures.to_string(), failures),
        endpoint.active.to_string().into(),
        endpoint.weight.to_string().into(),
        endpoint.priority.to_string().into(),
        locality.into(),
        if endpoint.hbone { "hbone" } else { "plain" }.into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_have_their_shares_and_what_cannot_be_used_says_why() {
        let to = |subset: &str, weight, invalid: &str| DestinationEntry {
            service: "web.shop".into(),
            port: 80,
            subset: subset.into(),
            weight,
            invalid: invalid.into(),
        };
        assert_eq!(
            destinations(&[to("v1", 80, ""), to("v2", 20, "no such Service")]),
            ["web.shop:80 subset v1 80 %", "web.shop:80 subset v2 20 % (unusable: no such Service)"]
        );
        assert_eq!(destinations(&[to("", 1, "")]), ["web.shop:80"]);
    }

    #[test]
    fn an_ejected_endpoint_says_for_how_long() {
        let mut endpoint = ClusterEndpoint::default();
        endpoint.outlier.ejected_for_ms = 29_400;
        let mut table = Table::new(&["STATE"]);
        table.row([row(&endpoint)[2].clone()]);
        assert!(table.render(false).contains("ejected for 30s more"));
    }
}
