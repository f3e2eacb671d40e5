//! The names that somebody who mistyped one most likely meant.

/// At most three of `known` that are near `wanted`, nearest first. Near is: at most a third of its letters away
/// (transpositions count as one), or one contains the other. The part before the last `/` is compared too, so that
/// the right name in the wrong namespace is found.
#[must_use]
pub fn suggest<'a>(wanted: &str, known: impl Iterator<Item = &'a str>) -> Vec<String> {
    let limit = (wanted.chars().count() / 3).max(1);
    let short = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    let mut near: Vec<(usize, &str)> = known
        .filter_map(|name| {
            let distance = distance(wanted, name);
            if distance <= limit {
                return Some((distance, name));
            }
            let (a, b) = (short(wanted), short(name));
            let related = !a.is_empty() && (a == b || b.starts_with(&a) || a.starts_with(&b));
            related.then_some((limit + 1, name))
        })
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let substitution = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = substitution.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_counts_once_and_everything_else_by_letter() {
        for (a, b, expected) in
            [("", "", 0), ("abc", "abc", 0), ("abc", "acb", 1), ("abc", "", 3), ("ab", "xyz", 3)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn near_names_and_the_right_name_in_the_wrong_namespace_are_suggested_nearest_first() {
        let known = ["shop/frontend", "shop/backend", "bank/frontend", "shop/db"];
        assert_eq!(suggest("shop/frontedn", known.into_iter())[0], "shop/frontend");
        assert_eq!(suggest("store/backend", known.into_iter()), ["shop/backend"]);
        assert_eq!(suggest("shop/completely-different", known.into_iter()), Vec::<String>::new());
    }
}
