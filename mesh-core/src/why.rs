//! Why a connection would be allowed, denied or not arrive, and which object decides.
//!
//! [`explain`] walks the same way as a connection does: who the two ends are, whether they are enrolled, where the
//! connection is routed ([`crate::route`]), what the destination's policies say ([`crate::policy`]), whether there
//! are certificates, and what really failed between the two lately. It is pure: the node's admin endpoint collects
//! [`Facts`] and calls
//!
//! ```text
//! why::explain(&MeshState, &Question, &Facts) -> Result<Explanation, NameError>
//! ```
//!
//! for `GET /why?src=REF&dst=REF&port=N` (`dst` may carry `:port` itself; [`Question::new`] reads all three). A node
//! knows the whole mesh, but capture, certificates and failures only of its own pods; `meshctl why` asks every node
//! and lets [`merge`] put the answers of the source's and the destination's node together.

mod credentials;
mod enrolment;
mod history;
mod judge;
mod merge;
mod name;
mod suggest;
#[cfg(test)]
mod tests;
mod traffic;
mod types;
mod walk;
mod way;

pub use merge::merge;
pub use name::{NameError, Question, QuestionError};
pub use suggest::suggest;
pub use types::{CertificateFact, Explanation, Facts, Object, Outcome, Path, Stage, Step, Verdict};
pub use walk::explain;
