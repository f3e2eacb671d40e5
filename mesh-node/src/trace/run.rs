//! The thread that reads what the kernel tells, and the pods that are traced.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use mesh_core::admin::Probe;
use mesh_core::flows::{Dns, Filter, Flow, Kind, Mark, Side};
use mesh_core::recent::Recent;
use mesh_core::state::MeshState;
use mesh_core::telemetry::AccessRecord;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;

use super::join::{Context, Joiner, Live, LocalPod, Named, Pods, Policies};
use super::pairs::Pairs;
use super::ring::{Flows, Taken};
use super::told::{Ends, Names, Numbers, Told};
use crate::capture::trace::{Told as Counted, Traced, Tracing, Watched};
use crate::capture::{Capture, CaptureConfig, CaptureError, EnrolledPod};
use crate::pods::{PodInfo, PodSource};
use crate::sys::{self, Netns};

/// How often the ring is looked at; a ring that fills up wakes the reader before.
const LOOK: Duration = Duration::from_millis(100);
/// How often repeated events are gathered and quiet pairs forgotten.
const GATHER: Duration = Duration::from_secs(2);
/// How often the node's pods are looked at.
const PODS: Duration = Duration::from_secs(2);
/// How soon they are looked at after the mesh has changed.
const SETTLE: Duration = Duration::from_millis(200);
/// Containers whose names are remembered, of those that were asked for lately and before, and for how long at least.
const CONTAINERS: usize = 4096;
const CONTAINERS_KEPT: Duration = Duration::from_secs(600);
/// Directories below a pod's cgroup that are searched for a container.
const CONTAINER_DEPTH: usize = 3;

/// Gives the newest snapshot of the mesh, and the policies of the fast path.
pub type Snapshots = Arc<dyn Fn() -> (Arc<MeshState>, Arc<Policies>) + Send + Sync>;

/// What the kernel calls things here, and where containers are.
#[derive(Default)]
struct KernelNames {
    drops: HashMap<u32, String>,
    resets: HashMap<u32, String>,
    /// Cgroup directories of the node's pods.
    cgroups: Mutex<Vec<PathBuf>>,
    /// Last part of a cgroup's path by its id, as far as it was asked for.
    containers: Mutex<Containers>,
}

/// Names of containers by their cgroups' ids.
struct Containers(Recent<u64, String>);

impl Default for Containers {
    fn default() -> Self {
        Self(Recent::new(CONTAINERS, CONTAINERS_KEPT))
    }
}

impl KernelNames {
    fn find(&self, cgroup: u64) -> Option<String> {
        let pods = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner).clone();
        pods.iter().find_map(|directory| below(directory, cgroup, CONTAINER_DEPTH))
    }
}

/// The name of the directory with this inode: a cgroup's id.
fn below(directory: &Path, cgroup: u64, depth: usize) -> Option<String> {
    if std::fs::metadata(directory).ok()?.ino() == cgroup {
        return Some(directory.file_name()?.to_string_lossy().into_owned());
    }
    if depth == 0 {
        return None;
    }
    let entries = std::fs::read_dir(directory).ok()?.filter_map(Result::ok);
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.into_iter().find_map(|entry| below(&entry.path(), cgroup, depth - 1))
}

impl Names for KernelNames {
    fn drop_reason(&self, reason: u32) -> String {
        self.drops.get(&reason).cloned().unwrap_or_else(|| format!("0x{reason:x}"))
    }

    fn reset_reason(&self, reason: u32) -> Option<String> {
        self.resets.get(&reason).filter(|name| *name != "NOT_SPECIFIED").cloned()
    }

    fn container(&self, cgroup: u64) -> String {
        if cgroup == 0 {
            return String::new();
        }
        let mut known = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        known.0.get_or_insert_with(cgroup, || self.find(cgroup).unwrap_or_default())
    }
}

/// What tracing needs of the agent.
pub struct Parts {
    /// The kernel side.
    pub capture: Arc<Capture>,
    /// What it was loaded with.
    pub config: CaptureConfig,
    /// The mesh.
    pub state: Snapshots,
    /// Where events go.
    pub flows: Arc<Flows>,
    /// What workers say of connections to applications.
    pub named: Receiver<Named>,
    /// Halvings of the number of connections that are traced.
    pub sample: u8,
}

/// Tracing of a node: what it has told so far can be asked at any time, and it goes on until it is dropped.
pub struct Tracer {
    shared: Arc<Shared>,
    hooks: Vec<Probe>,
    follow: Mutex<Option<Follow>>,
    addresses: Gauge,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What several threads use.
struct Shared {
    flows: Arc<Flows>,
    state: Snapshots,
    joiner: Mutex<Joiner>,
    pods: ArcSwap<Pods>,
    names: KernelNames,
    pairs: Arc<Pairs>,
    counted: ArcSwap<Counted>,
    watched: Arc<Watched>,
    /// Whether the hooks are to be attached.
    on: AtomicBool,
    capture: Arc<Capture>,
    config: CaptureConfig,
    named: Mutex<Receiver<Named>>,
}

/// What was traced last, so that only changes cost something.
#[derive(Default)]
struct Follow {
    known: HashMap<PathBuf, u64>,
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").field("hooks", &self.hooks).finish_non_exhaustive()
    }
}

impl Shared {
    fn joiner(&self) -> std::sync::MutexGuard<'_, Joiner> {
        self.joiner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads, joins and hands on, until told to stop.
    fn read(&self, mut tracing: Tracing, stop: &AtomicBool) {
        let mut gathered = Instant::now();
        let mut events = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if self.on.load(Ordering::Relaxed) {
                tracing.attach(&self.capture, &self.config);
            } else {
                tracing.detach();
            }
            // No more than a wait: what is there is read whatever it says.
            if let Err(error) = tracing.read(LOOK.as_millis() as i32, |event| events.push(*event)) {
                tracing::error!(%error, "the kernel's events cannot be read any more");
                return;
            }
            if gathered.elapsed() >= GATHER {
                gathered = Instant::now();
                if let Err(error) = tracing.gather(sys::monotonic_ns(), |event| events.push(*event)) {
                    tracing::debug!(%error, "repeated events are not gathered");
                }
                self.pairs.expire(gathered);
            }
            if let Ok(counted) = tracing.told() {
                self.counted.store(Arc::new(counted));
            }
            if !events.is_empty() {
                self.join(&events);
                events.clear();
                events.shrink_to(4096);
            }
        }
    }

    fn join(&self, events: &[crate::capture::trace::Event]) {
        let ((mesh, policies), pods) = ((self.state)(), self.pods.load_full());
        let context = Context { mesh: &mesh, pods: &pods, policies: &policies, epoch_us: epoch_us() };
        let now = Instant::now();
        let named: Vec<Named> =
            self.named.lock().unwrap_or_else(PoisonError::into_inner).try_iter().collect();
        let told: Vec<Told> = {
            let mut joiner = self.joiner();
            named.into_iter().for_each(|named| joiner.name(named));
            events.iter().filter_map(|event| joiner.kernel(event, &context)).collect()
        };
        for event in &told {
            self.pairs.count(event, &self.names, now);
        }
        self.flows.push(told);
    }
}

/// Microseconds since 1970 at which CLOCK_MONOTONIC was zero.
fn epoch_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(0).saturating_sub(sys::monotonic_ns() / 1000)
}

/// Microseconds since 1970.
#[must_use]
pub fn wall_us() -> u64 {
    epoch_us() + sys::monotonic_ns() / 1000
}

impl Tracer {
    /// Attaches the hooks and starts the thread.
    ///
    /// # Errors
    /// See [`Capture::trace`]; or no thread is left.
    pub fn start(parts: Parts) -> Result<Arc<Self>, CaptureError> {
        const NAME: &str = "trace";
        let Parts { capture, config, state, flows, named, sample } = parts;
        let tracing = capture.trace(&config)?;
        tracing.sample(sample)?;
        let hooks = tracing.hooks().to_vec();
        let (drops, resets) = tracing.reasons();
        let shared = Arc::new(Shared {
            flows,
            state,
            joiner: Mutex::default(),
            pods: ArcSwap::default(),
            names: KernelNames { drops, resets, ..KernelNames::default() },
            pairs: Arc::default(),
            counted: ArcSwap::default(),
            watched: tracing.watched(),
            on: AtomicBool::new(true),
            capture,
            config,
            named: Mutex::new(named),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let (reader, stopped) = (Arc::clone(&shared), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name(NAME.to_owned())
            .spawn(move || reader.read(tracing, &stopped))
            .map_err(|source| CaptureError::Thread { name: NAME, source })?;
        Ok(Arc::new(Self {
            shared,
            hooks,
            follow: Mutex::default(),
            addresses: Gauge::default(),
            stop,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// What is attached and what this kernel lacks.
    #[must_use]
    pub fn hooks(&self) -> &[Probe] {
        &self.hooks
    }

    /// Turns tracing on or off; takes effect within a tenth of a second. What was told stays.
    pub fn turn(&self, on: bool) {
        self.shared.on.store(on, Ordering::Relaxed);
    }

    /// Addresses of pods that are traced now.
    #[must_use]
    pub fn addresses(&self) -> Gauge {
        self.addresses.clone()
    }

    /// What the programs counted, as of the last look.
    #[must_use]
    pub fn counted(&self) -> Counted {
        **self.shared.counted.load()
    }

    /// Figures by pair of workloads.
    #[must_use]
    pub fn pairs(&self) -> Arc<Pairs> {
        Arc::clone(&self.shared.pairs)
    }

    /// Traces these pods from now on: those that are captured, and of the others on this node those that `present` lists.
    pub fn follow(&self, captured: &[Arc<EnrolledPod>], present: &[PodInfo]) {
        let mut pods = Pods::new();
        let mut traced = Traced::default();
        for pod in captured {
            let local = LocalPod {
                namespace: pod.info.namespace.clone(),
                name: pod.info.name.clone(),
                captured: pod.is_active(),
            };
            pods.insert(pod.cookie, Arc::new(local));
            traced.addresses.extend(pod.addresses().iter());
        }
        let mut follow = self.follow.lock().unwrap_or_else(PoisonError::into_inner);
        let known = std::mem::take(&mut follow.get_or_insert_default().known);
        let known_now = &mut follow.get_or_insert_default().known;
        for pod in present.iter().filter(|pod| !pod.host_network) {
            let cookie = known.get(&pod.netns).copied().or_else(|| cookie(pod));
            let Some(cookie) = cookie else { continue };
            known_now.insert(pod.netns.clone(), cookie);
            pods.entry(cookie).or_insert_with(|| {
                let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
                Arc::new(LocalPod { namespace, name, captured: false })
            });
        }
        traced.namespaces = pods.keys().copied().collect();
        let (mesh, _) = (self.shared.state)();
        for pod in pods.values().filter(|pod| !pod.captured) {
            let workloads = mesh.workloads_by_name(&pod.namespace, &pod.name);
            traced.addresses.extend(workloads.flat_map(|workload| workload.addresses.iter().copied()));
        }
        traced.addresses.retain(|ip| !ip.is_loopback());
        traced.addresses.sort_unstable();
        traced.addresses.dedup();
        // A container runtime says where they are below the hierarchy's root.
        let root = self.shared.config.host_cgroup.as_deref().unwrap_or(Path::new("/"));
        let known = present.iter().filter(|pod| !pod.cgroup.as_os_str().is_empty());
        let directories = known.map(|pod| root.join(&pod.cgroup)).collect();
        *self.shared.names.cgroups.lock().unwrap_or_else(PoisonError::into_inner) = directories;
        if **self.shared.pods.load() != pods {
            self.shared.pods.store(Arc::new(pods));
        }
        if let Err(error) = self.shared.watched.follow(&traced) {
            tracing::warn!(%error, "not all pods are traced");
        }
        self.addresses.set(i64::try_from(traced.addresses.len()).unwrap_or(i64::MAX));
    }

    /// Adds what the agent says of a connection. Called on the thread of the access log.
    pub fn record(&self, record: &AccessRecord) {
        let told = self.shared.joiner().record(record);
        self.shared.flows.push(told);
    }

    /// Connections that are open now.
    #[must_use]
    pub fn live(&self) -> Vec<Live> {
        self.shared.joiner().live().cloned().collect()
    }

    /// Who names what the kernel numbers.
    #[must_use]
    pub fn names(&self) -> &dyn Names {
        &self.shared.names
    }

    /// The events.
    #[must_use]
    pub fn flows(&self) -> &Arc<Flows> {
        &self.shared.flows
    }

    /// Events after one, as [`Flows::read`].
    #[must_use]
    pub fn read(&self, since: u64, filter: &Filter) -> (Vec<Flow>, Mark) {
        let (flows, mark) = self.shared.flows.read(since, filter, &self.shared.names);
        (flows, Mark { lost: self.counted().lost, ..mark })
    }

    /// The last events, as [`Flows::last`].
    #[must_use]
    pub fn last(&self, count: usize, filter: &Filter) -> (Vec<Flow>, Mark) {
        let (flows, mark) = self.shared.flows.last(count, filter, &self.shared.names);
        (flows, Mark { lost: self.counted().lost, ..mark })
    }

    /// The events after one that are sent on, as [`Flows::take`], written out.
    #[must_use]
    pub fn take(&self, since: u64, most: usize) -> (Vec<Flow>, Taken) {
        let taken = self.shared.flows.take(since, most);
        let node = self.shared.flows.node();
        let flow = |(seq, event): &(u64, Told)| event.flow(*seq, node, &self.shared.names);
        (taken.events.iter().map(flow).collect(), taken)
    }

    /// Tells of a DNS answer that a pod got.
    pub fn answered(&self, pod: &mesh_core::state::LocalWorkload, dns: Dns, latency: Duration) {
        let (mesh, _) = (self.shared.state)();
        let source = mesh.local_workload(pod).map(|workload| super::join::party(workload));
        let ends = Ends { source: source.unwrap_or_default(), ..Ends::default() };
        self.shared.flows.push([Told {
            at_us: wall_us(),
            kind: Kind::Dns,
            side: Side::Client,
            protocol: "dns",
            ends: Arc::new(ends),
            numbers: Numbers {
                latency_us: Some(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX)),
                ..Numbers::default()
            },
            count: 1,
            dns: Some(Box::new(dns)),
            ..Told::default()
        }]);
    }

    /// Detaches the hooks: a successor traces now.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A panic there has been logged by the runtime; nothing is left to do.
        let _ = thread.map(JoinHandle::join);
    }

    /// How often pods should be looked at.
    #[must_use]
    pub const fn look() -> Duration {
        PODS
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn cookie(pod: &PodInfo) -> Option<u64> {
    Netns::open(&pod.netns).and_then(|netns| netns.cookie()).ok()
}

/// Keeps the traced pods what they are on the node, until `done`. `published` changes with the mesh, which knows the
/// addresses of pods that are not captured.
pub async fn follow(
    tracer: Arc<Tracer>,
    mut enrolled: watch::Receiver<Arc<Vec<Arc<EnrolledPod>>>>,
    mut published: watch::Receiver<u64>,
    source: Option<Arc<dyn PodSource>>,
    done: tokio_util::sync::CancellationToken,
) {
    let (mut present, mut due) = (Vec::new(), tokio::time::Instant::now());
    loop {
        tokio::select! {
            changed = enrolled.changed() => if changed.is_err() { return },
            // Many changes of the mesh cost one look.
            Ok(()) = published.changed() => {
                due = due.min(tokio::time::Instant::now() + SETTLE);
                continue;
            }
            () = tokio::time::sleep_until(due) => {
                present = source.as_ref().and_then(|source| source.snapshot().ok()).map_or_else(Vec::new, |now| now.pods);
                due = tokio::time::Instant::now() + PODS;
            }
            () = done.cancelled() => return tracer.stop(),
        }
        let captured = enrolled.borrow_and_update().clone();
        tracer.follow(&captured, &present);
    }
}
