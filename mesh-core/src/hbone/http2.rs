//! HTTP/2 (RFC 9113) for one use: CONNECT streams between node proxies.
//!
//! A connection is a plain structure that is fed with received bytes and time; sockets stay with its owner. What is
//! special about it is the way of the data: it goes from the buffer of the read straight into the application's
//! socket, and is read from there straight into the buffer of the next write, so that no byte is copied between.
//!
//! | module | for |
//! |---|---|
//! | [`frame`] | heads of frames, reasons |
//! | [`hpack`], [`huffman`] | header blocks |
//! | [`parse`] | frames out of bytes that are cut anywhere |
//! | [`streams`] | one stream's state; the table of them |
//! | [`core`] | a connection: settings, windows, GOAWAY, limits |
//! | [`operations`] | what the tasks of its streams do |
//! | [`receive`] | what each received frame does to it |
//! | [`engine`] | the connection and its transport |

pub(super) mod core;
pub(super) mod engine;
pub mod frame;
pub mod hpack;
mod huffman;
pub(super) mod operations;
mod parse;
mod receive;
pub(super) mod streams;

pub use frame::Reason;

#[cfg(test)]
mod tests;
