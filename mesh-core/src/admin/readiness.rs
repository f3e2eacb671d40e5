//! What must have happened before the agent is ready.

use std::collections::BTreeMap;
use std::future::ready;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt as _;
use http::StatusCode;

use super::http::{Handler, text};

/// The list of what is pending: name and, if it failed, why.
#[derive(Debug)]
pub struct Readiness(Mutex<BTreeMap<String, Option<String>>>);

impl Readiness {
    /// Not ready until each of `pending` is done.
    pub fn new(pending: &[&str]) -> Self {
        Self(Mutex::new(pending.iter().map(|name| ((*name).to_owned(), None)).collect()))
    }

    /// Marks `name` as done.
    pub fn done(&self, name: &str) {
        self.lock().remove(name);
    }

    /// Marks `name` as not done, with the reason if there is one.
    pub fn pending(&self, name: &str, reason: Option<String>) {
        self.lock().insert(name.to_owned(), reason);
    }

    /// One line per pending item; empty when ready.
    #[must_use]
    pub fn list(&self) -> Vec<String> {
        let line = |(name, reason): (&String, &Option<String>)| match reason {
            Some(reason) => format!("{name}: {reason}"),
            None => name.clone(),
        };
        self.lock().iter().map(line).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Option<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers the readiness port.
#[must_use]
pub fn handler(readiness: Arc<Readiness>) -> Handler {
    Rc::new(move |ask| {
        let pending = readiness.list();
        let answer = match ask.path.as_str() {
            "/healthz/ready" if pending.is_empty() => text(StatusCode::OK, "ready\n"),
            "/healthz/ready" => {
                let list = pending.join("\n");
                text(StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, waiting for:\n{list}\n"))
            }
            _ => text(StatusCode::NOT_FOUND, "readiness is at /healthz/ready\n"),
        };
        ready(answer).boxed_local()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_when_nothing_is_pending() {
        let readiness = Readiness::new(&["workloads", "policies"]);
        readiness.done("workloads");
        readiness.pending("policies", Some("refused".to_owned()));
        assert_eq!(readiness.list(), ["policies: refused"]);
        readiness.done("policies");
        assert!(readiness.list().is_empty());
    }
}
