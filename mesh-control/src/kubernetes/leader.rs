//! One replica writes: the holder of a Lease (coordination.k8s.io).
//!
//! A holder that cannot renew in time stops writing before anyone else may start; one that stops gives the lease back. Times
//! are measured by this process's own clock from when it saw the lease change, so that clocks need not agree.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, Error};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

/// Name of the Lease.
const NAME: &str = "undermesh-leader";
/// A lease that was not renewed for this long may be taken.
const DURATION: Duration = Duration::from_secs(15);
/// The holder stops writing when it could not renew for this long.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// Takes part in the election.
pub struct Candidate {
    api: Api<Lease>,
    identity: String,
    leads: watch::Sender<bool>,
}

impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// What was seen of the lease.
#[derive(Debug, Default)]
struct Seen {
    holder: String,
    version: Option<String>,
    /// When it was first seen in this version.
    since: Option<Instant>,
}

impl Seen {
    /// Takes a reading; a new version counts from now.
    fn read(&mut self, lease: &Lease, now: Instant) {
        let holder = lease.spec.as_ref().and_then(|s| s.holder_identity.clone()).unwrap_or_default();
        if self.version != lease.metadata.resource_version {
            *self = Self { holder, version: lease.metadata.resource_version.clone(), since: Some(now) };
        }
    }

    /// Whether `identity` may write itself into the lease.
    fn is_free(&self, identity: &str, now: Instant) -> bool {
        self.holder.is_empty()
            || self.holder == identity
            || self.since.is_some_and(|since| now.duration_since(since) >= DURATION)
    }
}

impl Candidate {
    /// A candidate under a name that no other process has.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String) -> Self {
        Self { api: Api::namespaced(client, namespace), identity, leads: watch::Sender::new(false) }
    }

    /// Whether this process leads, now and whenever that changes.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Takes part until `stop` is true, then gives the lease back.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut seen = Seen::default();
        let mut renewed: Option<Instant> = None;
        loop {
            let asked = Instant::now();
            match timeout(DEADLINE / 2, self.attempt(&mut seen)).await {
                Ok(Ok(true)) => {
                    renewed = Some(asked);
                    self.set(true);
                }
                Ok(Ok(false)) => {
                    renewed = None;
                    self.set(false);
                }
                Ok(Err(error)) => warn!(%error, lease = NAME, "the lease cannot be read or written"),
                Err(_) => warn!(lease = NAME, "the API server does not answer about the lease"),
            }
            if renewed.is_some_and(|at| at.elapsed() >= DEADLINE) {
                renewed = None;
                self.set(false);
            }
            tokio::select! {
                () = sleep(PERIOD) => {}
                _ = stop.wait_for(|s| *s) => break,
            }
        }
        if *self.leads.borrow() {
            self.set(false);
            self.release(&seen).await;
        }
    }

    fn set(&self, leads: bool) {
        let changed = self.leads.send_if_modified(|now| std::mem::replace(now, leads) != leads);
        if changed && leads {
            info!(identity = self.identity, "this replica leads: it writes status, roots and gateways");
        } else if changed {
            info!(identity = self.identity, "this replica leads no longer");
        }
    }

    /// Reads the lease, and takes or renews it when it is free or ours.
    async fn attempt(&self, seen: &mut Seen) -> Result<bool, Error> {
        let Some(lease) = self.api.get_opt(NAME).await? else {
            return self.written(self.api.create(&PostParams::default(), &self.lease(None)).await, seen);
        };
        seen.read(&lease, Instant::now());
        if !seen.is_free(&self.identity, Instant::now()) {
            return Ok(false);
        }
        self.written(self.api.replace(NAME, &PostParams::default(), &self.lease(Some(&lease))).await, seen)
    }

    /// Whether the write won: somebody else's write in between is no error.
    fn written(&self, result: Result<Lease, Error>, seen: &mut Seen) -> Result<bool, Error> {
        match result {
            Ok(lease) => {
                seen.read(&lease, Instant::now());
                Ok(true)
            }
            Err(Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn lease(&self, before: Option<&Lease>) -> Lease {
        let old = before.and_then(|l| l.spec.clone()).unwrap_or_default();
        let same = old.holder_identity.as_deref() == Some(&self.identity);
        let now = MicroTime(Timestamp::now());
        let changes = old.lease_transitions.unwrap_or_default();
        Lease {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                resource_version: before.and_then(|l| l.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: if same { old.acquire_time } else { Some(now.clone()) },
                renew_time: Some(now),
                lease_transitions: Some(if same || before.is_none() { changes } else { changes + 1 }),
                ..LeaseSpec::default()
            }),
        }
    }

    async fn release(&self, seen: &Seen) {
        let mut lease = self.lease(None);
        lease.metadata.resource_version.clone_from(&seen.version);
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
        }
        // Who cannot give it back lets it run out.
        let _ = timeout(PERIOD, self.api.replace(NAME, &PostParams::default(), &lease)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, version: &str) -> Lease {
        Lease {
            metadata: ObjectMeta { resource_version: Some(version.into()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec { holder_identity: Some(holder.into()), ..LeaseSpec::default() }),
        }
    }

    #[test]
    fn a_lease_is_free_when_nobody_holds_it_or_its_holder_was_silent_for_its_whole_length() {
        let start = Instant::now();
        let mut seen = Seen::default();
        seen.read(&lease("b", "1"), start);
        assert!(!seen.is_free("a", start + DURATION - Duration::from_millis(1)));
        assert!(seen.is_free("b", start));
        assert!(seen.is_free("a", start + DURATION));
        seen.read(&lease("b", "1"), start + DURATION / 2);
        assert!(seen.is_free("a", start + DURATION), "the same version again is silence");
        seen.read(&lease("b", "2"), start + DURATION / 2);
        assert!(!seen.is_free("a", start + DURATION), "it was renewed");
        seen.read(&lease("", "3"), start + DURATION);
        assert!(seen.is_free("a", start + DURATION), "it was given back");
    }
}
