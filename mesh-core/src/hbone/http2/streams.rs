//! One stream's state, and the table of a connection's streams.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io::{self, IoSlice};
use std::rc::Rc;
use std::task::Waker;

use bytes::Bytes;

use super::super::baggage::BaggageHeader;
use super::frame::Reason;

/// Where the bytes of a stream go: the application's socket. The connection writes to it as soon as bytes have come,
/// without waking the stream's task.
pub(in super::super) trait Sink {
    /// Writes what it takes at once.
    ///
    /// # Errors
    /// `WouldBlock`, or the socket broke.
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize>;
}

/// The answer to a CONNECT.
#[derive(Debug)]
pub(in super::super) struct Answer {
    pub(in super::super) status: u16,
    pub(in super::super) baggage: Option<BaggageHeader>,
}

/// How a stream was cut off.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Cut {
    /// By the peer.
    Reset(Reason),
    /// By us, for what the peer did.
    Violation(Reason),
    /// By us, for a reason of our own.
    Own,
    /// The peer said, in its GOAWAY, that it did not look at it.
    Unprocessed,
}

/// One stream.
pub(super) struct Stream {
    pub(super) id: u32,
    /// What the peer lets us send; a change of its settings can make it negative.
    pub(super) send_window: i64,
    /// What the peer may still send.
    pub(super) recv_window: i64,
    /// Bytes passed on since the last WINDOW_UPDATE.
    pub(super) passed_on: u32,
    /// The one task that waits for anything of this stream.
    pub(super) waker: Option<Waker>,
    pub(super) sink: Option<Rc<dyn Sink>>,
    /// What the sink has not taken.
    pub(super) backlog: VecDeque<Bytes>,
    /// The sink broke.
    pub(super) broken: Option<io::Error>,
    pub(super) answer: Option<Box<Answer>>,
    pub(super) cut: Option<Cut>,
    /// The peer has ended its direction.
    pub(super) recv_ended: bool,
    /// The peer has said all and listens no more: RST_STREAM with NO_ERROR after its end, RFC 9113 §8.1.
    pub(super) deaf: bool,
    /// We have ended ours.
    pub(super) send_ended: bool,
    /// Answered (server), or the answer has come (client).
    pub(super) answered: bool,
    /// Its task waits for room to send.
    pub(super) wants_room: bool,
    /// Somebody holds it.
    pub(super) held: bool,
    /// It still counts on the wire.
    pub(super) open: bool,
}

impl Stream {
    /// Whether all that the peer has said is here, whatever becomes of the connection.
    pub(super) const fn is_complete(&self) -> bool {
        self.recv_ended && self.cut.is_none()
    }

    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    pub(super) fn wait(&mut self, waker: &Waker) {
        match &mut self.waker {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }
}

/// Stream numbers are handed out in sequence, so that they spread well as they are.
#[derive(Default)]
pub(super) struct Number(u64);

impl Hasher for Number {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 << 8) | u64::from(*byte);
        }
    }

    fn write_u32(&mut self, n: u32) {
        // The table looks at the high bits, too.
        self.0 = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// The streams of a connection, by a key that stays while somebody holds the stream.
#[derive(Default)]
pub(super) struct Streams {
    slots: Vec<Option<Stream>>,
    free: Vec<u32>,
    /// Streams that are open on the wire.
    ids: HashMap<u32, u32, BuildHasherDefault<Number>>,
}

impl Streams {
    pub(super) fn insert(&mut self, stream: Stream) -> u32 {
        let id = stream.id;
        let key = match self.free.pop() {
            Some(key) => {
                self.slots[key as usize] = Some(stream);
                key
            }
            None => {
                self.slots.push(Some(stream));
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.ids.insert(id, key);
        key
    }

    /// The stream of a number, while it is open.
    pub(super) fn find(&self, id: u32) -> Option<u32> {
        self.ids.get(&id).copied()
    }

    pub(super) fn get(&mut self, key: u32) -> Option<&mut Stream> {
        self.slots.get_mut(key as usize)?.as_mut()
    }

    /// Streams that are open on the wire.
    pub(super) fn open(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn each(&mut self) -> impl Iterator<Item = (u32, &mut Stream)> {
        self.slots.iter_mut().enumerate().filter_map(|(key, slot)| {
            let stream = slot.as_mut()?;
            Some((u32::try_from(key).unwrap_or(u32::MAX), stream))
        })
    }

    /// Takes a stream off the wire, and forgets it if nobody holds it.
    pub(super) fn close(&mut self, key: u32) {
        if let Some(stream) = self.get(key) {
            let (id, held) = (stream.id, stream.held);
            stream.open = false;
            self.ids.remove(&id);
            if !held {
                self.remove(key);
            }
        }
    }

    /// Nobody holds it any more.
    pub(super) fn let_go(&mut self, key: u32) {
        if let Some(stream) = self.get(key) {
            stream.held = false;
            if !stream.open {
                self.remove(key);
            }
        }
    }

    fn remove(&mut self, key: u32) {
        self.slots[key as usize] = None;
        self.free.push(key);
        if self.ids.is_empty() && self.free.len() == self.slots.len() {
            // After a burst, an idle connection keeps no room for it.
            *self = Self::default();
        }
    }
}
