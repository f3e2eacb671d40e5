//! The verdicts' generations as a model, searched exhaustively: every interleaving of an agent that judges again with
//! connects and SYNs on their way, with policies that change and an agent that dies at any point.
//!
//! Each step is one atomic action of the real thing and names the code that does it. Held in every state:
//! - when the agent has finished its review of the newest policy, no connection that this policy denies is alive, and
//!   none comes alive later;
//! - no connection is ended, or refused at its SYN, unless the newest policy or the one under review denied it at some
//!   time since its connect;
//! - a verdict that an agent left which is long dead is not believed.
//!
//! The faults are mistakes in the order or the care of a step; the search must find each.

use std::collections::HashSet;

/// Pairs of pods; each has one connection and is allowed or denied on its own.
const PAIRS: usize = 2;
const CHANGES: u8 = 2;
const CRASHES: u8 = 1;
const PENALTIES: u8 = 1;

/// Whether each pair is allowed.
type Policy = [bool; PAIRS];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// `rewrite` leaves the verdict of a denied pair to the flip.
    KeepsDenied,
    /// `distrust_verdicts` goes one generation on.
    DistrustsOne,
    /// `end_denied` before `rewrite`.
    EndsFirst,
    /// `steer` refuses an authorised tuple for its age.
    RefusesOldTuples,
    /// `fast_path` lists a connection after it looked at the verdict, and only if there was room.
    DoesNotList,
    /// `review` ends only connections of pairs whose verdict turned.
    EndsTurnedOnly,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Stage {
    Idle,
    /// The connect hook found a verdict of this generation.
    Hooked(u8),
    /// TCP_CONNECT_CB listed it and has not looked at the verdict again yet.
    Listed(u8),
    /// Its tuple is authorised with this generation, and its SYN on the way.
    Sent(u8),
    Established,
    /// Refused or ended.
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Connection {
    stage: Stage,
    /// In FLOWS.
    is_listed: bool,
    /// There was a reason since its connect.
    may_end: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Agent {
    Waiting,
    /// `rewrite`: the verdict of each pair for the next generation.
    Writing {
        pair: usize,
    },
    /// `bump_generation`: the flip, then the removal of what is older.
    Flipping,
    Clearing,
    /// `end_denied`: reading the flows, then the newest policy, then destroying.
    Listing,
    Ending {
        found: [bool; PAIRS],
    },
    /// Its verdicts hold for three more seconds: `HEARTBEAT_STALE_NS`.
    Dead,
    /// The next one shows signs of life, and has not judged yet.
    Starting,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    generation: u8,
    /// Generations of the verdicts that allow; a denied pair has none.
    verdicts: [Option<u8>; PAIRS],
    connections: [Connection; PAIRS],
    newest: Policy,
    /// How many policies there were before the newest.
    changes: u8,
    agent: Agent,
    /// What the agent judges by, as of the start of its review.
    judged: Policy,
    /// The change that this review is about, and the last whose review is complete.
    version: u8,
    complete: Option<u8>,
    turned: bool,
    crashes: u8,
    penalties: u8,
    /// What must not be.
    wrong: Option<&'static str>,
}

impl State {
    fn start() -> Self {
        Self {
            generation: 0,
            verdicts: [Some(0); PAIRS],
            connections: [Connection { stage: Stage::Idle, is_listed: false, may_end: false }; PAIRS],
            newest: [true; PAIRS],
            changes: 0,
            agent: Agent::Waiting,
            judged: [true; PAIRS],
            version: 0,
            complete: Some(0),
            turned: false,
            crashes: 0,
            penalties: 0,
            wrong: None,
        }
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    /// `allowed` of the kernel programs.
    fn believed(&self, pair: usize) -> Option<u8> {
        self.verdicts[pair].filter(|generation| *generation >= self.generation)
    }

    fn is_under_way(&self, pair: usize) -> bool {
        !matches!(self.connections[pair].stage, Stage::Idle | Stage::Over)
    }

    fn over(&mut self, pair: usize) {
        if !self.connections[pair].may_end {
            self.wrong = Some("a connection is refused or ended without a reason");
        }
        self.connections[pair] = Connection { stage: Stage::Over, is_listed: false, may_end: true };
    }

    /// Every state that one step leads to.
    fn next(&self, fault: Fault) -> Vec<Self> {
        let mut found = vec![self.with(|s| s.agent_step(fault))];
        for pair in 0..PAIRS {
            found.push(self.with(|s| s.connection_step(pair, fault)));
            if self.changes < CHANGES {
                found.push(self.with(|s| s.change(pair)));
            }
            if self.agent == Agent::Waiting {
                found.push(self.with(|s| s.offer(pair)));
                found.push(self.with(|s| s.penalise(pair)));
            }
        }
        if self.crashes < CRASHES {
            found.push(self.with(|s| (s.crashes, s.agent, s.complete) = (s.crashes + 1, Agent::Dead, None)));
        }
        if self.agent == Agent::Dead {
            found.push(self.with(|s| s.begin(true, fault)));
            found.push(self.with(|s| s.distrust(fault)));
        }
        found
    }

    fn change(&mut self, pair: usize) {
        self.changes += 1;
        self.newest[pair] = !self.newest[pair];
        self.connections[pair].may_end |= self.is_under_way(pair) && !self.newest[pair];
    }

    /// After a connection that worked through the tunnel.
    fn offer(&mut self, pair: usize) {
        if self.verdicts[pair].is_none() && self.newest[pair] {
            self.verdicts[pair] = Some(self.generation);
        }
    }

    /// A connection went wrong on the way; the pair is on the tunnel again, and others may be refused for that.
    fn penalise(&mut self, pair: usize) {
        if self.penalties < PENALTIES {
            self.penalties += 1;
            self.verdicts[pair] = None;
            self.connections[pair].may_end |= self.is_under_way(pair);
        }
    }

    /// The agent was dead for long: nobody kept verdicts true, and what is on its way may be refused.
    fn distrust(&mut self, fault: Fault) {
        self.agent = Agent::Starting;
        self.generation += if fault == Fault::DistrustsOne { 1 } else { 2 };
        for pair in 0..PAIRS {
            self.connections[pair].may_end |= self.is_under_way(pair);
        }
    }

    fn connection_step(&mut self, pair: usize, fault: Fault) {
        let believed = self.believed(pair);
        let lists = fault != Fault::DoesNotList;
        let connection = &mut self.connections[pair];
        match connection.stage {
            Stage::Idle => {
                if let Some(generation) = believed {
                    if self.agent == Agent::Starting {
                        self.wrong = Some("a verdict of a dead agent is believed");
                    }
                    let reviews = !matches!(self.agent, Agent::Waiting | Agent::Dead);
                    connection.stage = Stage::Hooked(generation);
                    connection.may_end = !self.newest[pair] || (reviews && !self.judged[pair]);
                }
            }
            Stage::Hooked(generation) => {
                connection.stage = Stage::Listed(generation);
                connection.is_listed = lists;
            }
            // The source is final only now: the verdict is looked at again.
            Stage::Listed(generation) if believed.is_some() => connection.stage = Stage::Sent(generation),
            Stage::Listed(_) => self.over(pair),
            // `steer`.
            Stage::Sent(generation) => {
                let is_current = generation == self.generation;
                let passes = match fault {
                    Fault::RefusesOldTuples => is_current,
                    _ => is_current || believed.is_some(),
                };
                if passes { connection.stage = Stage::Established } else { self.over(pair) }
            }
            Stage::Established | Stage::Over => {}
        }
    }

    /// The start of a review, of all pairs with a verdict.
    fn begin(&mut self, rewrites: bool, fault: Fault) {
        (self.judged, self.version) = (self.newest, self.changes);
        self.turned = (0..PAIRS).any(|pair| self.verdicts[pair].is_some() && !self.newest[pair]);
        let writes = (rewrites || self.turned) && fault != Fault::EndsFirst;
        self.agent = if writes { Agent::Writing { pair: 0 } } else { Agent::Listing };
    }

    fn agent_step(&mut self, fault: Fault) {
        self.agent = match self.agent {
            Agent::Waiting if self.complete == Some(self.changes) => return,
            Agent::Waiting => return self.begin(false, fault),
            // `adopt`.
            Agent::Starting => return self.begin(true, fault),
            Agent::Dead => return,
            Agent::Writing { pair } if pair < PAIRS => {
                if self.verdicts[pair].is_some() {
                    if self.judged[pair] {
                        self.verdicts[pair] = Some(self.generation + 1);
                    } else if fault != Fault::KeepsDenied {
                        self.verdicts[pair] = None;
                    }
                }
                Agent::Writing { pair: pair + 1 }
            }
            Agent::Writing { .. } => Agent::Flipping,
            Agent::Flipping => {
                self.generation += 1;
                Agent::Clearing
            }
            Agent::Clearing => {
                self.verdicts = std::array::from_fn(|pair| self.believed(pair));
                if fault == Fault::EndsFirst { self.finish() } else { Agent::Listing }
            }
            Agent::Listing if fault == Fault::EndsTurnedOnly && !self.turned => self.finish(),
            Agent::Listing => {
                Agent::Ending { found: self.connections.map(|connection| connection.is_listed) }
            }
            Agent::Ending { found } => {
                for (pair, is_found) in found.into_iter().enumerate() {
                    if is_found && !self.newest[pair] && self.is_under_way(pair) {
                        self.over(pair);
                    }
                }
                let rewrites = fault == Fault::EndsFirst && self.turned;
                if rewrites { Agent::Writing { pair: 0 } } else { self.finish() }
            }
        };
    }

    fn finish(&mut self) -> Agent {
        self.complete = Some(self.version);
        Agent::Waiting
    }

    /// Whether a connection is alive though a complete review of the newest policy denied it.
    fn has_escaped(&self) -> bool {
        let is_complete = self.agent == Agent::Waiting && self.complete == Some(self.changes);
        let escapes = |pair: usize| !self.newest[pair] && self.connections[pair].stage == Stage::Established;
        is_complete && (0..PAIRS).any(escapes)
    }
}

/// Searches every state, and says how many there are, or what must not be.
fn search(fault: Fault) -> Result<usize, (&'static str, State)> {
    let mut seen = HashSet::from([State::start()]);
    let mut open = vec![State::start()];
    while let Some(state) = open.pop() {
        if state.has_escaped() {
            return Err(("a denied connection is alive after the review", state));
        }
        for next in state.next(fault).into_iter().filter(|next| *next != state) {
            if let Some(wrong) = next.wrong {
                return Err((wrong, state));
            }
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn no_denied_connection_survives_a_review_and_no_allowed_one_is_reset() {
    let states = search(Fault::None).unwrap();
    assert!(states > 10_000, "the search saw only {states} states");
}

#[test]
fn the_search_finds_each_mistake_that_the_order_of_steps_avoids() {
    for fault in [
        Fault::KeepsDenied,
        Fault::DistrustsOne,
        Fault::EndsFirst,
        Fault::RefusesOldTuples,
        Fault::DoesNotList,
        Fault::EndsTurnedOnly,
    ] {
        assert!(search(fault).is_err(), "{fault:?} was not found");
    }
}
