//! What an open connection costs while nothing flows: mostly its task, whose size is that of its future.

use std::rc::Rc;

use super::super::{inbound, outbound, plaintext, worker::PodProxy};

/// Bytes that one task may take. Ten thousand idle connections of a node are ten thousand tasks.
const MOST: usize = 1536;

fn size<A, B, C, F>(_: impl Fn(A, B, C) -> F) -> usize {
    size_of::<F>()
}

#[test]
fn the_task_of_an_open_connection_holds_no_room_for_making_one() {
    type Proxy = &'static Rc<PodProxy>;
    let outbound = size(|proxy: Proxy, client, peer| outbound::handle(proxy, client, peer));
    let plaintext = size(|proxy: Proxy, client, peer| plaintext::handle(proxy, client, peer));
    let stream =
        size(|proxy: Proxy, connect, peer: &'static inbound::Remote| inbound::serve(proxy, connect, peer));
    for (what, size) in [("outbound", outbound), ("plaintext", plaintext), ("tunnel stream", stream)] {
        assert!(size <= MOST, "{what}: {size} bytes, more than {MOST}");
    }
}
