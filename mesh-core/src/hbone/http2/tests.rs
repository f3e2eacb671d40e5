//! The pure parts, each alone.

mod blocks;
mod frames;
