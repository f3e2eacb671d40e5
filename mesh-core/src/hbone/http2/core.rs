//! A connection without its transport.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::task::Waker;
use std::time::Instant;

use super::super::error::Error;
use super::super::request::{ConnectRequest, RequestError};
use super::super::settings::Settings;
use super::frame::{self, PREFACE, Reason, head, setting};
use super::hpack::{Decoder, Encoder};
use super::parse::Parser;
use super::streams::Streams;
use crate::tls::sending::Sending;

/// RFC 9113 §6.9.2: both windows before anybody says otherwise.
const FIRST_WINDOW: i64 = 65_535;
/// RFC 9113 §6.9.1.
pub(super) const LARGEST_WINDOW: i64 = (1 << 31) - 1;
/// The payload of the ping after which a draining server knows which streams the client has opened.
pub(super) const DRAIN_PING: [u8; 8] = *b"um-drain";
/// The payload of keepalive pings.
pub(super) const ALIVE_PING: [u8; 8] = *b"um-alive";

/// Who we are on the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Role {
    Client,
    Server,
}

/// How a server's drain goes on. RFC 9113 §6.8: first a GOAWAY that refuses nothing, then, once the client must have
/// seen it, the true one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drain {
    No,
    Announced,
    /// Streams above this one are not served.
    Final(u32),
}

/// Why a connection is over.
#[derive(Clone, Debug)]
pub(in super::super) enum Ended {
    Closed,
    PeerClosed(Reason),
    Violation(Reason),
    NotHttp2(Reason),
    Silent,
    Tls(rustls::Error),
    Io(io::ErrorKind, String),
}

impl Ended {
    pub(in super::super) fn io(error: &io::Error) -> Self {
        Self::Io(error.kind(), error.to_string())
    }

    pub(in super::super) fn error(&self) -> Error {
        match self {
            Self::Closed => Error::Closed,
            Self::PeerClosed(reason) => Error::PeerClosed(*reason),
            Self::Violation(reason) => Error::Violation(*reason),
            Self::NotHttp2(reason) => Error::NotHttp2(*reason),
            Self::Silent => Error::Silent,
            Self::Tls(error) => Error::Tls(error.clone().into()),
            Self::Io(kind, text) => Error::Io(io::Error::new(*kind, text.clone())),
        }
    }
}

/// A header block whose end has not come.
pub(super) struct Block {
    pub(super) stream: u32,
    pub(super) end_stream: bool,
    pub(super) bytes: Vec<u8>,
}

/// What a client asked for.
pub(super) type Request = Result<ConnectRequest, RequestError>;

/// See the module.
pub(in super::super) struct Core {
    pub(super) role: Role,
    pub(super) settings: Settings,
    pub(in super::super) sending: Sending,
    pub(super) parser: Parser,
    pub(super) decoder: Decoder,
    pub(super) encoder: Encoder,
    pub(super) streams: Streams,
    /// Client: the number of the next stream. Server: one above the highest that was seen.
    pub(super) next_id: u32,
    pub(super) send_window: i64,
    pub(super) recv_window: i64,
    pub(super) passed_on: u32,
    pub(super) first_send_window: i64,
    pub(super) peer_streams: usize,
    pub(super) has_settings: bool,
    pub(super) block: Option<Block>,
    /// Data that came with the reads since the last delivery: stream, its key, where.
    pub(super) arrived: Vec<(u32, u32, Range<usize>)>,
    /// The stream of the current frame of data.
    pub(super) data_stream: u32,
    /// Data of the current frame, to tell its padding.
    pub(super) data_seen: usize,
    /// Server: requests that nobody has taken.
    pub(super) requests: VecDeque<(u32, Request)>,
    /// Of these, how many the client has reset.
    pub(super) reset_requests: usize,
    pub(super) goaway: Option<Reason>,
    pub(super) drain: Drain,
    /// Nobody will open a stream any more.
    pub(super) closing: bool,
    pub(super) ended: Option<Ended>,
    pub(super) driver: Option<Waker>,
    pub(super) driver_woken: bool,
    /// A stream waits for room to send.
    pub(super) room_is_wanted: bool,
    /// Who waits to open a stream.
    pub(super) slots: Vec<Waker>,
    /// Frames that bring nothing, while nothing moves.
    pub(super) useless: u32,
    /// Something came since [`Self::take_heard`].
    heard: bool,
    /// When something last came.
    heard_at: Option<Instant>,
    /// A ping is to be sent now.
    asked: bool,
    /// Keepalive pings that were answered.
    pub(super) pongs: u64,
    pub(super) scratch: Vec<u8>,
}

impl Core {
    pub(in super::super) fn new(role: Role, settings: &Settings, sending: Sending) -> Self {
        let server = role == Role::Server;
        let mut core = Self {
            role,
            settings: settings.clone(),
            sending,
            parser: Parser::new(server, settings.frame_size as usize, 4 * settings.header_list as usize),
            decoder: Decoder::default(),
            encoder: Encoder::default(),
            streams: Streams::default(),
            next_id: 1,
            send_window: FIRST_WINDOW,
            recv_window: i64::from(settings.connection_window),
            passed_on: 0,
            first_send_window: FIRST_WINDOW,
            peer_streams: settings.streams as usize,
            has_settings: false,
            block: None,
            arrived: Vec::new(),
            data_stream: 0,
            data_seen: 0,
            requests: VecDeque::new(),
            reset_requests: 0,
            goaway: None,
            drain: Drain::No,
            closing: false,
            ended: None,
            driver: None,
            driver_woken: false,
            room_is_wanted: false,
            slots: Vec::new(),
            useless: 0,
            heard: false,
            heard_at: None,
            asked: false,
            pongs: 0,
            scratch: Vec::new(),
        };
        core.introduce();
        core
    }

    /// Preface, settings, and the window of the connection.
    fn introduce(&mut self) {
        let settings = &self.settings;
        let of_role = match self.role {
            Role::Client => (setting::ENABLE_PUSH, 0),
            Role::Server => (setting::MAX_CONCURRENT_STREAMS, settings.streams),
        };
        let mut payload = Vec::with_capacity(24);
        for (name, value) in [
            of_role,
            (setting::INITIAL_WINDOW_SIZE, settings.stream_window),
            (setting::MAX_FRAME_SIZE, settings.frame_size),
            (setting::MAX_HEADER_LIST_SIZE, settings.header_list),
        ] {
            payload.extend(name.to_be_bytes());
            payload.extend(value.to_be_bytes());
        }
        let preface = if self.role == Role::Client { PREFACE } else { &[] };
        let increment = i64::from(settings.connection_window) - FIRST_WINDOW;
        let head_of_settings = head(payload.len(), frame::SETTINGS, 0, 0);
        self.sending.push(&[preface, &head_of_settings, &payload]);
        self.push_window_update(0, u32::try_from(increment).unwrap_or(0));
    }

    /// Takes no new streams.
    pub(in super::super) fn begin_drain(&mut self) {
        if self.drain == Drain::No && self.ended.is_none() {
            self.drain = Drain::Announced;
            self.push_goaway(LARGEST_WINDOW as u32, Reason::NO_ERROR);
            self.sending.push(&[&head(8, frame::PING, 0, 0), &DRAIN_PING]);
            self.wake_driver();
        }
    }

    pub(super) fn push_goaway(&mut self, last: u32, reason: Reason) {
        let payload = [last.to_be_bytes(), reason.0.to_be_bytes()].concat();
        self.sending.push(&[&head(payload.len(), frame::GOAWAY, 0, 0), &payload]);
    }

    /// The last stream of the peer's that was looked at; a server opens none.
    pub(super) const fn last_seen(&self) -> u32 {
        if matches!(self.role, Role::Server) { self.next_id - 1 } else { 0 }
    }

    pub(super) fn ping(&mut self) {
        self.sending.push(&[&head(8, frame::PING, 0, 0), &ALIVE_PING]);
    }

    /// Has a ping sent now, unless one is under way.
    pub(in super::super) fn ask_for_ping(&mut self) {
        self.asked = true;
        self.wake_driver();
    }

    pub(super) const fn take_asked(&mut self) -> bool {
        std::mem::replace(&mut self.asked, false)
    }

    /// How many keepalive pings were answered.
    pub(in super::super) const fn pongs(&self) -> u64 {
        self.pongs
    }

    /// Something came.
    pub(super) fn hear(&mut self) {
        self.heard = true;
        self.heard_at = Some(Instant::now());
    }

    /// When something last came.
    pub(in super::super) const fn heard_at(&self) -> Option<Instant> {
        self.heard_at
    }

    /// Whether anything came since this was last asked.
    pub(super) const fn take_heard(&mut self) -> bool {
        std::mem::replace(&mut self.heard, false)
    }

    /// Server: whether the client has begun HTTP/2.
    pub(in super::super) const fn has_begun(&self) -> bool {
        !self.parser.awaits_preface()
    }

    /// Server: the next request that is still wanted.
    pub(in super::super) fn next_request(&mut self) -> Option<(u32, Request)> {
        while let Some((key, request)) = self.requests.pop_front() {
            if self.streams.get(key).is_some_and(|stream| stream.open) {
                return Some((key, request));
            }
            self.reset_requests = self.reset_requests.saturating_sub(1);
            self.streams.let_go(key);
        }
        None
    }

    /// Ends everything: streams that are open learn of it.
    pub(super) fn end(&mut self, ended: Ended) {
        if self.ended.is_none() {
            self.ended = Some(ended);
        }
        self.requests.clear();
        for (_, stream) in self.streams.each() {
            stream.wake();
        }
        self.slots.drain(..).for_each(Waker::wake);
    }

    /// Nobody will open a stream any more: the connection ends with the last one.
    pub(in super::super) fn close_when_idle(&mut self) {
        self.closing = true;
        self.wake_driver();
    }

    /// Whether nobody loses anything with the connection.
    pub(super) fn is_unused(&self) -> bool {
        self.streams.open() == 0 && !self.parser.awaits_preface()
    }

    /// Whether there is nothing left to do.
    pub(super) fn is_done(&self) -> bool {
        let over = match self.role {
            Role::Client => self.closing || self.goaway.is_some(),
            Role::Server => matches!(self.drain, Drain::Final(_)),
        };
        over && self.streams.open() == 0
    }
}
