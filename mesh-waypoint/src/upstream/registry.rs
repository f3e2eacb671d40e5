//! A map that is read by every request and written to rarely.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arc_swap::ArcSwap;

/// Parts of the map: a write copies one of them.
const SHARDS: usize = 64;

/// A part of the map.
type Shard<K, V> = ArcSwap<HashMap<K, Arc<V>>>;

/// Shared values by key. Reading takes no lock; writing copies a part of the map.
#[derive(Debug)]
pub(super) struct Registry<K, V> {
    shards: Box<[Shard<K, V>]>,
}

impl<K: Clone + Eq + Hash, V> Default for Registry<K, V> {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| ArcSwap::default()).collect() }
    }
}

impl<K: Clone + Eq + Hash, V> Registry<K, V> {
    pub(super) fn get<Q>(&self, key: &Q) -> Option<Arc<V>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.shard(key).load().get(key).cloned()
    }

    /// The value of a key: the one that is there, else `value`.
    pub(super) fn get_or_insert(&self, key: &K, value: &Arc<V>) -> Arc<V> {
        self.shard(key).rcu(|map| {
            let mut map = HashMap::clone(map);
            map.entry(key.clone()).or_insert_with(|| value.clone());
            map
        });
        self.get(key).unwrap_or_else(|| value.clone())
    }

    /// Keeps the values that `keep` says yes to.
    pub(super) fn retain(&self, keep: impl Fn(&K, &Arc<V>) -> bool) {
        for shard in &self.shards {
            if shard.load().iter().all(|(key, value)| keep(key, value)) {
                continue;
            }
            shard.rcu(|map| {
                let mut map = HashMap::clone(map);
                map.retain(|key, value| keep(key, value));
                map
            });
        }
    }

    /// All values, in no order.
    pub(super) fn values(&self) -> Vec<Arc<V>> {
        self.shards.iter().flat_map(|shard| shard.load().values().cloned().collect::<Vec<_>>()).collect()
    }

    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> &Shard<K, V> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        &self.shards[hasher.finish() as usize % SHARDS]
    }
}
