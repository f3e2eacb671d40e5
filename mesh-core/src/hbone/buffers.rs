//! Read buffers that belong to the worker thread, not to a connection.
//!
//! A connection holds a large buffer only between a read and the moment its bytes are passed on. So reads are large
//! (few system calls) while ten thousand idle connections hold nothing.

use std::cell::RefCell;

use bytes::BytesMut;

/// One read takes at most this much.
pub(super) const SIZE: usize = 256 << 10;
/// A buffer with less room than this left is not worth reading into.
const LEAST_ROOM: usize = 64 << 10;
/// Buffers that a thread keeps for the next read; what is more is freed.
const KEPT: usize = 4;

thread_local! {
    static FREE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer with room for a large read.
pub(super) fn take() -> BytesMut {
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.capacity() < LEAST_ROOM {
        // Takes the whole allocation back if the pieces that were split off are gone, else makes a new one.
        buffer.reserve(SIZE);
    }
    buffer
}

/// Gives a buffer back, also one of which pieces were split off. What it still contains is forgotten.
pub(super) fn give(mut buffer: BytesMut) {
    buffer.clear();
    FREE.with_borrow_mut(|free| {
        if free.len() < KEPT {
            free.push(buffer);
        }
    });
}

#[cfg(test)]
pub(super) fn kept() -> usize {
    FREE.with_borrow(Vec::len)
}
