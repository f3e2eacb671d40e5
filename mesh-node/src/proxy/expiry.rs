//! Until when a tunnel may take new streams: as long as the certificates that it was made with hold. What it carries
//! already goes on.

use std::time::{Duration, SystemTime};

use mesh_core::tls::{WorkloadCertificate, expiry};
use rustls::pki_types::CertificateDer;

/// The wall clock may be set while a timer runs, so that it is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// The first second in which one of a tunnel's certificates does not hold any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expiry(SystemTime);

impl Expiry {
    /// Of a tunnel with this certificate of ours and that chain of the peer's.
    pub(super) fn of(own: &WorkloadCertificate, peer: &[CertificateDer<'_>]) -> Self {
        // The handshake has read them, so that there is an end; and the second that it names still counts.
        let last = [own.chain(), peer].into_iter().filter_map(expiry).min().unwrap_or(SystemTime::UNIX_EPOCH);
        Self(last + Duration::from_secs(1))
    }

    /// Whether it is over.
    pub(super) fn has_passed(self) -> bool {
        self.0 <= SystemTime::now()
    }

    /// Resolves when it is over.
    pub(super) async fn passed(self) {
        while let Ok(left) = self.0.duration_since(SystemTime::now())
            && !left.is_zero()
        {
            tokio::time::sleep(left.min(LOOK_AGAIN)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_passes_when_its_moment_has_come_and_not_before() {
        let now = SystemTime::now();
        assert!(Expiry(now).has_passed());
        assert!(!Expiry(now + Duration::from_secs(5)).has_passed());
    }

    #[tokio::test]
    async fn who_waits_for_it_is_woken_at_its_moment() {
        let soon = Expiry(SystemTime::now() + Duration::from_millis(50));
        soon.passed().await;
        assert!(soon.has_passed());
    }
}
