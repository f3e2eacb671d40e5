//! Agents of one layout. An agent of version 0 serves; one of version 1 replaces it; one of the agents is killed at any
//! moment, or none; a third agent, of version 1 again, comes after that. One pod is there from the start, another comes
//! at any moment. A connection to one of them comes at any moment; they do not touch each other, so that one at a time
//! is enough.
//!
//! Held in every state:
//! - a connection is refused or lost only for a kill: of the agent whose listener has the pod, as long as nobody took
//!   the pod over since, or of the only agent that serves;
//! - a connection to a pod that was captured once is never left to the kernel.
//!
//! And at the end, when nobody has anything left to do: the newest agent has every pod, with its own program.

use super::{Counterexample, Model, search};

const AGENTS: usize = 3;
const PODS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Fault {
    None,
    /// A draining agent closes its listeners without `QUIET`.
    ClosesAtOnce,
    /// A draining agent takes its own entries out of LISTENERS by their key.
    ClosesByKey,
    /// `serve_pod` activates a pod before it registers its listeners.
    ActivatesFirst,
    /// `loader::load` notes the object's hash before it replaces the programs.
    HashFirst,
    /// `set_listener` of an agent replaces what a later one registered.
    ReplacesLater,
    /// `attach` never replaces the program of a link that it adopts.
    KeepsProgram,
    /// `attach` replaces only if the hash was another one when the agent started.
    KeepsProgramIfKnown,
    /// An agent says that it serves before it has taken every pod over.
    ServesEarly,
    /// `forget_unclaimed` before the pods were enrolled.
    ForgetsEarly,
}

/// How far an agent is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd)]
enum Phase {
    Absent,
    /// `loader::load` is replacing programs: of the cgroup links (0), then of each pod's (`replace_pods`).
    Loading(usize),
    /// `Registry::adopt` is done; pods are enrolled.
    Starting,
    /// `Phase::Serving` in the run directory: every pod was enrolled once (`settle`).
    Serving,
    /// `drain`: enrols nothing any more.
    Draining,
    Gone,
    Killed,
}

/// How far an agent is with a pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd)]
enum Share {
    None,
    /// `set_listener`, and a worker that accepts (`Command::Add`): until it does, connections wait in the queue.
    Registered,
    /// `activate`: the link is there (`attach_pod`).
    Attached,
    /// `activate`: and the entry in PODS.
    Active,
    /// The listener is closed.
    Closed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Agent {
    phase: Phase,
    /// The hash was another one when it started (`Programs::changed`).
    changed: bool,
    shares: [Share; PODS],
    /// Pods that an earlier agent had captured when this one adopted its maps (`Registry::adopt`).
    adopted: [bool; PODS],
    has_forgotten: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Pod {
    is_there: bool,
    /// The entry in LISTENERS: whose socket. The kernel takes it out when the socket is closed.
    listener: Option<usize>,
    /// The pinned link of `steer`: the version of its program.
    link: Option<u8>,
    /// The entry in PODS.
    entry: bool,
    was_captured: bool,
    /// The agent whose listener it had was killed, and nobody has taken over.
    is_orphan: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Connection {
    Idle,
    /// Its SYN met the listener of an agent; it waits in the SYN queue or to be accepted.
    Queued(usize),
    Accepted,
    /// Refused or lost, for a reason that counts.
    Excused,
    /// The pod is not in the mesh yet.
    Untouched,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    fault: Fault,
    agents: [Agent; AGENTS],
    pods: [Pod; PODS],
    /// The connection, and the pod it is for.
    connection: Connection,
    to: usize,
    /// OBJECT_HASH: the version.
    hash: u8,
    /// The pinned cgroup links: the version of their programs.
    hooks: u8,
    was_killed: bool,
    wrong: Option<&'static str>,
}

/// The first agent's object, and that of all others.
fn version(agent: usize) -> u8 {
    u8::from(agent > 0)
}

impl State {
    fn start(fault: Fault, to: usize) -> Self {
        let absent = Agent {
            phase: Phase::Absent,
            changed: false,
            shares: [Share::None; PODS],
            adopted: [false; PODS],
            has_forgotten: false,
        };
        let nowhere = Pod {
            is_there: false,
            listener: None,
            link: None,
            entry: false,
            was_captured: false,
            is_orphan: false,
        };
        let mut state = Self {
            fault,
            agents: [absent; AGENTS],
            pods: [nowhere; PODS],
            connection: Connection::Idle,
            to,
            hash: 0,
            hooks: 0,
            was_killed: false,
            wrong: None,
        };
        state.agents[0] = Agent {
            phase: Phase::Serving,
            changed: true,
            shares: [Share::Active, Share::None],
            has_forgotten: true,
            ..absent
        };
        state.pods[0] = Pod {
            is_there: true,
            listener: Some(0),
            link: Some(0),
            entry: true,
            was_captured: true,
            is_orphan: false,
        };
        state
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn is_serving(&self, agent: usize) -> bool {
        self.agents[agent].phase == Phase::Serving
    }

    fn is_alive(&self, agent: usize) -> bool {
        !matches!(self.agents[agent].phase, Phase::Absent | Phase::Gone | Phase::Killed)
    }

    /// A successor of this agent serves (`Registration::has_successor`).
    fn has_successor(&self, agent: usize) -> bool {
        (agent + 1..AGENTS).any(|later| self.is_serving(later))
    }

    /// Whether an agent may start: beside the one that it replaces, or after a kill.
    fn may_start(&self, agent: usize) -> bool {
        let is_needed =
            (0..agent).all(|a| !matches!(self.agents[a].phase, Phase::Loading(_) | Phase::Starting));
        let comes_after_kill =
            agent < 2 || self.agents[1].phase == Phase::Killed || self.agents[0].phase == Phase::Killed;
        self.agents[agent].phase == Phase::Absent
            && is_needed
            && comes_after_kill
            && (agent == 1 || self.agents[1].phase != Phase::Absent)
    }

    /// The start of `loader::load`.
    fn begin(&mut self, agent: usize) {
        self.agents[agent].changed = self.hash != version(agent);
        if self.fault == Fault::HashFirst {
            self.hash = version(agent);
        }
        self.agents[agent].phase = Phase::Loading(0);
    }

    /// `attach_cgroups`, `replace_pods` link by link, OBJECT_HASH, and `Registry::adopt`.
    fn load(&mut self, agent: usize, step: usize) {
        let changed = self.agents[agent].changed;
        if step == 0 && changed {
            self.hooks = version(agent);
        }
        if (1..=PODS).contains(&step) && changed && self.pods[step - 1].link.is_some() {
            self.pods[step - 1].link = Some(version(agent));
        }
        if step <= PODS {
            self.agents[agent].phase = Phase::Loading(step + 1);
            return;
        }
        self.hash = version(agent);
        self.agents[agent].adopted = self.pods.map(|pod| pod.entry);
        self.agents[agent].phase = Phase::Starting;
    }

    /// `serve_pod`: the next step with one pod.
    fn enrol(&mut self, agent: usize, pod: usize) {
        let share = self.agents[agent].shares[pod];
        let activates_first = self.fault == Fault::ActivatesFirst;
        let next = match share {
            Share::None if activates_first => Share::Attached,
            Share::Active if activates_first && self.pods[pod].listener != Some(agent) => Share::Registered,
            Share::Registered if activates_first => {
                self.agents[agent].shares[pod] = Share::Active;
                return;
            }
            Share::None => Share::Registered,
            Share::Registered => Share::Attached,
            Share::Attached => Share::Active,
            Share::Active | Share::Closed => return,
        };
        match next {
            Share::Registered => self.register(agent, pod),
            Share::Attached => self.attach(agent, pod),
            Share::Active => {
                self.pods[pod].entry = true;
                self.pods[pod].was_captured = true;
            }
            Share::None | Share::Closed => {}
        }
        self.agents[agent].shares[pod] = next;
    }

    /// `Capture::set_listener`: what is there stays if a later agent is there (`yield_to_later`).
    fn register(&mut self, agent: usize, pod: usize) {
        let stays = |a: usize| self.is_alive(a) && self.agents[a].phase != Phase::Draining;
        let yields = (agent + 1..AGENTS).any(stays) && self.fault != Fault::ReplacesLater;
        if !yields || self.pods[pod].listener.is_none() {
            self.pods[pod].listener = Some(agent);
            self.pods[pod].is_orphan = false;
        }
    }

    /// `Programs::attach_pod`: adopts the pinned link of the pod, or makes one.
    fn attach(&mut self, agent: usize, pod: usize) {
        let link = &mut self.pods[pod].link;
        let replaces = match self.fault {
            Fault::KeepsProgram => false,
            Fault::KeepsProgramIfKnown => self.agents[agent].changed,
            // Only the agent whose object is the noted one: an older one would put its own program back.
            _ => self.hash == version(agent),
        };
        if link.is_none() || replaces {
            *link = Some(version(agent));
        }
    }

    fn has_enrolled_all(&self, agent: usize) -> bool {
        (0..PODS).all(|pod| !self.pods[pod].is_there || self.agents[agent].shares[pod] == Share::Active)
    }

    /// `forget_unclaimed`: what an earlier agent captured and this one did not is let go.
    fn forget(&mut self, agent: usize) {
        self.agents[agent].has_forgotten = true;
        let Agent { adopted, shares, .. } = self.agents[agent];
        for pod in 0..PODS {
            if adopted[pod] && shares[pod] == Share::None {
                (self.pods[pod].entry, self.pods[pod].link, self.pods[pod].listener) = (false, None, None);
            }
        }
    }

    fn agent_steps(&self, agent: usize, found: &mut Vec<Self>) {
        let me = self.agents[agent];
        match me.phase {
            Phase::Absent if self.may_start(agent) => found.push(self.with(|s| s.begin(agent))),
            Phase::Loading(step) => found.push(self.with(|s| s.load(agent, step))),
            Phase::Starting | Phase::Serving => {
                for pod in (0..PODS).filter(|pod| self.pods[*pod].is_there) {
                    found.push(self.with(|s| s.enrol(agent, pod)));
                }
                let settles = self.has_enrolled_all(agent) || self.fault == Fault::ServesEarly;
                if me.phase == Phase::Starting && settles {
                    found.push(self.with(|s| s.agents[agent].phase = Phase::Serving));
                }
                let forgets = me.phase == Phase::Serving || self.fault == Fault::ForgetsEarly;
                if forgets && !me.has_forgotten {
                    found.push(self.with(|s| s.forget(agent)));
                }
                // A pod is enrolled in one go, as far as a signal is concerned; a kill may come between its steps.
                let is_between = me.shares.iter().all(|share| matches!(share, Share::None | Share::Active));
                if me.phase == Phase::Serving && is_between && self.has_successor(agent) {
                    found.push(self.with(|s| s.agents[agent].phase = Phase::Draining));
                }
            }
            Phase::Draining => {
                for pod in 0..PODS {
                    if self.may_close(agent, pod) {
                        found.push(self.with(|s| s.close(agent, pod)));
                    }
                }
                if me.shares.iter().all(|share| matches!(share, Share::None | Share::Closed)) {
                    found.push(self.with(|s| s.agents[agent].phase = Phase::Gone));
                }
            }
            Phase::Absent | Phase::Gone | Phase::Killed => {}
        }
        if !self.was_killed && self.is_alive(agent) {
            found.push(self.with(|s| s.kill(agent)));
        }
    }

    /// `accept` of a draining worker: `QUIET` passed since the last connection. That is longer than a handshake takes,
    /// with retransmissions, and than a serving agent takes to enrol a pod that came (`RESYNC`).
    fn may_close(&self, agent: usize, pod: usize) -> bool {
        let share = self.agents[agent].shares[pod];
        if matches!(share, Share::None | Share::Closed) {
            return false;
        }
        let is_quiet = self.to != pod || self.connection != Connection::Queued(agent);
        let later = |a: usize| self.is_serving(a) && self.agents[a].shares[pod] < Share::Active;
        let is_late = (agent + 1..AGENTS).any(later);
        self.fault == Fault::ClosesAtOnce || (is_quiet && !is_late)
    }

    /// The listener goes, and with it what waits in its queues.
    fn close(&mut self, agent: usize, pod: usize) {
        self.agents[agent].shares[pod] = Share::Closed;
        if self.pods[pod].listener == Some(agent) || self.fault == Fault::ClosesByKey {
            self.pods[pod].listener = None;
        }
        if self.to == pod && self.connection == Connection::Queued(agent) {
            self.wrong = Some("a connection is reset in the queue of a listener that is closed");
        }
    }

    fn kill(&mut self, agent: usize) {
        self.was_killed = true;
        self.agents[agent].phase = Phase::Killed;
        for pod in 0..PODS {
            if self.pods[pod].listener == Some(agent) {
                self.pods[pod].listener = None;
                self.pods[pod].is_orphan = true;
            }
        }
        if self.connection == Connection::Queued(agent) {
            self.connection = Connection::Excused;
        }
    }

    fn connection_step(&self) -> Option<Self> {
        match self.connection {
            Connection::Idle if self.pods[self.to].is_there => Some(self.with(Self::arrive)),
            Connection::Queued(agent) => {
                let share = self.agents[agent].shares[self.to];
                let accepts = matches!(share, Share::Registered | Share::Attached | Share::Active);
                accepts.then(|| self.with(|s| s.connection = Connection::Accepted))
            }
            _ => None,
        }
    }

    /// `steer` of the kernel programs, for a connection from outside.
    fn arrive(&mut self) {
        let there = self.pods[self.to];
        let is_steered = there.link.is_some() && there.entry;
        self.connection = match there.listener {
            _ if !is_steered && there.was_captured => {
                self.wrong = Some("a connection to a captured pod is left to the kernel");
                return;
            }
            _ if !is_steered => Connection::Untouched,
            Some(agent) => Connection::Queued(agent),
            None => {
                let is_excused = there.is_orphan || !(0..AGENTS).any(|agent| self.is_serving(agent));
                if !is_excused {
                    self.wrong = Some("a connection is refused for the lack of a listener");
                }
                Connection::Excused
            }
        };
    }
}

impl Model for State {
    fn next(&self) -> Vec<Self> {
        let mut found = Vec::new();
        for agent in 0..AGENTS {
            self.agent_steps(agent, &mut found);
        }
        found.extend(self.connection_step());
        for pod in (0..PODS).filter(|pod| !self.pods[*pod].is_there) {
            found.push(self.with(|s| s.pods[pod].is_there = true));
        }
        found
    }

    fn wrong(&self) -> Option<&'static str> {
        self.wrong
    }

    fn wrong_at_the_end(&self) -> Option<&'static str> {
        let newest = (0..AGENTS).rev().find(|agent| self.is_alive(*agent))?;
        let is_whole = |pod: &Pod| pod.listener == Some(newest) && pod.entry;
        if !self.is_serving(newest) || !self.pods.iter().all(is_whole) {
            return Some("the newest agent does not serve every pod");
        }
        let own = version(newest);
        if self.hooks != own || !self.pods.iter().all(|pod| pod.link == Some(own)) {
            return Some("something is left with an older agent's program");
        }
        if matches!(self.connection, Connection::Idle | Connection::Queued(_)) {
            return Some("a connection waits for ever");
        }
        None
    }
}

/// Searches with a connection to either pod.
fn search_both(fault: Fault) -> Result<usize, Counterexample<State>> {
    (0..PODS).try_fold(0, |states, to| Ok(states + search(State::start(fault, to))?))
}

#[test]
fn no_connection_is_lost_or_left_to_the_kernel_between_agents() {
    let states = search_both(Fault::None).unwrap();
    assert!(states > 10_000, "the search saw only {states} states");
}

#[test]
fn the_search_finds_each_mistake_that_the_order_of_steps_avoids() {
    for fault in [
        Fault::ClosesAtOnce,
        Fault::ClosesByKey,
        Fault::ActivatesFirst,
        Fault::HashFirst,
        Fault::ReplacesLater,
        Fault::KeepsProgram,
        Fault::KeepsProgramIfKnown,
        Fault::ServesEarly,
        Fault::ForgetsEarly,
    ] {
        let found = search_both(fault).expect_err(&format!("{fault:?} was not found"));
        println!("{fault:?}: {} in {} steps", found.what, found.path.len() - 1);
    }
}
