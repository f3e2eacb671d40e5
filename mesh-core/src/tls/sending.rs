//! What is sent to a peer: frames are put together, and sealed, where they will be written from.
//!
//! ```text
//!  start            open                         end
//!    │ sealed records │ header │ frame frame …     │        │
//! ```
//! Small frames share the open record until it is full or sent. Large data is read from its source straight into
//! records, each with the head of a frame before it.

use std::io::{self, IoSliceMut};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

use super::buffers::Buffer;
use super::record::{Content, HEADER, LONGEST, Sealer, TRAILER};

/// Bytes of the head that comes before each piece of data.
pub(crate) const HEAD: usize = 9;
/// The most data behind one head: together they fill a record.
pub(crate) const PIECE: usize = LONGEST - HEAD;
/// Pieces that are read at once.
pub(crate) const PIECES: usize = 16;
/// An open record with less room than this is not worth reading into.
const WORTH: usize = 512;
/// Room that data leaves for small frames, so that the buffer hardly ever has to grow.
const RESERVE: usize = 2048;

/// One direction of a connection, towards the peer.
pub(crate) struct Sending {
    /// None: the bytes are what they are.
    sealer: Option<Sealer>,
    /// Held while there is something to send.
    buffer: Option<Buffer>,
    /// Control frames for which the buffer had no room. The owner bounds them by not reading on.
    overflow: Vec<u8>,
    start: usize,
    open: usize,
    end: usize,
}

impl Sending {
    pub(super) const fn new(sealer: Option<Sealer>) -> Self {
        Self { sealer, buffer: None, overflow: Vec::new(), start: 0, open: 0, end: 0 }
    }

    const fn overhead(&self) -> (usize, usize) {
        if self.sealer.is_some() { (HEADER, TRAILER) } else { (0, 0) }
    }

    /// Bytes of frames that found no room in the buffer.
    pub(crate) const fn hoarded(&self) -> usize {
        self.overflow.len()
    }

    /// How much data still fits.
    pub(crate) fn room(&self) -> usize {
        let (header, trailer) = self.overhead();
        let used = self.end + header + HEAD + trailer + RESERVE;
        let size = super::buffers::SIZE;
        if !self.overflow.is_empty() || used >= size {
            return 0;
        }
        // Each further piece costs a record and a head.
        let rest = size - used;
        rest - (rest / (LONGEST + header + trailer) + 1) * (header + HEAD + trailer).min(rest)
    }

    /// Adds a small frame whole.
    pub(crate) fn push(&mut self, frame: &[&[u8]]) {
        let length: usize = frame.iter().map(|part| part.len()).sum();
        if !self.overflow.is_empty() || !self.make_room(length) {
            // Rare: the peer does not read, and still something has to be said.
            frame.iter().for_each(|part| self.overflow.extend_from_slice(part));
            return;
        }
        let mut at = self.end;
        let buffer = self.buffer.get_or_insert_with(Buffer::take);
        for part in frame {
            buffer[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.end = at;
    }

    /// Makes the open record take `length` more bytes. `false`: the buffer is full.
    fn make_room(&mut self, length: usize) -> bool {
        let (header, trailer) = self.overhead();
        if self.end > self.open && self.end - self.open - header + length > LONGEST {
            self.seal();
        }
        let begin = if self.end > self.open { 0 } else { header };
        if length > LONGEST || self.end + begin + length + trailer > super::buffers::SIZE {
            return false;
        }
        self.end += begin;
        true
    }

    /// Reads data into records, at most `most` bytes and `pieces` pieces. `head` makes the head of a piece from its
    /// length. Says how much was read and how much could have been.
    ///
    /// # Errors
    /// That of `read`; then nothing was added.
    pub(crate) fn read(
        &mut self,
        most: usize,
        pieces: usize,
        head: impl Fn(usize) -> [u8; HEAD],
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<(usize, usize)> {
        let (header, trailer) = self.overhead();
        if self.end > self.open && self.end - self.open - header + HEAD + WORTH > LONGEST {
            self.seal();
        }
        let begin = self.end;
        let opened = if begin > self.open { 0 } else { header };
        let in_open = begin + opened - self.open - header;
        // (length of the first piece, length of every other, bytes between two pieces)
        let first = (LONGEST - in_open - HEAD).min(most);
        let gap = trailer + header + HEAD;
        let buffer = self.buffer.get_or_insert_with(Buffer::take);
        let mut slices: [IoSliceMut<'_>; PIECES] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let mut rest = &mut buffer[begin + opened + HEAD..];
        let (mut offered, mut used) = (0, 0);
        for slice in slices.iter_mut().take(pieces.clamp(1, PIECES)) {
            let wanted = if used == 0 { first } else { PIECE.min(most - offered) };
            let skip = if used == 0 { 0 } else { gap };
            let wanted = wanted.min(rest.len().saturating_sub(skip + trailer + RESERVE));
            if wanted == 0 {
                break;
            }
            let (piece, behind) = rest.split_at_mut(skip + wanted);
            *slice = IoSliceMut::new(&mut piece[skip..]);
            rest = behind;
            offered += wanted;
            used += 1;
        }
        if offered == 0 {
            self.forget_if_empty();
            return Ok((0, 0));
        }
        let result = read(&mut slices[..used]);
        let n = match result {
            Ok(n @ 1..) => n,
            nothing => {
                self.forget_if_empty();
                return nothing.map(|n| (n, offered));
            }
        };
        self.end = begin + opened;
        let mut left = n;
        let mut piece = first;
        loop {
            let length = left.min(piece);
            let at = self.end;
            if let Some(buffer) = &mut self.buffer {
                buffer[at..at + HEAD].copy_from_slice(&head(length));
            }
            self.end = at + HEAD + length;
            left -= length;
            if left == 0 {
                break;
            }
            self.seal();
            self.end += header;
            piece = PIECE;
        }
        Ok((n, offered))
    }

    fn forget_if_empty(&mut self) {
        if self.end == self.start {
            self.buffer = None;
            (self.start, self.open, self.end) = (0, 0, 0);
        }
    }

    /// Closes the open record.
    fn seal(&mut self) {
        self.seal_as(Content::Data);
    }

    fn seal_as(&mut self, content: Content) {
        if self.end > self.open
            && let (Some(sealer), Some(buffer)) = (&mut self.sealer, &mut self.buffer)
        {
            self.end += TRAILER;
            sealer.seal(content, &mut buffer[self.open..self.end]);
        }
        self.open = self.end;
    }

    /// Adds a record of its own that is no data; whether there was room. Without TLS there is none.
    fn push_record(&mut self, content: Content, bytes: &[u8]) -> bool {
        self.seal();
        if self.sealer.is_none() || !self.overflow.is_empty() || !self.make_room(bytes.len()) {
            return false;
        }
        let at = self.end;
        let buffer = self.buffer.get_or_insert_with(Buffer::take);
        buffer[at..at + bytes.len()].copy_from_slice(bytes);
        self.end = at + bytes.len();
        self.seal_as(content);
        true
    }

    /// Says that nothing more comes.
    pub(crate) fn push_close(&mut self) {
        self.push_record(Content::Alert, &[1, 0]);
    }

    /// Says why the connection ends.
    pub(crate) fn push_alert(&mut self, error: &rustls::Error) {
        let description = match error {
            rustls::Error::DecryptError => 20,
            rustls::Error::PeerSentOversizedRecord => 22,
            // Whoever sends an alert has gone.
            rustls::Error::AlertReceived(_) => return,
            _ => 10,
        };
        self.push_record(Content::Alert, &[2, description]);
    }

    /// Whether the key should be replaced.
    pub(crate) fn is_worn(&self) -> bool {
        self.sealer.as_ref().is_some_and(Sealer::is_worn)
    }

    /// Announces and takes the next key; call it when nothing is pending.
    pub(crate) fn replace_sealer(&mut self, sealer: Sealer) {
        // key_update, one byte: update_not_requested.
        if self.push_record(Content::Handshake, &[24, 0, 0, 1, 0]) {
            self.sealer = Some(sealer);
        }
    }

    /// Writes until everything is sent, which gives the buffer back.
    pub(crate) fn poll_send<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            self.seal();
            if self.start == self.end {
                self.buffer = None;
                (self.start, self.open, self.end) = (0, 0, 0);
                if self.overflow.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                self.refill();
                continue;
            }
            let Some(buffer) = &self.buffer else { return Poll::Ready(Ok(())) };
            let n = ready!(Pin::new(&mut *io).poll_write(cx, &buffer[self.start..self.end]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.start += n;
        }
    }

    /// Takes back what had found no room.
    fn refill(&mut self) {
        let overflow = std::mem::take(&mut self.overflow);
        let fits = overflow.len().min(super::buffers::SIZE / 2);
        for part in overflow[..fits].chunks(LONGEST) {
            self.push(&[part]);
        }
        self.overflow.extend_from_slice(&overflow[fits..]);
    }

    #[cfg(test)]
    pub(crate) fn wear(&mut self) {
        if let Some(sealer) = &mut self.sealer {
            sealer.wear();
        }
    }
}
