//! How a DestinationRule spreads requests over endpoints.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::consistent_hash::{Cookie, Key, Table};
use mesh_core::xds::proto::l7::load_balancer::{Algorithm, Simple, Warmup, ZoneAware};
use mesh_core::xds::proto::l7::locality_setting::{Distribute, Failover};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Check;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct LoadBalancerText {
    simple: Option<SimpleText>,
    consistent_hash: Option<HashText>,
    locality_lb_setting: Option<LocalityText>,
    zone_aware_lb_setting: Option<ZoneAwareText>,
    warmup: Option<WarmupText>,
    warmup_duration_secs: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum SimpleText {
    Unspecified,
    LeastConn,
    LeastRequest,
    Random,
    RoundRobin,
    Passthrough,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HashText {
    http_header_name: Option<String>,
    http_cookie: Option<CookieText>,
    use_source_ip: Option<bool>,
    http_query_parameter_name: Option<String>,
    ring_hash: Option<RingText>,
    maglev: Option<MaglevText>,
    minimum_ring_size: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CookieText {
    name: String,
    path: String,
    ttl: Option<String>,
    attributes: Vec<AttributeText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AttributeText {
    name: String,
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RingText {
    minimum_ring_size: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MaglevText {
    table_size: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct LocalityText {
    enabled: Option<bool>,
    distribute: Vec<DistributeText>,
    failover: Vec<FailoverText>,
    failover_priority: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DistributeText {
    from: String,
    to: BTreeMap<String, i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FailoverText {
    from: String,
    to: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ZoneAwareText {
    enabled: Option<bool>,
    failover: Option<IgnoredAny>,
    failover_priority: Option<IgnoredAny>,
    min_cluster_size: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WarmupText {
    duration: Option<String>,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
}

pub(super) fn load_balancer(
    text: LoadBalancerText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::LoadBalancer {
    let at = |name: &str| format!("{field}.{name}");
    if text.simple.is_some() && text.consistent_hash.is_some() {
        check.error(at("simple"), "may not stand beside consistentHash; keep one of the two");
    }
    if text.warmup.is_some() && text.warmup_duration_secs.is_some() {
        check.error(at("warmupDurationSecs"), "may not stand beside warmup; keep warmup");
    }
    let warmup = match (text.warmup, text.warmup_duration_secs) {
        (Some(text), _) => Some(warmup(text, &at("warmup"), check)),
        (None, Some(duration)) => {
            let duration = check.duration(&at("warmupDurationSecs"), Some(&duration));
            Some(Warmup { duration, ..Warmup::default() })
        }
        (None, None) => None,
    };
    let algorithm = match (text.consistent_hash, text.simple) {
        (Some(hash), _) => consistent_hash(hash, &at("consistentHash"), check).map(Algorithm::ConsistentHash),
        (None, Some(simple)) => Some(Algorithm::Simple(
            match simple {
                SimpleText::Unspecified => Simple::Unspecified,
                SimpleText::LeastConn | SimpleText::LeastRequest => Simple::LeastRequest,
                SimpleText::Random => Simple::Random,
                SimpleText::RoundRobin => Simple::RoundRobin,
                SimpleText::Passthrough => Simple::Passthrough,
            }
            .into(),
        )),
        (None, None) => None,
    };
    let weighs = matches!(&algorithm, None | Some(Algorithm::Simple(0..=2)));
    if warmup.is_some() && !weighs {
        unsupported.push(at("warmup (only LEAST_REQUEST and ROUND_ROBIN start slowly)"));
    }
    let zone_aware = text.zone_aware_lb_setting.map(|zone| {
        for (name, set) in [
            ("zoneAwareLbSetting.failover", zone.failover.is_some()),
            ("zoneAwareLbSetting.failoverPriority", zone.failover_priority.is_some()),
        ] {
            if set {
                unsupported.push(at(name));
            }
        }
        let size = zone.min_cluster_size.map(|s| check.count(&at("zoneAwareLbSetting.minClusterSize"), s));
        ZoneAware { enabled: zone.enabled.unwrap_or(true), min_cluster_size: size.unwrap_or_default() }
    });
    let locality = text.locality_lb_setting.map(|l| locality(l, &at("localityLbSetting"), check));
    l7::LoadBalancer { algorithm, locality, warmup, zone_aware }
}

fn warmup(text: WarmupText, field: &str, check: &mut Check<'_>) -> Warmup {
    let at = |name: &str| format!("{field}.{name}");
    if text.duration.is_none() {
        check.error(at("duration"), "missing; write how long a new endpoint gets less, for example 60s");
    }
    if text.minimum_percent.is_some_and(|p| !(0.0..=100.0).contains(&p)) {
        check.error(at("minimumPercent"), "is no percentage; write 0 to 100");
    }
    if text.aggression.is_some_and(|a| a.is_nan() || a < 1.0) {
        check.error(at("aggression"), "is less than 1; write 1 (linear) or more");
    }
    Warmup {
        duration: check.duration(&at("duration"), text.duration.as_deref()),
        minimum_percent: text.minimum_percent,
        aggression: text.aggression,
    }
}

fn consistent_hash(text: HashText, field: &str, check: &mut Check<'_>) -> Option<l7::ConsistentHash> {
    let at = |name: &str| format!("{field}.{name}");
    let mut keys = Vec::new();
    if let Some(name) = text.http_header_name {
        keys.push(Key::Header(check.header_name(&at("httpHeaderName"), &name)));
    }
    if let Some(text) = text.http_cookie {
        if text.name.is_empty() {
            check.error(at("httpCookie.name"), "missing; name the cookie");
        }
        let ttl = check.duration(&at("httpCookie.ttl"), text.ttl.as_deref());
        let attributes =
            text.attributes.into_iter().map(|a| l7::Header { name: a.name, value: a.value }).collect();
        keys.push(Key::Cookie(Cookie { name: text.name, path: text.path, ttl, attributes }));
    }
    if text.use_source_ip == Some(true) {
        keys.push(Key::SourceIp(true));
    }
    keys.extend(text.http_query_parameter_name.map(Key::QueryParameter));
    if keys.len() != 1 {
        let fix = "write one of httpHeaderName, httpCookie, useSourceIp, httpQueryParameterName";
        check.error(field, format!("has {} keys; {fix}", keys.len()));
    }
    let size = |field: String, value: i64, check: &mut Check<'_>| u64::from(check.count(&field, value));
    let table = match (text.ring_hash, text.maglev, text.minimum_ring_size) {
        (Some(_), Some(_), _) => {
            check.error(at("ringHash"), "may not stand beside maglev; keep one of the two");
            None
        }
        (Some(ring), None, _) => {
            Some(Table::Ring(size(at("ringHash.minimumRingSize"), ring.minimum_ring_size, check)))
        }
        (None, Some(maglev), _) => {
            Some(Table::Maglev(size(at("maglev.tableSize"), maglev.table_size, check)))
        }
        (None, None, Some(ring)) => Some(Table::Ring(size(at("minimumRingSize"), ring, check))),
        (None, None, None) => Some(Table::Ring(0)),
    };
    Some(l7::ConsistentHash { key: Some(keys.pop()?), table })
}

pub(super) fn locality(text: LocalityText, field: &str, check: &mut Check<'_>) -> l7::LocalitySetting {
    let at = |name: String| format!("{field}.{name}");
    if !text.distribute.is_empty() && (!text.failover.is_empty() || !text.failover_priority.is_empty()) {
        check.error(at("distribute".into()), "may not stand beside failover or failoverPriority");
    }
    let mut distribute = Vec::new();
    for (i, entry) in text.distribute.into_iter().enumerate() {
        let to: BTreeMap<String, u32> = entry
            .to
            .into_iter()
            .map(|(place, share)| {
                let share = check.count(&at(format!("distribute[{i}].to.{place}")), share);
                (place, share)
            })
            .collect();
        if entry.from.is_empty() {
            check.error(at(format!("distribute[{i}].from")), "missing; write region/zone/subzone, or *");
        }
        let sum: u64 = to.values().map(|v| u64::from(*v)).sum();
        if sum != 100 {
            check.error(at(format!("distribute[{i}].to")), format!("adds up to {sum}; shares are of 100"));
        }
        distribute.push(Distribute { from: entry.from, to });
    }
    let mut failover = Vec::new();
    for (i, entry) in text.failover.into_iter().enumerate() {
        if entry.from.is_empty() || entry.to.is_empty() || entry.from == entry.to {
            check.error(at(format!("failover[{i}]")), "needs two different regions as from and to");
        }
        failover.push(Failover { from: entry.from, to: entry.to });
    }
    l7::LocalitySetting {
        enabled: text.enabled,
        distribute,
        failover,
        failover_priority: text.failover_priority,
    }
}
