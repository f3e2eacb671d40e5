//! Pods from the node's container runtime, over the Container Runtime Interface on its socket.
//!
//! The runtime knows each pod's uid, name, namespace and network namespace, and has them from the kubelet. It does not
//! know service accounts or probes: those come from the control plane ([`crate::control::attribute`]).
//!
//! A thread of its own asks the runtime, so that one that hangs holds nothing up: whenever the runtime tells of an event
//! where it can (containerd 1.7, CRI-O 1.26), when a network namespace appears or goes, and every second. While the
//! runtime is away its pods run on, and the last answer stays true.

mod cgroup;
mod sandbox;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::xds::proto::cri::runtime_service_client::RuntimeServiceClient;
use mesh_core::xds::proto::cri::{
    GetEventsRequest, ListPodSandboxRequest, PodSandbox, PodSandboxFilter, PodSandboxState,
    PodSandboxStateValue, PodSandboxStatusRequest,
};
use notify::{RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::{PodInfo, PodSnapshot, PodSource, SourceError, WatchGuard};
use sandbox::Found;

/// How long one question to the runtime may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the runtime is asked without a reason.
const POLL: Duration = Duration::from_secs(1);
/// How often, for [`BURST`], once a network namespace has appeared: the sandbox is listed a moment later.
const QUICK_POLL: Duration = Duration::from_millis(50);
const BURST: Duration = Duration::from_secs(3);
/// Changes that come this close after another are one.
const COALESCE: Duration = Duration::from_millis(5);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// A pod that the CNI plugin told of and that the runtime does not list after this long has not started.
const EARLY: Duration = Duration::from_secs(120);
/// How long the start of an agent waits for the first answer.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// Where network namespaces of pods are.
const NETNS_DIR: &str = "/var/run/netns";

/// See the module.
pub struct CriSource {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

type Told = Arc<dyn Fn() + Send + Sync>;

struct Shared {
    socket: PathBuf,
    state: Mutex<State>,
    /// Told when there is a first answer.
    answered: Condvar,
    /// Asks the runtime at once, and often for a while.
    poke: Notify,
}

#[derive(Default)]
struct State {
    /// The last answer; none before the first.
    found: Option<Vec<Result<Found, (String, String)>>>,
    /// Why there is no newer one.
    problem: Option<String>,
    /// Pods whose sandboxes are being made, by uid: the CNI plugin told of them.
    early: BTreeMap<String, (PodInfo, Instant)>,
    told: Option<Told>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an answer, and tells of it when it differs from the last one.
    fn answer(&self, found: Vec<Result<Found, (String, String)>>) {
        let told = {
            let mut state = self.state();
            state.problem = None;
            let same = state.found.as_ref() == Some(&found);
            state.found = Some(found);
            if same { None } else { state.told.clone() }
        };
        self.answered.notify_all();
        if let Some(told) = told {
            told();
        }
    }

    fn fail(&self, problem: &str) {
        let mut state = self.state();
        if state.problem.as_deref() != Some(problem) {
            tracing::warn!(socket = %self.socket.display(), %problem, "the container runtime cannot be asked");
        }
        state.problem = Some(problem.to_owned());
    }
}

impl CriSource {
    /// Starts to follow the runtime behind a socket such as `/run/containerd/containerd.sock`, and waits a moment for its
    /// first answer.
    ///
    /// # Errors
    /// The thread cannot be started. A runtime that does not answer is asked again and again.
    pub fn start(socket: &Path) -> Result<Self, SourceError> {
        let shared = Arc::new(Shared {
            socket: socket.to_owned(),
            state: Mutex::default(),
            answered: Condvar::new(),
            poke: Notify::new(),
        });
        let stop = CancellationToken::new();
        let failed = |error: std::io::Error| SourceError {
            path: socket.to_owned(),
            problem: format!("cannot start the thread that asks it: {error}"),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (following, stopped) = (Arc::clone(&shared), stop.clone());
        std::thread::Builder::new()
            .name("pods".into())
            .spawn(move || runtime.block_on(stopped.run_until_cancelled(follow(&following))))
            .map_err(failed)?;
        let source = Self { shared, stop };
        source.wait(FIRST_ANSWER);
        Ok(source)
    }

    /// Waits for the first answer.
    fn wait(&self, patience: Duration) {
        let state = self.shared.state();
        // Without an answer in time there is one later.
        let _ = self.shared.answered.wait_timeout_while(state, patience, |state| state.found.is_none());
    }

    /// The cgroup that all pods of the node are below, relative to the hierarchy's root, such as `kubepods`; none while no
    /// pod is known.
    #[must_use]
    pub fn pods_cgroup(&self) -> Option<PathBuf> {
        let state = self.shared.state();
        let found = state.found.iter().flatten().flatten();
        found.filter_map(|found| cgroup::pods_root(found.pod.cgroup.as_path())).next()
    }

    /// Takes a pod that the runtime lists only once its network is there: the CNI plugin tells of it.
    pub fn expect(&self, pod: PodInfo) {
        let told = {
            let mut state = self.shared.state();
            state.early.insert(pod.uid.clone(), (pod, Instant::now()));
            state.told.clone()
        };
        self.shared.poke.notify_one();
        if let Some(told) = told {
            told();
        }
    }

    /// Forgets what [`CriSource::expect`] took: the pod's network is taken down again.
    pub fn forget(&self, uid: &str) {
        self.shared.state().early.remove(uid);
        self.shared.poke.notify_one();
    }
}

impl Drop for CriSource {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl PodSource for CriSource {
    fn snapshot(&self) -> Result<PodSnapshot, SourceError> {
        let mut state = self.shared.state();
        let Some(found) = &state.found else {
            let problem = state.problem.clone().unwrap_or_else(|| "has not answered yet".to_owned());
            return Err(SourceError {
                path: self.shared.socket.clone(),
                problem: format!("{problem}; is it the socket of the node's container runtime?"),
            });
        };
        let mut snapshot = PodSnapshot::default();
        let mut newest: BTreeMap<&str, &Found> = BTreeMap::new();
        for found in found {
            match found {
                Ok(found) => {
                    // A pod whose sandbox was replaced has two for a moment.
                    let known = newest.entry(&found.pod.uid).or_insert(found);
                    if found.created_at > known.created_at {
                        *known = found;
                    }
                }
                Err(rejected) => snapshot.rejected.push(rejected.clone()),
            }
        }
        snapshot.pods = newest.values().map(|found| found.pod.clone()).collect();
        let listed = |uid: &str| snapshot.pods.iter().any(|pod| pod.uid == uid);
        let alive = |pod: &PodInfo, since: &Instant| {
            since.elapsed() < EARLY && !listed(&pod.uid) && pod.netns.exists()
        };
        let early: Vec<_> = state
            .early
            .values()
            .filter(|(pod, since)| alive(pod, since))
            .map(|(pod, _)| pod.clone())
            .collect();
        state.early.retain(|uid, _| early.iter().any(|pod| pod.uid == *uid));
        snapshot.pods.extend(early);
        Ok(snapshot)
    }

    fn watch(&self, changed: Arc<dyn Fn() + Send + Sync>) -> Result<WatchGuard, SourceError> {
        self.shared.state().told = Some(changed);
        Ok(WatchGuard::new(Unwatch(Arc::clone(&self.shared))))
    }
}

struct Unwatch(Arc<Shared>);

impl Drop for Unwatch {
    fn drop(&mut self) {
        self.0.state().told = None;
    }
}

/// Asks for ever, over connection after connection.
async fn follow(shared: &Arc<Shared>) {
    let mut retry = FIRST_RETRY;
    loop {
        let began = Instant::now();
        let problem = match session(shared).await {
            Ok(never) => match never {},
            Err(problem) => problem,
        };
        shared.fail(&problem);
        retry = if began.elapsed() > LAST_RETRY { FIRST_RETRY } else { (retry * 2).min(LAST_RETRY) };
        tokio::time::sleep(retry).await;
    }
}

/// Asks over one connection until it fails.
async fn session(shared: &Arc<Shared>) -> Result<std::convert::Infallible, String> {
    let told = |status: Status| format!("{} ({:?})", status.message(), status.code());
    let address = format!("unix://{}", shared.socket.display());
    let endpoint = Endpoint::from_shared(address).map_err(|error| error.to_string())?;
    let channel = endpoint.connect_timeout(PATIENCE).connect().await.map_err(|error| causes(&error))?;
    let client = RuntimeServiceClient::new(channel).max_decoding_message_size(64 << 20);
    let events = tokio::spawn(heed_events(client.clone(), Arc::clone(shared)));
    let _events = AbortOnDrop(events.abort_handle());
    let _namespaces = heed_namespaces(shared);
    let mut known = HashMap::new();
    let mut quick_until = Instant::now();
    loop {
        let found = tokio::time::timeout(PATIENCE, ask(client.clone(), &mut known))
            .await
            .map_err(|_elapsed| format!("no answer within {PATIENCE:?}"))?
            .map_err(told)?;
        shared.answer(found);
        let pause = if Instant::now() < quick_until { QUICK_POLL } else { POLL };
        tokio::select! {
            () = shared.poke.notified() => {
                quick_until = Instant::now() + BURST;
                tokio::time::sleep(COALESCE).await;
            }
            () = tokio::time::sleep(pause) => {}
        }
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Has the runtime asked whenever it tells of an event, if it can.
async fn heed_events(mut client: RuntimeServiceClient<Channel>, shared: Arc<Shared>) {
    let mut events = match client.get_container_events(Request::new(GetEventsRequest {})).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => {
            if status.code() != Code::Unimplemented {
                tracing::warn!(%status, "the container runtime's events are not heard; it is asked every second");
            }
            return;
        }
    };
    while let Ok(Some(_event)) = events.message().await {
        shared.poke.notify_one();
    }
}

/// Has the runtime asked when a network namespace appears or goes. Without the directory, polling has to do.
fn heed_namespaces(shared: &Arc<Shared>) -> Option<notify::RecommendedWatcher> {
    let poke = Arc::clone(shared);
    let heed = move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            poke.poke.notify_one();
        }
    };
    let mut watcher = notify::recommended_watcher(heed).ok()?;
    watcher.watch(Path::new(NETNS_DIR), RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}

/// What is known of sandboxes, by id; nothing of it changes while a sandbox lives.
type Known = HashMap<String, Result<Found, (String, String)>>;

/// The sandboxes of this moment that are ready, each asked about once.
async fn ask(
    mut client: RuntimeServiceClient<Channel>,
    known: &mut Known,
) -> Result<Vec<Result<Found, (String, String)>>, Status> {
    let ready = PodSandboxStateValue { state: PodSandboxState::SandboxReady.into() };
    let filter = PodSandboxFilter { state: Some(ready), ..PodSandboxFilter::default() };
    let request = ListPodSandboxRequest { filter: Some(filter) };
    let listed = client.list_pod_sandbox(request).await?.into_inner().items;
    known.retain(|id, _| listed.iter().any(|sandbox| sandbox.id == *id));
    for sandbox in &listed {
        if !known.contains_key(&sandbox.id)
            && let Some(found) = describe(&mut client, sandbox).await?
        {
            known.insert(sandbox.id.clone(), found);
        }
    }
    let mut ids: Vec<_> = known.keys().collect();
    ids.sort_unstable();
    Ok(ids.into_iter().filter_map(|id| known.get(id).cloned()).collect())
}

/// One sandbox; none if it has gone in the meantime.
async fn describe(
    client: &mut RuntimeServiceClient<Channel>,
    sandbox: &PodSandbox,
) -> Result<Option<Result<Found, (String, String)>>, Status> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), verbose: true };
    match client.pod_sandbox_status(request).await {
        Ok(status) => {
            let name = || format!("sandbox {}", sandbox.id.chars().take(13).collect::<String>());
            let found = sandbox::found(sandbox, &status.into_inner());
            Ok(Some(found.map_err(|problem| (name(), problem))))
        }
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

/// An error with its causes: the outermost text of transport errors says nothing.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
