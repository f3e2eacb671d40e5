//! The command line.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use mesh_core::signals::Signals;
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::analysis::input::{read_cluster, read_paths};
use crate::analysis::{Severity, analyze};
use crate::auth::{Caller, TokenKey};
use crate::ca::authority::DEFAULT_TTL;
use crate::ca::store;
use crate::convert::Mesh;
use crate::hub::Debounce;
use crate::kubernetes;
use crate::model::Key;
use crate::relay::Limits;
use crate::relay::facts::Links;
use crate::server::{Options, SourceOption, run};
use crate::source::kube::connect;
use crate::source::{SourceError, State};

/// The mesh's control plane.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: read objects, push them to nodes, sign certificates.
    #[command(
        after_help = "Example: mesh-control run --source dir:/etc/mesh --state-dir /var/lib/mesh-control"
    )]
    Run(Box<RunArgs>),
    /// Read a directory of objects, or a cluster, and say what is wrong with it. Exit code 1 when something is.
    #[command(after_help = "Examples:\n  mesh-control check /etc/mesh\n  mesh-control check kubernetes")]
    Check {
        /// The directory; or kubernetes, kubernetes:CONTEXT.
        #[arg(value_name = "DIR|kubernetes[:CONTEXT]")]
        source: String,
        /// Namespace of the mesh settings.
        #[arg(long, default_value = "istio-system")]
        root_namespace: String,
    },
    /// Print CustomResourceDefinitions of Istio's kinds, for a cluster that has none.
    #[command(after_help = "Example: mesh-control definitions | kubectl create -f -")]
    Definitions,
    /// Say which fields of the APIs have an effect, and where.
    #[command(
        after_help = "Examples:\n  mesh-control fields VirtualService\n  mesh-control fields --out docs/api"
    )]
    Fields {
        /// Only of this kind.
        kind: Option<String>,
        /// Write a page for each kind into this directory, in place of those that are there.
        #[arg(long, value_name = "DIR", conflicts_with = "kind")]
        out: Option<PathBuf>,
    },
    /// Print a bearer token for a node's agent.
    #[command(after_help = "Example: mesh-control token --node worker-1 --state-dir /var/lib/mesh-control")]
    Token(TokenArgs),
    /// The certificate authority.
    Ca {
        #[command(subcommand)]
        command: CaCommand,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Where objects come from: dir:PATH, kubernetes (the cluster that this runs in, or that KUBECONFIG names) or
    /// kubernetes:CONTEXT.
    #[arg(long, value_name = "SOURCE")]
    source: String,
    /// Directory of keys, certificates and reports; made on first start.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// Use this CA: ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem, as in Istio's secret cacerts.
    #[arg(long, value_name = "DIR")]
    ca_dir: Option<PathBuf>,
    /// xDS in plaintext and without authentication; "off" turns it off.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15010")]
    listen_plain: String,
    /// xDS and CA over TLS, with tokens.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15012")]
    listen_tls: SocketAddr,
    /// Metrics and debug.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15014")]
    listen_debug: SocketAddr,
    #[command(flatten)]
    relay: RelayArgs,
    /// Trust domain, unless the mesh settings name one.
    #[arg(long, default_value = "cluster.local")]
    trust_domain: String,
    /// Cluster id, the first part of workload uids.
    #[arg(long, default_value = "Kubernetes")]
    cluster_id: String,
    /// DNS suffix of services.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// Namespace of the mesh settings and of mesh-wide policies.
    #[arg(long, default_value = "istio-system")]
    root_namespace: String,
    /// Further DNS names or addresses of this server (its certificate has istiod's names anyway).
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// When changes come in storms: push after this long without one. Otherwise they are pushed at once.
    #[arg(long, value_parser = duration, default_value = "100ms")]
    debounce_after: Duration,
    /// When changes come in storms: push after this long in any case.
    #[arg(long, value_parser = duration, default_value = "1s")]
    debounce_max: Duration,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Events of all nodes.
#[derive(Debug, Args)]
struct RelayArgs {
    /// Events of all nodes (meshctl flows --control https://...) over TLS, for those who may get pods/log; without a cluster,
    /// for those with a certificate of --relay-client-ca. Who is on this machine asks --listen-debug.
    #[arg(long, value_name = "ADDRESS")]
    listen_relay: Option<SocketAddr>,
    /// PEM file of the CAs whose client certificates may ask --listen-relay; without a cluster only.
    #[arg(long, value_name = "FILE")]
    relay_client_ca: Option<PathBuf>,
    /// Events that a node is asked for in a second, at most; 0 leaves them on the nodes.
    #[arg(long, value_name = "N", default_value_t = Limits::default().per_node)]
    relay_events: u32,
    /// Mebibytes of events that are kept, for an hour at most.
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    relay_memory: u32,
    /// Where the traces of a service are shown, for the map's links: {service} and {namespace} are filled in, such as
    /// https://jaeger.example/search?service={service}.{namespace}
    #[arg(long, value_name = "URL", value_parser = web_page)]
    trace_url: Option<String>,
    /// Where the spans of one connection are shown: {connection} is filled in, too, such as
    /// https://jaeger.example/trace/0000000000000000{connection}, with --connection-spans of nodes
    #[arg(long, value_name = "URL", value_parser = web_page)]
    connection_url: Option<String>,
}

/// The address of a page of the web.
fn web_page(text: &str) -> Result<String, String> {
    if text.starts_with("http://") || text.starts_with("https://") {
        return Ok(text.to_owned());
    }
    Err("give an address that begins with http:// or https://".to_owned())
}

impl RelayArgs {
    fn links(&self) -> Links {
        Links {
            service: self.trace_url.as_deref().map(Into::into),
            connection: self.connection_url.as_deref().map(Into::into),
        }
    }

    fn limits(&self) -> Limits {
        let bytes = usize::try_from(self.relay_memory).unwrap_or(usize::MAX) << 20;
        Limits { bytes, per_node: self.relay_events, ..Limits::default() }
    }
}

/// Prints the tables of fields, or writes them.
fn fields(kind: Option<&str>, out: Option<&Path>) -> anyhow::Result<ExitCode> {
    let pages = crate::fields::pages().map_err(anyhow::Error::msg)?;
    if let Some(dir) = out {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry.context("cannot read a directory")?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(".md") && !pages.contains_key(name) {
                std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        for (name, text) in &pages {
            let path = dir.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let wanted = kind.map_or_else(|| "README.md".to_owned(), |kind| format!("{kind}.md"));
    let Some(page) = pages.get(&wanted) else {
        let kinds: Vec<&str> = pages.keys().filter_map(|name| name.strip_suffix(".md")).collect();
        bail!("there is no table of {}; there are tables of {}", kind.unwrap_or_default(), kinds.join(", "));
    };
    print!("{page}");
    Ok(ExitCode::SUCCESS)
}

/// What has a meaning with --source kubernetes only.
#[derive(Debug, Args)]
struct ClusterArgs {
    /// Service accounts of node agents, which get certificates for the pods of their node: NAMESPACE/NAME, several with
    /// commas. By default undermesh-node and ztunnel of the root namespace.
    #[arg(long = "trusted-node-account", env = "CA_TRUSTED_NODE_ACCOUNTS", value_delimiter = ',', value_name = "NAMESPACE/NAME", value_parser = account)]
    trusted_node_accounts: Vec<Key>,
    /// Name of this replica, by default POD_NAME or the host's name.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    replica: Option<String>,
    /// Service account of all replicas of the control plane: NAMESPACE/NAME, by default istiod of the root namespace.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = account)]
    replica_account: Option<Key>,
    /// Token (audience istio-ca) that replicas show each other. Without it, a replica knows only what the agents tell that
    /// are connected to it.
    #[arg(long, value_name = "FILE", default_value = crate::replicas::TOKEN)]
    replica_token: PathBuf,
    /// Image of the waypoints that Gateways get; without one, waypoints are deployed by hand.
    #[arg(long, env = "UM_WAYPOINT_IMAGE", value_name = "IMAGE")]
    waypoint_image: Option<String>,
    /// Validation before objects are stored (the ValidatingWebhookConfiguration undermesh-validator-NAMESPACE leads here).
    #[arg(long, value_name = "ADDRESS")]
    listen_webhook: Option<SocketAddr>,
}

#[derive(Debug, Args)]
struct TokenArgs {
    /// Node that the token is bound to.
    #[arg(long)]
    node: String,
    /// State directory of the control plane.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// How long it is valid.
    #[arg(long, value_parser = duration, default_value = "12h")]
    ttl: Duration,
    /// Namespace of the agent's service account.
    #[arg(long, default_value = "istio-system")]
    namespace: String,
    /// The agent's service account (stock ztunnel: ztunnel).
    #[arg(long, default_value = "mesh-node")]
    service_account: String,
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Show the roots that are trusted and the one that signs.
    Show {
        /// State directory of the control plane.
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
    },
    /// Add a root. It is trusted at once and signs after the overlap; the old one stays trusted until everything
    /// it signed has ended. A running control plane follows within seconds.
    Rotate {
        /// State directory of the control plane.
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
        /// Time in which every node learns the new root: longer than half the life of a certificate.
        #[arg(long, value_parser = duration, default_value = "24h")]
        overlap: Duration,
    },
}

fn account(text: &str) -> Result<Key, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(Key::new(namespace, name)),
        _ => Err("write NAMESPACE/NAME, for example istio-system/undermesh-node".into()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{e}; write for example 12h, 30m, 100ms"))
}

impl Cli {
    /// Does what was asked for.
    ///
    /// # Errors
    /// For people, with the fix.
    pub fn execute(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Run(args) => serve(*args),
            Command::Definitions => {
                print!("{}", crate::definitions::yaml().context("cannot write the definitions")?);
                Ok(ExitCode::SUCCESS)
            }
            Command::Check { source, root_namespace } => check(&source, &root_namespace),
            Command::Fields { kind, out } => fields(kind.as_deref(), out.as_deref()),
            Command::Token(args) => token(&args),
            Command::Ca { command: CaCommand::Show { state_dir } } => {
                needs_own_ca(&state_dir)?;
                print_generations(&store::generations(&state_dir, SystemTime::now())?);
                Ok(ExitCode::SUCCESS)
            }
            Command::Ca { command: CaCommand::Rotate { state_dir, overlap } } => {
                needs_own_ca(&state_dir)?;
                if overlap < DEFAULT_TTL / 2 {
                    eprintln!(
                        "warning: nodes renew certificates after up to {} and learn the new root then; until they \
                         have, they refuse peers whose certificate it signed",
                        humantime::format_duration(DEFAULT_TTL / 2)
                    );
                }
                print_generations(&store::rotate(&state_dir, None, overlap, SystemTime::now())?);
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// A mistyped directory must not become a second mesh.
fn needs_own_ca(state_dir: &Path) -> anyhow::Result<()> {
    if state_dir.join("ca/generations.json").exists() {
        return Ok(());
    }
    bail!(
        "{} holds no certificate authority of ours; is the path right, and has mesh-control run been started? \
         (a CA plugged in with --ca-dir is shown and rotated by its owner)",
        state_dir.display()
    )
}

/// The log goes to standard error.
fn log(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

fn serve(args: RunArgs) -> anyhow::Result<ExitCode> {
    log("info");
    let source = source(&args.source, args.cluster, &args.root_namespace)?;
    let listen_plain = match args.listen_plain.as_str() {
        "off" => None,
        address => Some(
            address
                .parse()
                .with_context(|| format!("--listen-plain {address}: write ADDRESS:PORT or off"))?,
        ),
    };
    let options = Options {
        source,
        state_dir: args.state_dir,
        ca_dir: args.ca_dir,
        listen_plain,
        listen_tls: args.listen_tls,
        listen_debug: args.listen_debug,
        relay: args.relay.limits(),
        links: args.relay.links(),
        listen_relay: args.relay.listen_relay,
        relay_client_ca: args.relay.relay_client_ca,
        names: server_names(&args.root_namespace, args.names),
        mesh: Mesh {
            cluster_id: args.cluster_id,
            cluster_domain: args.cluster_domain,
            trust_domain: args.trust_domain,
            root_namespace: args.root_namespace,
            ..Mesh::default()
        },
        debounce: Debounce { quiet: args.debounce_after, max: args.debounce_max },
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start tokio")?;
    runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        let mut signals = Signals::new().context("cannot listen for signals")?;
        tokio::spawn(async move {
            signals.next().await;
            stop.send_replace(true);
        });
        run(options, |_| {}, stopped).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn source(text: &str, args: ClusterArgs, root_namespace: &str) -> Result<SourceOption, SourceError> {
    let unknown = || SourceError::Unknown(text.to_owned());
    let context = match text.split_once(':') {
        Some(("dir", path)) if !path.is_empty() => return Ok(SourceOption::Directory(PathBuf::from(path))),
        Some(("kubernetes", context)) if !context.is_empty() => Some(context.to_owned()),
        None if text == "kubernetes" => None,
        _ => return Err(unknown()),
    };
    let mut agents = args.trusted_node_accounts;
    if agents.is_empty() {
        agents = ["undermesh-node", "ztunnel"].map(|name| Key::new(root_namespace, name)).into();
    }
    let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    // Two processes on one host are two replicas.
    let replica = args.replica.unwrap_or_else(|| format!("{}-{}", host(), std::process::id()));
    Ok(SourceOption::Kubernetes(kubernetes::Options {
        context,
        agents,
        replica,
        replica_account: args.replica_account.unwrap_or_else(|| Key::new(root_namespace, "istiod")),
        replica_token: args.replica_token,
        waypoint_image: args.waypoint_image.filter(|image| !image.is_empty()),
        listen_webhook: args.listen_webhook,
    }))
}

/// The names by which Istio's agents know their control plane, and `localhost`.
fn server_names(root_namespace: &str, more: Vec<String>) -> Vec<String> {
    let istio = ["istiod", "istiod-remote", "istio-pilot"].map(|n| format!("{n}.{root_namespace}.svc"));
    istio.into_iter().chain(["localhost".to_owned()]).chain(more).collect()
}

fn check(source: &str, root_namespace: &str) -> anyhow::Result<ExitCode> {
    let defaults = Mesh { root_namespace: root_namespace.to_owned(), ..Mesh::default() };
    let (objects, findings, read) = if source == "kubernetes" || source.starts_with("kubernetes:") {
        let state = check_cluster(source.split_once(':').map(|(_, context)| context), root_namespace)?;
        (Arc::clone(&state.objects), analyze(&state, &defaults, |_| None), String::new())
    } else {
        let read = read_paths(&[source], root_namespace)?;
        let findings = analyze(&read.state, &defaults, |object| read.place(object));
        (Arc::clone(&read.state.objects), findings, format!("{} files: ", read.files))
    };
    for finding in &findings {
        println!("{finding}");
    }
    let counts: Vec<String> =
        objects.counts().into_iter().filter(|(_, n)| *n > 0).map(|(k, n)| format!("{n} {k}")).collect();
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    println!("{read}{}; {errors} errors", counts.join(", "));
    Ok(if errors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reads a cluster once, with the rights of whoever asks.
fn check_cluster(context: Option<&str>, root_namespace: &str) -> anyhow::Result<Arc<State>> {
    log("error,mesh_control::source::kube::watch=warn");
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    runtime.block_on(async {
        let client = connect(context).await?;
        Ok(read_cluster(client, root_namespace).await?)
    })
}

fn token(args: &TokenArgs) -> anyhow::Result<ExitCode> {
    if args.node.is_empty() {
        bail!("--node is empty; write the name of the node");
    }
    let caller = Caller {
        node: args.node.clone(),
        namespace: args.namespace.clone(),
        service_account: args.service_account.clone(),
        agent: true,
    };
    println!("{}", TokenKey::open(&args.state_dir)?.issue(&caller, args.ttl, SystemTime::now())?);
    Ok(ExitCode::SUCCESS)
}

fn print_generations(generations: &[store::Generation]) {
    let now = crate::ads::seconds(SystemTime::now());
    let time = |s: u64| {
        humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(s)).to_string()
    };
    let trusted = |g: &store::Generation| g.trusted_until.is_none_or(|until| now < until);
    let signing = generations.iter().filter(|g| trusted(g) && g.signs_from <= now).map(|g| g.id).max();
    println!("{:<6} {:<10} {:<22} TRUSTED UNTIL", "ROOT", "STATE", "SIGNS FROM");
    for g in generations {
        let state = if Some(g.id) == signing {
            "signs"
        } else if !trusted(g) {
            "ended"
        } else if g.signs_from > now {
            "waits"
        } else {
            "trusted"
        };
        let from = if g.signs_from == 0 { "-".to_owned() } else { time(g.signs_from) };
        println!(
            "{:<6} {state:<10} {from:<22} {}",
            g.id,
            g.trusted_until.map_or_else(|| "-".to_owned(), time)
        );
    }
}
