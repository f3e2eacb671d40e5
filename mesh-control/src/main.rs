//! `mesh-control`: see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

/// Gives back what a push to all nodes needed for a moment; the system's keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match mesh_control::cli::Cli::parse().execute() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
