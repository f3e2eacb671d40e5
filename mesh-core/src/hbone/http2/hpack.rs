//! Header blocks, RFC 7541.
//!
//! The encoder knows the few fields that a tunnel sends and keeps those that repeat in the dynamic table, so that most
//! of them are one byte on the wire. The decoder takes whatever a peer sends.

use std::collections::VecDeque;

use super::huffman;

/// What both tables start with, and the most that we use.
const TABLE: usize = 4096;
/// RFC 7541 §4.1: what an entry counts beside its bytes.
const ENTRY: usize = 32;
/// Appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// A block that is no HPACK. Ends the connection: the tables are out of step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

type Entry = (Box<[u8]>, Box<[u8]>);

#[derive(Default)]
struct Table {
    entries: VecDeque<Entry>,
    size: usize,
}

impl Table {
    fn insert(&mut self, name: &[u8], value: &[u8], most: usize) {
        self.shrink(most.saturating_sub(name.len() + value.len() + ENTRY));
        if name.len() + value.len() + ENTRY <= most {
            self.size += name.len() + value.len() + ENTRY;
            self.entries.push_front((name.into(), value.into()));
        }
    }

    fn shrink(&mut self, most: usize) {
        while self.size > most
            && let Some((name, value)) = self.entries.pop_back()
        {
            self.size -= name.len() + value.len() + ENTRY;
        }
    }
}

/// Reads the header blocks of one connection.
pub struct Decoder {
    table: Table,
    /// The size that the peer has chosen, at most [`TABLE`].
    most: usize,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: Table::default(), most: TABLE, name: Vec::new(), value: Vec::new() }
    }
}

impl Decoder {
    /// Reads a block and hands each field to `field`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(&mut self, block: &[u8], mut field: impl FnMut(&[u8], &[u8])) -> Result<(), Malformed> {
        let mut rest = block;
        let mut began = false;
        while let Some(first) = rest.first().copied() {
            match first {
                0x80.. => {
                    let index = integer(&mut rest, 7)?;
                    let (name, value) = self.entry(index)?;
                    field(name, value);
                }
                0x20..0x40 => {
                    // §4.2: only at the begin of a block.
                    self.most = integer(&mut rest, 5)?;
                    if began || self.most > TABLE {
                        return Err(Malformed);
                    }
                    self.table.shrink(self.most);
                    continue;
                }
                _ => {
                    let keep = first >= 0x40;
                    self.literal(&mut rest, if keep { 6 } else { 4 })?;
                    field(&self.name, &self.value);
                    if keep {
                        self.table.insert(&self.name, &self.value, self.most);
                    }
                }
            }
            began = true;
        }
        if self.name.capacity() + self.value.capacity() > 2 * TABLE {
            (self.name, self.value) = (Vec::new(), Vec::new());
        }
        Ok(())
    }

    /// Reads a literal into `name` and `value`.
    fn literal(&mut self, rest: &mut &[u8], prefix: u8) -> Result<(), Malformed> {
        let index = integer(rest, prefix)?;
        self.name.clear();
        self.value.clear();
        if index == 0 {
            string(rest, &mut self.name)?;
        } else {
            let mut name = std::mem::take(&mut self.name);
            name.extend_from_slice(self.entry(index)?.0);
            self.name = name;
        }
        string(rest, &mut self.value)
    }

    fn entry(&self, index: usize) -> Result<(&[u8], &[u8]), Malformed> {
        let at = index.checked_sub(1).ok_or(Malformed)?;
        if let Some((name, value)) = STATIC.get(at) {
            return Ok((name.as_bytes(), value.as_bytes()));
        }
        self.table.entries.get(at - STATIC.len()).map(|(n, v)| (&**n, &**v)).ok_or(Malformed)
    }
}

/// §5.1.
fn integer(rest: &mut &[u8], prefix: u8) -> Result<usize, Malformed> {
    let (first, mut bytes) = rest.split_first().ok_or(Malformed)?;
    let mask = usize::from(u8::MAX >> (8 - prefix));
    let mut value = usize::from(*first) & mask;
    if value == mask {
        // Four more bytes are 28 bits: more than any length or index here.
        for shift in [0, 7, 14, 21, 28] {
            let (byte, behind) = bytes.split_first().ok_or(Malformed)?;
            bytes = behind;
            if shift == 28 {
                return Err(Malformed);
            }
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *rest = bytes;
    Ok(value)
}

/// §5.2.
fn string(rest: &mut &[u8], to: &mut Vec<u8>) -> Result<(), Malformed> {
    let compressed = rest.first().ok_or(Malformed)? & 0x80 != 0;
    let length = integer(rest, 7)?;
    let (bytes, behind) = rest.split_at_checked(length).ok_or(Malformed)?;
    *rest = behind;
    if compressed {
        huffman::decode(bytes, to, 2 * length).ok_or(Malformed)
    } else {
        to.extend_from_slice(bytes);
        Ok(())
    }
}

/// Writes the header blocks of one connection.
#[derive(Default)]
pub struct Encoder {
    table: Table,
    /// The peer's table is smaller than ours: then it is not used at all, which has to be said once.
    without_table: bool,
    to_say: bool,
}

impl Encoder {
    /// The peer announces the size of its table.
    pub fn set_table_size(&mut self, size: usize) {
        let without = size < TABLE;
        self.to_say |= without && !self.without_table;
        self.without_table |= without;
        if without {
            self.table.shrink(0);
        }
    }

    /// Begins a block.
    pub fn begin(&mut self, block: &mut Vec<u8>) {
        if std::mem::take(&mut self.to_say) {
            block.push(0x20);
        }
    }

    /// A status.
    pub fn status(&self, block: &mut Vec<u8>, status: u16) {
        let text = status.to_string();
        match STATIC.iter().position(|field| *field == (":status", text.as_str())) {
            Some(at) => put_integer(block, 0x80, 7, at + 1),
            None => {
                put_integer(block, 0, 4, 8);
                put_string(block, text.as_bytes());
            }
        }
    }

    /// A field whose value is different each time.
    pub fn changing(&self, block: &mut Vec<u8>, name: &str, value: &[u8]) {
        put_integer(block, 0, 4, 0);
        put_string(block, name.as_bytes());
        put_string(block, value);
    }

    /// A field whose value repeats.
    pub fn repeating(&mut self, block: &mut Vec<u8>, name: &str, value: &[u8]) {
        let same = |(n, v): &Entry| **n == *name.as_bytes() && **v == *value;
        if let Some(at) = self.table.entries.iter().position(same) {
            return put_integer(block, 0x80, 7, STATIC.len() + at + 1);
        }
        // What would push everything else out, or may not be kept, is not.
        let keep = !self.without_table && value.len() <= TABLE / 4;
        let known = STATIC.iter().position(|(n, _)| *n == name).map_or(0, |at| at + 1);
        if keep {
            put_integer(block, 0x40, 6, known)
        } else {
            put_integer(block, 0, 4, known)
        }
        if known == 0 {
            put_string(block, name.as_bytes());
        }
        put_string(block, value);
        if keep {
            self.table.insert(name.as_bytes(), value, TABLE);
        }
    }
}

fn put_integer(block: &mut Vec<u8>, flags: u8, prefix: u8, value: usize) {
    let mask = u8::MAX >> (8 - prefix);
    match u8::try_from(value) {
        Ok(small) if small < mask => block.push(flags | small),
        _ => {
            block.push(flags | mask);
            let mut rest = value - usize::from(mask);
            while rest >= 0x80 {
                block.push(0x80 | u8::try_from(rest & 0x7f).unwrap_or(0));
                rest >>= 7;
            }
            block.push(u8::try_from(rest).unwrap_or(0));
        }
    }
}

fn put_string(block: &mut Vec<u8>, text: &[u8]) {
    put_integer(block, 0, 7, text.len());
    block.extend_from_slice(text);
}
