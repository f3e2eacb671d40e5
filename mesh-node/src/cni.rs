//! The chained CNI plugin, which holds the start of a pod until the pod is captured, and the agent's side of it.
//!
//! | module | for |
//! |---|---|
//! | [`plugin`] | the plugin: a process of the container runtime, for the blink of an eye |
//! | [`message`] | what plugin and agent say to each other |
//! | [`gate`] | whether a pod is held: pure |
//! | [`server`] | the agent's side |
//! | [`conflist`] | the runtime's CNI configuration with and without the plugin: pure |
//! | [`install`] | putting both on the node, and keeping them there |
//!
//! The plugin is this binary under another name ([`NAME`]). It needs no credentials: it asks the agent over a socket, and
//! without one a file says which namespaces are in the mesh. A pod outside them is never held, whatever is away. A pod
//! that is held and cannot be captured in time fails to start with a named error, and the kubelet tries again. What starts
//! without the plugin is captured a moment later, when the agent sees it.

pub mod conflist;
pub mod gate;
pub mod install;
pub mod message;
pub mod plugin;
pub mod server;

/// Type of the plugin in CNI configuration, and name of its file.
pub const NAME: &str = "undermesh-cni";
/// The agent's socket for it, in the run directory.
pub const SOCKET: &str = "cni.sock";
/// The file that stands in for the agent, in the state directory: it outlives a restart of the node, after which pods of
/// the mesh wait for the agent.
pub const STATE: &str = "cni.json";
/// Where they are unless said otherwise.
pub const RUN_DIR: &str = "/run/undermesh";
/// See [`RUN_DIR`].
pub const STATE_DIR: &str = "/var/lib/undermesh";
