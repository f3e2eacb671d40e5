//! The agent's side: holds a pod until it is captured.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::gate::{self, Gate};
use super::message::{Answer, LONGEST, Request, Starting, State};
use super::{SOCKET, STATE};
use crate::capture::EnrolledPod;
use crate::control::assign::Assigned;
use crate::control::settings::InForce;
use crate::link::{self, Link};
use crate::pods::{CriSource, PodInfo};
use crate::proxy::Shared;
use mesh_core::admin;

/// How long a pod of the mesh may wait for the control plane to know it.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);
/// How long it may wait until it is captured: a certificate takes three seconds at most.
const CAPTURED_WITHIN: Duration = Duration::from_secs(10);
/// A request comes in one piece.
const READ_WITHIN: Duration = Duration::from_secs(2);

/// What it works with.
pub struct Parts {
    /// Told of pods that the runtime does not list yet.
    pub source: Arc<CriSource>,
    /// What the control plane says of the node's pods.
    pub assigned: watch::Receiver<Assigned>,
    /// The pods under capture.
    pub enrolled: watch::Receiver<Arc<Vec<Arc<EnrolledPod>>>>,
    /// Why others are not.
    pub status: watch::Receiver<Vec<admin::Pod>>,
    /// Whether the mesh fails open.
    pub in_force: watch::Receiver<InForce>,
    /// The agent's settings: the namespace of its own pods, which are never held, and where the socket and the state file
    /// are.
    pub shared: Arc<Shared>,
}

/// Serves plugins until dropped: the newest agent is the one that they ask.
///
/// # Errors
/// The socket cannot be made.
pub async fn serve(parts: Parts) -> std::io::Result<()> {
    let link = Link::new(&parts.shared.config.admin.run_dir, SOCKET, "cni");
    link::remove(&link.socket())?;
    let listener = UnixListener::bind(link.socket())?;
    link.take()?;
    let parts = Rc::new(parts);
    tokio::task::spawn_local(keep_state(Rc::clone(&parts)));
    tokio::select! {
        () = accept(&listener, &parts) => {}
        () = link.keep(link::LOOKED_AFTER) => {}
    }
    Ok(())
}

async fn accept(listener: &UnixListener, parts: &Rc<Parts>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a question of the CNI plugin");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let parts = Rc::clone(parts);
        tokio::task::spawn_local(async move {
            if let Err(error) = answer(&parts, stream).await {
                tracing::debug!(%error, "a question of the CNI plugin came to nothing");
            }
        });
    }
}

/// Writes what stands in for the agent, whenever it changes.
async fn keep_state(parts: Rc<Parts>) {
    let config = &parts.shared.config;
    let (mut assigned, mut in_force) = (parts.assigned.clone(), parts.in_force.clone());
    let mut written: Option<State> = None;
    loop {
        let fail_open = in_force.borrow_and_update().fail() == "open";
        let state = gate::state(&assigned.borrow_and_update(), fail_open, &config.node.namespace);
        if let Some(state) = state.filter(|state| written.as_ref() != Some(state)) {
            match write_state(&config.cni.state_dir, &state) {
                Ok(()) => written = Some(state),
                Err(error) => tracing::warn!(%error, "cannot write {STATE} for the CNI plugin"),
            }
        }
        tokio::select! {
            changed = assigned.changed() => if changed.is_err() { return },
            changed = in_force.changed() => if changed.is_err() { return },
        }
    }
}

fn write_state(state_dir: &Path, state: &State) -> std::io::Result<()> {
    let path = state_dir.join(STATE);
    let temporary = state_dir.join(format!(".{STATE}.{}", std::process::id()));
    std::fs::write(&temporary, serde_json::to_vec(state)?)?;
    std::fs::rename(&temporary, &path)
}

async fn answer(parts: &Parts, stream: UnixStream) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(read.take(LONGEST));
    timeout_at(Instant::now() + READ_WITHIN, reader.read_line(&mut line)).await??;
    let problem = match serde_json::from_str(&line)? {
        Request::Del { uid } => {
            parts.source.forget(&uid);
            None
        }
        Request::Add(pod) => hold(parts, pod).await.err(),
    };
    if let Some(problem) = &problem {
        tracing::warn!(%problem, "a pod's start is put off");
    }
    let mut answer = serde_json::to_vec(&Answer { problem })?;
    answer.push(b'\n');
    write.write_all(&answer).await
}

/// Returns once the pod may go on.
///
/// # Errors
/// Why it may not, in words.
async fn hold(parts: &Parts, pod: Starting) -> Result<(), String> {
    let began = Instant::now();
    let home = &parts.shared.config.node.namespace;
    let mut assigned = parts.assigned.clone();
    loop {
        let gate = gate::with_agent(&pod, &assigned.borrow_and_update(), home);
        match gate {
            Gate::Pass => return Ok(()),
            Gate::Hold => break,
            Gate::Wait => {
                let changed = timeout_at(began + KNOWN_WITHIN, assigned.changed()).await;
                if !matches!(changed, Ok(Ok(()))) {
                    return Err(format!("the control plane does not know it after {KNOWN_WITHIN:?}"));
                }
            }
        }
    }
    parts.source.expect(PodInfo {
        uid: pod.uid.clone(),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: String::new(),
        netns: pod.netns.clone(),
        cgroup: PathBuf::new(),
        labels: Default::default(),
        probe_ports: Vec::new(),
        dns_search: None,
        host_network: false,
    });
    let mut enrolled = parts.enrolled.clone();
    let is_captured = |pods: &Arc<Vec<Arc<EnrolledPod>>>| {
        pods.iter().any(|p| p.info.uid == pod.uid && p.info.netns == pod.netns && p.is_active())
    };
    let captured = timeout_at(began + CAPTURED_WITHIN, enrolled.wait_for(is_captured)).await;
    if matches!(captured, Ok(Ok(_))) {
        tracing::info!(pod = %format_args!("{}/{}", pod.namespace, pod.name), took = ?began.elapsed(), "captured before it starts");
        return Ok(());
    }
    let status = parts.status.borrow();
    let known = status.iter().find(|p| p.namespace == pod.namespace && p.name == pod.name);
    let why = known.and_then(|p| p.problem.clone()).unwrap_or_else(|| "no reason is known".to_owned());
    Err(format!("not captured within {CAPTURED_WITHIN:?}: {why}"))
}
