//! The hand-over between agents as models, searched exhaustively: every interleaving of an old and a new agent, of pods
//! and connections that come at any moment, and of a kill at any step.
//!
//! Each step is one atomic action of the real thing and names the code that does it. [`handover`] is about agents of one
//! layout, which share maps and links; [`layouts`] about the replacement of programs and maps of another layout. The
//! faults are mistakes in the order or the care of a step; the search must find each.
//!
//! Time is not modelled. Where the code relies on it, the step says so and waits for what the time is meant to cover.

mod handover;
mod layouts;

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;

/// A system whose every state can be looked at.
trait Model: Clone + Eq + Hash + Debug {
    /// Every state that one step leads to.
    fn next(&self) -> Vec<Self>;
    /// What must not be, if it is.
    fn wrong(&self) -> Option<&'static str>;
    /// What must not be once no step is left.
    fn wrong_at_the_end(&self) -> Option<&'static str>;
}

/// What must not be, and how it came about: the states from the first to the one in which it is.
#[derive(Debug)]
struct Counterexample<S> {
    what: &'static str,
    path: Vec<S>,
}

/// Searches every state, and says how many there are, or what must not be.
fn search<S: Model>(start: S) -> Result<usize, Counterexample<S>> {
    let mut seen = HashSet::from([start.clone()]);
    // Each with the index of the state before it. Depth first: most mistakes show only at the end of a way.
    let mut states = vec![(start, 0)];
    let mut open = vec![0];
    while let Some(at) = open.pop() {
        let state = states[at].0.clone();
        let next: Vec<S> = state.next().into_iter().filter(|next| *next != state).collect();
        let wrong = state.wrong().or_else(|| if next.is_empty() { state.wrong_at_the_end() } else { None });
        if let Some(what) = wrong {
            return Err(Counterexample { what, path: path(&states, at) });
        }
        for next in next {
            if seen.insert(next.clone()) {
                open.push(states.len());
                states.push((next, at));
            }
        }
    }
    Ok(states.len())
}

fn path<S: Clone>(states: &[(S, usize)], mut at: usize) -> Vec<S> {
    let mut path = vec![states[at].0.clone()];
    while at > 0 {
        at = states[at].1;
        path.push(states[at].0.clone());
    }
    path.reverse();
    path
}
