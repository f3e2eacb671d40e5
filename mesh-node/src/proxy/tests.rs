//! Two nodes in one process, over loopback: real sockets, TLS and HTTP/2; only the kernel's part is played by
//! [`Loopback`]. What needs the kernel is tested in the testbed.

pub(crate) mod bed;
mod early;
mod refusals;
mod sizes;
mod traffic;
