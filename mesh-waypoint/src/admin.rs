//! What the waypoint says about itself: admin over loopback, metrics, readiness.

use std::cell::RefCell;
use std::future::ready;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use http::{Method, StatusCode};
use mesh_core::admin::http::{Ask, Handler, Reply, json, reply, text};
use mesh_core::admin::readiness::Readiness;
use mesh_core::tap::Filter;
use mesh_core::telemetry::{Logging, scrape};
use mesh_core::xds::client::Status;
use prometheus_client::registry::Registry;
use serde_json::{Value, json as object};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::certificate;
use crate::cli::Config;
use crate::config::Snapshot;
use crate::proxy::Shared;
use crate::tap::{self, Interest};

/// What the endpoints read.
pub struct Admin {
    /// Settings.
    pub config: Config,
    /// The newest snapshot, once there is one.
    pub snapshot: watch::Receiver<Option<Arc<Snapshot>>>,
    /// The waypoint's certificate.
    pub certificate: certificate::Slot,
    /// How it stands with it.
    pub certificate_status: watch::Receiver<certificate::Status>,
    /// The control plane's feed.
    pub xds: watch::Receiver<Status>,
    /// What is pending.
    pub readiness: Arc<Readiness>,
    /// All metrics.
    pub registry: Registry,
    /// Level changes.
    pub logging: Logging,
    /// What the workers share, once they run.
    pub shared: RefCell<Option<Arc<Shared>>>,
    /// Starts the drain.
    pub quit: CancellationToken,
}

const HELP: &str = "\
GET  /status          this waypoint at a glance
GET  /config_dump     workloads, services, certificate, settings
GET  /clusters        backends that have been used: policies, endpoints, counts, ejections
GET  /routes          rules of each host in the order in which they are tried, with their hits
GET  /tap             requests that end from now on (listener=, since=, wait=; host=, path=, method=, status=, identity=)
GET  /logging         log levels in force
POST /logging?level=  change them: a level, target=level, or reset
POST /quitquitquit    drain and exit
";

/// Answers the admin port.
#[must_use]
pub fn handler(admin: Rc<Admin>) -> Handler {
    Rc::new(move |ask| {
        if ask.method == Method::GET && ask.path == "/tap" {
            let admin = Rc::clone(&admin);
            return async move { tapped(&admin, &ask).await }.boxed_local();
        }
        ready(answer(&admin, &ask)).boxed_local()
    })
}

fn answer(admin: &Admin, ask: &Ask) -> Reply {
    let post = ask.method == Method::POST;
    match (ask.path.as_str(), ask.method == Method::GET) {
        ("/" | "/help", true) => text(StatusCode::OK, HELP),
        ("/status", true) => json(&status(admin)),
        ("/config_dump", true) => json(&dump(admin)),
        ("/clusters", true) => json(&clusters(admin)),
        ("/routes", true) => {
            json(&admin.snapshot.borrow().as_ref().map(|s| s.routes.dump()).unwrap_or_default())
        }
        ("/logging", true) => text(StatusCode::OK, format!("{}\n", admin.logging.level())),
        ("/logging", false) if post => set_level(admin, ask),
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

fn status(admin: &Admin) -> Value {
    let xds = admin.xds.borrow();
    let rejected: Vec<String> = xds.rejected.iter().map(|r| format!("{}: {}", r.name, r.reason)).collect();
    object!({
        "waypoint": format!("{}/{}", admin.config.own.namespace, admin.config.own.gateway),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "pending": admin.readiness.list(),
        "identity": admin.config.identity.to_string(),
        "certificateProblem": admin.certificate_status.borrow().problem,
        "xds": {
            "connected": xds.connected,
            "synced": xds.synced,
            "resources": xds.held,
            "problem": xds.last_error,
            "rejected": rejected,
        },
    })
}

fn clusters(admin: &Admin) -> Value {
    let shared = admin.shared.borrow();
    let used = shared.as_ref().map(|shared| shared.clusters.all()).unwrap_or_default();
    let now = Instant::now();
    used.iter().map(|cluster| cluster.dump(now)).collect()
}

/// What a listener has not heard yet; waits for something to come where nothing has.
async fn tapped(admin: &Admin, ask: &Ask) -> Reply {
    let bad = |text: String| text_reply(StatusCode::BAD_REQUEST, &text);
    let Some(listener) = ask.parameter("listener").filter(|id| !id.is_empty() && id.len() <= 64) else {
        return bad("give listener=, a name of your own of at most 64 characters".to_owned());
    };
    let number = |name: &str| ask.parameter(name).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let filter = match Filter::parse(|name| ask.parameter(name)) {
        Ok(filter) => filter,
        Err(error) => return bad(error.to_string()),
    };
    let Some(shared) = admin.shared.borrow().clone() else {
        return text_reply(StatusCode::SERVICE_UNAVAILABLE, "this waypoint has not started yet");
    };
    let until = Instant::now() + Duration::from_secs(number("wait")).min(tap::LONGEST);
    let nobody = shared.tap.interest() == Interest::None;
    let heard = match shared.tap.listener(&listener, filter, until) {
        Ok(listener) => listener,
        Err(error) => return text_reply(StatusCode::TOO_MANY_REQUESTS, &error.to_string()),
    };
    if nobody {
        tokio::task::spawn_local(async move {
            while let Some(next) = shared.tap.forget(Instant::now()) {
                tokio::time::sleep_until(next.into()).await;
            }
        });
    }
    json(&heard.heard(number("since"), until).await)
}

fn text_reply(status: StatusCode, problem: &str) -> Reply {
    text(status, format!("{problem}\n"))
}

fn dump(admin: &Admin) -> Value {
    let snapshot = admin.snapshot.borrow();
    let mesh = snapshot.as_ref().map(|s| Arc::clone(&s.mesh)).unwrap_or_default();
    let certificate = admin.certificate.load();
    let date = |at| humantime::format_rfc3339_seconds(at).to_string();
    object!({
        "workloads": mesh.dump_workloads(),
        "services": mesh.dump_services(),
        "labels": snapshot.as_ref().map(|s| s.labels.len()),
        "certificates": certificate.iter().map(|c| object!({
            "identity": admin.config.identity.to_string(),
            "serialNumber": c.serial(),
            "validFrom": date(c.not_before()),
            "expirationTime": date(c.not_after()),
        })).collect::<Vec<_>>(),
        "version": { "version": env!("CARGO_PKG_VERSION"), "component": "waypoint" },
        "settings": &admin.config,
    })
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

/// Answers the metrics port.
#[must_use]
pub fn metrics(admin: Rc<Admin>) -> Handler {
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
