//! Documents as trees with lines, and how they become typed objects.

pub(crate) mod explore;
pub(crate) mod json;
pub(crate) mod shape;
pub(crate) mod yaml;

pub(crate) use json::Json;
pub(crate) use shape::{ShapeError, nearest, typed, typed_known};
pub(crate) use yaml::{Entry, Node, Value, documents};
