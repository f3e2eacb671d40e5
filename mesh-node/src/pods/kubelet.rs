//! Finds the node's kubelet, whose probes are recognised by its cgroup.

use std::fs;
use std::path::{Path, PathBuf};

/// What processes with a kubelet inside are called.
const NAMES: [&str; 5] = ["kubelet", "kubelite", "k3s-server", "k3s-agent", "rke2"];

/// Looks for kubelets in `/proc`, which shows them in the host's pid namespace.
#[derive(Debug)]
pub struct Kubelets {
    proc: PathBuf,
    /// Where the host's cgroup2 hierarchy is seen.
    mount: PathBuf,
    /// Process ids of the kubelets that were found, and their cgroups.
    found: Vec<(u32, PathBuf)>,
}

impl Kubelets {
    /// None found yet. `mount` is the root of the host's cgroup2 hierarchy.
    #[must_use]
    pub fn new(mount: PathBuf) -> Self {
        Self { proc: PathBuf::from("/proc"), mount, found: Vec::new() }
    }

    /// The cgroups of the kubelets of this moment. Cheap while they are the ones that were found last.
    pub fn cgroups(&mut self) -> Vec<PathBuf> {
        let same = !self.found.is_empty()
            && self.found.iter().all(|(pid, cgroup)| self.cgroup_of(*pid).as_ref() == Some(cgroup));
        if !same {
            self.found = self.look();
        }
        self.found.iter().map(|(_, cgroup)| cgroup.clone()).collect()
    }

    fn look(&self) -> Vec<(u32, PathBuf)> {
        let Ok(entries) = fs::read_dir(&self.proc) else { return Vec::new() };
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        pids.filter_map(|pid| Some((pid, self.cgroup_of(pid)?))).collect()
    }

    /// The cgroup of a process, if it is a kubelet.
    fn cgroup_of(&self, pid: u32) -> Option<PathBuf> {
        let process = self.proc.join(pid.to_string());
        let name = fs::read_to_string(process.join("comm")).ok()?;
        if !NAMES.contains(&name.trim_end()) {
            return None;
        }
        let text = fs::read_to_string(process.join("cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        // In a cgroup namespace of its own the reader sees its way up first. A path that is wrong then holds another
        // process, which the list of its processes tells.
        let below = path.trim_start_matches("/..").trim_start_matches('/');
        let cgroup = self.mount.join(below);
        is_listed(&cgroup, pid).then_some(cgroup)
    }
}

fn is_listed(cgroup: &Path, pid: u32) -> bool {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().any(|line| line.parse() == Ok(pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn process(&self, pid: u32, name: &str, cgroup: &str) {
            let process = self.0.path().join("proc").join(pid.to_string());
            fs::create_dir_all(&process).unwrap();
            fs::write(process.join("comm"), format!("{name}\n")).unwrap();
            fs::write(process.join("cgroup"), format!("5:cpu:/x\n0::{cgroup}\n")).unwrap();
        }

        fn cgroup(&self, path: &str, processes: &str) -> PathBuf {
            let cgroup = self.0.path().join("cgroup").join(path);
            fs::create_dir_all(&cgroup).unwrap();
            fs::write(cgroup.join("cgroup.procs"), processes).unwrap();
            cgroup
        }

        fn kubelets(&self) -> Kubelets {
            Kubelets {
                proc: self.0.path().join("proc"),
                mount: self.0.path().join("cgroup"),
                found: Vec::new(),
            }
        }
    }

    #[test]
    fn a_kubelet_is_found_by_name_and_again_when_it_was_restarted() {
        let machine = Machine(tempfile::tempdir().unwrap());
        machine.process(7, "bash", "/system.slice/bash");
        machine.process(8, "kubelet", "/system.slice/kubelet.service");
        let first = machine.cgroup("system.slice/kubelet.service", "8\n");
        let mut kubelets = machine.kubelets();
        assert_eq!(kubelets.cgroups(), [first]);
        fs::remove_dir_all(machine.0.path().join("proc/8")).unwrap();
        assert!(kubelets.cgroups().is_empty());
        machine.process(9, "kubelet", "/kubelet.slice/again");
        let second = machine.cgroup("kubelet.slice/again", "9\n");
        assert_eq!(kubelets.cgroups(), [second]);
    }

    #[test]
    fn a_path_out_of_the_readers_cgroup_namespace_is_taken_only_if_it_leads_to_the_process() {
        let machine = Machine(tempfile::tempdir().unwrap());
        machine.process(8, "kubelet", "/../../../system.slice/kubelet.service");
        let cgroup = machine.cgroup("system.slice/kubelet.service", "7\n");
        assert!(machine.kubelets().cgroups().is_empty(), "that is another process's");
        fs::write(cgroup.join("cgroup.procs"), "7\n8\n").unwrap();
        assert_eq!(machine.kubelets().cgroups(), [cgroup]);
    }
}
