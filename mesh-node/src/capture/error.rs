//! What can go wrong on the kernel side, in words that carry the fix.

use std::io;
use std::path::PathBuf;

/// An error of the kernel side.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(
        "no kernel programs: this binary embeds none, and neither --bpf-object nor UM_BPF_OBJECT names a file; \
         `cargo xtask build` builds and embeds them"
    )]
    NoObject,
    #[error("kernel programs {path}: {source}; `cargo xtask build` builds them")]
    Object { path: PathBuf, source: io::Error },
    #[error(
        "no cgroup2 mount in /proc/self/mountinfo; mount one: `mount -t cgroup2 none /sys/fs/cgroup/unified`"
    )]
    NoCgroup2,
    #[error("cgroup {path}: {source}; it must be a directory of the cgroup2 hierarchy")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("pin directory {path}: {source}; it must be on a bpffs: `mount -t bpf bpf /sys/fs/bpf`")]
    PinDirectory { path: PathBuf, source: io::Error },
    #[error("pin {path}: {source}; remove it if no agent of this node uses it")]
    Pin { path: PathBuf, source: io::Error },
    #[error("cannot load the kernel programs: {0}; needs root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON)")]
    Load(Box<aya::EbpfError>),
    #[error("kernel program `{name}`: {source}; `mesh-node doctor` says what this kernel lacks")]
    Program { name: &'static str, source: Box<aya::programs::ProgramError> },
    #[error("the object has no program `{0}`: it belongs to another version; `cargo xtask build`")]
    NoProgram(&'static str),
    #[error("the object has no map `{0}`: it belongs to another version; `cargo xtask build`")]
    NoMap(&'static str),
    #[error("cannot attach `{name}` to {target}: {source}; `mesh-node doctor` says what this kernel lacks")]
    Attach { name: &'static str, target: String, source: io::Error },
    #[error("map `{map}`: {source}")]
    Map { map: &'static str, source: io::Error },
    #[error("map `{map}` is full: {wanted} entries are wanted; shorten the list or raise the limits")]
    MapFull { map: &'static str, wanted: usize },
    #[error("pod {pod}: cannot {action}: {source}")]
    Pod { pod: String, action: &'static str, source: io::Error },
    #[error("pod {pod}: in the node's own network namespace (hostNetwork): never enrolled")]
    HostNetwork { pod: String },
    #[error("pod {pod}: all {max} places for pods are taken; raise the limit of pods")]
    NoSlot { pod: String, max: u32 },
    #[error("pod {pod}: its network namespace is already enrolled as {other}")]
    Duplicate { pod: String, other: String },
    #[error(
        "pod {pod}: {open} of {limit} descriptors are in use, one pod needs up to {needed}; \
         raise the limit of open files (LimitNOFILE, or CAP_SYS_RESOURCE)"
    )]
    Descriptors { pod: String, open: u64, limit: u64, needed: u64 },
    #[error("cannot start the thread `{name}`: {source}")]
    Thread { name: &'static str, source: io::Error },
}
