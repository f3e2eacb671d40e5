//! What a stream speaks, by its first bytes.

/// The preface of HTTP/2 (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A method is a token; nobody's is longer.
const LONGEST_METHOD: usize = 32;

/// What a stream speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Something else.
    Other,
}

/// Looks at the first bytes of a client; `None` when they are too few to tell.
#[must_use]
pub fn sniff(bytes: &[u8]) -> Option<Spoken> {
    if bytes.is_empty() {
        return None;
    }
    if PREFACE.starts_with(bytes) && bytes.len() < PREFACE.len() {
        // `PRI` may become a preface only; no application sends it.
        return None;
    }
    if bytes.starts_with(PREFACE) {
        return Some(Spoken::Http2);
    }
    // An empty line before the request line is allowed (RFC 9112 §2.2).
    let line = bytes.strip_prefix(b"\r\n").unwrap_or(bytes);
    let method = line.iter().take_while(|byte| is_token(**byte)).count();
    if method > LONGEST_METHOD {
        return Some(Spoken::Other);
    }
    let after = line.get(method)?;
    if method == 0 || *after != b' ' {
        return Some(Spoken::Other);
    }
    let target = &line[method + 1..];
    let first = target.first()?;
    // Origin form, asterisk form, or absolute and authority forms, which begin with a letter, digit or bracket.
    if !(matches!(first, b'/' | b'*' | b'[') || first.is_ascii_alphanumeric()) {
        return Some(Spoken::Other);
    }
    let Some(end) = target.iter().position(|byte| *byte == b'\n') else {
        // A line that long is one of HTTP or none at all; the HTTP server says what is wrong with it.
        let text = target.iter().all(|byte| *byte >= b' ' || *byte == b'\r');
        return if !text {
            Some(Spoken::Other)
        } else if target.len() > 8192 {
            Some(Spoken::Http1)
        } else {
            None
        };
    };
    let line = target[..end].strip_suffix(b"\r").unwrap_or(&target[..end]);
    let version = line.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
    Some(if version.starts_with(b"HTTP/1.") { Spoken::Http1 } else { Spoken::Other })
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_everything_else() {
        let cases: &[(&[u8], Option<Spoken>)] = &[
            (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", Some(Spoken::Http1)),
            (b"OPTIONS * HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"CONNECT a:443 HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"\r\nPOST http://a/ HTTP/1.0\r\n", Some(Spoken::Http1)),
            (b"M-SEARCH / HTTP/1.1\n", Some(Spoken::Http1)),
            (b"GET /", None),
            (b"GE", None),
            (b"", None),
            (PREFACE, Some(Spoken::Http2)),
            (b"PRI * HT", None),
            (b"\x16\x03\x01\x02", Some(Spoken::Other)),
            (b"SSH-2.0-OpenSSH\r\n", Some(Spoken::Other)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Spoken::Other)),
            (b"HELO mail\r\n", Some(Spoken::Other)),
            (b"USER anonymous\n", Some(Spoken::Other)),
            (b"GET \x01", Some(Spoken::Other)),
            (b"{\"jsonrpc\"", Some(Spoken::Other)),
        ];
        for (bytes, spoken) in cases {
            assert_eq!(sniff(bytes), *spoken, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(sniff(&[b'A'; 40]), Some(Spoken::Other));
        let long = [b"GET /".as_slice(), &vec![b'a'; 9000]].concat();
        assert_eq!(sniff(&long), Some(Spoken::Http1));
    }

    #[test]
    fn whatever_comes_first_decides_the_same_when_it_comes_byte_by_byte() {
        for whole in [&b"GET /index.html HTTP/1.1\r\n"[..], PREFACE, b"SSH-2.0-x\r\n", b"EHLO there\r\n"] {
            let decided = (1..=whole.len()).find_map(|n| sniff(&whole[..n]));
            assert_eq!(decided, sniff(whole), "{:?}", String::from_utf8_lossy(whole));
        }
    }
}
