//! Rows of a bench: a promise, its figure, and whether it holds.

use super::stats::Estimate;
use serde::Serialize;
use std::fmt::Write;

/// What a row promises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bar {
    /// At least.
    AtLeast(f64),
    /// At most.
    AtMost(f64),
    /// Nothing: for information.
    None,
}

impl Bar {
    fn text(self) -> Option<String> {
        match self {
            Self::AtLeast(bar) => Some(format!(">= {bar}")),
            Self::AtMost(bar) => Some(format!("<= {bar}")),
            Self::None => None,
        }
    }

    fn holds(self, value: f64) -> Option<bool> {
        match self {
            Self::AtLeast(bar) => Some(value >= bar),
            Self::AtMost(bar) => Some(value <= bar),
            Self::None => None,
        }
    }

    /// How far the value is from the bar, or the bar from "the same", whichever is more.
    fn margin(self, value: f64) -> f64 {
        match self {
            Self::AtLeast(bar) | Self::AtMost(bar) => (value - bar).abs().max((1.0 - bar).abs()),
            Self::None => f64::INFINITY,
        }
    }
}

/// One row.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    /// As in SPECIFICATION.md.
    pub(super) name: String,
    /// The median, or nothing when skipped.
    pub(super) value: Option<f64>,
    /// 95 % interval of the median.
    pub(super) interval: Option<(f64, f64)>,
    /// `ratio`, `ms`, `MiB`, …
    pub(super) unit: &'static str,
    /// The promise.
    pub(super) bar: Option<String>,
    /// Whether it holds; nothing when it is skipped, too noisy or promises nothing.
    pub(super) ok: Option<bool>,
    /// Why there is no verdict.
    pub(super) skipped: Option<String>,
    /// Every run.
    pub(super) runs: Vec<f64>,
}

impl Row {
    /// A row of paired ratios; `noise` is the A/A interval that ran alongside.
    #[must_use]
    pub(super) fn ratio(name: &str, bar: Bar, runs: Vec<f64>, noise: Option<Estimate>) -> Self {
        let mut row = Self::of(name, "ratio", bar, runs);
        if let (Some(value), Some(noise)) = (row.value, noise)
            && noise.high - noise.low > bar.margin(value) / 2.0
        {
            row.ok = None;
            row.skipped = Some(format!("too noisy: A/A {:.3} .. {:.3}", noise.low, noise.high));
        }
        row
    }

    /// A row of any unit.
    #[must_use]
    pub(super) fn of(name: &str, unit: &'static str, bar: Bar, runs: Vec<f64>) -> Self {
        let estimate = Estimate::of(&runs);
        let value = estimate.map(|estimate| estimate.median);
        Self {
            name: name.to_owned(),
            value,
            interval: estimate.map(|estimate| (estimate.low, estimate.high)),
            unit,
            bar: bar.text(),
            ok: value.and_then(|value| bar.holds(value)),
            skipped: value.is_none().then(|| "no run gave a figure".to_owned()),
            runs,
        }
    }

    /// A row whose value is the 99th percentile of its runs, which of fewer than a hundred is the longest.
    #[must_use]
    pub(super) fn p99(name: &str, unit: &'static str, bar: Bar, runs: Vec<f64>) -> Self {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let value = sorted.get((sorted.len() * 99).div_ceil(100).saturating_sub(1)).copied();
        Self {
            value,
            interval: None,
            ok: value.and_then(|v| bar.holds(v)),
            ..Self::of(name, unit, bar, runs)
        }
    }

    /// A row of which every run must keep the promise: its value is the largest.
    #[must_use]
    pub(super) fn largest(name: &str, unit: &'static str, bar: Bar, runs: Vec<f64>) -> Self {
        let value = runs.iter().copied().max_by(f64::total_cmp);
        Self { value, ok: value.and_then(|v| bar.holds(v)), ..Self::of(name, unit, bar, runs) }
    }

    /// A promise that is kept in one of two ways: as this row says, or as `other` does.
    #[must_use]
    pub(super) fn or(mut self, other: &Self) -> Self {
        let (Some(bar), Some(others)) = (&self.bar, &other.bar) else { return self };
        self.bar = Some(format!("{bar}, or {} {others}", other.name));
        if self.ok != Some(true) && other.ok == Some(true) {
            (self.ok, self.skipped) = (Some(true), None);
        }
        self
    }

    /// A row that could not run.
    #[must_use]
    pub(super) fn skipped(name: &str, unit: &'static str, bar: Bar, why: &str) -> Self {
        Self { skipped: Some(why.to_owned()), ok: None, ..Self::of(name, unit, bar, Vec::new()) }
    }
}

/// All rows and the machine they are of.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Kernel, CPU, load.
    pub(super) machine: serde_json::Value,
    /// The rows.
    pub(super) rows: Vec<Row>,
}

impl Report {
    /// For people.
    #[must_use]
    pub(super) fn table(&self) -> String {
        let mut text =
            format!("{:<36} {:>10} {:>19}  {:<8} {:<8} verdict\n", "row", "value", "95 %", "unit", "bar");
        for row in &self.rows {
            let value = row.value.map_or("-".to_owned(), |value| format!("{value:.3}"));
            let interval =
                row.interval.map_or("-".to_owned(), |(low, high)| format!("{low:.3} .. {high:.3}"));
            let verdict = match (row.ok, &row.skipped) {
                (Some(true), _) => "ok".to_owned(),
                (Some(false), _) => "NOT MET".to_owned(),
                (None, Some(why)) => why.clone(),
                (None, None) => "for information".to_owned(),
            };
            let bar = row.bar.as_deref().unwrap_or("");
            let _ = writeln!(
                text,
                "{:<36} {value:>10} {interval:>19}  {:<8} {bar:<8} {verdict}",
                row.name, row.unit
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_in_two_ways_is_kept_by_one_of_them() {
        let kept = Row::of("floor", "ratio", Bar::AtMost(1.5), vec![1.4; 15]);
        let broken = Row::of("floor", "ratio", Bar::AtMost(1.5), vec![1.6; 15]);
        let own = |value| Row::of("peer", "ratio", Bar::AtMost(0.6), vec![value; 15]);
        assert_eq!(own(0.8).or(&kept).ok, Some(true));
        assert_eq!(own(0.8).or(&broken).ok, Some(false));
        assert_eq!(own(0.5).or(&broken).ok, Some(true));
        assert_eq!(own(0.8).or(&kept).bar.as_deref(), Some("<= 0.6, or floor <= 1.5"));
        assert_eq!(Row::skipped("peer", "ratio", Bar::AtMost(0.6), "no peer").or(&broken).ok, None);
    }

    #[test]
    fn a_row_that_the_noise_swallows_has_no_verdict() {
        let noise = Estimate { median: 1.0, low: 0.9, high: 1.1 };
        let row = Row::ratio("x", Bar::AtLeast(1.0), vec![1.05; 15], Some(noise));
        assert_eq!((row.ok, row.skipped.is_some()), (None, true));
        let row = Row::ratio("x", Bar::AtLeast(1.0), vec![2.0; 15], Some(noise));
        assert_eq!(row.ok, Some(true));
        let row = Row::ratio("x", Bar::AtMost(0.5), vec![2.0; 15], Some(noise));
        assert_eq!(row.ok, Some(false));
    }

    #[test]
    fn the_99th_percentile_is_judged_not_the_median() {
        let mut runs = vec![1.0; 98];
        runs.extend([9.0, 10.0]);
        let row = Row::p99("x", "ms", Bar::AtMost(5.0), runs);
        assert_eq!((row.value, row.ok), (Some(9.0), Some(false)));
        let row = Row::p99("x", "ms", Bar::AtMost(5.0), vec![1.0, 6.0, 2.0]);
        assert_eq!((row.value, row.ok), (Some(6.0), Some(false)));
        assert_eq!(Row::p99("x", "ms", Bar::AtMost(5.0), Vec::new()).ok, None);
        let row = Row::largest("x", "MiB", Bar::AtMost(5.0), vec![1.0, 6.0, 2.0]);
        assert_eq!((row.value, row.ok), (Some(6.0), Some(false)));
    }

    #[test]
    fn a_row_without_runs_is_skipped_and_never_ok() {
        let row = Row::ratio("x", Bar::AtLeast(1.0), Vec::new(), None);
        assert_eq!((row.ok, row.skipped.as_deref()), (None, Some("no run gave a figure")));
    }
}
