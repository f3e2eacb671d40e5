//! The Huffman code of header strings, RFC 7541 Appendix B. We read it and never write it: our values are short, and
//! the peer's work is worth more than a few bytes.
//!
//! The code is canonical: codes of one length are consecutive in the order of their symbols, and each length goes on
//! where the one before ended. So the lengths say everything.

use std::sync::LazyLock;

/// Bits of each byte's code. The end-of-string symbol has thirty ones.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26,
];
const SHORTEST: usize = 5;
const LONGEST: usize = 30;

struct Code {
    /// By length: the first code, and how many there are.
    first: [u32; LONGEST + 1],
    count: [u32; LONGEST + 1],
    /// By length: where its symbols begin in `symbols`.
    begin: [usize; LONGEST + 1],
    /// In the order of their codes.
    symbols: Vec<u8>,
}

static CODE: LazyLock<Code> = LazyLock::new(|| {
    let mut code = Code {
        first: [0; LONGEST + 1],
        count: [0; LONGEST + 1],
        begin: [0; LONGEST + 1],
        symbols: Vec::with_capacity(256),
    };
    let mut next = 0;
    for length in SHORTEST..=LONGEST {
        next <<= 1;
        code.first[length] = next;
        code.begin[length] = code.symbols.len();
        let with_length = (0..=255u8).filter(|symbol| usize::from(LENGTHS[usize::from(*symbol)]) == length);
        code.symbols.extend(with_length);
        code.count[length] = u32::try_from(code.symbols.len() - code.begin[length]).unwrap_or(0);
        next += code.count[length];
    }
    code
});

/// Appends the text of `bytes` to `to`; `None` if they are no code, or the text would be longer than `most`.
pub(super) fn decode(bytes: &[u8], to: &mut Vec<u8>, most: usize) -> Option<()> {
    let (mut code, mut length) = (0u32, 0usize);
    let most = to.len() + most;
    for byte in bytes {
        for bit in (0..8).rev() {
            code = (code << 1) | u32::from((byte >> bit) & 1);
            length += 1;
            if length > LONGEST {
                return None;
            }
            let offset = code.wrapping_sub(CODE.first[length]);
            if length >= SHORTEST && offset < CODE.count[length] {
                if to.len() == most {
                    return None;
                }
                to.push(CODE.symbols[CODE.begin[length] + offset as usize]);
                (code, length) = (0, 0);
            }
        }
    }
    // Padding: less than a byte, all ones.
    (length < 8 && code == (1 << length) - 1).then_some(())
}

#[cfg(test)]
pub(super) fn encode(text: &[u8]) -> Vec<u8> {
    let (mut bits, mut count, mut bytes) = (0u64, 0, Vec::new());
    for symbol in text {
        let length = usize::from(LENGTHS[usize::from(*symbol)]);
        let place = CODE.symbols[CODE.begin[length]..].iter().position(|s| s == symbol).unwrap_or(0);
        bits = (bits << length) | (u64::from(CODE.first[length]) + place as u64);
        count += length;
        while count >= 8 {
            count -= 8;
            bytes.push(u8::try_from((bits >> count) & 0xff).unwrap_or(0));
        }
    }
    if count > 0 {
        bytes.push(u8::try_from(((bits << (8 - count)) | (0xff >> count)) & 0xff).unwrap_or(0));
    }
    bytes
}
