//! A connection and its transport: one task that sends what the streams have queued, and passes on what comes.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, Instant, Sleep};

use super::core::{Core, Ended, Role};
use super::frame::Reason;
use crate::hbone::settings::Settings;
use crate::tls::Channel;
use crate::tls::receiving::Receiving;

/// Reads in a row before other tasks have their turn.
const TURNS: usize = 8;
/// Bytes of frames that found no room in the buffer; beyond, a peer that asks and does not read has to wait.
const HOARD: usize = 64 << 10;
/// How long the last words may take, when something is wrong.
const GOODBYE: Duration = Duration::from_secs(2);
/// And when all is well: what streams have said before their end is still on its way.
const PATIENT_GOODBYE: Duration = Duration::from_secs(30);

/// What a connection's handles share with its driver, all on one thread.
pub(in super::super) struct Shared {
    pub(in super::super) core: RefCell<Core>,
    /// Streams that somebody holds.
    pub(in super::super) held: Cell<usize>,
}

/// The most that is read from a peer after our last words, bytes.
const LINGER: usize = 1 << 20;

enum Phase {
    Open,
    /// The last words are on their way.
    Closing(Result<(), Ended>),
    /// They are said; the peer has not hung up yet. How much more is read from it.
    Lingering(Result<(), Ended>, usize),
}

/// See the module.
pub(in super::super) struct Engine<IO> {
    pub(in super::super) shared: Rc<Shared>,
    io: IO,
    receiving: Receiving,
    phase: Phase,
    timer: Pin<Box<Sleep>>,
    awaits_pong: bool,
    /// Pings that were answered before the one that is under way.
    pongs_before: u64,
    settings: Settings,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Engine<IO> {
    pub(in super::super) fn new(role: Role, channel: Channel<IO>, settings: &Settings) -> Self {
        let Channel { io, receiving, sending, .. } = channel;
        let core = RefCell::new(Core::new(role, settings, sending));
        Self {
            shared: Rc::new(Shared { core, held: Cell::new(0) }),
            io,
            receiving,
            phase: Phase::Open,
            timer: Box::pin(tokio::time::sleep(settings.ping_interval)),
            awaits_pong: false,
            pongs_before: 0,
            settings: settings.clone(),
        }
    }

    /// Ends the connection with a reason, with the next poll.
    pub(in super::super) fn abort(&mut self, reason: Reason) {
        let mut core = self.shared.core.borrow_mut();
        let last = core.last_seen();
        core.push_goaway(last, reason);
        core.sending.push_close();
        core.end(Ended::Violation(reason));
        self.timer.as_mut().reset(Instant::now() + GOODBYE);
        self.phase = Phase::Closing(Err(Ended::Violation(reason)));
    }

    /// Moves bytes; ready when the connection is over.
    pub(in super::super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        let shared = Rc::clone(&self.shared);
        let mut core = shared.core.borrow_mut();
        core.driver_is_here(cx.waker());
        if let Phase::Open = self.phase {
            match self.turns(&mut core, cx) {
                Ok(()) => {}
                Err(Over::Quietly(result)) => return Poll::Ready(self.over(&mut core, result)),
                Err(Over::WithWords(result)) => {
                    let result = self.over(&mut core, result);
                    core.sending.push_close();
                    let patience = if result.is_ok() { PATIENT_GOODBYE } else { GOODBYE };
                    self.timer.as_mut().reset(Instant::now() + patience);
                    self.phase = Phase::Closing(result);
                }
            }
        }
        if let Phase::Closing(result) = &self.phase {
            let result = result.clone();
            match core.sending.poll_send(&mut self.io, cx) {
                Poll::Ready(Ok(())) => {
                    let _ = Pin::new(&mut self.io).poll_shutdown(cx);
                    self.timer.as_mut().reset(Instant::now() + GOODBYE);
                    self.phase = Phase::Lingering(result, LINGER);
                }
                Poll::Ready(Err(_)) => return Poll::Ready(result),
                Poll::Pending => return self.timer.as_mut().poll(cx).map(|()| result),
            }
        }
        let Phase::Lingering(result, left) = &mut self.phase else { return Poll::Pending };
        let result = result.clone();
        if hangs_up(&mut self.io, left, cx) || self.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(result);
        }
        Poll::Pending
    }

    fn over(&self, core: &mut Core, result: Result<(), Ended>) -> Result<(), Ended> {
        core.end(result.clone().err().unwrap_or(Ended::Closed));
        result
    }

    fn turns(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<(), Over> {
        for _ in 0..TURNS {
            match core.sending.poll_send(&mut self.io, cx) {
                Poll::Ready(Ok(())) => {
                    self.change_key(core, cx)?;
                    core.wake_for_room();
                }
                Poll::Ready(Err(error)) => return Err(self.cannot_send(core, cx, &error)),
                Poll::Pending => {}
            }
            if core.sending.hoarded() > HOARD {
                return self.silence(core, cx);
            }
            match self.receiving.poll_fill(&mut self.io, cx) {
                Poll::Ready(Ok(0)) => return Err(self.end_of_file(core)),
                Poll::Ready(Ok(_)) => self.take_in(core)?,
                Poll::Ready(Err(error)) => return Err(Over::Quietly(Err(Ended::io(&error)))),
                Poll::Pending => {
                    if core.is_done() {
                        if core.role == Role::Client && core.goaway.is_none() {
                            core.push_goaway(0, Reason::NO_ERROR);
                        }
                        return Err(Over::WithWords(Ok(())));
                    }
                    return self.silence(core, cx);
                }
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// What was read: opened, parsed, passed on.
    fn take_in(&mut self, core: &mut Core) -> Result<(), Over> {
        core.hear();
        let result = loop {
            match self.receiving.next() {
                Ok(Some(range)) => {
                    if let Err(reason) = core.receive(self.receiving.bytes(), range) {
                        let preface = core.parser.awaits_preface();
                        break Err(if preface { Ended::NotHttp2(reason) } else { Ended::Violation(reason) });
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(Ended::Tls(error)),
            }
        };
        core.deliver(self.receiving.bytes());
        self.receiving.release();
        match result {
            Ok(()) => Ok(()),
            Err(ended) => {
                match &ended {
                    Ended::Tls(error) => core.sending.push_alert(error),
                    Ended::Violation(reason) | Ended::NotHttp2(reason) => {
                        let last = core.last_seen();
                        core.push_goaway(last, *reason);
                    }
                    _ => {}
                }
                Err(Over::WithWords(Err(ended)))
            }
        }
    }

    /// Replaces our key when it is worn, or the peer wants it. Only while nothing waits to be sent: a key that was made
    /// and could not be announced for lack of room would put both sides out of step.
    fn change_key(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<(), Over> {
        match self.receiving.next_sealer(core.sending.is_worn()) {
            Ok(None) => Ok(()),
            Ok(Some(sealer)) => {
                core.sending.replace_sealer(sealer);
                // What does not go at once goes with the next turn.
                let _ = core.sending.poll_send(&mut self.io, cx);
                Ok(())
            }
            Err(error) => Err(Over::Quietly(Err(Ended::Tls(error)))),
        }
    }

    /// The peer takes nothing any more. Why, it may have said before.
    fn cannot_send(&mut self, core: &mut Core, cx: &mut Context<'_>, error: &io::Error) -> Over {
        loop {
            match self.receiving.poll_fill(&mut self.io, cx) {
                Poll::Ready(Ok(0)) => return self.end_of_file(core),
                Poll::Ready(Ok(_)) => {
                    if let Err(Over::WithWords(ended) | Over::Quietly(ended)) = self.take_in(core) {
                        return Over::Quietly(ended);
                    }
                }
                _ => return Over::Quietly(Err(Ended::io(error))),
            }
        }
    }

    fn end_of_file(&self, core: &mut Core) -> Over {
        match core.goaway {
            Some(reason) if reason != Reason::NO_ERROR => Over::Quietly(Err(Ended::PeerClosed(reason))),
            _ if core.is_unused() => Over::WithWords(Ok(())),
            _ => {
                let cut = Ended::io(&io::ErrorKind::UnexpectedEof.into());
                let begun = core.has_begun();
                core.end(cut.clone());
                // The peer closed its side in good order; what is wrong shows where a stream was cut.
                Over::Quietly(if begun { Ok(()) } else { Err(cut) })
            }
        }
    }

    /// Asks a peer that says nothing whether it is there.
    fn silence(&mut self, core: &mut Core, cx: &mut Context<'_>) -> Result<(), Over> {
        if self.awaits_pong && core.pongs() != self.pongs_before {
            self.awaits_pong = false;
            self.timer.as_mut().reset(Instant::now() + self.settings.ping_interval);
        }
        let mut asked = core.take_asked() && !self.awaits_pong;
        while std::mem::take(&mut asked) || self.timer.as_mut().poll(cx).is_ready() {
            let heard = core.take_heard();
            let next = if self.awaits_pong && heard {
                // Slow, and there.
                self.awaits_pong = false;
                self.settings.ping_interval
            } else if self.awaits_pong {
                // What other node proxies do: say goodbye and leave. A peer that is really gone will not take the
                // GOAWAY, so that nothing is waited for.
                let last = core.last_seen();
                core.push_goaway(last, Reason::NO_ERROR);
                let _ = core.sending.poll_send(&mut self.io, cx);
                return Err(Over::Quietly(Err(Ended::Silent)));
            } else {
                core.ping();
                let _ = core.sending.poll_send(&mut self.io, cx);
                self.awaits_pong = true;
                self.pongs_before = core.pongs();
                self.settings.ping_timeout
            };
            self.timer.as_mut().reset(Instant::now() + next);
        }
        Ok(())
    }
}

/// Reads what the peer still says, to no end, until it has closed its side or `left` bytes are read. A socket that is
/// closed with something unread is reset, and takes what was sent last with it.
fn hangs_up(io: &mut (impl AsyncRead + Unpin), left: &mut usize, cx: &mut Context<'_>) -> bool {
    for _ in 0..TURNS {
        let mut bytes = [0; 4096];
        let mut unread = ReadBuf::new(&mut bytes);
        match Pin::new(&mut *io).poll_read(cx, &mut unread) {
            Poll::Ready(Ok(())) if (1..=*left).contains(&unread.filled().len()) => {
                *left -= unread.filled().len();
            }
            Poll::Ready(_) => return true,
            Poll::Pending => return false,
        }
    }
    cx.waker().wake_by_ref();
    false
}

/// How a connection ends.
enum Over {
    /// At once.
    Quietly(Result<(), Ended>),
    /// After what is queued was sent.
    WithWords(Result<(), Ended>),
}

impl<IO> Drop for Engine<IO> {
    fn drop(&mut self) {
        // Handles may be held, or be in use, while their driver goes.
        if let Ok(mut core) = self.shared.core.try_borrow_mut() {
            core.end(Ended::Closed);
        }
    }
}
