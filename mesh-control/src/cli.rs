//! The command line.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use mesh_core::signals::Signals;
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::auth::{Caller, TokenKey};
use crate::ca::authority::DEFAULT_TTL;
use crate::ca::store;
use crate::convert::{Mesh, convert};
use crate::hub::Debounce;
use crate::server::{Options, run};
use crate::source::SourceError;
use crate::source::dir::{Loader, read_files};

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
    /// Read a directory of objects and say what is wrong with it. Exit code 1 when something is.
    #[command(after_help = "Example: mesh-control check /etc/mesh")]
    Check {
        /// The directory.
        path: PathBuf,
        /// Namespace of the mesh settings.
        #[arg(long, default_value = "istio-system")]
        root_namespace: String,
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
    /// Where objects come from: dir:PATH.
    #[arg(long, value_name = "dir:PATH")]
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
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:15012")]
    listen_tls: SocketAddr,
    /// Metrics and debug.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15014")]
    listen_debug: SocketAddr,
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
            Command::Check { path, root_namespace } => check(&path, &root_namespace),
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

fn serve(args: RunArgs) -> anyhow::Result<ExitCode> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let source = match args.source.strip_prefix("dir:") {
        Some(path) if !path.is_empty() => PathBuf::from(path),
        _ => return Err(SourceError::Unknown(args.source).into()),
    };
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

/// The names by which Istio's agents know their control plane, and `localhost`.
fn server_names(root_namespace: &str, more: Vec<String>) -> Vec<String> {
    let istio = ["istiod", "istiod-remote", "istio-pilot"].map(|n| format!("{n}.{root_namespace}.svc"));
    istio.into_iter().chain(["localhost".to_owned()]).chain(more).collect()
}

fn check(path: &Path, root_namespace: &str) -> anyhow::Result<ExitCode> {
    let files = read_files(path)
        .map_err(|cause| SourceError::Unreadable { path: path.display().to_string(), cause })?;
    let number = files.len();
    let state = Loader::new(root_namespace).load(files).unwrap_or_default();
    for problem in &state.problems {
        println!("error: {}", crate::source::Problem { consequence: String::new(), ..problem.clone() });
    }
    let defaults = Mesh { root_namespace: root_namespace.to_owned(), ..Mesh::default() };
    let mesh = defaults.with_settings(&state.objects);
    let resources = convert(&state.objects, &mesh, &Default::default());
    let notes = resources.conditions.iter().filter(|c| !c.status || c.reason == "UnsupportedValue");
    for condition in notes.filter(|c| c.kind != "istio.io/WaypointMissing" || c.status) {
        println!("note: {}: {}: {}", condition.object, condition.reason, condition.message);
    }
    let counts: Vec<String> =
        state.objects.counts().into_iter().filter(|(_, n)| *n > 0).map(|(k, n)| format!("{n} {k}")).collect();
    println!("{number} files: {}; {} errors", counts.join(", "), state.problems.len());
    Ok(if state.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn token(args: &TokenArgs) -> anyhow::Result<ExitCode> {
    if args.node.is_empty() {
        bail!("--node is empty; write the name of the node");
    }
    let caller = Caller {
        node: args.node.clone(),
        namespace: args.namespace.clone(),
        service_account: args.service_account.clone(),
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
