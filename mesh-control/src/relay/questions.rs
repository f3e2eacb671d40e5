//! Questions to nodes' agents on behalf of operators (`undermesh.node.v1.NodeService/AnswerQuestions`): an agent that can
//! call out to the control plane needs no way in of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::xds::proto::node::{NodeAnswer, NodeQuestion};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tracing::{debug, info};

use crate::replicas::Remote;

/// Questions to one node that wait to be sent.
const QUEUE: usize = 8;
/// A dump of ten thousand workloads is some ten megabytes.
pub(crate) const LARGEST: usize = 64 << 20;
/// Shorter than what a connection may take ([`mesh_core::admin::slots::CONNECTION_TIMEOUT`]).
const PATIENCE: Duration = Duration::from_secs(50);

/// What a node answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Of the body.
    pub content_type: String,
    /// All of it.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// No agent of that name.
    #[error("no agent of node {node:?} is connected to this control plane; connected are: {connected}")]
    Unknown {
        /// Who was asked.
        node: String,
        /// Who could have been, `none` if there is nobody.
        connected: String,
    },
    /// It went away, or what it says is too long.
    #[error("the agent of node {0:?} went away, or its answer is longer than {LARGEST} bytes")]
    Gone(String),
    /// It takes too long.
    #[error("the agent of node {0:?} has not answered within {PATIENCE:?}")]
    Late(String),
}

#[derive(Debug)]
struct Asked {
    target: String,
    answer: oneshot::Sender<Answer>,
}

#[derive(Debug)]
struct Agent {
    /// Tells a node's agent from its successor.
    number: u64,
    ask: mpsc::Sender<Asked>,
}

/// The agents that are connected, by node. Of two of one node, as while one replaces the other, the later answers.
#[derive(Debug)]
pub struct Agents {
    known: Mutex<Known>,
    changes: watch::Sender<u64>,
}

impl Default for Agents {
    fn default() -> Self {
        Self { known: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

#[derive(Debug, Default)]
struct Known {
    agents: BTreeMap<String, Agent>,
    last: u64,
    /// Other replicas by name, and the nodes whose agents answer them.
    elsewhere: BTreeMap<String, Elsewhere>,
}

#[derive(Debug)]
struct Elsewhere {
    nodes: Vec<String>,
    ask: Remote,
}

impl Agents {
    /// Names of the nodes whose agents are connected to any replica that is known, in order.
    #[must_use]
    pub fn nodes(&self) -> BTreeSet<String> {
        let known = self.lock();
        let elsewhere = known.elsewhere.values().flat_map(|replica| &replica.nodes);
        known.agents.keys().chain(elsewhere).cloned().collect()
    }

    /// Those of agents that are connected here.
    #[must_use]
    pub fn here(&self) -> Vec<String> {
        self.lock().agents.keys().cloned().collect()
    }

    /// Wakes when they have changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Which agents another replica can ask.
    pub fn elsewhere(&self, replica: &str, nodes: Vec<String>, ask: Remote) {
        self.lock().elsewhere.insert(replica.to_owned(), Elsewhere { nodes, ask });
    }

    /// Other replicas that can be asked, by name.
    #[must_use]
    pub fn replicas(&self) -> Vec<(String, Remote)> {
        let known = self.lock();
        known.elsewhere.iter().map(|(name, replica)| (name.clone(), replica.ask.clone())).collect()
    }

    /// Another replica is away.
    pub fn forget(&self, replica: &str) {
        self.lock().elsewhere.remove(replica);
    }

    /// Asks a node's agent for `target`, path and query of a GET, through another replica where it is connected there.
    ///
    /// # Errors
    /// There is no such agent, or it does not answer.
    pub async fn ask(&self, node: &str, target: &str) -> Result<Answer, NoAnswer> {
        let remote = {
            let known = self.lock();
            let knows = |replica: &&Elsewhere| replica.nodes.iter().any(|name| name == node);
            let elsewhere = known.elsewhere.values().find(knows);
            elsewhere.filter(|_| !known.agents.contains_key(node)).map(|replica| replica.ask.clone())
        };
        match remote {
            None => self.ask_here(node, target).await,
            Some(remote) => match timeout(PATIENCE, remote.ask(node, target)).await {
                Ok(answer) => answer.ok_or_else(|| NoAnswer::Gone(node.to_owned())),
                Err(_) => Err(NoAnswer::Late(node.to_owned())),
            },
        }
    }

    /// The same of an agent that is connected here.
    ///
    /// # Errors
    /// There is no such agent, or it does not answer.
    pub async fn ask_here(&self, node: &str, target: &str) -> Result<Answer, NoAnswer> {
        let ask = self.lock().agents.get(node).map(|agent| agent.ask.clone());
        let Some(ask) = ask else {
            let connected = Vec::from_iter(self.nodes()).join(", ");
            let connected = if connected.is_empty() { "none".to_owned() } else { connected };
            return Err(NoAnswer::Unknown { node: node.to_owned(), connected });
        };
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            ask.send(Asked { target: target.to_owned(), answer }).await.ok()?;
            answered.await.ok()
        };
        match timeout(PATIENCE, exchange).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(NoAnswer::Gone(node.to_owned())),
            Err(_) => Err(NoAnswer::Late(node.to_owned())),
        }
    }

    /// An agent that answers everything with what it was asked.
    #[cfg(test)]
    pub(crate) fn echo(&self, node: &str) {
        let (ask, mut asked) = mpsc::channel::<Asked>(1);
        self.came(node, ask);
        tokio::spawn(async move {
            while let Some(Asked { target, answer }) = asked.recv().await {
                let body = target.into_bytes().repeat(100_000);
                let _ = answer.send(Answer { status: 200, content_type: "text/plain".into(), body });
            }
        });
    }

    fn came(&self, node: &str, ask: mpsc::Sender<Asked>) -> u64 {
        let mut known = self.lock();
        known.last += 1;
        let number = known.last;
        known.agents.insert(node.to_owned(), Agent { number, ask });
        self.changes.send_modify(|n| *n += 1);
        number
    }

    fn went(&self, node: &str, number: u64) {
        let mut known = self.lock();
        if known.agents.get(node).is_some_and(|agent| agent.number == number) {
            known.agents.remove(node);
            self.changes.send_modify(|n| *n += 1);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer of which pieces are still to come.
#[derive(Debug)]
struct Pending {
    answer: oneshot::Sender<Answer>,
    body: Vec<u8>,
}

/// Answers that are awaited on one stream: pure.
#[derive(Debug, Default)]
struct Awaited {
    last: u64,
    pending: HashMap<u64, Pending>,
}

impl Awaited {
    /// The question to send. Those whose askers have gone are forgotten.
    fn question(&mut self, asked: Asked) -> NodeQuestion {
        self.pending.retain(|_, pending| !pending.answer.is_closed());
        self.last += 1;
        self.pending.insert(self.last, Pending { answer: asked.answer, body: Vec::new() });
        NodeQuestion { id: self.last, target: asked.target }
    }

    /// Takes a piece; one that nobody waits for is dropped.
    fn piece(&mut self, piece: NodeAnswer) {
        let Some(pending) = self.pending.get_mut(&piece.id) else { return };
        if pending.body.len() + piece.body.len() > LARGEST {
            self.pending.remove(&piece.id);
            return;
        }
        pending.body.extend_from_slice(&piece.body);
        if piece.more {
            return;
        }
        if let Some(Pending { answer, body }) = self.pending.remove(&piece.id) {
            let status = u16::try_from(piece.status).unwrap_or(502);
            // Whoever asked may have gone.
            let _ = answer.send(Answer { status, content_type: piece.content_type, body });
        }
    }
}

/// Asks one node until it goes. `node` is what its token says.
pub async fn follow(
    agents: Arc<Agents>,
    node: String,
    mut answers: Streaming<NodeAnswer>,
    out: mpsc::Sender<Result<NodeQuestion, Status>>,
) {
    let (ask, mut asked) = mpsc::channel(QUEUE);
    let number = agents.came(&node, ask);
    info!(node, "answers questions");
    let mut awaited = Awaited::default();
    loop {
        tokio::select! {
            answer = answers.message() => match answer {
                Ok(Some(piece)) => awaited.piece(piece),
                Ok(None) => break,
                Err(status) => {
                    debug!(node, %status, "a stream of answers ended");
                    break;
                }
            },
            Some(asked) = asked.recv() => {
                if out.send(Ok(awaited.question(asked))).await.is_err() {
                    break;
                }
            }
        }
    }
    agents.went(&node, number);
    info!(node, "answers no questions any more");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(id: u64, body: &str, more: bool) -> NodeAnswer {
        NodeAnswer { id, status: 200, content_type: "text/plain".into(), body: body.into(), more }
    }

    fn ask(awaited: &mut Awaited, target: &str) -> (NodeQuestion, oneshot::Receiver<Answer>) {
        let (answer, answered) = oneshot::channel();
        (awaited.question(Asked { target: target.into(), answer }), answered)
    }

    #[test]
    fn pieces_of_two_answers_come_mixed_and_are_told_apart() {
        let mut awaited = Awaited::default();
        let (a, mut of_a) = ask(&mut awaited, "/a");
        let (b, mut of_b) = ask(&mut awaited, "/b");
        assert_eq!((a.target.as_str(), b.target.as_str()), ("/a", "/b"));
        awaited.piece(piece(b.id, "1", true));
        awaited.piece(piece(a.id, "x", false));
        awaited.piece(piece(b.id, "2", false));
        awaited.piece(piece(99, "nobody asked", false));
        assert_eq!(of_a.try_recv().unwrap().body, b"x");
        assert_eq!(of_b.try_recv().unwrap().body, b"12");
        assert!(awaited.pending.is_empty());
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_forgotten() {
        let mut awaited = Awaited::default();
        let (gone, _) = ask(&mut awaited, "/a");
        let (_, _waits) = ask(&mut awaited, "/b");
        assert!(!awaited.pending.contains_key(&gone.id));
        assert_eq!(awaited.pending.len(), 1);
    }

    #[test]
    fn an_answer_without_an_end_is_given_up() {
        let mut awaited = Awaited::default();
        let (question, mut answered) = ask(&mut awaited, "/a");
        let large = "x".repeat(LARGEST / 2);
        for _ in 0..3 {
            awaited.piece(piece(question.id, &large, true));
        }
        assert!(awaited.pending.is_empty());
        assert!(answered.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_successor_answers_in_place_of_its_predecessor_and_stays_when_that_goes() {
        let agents = Agents::default();
        let error = agents.ask("a", "/status").await.unwrap_err();
        assert!(error.to_string().ends_with("connected are: none"), "{error}");
        let (old, _old) = mpsc::channel(1);
        let (new, mut asked) = mpsc::channel(1);
        let first = agents.came("a", old);
        let second = agents.came("a", new);
        agents.went("a", first);
        let answering = async {
            let asked: Asked = asked.recv().await.unwrap();
            assert_eq!(asked.target, "/status");
            asked
                .answer
                .send(Answer { status: 200, content_type: String::new(), body: b"{}".into() })
                .unwrap();
        };
        let (answer, ()) = tokio::join!(agents.ask("a", "/status"), answering);
        assert_eq!(answer.unwrap().body, b"{}");
        drop(asked);
        assert_eq!(agents.ask("a", "/status").await, Err(NoAnswer::Gone("a".into())));
        agents.went("a", second);
        assert!(agents.nodes().is_empty());
    }
}
