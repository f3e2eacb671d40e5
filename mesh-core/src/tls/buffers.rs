//! Large buffers that belong to the worker thread, not to a connection.
//!
//! A connection holds one only while bytes are in its hands. So reads are large (few system calls) while ten thousand
//! idle connections hold nothing.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Bytes in a buffer: sixteen full records with their headers, and some room for small frames between them.
pub const SIZE: usize = 16 * (super::record::HEADER + super::record::LONGEST + super::record::TRAILER) + 4096;
/// Buffers that a thread keeps for the next use; what is more is freed.
const KEPT: usize = 4;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`SIZE`] bytes with arbitrary content. It goes back to the thread when dropped.
#[derive(Debug)]
pub struct Buffer(Box<[u8]>);

impl Buffer {
    /// One of the thread's, or a new one.
    #[must_use]
    pub fn take() -> Self {
        let kept = FREE.with_borrow_mut(Vec::pop);
        Self(kept.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()))
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // A thread that is ending keeps none.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}

/// Frees what the calling thread keeps: for a thread that has had nothing to do for a while.
pub fn release() {
    FREE.with_borrow_mut(|free| *free = Vec::new());
}

/// How many buffers the calling thread keeps.
#[must_use]
pub fn kept() -> usize {
    FREE.with_borrow(Vec::len)
}
