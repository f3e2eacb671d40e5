//! What each received frame does to a connection.

use std::io::{self, IoSlice};
use std::ops::Range;

use bytes::Bytes;

use super::super::request::Fields;
use super::core::{ALIVE_PING, Block, Core, DRAIN_PING, Drain, LARGEST_WINDOW, Role};
use super::frame::{
    ACK, CONTINUATION, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Head, PADDED, PING, PRIORITISED, PRIORITY,
    PUSH_PROMISE, RST_STREAM, Reason, SETTINGS, WINDOW_UPDATE, head, setting,
};
use super::parse::Piece;
use super::streams::{Answer, Cut};

/// Requests that a client may reset before anybody has looked at them. More is a flood.
const MOST_RESET_REQUESTS: usize = 20;
/// Frames that bring nothing, while nothing moves. More is a flood.
const MOST_USELESS: u32 = 10_000;
/// Data frames of less than this count as such where their stream is stuck.
const TINY: usize = 32;
/// Slices in one write to an application.
const SLICES: usize = 16;

impl Core {
    /// Takes `bytes[range]` in. Data is only noted: call [`Self::deliver`] before `bytes` change.
    ///
    /// # Errors
    /// The reason to end the connection.
    pub(super) fn receive(&mut self, bytes: &[u8], mut range: Range<usize>) -> Result<(), Reason> {
        while let Some(piece) = self.parser.next(bytes, &mut range)? {
            match piece {
                Piece::Preface => {}
                Piece::DataBegins(head) => self.data_begins(head)?,
                Piece::Data(at) => self.data(bytes, at)?,
                Piece::DataEnds(head) => self.data_ends(head),
                Piece::Frame(head) => self.frame(head)?,
            }
        }
        Ok(())
    }

    /// Whether the number is of a stream that was never opened.
    const fn is_idle(&self, id: u32) -> bool {
        id >= self.next_id || id.is_multiple_of(2)
    }

    fn data_begins(&mut self, head: Head) -> Result<(), Reason> {
        if !self.has_settings || self.block.is_some() || head.stream == 0 || self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        self.data_seen = 0;
        self.data_stream = head.stream;
        self.recv_window -= head.length as i64;
        if self.recv_window < 0 {
            return Err(Reason::FLOW_CONTROL_ERROR);
        }
        self.credit_connection(head.length);
        if let Some(key) = self.streams.find(head.stream)
            && let Some(stream) = self.streams.get(key)
        {
            stream.recv_window -= head.length as i64;
            if stream.recv_window < 0 {
                self.cut(key, Reason::FLOW_CONTROL_ERROR, Cut::Violation(Reason::FLOW_CONTROL_ERROR));
            } else if stream.recv_ended {
                self.cut(key, Reason::STREAM_CLOSED, Cut::Violation(Reason::STREAM_CLOSED));
            }
        }
        if head.length == 0 && !head.has(END_STREAM) {
            self.waste()?;
        }
        Ok(())
    }

    fn waste(&mut self) -> Result<(), Reason> {
        self.useless += 1;
        if self.useless > MOST_USELESS { Err(Reason::ENHANCE_YOUR_CALM) } else { Ok(()) }
    }

    fn data(&mut self, bytes: &[u8], at: Range<usize>) -> Result<(), Reason> {
        let id = self.data_stream;
        self.data_seen += at.len();
        let Some(key) = self.streams.find(id) else {
            // For a stream that is over.
            return Ok(());
        };
        let Some(stream) = self.streams.get(key) else { return Ok(()) };
        if stream.sink.is_some() && stream.backlog.is_empty() {
            self.arrived.push((id, key, at));
            return Ok(());
        }
        let tiny = !stream.backlog.is_empty() && at.len() < TINY;
        stream.backlog.push_back(Bytes::copy_from_slice(&bytes[at]));
        stream.wake();
        if tiny { self.waste() } else { Ok(()) }
    }

    fn data_ends(&mut self, head: Head) {
        let padding = head.length - self.data_seen;
        let key = self.streams.find(head.stream);
        let Some(key) = key else { return };
        self.give_back(key, padding);
        if head.has(END_STREAM) {
            self.received_end(key);
        }
    }

    fn received_end(&mut self, key: u32) {
        if let Some(stream) = self.streams.get(key) {
            stream.recv_ended = true;
            stream.wake();
            if stream.send_ended {
                self.close(key);
            }
        }
    }

    /// Writes what arrived to the applications' sockets. What they do not take waits with its stream.
    pub(super) fn deliver(&mut self, bytes: &[u8]) {
        let mut arrived = std::mem::take(&mut self.arrived);
        let mut rest = &arrived[..];
        while let Some((id, key, _)) = rest.first().cloned() {
            let same = rest.iter().take_while(|(i, k, _)| (*i, *k) == (id, key)).count().min(SLICES);
            let (pieces, behind) = rest.split_at(same);
            rest = behind;
            self.deliver_to(id, key, bytes, pieces);
        }
        arrived.clear();
        if arrived.capacity() <= 4 * SLICES {
            self.arrived = arrived;
        }
    }

    fn deliver_to(&mut self, id: u32, key: u32, bytes: &[u8], pieces: &[(u32, u32, Range<usize>)]) {
        let total: usize = pieces.iter().map(|(_, _, at)| at.len()).sum();
        // A reset that came with the data may have freed the key for another stream.
        let Some(stream) = self.streams.get(key).filter(|stream| stream.id == id && stream.cut.is_none())
        else {
            return;
        };
        let mut slices = [IoSlice::new(&[]); SLICES];
        for (slice, (_, _, at)) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(&bytes[at.clone()]);
        }
        let written = match &stream.sink {
            Some(sink) if stream.backlog.is_empty() => sink.write(&slices[..pieces.len()]),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        };
        let written = match written {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                stream.broken = Some(error);
                stream.wake();
                return;
            }
        };
        if written < total {
            let mut skip = written;
            for (_, _, at) in pieces {
                let from = at.start + skip.min(at.len());
                skip -= skip.min(at.len());
                if from < at.end {
                    stream.backlog.push_back(Bytes::copy_from_slice(&bytes[from..at.end]));
                }
            }
            stream.wake();
        }
        if written > 0 {
            self.credit(key, written);
        }
    }

    fn frame(&mut self, head: Head) -> Result<(), Reason> {
        if !self.has_settings && (head.kind != SETTINGS || head.has(ACK)) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if let Some(block) = &self.block
            && (head.kind != CONTINUATION || head.stream != block.stream)
        {
            return Err(Reason::PROTOCOL_ERROR);
        }
        match head.kind {
            HEADERS => self.headers(head),
            CONTINUATION => self.continuation(head),
            RST_STREAM => self.reset_by_peer(head),
            SETTINGS => self.settings_frame(head),
            PING => self.ping_frame(head),
            GOAWAY => self.goaway_frame(head),
            WINDOW_UPDATE => self.window_update(head),
            PRIORITY if head.stream == 0 => Err(Reason::PROTOCOL_ERROR),
            PRIORITY if head.length != 5 => Err(Reason::FRAME_SIZE_ERROR),
            // We said that we take none.
            PUSH_PROMISE => Err(Reason::PROTOCOL_ERROR),
            // RFC 9113 §5.5: what we do not know does not concern us.
            _ => Ok(()),
        }
    }

    fn headers(&mut self, head: Head) -> Result<(), Reason> {
        if head.stream == 0 || head.stream.is_multiple_of(2) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let mut payload = self.parser.payload();
        if head.has(PADDED) {
            let (padding, rest) = payload.split_first().ok_or(Reason::FRAME_SIZE_ERROR)?;
            let length = rest.len().checked_sub(usize::from(*padding)).ok_or(Reason::PROTOCOL_ERROR)?;
            payload = &rest[..length];
        }
        if head.has(PRIORITISED) {
            payload = payload.get(5..).ok_or(Reason::FRAME_SIZE_ERROR)?;
        }
        let end_stream = head.has(END_STREAM);
        let bytes = payload.to_vec();
        if head.has(END_HEADERS) {
            return self.header_block(head.stream, end_stream, &bytes);
        }
        self.block = Some(Block { stream: head.stream, end_stream, bytes });
        Ok(())
    }

    fn continuation(&mut self, head: Head) -> Result<(), Reason> {
        let block = self.block.as_mut().ok_or(Reason::PROTOCOL_ERROR)?;
        block.bytes.extend_from_slice(self.parser.payload());
        if block.bytes.len() > 4 * self.settings.header_list as usize {
            return Err(Reason::ENHANCE_YOUR_CALM);
        }
        if head.length == 0 {
            self.waste()?;
        }
        match self.block.take_if(|_| head.has(END_HEADERS)) {
            Some(Block { stream, end_stream, bytes }) => self.header_block(stream, end_stream, &bytes),
            None => Ok(()),
        }
    }

    fn header_block(&mut self, id: u32, end_stream: bool, block: &[u8]) -> Result<(), Reason> {
        let mut fields = Fields::new(self.settings.header_list as usize);
        self.decoder
            .decode(block, |name, value| fields.add(name, value))
            .map_err(|_malformed| Reason::COMPRESSION_ERROR)?;
        match (self.role, self.streams.find(id)) {
            (Role::Server, None) => self.request(id, end_stream, fields),
            (Role::Client, None) if self.is_idle(id) => return Err(Reason::PROTOCOL_ERROR),
            // It was reset meanwhile.
            (Role::Client, None) => {}
            (_, Some(key)) => self.later_headers(key, end_stream, fields),
        }
        Ok(())
    }

    /// Server: a new stream.
    fn request(&mut self, id: u32, end_stream: bool, fields: Fields) {
        if id < self.next_id {
            // Of a stream that we have reset.
            return;
        }
        self.next_id = id + 1;
        if matches!(self.drain, Drain::Final(last) if id > last) {
            return;
        }
        if self.streams.open() >= self.settings.streams as usize {
            return self.push_reset(id, Reason::REFUSED_STREAM);
        }
        if fields.is_too_large() {
            // Request Header Fields Too Large.
            let mut block = Vec::new();
            self.encoder.begin(&mut block);
            self.encoder.status(&mut block, 431);
            self.push_headers(id, END_STREAM, &block);
            return self.push_reset(id, Reason::NO_ERROR);
        }
        match fields.into_request() {
            Some(request) => {
                let key = self.insert(id, end_stream);
                self.requests.push_back((key, request));
            }
            None => self.push_reset(id, Reason::PROTOCOL_ERROR),
        }
    }

    /// Client: the answer. Both: trailers, of which only their end counts.
    fn later_headers(&mut self, key: u32, end_stream: bool, fields: Fields) {
        let Some(stream) = self.streams.get(key) else { return };
        let protocol_error = Cut::Violation(Reason::PROTOCOL_ERROR);
        if self.role == Role::Client && !stream.answered {
            match fields.into_answer() {
                // RFC 9110 §15.2: more is to come.
                Some(Answer { status: 100..=199, .. }) if !end_stream => return,
                Some(answer) => {
                    stream.answered = true;
                    stream.answer = Some(Box::new(answer));
                    stream.wake();
                }
                None => return self.cut(key, Reason::PROTOCOL_ERROR, protocol_error),
            }
        } else if !end_stream || stream.recv_ended {
            return self.cut(key, Reason::PROTOCOL_ERROR, protocol_error);
        }
        if end_stream {
            self.received_end(key);
        }
    }

    fn reset_by_peer(&mut self, head: Head) -> Result<(), Reason> {
        let reason = self.payload_number(head)?;
        if head.stream == 0 || self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let Some(key) = self.streams.find(head.stream) else { return Ok(()) };
        if self.requests.iter().any(|(waiting, _)| *waiting == key) {
            self.reset_requests += 1;
            if self.reset_requests > MOST_RESET_REQUESTS {
                return Err(Reason::ENHANCE_YOUR_CALM);
            }
        }
        if let Some(stream) = self.streams.get(key) {
            if stream.recv_ended && reason == Reason::NO_ERROR.0 {
                stream.deaf = !stream.send_ended;
            } else {
                stream.cut = Some(Cut::Reset(Reason(reason)));
            }
            stream.wake();
        }
        self.close(key);
        Ok(())
    }

    fn payload_number(&self, head: Head) -> Result<u32, Reason> {
        let payload = self.parser.payload().try_into();
        let bytes: [u8; 4] = payload.map_err(|_length| Reason::FRAME_SIZE_ERROR)?;
        debug_assert_eq!(head.length, 4);
        Ok(u32::from_be_bytes(bytes))
    }

    fn settings_frame(&mut self, frame: Head) -> Result<(), Reason> {
        if frame.stream != 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if frame.has(ACK) {
            return if frame.length == 0 { Ok(()) } else { Err(Reason::FRAME_SIZE_ERROR) };
        }
        if !frame.length.is_multiple_of(6) {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        self.has_settings = true;
        let payload = self.parser.payload().to_vec();
        for [n, m, a, b, c, d] in payload.as_chunks::<6>().0 {
            self.setting(u16::from_be_bytes([*n, *m]), u32::from_be_bytes([*a, *b, *c, *d]))?;
        }
        self.sending.push(&[&head(0, SETTINGS, ACK, 0)]);
        Ok(())
    }

    fn setting(&mut self, name: u16, value: u32) -> Result<(), Reason> {
        match name {
            setting::HEADER_TABLE_SIZE => self.encoder.set_table_size(value as usize),
            setting::ENABLE_PUSH if value > 1 => return Err(Reason::PROTOCOL_ERROR),
            setting::MAX_CONCURRENT_STREAMS => self.peer_streams = value as usize,
            setting::INITIAL_WINDOW_SIZE => {
                if i64::from(value) > LARGEST_WINDOW {
                    return Err(Reason::FLOW_CONTROL_ERROR);
                }
                let change = i64::from(value) - self.first_send_window;
                self.first_send_window = i64::from(value);
                for (_, stream) in self.streams.each() {
                    stream.send_window += change;
                    if stream.send_window > LARGEST_WINDOW {
                        return Err(Reason::FLOW_CONTROL_ERROR);
                    }
                }
                self.wake_for_room();
            }
            // Our frames are never longer than everybody has to take.
            setting::MAX_FRAME_SIZE if !(1 << 14..1 << 24).contains(&value) => {
                return Err(Reason::PROTOCOL_ERROR);
            }
            _ => {}
        }
        Ok(())
    }

    fn ping_frame(&mut self, frame: Head) -> Result<(), Reason> {
        if frame.stream != 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let payload = self.parser.payload().try_into();
        let payload: [u8; 8] = payload.map_err(|_length| Reason::FRAME_SIZE_ERROR)?;
        if !frame.has(ACK) {
            self.sending.push(&[&head(8, PING, ACK, 0), &payload]);
        } else if payload == DRAIN_PING && self.drain == Drain::Announced {
            let last = self.last_seen();
            self.drain = Drain::Final(last);
            self.push_goaway(last, Reason::NO_ERROR);
        } else if payload == ALIVE_PING {
            self.pongs += 1;
        }
        Ok(())
    }

    fn goaway_frame(&mut self, head: Head) -> Result<(), Reason> {
        if head.stream != 0 {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let [a, b, c, d, e, f, g, h] =
            *self.parser.payload().first_chunk().ok_or(Reason::FRAME_SIZE_ERROR)?;
        let last = u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff;
        self.goaway = Some(Reason(u32::from_be_bytes([e, f, g, h])));
        if self.role == Role::Client {
            let unprocessed: Vec<u32> = self
                .streams
                .each()
                .filter(|(_, stream)| stream.open && stream.id > last)
                .map(|(key, stream)| {
                    stream.cut = Some(Cut::Unprocessed);
                    stream.wake();
                    key
                })
                .collect();
            unprocessed.into_iter().for_each(|key| self.close(key));
        }
        Ok(())
    }

    fn window_update(&mut self, head: Head) -> Result<(), Reason> {
        let increment = i64::from(self.payload_number(head)? & 0x7fff_ffff);
        if head.stream == 0 {
            self.send_window += increment;
            if increment == 0 {
                return Err(Reason::PROTOCOL_ERROR);
            }
            if self.send_window > LARGEST_WINDOW {
                return Err(Reason::FLOW_CONTROL_ERROR);
            }
            self.wake_for_room();
            return Ok(());
        }
        if self.is_idle(head.stream) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let Some(key) = self.streams.find(head.stream) else { return Ok(()) };
        let Some(stream) = self.streams.get(key) else { return Ok(()) };
        stream.send_window += increment;
        if increment == 0 {
            self.cut(key, Reason::PROTOCOL_ERROR, Cut::Violation(Reason::PROTOCOL_ERROR));
        } else if stream.send_window > LARGEST_WINDOW {
            self.cut(key, Reason::FLOW_CONTROL_ERROR, Cut::Violation(Reason::FLOW_CONTROL_ERROR));
        } else if stream.wants_room {
            self.wake_for_room();
        }
        Ok(())
    }
}
