//! Frames out of bytes that are cut anywhere.
//!
//! Data is not collected: each piece is told as it comes. The payload of every other frame is collected, up to the
//! little that such a frame may have.

use std::ops::Range;

use super::frame::{DATA, HEAD, Head, PADDED, PREFACE, Reason};

/// Room for a payload that is kept for the next one.
const KEPT: usize = 1024;

/// What comes next in the bytes of a peer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// The client's preface is complete.
    Preface,
    /// A frame of data begins. Its whole length counts against the windows, padding too.
    DataBegins(Head),
    /// Data of the frame that began, as a range of the bytes.
    Data(Range<usize>),
    /// The frame of data is complete.
    DataEnds(Head),
    /// Any other frame; its payload is [`Parser::payload`].
    Frame(Head),
}

enum State {
    /// Bytes of the preface that came.
    Preface(usize),
    /// A head, of which some bytes may have come.
    Head([u8; HEAD], usize),
    /// Bytes still to come, of which `padding` are none of the application's.
    Data {
        head: Head,
        left: usize,
        padding: Option<usize>,
    },
    Payload(Head),
}

const BETWEEN: State = State::Head([0; HEAD], 0);

/// See the module.
pub(super) struct Parser {
    state: State,
    payload: Vec<u8>,
    /// The longest frame that we take.
    frame_size: usize,
    /// The longest payload of a frame that is not data.
    most: usize,
}

impl Parser {
    /// `preface`: whether the peer is a client.
    pub(super) const fn new(preface: bool, frame_size: usize, most: usize) -> Self {
        let state = if preface { State::Preface(0) } else { BETWEEN };
        Self { state, payload: Vec::new(), frame_size, most }
    }

    /// Whether the peer's preface is still to come.
    pub(super) const fn awaits_preface(&self) -> bool {
        matches!(self.state, State::Preface(_))
    }

    /// The payload of the frame that was told last.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The next piece of `bytes[range]`, which shrinks by what was looked at; `None` when it is used up.
    ///
    /// # Errors
    /// The reason to end the connection.
    pub(super) fn next(&mut self, bytes: &[u8], range: &mut Range<usize>) -> Result<Option<Piece>, Reason> {
        loop {
            let here = &bytes[range.clone()];
            match &mut self.state {
                State::Preface(seen) => {
                    let n = here.len().min(PREFACE.len() - *seen);
                    if here[..n] != PREFACE[*seen..*seen + n] {
                        return Err(Reason::PROTOCOL_ERROR);
                    }
                    range.start += n;
                    *seen += n;
                    if *seen < PREFACE.len() {
                        return Ok(None);
                    }
                    self.state = BETWEEN;
                    return Ok(Some(Piece::Preface));
                }
                State::Head(head, seen) => {
                    let n = here.len().min(HEAD - *seen);
                    head[*seen..*seen + n].copy_from_slice(&here[..n]);
                    range.start += n;
                    *seen += n;
                    if *seen < HEAD {
                        return Ok(None);
                    }
                    let head = Head::parse(*head);
                    if let Some(piece) = self.begin(head)? {
                        return Ok(Some(piece));
                    }
                }
                State::Data { head, left, padding } => {
                    if head.has(PADDED) && padding.is_none() {
                        let (Some(length), Some(rest)) = (here.first(), left.checked_sub(1)) else {
                            return if *left == 0 { Err(Reason::PROTOCOL_ERROR) } else { Ok(None) };
                        };
                        if usize::from(*length) > rest {
                            return Err(Reason::PROTOCOL_ERROR);
                        }
                        (*padding, *left) = (Some(usize::from(*length)), rest);
                        range.start += 1;
                        continue;
                    }
                    let padding = padding.unwrap_or(0);
                    if *left == 0 {
                        let head = *head;
                        self.state = BETWEEN;
                        return Ok(Some(Piece::DataEnds(head)));
                    }
                    if here.is_empty() {
                        return Ok(None);
                    }
                    let data = *left > padding;
                    let n = here.len().min(if data { *left - padding } else { *left });
                    let start = range.start;
                    range.start += n;
                    *left -= n;
                    if data {
                        return Ok(Some(Piece::Data(start..start + n)));
                    }
                }
                State::Payload(head) => {
                    let n = here.len().min(head.length - self.payload.len());
                    self.payload.extend_from_slice(&here[..n]);
                    range.start += n;
                    if self.payload.len() < head.length {
                        return Ok(None);
                    }
                    let head = *head;
                    self.state = BETWEEN;
                    return Ok(Some(Piece::Frame(head)));
                }
            }
        }
    }

    fn begin(&mut self, head: Head) -> Result<Option<Piece>, Reason> {
        if head.length > self.frame_size {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        if head.kind == DATA {
            self.state = State::Data { head, left: head.length, padding: None };
            return Ok(Some(Piece::DataBegins(head)));
        }
        if head.length > self.most {
            return Err(Reason::ENHANCE_YOUR_CALM);
        }
        if self.payload.capacity() > KEPT {
            self.payload = Vec::new();
        }
        self.payload.clear();
        self.state = State::Payload(head);
        Ok(None)
    }
}
