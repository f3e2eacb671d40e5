//! The configuration files of a node's daemons. Plain text, no more than what differs from their defaults.

use super::layout::{self, Families, Layout};

/// Where programs of the container network interface are on a node.
pub(super) const CNI_BIN: &str = "/opt/cni/bin";

/// containerd's socket on a node.
pub(super) const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// The image of the process that holds a pod's namespaces.
pub(super) const PAUSE: &str = "docker.io/undermesh/pause:dev";

/// containerd's configuration. A machine that is itself a container may not raise a process against the kernel's
/// out-of-memory killer, and sandboxes ask for that: `restrict_oom_score_adj`.
pub(super) fn containerd() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  stream_server_address = "127.0.0.1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_BIN}"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"#
    )
}

/// The pod network: each pod behind its own routed veth.
pub(super) fn cni(families: Families, index: u8) -> String {
    let range = |subnet: String| format!(r#"[{{"subnet": "{subnet}"}}]"#);
    let ranges = families.list(range(layout::pod_cidr(index)), range(layout::pod_cidr6(index)));
    let routes = families.list(r#"{"dst": "0.0.0.0/0"}"#, r#"{"dst": "::/0"}"#);
    format!(
        r#"{{
  "cniVersion": "0.4.0",
  "name": "pods",
  "plugins": [
    {{
      "type": "ptp",
      "ipMasq": false,
      "ipam": {{
        "type": "host-local",
        "ranges": [{ranges}],
        "routes": [{routes}]
      }}
    }},
    {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
  ]
}}
"#
    )
}

/// The kubelet's configuration. It keeps its hands off disks and memory that are not its own, since the node shares
/// them with everything else on the machine.
pub(super) fn kubelet(layout: &Layout, families: Families) -> String {
    let any = if families == Families::Ipv4 { "0.0.0.0" } else { "::" };
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: "{any}"
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {pki}/ca.crt}}}}
authorization: {{mode: Webhook}}
containerRuntimeEndpoint: unix://{CONTAINERD}
cgroupDriver: cgroupfs
cgroupRoot: /
enforceNodeAllocatable: []
failSwapOn: false
failCgroupV1: false
clusterDNS: ["{dns}"]
clusterDomain: cluster.local
resolvConf: {resolv}
volumePluginDir: /var/lib/kubelet/volume-plugins
evictionHard: {{memory.available: "0%", nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%"}}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 1s
nodeStatusReportFrequency: 5s
syncFrequency: 10s
fileCheckFrequency: 20s
registryPullQPS: 0
eventRecordQPS: 0
serializeImagePulls: false
"#,
        pki = layout.path("pki").display(),
        dns = families.dns(),
        resolv = layout.path("resolv.conf").display(),
    )
}

/// kube-proxy's configuration: no limits on connection tracking, which belong to the whole machine.
pub(super) fn proxy(layout: &Layout, families: Families, node: &str) -> String {
    format!(
        r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {{kubeconfig: {kubeconfig}}}
clusterCIDR: "{pods}"
hostnameOverride: {node}
mode: iptables
iptables: {{minSyncPeriod: 0s, syncPeriod: 30s}}
conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
"#,
        kubeconfig = layout.path("proxy.kubeconfig").display(),
        pods = families.list(layout::PODS, layout::PODS6),
    )
}

/// What the cluster holds from the start: its DNS, which answers for the cluster and for nothing else.
pub(super) fn bootstrap(families: Families) -> String {
    format!(
        r#"
apiVersion: v1
kind: ServiceAccount
metadata: {{name: coredns, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: coredns}}
rules:
- {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: coredns}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: coredns}}
subjects: [{{kind: ServiceAccount, name: coredns, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: coredns, namespace: kube-system}}
data:
  Corefile: |
    .:53 {{
      errors
      ready
      kubernetes cluster.local in-addr.arpa ip6.arpa
      cache 5
      loadbalance
    }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: coredns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  selector: {{matchLabels: {{k8s-app: kube-dns}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-dns}}}}
    spec:
      serviceAccountName: coredns
      priorityClassName: system-cluster-critical
      dnsPolicy: Default
      terminationGracePeriodSeconds: 1
      containers:
      - name: coredns
        image: docker.io/undermesh/coredns:dev
        imagePullPolicy: Never
        args: [-conf, /etc/coredns/Corefile]
        ports: [{{name: dns, containerPort: 53, protocol: UDP}}, {{name: dns-tcp, containerPort: 53}}]
        readinessProbe: {{httpGet: {{path: /ready, port: 8181}}, periodSeconds: 1}}
        volumeMounts: [{{name: config, mountPath: /etc/coredns}}]
      volumes: [{{name: config, configMap: {{name: coredns}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: "{dns}"
  selector: {{k8s-app: kube-dns}}
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53}}]
"#,
        dns = families.dns()
    )
}

/// Kernel settings of the whole machine that a kubelet would write, and what it wants them to be.
pub(super) const MACHINE_SETTINGS: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];
