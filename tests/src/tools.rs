//! Small programs that run inside pods, as subcommands of `mesh-tests tool`.
//!
//! They are plain clients and servers on blocking sockets or one epoll loop, know nothing of the mesh, and report what
//! they see of their connections; that makes them witnesses.

pub mod call;
pub mod dns;
pub mod http_once;
pub mod http_relay;
pub mod join;
pub mod load;
pub mod relay;
pub mod rounds;
pub mod serve;
pub mod transfer;
pub mod web;

use anyhow::Result;

/// The programs.
#[derive(clap::Subcommand)]
pub enum Tool {
    /// TCP servers: echo, greeting, sink, source
    Serve(serve::Args),
    /// One TCP connection; prints what it saw as JSON
    Call(call::Args),
    /// Waits until pods are in the mesh; prints when
    Join(join::Args),
    /// Load of one shape; prints its figures as JSON
    Load(load::Args),
    /// A tiny HTTP service that may call another
    Web(web::Args),
    /// A bare copy relay
    Relay(relay::Args),
    /// An exact number of round trips, or their server
    Rounds(rounds::Args),
    /// Bytes both ways with hashes of what arrived, or their server
    Transfer(transfer::Args),
    /// A DNS server with fixed names
    Dns(dns::Args),
    /// A bare relay of HTTP/1.1
    HttpRelay(http_relay::Args),
    /// Idle HTTP/1.1 connections after a request each
    HttpHold(http_once::HoldArgs),
    /// Milliseconds from a program's start to its first answer
    HttpStart(http_once::StartArgs),
    /// Burns cycles that nobody else wants, so that a virtual CPU never halts
    Spin,
}

/// Runs one.
///
/// # Errors
/// Its own.
pub fn run(tool: &Tool) -> Result<()> {
    match tool {
        Tool::Serve(args) => serve::run(args),
        Tool::Call(args) => call::run(args),
        Tool::Join(args) => join::run(args),
        Tool::Load(args) => load::run(args),
        Tool::Web(args) => web::run(args),
        Tool::Relay(args) => relay::run(args),
        Tool::Rounds(args) => rounds::run(args),
        Tool::Transfer(args) => transfer::run(args),
        Tool::Dns(args) => dns::run(args),
        Tool::HttpRelay(args) => http_relay::run(args),
        Tool::HttpHold(args) => http_once::hold(args),
        Tool::HttpStart(args) => http_once::start(args),
        Tool::Spin => loop {
            std::hint::spin_loop();
        },
    }
}
