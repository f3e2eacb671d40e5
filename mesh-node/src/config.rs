//! What an operator can set, as typed sections.
//!
//! Sources, the later winning: defaults, the YAML file of `--config`, environment, flags. Environment names are
//! those of Istio's node proxy where the meaning is the same, so that an existing manifest keeps working.

mod args;
#[cfg(test)]
mod tests;

pub use args::RunArgs;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Everything the agent is told before it starts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Who this node is.
    pub node: Node,
    /// The control plane's workload feed.
    pub xds: Upstream,
    /// The certificate authority; an empty address means the one of `xds`.
    pub ca: Ca,
    /// Kernel capture and where pods are found.
    pub capture: Capture,
    /// The data path.
    pub proxy: Proxy,
    /// Admin, metrics, readiness.
    pub admin: Admin,
    /// Flow tracing.
    pub trace: Trace,
    /// How the agent leaves.
    pub drain: Drain,
    /// The CNI plugin that holds pods' starts.
    pub cni: Cni,
}

/// The CNI plugin; both directories, or none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Cni {
    /// The node's directory of plugins, where the plugin is put; empty for no plugin.
    pub bin_dir: PathBuf,
    /// The node's directory of configuration, where the plugin is chained.
    pub conf_dir: PathBuf,
    /// Directory that outlives a restart of the node, by the same path in the agent and on the host: which namespaces the
    /// plugin holds while no agent answers.
    pub state_dir: PathBuf,
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            bin_dir: PathBuf::new(),
            conf_dir: PathBuf::new(),
            state_dir: PathBuf::from(crate::cni::STATE_DIR),
        }
    }
}

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Node {
    /// The Kubernetes node name; workloads with this `node` are ours.
    pub name: String,
    /// Id of the cluster, as Istio's `CLUSTER_ID`.
    pub cluster_id: String,
    /// DNS suffix of services.
    pub cluster_domain: String,
    /// Among services of one hostname, one of this namespace wins over the first; empty for none.
    pub preferred_service_namespace: String,
    /// Id of the network that this node's pods share an address space with; empty for a single network.
    pub network: String,
    /// Namespace of the agent's service account (node metadata `NAMESPACE`).
    pub namespace: String,
    /// Service account of the agent (node metadata).
    pub service_account: String,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: String::new(),
            cluster_id: "Kubernetes".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            preferred_service_namespace: String::new(),
            network: String::new(),
            namespace: "istio-system".to_owned(),
            service_account: "mesh-node".to_owned(),
        }
    }
}

/// A gRPC server to connect to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Upstream {
    /// `https://host:port`, or `http://host:port` for plaintext.
    pub address: String,
    /// PEM file with the roots that the server must chain to (https only).
    pub root_cert: Option<PathBuf>,
    /// File with the bearer token; read again for each stream.
    pub token: Option<PathBuf>,
    /// Name that the server's certificate must carry, if not the host of `address`.
    pub alt_hostname: Option<String>,
}

/// The certificate authority.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Ca {
    /// As [`Upstream::address`]; empty means the address of `xds`.
    pub address: String,
    /// As [`Upstream::root_cert`]; none means the one of `xds`.
    pub root_cert: Option<PathBuf>,
    /// As [`Upstream::alt_hostname`]; none means the one of `xds`.
    pub alt_hostname: Option<String>,
    /// Lifetime that is asked for; the authority may shorten it.
    #[serde(with = "duration")]
    pub secret_ttl: Duration,
    /// PEM file of revocation lists, watched.
    pub crl: Option<PathBuf>,
}

impl Default for Ca {
    fn default() -> Self {
        Self {
            address: String::new(),
            root_cert: None,
            alt_hostname: None,
            secret_ttl: Duration::from_secs(86_400),
            crl: None,
        }
    }
}

/// What happens to enrolled pods' traffic while no agent is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FailMode {
    /// Connections outside the mesh: plaintext, without policy.
    Open,
    /// Connections are refused.
    Closed,
}

/// How two pods of this node talk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SameNode {
    /// Over plain kernel TCP once policy allowed the pair.
    #[default]
    Fast,
    /// Always through the tunnel.
    Tunnel,
}

/// Kernel capture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Capture {
    /// Directory with one JSON file per pod of this node; read where no container runtime is given.
    pub pods_dir: PathBuf,
    /// Socket of the node's container runtime (CRI), which knows the node's pods.
    pub cri_socket: Option<PathBuf>,
    /// cgroup2 directory that holds every process of the node; empty means the mount point. Where it is no cgroup2
    /// directory and its `unified` is (a machine with both hierarchies), that one.
    pub host_cgroup: PathBuf,
    /// cgroup2 directory that holds the pods; empty means the one that the container runtime names, else `host_cgroup`.
    pub pods_cgroup: PathBuf,
    /// cgroup2 directories in which kubelets live: their probes of declared ports reach the application directly. Empty
    /// means that they are looked for, where a container runtime is given.
    pub kubelet_cgroups: Vec<PathBuf>,
    /// bpffs directory for pins; empty means `/sys/fs/bpf/undermesh/<node>`.
    pub pin_dir: PathBuf,
    /// The compiled programs, if not the ones that were embedded at build time.
    pub bpf_object: Option<PathBuf>,
    /// While no agent is alive; none leaves it to the mesh (`failOpen`, which is closed by default).
    pub fail: Option<FailMode>,
    /// Whether pods' DNS queries are answered by the agent; true leaves it to mesh and pod (`dnsCapture`).
    pub dns: bool,
    /// Destinations that are left to the kernel; empty leaves it to the mesh (`excludedCIDRs`).
    pub excluded_cidrs: Vec<IpNet>,
    /// Destination ports that are left to the kernel; empty leaves it to the mesh (`excludedPorts`).
    pub excluded_ports: Vec<u16>,
    /// Whether destinations that the mesh does not know are captured; none leaves it to the mesh (`captureOutside`).
    pub capture_outside: Option<bool>,
    /// How long a pod stays captured after the control plane no longer wants it.
    #[serde(with = "duration")]
    pub linger: Duration,
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            pods_dir: PathBuf::from("/run/undermesh/pods"),
            cri_socket: None,
            host_cgroup: PathBuf::new(),
            pods_cgroup: PathBuf::new(),
            kubelet_cgroups: Vec::new(),
            pin_dir: PathBuf::new(),
            bpf_object: None,
            fail: None,
            dns: true,
            excluded_cidrs: Vec::new(),
            excluded_ports: Vec::new(),
            capture_outside: None,
            linger: Duration::from_secs(5),
        }
    }
}

/// The data path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Proxy {
    /// Data worker threads; 0 means one per core.
    pub workers: usize,
    /// The mesh-wide default for traffic within the node.
    pub same_node: SameNode,
    /// Per dial, TCP only.
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    /// How long a connection waits for its pod's workload and certificate.
    #[serde(with = "duration")]
    pub workload_wait: Duration,
    /// Open connections of all pods together; more are refused. 0 means as many as the limit of open files lets.
    pub max_connections: usize,
    /// Open connections of one pod; more are refused. 0 means no own limit.
    pub max_connections_per_pod: usize,
    /// Whether a pod, while it is not the node's only one, may hold no more connections than the node has free.
    pub fair_share: bool,
    /// Mebibytes that the agent may hold; above, more connections are refused. 0 means 7/8 of its cgroup's `memory.max`,
    /// where one is set.
    pub max_memory_mib: u64,
    /// Streams per tunnel, at most.
    pub pool_max_streams: usize,
    /// A tunnel without streams is closed after this long.
    #[serde(with = "duration")]
    pub pool_unused_release: Duration,
    /// Whether a CONNECT's 200 describes the destination workload to the source node.
    pub response_baggage: bool,
    /// Whether the first bytes of a connection may be sent before the peer has taken it.
    pub early_data: bool,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            workers: 0,
            same_node: SameNode::Fast,
            connect_timeout: Duration::from_secs(10),
            workload_wait: Duration::from_secs(5),
            max_connections: 0,
            max_connections_per_pod: 0,
            fair_share: true,
            max_memory_mib: 0,
            pool_max_streams: 100,
            pool_unused_release: Duration::from_secs(300),
            response_baggage: true,
            early_data: true,
        }
    }
}

/// Admin, metrics, readiness.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Admin {
    /// Directory of `admin.sock` and of the files by which agents of one node know each other.
    pub run_dir: PathBuf,
    /// Admin over TCP; loopback only.
    pub address: SocketAddr,
    /// Prometheus.
    pub metrics: SocketAddr,
    /// `GET /healthz/ready`.
    pub readiness: SocketAddr,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            run_dir: PathBuf::from("/run/undermesh"),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 15_000)),
            metrics: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15_020)),
            readiness: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15_021)),
        }
    }
}

/// Flow tracing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Trace {
    /// Whether the kernel is asked what becomes of connections and packets.
    pub enabled: bool,
    /// Whose.
    pub pods: TracedPods,
    /// One of two to the power of this many connections is followed.
    pub sample: u8,
    /// Events that the agent keeps in memory, some 350 bytes each.
    pub kept: usize,
    /// Where connections go as spans: OTLP over HTTP, or Zipkin's JSON.
    pub spans: Option<String>,
}

/// Whose connections are traced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TracedPods {
    /// Those of every pod of the node with a network of its own.
    #[default]
    All,
    /// Those of pods in the mesh.
    Captured,
}

impl Default for Trace {
    fn default() -> Self {
        Self { enabled: true, pods: TracedPods::All, sample: 0, kept: 4096, spans: None }
    }
}

/// How the agent leaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Drain {
    /// Connections that are still open after this long are cut.
    #[serde(with = "duration")]
    pub limit: Duration,
    /// Mebibytes that all draining agents of the node may hold; above, the oldest one cuts its connections.
    pub memory_mib: u64,
}

impl Default for Drain {
    fn default() -> Self {
        Self { limit: Duration::from_secs(3_600), memory_mib: 512 }
    }
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file of `--config` could not be read.
    #[error("cannot read the config file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file of `--config` is no configuration.
    #[error("config file {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, field and what is wrong.
        message: String,
    },
    /// A value is missing or makes no sense.
    #[error("{field}: {problem}; {fix}")]
    Invalid {
        /// Section and field as in the file, with the flag.
        field: &'static str,
        /// What is wrong.
        problem: String,
        /// What would be right.
        fix: &'static str,
    },
}

impl Config {
    /// Fills what depends on other fields and refuses what cannot work.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the first field that is wrong.
    pub fn complete(mut self) -> Result<Self, ConfigError> {
        if self.node.name.is_empty() {
            return Err(invalid("node.name (--node)", "is empty", "give the name of this node"));
        }
        if self.node.name.contains('/') {
            return Err(invalid("node.name (--node)", "contains '/'", "give the plain node name"));
        }
        check_address("xds.address (--xds)", &self.xds.address)?;
        if self.ca.address.is_empty() {
            self.ca.address.clone_from(&self.xds.address);
        }
        check_address("ca.address (--ca)", &self.ca.address)?;
        if self.ca.root_cert.is_none() {
            self.ca.root_cert.clone_from(&self.xds.root_cert);
        }
        if self.ca.alt_hostname.is_none() {
            self.ca.alt_hostname.clone_from(&self.xds.alt_hostname);
        }
        if self.capture.pin_dir.as_os_str().is_empty() {
            self.capture.pin_dir = PathBuf::from(crate::capture::PINS).join(&self.node.name);
        }
        self.capture.excluded_cidrs.iter_mut().for_each(|cidr| *cidr = cidr.trunc());
        if self.capture.excluded_cidrs.len() > crate::capture::MAX_PREFIXES {
            return Err(invalid(
                "capture.excludedCidrs (--exclude-cidr)",
                "has more than 4096 prefixes",
                "join neighbours into larger blocks",
            ));
        }
        if self.capture.excluded_ports.contains(&0) {
            return Err(invalid(
                "capture.excludedPorts (--exclude-port)",
                "contains 0",
                "give ports from 1 to 65535",
            ));
        }
        if self.capture.excluded_ports.len() > 1024 {
            return Err(invalid(
                "capture.excludedPorts (--exclude-port)",
                "has more than 1024 ports",
                "exclude address blocks instead",
            ));
        }
        if !self.admin.address.ip().is_loopback() {
            return Err(invalid(
                "admin.address (--admin)",
                "is not a loopback address",
                "admin has no authentication: use 127.0.0.1 or the unix socket",
            ));
        }
        self.check_cni()?;
        self.check_spans()?;
        if self.proxy.workers == 0 {
            self.proxy.workers = std::thread::available_parallelism().map_or(2, usize::from);
        }
        if self.proxy.workers > 256 {
            return Err(invalid("proxy.workers (--workers)", "is more than 256", "use at most one per core"));
        }
        if self.proxy.pool_max_streams < 2 {
            return Err(invalid("proxy.poolMaxStreams", "is less than 2", "the reference value is 100"));
        }
        for (field, value) in [
            ("proxy.connectTimeout", self.proxy.connect_timeout),
            ("proxy.poolUnusedRelease", self.proxy.pool_unused_release),
            ("ca.secretTtl (--secret-ttl)", self.ca.secret_ttl),
        ] {
            if value.is_zero() {
                return Err(invalid(field, "is zero", "give a positive duration such as 10s"));
            }
        }
        Ok(self)
    }

    fn check_spans(&self) -> Result<(), ConfigError> {
        const FIELD: &str = "trace.spans (--connection-spans)";
        let Some(to) = &self.trace.spans else { return Ok(()) };
        let fix =
            "give an address such as http://collector:4318/v1/traces, or http://zipkin:9411/api/v2/spans";
        to.parse::<crate::trace::spans::Collector>().map_err(|what| invalid(FIELD, what, fix))?;
        if !self.trace.enabled {
            return Err(invalid(
                FIELD,
                "is given without tracing",
                "leave --trace on: spans are made of what it tells",
            ));
        }
        Ok(())
    }

    fn check_cni(&self) -> Result<(), ConfigError> {
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        if given(&self.cni.bin_dir) != given(&self.cni.conf_dir) {
            return Err(invalid(
                "cni.binDir, cni.confDir (--cni-bin-dir, --cni-conf-dir)",
                "only one is given",
                "give both, or none for no CNI plugin",
            ));
        }
        if given(&self.cni.bin_dir) && self.capture.cri_socket.is_none() {
            return Err(invalid(
                "cni.binDir (--cni-bin-dir)",
                "is given without a container runtime",
                "give --cri-socket, too: the plugin holds pods that the runtime starts",
            ));
        }
        Ok(())
    }
}

fn invalid(field: &'static str, problem: &str, fix: &'static str) -> ConfigError {
    ConfigError::Invalid { field, problem: problem.to_owned(), fix }
}

fn check_address(field: &'static str, address: &str) -> Result<(), ConfigError> {
    let fix = "give https://host:port, or http://host:port for plaintext";
    let uri: http::Uri =
        address.parse().map_err(|e| invalid(field, &format!("{address:?} is no URI ({e})"), fix))?;
    match (uri.scheme_str(), uri.host(), uri.port_u16()) {
        (Some("http" | "https"), Some(_), Some(_)) => Ok(()),
        _ => Err(invalid(field, &format!("{address:?} lacks scheme, host or port"), fix)),
    }
}

/// Durations in files are written as people write them: `10s`, `1h 30m`.
mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*value))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_duration(&text)
            .map_err(|e| serde::de::Error::custom(format_args!("{text:?} is no duration such as 10s: {e}")))
    }
}
