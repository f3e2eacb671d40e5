//! What the mesh and the operator of the node set, made into what the kernel programs are told: pure.
//!
//! Settings come with each workload that the control plane wants captured here. The kernel programs know one fail mode
//! and one list of destinations per node, so what holds is what the pods of the node agree on; where they differ (while
//! a change arrives, or because a control plane sends it per pod) the stricter side holds and the status says so. What
//! the operator gives explicitly for the node wins. Whether DNS queries are answered is known per pod.

#[cfg(test)]
mod tests;

use ipnet::IpNet;
use mesh_core::admin::{CaptureSettings, UDP_NOT_COVERED};
use mesh_core::state::{MeshState, NetworkMode, Settings, Workload};
use mesh_core::xds::ENROL_EXTENSION;

use crate::capture::{FailMode, MAX_PREFIXES, MeshSettings};
use crate::config::{Config, FailMode as GivenFailMode, SameNode};

/// What holds on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InForce {
    /// For the kernel programs.
    pub kernel: MeshSettings,
    /// What is set and cannot be done, in words for the status.
    pub problems: Vec<String>,
}

impl InForce {
    /// What the node's own configuration says where the mesh says nothing.
    #[must_use]
    pub fn of_config(config: &Config) -> Self {
        Self { kernel: kernel(&Settings::default(), config), problems: Vec::new() }
    }

    /// What holds with the mesh's settings; none when no pod of the node is wanted, and with it nothing known of them.
    #[must_use]
    pub fn of_mesh(state: &MeshState, config: &Config) -> Option<Self> {
        let ours = state.workloads().filter(|w| *w.node == *config.node.name);
        let wanted: Vec<_> = ours.filter(|w| w.extension(ENROL_EXTENSION).is_some()).collect();
        let mut problems = Vec::new();
        let mut read = Vec::new();
        for workload in &wanted {
            match workload.settings() {
                Ok(settings) => read.push(settings),
                Err(error) => problems.push(format!("{error}; the settings of the node's other pods hold")),
            }
        }
        if wanted.is_empty() {
            return None;
        }
        let agreed = agreed(&read, &mut problems);
        let mut kernel = kernel(&agreed, config);
        if !config.capture.capture_outside.or(agreed.capture_outside).unwrap_or(true) {
            kernel.included = known_addresses(state, &kernel.excluded);
            check_included(&mut kernel, &mut problems);
        }
        Some(Self { kernel, problems })
    }

    /// As the status shows it.
    #[must_use]
    pub fn describe(&self) -> CaptureSettings {
        CaptureSettings {
            excluded_cidrs: self.kernel.excluded.iter().map(ToString::to_string).collect(),
            excluded_ports: self.kernel.excluded_ports.clone(),
            capture_outside: self.kernel.included.is_empty(),
            problems: self.problems.clone(),
            not_covered: vec![UDP_NOT_COVERED.to_owned()],
        }
    }

    /// `open` or `closed`.
    #[must_use]
    pub fn fail(&self) -> &'static str {
        match self.kernel.fail {
            FailMode::Open => "open",
            FailMode::Closed => "closed",
        }
    }
}

/// Whether a pod's DNS queries are answered by the node. Settings that cannot be read leave the default.
#[must_use]
pub fn answers_dns(workload: &Workload) -> bool {
    workload.settings().map_or(true, |settings| settings.dns_capture != Some(false))
}

/// Settings without what is known per pod, and with the operator's own in place of the mesh's.
fn kernel(settings: &Settings, config: &Config) -> MeshSettings {
    let given = &config.capture;
    let open = given.fail.map_or(settings.fail_open, |mode| mode == GivenFailMode::Open);
    let excluded =
        if given.excluded_cidrs.is_empty() { &settings.excluded_cidrs } else { &given.excluded_cidrs };
    let ports =
        if given.excluded_ports.is_empty() { &settings.excluded_ports } else { &given.excluded_ports };
    MeshSettings {
        fail: if open { FailMode::Open } else { FailMode::Closed },
        dns: given.dns,
        fast_path: config.proxy.same_node == SameNode::Fast,
        excluded: excluded.clone(),
        excluded_ports: ports.clone(),
        included: Vec::new(),
    }
}

/// What all say, and the stricter side where they differ: closed, captured, not excluded.
fn agreed(all: &[Settings], problems: &mut Vec<String>) -> Settings {
    let Some((first, rest)) = all.split_first() else { return Settings::default() };
    let mut agreed = first.clone();
    for other in rest {
        agreed.fail_open &= other.fail_open;
        agreed.excluded_cidrs.retain(|cidr| other.excluded_cidrs.contains(cidr));
        agreed.excluded_ports.retain(|port| other.excluded_ports.contains(port));
        if other.capture_outside != Some(false) {
            agreed.capture_outside = Some(true);
        }
    }
    let outside = |s: &Settings| s.capture_outside != Some(false);
    let differs = [
        ("failOpen", rest.iter().any(|s| s.fail_open != first.fail_open)),
        ("excludedCIDRs", rest.iter().any(|s| s.excluded_cidrs != first.excluded_cidrs)),
        ("excludedPorts", rest.iter().any(|s| s.excluded_ports != first.excluded_ports)),
        ("captureOutside", rest.iter().any(|s| outside(s) != outside(first))),
    ];
    for (name, _) in differs.into_iter().filter(|(_, differs)| *differs) {
        problems.push(format!(
            "{name} differs between pods of this node, but holds for the whole node: the stricter side holds"
        ));
    }
    agreed
}

/// Every address of the node's network that the mesh knows, without those that are excluded: the kernel programs take
/// the longest prefix, so a host would win over the block that excludes it.
fn known_addresses(state: &MeshState, excluded: &[IpNet]) -> Vec<IpNet> {
    let network = &state.options().network;
    let reachable =
        state.workloads().filter(|w| w.network_mode == NetworkMode::Standard && w.network == *network);
    let pods = reachable.flat_map(|w| w.addresses.iter().copied()).map(IpNet::from);
    let services = state.services().flat_map(|s| {
        let hosts = s.service.vips.iter().filter(|v| v.network == *network).map(|v| IpNet::from(v.ip));
        let blocks = s.service.cidr_vips.iter().filter(|v| v.network == *network).map(|v| v.cidr);
        hosts.chain(blocks)
    });
    let mut known: Vec<IpNet> = pods.chain(services).filter(|n| !covered(n, excluded)).collect();
    known.sort_unstable();
    known.dedup();
    known
}

fn covered(net: &IpNet, by: &[IpNet]) -> bool {
    by.iter().any(|block| block.contains(net))
}

/// Without a list everything is captured, which is the stricter side.
fn check_included(kernel: &mut MeshSettings, problems: &mut Vec<String>) {
    let wanted = kernel.included.len() + kernel.excluded.len();
    if kernel.included.is_empty() {
        problems
            .push("captureOutside: false has no effect: every address of the mesh is excluded".to_owned());
    } else if wanted > MAX_PREFIXES {
        kernel.included.clear();
        problems.push(format!(
            "captureOutside: false has no effect: {wanted} addresses of the mesh and excluded prefixes, and the kernel \
             programs hold {MAX_PREFIXES}"
        ));
    }
}
