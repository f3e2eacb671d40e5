//! The replacement of another layout's programs and maps ([`super::super::layouts`]). An agent with the old layout has
//! one pod; an agent with the new layout takes it over; one of the two is killed at any moment, or none, and the new one
//! starts again after that. A connection of the pod and one to it come at any moment.
//!
//! Held in every state:
//! - a connection is refused or lost only for a kill of the agent that it met;
//! - a connection of the pod, which is captured, never leaves without either layout knowing of it.
//!
//! And at the end: the new layout captures, steers and enforces, and nothing of the old one is attached.

use super::{Model, search};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Fault {
    None,
    /// `stop_capturing` before the pod is enrolled with the new layout.
    StopsCapturingFirst,
    /// `stop_capturing` takes the pods' links away before those that capture.
    StopsSteeringFirst,
    /// `stop_capturing` without `IN_FLIGHT`.
    DoesNotWait,
    /// Without `stop_enforcing`.
    KeepsEnforcing,
    /// The agent says that it serves, and others wait for something, before `forget_unclaimed`.
    ServesBeforeItStops,
}

const OLD: usize = 0;
const NEW: usize = 1;

/// What is attached of one layout, and what its maps say of the pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Layout {
    /// The connect hooks.
    captures: bool,
    /// `pod_egress`
    enforces: bool,
    /// `steer`, in the pod's namespace.
    steers: bool,
    /// PODS, and OWN_ADDRESSES with it.
    entry: bool,
    /// LISTENERS: the agent's socket, while it is open.
    listener: bool,
}

/// How far the agent with the new layout is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd)]
enum Step {
    Absent,
    /// `attach_cgroups`: the hooks, then `pod_egress`.
    Attaching,
    /// `OtherLayout::stop_enforcing`
    StopsEnforcing,
    /// `set_listener`
    Registers,
    /// `activate`: the link, then the entry.
    Attaches,
    Enters,
    /// `OtherLayout::stop_capturing`, first half.
    StopsCapturing,
    /// And after `IN_FLIGHT` the second.
    StopsSteering,
    Serves,
    Killed,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum OldAgent {
    Serves,
    Drains,
    Gone,
    Killed,
}

/// A connection of the pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Outbound {
    Idle,
    /// The connect hook of this layout has rewritten it; its SYN is on the way.
    Captured(usize),
    /// The connect hook of the new layout lets it go by the fast path; its SYN is on the way.
    FastPath,
    Queued(usize),
    Over,
}

/// A connection to the pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Inbound {
    Idle,
    Queued(usize),
    Over,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    fault: Fault,
    layouts: [Layout; 2],
    old: OldAgent,
    new: Step,
    outbound: Outbound,
    inbound: Inbound,
    was_killed: bool,
    wrong: Option<&'static str>,
}

impl State {
    fn start(fault: Fault) -> Self {
        let old = Layout { captures: true, enforces: true, steers: true, entry: true, listener: true };
        Self {
            fault,
            layouts: [old, Layout::default()],
            old: OldAgent::Serves,
            new: Step::Absent,
            outbound: Outbound::Idle,
            inbound: Inbound::Idle,
            was_killed: false,
            wrong: None,
        }
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    /// Whether the listeners of a layout are missing for a kill.
    fn is_excused(&self, layout: usize) -> bool {
        if layout == OLD {
            self.old == OldAgent::Killed
        } else {
            self.was_killed && self.new < Step::Serves || self.new == Step::Killed
        }
    }

    fn fail(&mut self, layout: usize, why: &'static str) {
        if !self.is_excused(layout) {
            self.wrong = Some(why);
        }
    }

    /// The next step of the agent with the new layout. Each may find that an earlier agent of its kind did it already.
    fn take_over(&mut self) {
        let [old, new] = &mut self.layouts;
        self.new = match self.new {
            Step::Absent | Step::Killed => {
                new.captures = true;
                Step::Attaching
            }
            Step::Attaching => {
                new.enforces = true;
                if self.fault == Fault::StopsCapturingFirst {
                    old.captures = false;
                }
                Step::StopsEnforcing
            }
            Step::StopsEnforcing => {
                old.enforces &= self.fault == Fault::KeepsEnforcing;
                Step::Registers
            }
            Step::Registers => {
                new.listener = true;
                Step::Attaches
            }
            Step::Attaches => {
                new.steers = true;
                Step::Enters
            }
            Step::Enters => {
                new.entry = true;
                Step::StopsCapturing
            }
            Step::StopsCapturing => {
                if self.fault == Fault::StopsSteeringFirst {
                    old.steers = false
                } else {
                    old.captures = false
                }
                Step::StopsSteering
            }
            Step::StopsSteering => {
                (old.captures, old.steers) = (false, false);
                Step::Serves
            }
            Step::Serves => Step::Serves,
        };
    }

    /// `IN_FLIGHT` is longer than a SYN takes inside one kernel.
    fn may_take_over(&self) -> bool {
        let in_flight = self.outbound == Outbound::Captured(OLD);
        let waits = self.new == Step::StopsSteering && self.fault != Fault::DoesNotWait;
        let starts_again = self.new != Step::Killed || self.old != OldAgent::Gone || self.was_killed;
        starts_again && !(waits && in_flight)
    }

    /// An operator tells the old agent to leave once the new one serves.
    fn may_leave(&self) -> bool {
        let early = self.fault == Fault::ServesBeforeItStops && self.new >= Step::StopsCapturing;
        self.old == OldAgent::Serves && (self.new == Step::Serves || (early && self.new != Step::Killed))
    }

    /// `QUIET`: nothing waits in its queues, or is on the way to them.
    fn may_close(&self) -> bool {
        let is_on_the_way = matches!(self.outbound, Outbound::Captured(OLD) | Outbound::Queued(OLD));
        self.old == OldAgent::Drains && !is_on_the_way && self.inbound != Inbound::Queued(OLD)
    }

    fn kill(&mut self, layout: usize) {
        self.was_killed = true;
        self.layouts[layout].listener = false;
        if layout == OLD {
            self.old = OldAgent::Killed
        } else {
            self.new = Step::Killed
        }
        if self.outbound == Outbound::Queued(layout) {
            self.outbound = Outbound::Over;
        }
        if self.inbound == Inbound::Queued(layout) {
            self.inbound = Inbound::Over;
        }
    }

    /// The connect hooks, the old layout's first: what it has rewritten has an own address as its destination, which the
    /// other leaves alone.
    fn connect(&self) -> Vec<Self> {
        let hooks = |layout: usize| self.layouts[layout].captures && self.layouts[layout].entry;
        if hooks(OLD) {
            return vec![self.with(|s| s.outbound = Outbound::Captured(OLD))];
        }
        if hooks(NEW) {
            let ways = [Outbound::Captured(NEW), Outbound::FastPath];
            return ways.map(|way| self.with(|s| s.outbound = way)).into();
        }
        vec![self.with(|s| s.wrong = Some("a connection of a captured pod leaves uncaptured"))]
    }

    /// The SYN: `pod_egress` of both layouts, then `steer` of both.
    fn send(&mut self) {
        match self.outbound {
            Outbound::FastPath => {
                if self.layouts[OLD].enforces {
                    self.wrong = Some("the old layout drops what only the new one knows of");
                }
                self.outbound = Outbound::Over;
            }
            Outbound::Captured(layout) => {
                let Layout { steers, listener, .. } = self.layouts[layout];
                // The other layout has no record of it, and refuses its port; a socket that is found wins over that.
                if steers && listener {
                    self.outbound = Outbound::Queued(layout);
                } else {
                    self.fail(layout, "a captured connection finds no listener");
                    self.outbound = Outbound::Over;
                }
            }
            Outbound::Idle | Outbound::Queued(_) | Outbound::Over => {}
        }
    }

    /// `steer` of both layouts for a connection from outside: of two that give a socket the later counts, and one that
    /// gives a socket counts more than one that refuses.
    fn arrive(&mut self) {
        let gives = |layout: usize| {
            let Layout { steers, entry, listener, .. } = self.layouts[layout];
            steers && entry && listener
        };
        self.inbound = if gives(NEW) {
            Inbound::Queued(NEW)
        } else if gives(OLD) {
            Inbound::Queued(OLD)
        } else {
            let steered = self.layouts.iter().any(|layout| layout.steers && layout.entry);
            if !steered {
                self.wrong = Some("a connection to a captured pod is left to the kernel");
            }
            let excused = self.is_excused(OLD) || self.is_excused(NEW);
            if !excused {
                self.wrong = Some("a connection from outside is refused");
            }
            Inbound::Over
        };
    }
}

impl Model for State {
    fn next(&self) -> Vec<Self> {
        let mut found = Vec::new();
        if self.may_take_over() {
            found.push(self.with(Self::take_over));
        }
        if self.may_leave() {
            found.push(self.with(|s| s.old = OldAgent::Drains));
        }
        if self.may_close() {
            found.push(self.with(|s| {
                s.old = OldAgent::Gone;
                s.layouts[OLD].listener = false;
            }));
        }
        if !self.was_killed {
            if matches!(self.old, OldAgent::Serves | OldAgent::Drains) {
                found.push(self.with(|s| s.kill(OLD)));
            }
            if !matches!(self.new, Step::Absent | Step::Killed) {
                found.push(self.with(|s| s.kill(NEW)));
            }
        }
        match self.outbound {
            Outbound::Idle => found.extend(self.connect()),
            // The agent accepts it.
            Outbound::Queued(_) => found.push(self.with(|s| s.outbound = Outbound::Over)),
            Outbound::Captured(_) | Outbound::FastPath => found.push(self.with(Self::send)),
            Outbound::Over => {}
        }
        match self.inbound {
            Inbound::Idle => found.push(self.with(Self::arrive)),
            Inbound::Queued(_) => found.push(self.with(|s| s.inbound = Inbound::Over)),
            Inbound::Over => {}
        }
        found
    }

    fn wrong(&self) -> Option<&'static str> {
        self.wrong
    }

    fn wrong_at_the_end(&self) -> Option<&'static str> {
        let [old, new] = self.layouts;
        let is_whole = new.captures && new.enforces && new.steers && new.entry && new.listener;
        if !is_whole {
            return Some("the new layout has not taken over");
        }
        (old.captures || old.enforces || old.steers)
            .then_some("something of the old layout is still attached")
    }
}

#[test]
fn no_connection_is_lost_or_left_to_the_kernel_between_layouts() {
    let states = search(State::start(Fault::None)).unwrap();
    assert!(states > 500, "the search saw only {states} states");
}

#[test]
fn the_search_finds_each_mistake_that_the_order_of_steps_avoids() {
    for fault in [
        Fault::StopsCapturingFirst,
        Fault::StopsSteeringFirst,
        Fault::DoesNotWait,
        Fault::KeepsEnforcing,
        Fault::ServesBeforeItStops,
    ] {
        let found = search(State::start(fault)).expect_err(&format!("{fault:?} was not found"));
        println!("{fault:?}: {} in {} steps", found.what, found.path.len() - 1);
    }
}
