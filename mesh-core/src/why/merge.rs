//! One answer from the views of several nodes.

use super::types::{Explanation, Outcome, Stage, Step};

/// Puts the views of several nodes on one question together: the source's node knows whether the source is captured
/// and has a certificate, and what failed when it left; the destination's node knows the same of the destination.
/// Without a view of the source's node the first one is taken as the base. None when there are no views.
#[must_use]
pub fn merge(views: Vec<Explanation>) -> Option<Explanation> {
    let base = views.iter().position(|view| view.source_is_local).unwrap_or(0);
    let far = views.iter().position(|view| view.destination_is_local);
    let mut merged = views.get(base)?.clone();
    let Some(far) = far.filter(|far| *far != base).and_then(|i| views.get(i)) else { return Some(merged) };

    merged.node = format!("{}, {}", merged.node, far.node);
    merged.destination_is_local = true;
    for stage in [Stage::DestinationEnrolment, Stage::DestinationCertificate] {
        let Some(theirs) = far.steps.iter().find(|step| step.stage == stage) else { continue };
        match merged.steps.iter_mut().find(|step| step.stage == stage) {
            Some(ours) => *ours = theirs.clone(),
            None => merged.steps.push(theirs.clone()),
        }
    }
    let failed = |step: &&Step| step.stage == Stage::LastFailure && step.outcome == Outcome::Warn;
    if let Some(theirs) = far.steps.iter().find(failed) {
        // "None that we know of" is no news next to one that they know of; two failures are told both.
        merged.steps.retain(|step| step.stage != Stage::LastFailure || step.outcome == Outcome::Warn);
        merged.steps.push(theirs.clone());
    }
    // Each end sees its own packets.
    merged.steps.extend(far.steps.iter().filter(|step| step.stage == Stage::Traffic).cloned());
    merged.steps.sort_by_key(|step| step.stage);
    merged.conclude();
    Some(merged)
}
