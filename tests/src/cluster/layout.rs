//! Where everything of a cluster is: names, directories, addresses. No input or output but its own small state file.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

/// Parent of every cluster's directory.
pub const CLUSTERS: &str = "/var/lib/undermesh-cluster";

/// The API server's address as nodes and pods see it: the bridge.
pub const API: Ipv4Addr = Ipv4Addr::new(10, 123, 0, 1);

/// The bridge's address over IPv6.
pub const BRIDGE6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0x123, 0, 0, 0, 0, 0, 1);

/// Its port.
pub const API_PORT: u16 = 6443;

/// The first address of services: `kubernetes.default`.
pub const FIRST_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 125, 0, 1);

/// Where services have their addresses.
pub const SERVICES: &str = "10.125.0.0/16";

/// The same over IPv6, which every node and pod has beside IPv4.
pub const SERVICES6: &str = "fd10:125::/112";

/// Where the load balancer has the addresses of services.
pub const BALANCED: &str = "10.126.0.0/16";

/// The first of them.
pub const FIRST_BALANCED: Ipv4Addr = Ipv4Addr::new(10, 126, 0, 1);

/// Where pods have theirs, over all nodes.
pub const PODS: &str = "10.124.0.0/16";

/// The same over IPv6.
pub const PODS6: &str = "fd10:124::/48";

/// The first address of services over IPv6.
pub const FIRST_SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd10, 0x125, 0, 0, 0, 0, 0, 1);

/// Last parts of the address of the cluster's DNS service.
const DNS: u8 = 10;

/// What is known of a started cluster, in its directory.
pub const STATE: &str = "cluster.json";

/// A cluster by name.
#[derive(Debug, Clone)]
pub struct Layout {
    name: String,
    dir: PathBuf,
}

/// What is known of a cluster that was started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Node names, in the order of their addresses.
    pub nodes: Vec<String>,
    /// Families of the addresses of nodes, pods and services.
    pub families: Families,
    /// Directory of kube-apiserver, kubelet, kubectl and their like.
    pub binaries: PathBuf,
    /// Directory of the image archives that nodes have.
    pub images: PathBuf,
    /// The address by which this machine reaches the API server.
    pub host: Ipv4Addr,
    /// The process whose end is the cluster's, if it is not to run until `down`.
    pub owner: Option<u32>,
}

/// Families of the addresses of nodes, pods and services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Families {
    /// Both, IPv4 first
    Both,
    /// IPv4 alone
    Ipv4,
    /// IPv6 alone
    Ipv6,
}

impl Families {
    /// Those of a pair that it has, in order.
    pub fn of<T>(self, four: T, six: T) -> Vec<T> {
        match self {
            Self::Both => vec![four, six],
            Self::Ipv4 => vec![four],
            Self::Ipv6 => vec![six],
        }
    }

    /// The same as programs take lists.
    pub fn list(self, four: impl ToString, six: impl ToString) -> String {
        self.of(four.to_string(), six.to_string()).join(",")
    }

    /// The first of a pair that it has.
    fn first(self, four: Ipv4Addr, six: Ipv6Addr) -> IpAddr {
        if self == Self::Ipv6 { six.into() } else { four.into() }
    }

    /// The API server's address as nodes and pods see it.
    pub fn api(self) -> IpAddr {
        self.first(API, BRIDGE6)
    }

    /// Address of the service of the cluster's DNS.
    pub fn dns(self) -> IpAddr {
        let [a, b, ..] = FIRST_SERVICE.octets();
        let mut six = FIRST_SERVICE6.octets();
        six[15] = DNS;
        self.first(Ipv4Addr::new(a, b, 0, DNS), six.into())
    }
}

impl Layout {
    /// The cluster that `UM_CLUSTER` names, by default `k8s`.
    ///
    /// # Errors
    /// The name cannot lead names of network devices.
    pub fn named() -> Result<Self> {
        let name = std::env::var("UM_CLUSTER").unwrap_or_default();
        Self::of(if name.is_empty() { "k8s" } else { &name })
    }

    /// A cluster by name.
    ///
    /// # Errors
    /// The name cannot lead names of network devices.
    pub fn of(name: &str) -> Result<Self> {
        let fits = name.len() <= 8
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !fits {
            bail!(
                "UM_CLUSTER is `{name}`: a cluster's name has one to eight lower-case letters or digits and starts \
                 with a letter"
            );
        }
        Ok(Self { name: name.to_owned(), dir: Path::new(CLUSTERS).join(name) })
    }

    /// The name without a prefix.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The leading part of every name: of the control plane's namespace, the machine's veth, the cgroup.
    pub fn prefix(&self) -> String {
        format!("um-{}", self.name)
    }

    /// Network namespace of a node.
    pub fn node_netns(&self, node: &str) -> String {
        format!("{}-{node}", self.prefix())
    }

    /// Its directory, or a file below.
    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.join(below)
    }

    /// A node's directory, or a file below.
    pub fn node_path(&self, node: &str, below: &str) -> PathBuf {
        self.dir.join("nodes").join(node).join(below)
    }

    /// A process's output.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("logs").join(format!("{name}.log"))
    }

    /// The administrator's kubeconfig for programs on this machine.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    /// What was started.
    ///
    /// # Errors
    /// Nothing was.
    pub fn state(&self) -> Result<State> {
        let path = self.path(STATE);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("no cluster `{}` is up ({}): run `cargo xtask cluster up`", self.name, path.display())
        })?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged: run `cargo xtask cluster down`", path.display()))
    }

    /// Notes what was started.
    ///
    /// # Errors
    /// The directory is not writable.
    pub fn note(&self, state: &State) -> Result<()> {
        let path = self.path(STATE);
        std::fs::create_dir_all(&self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
        let text = serde_json::to_string_pretty(state).context("cannot write the state as JSON")?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Name of node `index`, from 1.
pub fn node_name(index: u8) -> String {
    format!("n{index}")
}

/// Index of a node by name.
pub fn node_index(node: &str) -> Option<u8> {
    node.strip_prefix('n')?.parse().ok().filter(|index| *index > 0 && *index <= MOST_NODES)
}

/// More nodes than this have no addresses.
pub const MOST_NODES: u8 = 9;

/// Address of node `index` on the bridge.
pub fn node_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 123, 0, 10 + index)
}

/// The same over IPv6.
pub fn node_address6(index: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd10, 0x123, 0, 0, 0, 0, 0, 0x10 + u16::from(index))
}

/// IPv6 addresses of the pods of node `index`.
pub fn pod_cidr6(index: u8) -> String {
    format!("fd10:124:0:{index}::/64")
}

/// Addresses of the pods of node `index`.
pub fn pod_cidr(index: u8) -> String {
    format!("10.124.{index}.0/24")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_whose_name_is_no_device_name_is_refused() {
        assert!(Layout::of("k8s").is_ok());
        for bad in ["", "K8s", "8s", "with-dash", "ninechars"] {
            let error = Layout::of(bad).unwrap_err().to_string();
            assert!(error.contains("UM_CLUSTER") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn devices_of_the_longest_name_fit_the_kernel() {
        let layout = Layout::of("eightest").unwrap();
        assert!(layout.prefix().len() <= 15 && layout.node_netns(&node_name(MOST_NODES)).len() <= 15);
    }

    #[test]
    fn addresses_are_of_the_families_that_a_cluster_has() {
        assert_eq!(Families::Both.list(PODS, PODS6), "10.124.0.0/16,fd10:124::/48");
        assert_eq!(Families::Ipv6.list(PODS, PODS6), PODS6);
        assert_eq!(Families::Both.dns().to_string(), "10.125.0.10");
        assert_eq!(Families::Ipv6.dns().to_string(), "fd10:125::a");
        assert_eq!(Families::Ipv4.api(), API);
    }

    #[test]
    fn nodes_are_found_by_their_names() {
        assert_eq!(node_index("n2"), Some(2));
        assert_eq!(node_address(2).to_string(), "10.123.0.12");
        for bad in ["n0", "n10", "2", "n", "nn"] {
            assert_eq!(node_index(bad), None, "{bad}");
        }
    }
}
