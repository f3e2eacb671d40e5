//! The certificates of this node's pods: fetched ahead of need, renewed at half of their life, never on disk.
//!
//! One task on the control runtime owns the [`schedule`]; everybody else reads an immutable map. A connection that
//! finds no certificate asks for it with the highest priority and waits. While the authority is away, certificates
//! that are still valid stay in use.

pub mod schedule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures_util::StreamExt as _;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use mesh_core::identity::SpiffeId;
use mesh_core::tls::WorkloadCertificate;
use tokio::sync::{mpsc, watch};

use schedule::{Priority, Schedule, Validity};

/// What is known of one identity's certificate.
#[derive(Debug, Clone, Default)]
pub struct Slot {
    /// The newest certificate; it may have expired.
    pub certificate: Option<Arc<WorkloadCertificate>>,
    /// Why the last fetch failed, if it did.
    pub failure: Option<Arc<str>>,
}

type Slots = HashMap<SpiffeId, Slot>;

/// Why there is no certificate to use.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertError {
    /// The authority said no, or could not be asked.
    #[error("no certificate for {identity}: {reason}")]
    Failed {
        /// Whose.
        identity: SpiffeId,
        /// The authority's answer.
        reason: Arc<str>,
    },
    /// The one there is has expired.
    #[error("the certificate of {identity} expired and was not renewed: {reason}")]
    Expired {
        /// Whose.
        identity: SpiffeId,
        /// Why it was not renewed.
        reason: Arc<str>,
    },
    /// The authority has not answered in time.
    #[error("no certificate for {identity} after {waited:?}: the certificate authority has not answered")]
    Late {
        /// Whose.
        identity: SpiffeId,
        /// How long the connection waited.
        waited: Duration,
    },
}

enum Ask {
    /// Exactly these identities are needed by pods of the node.
    Needed(BTreeSet<SpiffeId>),
    /// A connection waits.
    Now(SpiffeId),
}

/// A reader of the store. Cheap to clone; reading takes no lock.
#[derive(Clone)]
pub struct Certificates {
    slots: Arc<ArcSwap<Slots>>,
    ask: mpsc::UnboundedSender<Ask>,
    changed: watch::Receiver<u64>,
}

/// Who signs certificates. The real one is the control plane; tests have their own.
pub trait Authority: 'static {
    /// Fetches a certificate for `identity`.
    ///
    /// # Errors
    /// Text for people: what the authority answered, or why it could not be asked.
    fn fetch(&self, identity: &SpiffeId) -> LocalBoxFuture<'_, Result<WorkloadCertificate, String>>;
}

impl Certificates {
    /// The usable certificate of `identity`, if there is one.
    #[must_use]
    pub fn get(&self, identity: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        self.slots.load().get(identity)?.certificate.clone().filter(|c| c.not_after() > SystemTime::now())
    }

    /// As [`Certificates::get`], else waits up to `patience` for the authority.
    ///
    /// # Errors
    /// [`CertError`] with the authority's answer.
    pub async fn wait(
        &self,
        identity: &SpiffeId,
        patience: Duration,
    ) -> Result<Arc<WorkloadCertificate>, CertError> {
        if let Some(certificate) = self.get(identity) {
            return Ok(certificate);
        }
        let mut changed = self.changed.clone();
        changed.mark_unchanged();
        // The task lives as long as the agent; when it is gone the wait below ends with the reason.
        let _ = self.ask.send(Ask::Now(identity.clone()));
        let arrival = async {
            loop {
                if changed.changed().await.is_err() {
                    return None;
                }
                if let Some(certificate) = self.get(identity) {
                    return Some(certificate);
                }
            }
        };
        match tokio::time::timeout(patience, arrival).await {
            Ok(Some(certificate)) => Ok(certificate),
            _ => Err(self.why_not(identity, patience)),
        }
    }

    fn why_not(&self, identity: &SpiffeId, waited: Duration) -> CertError {
        let identity = identity.clone();
        match self.slots.load().get(&identity).cloned().unwrap_or_default() {
            Slot { certificate: Some(_), failure } => {
                CertError::Expired { identity, reason: failure.unwrap_or_else(|| "no answer yet".into()) }
            }
            Slot { failure: Some(reason), .. } => CertError::Failed { identity, reason },
            Slot { .. } => CertError::Late { identity, waited },
        }
    }

    /// Says which identities pods of this node need; others are forgotten.
    pub fn need(&self, identities: BTreeSet<SpiffeId>) {
        // As in `wait`: without the task there is nothing to tell.
        let _ = self.ask.send(Ask::Needed(identities));
    }

    /// Everything known, for the config dump.
    #[must_use]
    pub fn snapshot(&self) -> Arc<HashMap<SpiffeId, Slot>> {
        self.slots.load_full()
    }

    /// Changes whenever a certificate or failure arrives.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }
}

/// Creates the store: the reader, and the task that the control runtime runs.
pub fn store(authority: impl Authority) -> (Certificates, impl Future<Output = ()>) {
    let (ask, asked) = mpsc::unbounded_channel();
    let (changed_tx, changed) = watch::channel(0);
    let slots = Arc::new(ArcSwap::default());
    let keeper = Keeper {
        schedule: Schedule::default(),
        needed: BTreeSet::new(),
        slots: Arc::clone(&slots),
        changed: changed_tx,
    };
    (Certificates { slots, ask, changed }, keeper.run(asked, authority))
}

struct Keeper {
    schedule: Schedule,
    needed: BTreeSet<SpiffeId>,
    slots: Arc<ArcSwap<Slots>>,
    changed: watch::Sender<u64>,
}

impl Keeper {
    async fn run(mut self, mut asked: mpsc::UnboundedReceiver<Ask>, authority: impl Authority) {
        let mut fetches = FuturesUnordered::new();
        loop {
            while let Some(id) = self.schedule.next(SystemTime::now()) {
                tracing::debug!(identity = %id, "fetching a certificate");
                let authority = &authority;
                fetches.push(async move {
                    let result = authority.fetch(&id).await;
                    (id, result)
                });
            }
            // Woken at least once a minute, so that a clock that was set forward is noticed.
            let nap = self
                .schedule
                .wake_at()
                .map_or(Duration::from_secs(60), |at| {
                    at.duration_since(SystemTime::now()).unwrap_or_default()
                })
                .clamp(Duration::from_millis(10), Duration::from_secs(60));
            tokio::select! {
                ask = asked.recv() => match ask {
                    Some(ask) => self.on_ask(ask),
                    None => return,
                },
                Some((id, result)) = fetches.next() => self.on_result(&id, result),
                () = tokio::time::sleep(nap) => {}
            }
        }
    }

    fn on_ask(&mut self, ask: Ask) {
        let now = SystemTime::now();
        match ask {
            Ask::Now(id) if self.needed.contains(&id) => self.schedule.want(&id, Priority::RealTime, now),
            // Only identities of pods of this node are asked for, whatever a connection wants.
            Ask::Now(id) => tracing::warn!(identity = %id, "no pod of this node has this identity"),
            Ask::Needed(needed) => {
                let gone: Vec<SpiffeId> =
                    self.schedule.wanted().filter(|id| !needed.contains(*id)).cloned().collect();
                for id in &gone {
                    self.schedule.forget(id);
                }
                for id in &needed {
                    self.schedule.want(id, Priority::Warmup, now);
                }
                if !gone.is_empty() {
                    let mut slots = Slots::clone(&self.slots.load());
                    slots.retain(|id, _| needed.contains(id));
                    self.slots.store(Arc::new(slots));
                }
                self.needed = needed;
            }
        }
    }

    fn on_result(&mut self, id: &SpiffeId, result: Result<WorkloadCertificate, String>) {
        let now = SystemTime::now();
        match result {
            Ok(certificate) => {
                let (not_before, not_after) = (certificate.not_before(), certificate.not_after());
                if let Some(held) = self.held_sooner(id, not_before, now) {
                    tracing::warn!(
                        identity = %id,
                        valid_from = %humantime::format_rfc3339_seconds(not_before),
                        "the authority's clock is ahead of ours: its certificate holds only later, the other is kept"
                    );
                    return self.schedule.succeeded(id, held, now);
                }
                tracing::info!(identity = %id, expires = %humantime::format_rfc3339_seconds(not_after), "certificate received");
                self.schedule.succeeded(id, Validity { not_before, not_after }, now);
                let certificate = Arc::new(certificate);
                self.publish(id, |slot| *slot = Slot { certificate: Some(certificate), failure: None });
            }
            Err(reason) => {
                let retry = self.schedule.failed(id, now, fastrand::f64());
                let wait = retry.and_then(|at| at.duration_since(now).ok()).unwrap_or_default();
                tracing::warn!(identity = %id, %reason, retry_in = ?wait, "no certificate");
                self.publish(id, |slot| slot.failure = Some(reason.into()));
            }
        }
    }

    /// The certificate that is there, if a new one would hold only later than it. An authority whose clock is ahead would
    /// else push the moment from which we have one before it for ever.
    fn held_sooner(&self, id: &SpiffeId, not_before: SystemTime, now: SystemTime) -> Option<Validity> {
        let slots = self.slots.load();
        let held = slots.get(id)?.certificate.as_ref()?;
        let sooner = not_before > now && held.not_before() < not_before && held.not_after() > now;
        sooner.then(|| Validity { not_before: held.not_before(), not_after: held.not_after() })
    }

    fn publish(&self, id: &SpiffeId, change: impl FnOnce(&mut Slot)) {
        if !self.needed.contains(id) {
            return;
        }
        let mut slots = Slots::clone(&self.slots.load());
        change(slots.entry(id.clone()).or_default());
        self.slots.store(Arc::new(slots));
        self.changed.send_modify(|n| *n += 1);
    }
}
