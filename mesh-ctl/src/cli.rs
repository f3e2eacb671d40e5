//! Commands, flags and help.

use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::endpoint::Endpoint;

const EXIT_CODES: &str = "Exit codes:
  0  fine; allowed
  1  denied, unreachable or unhealthy
  2  wrong usage, or a name that nothing has
  3  a node or the control plane could not be asked";

/// See what the mesh is doing, and why
#[derive(Debug, Parser)]
#[command(name = "meshctl", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Node agent to ask: unix:PATH or http://HOST:PORT; repeatable
    /// [default: every /run/undermesh/*/admin.sock, else http://127.0.0.1:15000]
    #[arg(long, value_name = "URL", env = "UM_NODE_ADMIN", value_delimiter = ',', global = true)]
    #[arg(help_heading = "Where to ask")]
    pub node: Vec<Endpoint>,
    /// Control plane's debug port [default: http://127.0.0.1:15014]
    #[arg(long, value_name = "URL", env = "UM_CONTROL", global = true, help_heading = "Where to ask")]
    pub control: Option<Endpoint>,
    /// How long to wait for an answer
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    #[arg(global = true, help_heading = "Where to ask")]
    pub timeout: Duration,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", default_value = "table", value_enum, global = true)]
    #[arg(help_heading = "Output")]
    pub output: Format,
}

/// How to print.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// Everything, as one JSON document
    Json,
    /// Everything, as YAML
    Yaml,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Nodes, agents, enrolled pods, the workload feed, certificates, the control plane
    #[command(after_help = "Example:\n  meshctl status --node unix:/run/undermesh/worker-1/admin.sock")]
    Status(StatusArgs),
    /// Workloads that the mesh knows
    #[command(visible_alias = "wl", after_help = "Example:\n  meshctl workloads -n shop -o yaml frontend-7d")]
    Workloads(Filter),
    /// Services, their addresses, ports and endpoints
    #[command(visible_alias = "svc", after_help = "Example:\n  meshctl services -n shop")]
    Services(Filter),
    /// L4 policies in force
    #[command(after_help = "Example:\n  meshctl policies -n shop -o yaml only-frontend")]
    Policies(Filter),
    /// Certificates of workload identities, and when they expire
    #[command(after_help = "Example:\n  meshctl certs -n shop")]
    Certs(Filter),
    /// Why a connection is allowed, denied or lost, and which object decides
    #[command(after_help = "Examples:\n  meshctl why shop/frontend-7d shop/backend:8080\n  \
        meshctl why shop/frontend 10.96.0.17:443 && echo allowed\n\n\
        A name is namespace/name (a service, a pod, or the owner of pods), service/NAMESPACE/NAME,\n\
        workload/NAMESPACE/NAME, a hostname, an address or a workload uid.")]
    Why(WhyArgs),
    /// Whether the kernel and the machine offer what a node agent needs
    #[command(after_help = "Example:\n  meshctl doctor --node http://127.0.0.1:15000\n\n\
        Without a running agent: `mesh-node doctor` on the node itself.")]
    Doctor,
    /// Versions of meshctl, the node agents and the control plane
    #[command(after_help = "Example:\n  meshctl version --client")]
    Version(VersionArgs),
    /// Prints a completion script for a shell
    #[command(after_help = "Example:\n  meshctl completion bash > /etc/bash_completion.d/meshctl")]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Arguments of `status`.
#[derive(Debug, Clone, Default, Args)]
pub struct StatusArgs {
    /// List every enrolled pod, not only those with a problem
    #[arg(long)]
    pub pods: bool,
}

/// Which objects to list.
#[derive(Debug, Clone, Default, Args)]
pub struct Filter {
    /// Only this one
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Only this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
}

/// Arguments of `why`.
#[derive(Debug, Clone, Args)]
pub struct WhyArgs {
    /// Workload that connects
    #[arg(value_name = "SRC")]
    pub src: String,
    /// Workload, service or address to connect to
    #[arg(value_name = "DST[:PORT[/udp]]")]
    pub dst: String,
}

/// Arguments of `version`.
#[derive(Debug, Clone, Default, Args)]
pub struct VersionArgs {
    /// Only of meshctl itself; asks nobody
    #[arg(long)]
    pub client: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_command_shows_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("meshctl "), "{} has no example", sub.get_name());
        }
    }

    #[test]
    fn a_typo_is_answered_with_what_was_meant() {
        let error = Cli::try_parse_from(["meshctl", "workload"]).unwrap_err();
        assert!(error.to_string().contains("'workloads'"), "{error}");
        assert_eq!(error.exit_code(), 2);
        let error = Cli::try_parse_from(["meshctl", "status", "--nodes", "http://a:1"]).unwrap_err();
        assert!(error.to_string().contains("'--node'"), "{error}");
    }

    #[test]
    fn flags_may_stand_after_the_command_and_node_repeats() {
        let cli = Cli::try_parse_from([
            "meshctl",
            "status",
            "--node",
            "unix:/a.sock",
            "--node",
            "http://b:1,http://c:2",
            "-o",
            "yaml",
        ])
        .unwrap();
        let nodes: Vec<String> = cli.global.node.iter().map(ToString::to_string).collect();
        assert_eq!(nodes, ["unix:/a.sock", "http://b:1", "http://c:2"]);
        assert_eq!(cli.global.output, Format::Yaml);
    }
}
