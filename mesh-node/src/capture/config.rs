//! What the kernel side is told at start and while it runs.

use ipnet::IpNet;
use std::path::PathBuf;

/// How to load the kernel side.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    pub object: ObjectSource,
    /// cgroup2 directory above every process of the node: where the kubelet's probes are recognised. `None`: the
    /// mount's root.
    pub host_cgroup: Option<PathBuf>,
    /// cgroup2 directory above every pod: where connections are captured. `None`: `host_cgroup`.
    pub pods_cgroup: Option<PathBuf>,
    /// The node's own network namespace, where this process has another one. `None`: this process's.
    pub node_netns: Option<PathBuf>,
    /// Directory on a bpffs, such as `/sys/fs/bpf/undermesh/NODE`; pins go to `v<layout>` below it. `None`: nothing
    /// outlives this value (tests, doctor).
    pub pins: Option<PathBuf>,
    pub limits: Limits,
    pub settings: MeshSettings,
    /// Whether settings that an earlier agent left in the pins hold until [`super::Capture::set_config`].
    pub keep_settings: bool,
    /// Whether to show signs of life. Off only in tests.
    pub heartbeat: bool,
    /// Whether signs of life wait for [`super::Capture::serve`]: an agent that knows nothing of the mesh yet cannot
    /// serve, and pods fare by the fail mode until it can.
    pub silent_start: bool,
    /// Whether this process's own connections are exempt. Off only in tests, which play pod and agent at once.
    pub exempt_self: bool,
}

impl CaptureConfig {
    /// Defaults: mount root, no pins, fail closed.
    #[must_use]
    pub fn new(object: ObjectSource) -> Self {
        Self {
            object,
            host_cgroup: None,
            pods_cgroup: None,
            node_netns: None,
            pins: None,
            limits: Limits::default(),
            settings: MeshSettings::default(),
            keep_settings: false,
            heartbeat: true,
            silent_start: false,
            exempt_self: true,
        }
    }
}

/// Where the compiled programs come from.
#[derive(Clone, Debug)]
pub enum ObjectSource {
    /// What the build embedded.
    Embedded,
    /// A file.
    File(PathBuf),
}

/// Sizes of maps. They hold for pins from their creation on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pods enrolled at the same time.
    pub pods: u32,
    /// Captured connections that no worker has accepted yet; beyond it, connects are refused.
    pub pending: u32,
    /// Authorised connections that are not established yet.
    pub authorised: u32,
    /// Verdicts.
    pub verdicts: u32,
    /// Fast path connections with figures.
    pub flows: u32,
    /// Bytes of tracing events that nobody has read yet: a power of two of pages.
    pub trace_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pods: 4096,
            pending: 131_072,
            authorised: 65_536,
            verdicts: 65_536,
            flows: 65_536,
            trace_bytes: 1 << 16,
        }
    }
}

/// What happens without a living agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailMode {
    /// Connections go on, uncaptured.
    Open,
    /// Connections are refused.
    #[default]
    Closed,
}

/// Prefixes that [`MeshSettings::excluded`] and [`MeshSettings::included`] may hold together.
pub const MAX_PREFIXES: usize = 4096;

/// Mesh-wide settings that the programs read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    pub fail: FailMode,
    /// Whether port 53 goes to the DNS listeners.
    pub dns: bool,
    /// Whether allowed pairs of this node may use the fast path.
    pub fast_path: bool,
    /// Destinations left to the kernel.
    pub excluded: Vec<IpNet>,
    /// Destination ports left to the kernel.
    pub excluded_ports: Vec<u16>,
    /// If not empty, only destinations inside these are captured (an excluded prefix that is longer wins).
    pub included: Vec<IpNet>,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            fail: FailMode::Closed,
            dns: true,
            fast_path: true,
            excluded: Vec::new(),
            excluded_ports: Vec::new(),
            included: Vec::new(),
        }
    }
}
