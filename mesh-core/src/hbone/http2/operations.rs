//! What the tasks of streams do with their connection: open, answer, send, pass on, abort.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;

use super::super::baggage::BaggageHeader;
use super::super::error::Error;
use super::super::request::ConnectRequest;
use super::core::{Core, Ended, LARGEST_WINDOW};
use super::frame::{self, DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM, Reason, head};
use super::streams::{Answer, Cut, Sink, Stream};
use crate::tls::sending::PIECES;

/// Data is copied out of a backlog to the application in at most so many pieces.
const SLICES: usize = 16;

impl Core {
    /// Has the driver send what was queued, once the tasks that are ready have queued theirs.
    pub(in super::super) fn wake_driver(&mut self) {
        if !self.driver_woken
            && let Some(driver) = &self.driver
        {
            self.driver_woken = true;
            driver.wake_by_ref();
        }
    }

    pub(super) fn driver_is_here(&mut self, waker: &Waker) {
        self.driver_woken = false;
        match &mut self.driver {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    /// Whether no stream can be opened any more.
    pub(in super::super) const fn is_closed(&self) -> bool {
        self.ended.is_some() || self.goaway.is_some()
    }

    /// The peer's limit of streams.
    pub(in super::super) const fn peer_streams(&self) -> usize {
        self.peer_streams
    }

    /// Opens a stream.
    pub(in super::super) fn poll_open(
        &mut self,
        cx: &Context<'_>,
        request: &ConnectRequest,
    ) -> Poll<Result<u32, Error>> {
        if let Some(ended) = &self.ended {
            return Poll::Ready(Err(ended.error()));
        }
        if self.goaway.is_some() || self.next_id > LARGEST_WINDOW as u32 {
            return Poll::Ready(Err(self.goaway_error()));
        }
        if self.streams.open() >= self.peer_streams.min(self.settings.streams as usize) {
            self.slots.push(cx.waker().clone());
            return Poll::Pending;
        }
        let id = self.next_id;
        self.next_id += 2;
        let mut block = std::mem::take(&mut self.scratch);
        self.encoder.begin(&mut block);
        request.encode_block(&mut self.encoder, &mut block);
        self.push_headers(id, 0, &block);
        block.clear();
        self.scratch = block;
        self.wake_driver();
        Poll::Ready(Ok(self.insert(id, false)))
    }

    pub(super) fn insert(&mut self, id: u32, recv_ended: bool) -> u32 {
        self.streams.insert(Stream {
            id,
            send_window: self.first_send_window,
            recv_window: i64::from(self.settings.stream_window),
            passed_on: 0,
            waker: None,
            sink: None,
            backlog: VecDeque::new(),
            broken: None,
            answer: None,
            cut: None,
            recv_ended,
            deaf: false,
            send_ended: false,
            answered: false,
            wants_room: false,
            held: true,
            open: true,
        })
    }

    /// A header block in as many frames as it needs.
    pub(super) fn push_headers(&mut self, id: u32, flags: u8, block: &[u8]) {
        const MOST: usize = 16 << 10;
        let mut rest = block;
        let mut kind = HEADERS;
        loop {
            let (part, behind) = rest.split_at(rest.len().min(MOST));
            let last = if behind.is_empty() { END_HEADERS } else { 0 };
            let flags = if kind == HEADERS { flags } else { 0 };
            self.sending.push(&[&head(part.len(), kind, flags | last, id), part]);
            if behind.is_empty() {
                return;
            }
            (rest, kind) = (behind, frame::CONTINUATION);
        }
    }

    /// The answer to a stream's CONNECT.
    pub(in super::super) fn poll_answer(
        &mut self,
        cx: &Context<'_>,
        key: u32,
    ) -> Poll<Result<Answer, Error>> {
        let Some(stream) = self.streams.get(key) else { return Poll::Ready(Err(Error::Closed)) };
        if let Some(answer) = stream.answer.take() {
            return Poll::Ready(Ok(*answer));
        }
        stream.wait(cx.waker());
        self.trouble(key).map_or(Poll::Pending, |error| Poll::Ready(Err(error)))
    }

    /// Answers a CONNECT.
    pub(in super::super) fn answer(
        &mut self,
        key: u32,
        status: u16,
        baggage: Option<&BaggageHeader>,
        end: bool,
    ) -> Result<(), Error> {
        if let Some(error) = self.trouble(key) {
            return Err(error);
        }
        let Some(stream) = self.streams.get(key) else { return Err(Error::Closed) };
        stream.answered = true;
        let id = stream.id;
        let mut block = std::mem::take(&mut self.scratch);
        self.encoder.begin(&mut block);
        self.encoder.status(&mut block, status);
        if let Some(BaggageHeader(value)) = baggage {
            self.encoder.repeating(&mut block, "baggage", value.as_bytes());
        }
        self.push_headers(id, if end { END_STREAM } else { 0 }, &block);
        block.clear();
        self.scratch = block;
        if end {
            self.sent_end(key);
        }
        self.wake_driver();
        Ok(())
    }

    /// Why nothing more can be sent on, or is to be expected from, a stream.
    pub(in super::super) fn trouble(&mut self, key: u32) -> Option<Error> {
        let state = |stream: &mut Stream| (stream.cut, stream.deaf, stream.open);
        let (cut, deaf, open) = self.streams.get(key).map_or((Some(Cut::Own), false, false), state);
        match cut {
            Some(Cut::Reset(reason)) => Some(Error::Reset(reason)),
            Some(Cut::Violation(reason)) => Some(Error::Violation(reason)),
            Some(Cut::Unprocessed) => Some(self.goaway_error()),
            Some(Cut::Own) => Some(Error::Closed),
            None if deaf => Some(Error::Reset(Reason::NO_ERROR)),
            // What is complete does not mind the end of its connection.
            None => self.ended.as_ref().filter(|_| open).map(Ended::error),
        }
    }

    fn goaway_error(&self) -> Error {
        match self.goaway {
            Some(reason) if reason != Reason::NO_ERROR => Error::PeerClosed(reason),
            _ => Error::Draining,
        }
    }

    /// How much can be sent now, at least 1.
    pub(in super::super) fn poll_room(&mut self, cx: &Context<'_>, key: u32) -> Poll<Result<usize, Error>> {
        if let Some(error) = self.trouble(key) {
            return Poll::Ready(Err(error));
        }
        let room = self.room(key);
        let Some(stream) = self.streams.get(key) else { return Poll::Ready(Err(Error::Closed)) };
        if stream.send_ended {
            return Poll::Ready(Err(Error::Closed));
        }
        stream.wants_room = room == 0;
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        stream.wait(cx.waker());
        // A full buffer is being sent by the driver, who says when there is room; a window is the peer's to open.
        self.room_is_wanted = true;
        Poll::Pending
    }

    /// How much can be sent now.
    pub(in super::super) fn room(&mut self, key: u32) -> usize {
        let of_stream = self.streams.get(key).map_or(0, |stream| stream.send_window);
        let windows = usize::try_from(of_stream.min(self.send_window)).unwrap_or(0);
        windows.min(self.sending.room())
    }

    /// Wakes the streams that wait for room and have it. One without would only come back to wait.
    pub(super) fn wake_for_room(&mut self) {
        if !self.room_is_wanted || self.send_window <= 0 || self.sending.room() == 0 {
            return;
        }
        self.room_is_wanted = false;
        for (_, stream) in self.streams.each().filter(|(_, stream)| stream.wants_room) {
            if stream.send_window > 0 {
                stream.wants_room = false;
                stream.wake();
            } else {
                self.room_is_wanted = true;
            }
        }
    }

    /// Reads data from `source` straight into what is sent: how much, and how much it could have been. See
    /// [`Sending::read`].
    pub(in super::super) fn send_from(
        &mut self,
        key: u32,
        pieces: usize,
        source: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<(usize, usize)> {
        let room = self.room(key);
        let Some(stream) = self.streams.get(key) else { return Ok((0, 0)) };
        let id = stream.id;
        let (n, offered) =
            self.sending.read(room, pieces.min(PIECES), |length| head(length, DATA, 0, id), source)?;
        stream.send_window -= n as i64;
        self.send_window -= n as i64;
        if n > 0 {
            self.wake_driver();
        }
        Ok((n, offered))
    }

    /// Queues data. The caller has asked for room.
    pub(in super::super) fn send(&mut self, key: u32, data: &[u8]) -> Result<(), Error> {
        if let Some(error) = self.trouble(key) {
            return Err(error);
        }
        let Some(stream) = self.streams.get(key) else { return Err(Error::Closed) };
        let id = stream.id;
        stream.send_window -= data.len() as i64;
        self.send_window -= data.len() as i64;
        for piece in data.chunks(crate::tls::sending::PIECE) {
            self.sending.push(&[&head(piece.len(), DATA, 0, id), piece]);
        }
        self.wake_driver();
        Ok(())
    }

    /// Whether all that the peer has said is here, whatever becomes of the connection.
    pub(in super::super) fn is_complete(&mut self, key: u32) -> bool {
        self.streams.get(key).is_some_and(|stream| stream.is_complete())
    }

    /// Ends our direction.
    pub(in super::super) fn finish(&mut self, key: u32) -> Result<(), Error> {
        if self.streams.get(key).is_some_and(|stream| stream.deaf) {
            // Nobody listens for it.
            return Ok(());
        }
        if let Some(error) = self.trouble(key) {
            return Err(error);
        }
        if let Some(stream) = self.streams.get(key).filter(|stream| !stream.send_ended) {
            let id = stream.id;
            self.sending.push(&[&head(0, DATA, END_STREAM, id)]);
            self.sent_end(key);
            self.wake_driver();
        }
        Ok(())
    }

    fn sent_end(&mut self, key: u32) {
        if let Some(stream) = self.streams.get(key) {
            stream.send_ended = true;
            if stream.recv_ended {
                self.close(key);
            }
        }
    }

    /// Aborts a stream, unless it is over.
    pub(in super::super) fn reset(&mut self, key: u32, reason: Reason) {
        self.cut(key, reason, Cut::Own);
        self.wake_driver();
    }

    pub(super) fn cut(&mut self, key: u32, reason: Reason, cut: Cut) {
        let Some(stream) = self.streams.get(key) else { return };
        if stream.open {
            let id = stream.id;
            stream.cut = Some(cut);
            stream.wake();
            self.push_reset(id, reason);
            self.close(key);
        }
    }

    pub(super) fn push_reset(&mut self, id: u32, reason: Reason) {
        self.sending.push(&[&head(4, RST_STREAM, 0, id), &reason.0.to_be_bytes()]);
    }

    /// Takes a stream off the wire.
    pub(super) fn close(&mut self, key: u32) {
        self.streams.close(key);
        self.slots.drain(..).for_each(Waker::wake);
        if self.streams.open() == 0 {
            // Whether the connection has something left to live for is the driver's to see.
            self.wake_driver();
        }
    }

    /// Nobody holds the stream any more; one that is not over is aborted.
    pub(in super::super) fn let_go(&mut self, key: u32) {
        let Some(stream) = self.streams.get(key) else { return };
        stream.sink = None;
        stream.waker = None;
        stream.backlog = VecDeque::new();
        // RFC 9113 §8.1: a server that has said all may stop the client without an error.
        let reason = if stream.send_ended { Reason::NO_ERROR } else { Reason::CANCEL };
        self.reset(key, reason);
        self.streams.let_go(key);
    }

    // Receiving.

    /// From now on data goes to `sink`.
    pub(in super::super) fn attach(&mut self, key: u32, sink: Rc<dyn Sink>) {
        if let Some(stream) = self.streams.get(key) {
            stream.sink = Some(sink);
        }
    }

    pub(in super::super) fn detach(&mut self, key: u32) {
        if let Some(stream) = self.streams.get(key) {
            stream.sink = None;
        }
    }

    /// Passes the backlog on to the sink. `Ok(true)` when the peer's direction is over and all of it is passed on,
    /// `Ok(false)` when there is nothing to do now.
    pub(in super::super) fn pass_on(&mut self, cx: &Context<'_>, key: u32) -> Result<bool, PassOn> {
        // An abort overtakes what was sent before it, as a TCP reset does.
        if let Some(error) = self.trouble(key)
            && !self.is_complete(key)
        {
            return Err(PassOn::Tunnel(error));
        }
        loop {
            let Some(stream) = self.streams.get(key) else { return Err(PassOn::Tunnel(Error::Closed)) };
            if let Some(error) = stream.broken.take() {
                return Err(PassOn::Sink(error));
            }
            let Some(sink) = stream.sink.clone().filter(|_| !stream.backlog.is_empty()) else { break };
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut used = 0;
            for (slice, piece) in slices.iter_mut().zip(&stream.backlog) {
                *slice = IoSlice::new(piece);
                used += 1;
            }
            let n = match sink.write(&slices[..used]) {
                Ok(n) => n,
                Err(error) => {
                    // While it waits for its socket, an abort must reach it, too.
                    stream.wait(cx.waker());
                    return Err(PassOn::Sink(error));
                }
            };
            take_front(&mut stream.backlog, n);
            self.credit(key, n);
        }
        if let Some(stream) = self.streams.get(key) {
            // An idle connection keeps no room for pieces either.
            stream.backlog = VecDeque::new();
            if stream.recv_ended {
                return Ok(true);
            }
            stream.wait(cx.waker());
        }
        Ok(false)
    }

    /// The next data for whoever has no sink.
    pub(in super::super) fn poll_data(
        &mut self,
        cx: &Context<'_>,
        key: u32,
    ) -> Poll<Option<Result<Bytes, Error>>> {
        let Some(stream) = self.streams.get(key) else { return Poll::Ready(Some(Err(Error::Closed))) };
        if let Some(data) = stream.backlog.pop_front() {
            return Poll::Ready(Some(Ok(data)));
        }
        if stream.recv_ended && stream.cut.is_none() {
            return Poll::Ready(None);
        }
        stream.wait(cx.waker());
        self.trouble(key).map_or(Poll::Pending, |error| Poll::Ready(Some(Err(error))))
    }

    pub(in super::super) fn poll_trouble(&mut self, cx: &Context<'_>, key: u32) -> Poll<Error> {
        if let Some(error) = self.trouble(key) {
            return Poll::Ready(error);
        }
        if let Some(stream) = self.streams.get(key) {
            stream.wait(cx.waker());
        }
        Poll::Pending
    }

    /// Data was passed on: the peer may send as much again.
    pub(in super::super) fn credit(&mut self, key: u32, n: usize) {
        self.useless = 0;
        self.give_back(key, n);
    }

    /// The peer may send as much again, and nothing is said of whether anything moves.
    pub(super) fn give_back(&mut self, key: u32, n: usize) {
        let window = self.settings.stream_window;
        if let Some(stream) = self.streams.get(key).filter(|stream| stream.open && !stream.recv_ended) {
            stream.passed_on += u32::try_from(n).unwrap_or(u32::MAX);
            if stream.passed_on >= window / 2 {
                let (id, increment) = (stream.id, std::mem::take(&mut stream.passed_on));
                stream.recv_window += i64::from(increment);
                self.push_window_update(id, increment);
            }
        }
    }

    /// The connection's window is given back on receipt: only a stream's own window holds up its sender.
    pub(super) fn credit_connection(&mut self, n: usize) {
        self.passed_on += u32::try_from(n).unwrap_or(u32::MAX);
        if self.passed_on >= self.settings.connection_window / 2 {
            let increment = std::mem::take(&mut self.passed_on);
            self.recv_window += i64::from(increment);
            self.push_window_update(0, increment);
        }
    }

    pub(super) fn push_window_update(&mut self, id: u32, increment: u32) {
        if increment > 0 {
            self.sending.push(&[&head(4, frame::WINDOW_UPDATE, 0, id), &increment.to_be_bytes()]);
            self.wake_driver();
        }
    }
}

/// Why data cannot be passed on.
pub(in super::super) enum PassOn {
    /// `WouldBlock`, or the socket broke.
    Sink(io::Error),
    /// The stream or the connection is over.
    Tunnel(Error),
}

pub(super) fn take_front(pieces: &mut VecDeque<Bytes>, mut n: usize) {
    while let Some(front) = pieces.front_mut() {
        if n < front.len() {
            bytes::Buf::advance(front, n);
            return;
        }
        n -= front.len();
        pieces.pop_front();
    }
}
