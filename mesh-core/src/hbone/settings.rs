//! The HTTP/2 parameters of a tunnel: those of Istio's node proxies, so that flow control behaves alike on both sides.

use std::time::Duration;

/// Parameters of one connection. [`Settings::client`] and [`Settings::server`] are what the wire expects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes that a peer may send on one stream before we have passed them on.
    pub stream_window: u32,
    /// Bytes that it may send on all streams together before we have received them: given back on receipt, so that a
    /// stream whose reader is stuck holds up no other one.
    pub connection_window: u32,
    /// The largest DATA frame that we take, bytes.
    pub frame_size: u32,
    /// The largest header block that we take, bytes as RFC 9113 §6.5.2 counts them.
    pub header_list: u32,
    /// Client: streams on one connection until the peer says less. Server: what it announces.
    pub streams: u32,
    /// Quiet time between keepalive pings.
    pub ping_interval: Duration,
    /// How long a ping may go unanswered.
    pub ping_timeout: Duration,
    /// Server: how long the peer may take for its HTTP/2 preface.
    pub handshake_timeout: Duration,
}

impl Settings {
    /// The side that opens tunnels.
    #[must_use]
    pub const fn client() -> Self {
        Self { header_list: 16 << 10, streams: 100, ..Self::server() }
    }

    /// The side that accepts tunnels.
    #[must_use]
    pub const fn server() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_size: 1 << 20,
            header_list: 64 << 10,
            streams: 200,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}
