//! The control plane: sources -> model -> resources -> push; certificate authority.
//!
//! | module | for |
//! |---|---|
//! | [`source`] | where objects come from; [`source::dir`]: a watched directory of YAML |
//! | [`model`] | the objects, validated, blind to their source |
//! | [`convert`] | model to wire resources, pure |
#![forbid(unsafe_code)]

pub mod convert;
pub mod model;
pub mod source;
mod tree;
