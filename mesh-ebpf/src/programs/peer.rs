//! `getpeername` of a captured socket answers what the application asked for.

use super::connect::GO_ON;
use super::context::SockAddr;
use super::datagram;
use super::maps::socket_storage;
use aya_ebpf::programs::SockAddrContext;

#[inline(always)]
pub(crate) fn name<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let call = SockAddr::of(ctx);
    if call.is_udp() {
        if let Some(server) = datagram::nameserver(&call, &call.endpoint::<V6>()) {
            call.set::<V6>(server);
        }
        return GO_ON;
    }
    let socket = call.socket();
    if socket.is_null() {
        return GO_ON;
    }
    if let Some(known) = socket_storage(socket, false) {
        if known.port != 0 && known.port == call.port() {
            let destination = known.destination;
            call.set::<V6>(&destination);
        }
    }
    GO_ON
}
