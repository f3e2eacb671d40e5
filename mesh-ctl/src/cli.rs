//! Commands, flags and help.

use std::path::PathBuf;
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
    /// Control plane's debug port, or https://HOST:PORT of its relay; where it is given and --node is not, it is asked for the
    /// events of all nodes, and asks their agents for everything else [default: http://127.0.0.1:15014]
    #[arg(long, value_name = "URL", env = "UM_CONTROL", global = true, help_heading = "Where to ask")]
    pub control: Option<Endpoint>,
    /// How to prove to the control plane who asks.
    #[command(flatten)]
    pub proof: Proof,
    /// How long to wait for an answer
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    #[arg(global = true, help_heading = "Where to ask")]
    pub timeout: Duration,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", default_value = "table", value_enum, global = true)]
    #[arg(help_heading = "Output")]
    pub output: Format,
}

/// How to prove to the control plane who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Where to ask")]
pub struct Proof {
    /// File with a bearer token of the cluster, for --control (kubectl create token ACCOUNT)
    #[arg(long, value_name = "FILE", env = "UM_TOKEN_FILE", global = true)]
    pub token: Option<PathBuf>,
    /// PEM file with the roots of an https:// control plane (ConfigMap istio-ca-root-cert)
    #[arg(long, value_name = "FILE", env = "UM_ROOT_CERT", global = true)]
    pub root_cert: Option<PathBuf>,
    /// PEM file with a client certificate and its chain
    #[arg(long, value_name = "FILE", env = "UM_CLIENT_CERT", global = true, requires = "client_key")]
    pub client_cert: Option<PathBuf>,
    /// PEM file with its key
    #[arg(long, value_name = "FILE", env = "UM_CLIENT_KEY", global = true, requires = "client_cert")]
    pub client_key: Option<PathBuf>,
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
    /// Events as `hubble observe -o json` prints them; `flows` and `trace` only
    Hubble,
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
    /// What happens to connections and packets: who, over which path, how fast, what was lost or denied and why
    #[command(after_help = "Examples:\n  meshctl flows -f -n shop\n  meshctl flows -f --verdict dropped\n  \
        meshctl flows --to shop/pay --latency-above 5ms\n  meshctl flows -f -o hubble | jq .flow.verdict\n  \
        meshctl flows -f --control https://istiod.istio-system.svc:15016 --root-cert root.pem --token token\n\n\
        With -o json one event per line.")]
    Flows(FlowsArgs),
    /// The story of one connection, from every node that saw it
    #[command(after_help = "Example:\n  meshctl trace 9c1f6c0e5a7b3d21\n\n\
        Ids are in `meshctl sockets`, `meshctl flows -o json` and the access log (connection=).")]
    Trace(TraceArgs),
    /// Connections of pods that are open now, with their path
    #[command(after_help = "Example:\n  meshctl sockets -n shop --path plain")]
    Sockets(SocketsArgs),
    /// Who talks to whom right now: rates, latency, retransmissions, denials by pair of workloads
    #[command(
        after_help = "Examples:\n  meshctl top -n shop\n  meshctl top --once --for 5s --sort trouble -o json"
    )]
    Top(TopArgs),
    /// Rules, backends and requests of waypoints and gateways
    #[command(visible_alias = "wp", subcommand_required = true, arg_required_else_help = true)]
    #[command(after_help = "Examples:\n  meshctl waypoint routes --host web\n  \
        meshctl waypoint endpoints --waypoint http://127.0.0.1:15000\n  \
        meshctl waypoint tap --status 5xx\n\n\
        In a cluster: kubectl port-forward -n shop deploy/wp 15000")]
    Waypoint {
        /// What of them.
        #[command(subcommand)]
        command: WaypointCommand,
    },
    /// Requests at waypoints as they end; short for `waypoint tap`
    #[command(after_help = TAP_HELP)]
    Tap(TapArgs),
    /// Whether the kernel and the machine offer what a node agent needs
    #[command(after_help = "Example:\n  meshctl doctor --node http://127.0.0.1:15000\n\n\
        Without a running agent: `mesh-node doctor` on the node itself.")]
    Doctor,
    /// What is wrong, or likely not meant, in files of objects or in a cluster
    #[command(after_help = "Examples:\n  meshctl analyze\n  meshctl analyze shop.yaml policies/\n  \
        meshctl analyze --with-cluster -n shop change.yaml -o json\n\n\
        Without files the cluster is looked at. Findings of an object are kept quiet by its annotation\n\
        galley.istio.io/analyze-suppress: CODE,CODE. Exit code 1 when one is as bad as --failure-threshold.")]
    Analyze(AnalyzeArgs),
    /// Installs the mesh on a cluster, and waits until it runs
    #[command(after_help = "Examples:\n  meshctl install\n  \
        meshctl install --set node.cniBinDir=/usr/lib/cni -f values.yaml\n  \
        meshctl install --dry-run | kubectl diff -f -\n\n\
        Values are those of the Helm chart in deploy/charts/undermesh, which this is.")]
    Install(InstallArgs),
    /// Brings an installation to this version, or to other values; pods notice nothing
    #[command(after_help = "Example:\n  meshctl upgrade --set mesh.settings.sameNode=tunnel")]
    Upgrade(InstallArgs),
    /// Removes the mesh from the cluster and from its nodes
    #[command(after_help = "Example:\n  meshctl uninstall -n istio-system")]
    Uninstall(UninstallArgs),
    /// Whether what was installed is there and runs
    #[command(after_help = "Example:\n  meshctl verify")]
    Verify(ClusterArgs),
    /// Whether the mesh can be installed on a cluster
    #[command(after_help = "Example:\n  meshctl precheck --context staging")]
    Precheck(ClusterArgs),
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

impl Command {
    /// Whether every node's agent is asked. Events come from the control plane itself, where it is asked.
    pub(crate) const fn asks_nodes(&self) -> bool {
        matches!(
            self,
            Self::Status(_)
                | Self::Workloads(_)
                | Self::Services(_)
                | Self::Policies(_)
                | Self::Certs(_)
                | Self::Why(_)
                | Self::Sockets(_)
                | Self::Doctor
                | Self::Version(_)
        )
    }
}

const TAP_HELP: &str = "Examples:\n  meshctl tap --path /pay --status 5xx\n  \
    meshctl tap --headers --max 1 -o json\n  \
    meshctl tap --waypoint http://127.0.0.1:15000,http://127.0.0.1:15001\n\n\
    With -o json one request per line. Values of headers and parameters that are secrets, such as authorization and\n\
    cookie, are not shown. In a cluster: kubectl port-forward -n shop deploy/wp 15000";

/// What of waypoints.
#[derive(Debug, Subcommand)]
pub enum WaypointCommand {
    /// Rules in the order in which they are tried, with their destinations and hits
    #[command(after_help = "Example:\n  meshctl waypoint routes --host web -o yaml")]
    Routes(RoutesArgs),
    /// Backends that have been used, and what is counted of their endpoints
    #[command(visible_alias = "ep", after_help = "Example:\n  meshctl waypoint endpoints --host web")]
    Endpoints(RoutesArgs),
    /// Requests as they end
    #[command(after_help = TAP_HELP)]
    Tap(TapArgs),
}

/// Which waypoints.
#[derive(Debug, Clone, Default, Args)]
pub struct AtWaypoint {
    /// Admin port of a waypoint or gateway: http://HOST:PORT; repeatable [default: http://127.0.0.1:15000]
    #[arg(long, value_name = "URL", env = "UM_WAYPOINT_ADMIN", value_delimiter = ',')]
    #[arg(help_heading = "Where to ask")]
    pub waypoint: Vec<Endpoint>,
}

impl AtWaypoint {
    /// Whom to ask; never empty.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        if self.waypoint.is_empty() {
            return vec![Endpoint::Tcp("127.0.0.1".to_owned(), 15_000)];
        }
        self.waypoint.clone()
    }
}

/// Arguments of `waypoint routes` and `waypoint endpoints`.
#[derive(Debug, Clone, Default, Args)]
pub struct RoutesArgs {
    /// Which waypoints.
    #[command(flatten)]
    pub at: AtWaypoint,
    /// Part of the host: web, shop/web
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
}

/// Arguments of `tap`.
#[derive(Debug, Clone, Default, Args)]
pub struct TapArgs {
    /// Which waypoints.
    #[command(flatten)]
    pub at: AtWaypoint,
    /// The host that the request names, without port
    #[arg(long, value_name = "HOST", help_heading = "Which ones")]
    pub host: Option<String>,
    /// What the path begins with
    #[arg(long, value_name = "PREFIX", help_heading = "Which ones")]
    pub path: Option<String>,
    /// GET, POST, ...
    #[arg(long, value_name = "METHOD", help_heading = "Which ones")]
    pub method: Option<String>,
    /// 503, 5xx or 400-499
    #[arg(long, value_name = "STATUS", help_heading = "Which ones")]
    pub status: Option<String>,
    /// Part of the client's identity
    #[arg(long, value_name = "SPIFFE-ID", help_heading = "Which ones")]
    pub identity: Option<String>,
    /// End after so many
    #[arg(long, value_name = "N")]
    pub max: Option<u64>,
    /// Show headers, too
    #[arg(long, help_heading = "What of them")]
    pub headers: bool,
    /// Show values that are secrets, too
    #[arg(long, help_heading = "What of them")]
    pub unredacted: bool,
}

impl TapArgs {
    /// The conditions.
    ///
    /// # Errors
    /// A status that is none.
    pub fn filter(&self) -> Result<mesh_core::tap::Filter, String> {
        let flag = |set: bool| set.then(|| "1".to_owned());
        let given = |name: &str| match name {
            "host" => self.host.clone(),
            "path" => self.path.clone(),
            "method" => self.method.clone(),
            "status" => self.status.clone(),
            "identity" => self.identity.clone(),
            "headers" => flag(self.headers),
            "unredacted" => flag(self.unredacted),
            _ => None,
        };
        mesh_core::tap::Filter::parse(given).map_err(|error| format!("--{error}"))
    }
}

/// Arguments of `status`.
#[derive(Debug, Clone, Default, Args)]
pub struct StatusArgs {
    /// List every enrolled pod, not only those with a problem
    #[arg(long)]
    pub pods: bool,
}

/// Which cluster, and where in it.
#[derive(Debug, Clone, Args)]
pub struct ClusterArgs {
    /// File that describes the cluster [default: KUBECONFIG, ~/.kube/config, the cluster that this runs in]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of that file
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace of the mesh
    #[arg(short, long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub namespace: String,
}

/// Arguments of `analyze`.
#[derive(Debug, Clone, Args)]
pub struct AnalyzeArgs {
    /// Files, or directories with all that is below them
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Looks at the files as if they were applied to the cluster
    #[arg(long, requires = "paths")]
    pub with_cluster: bool,
    /// Only findings about objects of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// File that describes the cluster [default: KUBECONFIG, ~/.kube/config, the cluster that this runs in]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of that file
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace of the mesh and of its settings
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// From which severity on the exit code is 1
    #[arg(long, value_name = "SEVERITY", default_value = "error")]
    pub failure_threshold: Threshold,
}

/// A severity of `analyze`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Threshold {
    /// Worth knowing
    Info,
    /// Something has no effect, or another than it seems to have
    Warning,
    /// Something is refused, or cannot do what it is for
    Error,
}

/// Arguments of `install` and `upgrade`.
#[derive(Debug, Clone, Args)]
pub struct InstallArgs {
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// File of values; repeatable, later ones win
    #[arg(short = 'f', long, value_name = "FILE")]
    pub values: Vec<PathBuf>,
    /// One value, as node.drainSeconds=600; repeatable
    #[arg(long, value_name = "PATH=VALUE")]
    pub set: Vec<String>,
    /// Forgets the values of earlier installations (upgrade)
    #[arg(long)]
    pub reset_values: bool,
    /// Prints the objects instead of applying them
    #[arg(long)]
    pub dry_run: bool,
    /// Does not wait until everything runs
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    pub wait_timeout: Duration,
}

/// Arguments of `uninstall`.
#[derive(Debug, Clone, Args)]
pub struct UninstallArgs {
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Leaves the namespace
    #[arg(long)]
    pub keep_namespace: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    pub wait_timeout: Duration,
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

/// Which connections to show.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Which ones")]
pub struct Select {
    /// Either end is in this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Either end is this pod, workload or address
    #[arg(long, value_name = "[NAMESPACE/]NAME")]
    pub pod: Option<String>,
    /// The client is
    #[arg(long, value_name = "[NAMESPACE/]NAME")]
    pub from: Option<String>,
    /// The server is
    #[arg(long, value_name = "[NAMESPACE/]NAME")]
    pub to: Option<String>,
    /// The service that was asked for: pay, shop/pay or pay.shop.svc.cluster.local
    #[arg(long, value_name = "SERVICE")]
    pub service: Option<String>,
    /// Part of either end's identity
    #[arg(long, value_name = "SPIFFE-ID")]
    pub identity: Option<String>,
    /// The server's port
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// fast, tunnel, waypoint, plain or unknown
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,
}

impl Select {
    /// The conditions.
    ///
    /// # Errors
    /// A word that means nothing, with those that do.
    pub fn filter(&self) -> Result<mesh_core::flows::Filter, String> {
        let given = |name: &str| match name {
            "namespace" => self.namespace.clone(),
            "pod" => self.pod.clone(),
            "from" => self.from.clone(),
            "to" => self.to.clone(),
            "service" => self.service.clone(),
            "identity" => self.identity.clone(),
            "port" => self.port.map(|port| port.to_string()),
            "path" => self.path.clone(),
            _ => None,
        };
        mesh_core::flows::Filter::parse(given).map_err(|error| format!("--{error}"))
    }
}

/// Arguments of `flows`.
#[derive(Debug, Clone, Default, Args)]
pub struct FlowsArgs {
    /// Go on until interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// How many of the last events [default: 20, with --follow 0]
    #[arg(long, value_name = "N")]
    pub last: Option<usize>,
    /// Which connections.
    #[command(flatten)]
    pub select: Select,
    /// forwarded, denied, dropped or failed
    #[arg(long, value_name = "VERDICT", help_heading = "Which ones")]
    pub verdict: Option<String>,
    /// connect, established, accepted, closed, failed, retransmit, reset_sent, reset_received, drop, dns or proxied
    #[arg(long, value_name = "EVENT", help_heading = "Which ones")]
    pub kind: Option<String>,
    /// Part of the reason of a drop, reset or failure
    #[arg(long, value_name = "TEXT", visible_alias = "drop-reason", help_heading = "Which ones")]
    pub reason: Option<String>,
    /// Connected or answered no faster than this
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    #[arg(help_heading = "Which ones")]
    pub latency_above: Option<Duration>,
    /// tcp, udp or dns
    #[arg(long, value_name = "PROTOCOL", help_heading = "Which ones")]
    pub protocol: Option<String>,
}

impl FlowsArgs {
    /// The conditions.
    ///
    /// # Errors
    /// A word that means nothing, with those that do.
    pub fn filter(&self) -> Result<mesh_core::flows::Filter, String> {
        let given = |name: &str| match name {
            "verdict" => self.verdict.clone(),
            "kind" => self.kind.clone(),
            "reason" => self.reason.clone(),
            "protocol" => self.protocol.clone(),
            "latency" => self.latency_above.map(|latency| latency.as_micros().to_string()),
            _ => None,
        };
        let own = mesh_core::flows::Filter::parse(given).map_err(|error| format!("--{error}"))?;
        let select = self.select.filter()?;
        Ok(mesh_core::flows::Filter {
            verdict: own.verdict,
            kind: own.kind,
            reason: own.reason,
            protocol: own.protocol,
            latency_us: own.latency_us,
            ..select
        })
    }
}

/// Arguments of `trace`.
#[derive(Debug, Clone, Args)]
pub struct TraceArgs {
    /// Its id, 16 hex digits
    #[arg(value_name = "CONNECTION")]
    pub connection: mesh_core::flows::ConnectionId,
}

/// Arguments of `top`.
#[derive(Debug, Clone, Args)]
pub struct TopArgs {
    /// Which connections.
    #[command(flatten)]
    pub select: Select,
    /// Listen, print one table, and end; for scripts and pipes
    #[arg(long)]
    pub once: bool,
    /// Figures are of this long
    #[arg(long = "for", value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    pub span: Duration,
    /// What comes first
    #[arg(long, value_name = "COLUMN", default_value = "connections", value_enum)]
    pub sort: crate::command::top::Order,
}

/// Arguments of `sockets`.
#[derive(Debug, Clone, Default, Args)]
pub struct SocketsArgs {
    /// Which connections.
    #[command(flatten)]
    pub select: Select,
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
