//! `meshctl`: arguments in, text and an exit code out; what it does is in the library.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use mesh_ctl::cli::Cli;
use mesh_ctl::{Exit, Surroundings};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let surroundings =
        Surroundings { colour: wants_colour(), run_dir: PathBuf::from(mesh_ctl::endpoint::RUN_DIR) };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return Exit::Unreachable.into();
        }
    };
    let answer = runtime.block_on(async {
        let mut print = |text: &str| {
            let mut out = std::io::stdout();
            out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
        };
        match mesh_ctl::stream(&cli, &surroundings, &mut print).await {
            Some(answer) => answer,
            None => mesh_ctl::run(&cli, &surroundings).await,
        }
    });
    // A reader that has seen enough (`meshctl workloads | head`) closes the pipe: no reason to complain.
    let _ = std::io::stderr().write_all(answer.errors.as_bytes());
    let _ = std::io::stdout().write_all(answer.text.as_bytes());
    answer.exit.into()
}

/// Colour is for terminals, and not for those who set `NO_COLOR` (<https://no-color.org>) or a dumb terminal.
fn wants_colour() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb
}
