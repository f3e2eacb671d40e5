//! The waypoint's own certificate: fetched at the start, renewed at half of its life, never on disk. While the authority
//! is away, one that is still valid stays in use.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use mesh_core::identity::SpiffeId;
use mesh_core::tls::{KeyAndCsr, Revocations, WorkloadCertificate};
use mesh_core::xds::ca::CaClient;
use tokio::sync::watch;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// However short lived a certificate is, the authority is not asked more often.
const SHORTEST_REST: Duration = Duration::from_secs(1);
/// A clock that was set forward is noticed within this time.
const LONGEST_NAP: Duration = Duration::from_secs(60);

/// Where the newest certificate is.
pub type Slot = Arc<ArcSwapOption<WorkloadCertificate>>;

/// How it stands with the certificate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// One was received.
    pub received: bool,
    /// Why the last fetch failed, if it did.
    pub problem: Option<String>,
}

/// Fetches certificates of `identity` for ever.
pub async fn keep(
    client: CaClient,
    identity: SpiffeId,
    lifetime: Duration,
    slot: Slot,
    status: watch::Sender<Status>,
) -> Infallible {
    let mut failures = 0;
    loop {
        let due = match fetch(&client, &identity, lifetime).await {
            Ok(certificate) => {
                failures = 0;
                let expires = humantime::format_rfc3339_seconds(certificate.not_after());
                tracing::info!(%identity, %expires, "certificate received");
                let due = certificate.renew_at().max(SystemTime::now() + SHORTEST_REST);
                slot.store(Some(Arc::new(certificate)));
                status.send_replace(Status { received: true, problem: None });
                due
            }
            Err(reason) => {
                let wait = backoff(failures, fastrand::f64());
                failures = failures.saturating_add(1);
                tracing::warn!(%identity, %reason, retry_in = ?wait, "no certificate");
                status.send_modify(|status| status.problem = Some(reason));
                SystemTime::now() + wait
            }
        };
        while let Ok(left) = due.duration_since(SystemTime::now()) {
            tokio::time::sleep(left.min(LONGEST_NAP)).await;
        }
    }
}

async fn fetch(
    client: &CaClient,
    identity: &SpiffeId,
    lifetime: Duration,
) -> Result<WorkloadCertificate, String> {
    let key = KeyAndCsr::generate(identity).map_err(|e| e.to_string())?;
    let chain = client.sign_own(key.csr_pem(), identity, lifetime).await.map_err(|e| e.to_string())?;
    WorkloadCertificate::new(key, &chain, &Revocations::default()).map_err(|e| e.to_string())
}

/// Doubles from 1 s to 150 s, give or take a fifth; `jitter` is in `0.0..1.0`.
fn backoff(failures: u32, jitter: f64) -> Duration {
    FIRST_RETRY.saturating_mul(1 << failures.min(10)).min(LAST_RETRY).mul_f64(0.8 + 0.4 * jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_double_up_to_two_and_a_half_minutes() {
        let waits: Vec<u64> = (0..10).map(|n| backoff(n, 0.5).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
        assert!(backoff(u32::MAX, 1.0) <= Duration::from_secs(180));
    }
}
