//! What a peer sends: read in large pieces, opened record by record where it lies.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, InvalidMessage, PeerMisbehaved};
use tokio::io::{AsyncRead, ReadBuf};

use super::buffers::Buffer;
use super::record::{self, Content, Opener, RecordError, Sealer};

/// Handshake messages after the handshake are short; no more than this is collected.
const LONGEST_MESSAGE: usize = 16 << 10;
/// Records in a row that bring no data. More is a peer that wastes our time.
const MOST_IDLE: u8 = 32;

/// The key schedule, which stays with rustls.
pub(super) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Keys {
    fn next_receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(keys) => keys.update_rx_secret(),
            Self::Server(keys) => keys.update_rx_secret(),
        }
    }

    fn next_sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(keys) => keys.update_tx_secret(),
            Self::Server(keys) => keys.update_tx_secret(),
        }
    }
}

/// TLS of one direction.
pub(super) struct Protection {
    pub(super) opener: Opener,
    pub(super) keys: Keys,
    /// Of a handshake message that is not complete.
    fragment: Vec<u8>,
    /// Records in a row without data.
    idle: u8,
    /// The peer wants us to change our key, too.
    update_wanted: bool,
}

impl Protection {
    pub(super) const fn new(opener: Opener, keys: Keys) -> Self {
        Self { opener, keys, fragment: Vec::new(), idle: 0, update_wanted: false }
    }

    /// A record that is no data. `true`: the peer closes.
    fn other(&mut self, content: Content, bytes: &[u8]) -> Result<bool, Error> {
        match content {
            Content::Alert => match bytes {
                [_, 0] => Ok(true),
                // user_canceled is followed by close_notify, RFC 8446 §6.1.
                [_, 90] => Ok(false),
                [_, description] => Err(Error::AlertReceived(AlertDescription::from(*description))),
                _ => Err(Error::InvalidMessage(InvalidMessage::MessageTooShort)),
            },
            _ => self.messages(bytes).map(|()| false),
        }
    }

    fn messages(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.fragment.extend_from_slice(bytes);
        while let [kind, a, b, c, rest @ ..] = &self.fragment[..] {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if length > LONGEST_MESSAGE {
                return Err(Error::InvalidMessage(InvalidMessage::HandshakePayloadTooLarge));
            }
            let Some(body) = rest.get(..length) else { return Ok(()) };
            let update = match (*kind, body) {
                (24, [wanted @ 0..=1]) => Some(*wanted == 1),
                // A ticket; nobody resumes.
                (4, _) if matches!(self.keys, Keys::Client(_)) => None,
                _ => return Err(Error::InvalidMessage(InvalidMessage::UnexpectedMessage("after handshake"))),
            };
            self.fragment.drain(..4 + length);
            if let Some(wanted) = update {
                // RFC 8446 §5.1: a key changes at the border of a record.
                if !self.fragment.is_empty() {
                    return Err(Error::PeerMisbehaved(PeerMisbehaved::KeyEpochWithPendingFragment));
                }
                self.opener = Opener::new(self.keys.next_receiving()?).map_err(error)?;
                self.update_wanted |= wanted;
            }
        }
        if self.fragment.is_empty() {
            self.fragment = Vec::new();
        }
        Ok(())
    }
}

/// The words of rustls for what the record layer says.
pub(super) fn error(error: RecordError) -> Error {
    match error {
        RecordError::TooLong => Error::PeerSentOversizedRecord,
        RecordError::Malformed => Error::InvalidMessage(InvalidMessage::InvalidContentType),
        RecordError::Forged => Error::DecryptError,
        RecordError::Cipher => Error::General("a cipher that was not offered".into()),
    }
}

/// One direction of a connection, from the peer.
pub(crate) struct Receiving {
    /// None: the bytes are what they are.
    protection: Option<Box<Protection>>,
    /// Held from a read until its bytes are passed on.
    buffer: Option<Buffer>,
    /// What in the buffer was not looked at yet.
    unopened: Range<usize>,
    /// Bytes that came before the first read, and the begin of a record whose end has not come.
    kept: Vec<u8>,
    /// Data that came, opened, with the last of the handshake.
    early: Vec<u8>,
    /// What was kept may hold whole records: look at it before the next read.
    look_first: bool,
    closed: bool,
}

impl Receiving {
    /// `kept` was read already; `early` was opened already.
    pub(super) const fn new(protection: Option<Box<Protection>>, kept: Vec<u8>, early: Vec<u8>) -> Self {
        Self { protection, buffer: None, unopened: 0..0, kept, early, look_first: true, closed: false }
    }

    /// Waits for bytes; how many there are to look at, 0 at the end. Call [`Self::next`] until it gives nothing, then
    /// [`Self::release`], before the next call.
    pub(crate) fn poll_fill<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Ok(0));
        }
        let mut buffer = self.buffer.take().unwrap_or_else(Buffer::take);
        let before = self.kept.len();
        buffer[..before].copy_from_slice(&self.kept);
        if std::mem::take(&mut self.look_first) && (before > 0 || !self.early.is_empty()) {
            self.kept = Vec::new();
            self.unopened = 0..before;
            self.buffer = Some(buffer);
            return Poll::Ready(Ok(before.max(1)));
        }
        let mut room = ReadBuf::new(&mut buffer[before..]);
        ready!(Pin::new(io).poll_read(cx, &mut room))?;
        let read = room.filled().len();
        if read > 0 {
            if before > 0 {
                self.kept.clear();
            }
            self.unopened = 0..before + read;
            self.buffer = Some(buffer);
        }
        Poll::Ready(Ok(read))
    }

    /// Where in [`Self::bytes`] the next data lies; `None` once the rest is incomplete.
    ///
    /// # Errors
    /// A record that is not the peer's, or an alert.
    pub(crate) fn next(&mut self) -> Result<Option<Range<usize>>, Error> {
        let Some(buffer) = &mut self.buffer else { return Ok(None) };
        if !self.early.is_empty() {
            // It comes before everything that is still sealed.
            let early = std::mem::take(&mut self.early);
            let at = buffer.len() - early.len();
            buffer[at..].copy_from_slice(&early);
            return Ok(Some(at..buffer.len()));
        }
        let Some(protection) = &mut self.protection else {
            let all = std::mem::take(&mut self.unopened);
            return Ok((!all.is_empty()).then_some(all));
        };
        while !self.closed {
            let unopened = &mut buffer[self.unopened.clone()];
            let Some(length) = record::length(unopened).map_err(error)? else { return Ok(None) };
            let Some(record) = unopened.get_mut(..length) else { return Ok(None) };
            let (content, at) = protection.opener.open(record).map_err(error)?;
            let start = self.unopened.start;
            self.unopened.start += length;
            if content == Content::Data && !at.is_empty() {
                protection.idle = 0;
                return Ok(Some(start + at.start..start + at.end));
            }
            protection.idle += 1;
            if protection.idle > MOST_IDLE {
                return Err(Error::PeerMisbehaved(PeerMisbehaved::TooManyKeyUpdateRequests));
            }
            if content != Content::Data {
                let bytes = &buffer[start + at.start..start + at.end];
                self.closed = protection.other(content, bytes)?;
            }
        }
        Ok(None)
    }

    /// The bytes that ranges of [`Self::next`] point into, until [`Self::release`].
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }

    /// Gives the buffer back. What is incomplete waits for the next read.
    pub(crate) fn release(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        let rest = std::mem::take(&mut self.unopened);
        if rest.is_empty() || self.closed {
            // An idle connection keeps no room either.
            if self.kept.capacity() > 0 {
                self.kept = Vec::new();
            }
        } else {
            self.kept.clear();
            self.kept.extend_from_slice(&buffer[rest]);
        }
    }

    /// Whether the peer said that it sends nothing more.
    pub(crate) const fn is_closed(&self) -> bool {
        self.closed
    }

    /// The next key for our direction, if the peer wants it changed, or `worn` says that it should be.
    ///
    /// # Errors
    /// rustls has no further key.
    pub(crate) fn next_sealer(&mut self, worn: bool) -> Result<Option<Sealer>, Error> {
        let Some(protection) = &mut self.protection else { return Ok(None) };
        if !worn && !protection.update_wanted {
            return Ok(None);
        }
        protection.update_wanted = false;
        Sealer::new(protection.keys.next_sending()?).map(Some).map_err(error)
    }
}
