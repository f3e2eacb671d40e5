//! Carries out what [`super::plan`] decides, and keeps the kernel's state what it should be.
//!
//! Listeners are made before a pod is activated, and its certificate is fetched before that: the first captured
//! connection finds everything in place, and a successor takes pods over only once it can serve them.

mod publish;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::admin;
use mesh_core::state::{Health, LocalWorkload, MeshState};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::assign::{Assigned, add_wanted, attribute};
use super::left::Left;
use super::net::KernelNet;
use super::plan::{Held, Plan, Wanted, plan, wanted};
use super::settings::{InForce, answers_dns};
use crate::capture::{Capture, CaptureError, EnrolledPod, FailMode, ListenerKind, MeshSettings};
use crate::dns;
use crate::generations;
use crate::pods::kubelet::Kubelets;
use crate::pods::{PodInfo, PodKey, PodSource};
use crate::proxy::dial::prepare_listener;
use crate::proxy::worker::{Command, Kind, Listeners, Worker};
use crate::proxy::{Pod, Shared};
use crate::sys;
use mesh_core::admin::readiness::Readiness;

/// How often the kernel's state is compared without a reason.
const RESYNC: Duration = Duration::from_secs(2);
/// How long a pod waits for its certificate before it is captured without one.
const CERTIFICATE_PATIENCE: Duration = Duration::from_secs(3);
/// Connect calls from before a pod's capture may still send their SYN for this long; the first retransmission comes
/// after one second.
const JOINING: Duration = Duration::from_secs(2);
/// A connect call that was captured before its pod left has sent its SYN to the listener after this long.
const LAST_CONNECTS: Duration = Duration::from_millis(10);
/// How often the kernel's maps are swept.
const SWEEP_EVERY: Duration = Duration::from_secs(15);
/// A record of a connection that nobody took for this long belongs to none.
const STALE: Duration = Duration::from_secs(150);
/// Changes that come this close after another look are one.
const COALESCE: Duration = Duration::from_millis(2);
/// While many pods join, this often it is asked whether a later agent is there.
const SUCCESSION: Duration = Duration::from_millis(10);
/// Connections that wait for accept, per listener.
const BACKLOG: i32 = 1024;
/// Name in the list of what readiness waits for.
pub const READY: &str = "pods of this node";

struct Enrolled {
    pod: Arc<Pod>,
    kernel: Arc<EnrolledPod>,
    since: Instant,
    /// Its queries are answered as long as this lives.
    dns: Option<dns::PodHandle>,
    /// Whether the pod was an endpoint of its services when it was last looked at.
    endpoint: bool,
}

/// The parts that the enroller works with.
pub struct Parts {
    /// Shared with the workers.
    pub shared: Arc<Shared>,
    /// The kernel side.
    pub capture: Arc<Capture>,
    /// Who answers DNS queries, if the agent does.
    pub dns: Option<dns::Server>,
    /// Who serves.
    pub workers: Rc<Vec<Worker>>,
    /// Where pods are found.
    pub source: Arc<dyn PodSource>,
    /// What the control plane says of them.
    pub assigned: watch::Receiver<Assigned>,
    /// What readiness waits for.
    pub readiness: Arc<Readiness>,
    /// Newest report for the control plane.
    pub report: watch::Sender<super::report::Newest>,
    /// Newest list for the admin endpoint.
    pub status: watch::Sender<Vec<admin::Pod>>,
    /// What capture was told, for the admin endpoint.
    pub in_force: watch::Sender<InForce>,
    /// The enrolled pods, for the fast path.
    pub enrolled: watch::Sender<Arc<Vec<Arc<EnrolledPod>>>>,
    /// Root of the cgroup2 hierarchy in which kubelets are looked for; none where they are configured.
    pub kubelets_below: Option<PathBuf>,
    /// Told when a successor serves the node.
    pub handed_over: CancellationToken,
}

/// See the module.
pub struct Enroller {
    parts: Parts,
    held: BTreeMap<PodKey, Held>,
    enrolled: HashMap<PodKey, Enrolled>,
    left: Left,
    problems: BTreeMap<PodKey, String>,
    waiting_since: HashMap<PodKey, Instant>,
    /// The node's pods, as they were read last; none before the first time.
    read: Option<Vec<PodInfo>>,
    /// Those whose service account is known.
    present: HashMap<PodKey, PodInfo>,
    /// When everything was last compared, not only what changed.
    resynced: Option<Instant>,
    settled: bool,
    /// Whether the kernel programs see this agent as alive.
    serving: bool,
    swept: Instant,
    kubelets: Vec<u64>,
    /// Looks for kubelets where none are configured.
    looks_for_kubelets: Option<Kubelets>,
    /// What the kernel programs were told last.
    told: Option<MeshSettings>,
}

impl Enroller {
    /// Nothing is captured yet by this agent.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let looks_for_kubelets = parts.kubelets_below.clone().map(Kubelets::new);
        Self {
            looks_for_kubelets,
            parts,
            held: BTreeMap::new(),
            enrolled: HashMap::new(),
            left: Left::default(),
            problems: BTreeMap::new(),
            waiting_since: HashMap::new(),
            read: None,
            present: HashMap::new(),
            resynced: None,
            settled: false,
            serving: false,
            swept: Instant::now(),
            kubelets: Vec::new(),
            told: None,
        }
    }

    /// Reconciles on every change of the mesh or of the node's pods, and now and then without one, until the agent
    /// drains; then pods' DNS queries are answered until a successor does. `synced` turns true when the mesh is known.
    pub async fn run(mut self, mut synced: watch::Receiver<bool>) {
        let drain = self.parts.shared.drain.clone();
        let changed = Arc::new(Notify::new());
        let notify = Arc::clone(&changed);
        let watching = self.parts.source.watch(Arc::new(move || notify.notify_one()));
        let mut certificates = self.parts.shared.certificates.watch();
        if let Err(error) = &watching {
            tracing::error!(%error, "pods are looked for every {RESYNC:?} only");
        }
        if synced.wait_for(|synced| *synced).await.is_err() {
            return;
        }
        let mut published = self.parts.shared.published.subscribe();
        let mut assigned = self.parts.assigned.clone();
        loop {
            published.mark_unchanged();
            assigned.mark_unchanged();
            certificates.mark_unchanged();
            if self.resynced.is_none_or(|at| at.elapsed() >= RESYNC) {
                self.resync();
            }
            let again = self.reconcile().await;
            let looked = Instant::now();
            let resync = RESYNC.saturating_sub(self.resynced.map_or(RESYNC, |at| at.elapsed()));
            tokio::select! {
                () = drain.cancelled() => return self.answer_on().await,
                _ = published.changed() => {}
                Ok(()) = assigned.changed() => {}
                () = changed.notified() => self.read_pods(),
                _ = certificates.changed(), if !self.waiting_since.is_empty() => {}
                () = tokio::time::sleep(again.map_or(resync, |again| again.min(resync))) => {}
            }
            tokio::time::sleep(COALESCE.saturating_sub(looked.elapsed())).await;
        }
    }

    /// What is compared now and then only, because nobody tells of it: what others did to the kernel's state, and pods
    /// whose change was missed. It costs time for each pod of the node, which a pod that joins should not wait for.
    fn resync(&mut self) {
        self.resynced = Some(Instant::now());
        self.read_pods();
        self.repair();
        self.end_joining();
        self.find_kubelets();
        self.sweep();
        self.make_room_for_nameservers();
    }

    fn read_pods(&mut self) {
        match self.parts.source.snapshot() {
            Ok(snapshot) => {
                for (entry, problem) in &snapshot.rejected {
                    tracing::warn!(%entry, %problem, "a pod of this node cannot be read");
                }
                self.read = Some(snapshot.pods);
            }
            Err(error) => {
                tracing::error!(%error, "the pods of this node are not known; those that are captured stay");
                let held = || self.held.values().map(|held| held.info.clone()).collect();
                self.read = self.read.is_some().then(held);
            }
        }
        // Here and not at each change of the mesh, since it costs two system calls for each pod.
        for (key, held) in &mut self.held {
            held.alive = self.enrolled.get(key).is_some_and(|e| is_same_namespace(&e.kernel));
        }
    }

    /// Keeps the DNS sockets of pods that are still there until a successor has taken over.
    async fn answer_on(mut self) {
        let handed_over = self.parts.handed_over.clone();
        loop {
            self.enrolled.retain(|_, enrolled| is_same_namespace(&enrolled.kernel));
            self.left.look(|_, kernel| is_same_namespace(kernel));
            tokio::select! {
                () = handed_over.cancelled() => return,
                () = tokio::time::sleep(RESYNC) => {}
            }
        }
    }

    async fn reconcile(&mut self) -> Option<Duration> {
        let state = self.parts.shared.state.load_full();
        self.apply_settings(&state);
        // Closed, nothing is lost by serving at once. Open, what goes on without an agent goes on until all pods are served.
        if self.told.as_ref().is_none_or(|told| told.fail == FailMode::Closed) {
            self.serve();
        }
        let node = &self.parts.shared.config.node.name;
        let assigned = self.parts.assigned.borrow().clone();
        let mut wanted = wanted(&state, node);
        add_wanted(&mut wanted, &assigned);
        let read = self.read.as_deref().unwrap_or_default();
        self.present = attribute(read, &self.held, &assigned, &state, node);
        self.ask_for_certificates(&wanted);
        let linger = self.parts.shared.config.capture.linger;
        let Plan { enrol, leave, release, missing, mut again } =
            plan(&wanted, &self.present, &mut self.held, Instant::now(), linger);
        for key in release {
            self.release(&key);
        }
        self.leave(leave).await;
        let present = &self.present;
        self.left.look(|key, kernel| {
            present.get(key).is_some_and(|info| info.uid == kernel.info.uid) && is_same_namespace(kernel)
        });
        // In order, as the map of the wanted ones is.
        let is_due = |key: &PodKey| enrol.binary_search(key).is_ok();
        self.problems.retain(|key, _| is_due(key));
        self.waiting_since.retain(|key, _| is_due(key));
        let mut asked: Option<Instant> = None;
        for key in enrol {
            if asked.is_none_or(|at| at.elapsed() >= SUCCESSION) {
                asked = Some(Instant::now());
                let run_dir = &self.parts.shared.config.admin.run_dir;
                self.parts.capture.yield_to_later(generations::has_later(run_dir));
            }
            let (Some(info), Some(pod)) = (self.present.get(&key).cloned(), wanted.get(&key)) else {
                continue;
            };
            if let Some(patience) = self.waits_for_certificate(&key, pod) {
                again = Some(again.map_or(patience, |again| again.min(patience)));
                continue;
            }
            self.enrol(&key, &info);
            // A thousand pods at once must not keep the other tasks of this thread waiting.
            tokio::task::yield_now().await;
        }
        self.apply_dns(&state, &wanted);
        self.tell_leaving(&state);
        self.publish(&state, &wanted, &missing);
        self.settle(&wanted);
        again
    }

    /// From here on the kernel programs hand connections to this agent.
    fn serve(&mut self) {
        if self.serving {
            return;
        }
        match self.parts.capture.serve() {
            Ok(()) => self.serving = true,
            Err(error) => tracing::error!(%error, "cannot show that this agent is alive"),
        }
    }

    /// Certificates are needed for wanted pods that the node has, and for captured ones until they are let go.
    fn ask_for_certificates(&self, wanted: &BTreeMap<PodKey, Wanted>) {
        let state = self.parts.shared.state.load();
        let here = wanted.iter().filter(|(key, _)| self.present.contains_key(key));
        let new = here.map(|(_, w)| &w.identity);
        let held = self.enrolled.values().filter_map(|e| state.local_workload(&e.pod.local));
        // Many pods share few identities.
        let needed: HashSet<_> = new.chain(held.map(|w| &w.identity)).collect();
        self.parts.shared.certificates.need(needed.into_iter().cloned().collect());
    }

    /// How long a pod still waits for its certificate, if it does.
    fn waits_for_certificate(&mut self, key: &PodKey, wanted: &Wanted) -> Option<Duration> {
        if self.parts.shared.certificates.get(&wanted.identity).is_some() {
            return None;
        }
        let since = *self.waiting_since.entry(key.clone()).or_insert_with(Instant::now);
        CERTIFICATE_PATIENCE.checked_sub(since.elapsed()).filter(|left| !left.is_zero())
    }

    fn enrol(&mut self, key: &PodKey, info: &PodInfo) {
        match self.capture(info) {
            Ok(enrolled) => {
                tracing::info!(pod = %enrolled.pod.label, cookie = enrolled.kernel.cookie, "captured");
                self.parts.shared.metrics.pods_started.inc();
                self.problems.remove(key);
                self.waiting_since.remove(key);
                let held = Held { info: info.clone(), unwanted_since: None, alive: true };
                self.held.insert(key.clone(), held);
                self.enrolled.insert(key.clone(), enrolled);
            }
            Err(error) => {
                let problem = error.to_string();
                if self.problems.get(key) != Some(&problem) {
                    tracing::error!(pod = %info, error = %problem, "cannot capture");
                }
                self.problems.insert(key.clone(), problem);
            }
        }
    }

    fn capture(&self, info: &PodInfo) -> Result<Enrolled, CaptureError> {
        let kernel = self.parts.capture.enrol(info)?;
        let outcome = self.serve_pod(info, Arc::clone(&kernel));
        if outcome.is_err()
            && let Err(error) = self.parts.capture.abandon(&kernel)
        {
            tracing::error!(%error, "cannot undo what was prepared for a pod");
        }
        outcome
    }

    /// Makes a prepared pod's listeners, has the workers serve them, and captures the pod.
    fn serve_pod(&self, info: &PodInfo, kernel: Arc<EnrolledPod>) -> Result<Enrolled, CaptureError> {
        let Parts { shared, capture, workers, dns, .. } = &self.parts;
        let failed = |action: &'static str| {
            let pod = info.to_string();
            move |source| CaptureError::Pod { pod, action, source }
        };
        let kinds = [
            (Kind::Outbound, ListenerKind::Outbound),
            (Kind::Plaintext, ListenerKind::Inbound),
            (Kind::Hbone, ListenerKind::Hbone),
        ];
        let groups = sys::listener_groups(&kernel.netns, kinds.len(), workers.len(), BACKLOG)
            .map_err(failed("make its listeners"))?;
        groups.iter().flatten().try_for_each(prepare_listener).map_err(failed("prepare its listeners"))?;
        // Registered before they are handed over: the kernel needs one of each group, alive or queued.
        for ((_, register), group) in kinds.iter().zip(&groups) {
            if let Some(first) = group.first() {
                capture.set_listener(&kernel, *register, first)?;
            }
        }
        let local =
            LocalWorkload::new(&info.namespace, &info.name, &info.service_account, &shared.config.node.name);
        let pod = Arc::new(Pod {
            uid: info.uid.clone(),
            local,
            label: format!("{}/{}", info.namespace, info.name),
            net: Box::new(KernelNet { capture: Arc::clone(capture), pod: Arc::clone(&kernel) }),
            gauge: shared.gauge.pod(&format!("{}/{}", info.namespace, info.name)),
            gone: CancellationToken::new(),
            left: CancellationToken::new(),
            leaving: Notify::new(),
        });
        let mut groups: Vec<_> = groups.into_iter().map(Vec::into_iter).collect();
        for worker in &**workers {
            let of_kind =
                |((kind, _), group): (&(Kind, _), &mut std::vec::IntoIter<_>)| Some((*kind, group.next()?));
            let sockets = kinds.iter().zip(&mut groups).filter_map(of_kind).collect();
            worker.tell(Command::Add(Arc::clone(&pod), Listeners { sockets }));
        }
        let activate = || {
            let serve = |dns: &dns::Server| dns.serve_pod(&kernel, capture, &shared.config.node.name);
            let dns = dns.as_ref().map(serve).transpose()?;
            if let Some(workload) = shared.state.load().local_workload(&pod.local) {
                capture.set_dns(&kernel, answers_dns(workload))?;
            }
            capture.activate(&kernel)?;
            Ok(dns)
        };
        match activate() {
            Ok(dns) => Ok(Enrolled { pod, kernel, since: Instant::now(), dns, endpoint: false }),
            Err(error) => {
                self.withdraw(&pod);
                Err(error)
            }
        }
    }

    /// Has the workers forget a pod, and end its connections.
    fn withdraw(&self, pod: &Arc<Pod>) {
        self.tell_workers(pod);
        pod.gone.cancel();
    }

    fn tell_workers(&self, pod: &Arc<Pod>) {
        for worker in &*self.parts.workers {
            worker.tell(Command::Remove(Arc::clone(pod)));
        }
    }

    /// Lets pods go that live on: outbound first, so that what was captured until then still reaches its listener.
    async fn leave(&mut self, keys: Vec<PodKey>) {
        let mut leaving = Vec::with_capacity(keys.len());
        for key in keys {
            self.held.remove(&key);
            let Some(enrolled) = self.enrolled.remove(&key) else { continue };
            if let Err(error) = self.parts.capture.let_out(&enrolled.kernel) {
                tracing::error!(%error, "new connections of a pod that leaves are still captured");
            }
            leaving.push((key, enrolled));
        }
        if leaving.is_empty() {
            return;
        }
        tokio::time::sleep(LAST_CONNECTS).await;
        for (key, Enrolled { pod, kernel, .. }) in leaving {
            tracing::info!(pod = %pod.label, connections = pod.gauge.open(), "left the mesh; what is open goes on");
            self.parts.shared.metrics.pods_stopped.inc();
            if let Err(error) = self.parts.capture.release(&kernel) {
                tracing::error!(%error, "cannot let go of a pod entirely");
            }
            pod.left.cancel();
            self.tell_workers(&pod);
            self.left.add(key, pod, kernel);
            tokio::task::yield_now().await;
        }
    }

    fn release(&mut self, key: &PodKey) {
        self.held.remove(key);
        let Some(enrolled) = self.enrolled.remove(key) else { return };
        tracing::info!(pod = %enrolled.pod.label, "gone");
        self.parts.shared.metrics.pods_stopped.inc();
        if let Err(error) = self.parts.capture.release(&enrolled.kernel) {
            tracing::error!(%error, "cannot let go of a pod entirely");
        }
        self.withdraw(&enrolled.pod);
    }

    /// Puts back what somebody took away: a detached program, a lost map entry.
    fn repair(&self) {
        for enrolled in self.enrolled.values() {
            if self.parts.capture.is_intact(&enrolled.kernel) {
                continue;
            }
            match self.parts.capture.activate(&enrolled.kernel) {
                Ok(()) => tracing::warn!(pod = %enrolled.pod.label, "capture was incomplete; repaired"),
                Err(error) => tracing::error!(%error, "capture is incomplete and cannot be repaired"),
            }
        }
    }

    fn end_joining(&self) {
        for enrolled in self.enrolled.values().filter(|enrolled| enrolled.since.elapsed() >= JOINING) {
            if let Err(error) = self.parts.capture.joined(&enrolled.kernel) {
                tracing::error!(%error, "a pod is taken for one that has just joined");
            }
        }
    }

    /// Tells the kernel programs what the mesh sets, when it changed. While no pod is wanted, what they were told holds.
    fn apply_settings(&mut self, state: &MeshState) {
        let config = &self.parts.shared.config;
        let mut wanted = match (InForce::of_mesh(state, config), &self.told) {
            (Some(wanted), _) => wanted,
            (None, None) => InForce::of_config(config),
            (None, Some(_)) => return,
        };
        if self.told.as_ref() != Some(&wanted.kernel) {
            match self.parts.capture.set_config(&wanted.kernel) {
                Ok(()) => {
                    for problem in &wanted.problems {
                        tracing::warn!(%problem, "a setting of the mesh cannot be carried out");
                    }
                    tracing::info!(settings = ?wanted.describe(), fail = wanted.fail(), "capture settings");
                    self.told = Some(wanted.kernel.clone());
                }
                Err(error) => {
                    tracing::error!(%error, "the settings of the mesh cannot be applied in full");
                    wanted.problems.push(format!("not applied in full: {error}"));
                }
            }
        }
        publish::change(&self.parts.in_force, wanted);
    }

    /// The queries of a pod that is no longer wanted go where it sends them: none is under way when it leaves.
    fn apply_dns(&self, state: &MeshState, wanted: &BTreeMap<PodKey, Wanted>) {
        for (key, enrolled) in &self.enrolled {
            let Some(workload) = state.local_workload(&enrolled.pod.local) else { continue };
            let answered = wanted.contains_key(key) && answers_dns(workload);
            if let Err(error) = self.parts.capture.set_dns(&enrolled.kernel, answered) {
                tracing::error!(%error, "whether a pod's DNS queries are answered cannot be changed");
            }
        }
    }

    /// Peers of pods that stopped being endpoints are told to look for others: GOAWAY on their tunnels.
    fn tell_leaving(&mut self, state: &MeshState) {
        for enrolled in self.enrolled.values_mut() {
            let workload = state.local_workload(&enrolled.pod.local);
            let endpoint = workload.is_some_and(|w| w.health == Health::Healthy);
            if std::mem::replace(&mut enrolled.endpoint, endpoint) && !endpoint {
                tracing::debug!(pod = %enrolled.pod.label, "no endpoint any more: its tunnels take no new connections");
                enrolled.pod.leaving.notify_waiters();
            }
        }
    }

    /// A kubelet that was restarted may be in a new cgroup under its path.
    fn find_kubelets(&mut self) {
        let id = |path: &PathBuf| std::fs::metadata(path).map(|m| m.ino()).ok();
        let given = &self.parts.shared.config.capture.kubelet_cgroups;
        let looked = self.looks_for_kubelets.as_mut().map(Kubelets::cgroups).unwrap_or_default();
        let mut found: Vec<u64> = given.iter().chain(&looked).filter_map(id).collect();
        found.sort_unstable();
        found.dedup();
        if found == self.kubelets {
            return;
        }
        match self.parts.capture.set_kubelet_cgroups(&found) {
            Ok(()) => self.kubelets = found,
            Err(error) => {
                tracing::error!(%error, "probes of the kubelet are captured like other connections")
            }
        }
    }

    /// Records of connections that never came to an accept.
    fn sweep(&mut self) {
        if self.swept.elapsed() < SWEEP_EVERY {
            return;
        }
        self.swept = Instant::now();
        match self.parts.capture.sweep(STALE) {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "stale records of connections removed"),
            Err(error) => tracing::error!(%error, "cannot remove stale records of connections"),
        }
    }

    /// A pod may ask any number of nameservers, though only so many at the same time.
    fn make_room_for_nameservers(&self) {
        match self.parts.capture.nameserver_ports() {
            Ok(taken) => {
                for Enrolled { kernel, dns, .. } in self.enrolled.values() {
                    if let (Some(dns), Some(taken)) = (dns, taken.get(&kernel.slot)) {
                        dns.make_room(taken);
                    }
                }
            }
            Err(error) => tracing::error!(%error, "cannot look for unused nameservers"),
        }
    }

    /// Why it is not known yet which pods the node has: then nothing of an earlier agent may be let go.
    fn unknown_pods(&self) -> Option<&'static str> {
        let Some(read) = &self.read else { return Some("the list of this node's pods") };
        let nameless = read.iter().any(|pod| pod.service_account.is_empty());
        let unknown = matches!(*self.parts.assigned.borrow(), Assigned::Unknown);
        (nameless && unknown).then_some("the service accounts of this node's pods")
    }

    /// After the first pass that left no pod waiting, the agent has taken over: what an earlier one captured and nobody
    /// wants any more is let go.
    fn settle(&mut self, wanted: &BTreeMap<PodKey, Wanted>) {
        if let Some(why) = self.unknown_pods() {
            self.parts.readiness.pending(READY, Some(why.to_owned()));
            return;
        }
        if !self.waiting_since.is_empty() {
            let names: Vec<_> =
                self.waiting_since.keys().map(|k| format!("{}/{}", k.namespace, k.name)).collect();
            self.parts.readiness.pending(READY, Some(format!("certificates of {}", names.join(", "))));
            return;
        }
        self.serve();
        self.parts.readiness.done(READY);
        if self.settled {
            return;
        }
        self.settled = true;
        match self.parts.capture.forget_unclaimed() {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "let go of pods that an earlier agent had captured"),
            Err(error) => tracing::error!(%error, "cannot let go of what an earlier agent left"),
        }
        tracing::info!(captured = self.enrolled.len(), wanted = wanted.len(), "serving");
    }
}

/// Whether the path of a pod's namespace still leads to the one that was captured.
fn is_same_namespace(pod: &EnrolledPod) -> bool {
    let behind_path = std::fs::metadata(&pod.info.netns).map(|m| m.ino());
    matches!((behind_path, pod.netns.inode()), (Ok(now), Ok(then)) if now == then)
}
