//! What the certificates of this node's identities are worth: pure.
//!
//! Looked at when certificates or revocation lists change and when one expires, not for every pair: checking a chain
//! costs a signature check.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::time::SystemTime;

use mesh_core::identity::SpiffeId;

use crate::certs::Slot;

/// The identities that have a certificate.
#[derive(Debug, Default)]
pub struct Identities {
    known: HashMap<SpiffeId, Standing>,
}

#[derive(Debug)]
struct Standing {
    revoked: bool,
    not_after: SystemTime,
}

impl Identities {
    /// Looks at every certificate, under the revocation lists of this moment.
    #[must_use]
    pub fn of(slots: &HashMap<SpiffeId, Slot>) -> Self {
        let standing = |(id, slot): (&SpiffeId, &Slot)| {
            let certificate = slot.certificate.as_ref()?;
            // A certificate stands for its identity here as it does before a peer.
            let revoked = certificate.recheck_peer(certificate.chain()).is_err();
            Some((id.clone(), Standing { revoked, not_after: certificate.not_after() }))
        };
        Self { known: slots.iter().filter_map(standing).collect() }
    }

    /// Whether an identity has a certificate that holds: new connections need one.
    #[must_use]
    pub fn vouch_for(&self, identity: &SpiffeId, now: SystemTime) -> bool {
        self.known.get(identity).is_some_and(|standing| standing.holds(now))
    }

    /// Whether an identity is known to have lost its certificate: its connections end. One whose certificate was not
    /// fetched yet, as after a restart without the authority, has lost nothing.
    #[must_use]
    pub fn disown(&self, identity: &SpiffeId, now: SystemTime) -> bool {
        self.known.get(identity).is_some_and(|standing| !standing.holds(now))
    }

    /// Whether any certificate expired between two moments.
    #[must_use]
    pub fn expired_between(&self, before: SystemTime, now: SystemTime) -> bool {
        self.known.values().any(|standing| before < standing.not_after && standing.not_after <= now)
    }
}

impl Standing {
    fn holds(&self, now: SystemTime) -> bool {
        !self.revoked && now < self.not_after
    }
}
