//! What an open connection costs while nothing flows: mostly its task, whose size is that of its future.

use std::pin::Pin;
use std::rc::Rc;

use super::super::worker::{self, PodProxy};
use super::super::{inbound, outbound, plaintext};

/// Bytes that the task of a connection through a tunnel may take. Ten thousand idle connections of a node are ten thousand
/// tasks.
const MOST: usize = 640;
/// The same without a tunnel, which is two directions between sockets.
const MOST_PLAIN: usize = 1408;

fn size<A, F>(_: impl Fn(A) -> F) -> usize {
    size_of::<F>()
}

/// Of the whole task.
fn task<M, C: Future<Output = ()>, F: Future<Output = Option<M>>, A>(
    _: impl Fn(A) -> F,
    carry: fn(M) -> C,
) -> usize {
    size(|(proxy, make): (Rc<PodProxy>, Pin<Box<F>>)| worker::guarded(proxy, make, carry))
}

#[test]
fn the_task_of_an_open_connection_holds_no_room_for_making_one() {
    let outbound = task(|(proxy, client, peer)| outbound::make(proxy, client, peer), outbound::carry);
    let plaintext = task(|(proxy, client, peer)| plaintext::make(proxy, client, peer), plaintext::carry);
    let stream = task(|(proxy, connect, peer)| inbound::make(proxy, connect, peer), inbound::carry);
    println!("bytes of a task: outbound {outbound}, tunnel stream {stream}, plaintext {plaintext}");
    for (what, size, most) in
        [("outbound", outbound, MOST), ("tunnel stream", stream, MOST), ("plaintext", plaintext, MOST_PLAIN)]
    {
        assert!(size <= most, "{what}: {size} bytes, more than {most}");
    }
}
