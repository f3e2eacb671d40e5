//! Which requests have spans, and where those go.

use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use mesh_core::telemetry::{Facts, Template};
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::telemetry::tag::Value;
use mesh_core::xds::proto::l7::tracer::Kind;

use crate::trace::context::Formats;

/// Tags of spans are cut here unless their provider says otherwise (Istio's `maxTagLength`).
pub const LONGEST_TAG: usize = 256;

/// What holds for the requests to a service.
#[derive(Debug)]
pub struct Tracing {
    /// Where spans go.
    pub tracer: Arc<l7::Tracer>,
    /// How contexts are written, beside what they came in.
    pub formats: Formats,
    /// Percent of requests that begin a trace here.
    pub sampling: f64,
    /// Whether spans are reported; contexts go on in any case.
    pub report: bool,
    /// Whether endpoints get the context.
    pub propagate: bool,
    /// Whether spans have tags of Istio.
    pub istio_tags: bool,
    /// Further tags.
    pub tags: Vec<Tag>,
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            tracer: Arc::default(),
            formats: Formats::default(),
            sampling: 1.0,
            report: true,
            propagate: true,
            istio_tags: true,
            tags: Vec::new(),
        }
    }
}

impl Tracing {
    /// Bytes of a tag's value.
    #[must_use]
    pub fn longest_tag(&self) -> usize {
        match self.tracer.longest_tag {
            0 => LONGEST_TAG,
            longest => usize::try_from(longest).unwrap_or(usize::MAX),
        }
    }
}

/// How a collector's other spans find ours: Zipkin's by B3, everybody else's by the W3C's headers.
pub(super) fn formats(tracer: &l7::Tracer) -> Formats {
    match &tracer.kind {
        Some(Kind::Zipkin(zipkin)) => Formats { w3c: zipkin.w3c, b3: false, b3_several: true },
        _ => Formats { w3c: true, ..Formats::default() },
    }
}

/// A tag that somebody asked for.
#[derive(Debug)]
pub struct Tag {
    /// Its name.
    pub name: String,
    value: Source,
}

#[derive(Debug)]
enum Source {
    Fixed(String),
    Header(HeaderName, String),
    Template(Template),
}

impl Tag {
    /// Reads a tag; none where it would be empty or cannot be read, which the control plane has told of.
    pub(super) fn read(tag: &l7::telemetry::Tag) -> Option<Self> {
        let value = match tag.value.as_ref()? {
            Value::Literal(text) => Source::Fixed(text.clone()),
            Value::Environment(named) => {
                let value = std::env::var(&named.name).unwrap_or_else(|_| named.default_value.clone());
                Source::Fixed(value)
            }
            Value::Header(named) => Source::Header(named.name.parse().ok()?, named.default_value.clone()),
            Value::Format(text) => Source::Template(Template::read(text).ok()?),
        };
        let empty = matches!(&value, Source::Fixed(text) if text.is_empty());
        (!empty).then(|| Self { name: tag.name.clone(), value })
    }

    /// Its value for a request with these headers; an empty one is left out.
    #[must_use]
    pub fn value(&self, headers: &HeaderMap, facts: &dyn Facts) -> Option<String> {
        let text = match &self.value {
            Source::Fixed(text) => text.clone(),
            Source::Header(name, default) => {
                let found = headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
                found.map_or_else(|| default.clone(), std::borrow::Cow::into_owned)
            }
            Source::Template(template) => {
                let mut text = String::new();
                template.write(facts, &mut text);
                text
            }
        };
        (!text.is_empty()).then_some(text)
    }
}
