//! Sections of several Telemetry resources, the later ones over the earlier, as Istio's `telemetry.go` has it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::expression::Expression;
use mesh_core::telemetry::Layout;
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::telemetry::{Metric, Mode};

use super::Observed;
use super::logs::{Collector, Log, Logs, Output};
use super::metrics::{Metrics, OF_REQUESTS, Rules};
use super::tracing::{self, Tracing};
use crate::config::{Own, Role};
use crate::security::Problem;

/// The provider of access logs that Istio's MeshConfig has without being asked.
const ENVOY: &str = "envoy";
/// What Istio calls logs that are sent, unless the provider says otherwise.
const LOG_NAME: &str = "otel_envoy_accesslog";
/// That of metrics.
const PROMETHEUS: &str = "prometheus";

/// Providers of the mesh settings, ready to be used.
pub(super) struct Providers<'a> {
    settings: &'a l7::Settings,
    /// Whose requests are meant: a waypoint takes them for what is behind it, a gateway sends them.
    mode: Mode,
    tracers: BTreeMap<&'a str, Arc<l7::Tracer>>,
    loggers: BTreeMap<&'a str, (Output, Arc<Layout>)>,
}

impl<'a> Providers<'a> {
    pub(super) fn new(settings: &'a l7::Settings, own: &Own, problems: &mut Vec<Problem>) -> Self {
        let tracers = settings.tracers.iter().map(|tracer| (tracer.name.as_str(), Arc::new(tracer.clone())));
        let mut loggers = BTreeMap::new();
        let common = settings.access_log_layout.clone().unwrap_or_default();
        let mut read = |field: &str, layout: &l7::LogLayout| {
            let layout = Layout::read(layout).or_else(|error| {
                problems.push(Problem {
                    object: "MeshConfig".to_owned(),
                    field: field.to_owned(),
                    message: format!("{error}; lines are in Istio's own layout"),
                });
                Layout::read(&l7::LogLayout::default())
            });
            layout.ok().map(Arc::new)
        };
        let of_mesh = read("accessLogFormat", &common);
        let own_layout = read("", &l7::LogLayout::default());
        if let Some(layout) = &of_mesh {
            let output = Output::of(settings.access_log_file.as_deref().unwrap_or_default());
            loggers.insert(ENVOY, (output, Arc::clone(layout)));
        }
        for logger in &settings.loggers {
            let (field, default) = match &logger.collector {
                None => ("extensionProviders.envoyFileAccessLog.logFormat", of_mesh.clone()),
                Some(_) => ("extensionProviders.envoyOtelAls.logFormat.text", own_layout.clone()),
            };
            let layout = match &logger.layout {
                Some(layout) => read(field, layout),
                None => default,
            };
            let output = logger.collector.as_ref().map_or_else(
                || Output::of(&logger.path),
                |to| Output::Collector(Arc::new(collector(logger, to))),
            );
            loggers.extend(layout.map(|layout| (logger.name.as_str(), (output, layout))));
        }
        let mode = if own.role == Role::Gateway { Mode::Client } else { Mode::Server };
        Self { settings, mode, tracers: tracers.collect(), loggers }
    }

    fn means(&self, mode: Mode) -> bool {
        mode == Mode::ClientAndServer || mode == self.mode
    }
}

/// A collector of lines. Attributes that cannot be read, which the control plane has told of, are left out.
fn collector(logger: &l7::Logger, to: &l7::Tracer) -> Collector {
    let name = if logger.log_name.is_empty() { LOG_NAME } else { &logger.log_name };
    let attributes = logger.attributes.as_ref().and_then(|layout| Layout::read(layout).ok());
    Collector { to: Arc::new(to.clone()), name: name.into(), attributes }
}

/// What holds for a service with these resources, the most general first.
pub(super) fn merge(layers: &[&l7::Telemetry], providers: &Providers<'_>) -> Observed {
    Observed {
        tracing: merge_tracing(layers, providers).map(Arc::new),
        logs: merge_logs(layers, providers),
        metrics: merge_metrics(layers, providers),
    }
}

/// Every field by itself: the last that says something counts; of several providers the first does.
fn merge_tracing(layers: &[&l7::Telemetry], providers: &Providers<'_>) -> Option<Tracing> {
    let settings = providers.settings;
    let known = |names: &[String]| names.iter().find_map(|name| providers.tracers.get(name.as_str()));
    let mut tracer = known(&settings.default_tracers);
    let mut tags = &settings.default_tags;
    let mut tracing = Tracing { sampling: settings.default_sampling.unwrap_or(1.0), ..Tracing::default() };
    let sections = layers.iter().flat_map(|layer| &layer.tracing);
    for section in sections.filter(|section| providers.means(section.mode())) {
        if !section.providers.is_empty() {
            // One that is not known is none: spans must not go where nobody meant them to.
            tracer = known(&section.providers[..1]);
        }
        tracing.sampling = section.sampling.unwrap_or(tracing.sampling);
        tracing.report = section.disable_span_reporting.map_or(tracing.report, |disabled| !disabled);
        tracing.istio_tags = section.istio_tags.unwrap_or(tracing.istio_tags);
        tracing.propagate = section.disable_context_propagation.map_or(tracing.propagate, |off| !off);
        if !section.tags.is_empty() {
            tags = &section.tags;
        }
    }
    let tracer = Arc::clone(tracer?);
    tracing.formats = tracing::formats(&tracer);
    tracing.tags = tags.iter().filter_map(tracing::Tag::read).collect();
    tracing.tracer = tracer;
    Some(tracing)
}

fn merge_logs(layers: &[&l7::Telemetry], providers: &Providers<'_>) -> Logs {
    let settings = providers.settings;
    let sections: Vec<&l7::telemetry::AccessLogging> =
        layers.iter().flat_map(|layer| &layer.access_logging).collect();
    let defaults: Vec<&str> = settings.default_loggers.iter().map(String::as_str).collect();
    if sections.is_empty() && defaults.is_empty() {
        return match settings.access_log_file.as_deref() {
            // Nobody says anything, but perhaps what lines are to look like.
            None if settings.access_log_layout.is_none() => Logs::Own,
            Some("") => Logs::Lines(Arc::default()),
            _ => lines(providers, [(ENVOY, "")]),
        };
    }
    // The names of the last layer that has some are the ones that count.
    let mut in_scope = defaults.clone();
    let mut filters: BTreeMap<&str, &str> = BTreeMap::new();
    for layer in layers {
        let mut names = Vec::new();
        for section in layer.access_logging.iter().filter(|section| providers.means(section.mode())) {
            for name in &section.providers {
                filters.insert(name, &section.filter);
                names.push(name.as_str());
            }
        }
        if !names.is_empty() {
            in_scope = names;
        }
    }
    let mut parent = defaults;
    let mut used: BTreeMap<&str, &str> = BTreeMap::new();
    if sections.is_empty() {
        used.extend(parent.iter().map(|name| (*name, "")));
    }
    for section in sections {
        if !section.providers.is_empty() {
            parent = section.providers.iter().map(String::as_str).collect();
        } else {
            // A section without providers is one of those before it, its filter included.
            for name in &parent {
                if !section.filter.is_empty() && providers.means(section.mode()) {
                    filters.insert(name, &section.filter);
                }
            }
        }
        if !providers.means(section.mode()) {
            continue;
        }
        for name in parent.iter().filter(|name| in_scope.contains(name)) {
            if section.disabled == Some(true) {
                used.remove(name);
            } else {
                used.insert(name, filters.get(name).copied().unwrap_or_default());
            }
        }
    }
    lines(providers, used)
}

/// Lines by provider and filter; providers of other kinds have none.
fn lines<'n>(providers: &Providers<'_>, used: impl IntoIterator<Item = (&'n str, &'n str)>) -> Logs {
    let logs = used.into_iter().filter_map(|(name, filter)| {
        let (output, layout) = providers.loggers.get(name)?;
        // What cannot be read was said by the control plane, and then every request has a line.
        let filter = if filter.is_empty() { None } else { Expression::read(filter).ok() };
        Some(Log { output: output.clone(), layout: Arc::clone(layout), filter })
    });
    Logs::Lines(logs.collect())
}

/// Overrides of the providers that are scraped, one after the other; all others are none of ours.
fn merge_metrics(layers: &[&l7::Telemetry], providers: &Providers<'_>) -> Metrics {
    let settings = providers.settings;
    let scraped = |name: &str| name == PROMETHEUS || settings.scraped.iter().any(|known| known == name);
    let named = |names: &[String]| names.iter().any(|name| scraped(name));
    let default = settings.default_metrics.is_empty() || named(&settings.default_metrics);
    let sections = || layers.iter().flat_map(|layer| &layer.metrics);
    // The last section that names providers decides whether ours is among them.
    let last = sections().rfind(|section| !section.providers.is_empty());
    if !last.map_or(default, |section| named(&section.providers)) {
        return Metrics::Off;
    }
    let mut rules = Rules::default();
    let mut all_off = false;
    let mut ours = default;
    for section in sections() {
        if !section.providers.is_empty() {
            ours = named(&section.providers);
        }
        let meant = section.overrides.iter().filter(|change| ours && providers.means(change.mode()));
        for change in meant {
            if change.metric() == Metric::AllMetrics && change.disabled == Some(true) {
                all_off = true;
                continue;
            }
            // Whoever says more of metrics wants them.
            all_off = false;
            let of = |metric: Metric| change.metric() == Metric::AllMetrics || change.metric() == metric;
            for (rule, _) in rules.iter_mut().zip(OF_REQUESTS).filter(|(_, metric)| of(*metric)) {
                rule.disabled = change.disabled.unwrap_or(rule.disabled);
                change.tags.iter().for_each(|tag| rule.set(tag));
            }
        }
    }
    if all_off { Metrics::Off } else { Metrics::of(rules) }
}
