//! The data path over real sockets: a client's tunnel, the waypoint, applications with and without a tunnel.

mod bed;
mod framing;
mod limits;
mod requests;
mod resting;
mod streams;
mod traces;
