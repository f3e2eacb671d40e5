//! `top`: who talks to whom right now, by pair of workloads: rates, latency, retransmissions, denials. A screen that goes
//! on until `q`, or one table with `--once`.

mod board;
mod screen;

use std::time::Duration;

use mesh_core::flows::Filter;
use serde::Serialize;
use tokio::sync::mpsc;

use super::flows::{Heard, watch};
use crate::cli::{Global, TopArgs};
use crate::endpoint::Places;
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};
use board::{Board, Row};

pub use board::Order;

/// How often the screen is drawn.
const FRAME: Duration = Duration::from_millis(500);
/// Keys are looked for this often.
const KEYS: Duration = Duration::from_millis(100);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    seconds: f64,
    pairs: &'a [Row],
}

/// Runs `top --once`: listens for `--for`, and shows what was heard.
pub async fn once(places: &Places, global: &Global, args: &TopArgs) -> Report {
    let filter = match args.select.filter() {
        Ok(filter) => filter,
        Err(problem) => return Report::failed(Exit::Usage, problem),
    };
    let mut board = Board::new(args.span);
    let (mut problems, mut lost) = (Vec::new(), 0);
    let (told, mut heard) = mpsc::channel(64);
    let listen = async {
        while let Some(next) = heard.recv().await {
            match next {
                Heard::Flows(flows, missed) => {
                    lost += missed;
                    flows.iter().for_each(|flow| board.add(flow));
                }
                Heard::Silent(error) => problems.push(error),
            }
        }
    };
    tokio::select! {
        () = watch(places, &filter, told) => {}
        () = listen => {}
        () = tokio::time::sleep(args.span) => {}
    }
    let rows = board.rows(args.sort);
    let document = Document { seconds: args.span.as_secs_f64(), pairs: &rows };
    let report = Report::new(global.output, &document, || vec![Block::Table(table(&rows))]);
    let report = if lost > 0 {
        let fix = "ask for fewer (-n, --pod), or let the agents keep more (--trace-kept)";
        report.error(
            Exit::Fine,
            format!("{lost} events were missed, so these figures are too low\n  fix: {fix}"),
        )
    } else {
        report
    };
    report.unanswered(Exit::Unreachable, &problems)
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&board::TITLES);
    for row in rows {
        let tone = if row.is_bad() { Tone::Bad } else { Tone::Plain };
        table.row(row.cells().map(|text| Cell::new(text, tone)));
    }
    table
}

/// Runs `top` on a terminal until `q`.
pub async fn run(places: &Places, args: &TopArgs) -> Report {
    let filter = match args.select.filter() {
        Ok(filter) => filter,
        Err(problem) => return Report::failed(Exit::Usage, problem),
    };
    let mut terminal = match ratatui::try_init() {
        Ok(terminal) => terminal,
        Err(error) => {
            let fix = "use `meshctl top --once` where there is no terminal";
            return Report::failed(Exit::Usage, format!("cannot draw: {error}\n  fix: {fix}"));
        }
    };
    let shown = show(&mut terminal, places, args, &filter).await;
    ratatui::restore();
    match shown {
        Ok(()) => Report::default(),
        Err(error) => Report::failed(Exit::Unreachable, format!("the terminal is gone: {error}")),
    }
}

async fn show(
    terminal: &mut ratatui::DefaultTerminal,
    places: &Places,
    args: &TopArgs,
    filter: &Filter,
) -> std::io::Result<()> {
    let mut view = screen::View::new(Board::new(args.span), args.sort);
    let (told, mut heard) = mpsc::channel(64);
    let mut watching = std::pin::pin!(watch(places, filter, told));
    let (mut frame, mut keys) = (tokio::time::interval(FRAME), tokio::time::interval(KEYS));
    loop {
        tokio::select! {
            () = &mut watching => return Ok(()),
            Some(next) = heard.recv() => match next {
                Heard::Flows(flows, missed) => view.add(&flows, missed),
                Heard::Silent(error) => view.note(error.problem),
            },
            _ = frame.tick() => {
                terminal.draw(|frame| view.draw(frame))?;
            }
            _ = keys.tick() => {
                if screen::quits(&mut view)? {
                    return Ok(());
                }
            }
        }
    }
}
