//! Bodies on their way: they stream, and are never collected. A request that may be tried again keeps what it has sent
//! so far, up to [`REPLAY_LIMIT`]; beyond that it is not tried again.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::Notify;
use tokio::time::Sleep;

use super::pool::Lease;
use super::tries::Held;
use crate::telemetry::Exchange;

/// What a request keeps for further tries, bytes.
pub const REPLAY_LIMIT: usize = 64 << 10;

/// Why a body ended early.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// How far the client's request body has come.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes from the client.
    pub received: Cell<u64>,
    /// Whether all of it has been read.
    pub ended: Cell<bool>,
    /// Whether the client broke it off.
    pub failed: Cell<bool>,
    /// Told when it has ended.
    pub end: Notify,
}

impl Progress {
    /// All of it has been read.
    pub fn end(&self) {
        if !self.ended.replace(true) {
            self.end.notify_waiters();
        }
    }

    /// Notes what the client sent.
    fn note(&self, polled: &Poll<Option<Result<Frame<Bytes>, hyper::Error>>>) {
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                self.received.set(self.received.get() + length as u64);
            }
            Poll::Ready(None) => self.end(),
            Poll::Ready(Some(Err(_))) => self.failed.set(true),
            Poll::Pending => {}
        }
    }
}

/// A request's body as an endpoint gets it.
pub struct RequestBody(Request);

enum Request {
    Empty,
    Whole(Option<Bytes>),
    Stream(Incoming, Rc<Progress>),
    Replayed(Cursor),
}

impl RequestBody {
    /// None.
    #[must_use]
    pub const fn empty() -> Self {
        Self(Request::Empty)
    }

    /// Bytes that we have whole.
    #[must_use]
    pub const fn whole(bytes: Bytes) -> Self {
        Self(Request::Whole(Some(bytes)))
    }

    /// The client's, once.
    #[must_use]
    pub const fn stream(incoming: Incoming, progress: Rc<Progress>) -> Self {
        Self(Request::Stream(incoming, progress))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.get_mut().0 {
            Request::Empty => Poll::Ready(None),
            Request::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Request::Stream(incoming, progress) => {
                let polled = Pin::new(incoming).poll_frame(cx);
                progress.note(&polled);
                polled.map(|frame| frame.map(|frame| frame.map_err(Into::into)))
            }
            Request::Replayed(cursor) => cursor.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Request::Empty => true,
            Request::Whole(bytes) => bytes.is_none(),
            Request::Stream(incoming, progress) => {
                let ended = incoming.is_end_stream();
                if ended {
                    progress.end();
                }
                ended
            }
            Request::Replayed(cursor) => cursor.is_at_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Request::Empty => SizeHint::with_exact(0),
            Request::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Request::Stream(incoming, _) => incoming.size_hint(),
            Request::Replayed(cursor) => cursor.size_hint(),
        }
    }
}

/// A client's body that may be sent several times.
#[derive(Clone)]
pub struct Replay(Rc<RefCell<Kept>>);

struct Kept {
    /// None once it was taken away.
    source: Option<Incoming>,
    hint: SizeHint,
    progress: Rc<Progress>,
    /// Frames from number `first` on.
    frames: Vec<Piece>,
    first: usize,
    bytes: usize,
    /// More came than is kept.
    overflowed: bool,
    ended: bool,
    failed: bool,
    /// Who reads from the client; others only follow.
    leader: usize,
    followers: Vec<Waker>,
}

#[derive(Clone)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// One sending of a [`Replay`].
struct Cursor {
    kept: Replay,
    at: usize,
    /// Number of the sending; 0 follows.
    sending: usize,
}

impl Replay {
    /// Takes the client's body.
    #[must_use]
    pub fn new(source: Incoming, progress: Rc<Progress>) -> Self {
        let hint = source.size_hint();
        Self(Rc::new(RefCell::new(Kept {
            source: Some(source),
            hint,
            progress,
            frames: Vec::new(),
            first: 0,
            bytes: 0,
            overflowed: false,
            ended: false,
            failed: false,
            leader: 0,
            followers: Vec::new(),
        })))
    }

    /// The body from its beginning; an earlier sending ends.
    #[must_use]
    pub fn send(&self) -> RequestBody {
        let mut kept = self.0.borrow_mut();
        kept.leader += 1;
        let sending = kept.leader;
        drop(kept);
        RequestBody(Request::Replayed(Cursor { kept: self.clone(), at: 0, sending }))
    }

    /// A copy that gets what the sending gets, when that gets it (for mirrors). It fails when it falls behind.
    #[must_use]
    pub fn follow(&self) -> RequestBody {
        RequestBody(Request::Replayed(Cursor { kept: self.clone(), at: 0, sending: 0 }))
    }

    /// Takes the client's body back, if nothing of it was read and nobody follows.
    #[must_use]
    pub fn take(&self) -> Option<Incoming> {
        let untouched = Rc::strong_count(&self.0) == 1;
        let mut kept = self.0.borrow_mut();
        if untouched && kept.frames.is_empty() && kept.first == 0 && !kept.ended && !kept.failed {
            kept.source.take()
        } else {
            None
        }
    }

    /// Whether it can be sent from its beginning once more.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let kept = self.0.borrow();
        !kept.overflowed && !kept.failed
    }
}

impl Kept {
    /// The next frame of the client, kept if there is room.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Piece, BodyError>>> {
        let Some(source) = &mut self.source else {
            return Poll::Ready(Some(Err("the body was taken away".into())));
        };
        let polled = Pin::new(source).poll_frame(cx);
        self.progress.note(&polled);
        let frame = match ready!(polled) {
            None => {
                self.ended = true;
                self.wake();
                return Poll::Ready(None);
            }
            Some(Err(error)) => {
                self.failed = true;
                self.wake();
                return Poll::Ready(Some(Err(error.into())));
            }
            Some(Ok(frame)) => frame,
        };
        let piece = match frame.into_data() {
            Ok(data) => Piece::Data(data),
            Err(frame) => Piece::Trailers(frame.into_trailers().unwrap_or_default()),
        };
        if let Piece::Data(data) = &piece {
            self.bytes += data.len();
        }
        if self.bytes > REPLAY_LIMIT {
            self.overflowed = true;
            self.first += self.frames.len() + 1;
            self.frames = Vec::new();
        } else {
            self.frames.push(piece.clone());
        }
        self.wake();
        Poll::Ready(Some(Ok(piece)))
    }

    fn wake(&mut self) {
        self.followers.drain(..).for_each(Waker::wake);
    }
}

impl Cursor {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut kept = self.kept.0.borrow_mut();
        let piece = if let Some(piece) = self.at.checked_sub(kept.first).and_then(|at| kept.frames.get(at)) {
            Some(Ok(piece.clone()))
        } else if self.sending != 0 && self.sending != kept.leader {
            Some(Err("another try has taken the body over".into()))
        } else if self.at < kept.first {
            Some(Err("too much of the body has passed".into()))
        } else if kept.failed {
            Some(Err("the client broke the request off".into()))
        } else if kept.ended {
            None
        } else if self.sending == 0 {
            kept.followers.push(cx.waker().clone());
            return Poll::Pending;
        } else {
            ready!(kept.poll_source(cx))
        };
        self.at += 1;
        Poll::Ready(piece.map(|piece| {
            piece.map(|piece| match piece {
                Piece::Data(data) => Frame::data(data),
                Piece::Trailers(trailers) => Frame::trailers(trailers),
            })
        }))
    }

    fn is_at_end(&self) -> bool {
        let kept = self.kept.0.borrow();
        let read = self.at >= kept.first + kept.frames.len();
        let ended = kept.ended || kept.source.as_ref().is_some_and(Incoming::is_end_stream);
        if read && ended {
            kept.progress.end();
        }
        read && ended
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.kept.0.borrow();
        if self.at == 0 { kept.hint } else { SizeHint::default() }
    }
}

/// An answer's body as the client gets it. It carries the request's record to its end.
pub struct ResponseBody {
    source: Source,
    /// None after an upgrade: the record goes on with the connection.
    exchange: Option<Exchange>,
    lease: Option<Lease>,
    /// What the request holds of limits, to the end of the answer.
    held: Option<Held>,
    /// When the whole must be over.
    deadline: Option<Pin<Box<Sleep>>>,
    over: bool,
}

enum Source {
    Own(Option<Bytes>),
    Upstream(Incoming),
}

impl ResponseBody {
    /// An answer of our own.
    #[must_use]
    pub fn own(body: Bytes, exchange: Exchange) -> Self {
        let body = Some(body).filter(|body| !body.is_empty());
        let exchange = Some(exchange);
        Self { source: Source::Own(body), exchange, lease: None, held: None, deadline: None, over: false }
    }

    /// None: both sides switch protocols.
    #[must_use]
    pub const fn empty() -> Self {
        let source = Source::Own(None);
        Self { source, exchange: None, lease: None, held: None, deadline: None, over: false }
    }

    /// The endpoint's answer.
    #[must_use]
    pub fn upstream(
        body: Incoming,
        exchange: Exchange,
        lease: Lease,
        held: Held,
        deadline: Option<Pin<Box<Sleep>>>,
    ) -> Self {
        let (source, exchange) = (Source::Upstream(body), Some(exchange));
        Self { source, exchange, lease: Some(lease), held: Some(held), deadline, over: false }
    }

    fn completed(&mut self) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.held = None;
        let Some(exchange) = &mut self.exchange else { return };
        exchange.complete();
        // While the client still sends, the connection is of no use to others.
        if let Some(lease) = self.lease.take()
            && exchange.progress.ended.get()
        {
            lease.give_back();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let polled = match &mut this.source {
            Source::Own(body) => Poll::Ready(body.take().map(|bytes| Ok(Frame::data(bytes)))),
            Source::Upstream(body) => Pin::new(body).poll_frame(cx),
        };
        let Some(exchange) = &mut this.exchange else { return Poll::Ready(None) };
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                match (frame.data_ref(), frame.trailers_ref()) {
                    (Some(data), _) => exchange.sent += data.len() as u64,
                    (None, Some(trailers)) => exchange.trailers(trailers),
                    (None, None) => {}
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.over = true;
                exchange.upstream_ended(&error.to_string());
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.completed();
                Poll::Ready(None)
            }
            Poll::Pending => {
                if let Some(deadline) = &mut this.deadline
                    && deadline.as_mut().poll(cx).is_ready()
                {
                    this.over = true;
                    exchange.timed_out();
                    return Poll::Ready(Some(Err("upstream request timeout".into())));
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Own(body) => body.is_none(),
            Source::Upstream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, Bytes::len) as u64),
            Source::Upstream(body) => body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // A body of known length is not asked for its end.
        if self.is_end_stream() {
            self.completed();
        }
    }
}
