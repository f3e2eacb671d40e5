//! Whether both ends can prove who they are.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::types::{CertificateFact, Object, Outcome, Stage, Step};
use super::walk::Walk;
use crate::identity::SpiffeId;
use crate::state::Workload;

pub(super) fn source(walk: &Walk<'_>) -> Step {
    if !walk.is_local(&walk.source) {
        return on_another_node(Stage::SourceCertificate, &walk.source);
    }
    judge(walk, Stage::SourceCertificate, &walk.source.identity)
}

/// One step for all workloads that may serve the tunnel: the worst of those on this node, else where to ask.
pub(super) fn destination(walk: &Walk<'_>, served_by: &[&Arc<Workload>]) -> Option<Step> {
    let here = served_by.iter().filter(|w| walk.is_local(w));
    let judged: Vec<Step> = here.map(|w| judge(walk, Stage::DestinationCertificate, &w.identity)).collect();
    let bad = judged.iter().find(|step| step.outcome == Outcome::Blocked);
    let worst = bad.or_else(|| judged.iter().find(|step| step.outcome == Outcome::Warn)).or(judged.first());
    worst.cloned().or_else(|| Some(on_another_node(Stage::DestinationCertificate, served_by.first()?)))
}

fn on_another_node(stage: Stage, workload: &Workload) -> Step {
    Step::elsewhere(stage, Some(object(&workload.identity)), format!("kept by node {}", workload.node))
}

fn object(identity: &SpiffeId) -> Object {
    Object::new("Certificate", identity.namespace(), identity.service_account())
}

fn judge(walk: &Walk<'_>, stage: Stage, identity: &SpiffeId) -> Step {
    let object = Some(object(identity));
    let see = "see the CA's line of `meshctl status` and the node's log".to_owned();
    let none = CertificateFact::default();
    let fact = walk.facts.certificates.get(identity).unwrap_or(&none);
    let now = walk.facts.now;
    let problem = |text: &str| fact.problem.as_ref().map_or_else(String::new, |p| format!("{text}{p}"));
    match fact.validity {
        None => {
            let detail = format!("there is no certificate for {identity}{}", problem(": "));
            Step::blocked(stage, object, detail, see)
        }
        Some((_, end)) if end <= now => {
            let detail =
                format!("the certificate of {identity} expired {} ago{}", span(now, end), problem(": "));
            Step::blocked(stage, object, detail, see)
        }
        Some((begin, _)) if begin > now => {
            let detail = format!("the certificate of {identity} is valid only in {}", span(begin, now));
            Step::blocked(stage, object, detail, "compare the clocks of the node and the CA".to_owned())
        }
        Some((begin, end)) => {
            let detail = format!("valid for another {}", span(end, now));
            let life = end.duration_since(begin).unwrap_or_default();
            let left = end.duration_since(now).unwrap_or_default();
            // Renewal is due at half of the life: late is when much less than that is left.
            if fact.problem.is_some() || left < life / 4 {
                let detail = format!("{detail}; renewal is late{}", problem(": "));
                Step::warn(stage, object, detail, see)
            } else {
                Step::ok(stage, object, detail)
            }
        }
    }
}

fn span(later: SystemTime, earlier: SystemTime) -> String {
    ago(later.duration_since(earlier).unwrap_or_default())
}

/// A span as people say it, in its largest unit: `5s`, `12m`, `3h`, `4d`.
pub(super) fn ago(span: Duration) -> String {
    match span.as_secs() {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7_200 => format!("{}m", s / 60),
        s @ 7_200..172_800 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}
