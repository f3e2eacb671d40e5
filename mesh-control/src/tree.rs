//! Documents as trees with lines, and how they become typed objects.

pub(crate) mod shape;
pub(crate) mod yaml;

pub(crate) use shape::{ShapeError, nearest, typed};
pub(crate) use yaml::{Node, Value, documents};
