//! The testbed: a small mesh out of network namespaces and cgroups.
//!
//! ```text
//!   um-<run>-net: bridge br0 (the underlay) ── um-<run>-ctl: mesh-control at 172.30.0.2
//!        │                     │
//!   um-<run>-<node a>     um-<run>-<node b>      mesh-node in the node's namespace; routes to its pods
//!        │ veth per pod        │
//!   um-<run>-<a>-<pod>    um-<run>-<b>-<pod>     unmodified programs, each pod in its own cgroup
//! ```
//!
//! Nothing touches the machine's own namespace, so that runs side by side cannot collide; names carry the run's
//! process id, and what a crashed run left is recognised by it ([`leftovers`]).

pub mod capture;
pub mod cgroup;
pub mod hbone;
pub mod http;
pub mod launch;
pub mod leftovers;
pub mod load;
pub mod mesh;
pub mod net;
pub mod netns;
pub mod objects;
pub mod pki;
pub mod pod;
pub mod process;
pub mod relay;
pub mod run;
pub mod testbed;
pub mod tokens;
pub mod wait;
pub mod wan;
pub mod waypoint;

pub use load::Load;
pub use pod::Pod;
pub use process::{Finished, Proc};
pub use testbed::{Node, Testbed, Topology};
pub use wait::until;
pub use waypoint::Waypoint;
