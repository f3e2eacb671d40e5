//! What the agent says about itself: admin over loopback and a unix socket, metrics, readiness.
//!
//! The types are [`mesh_core::admin`]'s, which `meshctl` reads; the config dump has ztunnel's shape, which Kiali reads.

mod dump;
pub mod figures;
mod flows;
mod status;

use std::future::ready;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use http::{Method, StatusCode};
use mesh_core::admin::Pod;
use mesh_core::admin::http::{Ask, Handler, Reply, json, reply, text};
use mesh_core::admin::readiness::Readiness;
use mesh_core::telemetry::{Logging, scrape};
use mesh_core::why::{self, Question};
use mesh_core::xds::client::Status;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::capture::{self, Capture};
use crate::control::authority::CaStatus;
use crate::pods::DirectorySource;
use crate::proxy::Shared;
use crate::proxy::worker::Worker;
use crate::trace::Tracer;

/// What the endpoints read.
pub struct Admin {
    /// Shared with the workers.
    pub shared: Arc<Shared>,
    /// Who serves.
    pub workers: Rc<Vec<Worker>>,
    /// The kernel side.
    pub capture: Arc<Capture>,
    /// What is pending.
    pub readiness: Arc<Readiness>,
    /// All metrics.
    pub registry: Registry,
    /// Level changes.
    pub logging: Logging,
    /// The workload feed.
    pub xds: watch::Receiver<Status>,
    /// The certificate authority.
    pub ca: watch::Receiver<CaStatus>,
    /// Pods of this node.
    pub pods: watch::Receiver<Vec<Pod>>,
    /// What capture was told.
    pub in_force: watch::Receiver<crate::control::settings::InForce>,
    /// Connections of the fast path.
    pub fast_path: watch::Receiver<Vec<crate::fastpath::Flow>>,
    /// What tells of connections and packets, unless it is turned off.
    pub tracer: Option<Arc<Tracer>>,
    /// When this agent started, milliseconds since the epoch.
    pub started_ms: u64,
    /// Starts the drain.
    pub quit: CancellationToken,
}

const HELP: &str = "\
GET  /status          this agent and its node at a glance
GET  /pods            pods of this node that are enrolled or should be
GET  /connections     tunnels and inbound connections by pod
GET  /failures        the last failed connections, newest first
GET  /why?src=&dst=&port=   why a connection is allowed, denied or lost
GET  /certs           certificates of this node's pods
GET  /config_dump     workloads, services, policies, certificates, settings
GET  /capture         counters of the kernel programs
GET  /doctor          what this machine lacks for the mesh
GET  /fastpath        pairs and connections that the kernel carries
GET  /flows?last=     what happened to connections and packets, as JSON lines; goes on with ?since=&wait=
GET  /sockets         connections of pods that are open now
GET  /logging         log levels in force
POST /logging?level=  change them: a level, target=level, or reset
POST /kernel_log?on=true|false   diagnostics of the kernel programs
POST /trace?on=true|false        flow tracing
POST /quitquitquit    drain and exit
";

/// Answers the admin port and socket.
pub(crate) fn handler(admin: Rc<Admin>) -> Handler {
    Rc::new(move |ask| answer(Rc::clone(&admin), ask))
}

fn answer(admin: Rc<Admin>, ask: Ask) -> LocalBoxFuture<'static, Reply> {
    let get = ask.method == Method::GET;
    match (ask.path.as_str(), get) {
        ("/connections", true) => connections(admin).boxed_local(),
        ("/doctor", true) => probes(admin).boxed_local(),
        ("/flows", true) => flows::flows(admin, ask).boxed_local(),
        _ => ready(answer_now(&admin, &ask)).boxed_local(),
    }
}

fn answer_now(admin: &Admin, ask: &Ask) -> Reply {
    let post = ask.method == Method::POST;
    match (ask.path.as_str(), ask.method == Method::GET) {
        ("/" | "/help", true) => text(StatusCode::OK, HELP),
        ("/status", true) => json(&status::status(admin)),
        ("/pods", true) => json(&*admin.pods.borrow()),
        ("/failures", true) => json(&admin.shared.failures.newest()),
        ("/certs", true) => json(&dump::certificates(&admin.shared.certificates)),
        ("/config_dump", true) => json(&dump::config_dump(admin)),
        ("/why", true) => why(admin, ask),
        ("/capture", true) => match admin.capture.counters() {
            Ok(counters) => json(&counters),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        ("/sockets", true) => flows::sockets(admin),
        ("/fastpath", true) => json(&*admin.fast_path.borrow()),
        ("/logging", true) => text(StatusCode::OK, format!("{}\n", admin.logging.level())),
        ("/logging", false) if post => set_level(admin, ask),
        ("/kernel_log", false) if post => set_kernel_log(admin, ask),
        ("/trace", false) if post => flows::turn(admin, ask),
        ("/quitquitquit", false) if post => {
            admin.quit.cancel();
            text(StatusCode::OK, "draining\n")
        }
        (path, _) if HELP.contains(&format!("{path} ")) || HELP.contains(&format!("{path}?")) => {
            text(StatusCode::METHOD_NOT_ALLOWED, format!("{} is not for {path}\n{HELP}", ask.method))
        }
        (path, _) => text(StatusCode::NOT_FOUND, format!("nothing at {path}\n{HELP}")),
    }
}

/// Probes the machine on a thread of its own: it waits for the kernel's verifier and for real connections.
async fn probes(admin: Rc<Admin>) -> Reply {
    let given = admin.shared.config.capture.bpf_object.clone();
    let object = given.map_or(capture::ObjectSource::Embedded, capture::ObjectSource::File);
    let pods = DirectorySource::new(admin.shared.config.capture.pods_dir.clone());
    match tokio::task::spawn_blocking(move || capture::doctor::examine(&object, &pods)).await {
        Ok(probes) => json(&probes),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("the probes failed: {error}\n")),
    }
}

async fn connections(admin: Rc<Admin>) -> Reply {
    let mut described = Vec::new();
    for worker in &*admin.workers {
        described.extend(worker.describe().await);
    }
    described.sort_by(|a, b| (&a.pod, a.worker).cmp(&(&b.pod, b.worker)));
    json(&described)
}

fn why(admin: &Admin, ask: &Ask) -> Reply {
    let parameter = |name| ask.parameter(name).unwrap_or_default();
    let port = match ask.parameter("port").map(|p| p.parse::<u16>()) {
        Some(Ok(port)) => Some(port),
        None => None,
        Some(Err(_)) => {
            return text(StatusCode::BAD_REQUEST, "port: give a number from 1 to 65535\n");
        }
    };
    let question = match Question::new(&parameter("src"), &parameter("dst"), port) {
        Ok(question) => question,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    match why::explain(&admin.shared.state.load(), &question, &status::facts(admin)) {
        Ok(explanation) => json(&explanation),
        Err(error) => {
            let mut answer = json(&error);
            *answer.status_mut() = StatusCode::NOT_FOUND;
            answer
        }
    }
}

fn set_level(admin: &Admin, ask: &Ask) -> Reply {
    let Some(level) = ask.parameter("level") else {
        return text(StatusCode::BAD_REQUEST, "give ?level=info, ?level=access=off, or ?level=reset\n");
    };
    match admin.logging.set(&level) {
        Ok(now) => text(StatusCode::OK, format!("{now}\n")),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

fn set_kernel_log(admin: &Admin, ask: &Ask) -> Reply {
    let on = match ask.parameter("on").as_deref() {
        Some("true") => true,
        Some("false") => false,
        _ => return text(StatusCode::BAD_REQUEST, "give ?on=true or ?on=false\n"),
    };
    match admin.capture.set_kernel_log(on) {
        Ok(()) => text(StatusCode::OK, format!("kernel diagnostics: {on}\n")),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Answers the metrics port.
pub(crate) fn metrics(admin: Rc<Admin>) -> Handler {
    Rc::new(move |ask| {
        let answer = match ask.path.as_str() {
            "/metrics" | "/stats/prometheus" => match scrape(&admin.registry, Some(&ask.accept)) {
                Ok((content_type, body)) => reply(StatusCode::OK, content_type, body),
                Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "a metric cannot be written as text\n"),
            },
            _ => text(StatusCode::NOT_FOUND, "metrics are at /metrics and /stats/prometheus\n"),
        };
        ready(answer).boxed_local()
    })
}
