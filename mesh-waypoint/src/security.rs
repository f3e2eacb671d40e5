//! Who sent a request and whether they may.
//!
//! For every request, in Istio's order (the steps of services without policies cost nothing):
//!
//! 1. [`Policies::normalize`]: the path as policies, routes and the upstream see it; 400 where there is none.
//! 2. [`Policies::for_service`]: what applies to the service or workload that is addressed.
//! 3. [`ServicePolicies::ask`]: the external authorizers of CUSTOM policies that match ([`ext_authz`]).
//! 4. [`ServicePolicies::authenticate`]: tokens; 401. What it returns is applied to the headers, and its claims are
//!    those of the request's head from then on.
//! 5. [`ServicePolicies::check`]: DENY, then ALLOW; 403. For streams without requests: [`ServicePolicies::check_stream`].
//!
//! | module | for |
//! |---|---|
//! | [`path`] | normalisation of paths |
//! | [`authn`] | tokens: where they are, whether they hold, what they say |
//! | [`jwks`] | keys of issuers: inline or fetched in the background |
//! | [`authz`] | authorization policies |
//! | [`ext_authz`] | asking an external authorizer; no I/O |

pub mod authn;
pub mod authz;
pub mod ext_authz;
pub mod jwks;
pub mod path;
mod targets;
pub(crate) use targets::attach;
#[cfg(test)]
mod testing;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use crate::config::{Own, Resources};
use crate::request::{Addressed, Head};

/// Policies of all targets.
#[derive(Debug, Default)]
pub struct Policies {
    /// By `namespace/hostname`, the hostname in lower case; services that are not here have what [`Self::common`] says.
    services: HashMap<Str, Arc<ServicePolicies>>,
    /// Of the gateway and its class: what holds for all that is addressed.
    common: Arc<ServicePolicies>,
    normalization: l7::settings::PathNormalization,
    problems: Vec<Problem>,
}

/// What applies to one service, or to workloads.
#[derive(Debug, Default)]
pub struct ServicePolicies {
    authn: authn::Rules,
    authz: authz::PolicySet,
}

/// Something in a policy that cannot be honoured as it is written; it made the policy stricter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `Kind namespace/name`.
    pub object: String,
    /// Where in the object, for example `rules[0].from[1].ipBlocks`.
    pub field: String,
    /// What is wrong, what would be right, and what it means.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.field, self.message)
    }
}

impl Policies {
    /// Compiles the policies that are attached to this waypoint, its class or services.
    ///
    /// Depends on nothing but the policies and settings: a change of endpoints or routes needs no new one. `keys` is
    /// the process's store of keys, in which rules with a `jwksUri` find theirs.
    #[must_use]
    pub fn build(resources: &Resources, own: &Own, keys: &jwks::KeyStore) -> Self {
        targets::build(resources, own, keys)
    }

    /// What applies to what is addressed.
    #[must_use]
    pub fn for_service(&self, addressed: &Addressed) -> &Arc<ServicePolicies> {
        match addressed {
            Addressed::Service { key, .. } if !self.services.is_empty() => {
                let found = if key.bytes().any(|b| b.is_ascii_uppercase()) {
                    self.services.get(key.to_ascii_lowercase().as_str())
                } else {
                    self.services.get(key)
                };
                found.unwrap_or(&self.common)
            }
            Addressed::Service { .. } | Addressed::Workload { .. } | Addressed::Gateway { .. } => {
                &self.common
            }
        }
    }

    /// The path in the form that policies and routes compare and the upstream gets, as the mesh settings say.
    ///
    /// # Errors
    /// The path has no normal form: 400.
    pub fn normalize<'p>(&self, path: &'p str) -> Result<Cow<'p, str>, path::NotNormal> {
        path::normalize(path, self.normalization)
    }

    /// What could not be honoured as it is written.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl ServicePolicies {
    /// Whether nothing applies: every step returns at once.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.authn.is_empty() && self.authz.is_empty()
    }

    /// Whether a token may be looked for, so that [`Self::authenticate`] has to be called.
    #[must_use]
    pub fn has_token_rules(&self) -> bool {
        !self.authn.is_empty()
    }

    /// Which external authorizers have to allow the request. Claims are not known yet: rules about them count as
    /// matching.
    #[must_use]
    pub fn ask(&self, head: &Head<'_>) -> authz::Custom {
        self.authz.ask(head)
    }

    /// Verifies the tokens of a request; waits for keys only when none were fetched yet or the token names one that is
    /// not known, and at most as long as the rule's timeout.
    ///
    /// # Errors
    /// The answer to give, 401 or 403, with Envoy's texts.
    pub async fn authenticate(
        &self,
        head: &Head<'_>,
        now: SystemTime,
    ) -> Result<authn::Authenticated, authn::Refusal> {
        self.authn.authenticate(head, now).await
    }

    /// Whether the request may proceed: DENY policies, then ALLOW policies. With [`Head::claims`] of
    /// [`Self::authenticate`].
    #[must_use]
    pub fn check(&self, head: &Head<'_>) -> authz::Decision {
        self.authz.check(head)
    }

    /// Whether a stream that is no HTTP may proceed. What only requests have is unknown: an ALLOW rule about it does not
    /// match, a DENY rule does (as in Istio); a CUSTOM policy that may match refuses.
    #[must_use]
    pub fn check_stream(&self, stream: &authz::Stream<'_>) -> authz::Decision {
        self.authz.check_stream(stream)
    }
}

/// What the API calls an object.
fn object_name(origin: Option<&l7::Origin>) -> String {
    origin.map_or_else(
        || "policy without origin".to_owned(),
        |origin| format!("{} {}/{}", origin.kind, origin.namespace, origin.name),
    )
}
