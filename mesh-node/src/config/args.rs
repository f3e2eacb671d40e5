//! Flags and environment of `mesh-node run`, laid over the file and the defaults.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use super::{Config, ConfigError, FailMode, SameNode, TracedPods};

/// `mesh-node run`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    after_help = "Example:\n  mesh-node run --node worker-1 --xds https://mesh-control:15012 \\\n    --token /run/undermesh/token --root-cert /run/undermesh/root-cert.pem --pods-dir /run/undermesh/pods"
)]
pub struct RunArgs {
    /// YAML file with the same settings, in sections
    #[arg(long, value_name = "FILE", env = "UM_CONFIG")]
    pub config: Option<PathBuf>,
    /// Name of this node
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node: Option<String>,
    /// Control plane: https://host:port, or http://host:port for plaintext
    #[arg(long, value_name = "URL", env = "XDS_ADDRESS")]
    pub xds: Option<String>,
    /// Certificate authority [default: the address of --xds]
    #[arg(long, value_name = "URL", env = "CA_ADDRESS")]
    pub ca: Option<String>,
    /// File with the node's bearer token
    #[arg(long, value_name = "FILE", env = "AUTH_TOKEN")]
    pub token: Option<PathBuf>,
    /// PEM roots that the control plane's certificate must chain to
    #[arg(long, value_name = "FILE", env = "XDS_ROOT_CA")]
    pub root_cert: Option<PathBuf>,
    /// PEM roots of the certificate authority's server [default: --root-cert]
    #[arg(long, value_name = "FILE", env = "CA_ROOT_CA")]
    pub ca_root_cert: Option<PathBuf>,
    /// Name that the control plane's certificate must carry [default: the host of --xds]
    #[arg(long, value_name = "HOST", env = "ALT_XDS_HOSTNAME")]
    pub xds_hostname: Option<String>,
    /// Name that the authority's certificate must carry [default: that of --xds-hostname]
    #[arg(long, value_name = "HOST", env = "ALT_CA_HOSTNAME")]
    pub ca_hostname: Option<String>,
    /// Lifetime to ask for in certificates
    #[arg(long, value_name = "DURATION", env = "SECRET_TTL", value_parser = humantime::parse_duration)]
    pub secret_ttl: Option<Duration>,
    /// PEM file of certificate revocation lists
    #[arg(long, value_name = "FILE", env = "CRL_PATH")]
    pub crl: Option<PathBuf>,
    /// Id of the cluster
    #[arg(long, value_name = "ID", env = "CLUSTER_ID")]
    pub cluster_id: Option<String>,
    /// DNS suffix of services
    #[arg(long, value_name = "DOMAIN", env = "CLUSTER_DOMAIN")]
    pub cluster_domain: Option<String>,
    /// Namespace whose services win among several of one hostname
    #[arg(long, value_name = "NAMESPACE", env = "PREFERED_SERVICE_NAMESPACE")]
    pub preferred_service_namespace: Option<String>,
    /// Id of the network of this node
    #[arg(long, value_name = "ID", env = "NETWORK")]
    pub network: Option<String>,
    /// Namespace of the agent's service account
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    pub namespace: Option<String>,
    /// The agent's service account
    #[arg(long, value_name = "NAME", env = "SERVICE_ACCOUNT")]
    pub service_account: Option<String>,
    /// Directory with one JSON file per pod of this node
    #[arg(long, value_name = "DIR", env = "UM_PODS_DIR")]
    pub pods_dir: Option<PathBuf>,
    /// Socket of the container runtime (CRI) to ask for the pods of this node, instead of --pods-dir
    #[arg(long, value_name = "SOCKET", env = "UM_CRI_SOCKET")]
    pub cri_socket: Option<PathBuf>,
    /// cgroup2 directory that holds every process of the node
    #[arg(long, value_name = "DIR", env = "UM_HOST_CGROUP")]
    pub host_cgroup: Option<PathBuf>,
    /// cgroup2 directory that holds the pods [default with --cri-socket: what the runtime says]
    #[arg(long, value_name = "DIR", env = "UM_PODS_CGROUP")]
    pub pods_cgroup: Option<PathBuf>,
    /// cgroup2 directory of a kubelet, for its probes; may be repeated [default with --cri-socket: looked for]
    #[arg(long, value_name = "DIR", env = "UM_KUBELET_CGROUPS", value_delimiter = ',')]
    pub kubelet_cgroup: Vec<PathBuf>,
    /// bpffs directory for pins [default: /sys/fs/bpf/undermesh/NODE]
    #[arg(long, value_name = "DIR", env = "UM_PIN_DIR")]
    pub pin_dir: Option<PathBuf>,
    /// Compiled kernel programs to use instead of the embedded ones
    #[arg(long, value_name = "FILE", env = "UM_BPF_OBJECT")]
    pub bpf_object: Option<PathBuf>,
    /// What happens to enrolled pods while no agent is alive [default: the mesh's failOpen]
    #[arg(long, value_name = "MODE", env = "UM_FAIL")]
    pub fail: Option<FailMode>,
    /// Whether the agent answers pods' DNS queries; true leaves it to dnsCapture of mesh and pod
    #[arg(long, value_name = "BOOL", env = "UM_DNS")]
    pub dns: Option<bool>,
    /// Destinations left to the kernel, such as 10.0.0.0/8; may be repeated [default: the mesh's excludedCIDRs]
    #[arg(long, value_name = "CIDR", env = "UM_EXCLUDE_CIDRS", value_delimiter = ',')]
    pub exclude_cidr: Vec<IpNet>,
    /// Destination port that is left to the kernel; may be repeated [default: the mesh's excludedPorts]
    #[arg(long, value_name = "PORT", env = "UM_EXCLUDE_PORTS", value_delimiter = ',')]
    pub exclude_port: Vec<u16>,
    /// Whether destinations outside the mesh are captured [default: the mesh's captureOutside]
    #[arg(long, value_name = "BOOL", env = "UM_CAPTURE_OUTSIDE")]
    pub capture_outside: Option<bool>,
    /// Data worker threads [default: one per core]
    #[arg(long, value_name = "N", env = "ZTUNNEL_WORKER_THREADS")]
    pub workers: Option<usize>,
    /// How two pods of this node talk
    #[arg(long, value_name = "MODE", env = "UM_SAME_NODE")]
    pub same_node: Option<SameNode>,
    /// Open connections of all pods together, at most
    #[arg(long, value_name = "N", env = "UM_MAX_CONNECTIONS")]
    pub max_connections: Option<usize>,
    /// Open connections of one pod, at most
    #[arg(long, value_name = "N", env = "UM_MAX_CONNECTIONS_PER_POD")]
    pub max_connections_per_pod: Option<usize>,
    /// Whether a pod must leave as many connections free as it holds, while other pods are enrolled
    #[arg(long, value_name = "BOOL", env = "UM_FAIR_SHARE")]
    pub fair_share: Option<bool>,
    /// Mebibytes that the agent may hold before it refuses connections [default: 7/8 of its cgroup's memory.max]
    #[arg(long, value_name = "MIB", env = "UM_MAX_MEMORY_MIB")]
    pub max_memory: Option<u64>,
    /// Streams per tunnel, at most
    #[arg(long, value_name = "N", env = "POOL_MAX_STREAMS_PER_CONNECTION")]
    pub pool_max_streams: Option<usize>,
    /// A tunnel without streams is closed after this long
    #[arg(long, value_name = "DURATION", env = "POOL_UNUSED_RELEASE_TIMEOUT", value_parser = humantime::parse_duration)]
    pub pool_unused_release: Option<Duration>,
    /// Whether CONNECT's 200 describes the destination workload
    #[arg(long, value_name = "BOOL", env = "ENABLE_RESPONSE_BAGGAGE")]
    pub response_baggage: Option<bool>,
    /// Whether a connection's first bytes go with its CONNECT, when the peer was heard a moment ago
    #[arg(long, value_name = "BOOL", env = "UM_EARLY_DATA")]
    pub early_data: Option<bool>,
    /// Directory of the node's CNI plugins; the mesh's is put there, and chained [default: no plugin]
    #[arg(long, value_name = "DIR", env = "UM_CNI_BIN_DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Directory of the node's CNI configuration
    #[arg(long, value_name = "DIR", env = "UM_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Directory for what the plugin reads while no agent answers; the same path on the host
    #[arg(long, value_name = "DIR", env = "UM_CNI_STATE_DIR")]
    pub cni_state_dir: Option<PathBuf>,
    /// Directory of admin.sock
    #[arg(long, value_name = "DIR", env = "UM_RUN_DIR")]
    pub run_dir: Option<PathBuf>,
    /// Admin address, loopback only
    #[arg(long, value_name = "ADDR", env = "UM_ADMIN")]
    pub admin: Option<SocketAddr>,
    /// Prometheus address
    #[arg(long, value_name = "ADDR", env = "UM_METRICS")]
    pub metrics: Option<SocketAddr>,
    /// Readiness address
    #[arg(long, value_name = "ADDR", env = "UM_READINESS")]
    pub readiness: Option<SocketAddr>,
    /// Whether the kernel is asked what becomes of connections and packets (`meshctl flows`)
    #[arg(long, value_name = "BOOL", env = "UM_TRACE")]
    pub trace: Option<bool>,
    /// Whose connections are traced
    #[arg(long, value_name = "PODS", env = "UM_TRACE_PODS")]
    pub trace_pods: Option<TracedPods>,
    /// Trace one of two to the power of N connections
    #[arg(long, value_name = "N", env = "UM_TRACE_SAMPLE", value_parser = clap::value_parser!(u8).range(..=20))]
    pub trace_sample: Option<u8>,
    /// Traced events that the agent keeps
    #[arg(long, value_name = "N", env = "UM_TRACE_KEPT")]
    pub trace_kept: Option<usize>,
    /// Send each connection as a span to this collector: OTLP over HTTP (http://HOST:4318/v1/traces), or Zipkin's JSON
    /// (http://HOST:9411/api/v2/spans)
    #[arg(long, value_name = "URL", env = "UM_CONNECTION_SPANS")]
    pub connection_spans: Option<String>,
    /// How long connections may go on after SIGTERM
    #[arg(long, value_name = "DURATION", env = "CONNECTION_TERMINATION_DEADLINE", value_parser = humantime::parse_duration)]
    pub drain_limit: Option<Duration>,
    /// Memory that all draining agents of the node may hold, in mebibytes; above, the oldest one ends
    #[arg(long, value_name = "MIB", env = "UM_DRAIN_MEMORY")]
    pub drain_memory: Option<u64>,
}

impl RunArgs {
    /// Reads the file if one is given, lays flags and environment over it, and checks the whole.
    ///
    /// # Errors
    /// [`ConfigError`] names the file or field that is wrong.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let mut config = self.config.as_deref().map_or_else(|| Ok(Config::default()), read)?;
        self.overlay(&mut config);
        config.complete()
    }

    fn overlay(&self, config: &mut Config) {
        let Config { node, xds, ca, capture, proxy, admin, trace, drain, cni } = config;
        set(&mut node.name, &self.node);
        set(&mut node.cluster_id, &self.cluster_id);
        set(&mut node.cluster_domain, &self.cluster_domain);
        set(&mut node.preferred_service_namespace, &self.preferred_service_namespace);
        set(&mut node.network, &self.network);
        set(&mut node.namespace, &self.namespace);
        set(&mut node.service_account, &self.service_account);
        set(&mut xds.address, &self.xds);
        set_option(&mut xds.root_cert, &self.root_cert);
        set_option(&mut xds.token, &self.token);
        set_option(&mut xds.alt_hostname, &self.xds_hostname);
        set(&mut ca.address, &self.ca);
        set_option(&mut ca.root_cert, &self.ca_root_cert);
        set_option(&mut ca.alt_hostname, &self.ca_hostname);
        set(&mut ca.secret_ttl, &self.secret_ttl);
        set_option(&mut ca.crl, &self.crl);
        set(&mut capture.pods_dir, &self.pods_dir);
        set_option(&mut capture.cri_socket, &self.cri_socket);
        set(&mut capture.host_cgroup, &self.host_cgroup);
        set(&mut capture.pods_cgroup, &self.pods_cgroup);
        set_list(&mut capture.kubelet_cgroups, &self.kubelet_cgroup);
        set(&mut capture.pin_dir, &self.pin_dir);
        set_option(&mut capture.bpf_object, &self.bpf_object);
        set_option(&mut capture.fail, &self.fail);
        set(&mut capture.dns, &self.dns);
        set_list(&mut capture.excluded_cidrs, &self.exclude_cidr);
        set_list(&mut capture.excluded_ports, &self.exclude_port);
        set_option(&mut capture.capture_outside, &self.capture_outside);
        set(&mut proxy.workers, &self.workers);
        set(&mut proxy.same_node, &self.same_node);
        set(&mut proxy.max_connections, &self.max_connections);
        set(&mut proxy.max_connections_per_pod, &self.max_connections_per_pod);
        set(&mut proxy.fair_share, &self.fair_share);
        set(&mut proxy.max_memory_mib, &self.max_memory);
        set(&mut proxy.pool_max_streams, &self.pool_max_streams);
        set(&mut proxy.pool_unused_release, &self.pool_unused_release);
        set(&mut proxy.response_baggage, &self.response_baggage);
        set(&mut proxy.early_data, &self.early_data);
        set(&mut cni.bin_dir, &self.cni_bin_dir);
        set(&mut cni.conf_dir, &self.cni_conf_dir);
        set(&mut cni.state_dir, &self.cni_state_dir);
        set(&mut admin.run_dir, &self.run_dir);
        set(&mut admin.address, &self.admin);
        set(&mut admin.metrics, &self.metrics);
        set(&mut admin.readiness, &self.readiness);
        set(&mut trace.enabled, &self.trace);
        set(&mut trace.pods, &self.trace_pods);
        set(&mut trace.sample, &self.trace_sample);
        set(&mut trace.kept, &self.trace_kept);
        set_option(&mut trace.spans, &self.connection_spans);
        set(&mut drain.limit, &self.drain_limit);
        set(&mut drain.memory_mib, &self.drain_memory);
    }
}

fn read(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    serde_saphyr::from_str(&text)
        .map_err(|e| ConfigError::Parse { path: path.to_owned(), message: e.to_string() })
}

fn set<T: Clone>(field: &mut T, given: &Option<T>) {
    if let Some(value) = given {
        field.clone_from(value);
    }
}

fn set_list<T: Clone>(field: &mut Vec<T>, given: &[T]) {
    if !given.is_empty() {
        given.clone_into(field);
    }
}

fn set_option<T: Clone>(field: &mut Option<T>, given: &Option<T>) {
    if given.is_some() {
        field.clone_from(given);
    }
}
