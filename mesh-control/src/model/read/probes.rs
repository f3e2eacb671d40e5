//! Which ports of a container the kubelet connects to.

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// TCP ports of probes and lifecycle hooks that go to the pod's own address.
pub(super) fn ports(container: &Container) -> Vec<u16> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let hooks = container.lifecycle.iter().flat_map(|l| [&l.post_start, &l.pre_stop]).flatten();
    let mut ports: Vec<u16> =
        probes.into_iter().flatten().flat_map(|probe| of_probe(container, probe)).collect();
    ports.extend(hooks.filter_map(|hook| of_hook(container, hook)));
    ports
}

fn of_probe(container: &Container, probe: &Probe) -> Option<u16> {
    if let Some(http) = &probe.http_get {
        return own(http.host.as_deref()).and_then(|()| number(container, &http.port));
    }
    if let Some(tcp) = &probe.tcp_socket {
        return own(tcp.host.as_deref()).and_then(|()| number(container, &tcp.port));
    }
    u16::try_from(probe.grpc.as_ref()?.port).ok()
}

fn of_hook(container: &Container, hook: &LifecycleHandler) -> Option<u16> {
    let http = hook.http_get.as_ref()?;
    own(http.host.as_deref()).and_then(|()| number(container, &http.port))
}

/// Without a host the kubelet connects to the pod.
fn own(host: Option<&str>) -> Option<()> {
    host.is_none_or(str::is_empty).then_some(())
}

/// A port's number: names are those of the container's own ports.
fn number(container: &Container, port: &IntOrString) -> Option<u16> {
    let named = |name: &str| {
        let ports = container.ports.iter().flatten();
        let port = ports.filter(|p| p.name.as_deref() == Some(name)).map(|p| p.container_port).next();
        // A number may be written as a text.
        port.or_else(|| name.parse().ok())
    };
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => named(name),
    };
    number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_every_kind_of_probe_and_of_hooks_are_found() {
        let container: Container = serde_json::from_value(serde_json::json!({
            "name": "c",
            "ports": [{"name": "web", "containerPort": 8080}],
            "livenessProbe": {"httpGet": {"port": "web"}},
            "readinessProbe": {"tcpSocket": {"port": 6379}},
            "startupProbe": {"grpc": {"port": 9000}},
            "lifecycle": {"preStop": {"httpGet": {"port": "9100"}}, "postStart": {"exec": {"command": ["true"]}}}
        }))
        .unwrap();
        assert_eq!(ports(&container), [8080, 6379, 9000, 9100]);
    }

    #[test]
    fn a_probe_of_another_host_and_one_that_runs_a_program_open_no_port() {
        let container: Container = serde_json::from_value(serde_json::json!({
            "name": "c",
            "livenessProbe": {"httpGet": {"port": 80, "host": "example.org"}},
            "readinessProbe": {"exec": {"command": ["true"]}},
            "startupProbe": {"tcpSocket": {"port": "nothing"}}
        }))
        .unwrap();
        assert_eq!(ports(&container), Vec::<u16>::new());
    }
}
