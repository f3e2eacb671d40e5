//! Which pairs of pods of this node may talk without the agent.
//!
//! A pair comes here after one connection of it worked through the tunnel. [`judge`] decides, on the source's identity
//! as the kernel attests it (by network namespace), and the verdict goes into the kernel's map. Whatever could change a
//! verdict (policy, workloads, enrolment, certificates, revocation lists) has every pair judged again; if any turned, the results are
//! written for the next generation, the generation is flipped, and connections that are now denied are destroyed.
//! A pair that is judged anew as before needs no new generation: what the kernel holds is true.

pub mod flows;
pub mod identities;
pub mod judge;
#[cfg(test)]
mod model;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_core::state::{LocalWorkload, Str};
use mesh_core::telemetry::DryRunCounters;
use serde::Serialize;
use tokio::sync::{Notify, mpsc, watch};

use crate::capture::{Capture, CaptureError, Decision, EnrolledPod, FlowFigures, FlowState, Pair};
use crate::proxy::Shared;
use flows::Flows;
use identities::Identities;
use judge::{Judge, PodFacts};

/// How often figures of connections are read.
const FLOWS_EVERY: Duration = Duration::from_secs(1);
/// A pair whose SYN got no answer or whose source was changed stays on the tunnel for this long, and for twice as long
/// each time that it happens again.
const PENALTY: Duration = Duration::from_secs(60);
const LONGEST_PENALTY: Duration = Duration::from_secs(3600);
/// A SYN that is not answered for this long means that something between the pods drops it.
const UNANSWERED: Duration = Duration::from_secs(1);
/// Pairs that are remembered; the kernel's map holds no more.
const MOST_PAIRS: usize = 60_000;

/// A connection between two pods of this node that worked through the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Uid of the client's pod.
    pub pod: String,
    /// The client's address.
    pub source: IpAddr,
    /// The server's address and port, as the client asked for them.
    pub destination: SocketAddr,
}

/// A connection that the kernel carries, for the admin endpoint.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// The kernel's figures.
    #[serde(flatten)]
    pub figures: FlowFigures,
    /// The policy that allowed it; none where no ALLOW policy applies.
    pub allowed_by: Option<String>,
}

type Enrolled = Arc<Vec<Arc<EnrolledPod>>>;

struct Controller {
    shared: Arc<Shared>,
    capture: Arc<Capture>,
    enrolled: Enrolled,
    /// Pods that have left the mesh and have connections of before.
    left: Enrolled,
    identities: Identities,
    /// When the identities were last looked at for expiry.
    looked: SystemTime,
    /// What the last review knew of the pods.
    reviewed: Vec<PodFacts>,
    /// Pairs with a verdict that allows, and the policy that does.
    allowed: HashMap<Pair, Option<Str>>,
    penalties: HashMap<Pair, Penalty>,
    /// Policies by the number that the kernel has for them; number 0 is none.
    policies: Vec<Str>,
    flows: Flows,
    listed: watch::Sender<Vec<Flow>>,
}

/// A pair that is kept off the fast path for a while.
struct Penalty {
    since: Instant,
    length: Duration,
}

impl Penalty {
    fn holds(&self) -> bool {
        self.since.elapsed() < self.length
    }
}

/// Keeps verdicts and figures until the agent drains; from then on a successor does. `revoked` tells that revocation
/// lists changed.
pub async fn run(
    shared: Arc<Shared>,
    capture: Arc<Capture>,
    mut enrolled: watch::Receiver<Enrolled>,
    mut offered: mpsc::Receiver<Candidate>,
    listed: watch::Sender<Vec<Flow>>,
    revoked: Rc<Notify>,
) {
    let drain = shared.drain.clone();
    let mut published = shared.published.subscribe();
    let mut certificates = shared.certificates.watch();
    // Before the first pods are enrolled the mesh is not known, and everything would be denied.
    if enrolled.changed().await.is_err() {
        return;
    }
    let mut controller = Controller {
        enrolled: enrolled.borrow_and_update().clone(),
        left: Arc::default(),
        identities: Identities::of(&shared.certificates.snapshot()),
        looked: SystemTime::now(),
        reviewed: Vec::new(),
        flows: Flows::new(DryRunCounters::new(&shared.metrics)),
        shared,
        capture,
        allowed: HashMap::new(),
        penalties: HashMap::new(),
        policies: Vec::new(),
        listed,
    };
    controller.adopt();
    let mut poll = tokio::time::interval(FLOWS_EVERY);
    loop {
        let outcome = tokio::select! {
            () = drain.cancelled() => break,
            candidate = offered.recv() => match candidate {
                Some(candidate) => controller.offer(&candidate),
                None => break,
            },
            _ = published.changed() => controller.review(),
            _ = certificates.changed() => controller.review_identities(),
            () = revoked.notified() => controller.review_identities(),
            changed = enrolled.changed() => {
                if changed.is_err() {
                    break;
                }
                controller.enrolment_changed(enrolled.borrow_and_update().clone());
                controller.review()
            }
            _ = poll.tick() => controller.tick(),
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "fast path");
        }
    }
    controller.flows.hand_over();
}

impl Controller {
    fn judge<'a>(&self, state: &'a mesh_core::state::MeshState, pods: &'a [PodFacts]) -> Judge<'a> {
        Judge::new(state, pods, self.shared.config.proxy.same_node)
    }

    /// Who is no longer enrolled is remembered for the sake of its connections.
    fn enrolment_changed(&mut self, enrolled: Enrolled) {
        let before = std::mem::replace(&mut self.enrolled, enrolled);
        let now: HashSet<u64> = self.enrolled.iter().map(|pod| pod.cookie).collect();
        let left = before.iter().chain(&*self.left).filter(|pod| !now.contains(&pod.cookie));
        self.left = Arc::new(left.cloned().collect());
    }

    /// Pods that have left and whose connections have ended are forgotten.
    fn forget_left(&mut self, flows: &[FlowFigures]) {
        if self.left.is_empty() {
            return;
        }
        let clients: HashSet<u64> = flows.iter().map(|flow| flow.netns).collect();
        let servers: HashSet<IpAddr> = flows.iter().map(|flow| flow.server.ip()).collect();
        let is_used = |pod: &&Arc<EnrolledPod>| {
            clients.contains(&pod.cookie) || pod.addresses().iter().any(|ip| servers.contains(ip))
        };
        self.left = Arc::new(self.left.iter().filter(is_used).cloned().collect());
    }

    /// Those that have left first: where one has come back, the later one counts.
    fn pods(&self) -> Vec<PodFacts> {
        let node = &self.shared.config.node.name;
        let facts = |(pod, left): (&Arc<EnrolledPod>, bool)| {
            let info = &pod.info;
            PodFacts {
                cookie: pod.cookie,
                local: LocalWorkload::new(&info.namespace, &info.name, &info.service_account, node),
                addresses: pod.addresses(),
                on_segment: pod.on_segment(),
                left,
            }
        };
        let left = self.left.iter().map(|pod| (pod, true));
        left.chain(self.enrolled.iter().map(|pod| (pod, false))).map(facts).collect()
    }

    fn decide(&self, judge: &Judge<'_>, pair: &Pair) -> Option<Option<Str>> {
        let now = SystemTime::now();
        let penalised = self.penalties.get(pair).is_some_and(Penalty::holds);
        if penalised { None } else { judge.allows(pair, |id| self.identities.vouch_for(id, now)) }
    }

    /// Takes over the verdicts of an earlier agent, after judging them.
    fn adopt(&mut self) {
        // Numbers of policies are this agent's own: everything is written again.
        if let Err(error) = self.follow_kernel().and_then(|()| self.rewrite()) {
            tracing::error!(%error, "verdicts of an earlier agent are not judged yet");
        }
    }

    /// Makes the list of allowed pairs what the kernel believes: a predecessor that is still there may have added to it
    /// or started a generation.
    fn follow_kernel(&mut self) -> Result<(), CaptureError> {
        let mut known = std::mem::take(&mut self.allowed);
        let believed = self.capture.verdicts()?.into_iter().filter(|(_, decision, _)| decision.allow);
        self.allowed = believed.map(|(pair, ..)| (pair, known.remove(&pair).flatten())).collect();
        Ok(())
    }

    fn offer(&mut self, candidate: &Candidate) -> Result<(), CaptureError> {
        let Some(pod) = self.enrolled.iter().find(|p| p.info.uid == candidate.pod) else { return Ok(()) };
        let pair = Pair {
            netns: pod.cookie,
            source: candidate.source,
            destination: candidate.destination.ip(),
            port: candidate.destination.port(),
        };
        if self.allowed.contains_key(&pair) || self.allowed.len() >= MOST_PAIRS {
            return Ok(());
        }
        let (state, pods) = (self.shared.state.load_full(), self.pods());
        let Some(policy) = self.decide(&self.judge(&state, &pods), &pair) else { return Ok(()) };
        let decision = self.decision(policy.as_ref());
        self.capture.set_verdict(&pair, decision, self.capture.generation()?)?;
        tracing::info!(source = %pair.source, destination = %candidate.destination, "pair moved to the fast path");
        self.allowed.insert(pair, policy);
        Ok(())
    }

    fn decision(&mut self, policy: Option<&Str>) -> Decision {
        let number = policy.map_or(0, |key| {
            let at = self.policies.iter().position(|known| known == key).unwrap_or_else(|| {
                self.policies.push(key.clone());
                self.shared.fast_path_policies.store(Arc::new(self.policies.clone()));
                self.policies.len() - 1
            });
            u32::try_from(at + 1).unwrap_or(0)
        });
        Decision { allow: true, policy: number, flags: 0 }
    }

    /// Certificates or revocation lists changed.
    fn review_identities(&mut self) -> Result<(), CaptureError> {
        self.identities = Identities::of(&self.shared.certificates.snapshot());
        self.review()
    }

    /// The regular look: at the figures, at certificates that expired since the last one, and at the pods' addresses.
    fn tick(&mut self) -> Result<(), CaptureError> {
        let now = SystemTime::now();
        let before = std::mem::replace(&mut self.looked, now);
        let turned = self.identities.expired_between(before, now) || self.pods() != self.reviewed;
        if turned { self.review() } else { self.account().map(drop) }
    }

    /// Judges every pair again, acts if any turned, and ends the connections that are denied now. Those are not only
    /// the ones of pairs with a verdict: a pair that was put back on the tunnel may still have some.
    fn review(&mut self) -> Result<(), CaptureError> {
        self.penalties.retain(|_, penalty| penalty.since.elapsed() < penalty.length * 2);
        self.follow_kernel()?;
        let (state, pods) = (self.shared.state.load_full(), self.pods());
        self.reviewed.clone_from(&pods);
        let judge = self.judge(&state, &pods);
        let turned =
            |(pair, policy): (&Pair, &Option<Str>)| self.decide(&judge, pair).as_ref() != Some(policy);
        if self.allowed.iter().any(turned) { self.rewrite() } else { self.end_denied().map(drop) }
    }

    /// Results first, then the flip, then the connections that it denies.
    fn rewrite(&mut self) -> Result<(), CaptureError> {
        let (state, pods) = (self.shared.state.load_full(), self.pods());
        let next = self.capture.generation()?.wrapping_add(1);
        let mut allowed = HashMap::with_capacity(self.allowed.len());
        let judge = self.judge(&state, &pods);
        for pair in std::mem::take(&mut self.allowed).into_keys() {
            let Some(policy) = self.decide(&judge, &pair) else {
                // An agent that died before its flip may have written it for the next generation already.
                self.capture.remove_verdict(&pair)?;
                continue;
            };
            let decision = self.decision(policy.as_ref());
            match self.capture.set_verdict(&pair, decision, next) {
                Ok(()) => drop(allowed.insert(pair, policy)),
                Err(error) => tracing::warn!(%error, "a pair goes back to the tunnel"),
            }
        }
        self.allowed = allowed;
        let generation = self.capture.bump_generation()?;
        let ended = self.end_denied()?;
        tracing::info!(generation, pairs = self.allowed.len(), ended, "fast path judged again");
        Ok(())
    }

    /// Ends every connection of the fast path that is denied now; says how many.
    fn end_denied(&mut self) -> Result<usize, CaptureError> {
        let flows = self.account()?;
        let (state, pods, now) = (self.shared.state.load_full(), self.pods(), SystemTime::now());
        let judge = self.judge(&state, &pods);
        let mut rulings: HashMap<Pair, bool> = HashMap::new();
        let mut ended = 0;
        for flow in flows.iter().filter(|f| matches!(f.state, FlowState::Opening | FlowState::Established)) {
            let pair = pair_of(flow);
            let ends = rulings
                .entry(pair)
                .or_insert_with(|| judge.ends_connections(&pair, |id| self.identities.disown(id, now)));
            if !*ends {
                continue;
            }
            match self.capture.destroy(flow) {
                Ok(true) => {
                    self.flows.denied(flow);
                    ended += 1;
                }
                Ok(false) => {}
                // The others must not live on because one could not be ended.
                Err(error) => {
                    tracing::error!(%error, client = %flow.client, server = %flow.server, "cannot end a denied connection");
                }
            }
        }
        Ok(ended)
    }

    /// Reads the kernel's figures into metrics, and puts pairs whose SYNs get no answer back on the tunnel.
    fn account(&mut self) -> Result<Vec<FlowFigures>, CaptureError> {
        let flows = self.capture.fastpath_flows()?;
        self.forget_left(&flows);
        if flows.is_empty() && self.flows.is_empty() {
            self.listed.send_if_modified(|listed| !std::mem::take(listed).is_empty());
            return Ok(flows);
        }
        let now = crate::sys::monotonic_ns();
        let (state, pods) = (self.shared.state.load_full(), self.pods());
        self.flows.update(&flows, now, &self.shared.telemetry, &self.judge(&state, &pods));
        for flow in &flows {
            let waited = Duration::from_nanos(match flow.state {
                FlowState::Opening => now.saturating_sub(flow.opened_ns),
                FlowState::Failed => flow.updated_ns.saturating_sub(flow.opened_ns),
                FlowState::Established | FlowState::Closed => 0,
            });
            if flow.astray && self.penalise(flow)? {
                tracing::warn!(client = %flow.client, server = %flow.server,
                    "a connection of the fast path did not arrive from its client's address; the pair goes back to the \
                     tunnel: masquerading between pods of the node is a likely cause");
            }
            if waited >= UNANSWERED && self.penalise(flow)? {
                tracing::warn!(client = %flow.client, server = %flow.server, ?waited,
                    "no answer on the fast path; the pair goes back to the tunnel: a NetworkPolicy that opens only port 15008 \
                     is a likely cause");
            }
        }
        let list = flows.iter().map(|figures| {
            let number = usize::try_from(figures.policy).unwrap_or(0);
            let policy = number.checked_sub(1).and_then(|at| self.policies.get(at));
            Flow { figures: *figures, allowed_by: policy.map(ToString::to_string) }
        });
        self.listed.send_replace(list.collect());
        Ok(flows)
    }

    /// Puts the pair of a connection that went wrong back on the tunnel, each time for longer. Says whether it was on
    /// the fast path.
    fn penalise(&mut self, flow: &FlowFigures) -> Result<bool, CaptureError> {
        let pair = pair_of(flow);
        if self.allowed.remove(&pair).is_none() {
            return Ok(false);
        }
        let length = self.penalties.get(&pair).map_or(PENALTY, |last| (last.length * 2).min(LONGEST_PENALTY));
        self.penalties.insert(pair, Penalty { since: Instant::now(), length });
        self.capture.remove_verdict(&pair)?;
        Ok(true)
    }
}

fn pair_of(flow: &FlowFigures) -> Pair {
    Pair {
        netns: flow.netns,
        source: flow.client.ip(),
        destination: flow.server.ip(),
        port: flow.server.port(),
    }
}
