//! Where a runtime puts pods in the cgroup hierarchy: pure.

use std::path::{Component, Path, PathBuf};

/// The pod's directory, relative to the hierarchy's root, from the path of a container's cgroup in its OCI
/// specification: `/kubepods/burstable/podUID/ID`, or `SLICE:PREFIX:ID` where systemd makes the cgroups.
pub(super) fn of_pod(cgroups_path: &str) -> Option<PathBuf> {
    if let Some((slice, _scope)) = cgroups_path.split_once(':') {
        return expand(slice);
    }
    let path = Path::new(cgroups_path);
    let parent = path.parent()?.strip_prefix("/").ok()?;
    let plain = parent.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && parent.components().next().is_some()).then(|| parent.to_owned())
}

/// `a-b-c.slice` is `a.slice/a-b.slice/a-b-c.slice`.
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

/// The directory above all pods, from that of one: what ends in `kubepods` or `kubepods.slice` (with the kubelet's
/// cgroupRoot before it).
pub(super) fn pods_root(pod: &Path) -> Option<PathBuf> {
    let is_root = |part: &Component<'_>| {
        part.as_os_str().to_str().is_some_and(|name| {
            let name = name.strip_suffix(".slice").unwrap_or(name);
            name == "kubepods" || name.ends_with("-kubepods")
        })
    };
    let parts: Vec<_> = pod.components().collect();
    let at = parts.iter().position(is_root)?;
    Some(parts.iter().take(at + 1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_cgroup_is_read_from_both_forms_of_path() {
        let pod = |path| of_pod(path).map(|p| p.display().to_string());
        assert_eq!(pod("/kubepods/burstable/pod1a/c0ffee"), Some("kubepods/burstable/pod1a".into()));
        assert_eq!(pod("/mesh/n1/kubepods/pod1a/c0ffee"), Some("mesh/n1/kubepods/pod1a".into()));
        assert_eq!(
            pod("kubepods-besteffort-pod1a_2b.slice:cri-containerd:c0ffee"),
            Some("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1a_2b.slice".into())
        );
        for none in ["", "/c0ffee", "/../kubepods/pod1/c", "kubepods:x:y", "a--b.slice:x:y", "../a.slice:x:y"]
        {
            assert_eq!(pod(none), None, "{none:?}");
        }
    }

    #[test]
    fn the_directory_above_all_pods_is_found_from_one_of_them() {
        let root = |path: &str| pods_root(Path::new(path)).map(|p| p.display().to_string());
        assert_eq!(root("kubepods/burstable/pod1a"), Some("kubepods".into()));
        assert_eq!(root("mesh/n1/kubepods/pod1a"), Some("mesh/n1/kubepods".into()));
        assert_eq!(root("kubepods.slice/kubepods-pod1a.slice"), Some("kubepods.slice".into()));
        assert_eq!(
            root("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1a.slice"),
            Some("kubelet.slice/kubelet-kubepods.slice".into())
        );
        assert_eq!(root("docker/1a"), None);
    }
}
