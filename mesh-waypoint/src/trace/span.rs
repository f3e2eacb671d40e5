//! A finished span: one request at this proxy, or one try of it.

pub use mesh_core::telemetry::{Place, Span, SpanService as Service};

use super::context::Context;

impl From<Context> for Place {
    fn from(context: Context) -> Self {
        let Context { trace, span, parent, debug, .. } = context;
        Self { trace, span, parent, debug }
    }
}
