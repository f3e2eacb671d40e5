//! What people see of clusters and endpoints: `waypoint endpoints`.

use std::sync::atomic::Ordering;
use std::time::Instant;

use mesh_core::route::Dial;
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::endpoint::Endpoint;
use super::limits::Limit;
use super::live::Live;

impl Cluster {
    /// Its policy's origins, limits and counts, and each endpoint's state. Times are in milliseconds.
    #[must_use]
    pub fn dump(&self, now: Instant) -> Value {
        let (live, now) = (self.snapshot(), self.millis(now));
        let policy = &live.members.policy;
        let usage = |limit| self.usage().count(limit);
        json!({
            "cluster": self.key().to_string(),
            "policies": policy.origins,
            "algorithm": format!("{:?}", policy.balancer.algorithm),
            "outlierDetection": policy.outlier.is_some(),
            "connections": usage(Limit::Connection),
            "pending": usage(Limit::Pending),
            "requests": usage(Limit::Request),
            "retries": usage(Limit::Retry),
            "overflows": self.usage().overflows.load(Ordering::Relaxed),
            "ejectionsNotAllowed": self.spared.load(Ordering::Relaxed),
            "leftOut": live.members.left_out,
            "endpoints": live.members.endpoints.iter().map(|e| endpoint(&live, e, now)).collect::<Vec<_>>(),
        })
    }
}

fn endpoint(live: &Live, endpoint: &Endpoint, now: u64) -> Value {
    let level = live.levels.get(endpoint.level);
    let share = |at: usize| {
        level.map_or(0, |level| level.below - at.checked_sub(1).map_or(0, |at| live.levels[at].below))
    };
    json!({
        "workload": endpoint.uid(),
        "name": endpoint.workload.as_ref().map_or_else(String::new, |w| format!("{}/{}", w.namespace, w.name)),
        "address": match &endpoint.route.dial {
            Dial::Address(address) => address.ip().to_string(),
            Dial::Hostname { hostname, .. } => hostname.to_string(),
        },
        "dial": format!("{:?}", endpoint.route.dial),
        "hbone": !matches!(endpoint.route.protocol, mesh_core::route::Protocol::Tcp),
        "port": endpoint.port,
        "weight": endpoint.weight,
        "priority": endpoint.level,
        "priorityPercent": share(endpoint.level),
        "panic": level.is_some_and(|level| level.panic),
        "locality": endpoint.workload.as_ref().map(|w| {
            format!("{}/{}/{}", w.locality.region, w.locality.zone, w.locality.subzone)
        }),
        "active": endpoint.active(),
        "requests": endpoint.state.picked.load(Ordering::Relaxed),
        "failures": endpoint.state.failed.load(Ordering::Relaxed),
        "outlier": endpoint.state.record.figures(now),
    })
}
