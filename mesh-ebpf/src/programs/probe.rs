//! The kubelet's probes: a connection from the kubelet's cgroup to a declared probe port of an enrolled pod is
//! authorised by its tuple and reaches the application from its real address. These hooks sit on the host's cgroup
//! and need no living agent.

use super::connect::GO_ON;
use super::context::{SockAddr, SockOps};
use super::maps::{AUTHORISED, KUBELETS, PROBE_PORTS, count, socket_storage};
use super::sockets::{ask_for, authorise};
use aya_ebpf::bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB};
use aya_ebpf::helpers::bpf_get_current_cgroup_id;
use aya_ebpf::programs::{SockAddrContext, SockOpsContext};
use mesh_ebpf::{Reason, Tuple, authorised, socket};

const TCP_CLOSE: u32 = 7;

#[inline(always)]
pub(crate) fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let call = SockAddr::of(ctx);
    // SAFETY: the helper takes nothing; the map's value is not read.
    if unsafe { KUBELETS.get(&bpf_get_current_cgroup_id()) }.is_none() || !call.is_tcp() {
        return GO_ON;
    }
    // SAFETY: the value is not read.
    if unsafe { PROBE_PORTS.get(&call.endpoint::<V6>()) }.is_none() {
        return GO_ON;
    }
    if let Some(known) = socket_storage(call.socket(), true) {
        known.state = socket::PROBE;
        known.port = 0;
    }
    GO_ON
}

#[inline(always)]
pub(crate) fn event(ctx: &SockOpsContext) -> u32 {
    const HANDLED: u32 = 1;
    let ops = SockOps::of(ctx);
    let op = ops.op();
    if op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB {
        return HANDLED;
    }
    let socket = ops.socket();
    if socket.is_null() {
        return HANDLED;
    }
    let Some(known) = socket_storage(socket, false) else { return HANDLED };
    if known.state != socket::PROBE {
        return HANDLED;
    }
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB {
        if authorise(&ops, authorised::PROBE, 0) {
            count(Reason::Probe);
            ask_for(&ops, BPF_SOCK_OPS_STATE_CB_FLAG);
        } else {
            count(Reason::RefusedFull);
        }
    } else if ops.arg1() == TCP_CLOSE {
        let (local, remote) = (ops.local(), ops.remote());
        let _ = AUTHORISED.remove(&Tuple {
            client: local.address,
            server: remote.address,
            client_port: local.port,
            server_port: remote.port,
        });
    }
    HANDLED
}
