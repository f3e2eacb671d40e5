//! From flags to a running waypoint, and from a signal to its end.
//!
//! The calling thread becomes the control runtime; data workers and the writers of logs are threads of their own. The
//! tunnel port opens once there are a certificate and a first snapshot: until then peers find nobody rather than
//! somebody who knows nothing.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_core::admin::http;
use mesh_core::admin::readiness::{self, Readiness};
use mesh_core::signals::Signals;
use mesh_core::telemetry::{
    AccessLog, LogSettings, Logging, ProcessCollector, RequestMetrics, TcpMetrics, register_build,
};
use mesh_core::xds::ca::CaClient;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Admin};
use crate::cli::Config;
use crate::config::Snapshot;
use crate::proxy::Shared;
use crate::proxy::worker::Worker;
use crate::security::jwks::{KeyStore, Roots};
use crate::telemetry::Telemetry;
use crate::trace::export::Counts;
use crate::{certificate, feed};

/// What readiness waits for.
const CERTIFICATE: &str = "certificate";
const SNAPSHOT: &str = "configuration";
/// How often a draining waypoint looks whether its requests have ended.
const DRAIN_POLL: Duration = Duration::from_millis(100);
/// A draining waypoint stays at least this long: peers learn from it that they are to go elsewhere.
const DRAIN_LEAST: Duration = Duration::from_secs(2);
/// How long the last lines of the access log may take to be written.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Runs the waypoint until it has drained.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config) -> anyhow::Result<()> {
    let settings = LogSettings::from_env()?;
    let logging = settings.start()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make the control runtime's event loop")?;
    let log = tokio::task::LocalSet::new().block_on(&runtime, serve(config, &settings, logging))?;
    if !log.flush(LAST_LINES) {
        eprintln!("the last lines of the access log were not written: nobody reads them");
    }
    Ok(())
}

async fn serve(config: Config, settings: &LogSettings, logging: Logging) -> anyhow::Result<AccessLog> {
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let (telemetry, registry) = telemetry(&config, settings)?;
    let access_log = telemetry.access_log.clone();
    let readiness = Arc::new(Readiness::new(&[CERTIFICATE, SNAPSHOT]));
    let (snapshots, snapshot) = watch::channel(None);
    let (xds_status, xds) = watch::channel(Default::default());
    let (certificate_tx, certificate_status) = watch::channel(certificate::Status::default());
    let certificate = certificate::Slot::default();

    tokio::task::spawn_local(certificate::keep(
        CaClient::new(config.ca.clone()),
        config.identity.clone(),
        config.secret_ttl,
        Arc::clone(&certificate),
        certificate_tx,
    ));
    let (keys, fetcher) = KeyStore::new(Roots::System);
    tokio::task::spawn_local(fetcher.run());
    let followed = config.clone();
    tokio::task::spawn_local(async move {
        let publish = |snapshot| drop(snapshots.send_replace(Some(snapshot)));
        feed::follow(&followed, keys, publish, &xds_status).await
    });
    let admin = Rc::new(Admin {
        config: config.clone(),
        snapshot: snapshot.clone(),
        certificate: Arc::clone(&certificate),
        certificate_status: certificate_status.clone(),
        xds,
        readiness: Arc::clone(&readiness),
        registry,
        logging,
        shared: RefCell::default(),
        quit: CancellationToken::new(),
    });
    open_ports(&config, &admin)?;
    let first = tokio::select! {
        first = prerequisites(snapshot.clone(), certificate_status, &readiness) => first?,
        () = signals.next() => return Ok(access_log),
        () = admin.quit.cancelled() => return Ok(access_log),
    };
    let shared = Arc::new(Shared::new(config, first, certificate, telemetry));
    *admin.shared.borrow_mut() = Some(Arc::clone(&shared));
    let workers: Result<Vec<_>, _> =
        (0..shared.config.workers).map(|index| Worker::start(index, Arc::clone(&shared))).collect();
    let workers = workers.with_context(|| format!("cannot listen on {}", shared.config.listen))?;
    readiness.done(SNAPSHOT);
    tokio::task::spawn_local(pass_on(snapshot, Arc::clone(&shared)));
    tokio::select! {
        () = signals.next() => {}
        () = admin.quit.cancelled() => {}
    }
    readiness.pending("draining", None);
    drain(&shared, &mut signals).await;
    drop(workers);
    Ok(access_log)
}

fn telemetry(config: &Config, settings: &LogSettings) -> anyhow::Result<(Telemetry, Registry)> {
    let mut registry = Registry::default();
    let dropped = Counter::default();
    registry.register(
        "undermesh_access_log_dropped",
        "Lines that the log did not keep up with",
        dropped.clone(),
    );
    let spans = Counts::default();
    for (name, help, counter) in [
        ("undermesh_waypoint_spans_sent", "Spans that collectors took", &spans.sent),
        ("undermesh_waypoint_spans_lost", "Spans that no collector took", &spans.lost),
        (
            "undermesh_waypoint_log_lines_sent",
            "Lines of the access log that collectors took",
            &spans.lines_sent,
        ),
        ("undermesh_waypoint_log_lines_lost", "Lines of it that no collector took", &spans.lines_lost),
    ] {
        registry.register(name, help, counter.clone());
    }
    let streams = Gauge::default();
    registry.register("undermesh_waypoint_streams_open", "Streams of clients' tunnels", streams.clone());
    register_build(&mut registry, "proxy", env!("CARGO_PKG_VERSION"));
    registry.register_collector(Box::new(ProcessCollector));
    let access_log = AccessLog::start(settings.format, Box::new(std::io::stdout()), dropped)
        .context("cannot start the access log's thread")?;
    let telemetry = Telemetry {
        requests: RequestMetrics::register(&mut registry),
        tcp: TcpMetrics::register(&mut registry),
        access_log,
        log_requests: config.access_log,
        spans,
        streams,
    };
    Ok((telemetry, registry))
}

/// Waits for the certificate and the first snapshot.
async fn prerequisites(
    mut snapshot: watch::Receiver<Option<Arc<Snapshot>>>,
    mut certificate: watch::Receiver<certificate::Status>,
    readiness: &Readiness,
) -> anyhow::Result<Arc<Snapshot>> {
    let certificate = async {
        let received = certificate.wait_for(|status| {
            readiness.pending(CERTIFICATE, status.problem.clone());
            status.received
        });
        received.await.context("the task of the certificate ended")?;
        readiness.done(CERTIFICATE);
        anyhow::Ok(())
    };
    let first = async {
        let first =
            snapshot.wait_for(Option::is_some).await.context("the task of the configuration ended")?;
        first.clone().context("there is no first snapshot")
    };
    let (first, ()) = futures_util::future::try_join(first, certificate).await?;
    Ok(first)
}

/// Gives each further snapshot to the workers.
async fn pass_on(mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>, shared: Arc<Shared>) {
    loop {
        if let Some(snapshot) = snapshots.borrow_and_update().clone() {
            shared.publish(snapshot);
        }
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}

/// Takes nothing new and lets requests end, until none is left, the limit is reached or a second signal comes.
async fn drain(shared: &Shared, signals: &mut Signals) {
    let limit = shared.config.drain_limit;
    tracing::info!(?limit, streams = shared.open(), "draining");
    shared.drain.cancel();
    let began = Instant::now();
    loop {
        let open = shared.open() + shared.tunnels();
        if open == 0 && began.elapsed() >= DRAIN_LEAST {
            return tracing::info!("drained");
        }
        if began.elapsed() >= limit {
            return tracing::warn!(open, "drain limit reached; closing what is left");
        }
        tokio::select! {
            () = signals.next() => return tracing::warn!(open, "told to leave at once; closing what is left"),
            () = tokio::time::sleep(DRAIN_POLL) => {}
        }
    }
}

fn open_ports(config: &Config, admin: &Rc<Admin>) -> anyhow::Result<()> {
    let bind = |address: SocketAddr, what: &str| {
        http::bind(address).with_context(|| format!("cannot listen on {address} for {what}"))
    };
    for (listener, handler) in [
        (bind(config.admin, "admin")?, admin::handler(Rc::clone(admin))),
        (bind(config.metrics, "metrics")?, admin::metrics(Rc::clone(admin))),
        (bind(config.readiness, "readiness")?, readiness::handler(Arc::clone(&admin.readiness))),
    ] {
        // They answer to the end: who drains is asked how it goes.
        tokio::task::spawn_local(http::serve_tcp(listener, handler, CancellationToken::new()));
    }
    Ok(())
}
