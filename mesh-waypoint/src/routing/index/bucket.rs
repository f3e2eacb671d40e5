//! Matches that hold under the same circumstances, divided further by the values that they ask for.

use std::borrow::Cow;
use std::sync::Arc;

use http::HeaderName;

use super::super::compiled::Entry;
use super::super::matching::{Condition, Field, ValueTest, header_value, query_value};
use super::super::quick::QuickMap;
use super::Search;

/// So few are looked at one by one.
const FEW: usize = 4;
/// By so many fields, one after the other, matches are divided: ten thousand conditions in an object must not become as
/// many calls.
const DEPTH: usize = 6;

/// Positions of matches.
#[derive(Debug)]
pub(super) struct Bucket {
    /// The least position in here.
    first: u32,
    /// Ascending; those that are not filed below.
    rest: Box<[u32]>,
    filed: Option<Box<Files>>,
}

/// Matches by a value that each of them needs.
#[derive(Debug, Default)]
struct Files {
    headers: QuickMap<HeaderName, Values>,
    query: QuickMap<Box<str>, Values>,
    others: Vec<(Field, Values)>,
}

/// Matches that need a value in one field.
#[derive(Debug, Default)]
struct Values {
    /// That value.
    exact: QuickMap<Box<[u8]>, Bucket>,
    /// Some value.
    some: Bucket,
}

/// A field, and the value that it must have, or `None` where it must only be there.
type Key<'a> = (&'a Field, Option<&'a [u8]>);

/// Positions by the keys that they are filed under.
type Groups<'a> = QuickMap<&'a Field, QuickMap<Option<&'a [u8]>, Vec<u32>>>;

impl Default for Bucket {
    fn default() -> Self {
        Self { first: u32::MAX, rest: Box::default(), filed: None }
    }
}

impl Bucket {
    /// From ascending positions.
    pub(super) fn build(positions: Vec<u32>, entries: &[Arc<Entry>]) -> Self {
        Self::divide(positions, entries, &mut Vec::new())
    }

    /// `used` has the fields that all of these were filed by already.
    fn divide<'a>(positions: Vec<u32>, entries: &'a [Arc<Entry>], used: &mut Vec<&'a Field>) -> Self {
        let first = positions.first().copied().unwrap_or(u32::MAX);
        if positions.len() <= FEW || used.len() == DEPTH {
            return Self { first, rest: positions.into(), filed: None };
        }
        let mut sizes: QuickMap<Key<'_>, usize> = QuickMap::default();
        // Without a choice there is nothing to count for.
        if positions.iter().any(|position| keys(&entries[*position as usize], used).nth(1).is_some()) {
            sizes.reserve(positions.len());
            for key in positions.iter().flat_map(|position| keys(&entries[*position as usize], used)) {
                *sizes.entry(key).or_default() += 1;
            }
        }
        let mut rest = Vec::new();
        let mut groups: Groups<'_> = QuickMap::default();
        for position in positions {
            // The file with the fewest in it; of equal ones an exact value.
            let sized = keys(&entries[position as usize], used)
                .map(|key| (sizes.get(&key).copied().unwrap_or(1), key));
            match sized.min_by_key(|(size, key)| (*size, key.1.is_none())) {
                Some((size, (field, value))) => {
                    let group = groups.entry(field).or_default().entry(value);
                    group.or_insert_with(|| Vec::with_capacity(size)).push(position);
                }
                None => rest.push(position),
            }
        }
        let filed = (!groups.is_empty()).then(|| Box::new(Files::build(groups, entries, used)));
        Self { first, rest: rest.into(), filed }
    }

    /// Improves the best of a search by what is in here.
    pub(super) fn search(&self, search: &mut Search<'_>) {
        if self.first >= search.best {
            return;
        }
        search.try_each(&self.rest);
        if let Some(filed) = &self.filed {
            filed.search(search);
        }
    }
}

impl Files {
    fn build<'a>(groups: Groups<'a>, entries: &'a [Arc<Entry>], used: &mut Vec<&'a Field>) -> Self {
        let mut files = Self::default();
        for (field, group) in groups {
            let mut values = Values { exact: map_of(group.len()), some: Bucket::default() };
            used.push(field);
            for (value, positions) in group {
                let bucket = Bucket::divide(positions, entries, used);
                match value {
                    Some(value) => {
                        values.exact.insert(value.into(), bucket);
                    }
                    None => values.some = bucket,
                }
            }
            used.pop();
            match field {
                Field::Header(name) => {
                    files.headers.insert(name.clone(), values);
                }
                Field::Query(name) => {
                    files.query.insert(name.clone(), values);
                }
                field => files.others.push((field.clone(), values)),
            }
        }
        files
    }

    /// Names are looked for on the side that has fewer of them.
    fn search(&self, search: &mut Search<'_>) {
        let head = search.head;
        if self.headers.len() <= head.headers.keys_len() {
            for (name, values) in &self.headers {
                values.search(header_value(head.headers, name), search);
            }
        } else {
            for name in head.headers.keys() {
                if let Some(values) = self.headers.get(name) {
                    values.search(header_value(head.headers, name), search);
                }
            }
        }
        if let Some(query) = head.query.filter(|_| !self.query.is_empty()) {
            for pair in query.split('&') {
                let name = pair.split_once('=').map_or(pair, |(name, _)| name);
                if let Some(values) = self.query.get(name) {
                    // The first value counts, wherever the name is seen again.
                    values.search(query_value(query, name).map(|value| value.as_bytes().into()), search);
                }
            }
        }
        for (field, values) in &self.others {
            values.search(field.value(head), search);
        }
    }
}

impl Values {
    /// `value` is what the request has in the field.
    fn search(&self, value: Option<Cow<'_, [u8]>>, search: &mut Search<'_>) {
        let Some(value) = value else { return };
        if let Some(bucket) = self.exact.get(&*value) {
            bucket.search(search);
        }
        self.some.search(search);
    }
}

fn map_of<K, V>(capacity: usize) -> QuickMap<K, V> {
    QuickMap::with_capacity_and_hasher(capacity, Default::default())
}

/// Under what a match may be filed: it does not hold without that.
fn keys<'a>(entry: &'a Entry, used: &[&Field]) -> impl Iterator<Item = Key<'a>> {
    let free = entry.matching.conditions.iter().filter(|condition| !used.contains(&&condition.field));
    free.filter_map(key)
}

fn key(condition: &Condition) -> Option<Key<'_>> {
    if condition.invert {
        return None;
    }
    match (&condition.field, &condition.test) {
        // Claims may have many values, and what is broken holds without any.
        (Field::Claim(_), _) | (_, ValueTest::Broken) => None,
        (field, ValueTest::Exact(text)) if !text.ignore_case => Some((field, Some(text.text.as_bytes()))),
        (field @ (Field::Header(_) | Field::Query(_)), _) => Some((field, None)),
        _ => None,
    }
}
