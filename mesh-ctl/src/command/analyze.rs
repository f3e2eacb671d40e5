//! `analyze`: what is wrong, or likely not meant, in files and clusters, by the control plane's own code.

use std::sync::Arc;

use mesh_control::analysis::input::{Read, read_cluster, read_paths};
use mesh_control::analysis::{Finding, Severity, analyze};
use mesh_control::convert::Mesh;
use mesh_control::source::{SourceError, State};

use crate::cli::{AnalyzeArgs, Global, Threshold};
use crate::cluster::{Cluster, ClusterError};
use crate::output::{Block, Exit, Report};
use crate::table::Tone;

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error(transparent)]
    Files(SourceError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Reading(SourceError),
}

/// Runs the command.
pub async fn run(global: &Global, args: &AnalyzeArgs) -> Report {
    match findings(args).await {
        Ok(found) => report(global, args, found),
        Err(problem) => {
            let exit = if matches!(problem, Problem::Files(_)) { Exit::Usage } else { Exit::Unreachable };
            Report::failed(exit, problem.to_string())
        }
    }
}

async fn findings(args: &AnalyzeArgs) -> Result<Vec<Finding>, Problem> {
    let defaults = Mesh { root_namespace: args.root_namespace.clone(), ..Mesh::default() };
    let read = (!args.paths.is_empty())
        .then(|| read_paths(&args.paths, &args.root_namespace))
        .transpose()
        .map_err(Problem::Files)?;
    let cluster = match &read {
        Some(_) if !args.with_cluster => None,
        _ => Some(cluster(args).await?),
    };
    let Some(read) = read else {
        return Ok(analyze(&cluster.unwrap_or_default(), &defaults, |_| None));
    };
    let state = cluster.map(|cluster| merged(&cluster, &read));
    let found = analyze(state.as_ref().unwrap_or(&read.state), &defaults, |object| read.place(object));
    // What was wrong with the cluster before is not what was asked.
    Ok(found.into_iter().filter(|finding| !args.with_cluster || !finding.place.is_empty()).collect())
}

async fn cluster(args: &AnalyzeArgs) -> Result<Arc<State>, Problem> {
    let cluster = Cluster::connect(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
    read_cluster(cluster.client(), &args.root_namespace).await.map_err(Problem::Reading)
}

/// The cluster with the files' objects in the place of its own.
fn merged(cluster: &State, read: &Read) -> State {
    let mut objects = (*cluster.objects).clone();
    for object in read.objects() {
        objects.insert(object.clone());
    }
    let problems = read.state.problems.clone();
    State { synced: true, objects: Arc::new(objects), problems, ..State::default() }
}

fn report(global: &Global, args: &AnalyzeArgs, mut found: Vec<Finding>) -> Report {
    if let Some(namespace) = &args.namespace {
        found.retain(|finding| {
            finding.object.as_ref().is_none_or(|object| object.key.namespace == *namespace)
        });
    }
    let threshold = match args.failure_threshold {
        Threshold::Info => Severity::Info,
        Threshold::Warning => Severity::Warning,
        Threshold::Error => Severity::Error,
    };
    let bad = found.iter().any(|finding| finding.severity >= threshold);
    let report = Report::new(global.output, &found, || blocks(&found));
    if bad { report.exit(Exit::No) } else { report }
}

fn blocks(found: &[Finding]) -> Vec<Block> {
    if found.is_empty() {
        return vec![Block::Line(Tone::Good, "nothing found".to_owned())];
    }
    let line = |finding: &Finding| {
        let tone = match finding.severity {
            Severity::Info => Tone::Plain,
            Severity::Warning => Tone::Warn,
            Severity::Error => Tone::Bad,
        };
        Block::Line(tone, finding.to_string())
    };
    found.iter().map(line).collect()
}
