//! Pings that tell a quiet peer from a dead one.

use std::pin::Pin;
use std::task::{Context, Poll};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use super::settings::Settings;

/// Polled together with the connection that it watches.
pub(super) struct Keepalive {
    // One per connection: a second taker of h2's handle gets none, and there is none after that.
    pings: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    awaiting: bool,
    interval: std::time::Duration,
    timeout: std::time::Duration,
}

impl Keepalive {
    pub(super) fn new(pings: Option<PingPong>, settings: &Settings) -> Self {
        Self {
            pings,
            timer: Box::pin(tokio::time::sleep(settings.ping_interval)),
            awaiting: false,
            interval: settings.ping_interval,
            timeout: settings.ping_timeout,
        }
    }

    /// Ready once a ping went unanswered for too long.
    pub(super) fn poll_silent(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else { return Poll::Pending };
        loop {
            if self.awaiting {
                match pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.awaiting = false;
                        self.timer.as_mut().reset(Instant::now() + self.interval);
                    }
                    // The connection has ended; its own poll says how.
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => return self.timer.as_mut().poll(cx),
                }
            }
            std::task::ready!(self.timer.as_mut().poll(cx));
            if pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.awaiting = true;
            self.timer.as_mut().reset(Instant::now() + self.timeout);
        }
    }
}
