//! Reader of DestinationRule.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::xds::proto::l7;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::Object;
use super::super::l7::DestinationRule;
use super::balancing::{LoadBalancerText, load_balancer};
use super::istio::Resource;
use super::traffic::{OutlierText, PoolText, TlsText, client_tls, connection_pool, outlier_detection};
use super::{Check, Document, FieldError, is_dns_name, match_labels, meta, shape};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    host: String,
    traffic_policy: Option<PolicyText>,
    subsets: Vec<SubsetText>,
    export_to: Vec<String>,
    workload_selector: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SubsetText {
    name: String,
    labels: BTreeMap<String, String>,
    traffic_policy: Option<PolicyText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PolicyText {
    connection_pool: Option<PoolText>,
    load_balancer: Option<LoadBalancerText>,
    outlier_detection: Option<OutlierText>,
    tls: Option<TlsText>,
    port_level_settings: Vec<PortPolicyText>,
    tunnel: Option<IgnoredAny>,
    proxy_protocol: Option<ProxyProtocolText>,
    retry_budget: Option<BudgetText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PortPolicyText {
    port: Option<PortText>,
    connection_pool: Option<PoolText>,
    load_balancer: Option<LoadBalancerText>,
    outlier_detection: Option<OutlierText>,
    tls: Option<TlsText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PortText {
    number: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProxyProtocolText {
    version: VersionText,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
enum VersionText {
    #[default]
    V1,
    V2,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct BudgetText {
    percent: Option<f64>,
    budget_interval: Option<String>,
    min_retry_concurrency: Option<i64>,
}

pub(super) fn destination_rule(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<Spec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    if spec.host.is_empty() {
        check.error("spec.host", "missing; name a service, or *.domain");
    } else if spec.host != "*" && !is_dns_name(spec.host.strip_prefix("*.").unwrap_or(&spec.host)) {
        check.error("spec.host", format!("{:?} is no host; name a service, or *.domain", spec.host));
    }
    let mut unsupported = Vec::new();
    let whole = spec.traffic_policy.map(|p| policy(p, "spec.trafficPolicy", &mut check, &mut unsupported));
    let mut names = BTreeSet::new();
    let mut subsets = Vec::new();
    for (i, text) in spec.subsets.into_iter().enumerate() {
        let field = format!("spec.subsets[{i}]");
        if text.name.is_empty() {
            check.error(format!("{field}.name"), "missing; routes name subsets");
        } else if !names.insert(text.name.clone()) {
            check.error(format!("{field}.name"), format!("{:?} is the name of another subset", text.name));
        }
        match_labels(&text.labels, &format!("{field}.labels"), &mut check);
        let place = format!("{field}.trafficPolicy");
        let policy = text.traffic_policy.map(|p| policy(p, &place, &mut check, &mut unsupported));
        subsets.push(l7::Subset { name: text.name, labels: text.labels, policy });
    }
    let selective = spec.workload_selector.is_some();
    check.finish(Object::DestinationRule(Arc::new(DestinationRule {
        meta,
        host: spec.host,
        export_to: spec.export_to,
        selective,
        policy: whole,
        subsets,
        unsupported,
    })))
}

fn policy(
    text: PolicyText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::TrafficPolicy {
    let at = |name: &str| format!("{field}.{name}");
    if text.tunnel.is_some() {
        unsupported.push(at("tunnel"));
    }
    let mut ports = Vec::new();
    let mut numbers = BTreeSet::new();
    for (i, text) in text.port_level_settings.into_iter().enumerate() {
        let field = at(&format!("portLevelSettings[{i}]"));
        let number = check.port(&format!("{field}.port.number"), text.port.unwrap_or_default().number);
        if number != 0 && !numbers.insert(number) {
            check.error(format!("{field}.port.number"), format!("{number} has settings already"));
        }
        let at = |name: &str| format!("{field}.{name}");
        ports.push(l7::PortPolicy {
            port: number.into(),
            connection_pool: text.connection_pool.map(|p| connection_pool(p, &at("connectionPool"), check)),
            load_balancer: text
                .load_balancer
                .map(|l| load_balancer(l, &at("loadBalancer"), check, unsupported)),
            outlier_detection: text
                .outlier_detection
                .map(|o| outlier_detection(o, &at("outlierDetection"), check, unsupported)),
            tls: text.tls.map(|t| client_tls(t, &at("tls"), check, unsupported)),
        });
    }
    let retry_budget = text.retry_budget.map(|budget| {
        let at = |name: &str| format!("{field}.retryBudget.{name}");
        if budget.percent.is_some_and(|p| !(0.0..=100.0).contains(&p)) {
            check.error(at("percent"), "is no percentage; write 0 to 100");
        }
        let min = budget.min_retry_concurrency.map(|m| check.count(&at("minRetryConcurrency"), m));
        l7::RetryBudget {
            percent: budget.percent,
            interval: check.duration(&at("budgetInterval"), budget.budget_interval.as_deref()),
            min_concurrency: min,
        }
    });
    l7::TrafficPolicy {
        connection_pool: text.connection_pool.map(|p| connection_pool(p, &at("connectionPool"), check)),
        load_balancer: text.load_balancer.map(|l| load_balancer(l, &at("loadBalancer"), check, unsupported)),
        outlier_detection: text
            .outlier_detection
            .map(|o| outlier_detection(o, &at("outlierDetection"), check, unsupported)),
        tls: text.tls.map(|t| client_tls(t, &at("tls"), check, unsupported)),
        proxy_protocol: text.proxy_protocol.map(|p| l7::ProxyProtocol {
            version: match p.version {
                VersionText::V1 => 1,
                VersionText::V2 => 2,
            },
        }),
        retry_budget,
        ports,
    }
}
