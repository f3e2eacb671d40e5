//! The record layer of TLS 1.3 after the handshake: records are sealed and opened where they lie.
//!
//! rustls runs the handshake and keeps the key schedule; what is here is the part of RFC 8446 §5 that touches every
//! byte. rustls itself copies each record on its way in and out, which costs a tunnel more than the cipher does.

use std::ops::Range;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

/// Bytes before the content of a record: type, version, length.
pub const HEADER: usize = 5;
/// Bytes after it: the true type and the tag.
pub const TRAILER: usize = 1 + TAG;
/// The longest content of one record.
pub const LONGEST: usize = 1 << 14;
/// RFC 8446 §5.2: content, type, tag and padding together.
const LONGEST_SEALED: usize = LONGEST + 256;
const TAG: usize = 16;
/// RFC 8446 §5.5: about 2^24.5 full records under one key of AES-GCM. The key is replaced well before.
const RECORDS_PER_KEY: u64 = 1 << 24;

/// What a record carries. RFC 8446 §5.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Closing, or a reason to.
    Alert,
    /// Keys and tickets after the handshake.
    Handshake,
    /// The application's bytes.
    Data,
}

impl Content {
    const fn byte(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::Data => 23,
        }
    }
}

/// A record that cannot be opened, or a key that rustls does not give. Ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordError {
    /// Longer than a record may be.
    TooLong,
    /// Not a record of protected traffic, or without a type inside.
    Malformed,
    /// Not sealed with the peer's key, or not in this place.
    Forged,
    /// A cipher that was not offered.
    Cipher,
}

/// One direction's key.
struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    /// Records so far. Never wraps: the key is replaced long before.
    sequence: u64,
    /// Records after which it is to be replaced.
    most: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(RecordError::Cipher),
        };
        let unbound = UnboundKey::new(algorithm, key.as_ref()).map_err(|_unspecified| RecordError::Cipher)?;
        let iv = iv.as_ref().try_into().map_err(|_length| RecordError::Cipher)?;
        Ok(Self { key: LessSafeKey::new(unbound), iv, sequence, most: RECORDS_PER_KEY })
    }

    /// RFC 8446 §5.3: the sequence number, exclusive-ored with the initialisation vector.
    fn next_nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, of_sequence) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= of_sequence;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Protects what is sent.
pub struct Sealer(Key);

impl Sealer {
    /// With the key of a direction.
    ///
    /// # Errors
    /// [`RecordError::Cipher`].
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        Key::new(secrets).map(Self)
    }

    /// Seals `record`: [`HEADER`] bytes of room, the content, [`TRAILER`] bytes of room. The content is at most
    /// [`LONGEST`] bytes.
    pub fn seal(&mut self, content: Content, record: &mut [u8]) {
        let sealed = record.len() - HEADER;
        let [high, low] = u16::try_from(sealed).unwrap_or(u16::MAX).to_be_bytes();
        let (header, rest) = record.split_at_mut(HEADER);
        header.copy_from_slice(&[Content::Data.byte(), 3, 3, high, low]);
        let (plain, tag) = rest.split_at_mut(sealed - TAG);
        if let Some(last) = plain.last_mut() {
            *last = content.byte();
        }
        let nonce = self.0.next_nonce();
        // It fails only for more bytes than a record can have.
        match self.0.key.seal_in_place_separate_tag(nonce, Aad::from(&*header), plain) {
            Ok(of_record) => tag.copy_from_slice(of_record.as_ref()),
            // Nothing that could be read, or accepted, leaves.
            Err(_) => plain.fill(0),
        }
    }

    /// Whether the key has protected as much as one key should.
    #[must_use]
    pub const fn is_worn(&self) -> bool {
        self.0.sequence >= self.0.most
    }

    #[cfg(test)]
    pub(super) const fn wear(&mut self) {
        self.0.most = self.0.sequence;
    }
}

/// Checks and reveals what is received.
pub struct Opener(Key);

impl Opener {
    /// With the key of a direction.
    ///
    /// # Errors
    /// [`RecordError::Cipher`].
    pub fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        Key::new(secrets).map(Self)
    }

    /// Opens a whole record in place; where its content lies and what it is.
    ///
    /// # Errors
    /// Anything that does not come from the peer in just this place.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(Content, Range<usize>), RecordError> {
        let (header, sealed) = record.split_at_mut(HEADER);
        if header[0] != Content::Data.byte() {
            return Err(RecordError::Malformed);
        }
        let nonce = self.0.next_nonce();
        let plain = self
            .0
            .key
            .open_in_place(nonce, Aad::from(&*header), sealed)
            .map_err(|_unspecified| RecordError::Forged)?;
        // The type is the last byte that is not zero; zeros behind it are padding.
        let end = plain.iter().rposition(|b| *b != 0).ok_or(RecordError::Malformed)?;
        if end > LONGEST {
            return Err(RecordError::TooLong);
        }
        let content = match plain[end] {
            21 => Content::Alert,
            22 => Content::Handshake,
            23 => Content::Data,
            _ => return Err(RecordError::Malformed),
        };
        Ok((content, HEADER..HEADER + end))
    }
}

/// The length of the record that `bytes` begin with, its header included; `None` while the header is not complete.
///
/// # Errors
/// [`RecordError::TooLong`].
pub fn length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let sealed = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if sealed > LONGEST_SEALED {
        return Err(RecordError::TooLong);
    }
    Ok(Some(HEADER + sealed))
}
