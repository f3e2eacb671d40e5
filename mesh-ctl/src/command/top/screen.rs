//! The screen: a table that fits, a line above it, keys.

use std::time::Duration;

use mesh_core::flows::Flow;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Row, Table};

use super::board::{Board, Order, TITLES};

const WIDTHS: [Constraint; 11] = [
    Constraint::Fill(3),
    Constraint::Fill(3),
    Constraint::Length(8),
    Constraint::Length(8),
    Constraint::Length(8),
    Constraint::Length(8),
    Constraint::Length(10),
    Constraint::Length(7),
    Constraint::Length(6),
    Constraint::Length(6),
    Constraint::Length(6),
];

/// What is shown.
pub(super) struct View {
    board: Board,
    order: Order,
    paused: bool,
    events: u64,
    missed: u64,
    note: String,
}

impl View {
    pub(super) const fn new(board: Board, order: Order) -> Self {
        Self { board, order, paused: false, events: 0, missed: 0, note: String::new() }
    }

    pub(super) fn add(&mut self, flows: &[Flow], missed: u64) {
        self.missed += missed;
        self.events += flows.len() as u64;
        if !self.paused {
            flows.iter().for_each(|flow| self.board.add(flow));
        }
    }

    /// Something that people should know.
    pub(super) fn note(&mut self, text: String) {
        self.note = text;
    }

    /// Takes a key; says whether it ends the screen.
    pub(super) fn key(&mut self, code: KeyCode) -> bool {
        match code {
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('s') => self.order = self.order.next(),
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            _ => {}
        }
        false
    }

    fn head(&self) -> String {
        let mut parts = vec![format!("{} events", self.events)];
        if self.missed > 0 {
            parts.push(format!("{} missed", self.missed));
        }
        if self.paused {
            parts.push("paused".to_owned());
        }
        if !self.note.is_empty() {
            // Text comes from servers and must not steer the terminal.
            parts.push(self.note.chars().map(|c| if c.is_control() { ' ' } else { c }).collect());
        }
        let order = self.order.as_str();
        format!("meshctl top   {}   sorted by {order}   q quit, s sort, p pause", parts.join(", "))
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(frame.area());
        frame.render_widget(Line::from(self.head()), head);
        let rows = self.board.rows(self.order).into_iter().map(|row| {
            let style = if row.is_bad() { Style::new().red() } else { Style::new() };
            Row::new(row.cells().map(Cell::from)).style(style)
        });
        let titles = Row::new(TITLES.map(Cell::from)).style(Style::new().add_modifier(Modifier::BOLD));
        frame.render_widget(Table::new(rows, WIDTHS).header(titles), body);
    }
}

/// Takes the keys that were pressed; says whether one ends the screen.
pub(super) fn quits(view: &mut View) -> std::io::Result<bool> {
    while event::poll(Duration::ZERO)? {
        let Event::Key(key) = event::read()? else { continue };
        let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
        if interrupt || (key.kind != KeyEventKind::Release && view.key(key.code)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::super::board::tests::flow;
    use super::*;
    use mesh_core::flows::Kind;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn screen(view: &View) -> String {
        let mut terminal = Terminal::new(TestBackend::new(110, 6)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_screen_shows_pairs_below_a_line_of_what_is_going_on() {
        let mut view = View::new(Board::new(Duration::from_secs(10)), Order::Connections);
        let established = Flow { latency_us: Some(350), ..flow(Kind::Established, "pay", 1) };
        view.add(&[established, flow(Kind::Drop, "pay", 1)], 2);
        let text = screen(&view);
        for part in
            ["2 events, 2 missed", "sorted by connections", "SOURCE", "shop/cart", "shop/pay", "350us", "0.1"]
        {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(!view.key(KeyCode::Char('s')) && !view.key(KeyCode::Char('p')));
        view.add(&[flow(Kind::Drop, "later", 1)], 0);
        view.note("node\u{1b}[2Jgone".into());
        let text = screen(&view);
        for part in ["sorted by latency", "paused", "node [2Jgone"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(!text.contains("later"), "nothing is added while it is paused");
        assert!(view.key(KeyCode::Char('q')));
    }
}
