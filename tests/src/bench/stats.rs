//! Medians of paired ratios and their certainty.

/// A median with its 95 % interval (order statistics: no assumption on the distribution).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Estimate {
    /// The median.
    pub(super) median: f64,
    /// Lower end.
    pub(super) low: f64,
    /// Upper end.
    pub(super) high: f64,
}

impl Estimate {
    /// Of at least one finite value; the interval of fewer than six values is their range.
    #[must_use]
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = match n {
            0 => return None,
            _ if n % 2 == 1 => sorted[n / 2],
            _ => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        };
        let skip = interval_skip(n);
        Some(Self { median, low: sorted[skip], high: sorted[n - 1 - skip] })
    }
}

/// How many values to leave out at each end so that the rest covers the median with 95 %: r - 1 for the largest r
/// with P(Binomial(n, 1/2) < r) <= 0.025.
fn interval_skip(n: usize) -> usize {
    let mut probability = 0.5_f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    let mut cumulative = probability;
    let mut k = 0;
    while cumulative <= 0.025 && k < n / 2 {
        k += 1;
        probability *= (n - k + 1) as f64 / k as f64;
        cumulative += probability;
    }
    k.saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_fifteen_values_leaves_out_three_at_each_end() {
        let values: Vec<f64> = (1..=15).map(f64::from).collect();
        assert_eq!(Estimate::of(&values), Some(Estimate { median: 8.0, low: 4.0, high: 12.0 }));
    }

    #[test]
    fn few_values_give_their_whole_range() {
        assert_eq!(Estimate::of(&[3.0, 1.0]), Some(Estimate { median: 2.0, low: 1.0, high: 3.0 }));
        assert_eq!(Estimate::of(&[]), None);
    }
}
