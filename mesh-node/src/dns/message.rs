//! Bytes on the wire: what is accepted as a query, how answers are fitted, which reply belongs to which query.
//!
//! Everything that a pod sends may be hostile. What can be no query at all is dropped (an answer to a response
//! could make two servers talk to each other for ever); what is a broken query gets FORMERR, so that its sender
//! need not wait. Queries are forwarded byte for byte, so that nothing is lost that this code does not know.

#[cfg(test)]
mod tests;

use std::ops::Range;

use hickory_proto::op::{Message, OpCode, ResponseCode};

use super::answer::failure;

/// Length of the header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
/// Largest UDP answer to a client without EDNS (RFC 1035, 4.2.1).
const PLAIN_UDP: usize = 512;
/// The longest standard query that makes sense: a question, EDNS with options, a signature.
const MAX_QUERY: usize = 4096;
/// Length of the shortest resource record that an answer of ours has (a pointer, fixed fields, an IPv4 address).
const SHORTEST_RECORD: usize = 16;

/// Why something that arrived was not answered or forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Shorter than a header.
    Short,
    /// A response.
    Response,
    /// No well-formed message.
    Malformed,
    /// Not exactly one question.
    Questions,
    /// An operation that no DNS server of a pod has use for.
    Operation,
    /// Longer than any query.
    Oversized,
    /// A version of EDNS that does not exist.
    EdnsVersion,
}

impl Refusal {
    /// Label of the metric.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Response => "response",
            Self::Malformed => "malformed",
            Self::Questions => "question_count",
            Self::Operation => "operation",
            Self::Oversized => "oversized",
            Self::EdnsVersion => "edns_version",
        }
    }
}

/// Something that arrived and is no query to work on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub refusal: Refusal,
    /// What to send back; nothing if the sender must not be answered.
    pub reply: Option<Vec<u8>>,
}

/// A well-formed query with one question.
#[derive(Debug, Clone)]
pub struct Query {
    /// All of it.
    pub message: Message,
    /// Where its question is in the bytes.
    pub question: Range<usize>,
}

impl Query {
    /// The largest UDP answer that the client takes.
    #[must_use]
    pub fn udp_limit(&self) -> usize {
        self.message.edns.as_ref().map_or(PLAIN_UDP, |edns| usize::from(edns.max_payload()).max(PLAIN_UDP))
    }
}

/// Reads what arrived.
///
/// # Errors
/// [`Refused`] says why, and what to answer.
pub fn read(bytes: &[u8]) -> Result<Query, Refused> {
    let Some(header) = bytes.first_chunk::<HEADER>() else {
        return Err(Refused { refusal: Refusal::Short, reply: None });
    };
    if header[2] & 0x80 != 0 {
        return Err(Refused { refusal: Refusal::Response, reply: None });
    }
    let refuse = |refusal, code| Refused { refusal, reply: Some(bare(header, code)) };
    let operation = OpCode::from_u8((header[2] >> 3) & 0xf);
    if !matches!(operation, OpCode::Query | OpCode::Notify | OpCode::Update) {
        return Err(refuse(Refusal::Operation, ResponseCode::NotImp));
    }
    if u16::from_be_bytes([header[4], header[5]]) != 1 {
        return Err(refuse(Refusal::Questions, ResponseCode::FormErr));
    }
    if operation == OpCode::Query && bytes.len() > MAX_QUERY {
        return Err(refuse(Refusal::Oversized, ResponseCode::FormErr));
    }
    let parsed = question(bytes).zip(Message::from_vec(bytes).ok());
    let Some((question, message)) = parsed else {
        return Err(refuse(Refusal::Malformed, ResponseCode::FormErr));
    };
    if message.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        let reply = encode(&failure(&message, ResponseCode::BADVERS), usize::from(u16::MAX));
        return Err(Refused { refusal: Refusal::EdnsVersion, reply: Some(reply) });
    }
    Ok(Query { message, question })
}

/// Where the one question is. Nothing comes before it that its name could point to, so a pointer is an error.
fn question(bytes: &[u8]) -> Option<Range<usize>> {
    let mut at = HEADER;
    loop {
        match *bytes.get(at)? {
            0 => break,
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    let end = at + 1 + 4;
    (end <= bytes.len()).then_some(HEADER..end)
}

/// An answer of nothing but a header: id, operation and recursion bit of the query, and a code.
fn bare(query: &[u8; HEADER], code: ResponseCode) -> Vec<u8> {
    let mut reply = vec![0; HEADER];
    reply[..2].copy_from_slice(&query[..2]);
    reply[2] = 0x80 | (query[2] & 0x79);
    reply[3] = code.low();
    reply
}

/// Encodes an answer in at most `limit` bytes: answers that do not fit are left out and the message says so (TC),
/// so that a client that asks again over TCP gets all and one that does not still has some.
#[must_use]
pub fn encode(message: &Message, limit: usize) -> Vec<u8> {
    // An error means more than the 64 KiB that a message can hold.
    let fits = |message: &Message| message.to_vec().ok().filter(|bytes| bytes.len() <= limit);
    let most = limit / SHORTEST_RECORD;
    if message.answers.len() <= most
        && let Some(bytes) = fits(message)
    {
        return bytes;
    }
    let mut cut = message.clone();
    cut.metadata.truncation = true;
    cut.answers.truncate(most);
    let answers = std::mem::take(&mut cut.answers);
    // Header, question and EDNS fit in every limit that DNS has.
    let mut best = cut.to_vec().unwrap_or_default();
    let (mut least, mut most) = (0, answers.len());
    while least < most {
        let middle = (least + most).div_ceil(2);
        cut.answers = answers[..middle].to_vec();
        match fits(&cut) {
            Some(bytes) => (best, least) = (bytes, middle),
            None => most = middle - 1,
        }
    }
    best
}

/// Whether a datagram from a server is the answer to a query: id, direction and question fit (RFC 5452, 9.1).
#[must_use]
pub fn is_answer(reply: &[u8], query: &[u8], question: &Range<usize>) -> bool {
    let (Some(header), Some(asked)) = (reply.first_chunk::<HEADER>(), query.get(question.clone())) else {
        return false;
    };
    if query.get(..2) != Some(&header[..2]) || header[2] & 0x80 == 0 {
        return false;
    }
    match u16::from_be_bytes([header[4], header[5]]) {
        1 => reply.get(question.clone()).is_some_and(|theirs| theirs.eq_ignore_ascii_case(asked)),
        // Servers that could not read the question do not repeat it.
        0 => header[3] & 0xf != 0,
        _ => false,
    }
}

/// Whether a message says that it is not whole.
#[must_use]
pub fn is_truncated(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 0x02 != 0)
}

/// Cuts a server's answer that a client cannot take to header and question, with the bit that says so.
#[must_use]
pub fn cut(reply: &[u8], question: &Range<usize>) -> Vec<u8> {
    let mut short = reply.get(..question.end).unwrap_or(reply).to_vec();
    if let Some(header) = short.first_chunk_mut::<HEADER>() {
        header[2] |= 0x02;
        header[6..].fill(0);
        if header[4..6] == [0, 0] {
            short.truncate(HEADER);
        }
    }
    short
}
