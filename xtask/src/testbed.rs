//! Commands that run on the testbed: they build, make sure that the machine is ready, and hand over to `mesh-tests`.

use crate::build::Built;
use crate::{bpf, build, kubernetes, paths, run, setup};
use anyhow::Result;
use std::process::Command;

/// A `mesh-tests` command that knows where the product's binaries are.
pub(crate) fn mesh_tests(built: &Built) -> Result<Command> {
    let mut command = Command::new(built.bin.join("mesh-tests"));
    command
        .current_dir(paths::root())
        .env("UM_BIN", &built.bin)
        .env("UM_BPF_OBJECT", &built.object)
        .env("UM_MAP", crate::map::build()?)
        .env("UM_MAP_WORK", crate::map::work()?)
        // It cleans up when we are gone, see `run`.
        .env("UM_PARENT", std::process::id().to_string())
        .env("PATH", paths::path_with_tools()?);
    Ok(command)
}

/// The binaries of the last build, for what any of them can do; a build where there was none.
pub(crate) fn last_built() -> Result<Built> {
    let target = paths::target()?;
    let last = ["debug", "release"]
        .into_iter()
        .map(|dir| target.join(dir))
        .find(|dir| dir.join("mesh-tests").is_file());
    match last {
        Some(bin) => Ok(Built { object: paths::bpf_target()?.join(bpf::OBJECT), bin }),
        None => build::run(false),
    }
}

/// The demo, with optimised binaries.
pub(crate) fn demo(args: &[String]) -> Result<()> {
    setup::run()?;
    let built = build::run(true)?;
    run::check(mesh_tests(&built)?.arg("demo").args(args))
}

/// `bench instructions`: only the agent is counted, so only the agent has to be optimised.
pub(crate) fn instructions(built: &Built, args: &[String]) -> Result<Command> {
    let mut command = mesh_tests(built)?;
    command.args(["bench", "instructions"]);
    if !args.iter().any(|arg| arg.starts_with("--agent")) {
        command.arg("--agent").arg(build::optimised_agent(built)?);
    }
    command.args(args);
    Ok(command)
}

/// A bench, with the binaries that are shipped.
pub(crate) fn bench(args: &[String]) -> Result<()> {
    setup::run()?;
    if args.first().is_some_and(|name| name == "instructions") {
        return run::check(&mut instructions(&build::run(false)?, &args[1..])?);
    }
    if args.first().is_some_and(|name| name == "l7") {
        crate::peers::l7()?;
    }
    let built = build::profile("dist")?;
    let mut command = mesh_tests(&built)?;
    // Without it the rows of a real API server are skipped, and say how to have it.
    if kubernetes::built() {
        command.env("UM_KUBERNETES", kubernetes::build()?);
    }
    run::check(command.arg("bench").args(args))
}

/// The soak run, with the binaries that the scenarios run: they check more than those that are shipped.
pub(crate) fn soak(args: &[String]) -> Result<()> {
    setup::run()?;
    let built = build::run(false)?;
    run::check(mesh_tests(&built)?.arg("soak").args(args))
}
