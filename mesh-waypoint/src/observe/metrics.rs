//! Which metrics of requests there are, and with which labels.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::expression::{Attribute, Expression};
use mesh_core::telemetry::{LabelEdits, MetricShape, Shape, UNKNOWN};
use mesh_core::xds::proto::l7::telemetry::{Metric, TagOverride};

use super::facts::Ended;

/// The metrics that there are of requests, in the order of [`Rules`].
pub(super) const OF_REQUESTS: [Metric; 4] =
    [Metric::RequestCount, Metric::RequestDuration, Metric::RequestSize, Metric::ResponseSize];

/// What is counted of requests.
#[derive(Debug, Default)]
pub enum Metrics {
    /// What Istio counts.
    #[default]
    Own,
    /// Nothing.
    Off,
    /// The same for every request.
    Fixed(Arc<Shape>),
    /// Labels whose values each request decides.
    Computed(Box<Rules>),
}

/// Rules of each metric of [`OF_REQUESTS`].
pub type Rules = [Rule; 4];

/// What holds for one metric.
#[derive(Debug, Default, Clone)]
pub struct Rule {
    pub(super) disabled: bool,
    tags: BTreeMap<Arc<str>, Tag>,
}

#[derive(Debug, Clone)]
enum Tag {
    Removed,
    Fixed(Arc<str>),
    Computed(Expression),
}

impl Rule {
    /// Takes a tag of an override; one that cannot be read, which the control plane has told of, changes nothing.
    pub(super) fn set(&mut self, tag: &TagOverride) {
        let value = match tag.value.as_deref().map(Expression::read) {
            None => Tag::Removed,
            Some(Err(_)) => return,
            Some(Ok(expression)) if expression.is_constant() => {
                let text = expression.text_of(|_| Attribute::Map(Vec::new()));
                Tag::Fixed(text.as_deref().unwrap_or(UNKNOWN).into())
            }
            Some(Ok(expression)) => Tag::Computed(expression),
        };
        self.tags.insert(tag.name.as_str().into(), value);
    }

    fn shape(&self, ended: Option<&Ended<'_>>) -> MetricShape {
        let value = |tag: &Tag| match tag {
            Tag::Removed => None,
            Tag::Fixed(text) => Some(Arc::clone(text)),
            Tag::Computed(expression) => {
                let text = ended.and_then(|ended| expression.text_of(|root| ended.attributes(root)));
                Some(text.as_deref().unwrap_or(UNKNOWN).into())
            }
        };
        let labels: LabelEdits = self.tags.iter().map(|(name, tag)| (Arc::clone(name), value(tag))).collect();
        MetricShape { disabled: self.disabled, labels }
    }
}

impl Metrics {
    pub(super) fn of(rules: Rules) -> Self {
        let all = || rules.iter().flat_map(|rule| rule.tags.values());
        if all().next().is_none() && rules.iter().all(|rule| !rule.disabled) {
            return Self::Own;
        }
        if all().any(|tag| matches!(tag, Tag::Computed(_))) {
            return Self::Computed(Box::new(rules));
        }
        Self::Fixed(Arc::new(shape(&rules, None)))
    }

    /// Whether requests decide about labels.
    #[must_use]
    pub const fn is_computed(&self) -> bool {
        matches!(self, Self::Computed(_))
    }

    /// How the metrics of one request differ from Istio's own.
    #[must_use]
    pub fn shape(&self, ended: Option<&Ended<'_>>) -> Option<Arc<Shape>> {
        match self {
            Self::Own | Self::Off => None,
            Self::Fixed(shape) => Some(Arc::clone(shape)),
            Self::Computed(rules) => Some(Arc::new(shape(rules, ended))),
        }
    }
}

fn shape(rules: &Rules, ended: Option<&Ended<'_>>) -> Shape {
    let [requests, duration, request_bytes, response_bytes] = rules.each_ref().map(|rule| rule.shape(ended));
    Shape { requests, duration, request_bytes, response_bytes }
}
