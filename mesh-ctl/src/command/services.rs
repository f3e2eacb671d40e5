//! `services`: virtual addresses, ports and endpoints.

use mesh_core::admin::Service;

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
    let all = dumps
        .merged(|dump| std::mem::take(&mut dump.services), |s| (s.namespace.clone(), s.hostname.clone()));
    match select(all, filter, "service", names) {
        Ok(services) => Report::new(global.output, &services, || blocks(&services, filter)),
        Err(report) => report,
    }
    .unanswered(dumps.exit(), &dumps.errors)
}

fn names(s: &Service) -> Names<'_> {
    Names { namespace: &s.namespace, name: &s.name, aliases: vec![&s.hostname] }
}

fn blocks(services: &[Service], filter: &Filter) -> Vec<Block> {
    if services.is_empty() {
        return vec![Block::Line(Tone::Plain, none("services", filter))];
    }
    let mut table =
        Table::new(&["NAMESPACE", "NAME", "ADDRESSES", "PORTS", "ENDPOINTS", "WAYPOINT", "HOSTNAME"]);
    for s in services {
        let healthy = s.endpoints.values().filter(|e| e.status == "Healthy").count();
        let all = s.endpoints.len();
        let tone = match healthy {
            0 => Tone::Bad,
            n if n < all => Tone::Warn,
            _ => Tone::Plain,
        };
        let waypoint = s.waypoint.as_ref().and_then(|w| w.destination.as_str());
        table.row([
            s.namespace.clone().into(),
            s.name.clone().into(),
            join(s.vips.iter().map(|vip| vip.trim_start_matches('/'))).into(),
            ports(s).into(),
            Cell::new(format!("{healthy}/{all}"), tone),
            waypoint.unwrap_or_default().into(),
            s.hostname.clone().into(),
        ]);
    }
    vec![Block::Table(table)]
}

/// `80->8080,443`, in order of the numbers; `80->named` where each endpoint has its own target.
fn ports(s: &Service) -> String {
    let mut ports: Vec<(u32, &str, u16)> = s
        .ports
        .iter()
        .map(|(port, target)| (port.parse().unwrap_or(u32::MAX), port.as_str(), *target))
        .collect();
    ports.sort_unstable();
    join(ports.iter().map(|(number, port, target)| match *target {
        0 => format!("{port}->named"),
        target if u32::from(target) == *number => (*port).to_owned(),
        target => format!("{port}->{target}"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_in_order_of_their_numbers() {
        let ports_of = [("443", 443), ("80", 8080), ("9090", 0)];
        let service = Service {
            ports: ports_of.into_iter().map(|(port, target)| (port.to_owned(), target)).collect(),
            ..Service::default()
        };
        assert_eq!(ports(&service), "80->8080,443,9090->named");
    }
}
