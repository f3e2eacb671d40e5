//! The DNS proxy: answers pods' queries for names of the mesh from the agent's own model.
//!
//! Why: a name that only the mesh knows (a `ServiceEntry` host with an allocated address) has to resolve, and a
//! headless service has to resolve to endpoints that the mesh would pick, without asking a server that may not
//! know either. Every other name goes to the server that the application asked.
//!
//! How a query goes: capture sends what a pod sends to port 53 (UDP and TCP) to sockets inside the pod's network
//! namespace; [`message::read`] takes the bytes apart; [`answer()`] decides from the current snapshot; the answer
//! goes back from the address and port that was asked, or the bytes go on, from inside the namespace, to the
//! server that capture says was asked ([`PodNetwork::asked`]), or to the agent's own servers.
//!
//! Where it runs: on one thread of its own with one runtime. Not on the data workers: a flood of queries or a slow
//! name server must not delay a byte of a connection, and DNS of a node is far less than a thread's worth. Within
//! the thread pods take turns, and [`Limits`] bound what each can make it hold.
//!
//! To serve a pod: [`Server::serve_pod`] between [`crate::capture::Capture::enrol`] and `activate`, for as long as
//! its [`PodHandle`] lives. Without the kernel side (tests): [`Server::serve`].
//!
//! | module | for |
//! |---|---|
//! | [`names`] | which hostnames a queried name may mean (pure) |
//! | [`answer`] | the decision about one query (pure) |
//! | [`message`] | bytes in and out (pure) |
//! | `pod`, `udp`, `tcp`, `upstream` | one pod's queries on sockets |
//! | `captured` | sockets of an enrolled pod |
//! | `recent` | which nameservers a pod has not asked for longest (pure) |
//! | `server` | the thread |
//! | [`resolv`] | the agent's own name servers |

pub mod answer;
mod captured;
pub mod message;
mod metrics;
pub mod names;
mod pod;
mod recent;
pub mod resolv;
#[cfg(test)]
mod samples;
mod server;
mod tcp;
mod udp;
mod upstream;

pub use answer::{Client, Outcome, Rules, answer};
pub use metrics::{Listener, Metrics};
pub use names::ClusterDomain;
pub use pod::PodNetwork;
pub use server::{Limits, Pod, PodHandle, Server, Settings, Snapshots};

/// What a query came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// Messages with a length, on a connection.
    Tcp,
}

impl Transport {
    /// Label of the metric.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}
