//! `install`, `upgrade`, `uninstall`, `verify`, `precheck`: the chart on a cluster.
//!
//! What was installed is kept in the ConfigMap `undermesh-installation`: the operator's values, and the names of all
//! objects, so that an upgrade removes what is no longer part and `uninstall` leaves nothing.

mod check;
mod record;
mod remove;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::chart::{self, Release, values};
use crate::cli::{ClusterArgs, Format, Global, InstallArgs};
use crate::cluster::{Cluster, ClusterError, Reference};
use crate::output::{Block, Exit, Report};
use crate::rollout::{Rollout, daemon, reasons, rollout};
use crate::table::Tone;
use record::Record;

pub use check::{precheck, verify};
pub use remove::uninstall;

const POLL: Duration = Duration::from_secs(1);
/// Name of the release, as `helm install undermesh …` would have it.
const RELEASE: &str = "undermesh";

/// Why a command ended early.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Chart(#[from] chart::ChartError),
    #[error(transparent)]
    Set(#[from] values::SetError),
    #[error("values file {path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{0}")]
    Told(String),
}

impl Problem {
    fn report(self) -> Report {
        let exit = match &self {
            Self::Cluster(_) => Exit::Unreachable,
            Self::Told(_) => Exit::No,
            _ => Exit::Usage,
        };
        Report::failed(exit, self.to_string())
    }
}

/// What was done, for scripts.
#[derive(Debug, Serialize)]
struct Done {
    namespace: String,
    version: String,
    applied: Vec<String>,
    removed: Vec<String>,
}

/// Runs `install` or, with `again`, `upgrade`.
pub async fn install(global: &Global, args: &InstallArgs, again: bool) -> Report {
    match install_or_say(global, args, again).await {
        Ok(report) => report,
        Err(problem) => problem.report(),
    }
}

async fn install_or_say(global: &Global, args: &InstallArgs, again: bool) -> Result<Report, Problem> {
    let namespace = &args.cluster.namespace;
    if args.dry_run {
        let objects = objects(args, given(args)?, true)?;
        let documents = objects.iter().map(|o| serde_saphyr::to_string(o).map_err(|e| e.to_string()));
        let documents: Result<Vec<_>, _> = documents.collect();
        return Ok(Report::text(documents.map_err(Problem::Told)?.join("---\n")));
    }
    let cluster = connect(&args.cluster).await?;
    let known = Record::read(&cluster, namespace).await?;
    check::refuse_second(&cluster, namespace).await?;
    let mut given = given(args)?;
    if again {
        let Some(known) = &known else {
            let told = format!("nothing is installed in namespace {namespace}; `meshctl install` does that");
            return Err(Problem::Told(told));
        };
        if !args.reset_values {
            given = values::merged(known.values.clone(), given);
        }
    }
    let objects = objects(args, given.clone(), makes_namespace(&cluster, namespace, known.as_ref()).await?)?;
    let say = Progress::new(global);
    define(&cluster, &say).await?;
    let mut applied = Vec::new();
    for object in &objects {
        cluster.apply(object).await?;
        applied.push(Reference::of(object)?);
        say.line(&format!("applied  {}", Reference::of(object)?));
    }
    let gone: Vec<Reference> =
        known.iter().flat_map(|k| &k.objects).filter(|o| !applied.contains(o)).cloned().collect();
    for object in &gone {
        cluster.delete(object, None).await?;
        say.line(&format!("removed  {object}"));
    }
    let version = chart::app_version()?;
    let record = Record { version: version.clone(), values: given, objects: applied.clone() };
    cluster.apply(&record.object(namespace)).await?;
    if !args.no_wait {
        wait(&cluster, &applied, args.wait_timeout, &say).await?;
    }
    let done = Done {
        namespace: namespace.clone(),
        version,
        applied: applied.iter().map(ToString::to_string).collect(),
        removed: gone.iter().map(ToString::to_string).collect(),
    };
    Ok(Report::new(global.output, &done, || {
        let state = if args.no_wait { "applied" } else { "installed and running" };
        let next = "next: kubectl label namespace NAMESPACE istio.io/dataplane-mode=ambient; meshctl verify";
        vec![
            Block::Line(
                Tone::Good,
                format!("undermesh {} is {state} in namespace {namespace}", done.version),
            ),
            Block::Line(Tone::Plain, next.to_owned()),
        ]
    }))
}

/// Makes the definitions of kinds that the cluster has none of. They are no part of the installation: what others have
/// made is left alone, and with a definition all objects of its kind would go.
async fn define(cluster: &Cluster, say: &Progress) -> Result<(), Problem> {
    for definition in chart::definitions()? {
        let reference = Reference::of(&definition)?;
        if cluster.get(&reference).await?.is_none() {
            cluster.apply(&definition).await?;
            say.line(&format!("defined  {reference}"));
        }
    }
    Ok(())
}

/// Whether the namespace is part of the installation. One that was there before stays when the mesh goes.
async fn makes_namespace(cluster: &Cluster, name: &str, known: Option<&Record>) -> Result<bool, Problem> {
    let namespace = Reference::new("v1", "Namespace", None, name);
    match known {
        Some(known) => Ok(known.objects.contains(&namespace)),
        None => Ok(cluster.get(&namespace).await?.is_none()),
    }
}

async fn connect(args: &ClusterArgs) -> Result<Cluster, Problem> {
    Ok(Cluster::connect(args.kubeconfig.as_deref(), args.context.as_deref()).await?)
}

/// The values that the operator gives.
fn given(args: &InstallArgs) -> Result<Value, Problem> {
    let mut given = json!({});
    for path in &args.values {
        let failed = |problem: String| Problem::File { path: path.clone(), problem };
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let read: Value = serde_saphyr::from_str(&text).map_err(|e| failed(e.to_string()))?;
        if !read.is_object() {
            return Err(failed("is no map; write values as in the chart's values.yaml".to_owned()));
        }
        given = values::merged(given, read);
    }
    for set in &args.set {
        given = values::merged(given, values::set(set)?);
    }
    Ok(given)
}

fn objects(args: &InstallArgs, given: Value, makes_namespace: bool) -> Result<Vec<Value>, Problem> {
    let release = Release {
        name: RELEASE.to_owned(),
        namespace: args.cluster.namespace.clone(),
        service: "meshctl".to_owned(),
    };
    let base = values::merged(chart::defaults()?, json!({"createNamespace": makes_namespace}));
    Ok(chart::objects(&release, &values::merged(base, given))?)
}

/// Waits until every Deployment and DaemonSet runs.
async fn wait(
    cluster: &Cluster,
    objects: &[Reference],
    patience: Duration,
    say: &Progress,
) -> Result<(), Problem> {
    let until = Instant::now() + patience;
    for object in objects.iter().filter(|o| ["Deployment", "DaemonSet"].contains(&o.kind.as_str())) {
        let mut last = String::new();
        loop {
            let state = state(cluster, object).await?.and_then(|(_, state)| state);
            let text = state.as_ref().map_or_else(|| "is not there yet".to_owned(), ToString::to_string);
            if text != last {
                say.line(&format!("waiting  {object}: {text}"));
                last = text;
            }
            if state.is_some_and(|state| state.done) {
                break;
            }
            if Instant::now() >= until {
                let why = why_not(cluster, object).await;
                return Err(Problem::Told(format!("{object} is not ready after {patience:?}: {last}{why}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// An object, and how far it is where that has a meaning; none where it is not there.
async fn state(cluster: &Cluster, object: &Reference) -> Result<Option<(Value, Option<Rollout>)>, Problem> {
    let Some(found) = cluster.get(object).await? else { return Ok(None) };
    let state = if object.kind == "DaemonSet" {
        daemon(&found, &pods(cluster, object).await?)
    } else {
        rollout(&found)
    };
    Ok(Some((found, state)))
}

/// The pods of a Deployment or DaemonSet of ours.
async fn pods(cluster: &Cluster, object: &Reference) -> Result<Vec<Value>, Problem> {
    let label = format!("app={}", object.name);
    Ok(cluster.list("v1", "Pod", object.namespace.as_deref(), &label).await?)
}

/// What keeps the pods of a Deployment or DaemonSet from serving, one line each.
async fn why_not(cluster: &Cluster, object: &Reference) -> String {
    let pods = pods(cluster, object).await.unwrap_or_default();
    reasons(&pods).iter().map(|reason| format!("\n  {reason}")).collect()
}

/// Lines for a person who waits, on standard error.
struct Progress {
    shown: bool,
}

impl Progress {
    fn new(global: &Global) -> Self {
        Self { shown: global.output == Format::Table }
    }

    fn line(&self, text: &str) {
        if self.shown {
            eprintln!("{text}");
        }
    }
}
