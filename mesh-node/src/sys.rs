//! Every unsafe system call of user space, behind safe functions: network namespaces, `bpf(2)`, socket options
//! that no crate wraps, netlink socket diagnostics. Nothing here decides anything.
#![allow(unsafe_code, reason = "the one room of user space in which unsafe code lives")]

pub mod bpf;
pub mod diag;
mod memory;
pub mod netns;
pub mod poll;
pub mod socket;
mod sysctl;
pub mod udp;

pub use diag::sock_destroy;
pub use memory::{bound_heap, trim_heap, unmap_code};
pub use netns::Netns;
pub use socket::{application_socket, listener, listener_groups, outbound_socket};
pub use sysctl::write_sysctl;

use std::io;

/// Turns a system call's `-1` into the error in errno.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// CLOCK_MONOTONIC in nanoseconds: the clock of `bpf_ktime_get_ns`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
