//! From settings to a running agent, and from a signal to its end.
//!
//! The calling thread becomes the control runtime; data workers, the heartbeat and the log writer are threads of their
//! own. Nothing of the control runtime runs on a worker.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use mesh_core::admin::Fitness;
use mesh_core::policy::UnknownPolicy;
use mesh_core::signals::Signals;
use mesh_core::state::{MeshOptions, StateIndex};
use mesh_core::telemetry::{
    AccessLog, Listener, LogSettings, Logging, NodeMetrics, ProcessCollector, TcpMetrics, Telemetry,
    register_build,
};
use mesh_core::tls::Revocations;
use mesh_core::xds::again::Again;
use mesh_core::xds::ca::CaClient;
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::admin::figures::Figures;
use crate::admin::{self, Admin};
use crate::capture::{Capture, CaptureConfig, EnrolledPod, ObjectSource, cgroup_directory};
use crate::certs;
use crate::cni;
use crate::config::{Config, TracedPods};
use crate::control::authority::GrpcAuthority;
use crate::control::enrol::{Enroller, Parts};
use crate::control::settings::InForce;
use crate::control::{self, report, revocations};
use crate::dns;
use crate::fastpath;
use crate::generations::{Phase, Registration};
use crate::link;
use crate::pods::{CriSource, DirectorySource, PodSource};
use crate::proxy::Shared;
use crate::proxy::failures::{Failures, now_ms};
use crate::proxy::limits::{Gauge, Limits, connections_for_files, raise_open_files};
use crate::proxy::worker::Worker;
use crate::trace::spans::{Collector, Counts};
use crate::trace::{self, Tracer};
use mesh_core::admin::http;
use mesh_core::admin::readiness::{self, Readiness};

/// The agent's own resolver configuration.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Offers for the fast path that wait for the controller.
const CANDIDATES: usize = 1024;
/// How often a draining agent looks whether its connections have ended.
const DRAIN_POLL: Duration = Duration::from_millis(200);
/// A draining agent stays at least this long: connections that were under way to its listeners still come.
const DRAIN_LEAST: Duration = Duration::from_secs(4);
/// Told to leave, an agent serves on for this long: in a restart, the next one starts only now.
const HEIR_COMES: Duration = Duration::from_secs(2);
/// How long it serves on while the next one gets ready.
const HEIR_SERVES: Duration = Duration::from_secs(30);
/// How often it looks.
const HEIR_POLL: Duration = Duration::from_millis(50);

/// How often it is looked whether this agent serves.
const READY_POLL: Duration = Duration::from_millis(100);
/// Names of connections to applications between two looks.
const NAMES: usize = 8192;
/// Room for what the kernel tells between two looks.
const TRACE_BYTES: u32 = 1 << 20;
/// How long the last lines of the access log may take to be written.
const LAST_LINES: Duration = Duration::from_secs(2);

/// What the kernel side is told.
#[must_use]
pub fn capture_config(config: &Config) -> CaptureConfig {
    let object = config.capture.bpf_object.clone();
    let mut kernel = CaptureConfig::new(object.map_or(ObjectSource::Embedded, ObjectSource::File));
    let given = |path: &std::path::PathBuf| (!path.as_os_str().is_empty()).then(|| path.clone());
    kernel.host_cgroup = given(&config.capture.host_cgroup);
    kernel.pods_cgroup = given(&config.capture.pods_cgroup);
    // An agent of a container runtime is in a pod, and sees the node's processes: the first is the node's own.
    kernel.node_netns = config.capture.cri_socket.is_some().then(|| "/proc/1/ns/net".into());
    kernel.pins = Some(config.capture.pin_dir.clone());
    kernel.settings = InForce::of_config(config).kernel;
    kernel.keep_settings = true;
    kernel.silent_start = true;
    if config.trace.enabled {
        kernel.limits.trace_bytes = TRACE_BYTES;
    }
    kernel
}

/// Runs the agent until it has drained.
///
/// # Errors
/// What kept it from starting, with the fix where there is one.
pub fn run(config: Config) -> anyhow::Result<()> {
    crate::sys::bound_heap();
    let settings = LogSettings::from_env()?;
    let logging = settings.start()?;
    let files = raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make the control runtime's event loop")?;
    // Connections that are still open end with the set of tasks, each with its line.
    let log = tokio::task::LocalSet::new().block_on(&runtime, serve(config, settings, logging, files))?;
    if !log.flush(LAST_LINES) {
        eprintln!("the last lines of the access log were not written: nobody reads them");
    }
    Ok(())
}

/// Where this node's pods are found, and, with a container runtime, what it says of cgroups where the operator does not.
fn find_pods(config: &mut Config) -> anyhow::Result<Pods> {
    let capture = &mut config.capture;
    let Some(socket) = &capture.cri_socket else {
        let source = Arc::new(DirectorySource::new(capture.pods_dir.clone()));
        return Ok(Pods { source, runtime: None, kubelets_below: None });
    };
    let source = Arc::new(CriSource::start(socket)?);
    let given = !capture.host_cgroup.as_os_str().is_empty();
    capture.host_cgroup = cgroup_directory(given.then_some(capture.host_cgroup.as_path()))?;
    if capture.pods_cgroup.as_os_str().is_empty() {
        match source.pods_cgroup().map(|pods| capture.host_cgroup.join(pods)).filter(|path| path.is_dir()) {
            Some(path) => capture.pods_cgroup = path,
            None => tracing::warn!(
                "the container runtime names no cgroup of this node's pods: connections are captured at the root of \
                 cgroup2 (give --pods-cgroup)"
            ),
        }
    }
    tracing::info!(host = %capture.host_cgroup.display(), pods = %capture.pods_cgroup.display(), "cgroups");
    let kubelets_below = capture.kubelet_cgroups.is_empty().then(|| capture.host_cgroup.clone());
    Ok(Pods { source: Arc::clone(&source) as _, runtime: Some(source), kubelets_below })
}

/// What is found about this node's pods.
struct Pods {
    source: Arc<dyn PodSource>,
    /// The same, where it is a container runtime.
    runtime: Option<Arc<CriSource>>,
    kubelets_below: Option<std::path::PathBuf>,
}

async fn serve(
    mut config: Config,
    settings: LogSettings,
    logging: Logging,
    files: usize,
) -> anyhow::Result<AccessLog> {
    let started_ms = now_ms();
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let run_dir = config.admin.run_dir.clone();
    let mut registration = Registration::new(&run_dir).with_context(|| {
        format!("cannot use the run directory {}; give a writable --run-dir", run_dir.display())
    })?;
    let pods = find_pods(&mut config)?;
    let capture = Arc::new(Capture::load(capture_config(&config))?);

    let mut registry = Registry::default();
    let metrics = NodeMetrics::register(&mut registry);
    let tcp = TcpMetrics::register(&mut registry);
    register_build(&mut registry, "ztunnel", env!("CARGO_PKG_VERSION"));
    registry.register_collector(Box::new(ProcessCollector));
    let output = Box::new(std::io::stdout());
    let known: Arc<OnceLock<Arc<Shared>>> = Arc::default();
    let (name, named) = std::sync::mpsc::sync_channel(NAMES);
    let tracer = start_tracing(&config, &capture, &known, named, &mut registry);
    let listener = tracer.clone().map(|tracer| -> Listener { Box::new(move |record| tracer.record(record)) });
    let access_log =
        AccessLog::start_with(settings.format, output, metrics.access_log_dropped.clone(), listener)
            .context("cannot start the access log's thread")?;

    let lists = Revocations::default();
    if let Some(path) = &config.ca.crl {
        revocations::load(path, &lists);
    }
    let (ca_status, ca) = watch::channel(Default::default());
    let again = Again::default();
    let client = CaClient::new(control::ca_server(&config, &again));
    let authority = GrpcAuthority::new(client, config.ca.secret_ttl, lists.clone(), ca_status);
    let (certificates, keeper) = certs::store(authority);
    tokio::task::spawn_local(keeper);

    let (candidates, offered) = mpsc::channel(CANDIDATES);
    let limit = match config.proxy.max_connections {
        0 => connections_for_files(files),
        given => given,
    };
    tracing::info!(files, connections = limit, workers = config.proxy.workers, "limits");
    let options =
        MeshOptions { network: config.node.network.as_str().into(), unknown_policy: UnknownPolicy::Deny };
    let shared = Arc::new(Shared {
        state: ArcSwap::new(StateIndex::new(options).snapshot()),
        published: watch::channel(0).0,
        certificates,
        telemetry: Telemetry { tcp, access_log },
        metrics,
        gauge: Gauge::new(Limits {
            node: limit,
            per_pod: config.proxy.max_connections_per_pod,
            fair_share: config.proxy.fair_share,
            memory: crate::memory::limit(config.proxy.max_memory_mib),
        }),
        failures: Failures::default(),
        candidates,
        fast_path_policies: ArcSwap::default(),
        named: tracer.is_some().then_some(name),
        again,
        drain: CancellationToken::new(),
        config,
    });
    // Set once, here.
    let _ = known.set(Arc::clone(&shared));
    let workers: Result<Vec<_>, _> =
        (0..shared.config.proxy.workers).map(|index| Worker::start(index, Arc::clone(&shared))).collect();
    let workers = Rc::new(workers.context("cannot start the data workers")?);
    let dns = start_dns(&shared, &mut registry, tracer.clone())?;
    registry.register_collector(Box::new(Figures::new(Arc::clone(&capture), Arc::clone(&shared.gauge))));
    let readiness = Arc::new(Readiness::new(&PENDING));
    let handed_over = CancellationToken::new();
    let mut tasks = Tasks { shared, workers, capture, tracer, readiness, dns, handed_over };
    let admin = tasks.start(pods, offered, ca, lists, registry, logging, started_ms);
    tasks.answer_questions(&admin);
    let log = tasks.shared.telemetry.access_log.clone();
    let ports = Ports::open(&tasks, &admin, &registration)?;
    tasks.until_told(&mut signals, &mut registration, &admin.quit).await;
    ports.close();
    tasks.drain(&mut signals, &mut registration).await;
    Ok(log)
}

/// Has the CNI plugin hold pods' starts, from when this agent serves until it drains: what the plugin asks then is answered
/// by a successor, and without one by the state file.
async fn hold_starts(parts: cni::server::Parts, readiness: Arc<Readiness>) {
    let drain = parts.shared.drain.clone();
    while !readiness.list().is_empty() {
        tokio::select! {
            () = drain.cancelled() => return,
            () = tokio::time::sleep(READY_POLL) => {}
        }
    }
    let config = &parts.shared.config;
    let places = cni::install::Places {
        bin_dir: config.cni.bin_dir.clone(),
        conf_dir: config.cni.conf_dir.clone(),
        run_dir: config.admin.run_dir.clone(),
        state_dir: config.cni.state_dir.clone(),
    };
    let serve = async {
        if let Err(error) = cni::server::serve(parts).await {
            tracing::error!(%error, "pods' starts are not held: the CNI plugin's socket cannot be made");
        }
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = drain.cancelled() => {}
        () = serve => {}
        () = cni::install::keep(places) => {}
    }
}

/// Flow tracing, unless it is turned off. An agent that cannot trace serves all the same.
fn start_tracing(
    config: &Config,
    capture: &Arc<Capture>,
    known: &Arc<OnceLock<Arc<Shared>>>,
    named: std::sync::mpsc::Receiver<trace::join::Named>,
    registry: &mut Registry,
) -> Option<Arc<Tracer>> {
    if !config.trace.enabled {
        return None;
    }
    let known = Arc::clone(known);
    let nothing = (Arc::default(), Arc::default());
    let parts = trace::run::Parts {
        capture: Arc::clone(capture),
        config: capture_config(config),
        state: Arc::new(move || {
            known.get().map_or_else(
                || nothing.clone(),
                |shared: &Arc<Shared>| (shared.state.load_full(), shared.fast_path_policies.load_full()),
            )
        }),
        named,
        flows: trace::Flows::new(&config.node.name, config.trace.kept),
        sample: config.trace.sample,
    };
    match Tracer::start(parts) {
        Ok(tracer) => {
            for probe in tracer.hooks().iter().filter(|probe| probe.state != Fitness::Ok) {
                tracing::warn!(hook = %probe.name, detail = %probe.detail, cost = %probe.cost, "tracing is degraded");
            }
            let help = "Addresses of pods whose connections are traced";
            registry.register("undermesh_trace_addresses", help, tracer.addresses());
            let counting = Arc::clone(&tracer);
            registry.register_collector(Box::new(trace::pairs::PairMetrics {
                pairs: tracer.pairs(),
                counted: Box::new(move || counting.counted()),
            }));
            Some(tracer)
        }
        Err(error) => {
            tracing::warn!(%error, "connections are not traced");
            None
        }
    }
}

/// The DNS proxy, if the agent answers pods' queries.
fn start_dns(
    shared: &Arc<Shared>,
    registry: &mut Registry,
    tracer: Option<Arc<Tracer>>,
) -> anyhow::Result<Option<dns::Server>> {
    let config = &shared.config;
    if !config.capture.dns {
        return Ok(None);
    }
    let fallback = std::fs::read_to_string(RESOLV_CONF).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read {RESOLV_CONF}: only servers that pods ask are asked");
        String::new()
    });
    let preferred = &config.node.preferred_service_namespace;
    let settings = dns::Settings {
        rules: dns::Rules {
            domain: dns::ClusterDomain::new(&config.node.cluster_domain),
            preferred_namespace: (!preferred.is_empty()).then(|| preferred.clone()),
        },
        fallback: dns::resolv::nameservers(&fallback),
        limits: dns::Limits::default(),
    };
    let mut metrics = dns::Metrics::register(&shared.metrics, registry);
    if let Some(tracer) = tracer {
        metrics = metrics.with_listener(Arc::new(move |pod, dns, took| tracer.answered(pod, dns, took)));
    }
    let state = Arc::clone(shared);
    let server = dns::Server::start(settings, Arc::new(move || state.state.load_full()), metrics);
    server.map(Some).context("cannot start the DNS thread")
}

const PENDING: [&str; 2] = [control::READY, control::enrol::READY];

/// What runs.
struct Tasks {
    shared: Arc<Shared>,
    workers: Rc<Vec<Worker>>,
    capture: Arc<Capture>,
    /// None where nothing is traced.
    tracer: Option<Arc<Tracer>>,
    readiness: Arc<Readiness>,
    /// Taken by the enroller.
    dns: Option<dns::Server>,
    /// Told when a successor serves the node.
    handed_over: CancellationToken,
}

impl Tasks {
    /// Starts every task of the control runtime.
    #[allow(clippy::too_many_arguments, reason = "each is made before, and used here once")]
    fn start(
        &mut self,
        found: Pods,
        offered: mpsc::Receiver<fastpath::Candidate>,
        ca: watch::Receiver<control::authority::CaStatus>,
        lists: Revocations,
        registry: Registry,
        logging: Logging,
        started_ms: u64,
    ) -> Rc<Admin> {
        let (synced_tx, synced) = watch::channel(false);
        let (xds_tx, xds) = watch::channel(Default::default());
        let (report_tx, reports) = watch::channel(Default::default());
        let (assigned_tx, assigned) = watch::channel(Default::default());
        let (pods_tx, pods) = watch::channel(Vec::new());
        let (settings_tx, in_force) = watch::channel(InForce::of_config(&self.shared.config));
        let (enrolled_tx, enrolled) = watch::channel(Arc::default());
        let (flows_tx, flows) = watch::channel(Vec::new());
        let config = &self.shared.config;
        tokio::task::spawn_local(control::follow(
            Arc::clone(&self.shared),
            Rc::clone(&self.workers),
            Arc::clone(&self.readiness),
            synced_tx,
            xds_tx,
        ));
        if let Some(source) = found.runtime.filter(|_| !config.cni.bin_dir.as_os_str().is_empty()) {
            let parts = cni::server::Parts {
                source,
                assigned: assigned.clone(),
                enrolled: enrolled.clone(),
                status: pods.clone(),
                in_force: in_force.clone(),
                shared: Arc::clone(&self.shared),
            };
            tokio::task::spawn_local(hold_starts(parts, Arc::clone(&self.readiness)));
        }
        let node_pods = Arc::clone(&found.source);
        let enroller = Enroller::new(Parts {
            shared: Arc::clone(&self.shared),
            capture: Arc::clone(&self.capture),
            dns: self.dns.take(),
            workers: Rc::clone(&self.workers),
            source: found.source,
            kubelets_below: found.kubelets_below,
            assigned,
            readiness: Arc::clone(&self.readiness),
            report: report_tx,
            status: pods_tx,
            in_force: settings_tx,
            enrolled: enrolled_tx,
            handed_over: self.handed_over.clone(),
        });
        tokio::task::spawn_local(enroller.run(synced));
        let server = control::xds_server(config, &self.shared.again);
        tokio::task::spawn_local(async move { report::run(&server, reports, assigned_tx).await });
        let revoked = self.keep_house(lists);
        self.follow_traced(enrolled.clone(), node_pods);
        tokio::task::spawn_local(fastpath::run(
            Arc::clone(&self.shared),
            Arc::clone(&self.capture),
            enrolled,
            offered,
            flows_tx,
            revoked,
        ));
        Rc::new(Admin {
            shared: Arc::clone(&self.shared),
            workers: Rc::clone(&self.workers),
            capture: Arc::clone(&self.capture),
            readiness: Arc::clone(&self.readiness),
            registry,
            logging,
            xds,
            ca,
            pods,
            in_force,
            fast_path: flows,
            tracer: self.tracer.clone(),
            started_ms,
            quit: CancellationToken::new(),
        })
    }

    /// Gives memory back, keeps to its limit, and follows the revocation lists; told whenever those end connections.
    fn keep_house(&self, lists: Revocations) -> Rc<Notify> {
        let gauge = &self.shared.gauge;
        tokio::task::spawn_local(crate::memory::give_back(Arc::clone(gauge)));
        if gauge.memory_limit() != usize::MAX {
            tokio::task::spawn_local(crate::memory::watch(Arc::clone(gauge)));
        }
        let revoked = Rc::new(Notify::new());
        if let Some(path) = self.shared.config.ca.crl.clone() {
            let (workers, told) = (Rc::clone(&self.workers), Rc::clone(&revoked));
            tokio::task::spawn_local(async move { revocations::follow(&path, &lists, workers, told).await });
        }
        revoked
    }

    /// Keeps the traced pods what they are on the node, and tells the control plane of them, until a successor does.
    fn follow_traced(&self, enrolled: watch::Receiver<Arc<Vec<Arc<EnrolledPod>>>>, pods: Arc<dyn PodSource>) {
        let Some(tracer) = &self.tracer else { return };
        let source = (self.shared.config.trace.pods == TracedPods::All).then_some(pods);
        let done = self.handed_over.clone();
        let (followed, published) = (Arc::clone(tracer), self.shared.published.subscribe());
        tokio::task::spawn_local(trace::run::follow(followed, enrolled, published, source, done.clone()));
        let (server, tracer) =
            (control::xds_server(&self.shared.config, &self.shared.again), Arc::clone(tracer));
        let telling = async move { control::relay::run(&server, tracer).await };
        tokio::task::spawn_local(done.clone().run_until_cancelled_owned(telling));
        let to = self.shared.config.trace.spans.as_deref().and_then(|to| to.parse::<Collector>().ok());
        if let (Some(to), Some(tracer)) = (to, &self.tracer) {
            let (tracer, metrics) = (Arc::clone(tracer), &self.shared.metrics);
            let counts = Counts { sent: metrics.spans_sent.clone(), lost: metrics.spans_lost.clone() };
            let sending = async move { trace::spans::run(&to, tracer, counts).await };
            tokio::task::spawn_local(done.run_until_cancelled_owned(sending));
        }
    }

    /// Tells the control plane what the admin endpoint would say, until a successor does.
    fn answer_questions(&self, admin: &Rc<Admin>) {
        let server = control::xds_server(&self.shared.config, &self.shared.again);
        let admin = admin::handler(Rc::clone(admin));
        let answering = async move { control::answers::run(&server, admin).await };
        tokio::task::spawn_local(self.handed_over.clone().run_until_cancelled_owned(answering));
    }

    /// Serves until a signal or the admin endpoint ends it.
    async fn until_told(
        &self,
        signals: &mut Signals,
        registration: &mut Registration,
        quit: &CancellationToken,
    ) {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        loop {
            tokio::select! {
                () = signals.next() => return,
                () = quit.cancelled() => return,
                _ = second.tick() => {
                    let ready = self.readiness.list().is_empty();
                    let phase = if ready { Phase::Serving } else { Phase::Starting };
                    note(registration, phase, self.shared.gauge.open());
                }
            }
        }
    }

    /// Serves on until a successor does, and tells whether one does. One that has started is waited for; none may come.
    async fn succession(&self, signals: &mut Signals, registration: &Registration) -> bool {
        let began = Instant::now();
        while !registration.has_successor() {
            let patience = if registration.has_heir() { HEIR_SERVES } else { HEIR_COMES };
            if began.elapsed() >= patience {
                return false;
            }
            tokio::select! {
                () = signals.next() => return false,
                () = tokio::time::sleep(HEIR_POLL) => {}
            }
        }
        true
    }

    /// Takes nothing new and lets connections end, until none is left, the limit is reached or a second signal comes.
    async fn drain(self, signals: &mut Signals, registration: &mut Registration) {
        let limit = self.shared.config.drain.limit;
        let successor = self.succession(signals, registration).await;
        tracing::info!(successor, ?limit, connections = self.shared.gauge.open(), "draining");
        if successor {
            self.handed_over.cancel();
        } else {
            // From here on the mesh's fail mode decides about new connections.
            self.capture.retire();
        }
        self.shared.drain.cancel();
        let began = Instant::now();
        let mut noted = Instant::now();
        note(registration, Phase::Draining, self.shared.gauge.open());
        loop {
            let open = self.shared.gauge.open();
            if open == 0 && began.elapsed() >= DRAIN_LEAST {
                tracing::info!("drained");
                return;
            }
            if began.elapsed() >= limit {
                tracing::warn!(open, "drain limit reached; closing what is left");
                return;
            }
            if noted.elapsed() >= Duration::from_secs(1) {
                noted = Instant::now();
                note(registration, Phase::Draining, open);
                if registration.has_successor() {
                    self.handed_over.cancel();
                }
                let most = self.shared.config.drain.memory_mib;
                if registration.must_make_room(most.saturating_mul(1 << 20)) {
                    tracing::warn!(
                        open,
                        most,
                        "draining agents hold more than --drain-memory; closing what is left"
                    );
                    return;
                }
            }
            tokio::select! {
                () = signals.next() => {
                    tracing::warn!(open, "told to leave at once; closing what is left");
                    return;
                }
                () = tokio::time::sleep(DRAIN_POLL) => {}
            }
        }
    }
}

/// Other agents and people read it; an agent that cannot write it goes on serving.
fn note(registration: &mut Registration, phase: Phase, connections: usize) {
    if let Err(error) = registration.update(phase, connections) {
        tracing::warn!(%error, "cannot update this agent's file in the run directory");
    }
}

/// The node's own ports.
struct Ports(CancellationToken);

impl Ports {
    fn open(tasks: &Tasks, admin: &Rc<Admin>, registration: &Registration) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let settings = &tasks.shared.config.admin;
        let bind = |address: SocketAddr, what: &str| {
            http::bind(address).with_context(|| format!("cannot listen on {address} for {what}"))
        };
        let handler = admin::handler(Rc::clone(admin));
        for (listener, handler) in [
            (bind(settings.address, "admin")?, Rc::clone(&handler)),
            (bind(settings.metrics, "metrics")?, admin::metrics(Rc::clone(admin))),
            (bind(settings.readiness, "readiness")?, readiness::handler(Arc::clone(&tasks.readiness))),
        ] {
            tokio::task::spawn_local(http::serve_tcp(listener, handler, stop.clone()));
        }
        // The unix socket stays while the agent drains, so that it can still be asked.
        let link = registration.admin_socket();
        let path = link.socket();
        let socket =
            http::bind_unix(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        tokio::task::spawn_local(http::serve_unix(socket, handler, CancellationToken::new()));
        link.take().context("cannot point admin.sock at this agent")?;
        tokio::task::spawn_local(async move { link.keep(link::LOOKED_AFTER).await });
        Ok(Self(stop))
    }

    /// Leaves the ports to a successor.
    fn close(&self) {
        self.0.cancel();
    }
}
