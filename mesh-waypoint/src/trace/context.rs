//! Trace contexts in headers: W3C (`traceparent`, `tracestate`) and B3, in one header or several.
//!
//! Pure: headers in, headers out. What is malformed counts as absent, as both specifications ask for.

use http::header::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// How contexts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Formats {
    /// `traceparent`.
    pub w3c: bool,
    /// `b3`.
    pub b3: bool,
    /// `x-b3-*`.
    pub b3_several: bool,
}

impl Formats {
    /// Those of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self {
            w3c: self.w3c || other.w3c,
            b3: self.b3 || other.b3,
            b3_several: self.b3_several || other.b3_several,
        }
    }
}

/// Where a request stands in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// Of the trace; not 0.
    pub trace: u128,
    /// Of the span; not 0.
    pub span: u64,
    /// Of the span above it.
    pub parent: Option<u64>,
    /// Whether spans are recorded.
    pub sampled: bool,
    /// B3's debug flag: sampled, and to be kept by all.
    pub debug: bool,
}

/// What a client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incoming {
    /// Trace and span; none where only the decision came (B3).
    pub ids: Option<(u128, u64)>,
    /// Whether to record; none leaves it to us.
    pub sampled: Option<bool>,
    /// B3's debug flag.
    pub debug: bool,
    /// What it was written in: it is continued in that, too.
    pub formats: Formats,
}

/// Reads what a request says of its trace; W3C comes first, then B3 in one header, then in several.
#[must_use]
pub fn extract(headers: &HeaderMap) -> Option<Incoming> {
    let (w3c, b3, several) = (w3c(headers), b3(headers), b3_several(headers));
    let formats = Formats { w3c: w3c.is_some(), b3: b3.is_some(), b3_several: several.is_some() };
    Some(Incoming { formats, ..w3c.or(b3).or(several)? })
}

/// Writes a context; `tracestate` goes on as it is, since we add nothing to it.
pub fn inject(headers: &mut HeaderMap, context: &Context, formats: Formats) {
    let Context { trace, span, parent, sampled, debug } = *context;
    if formats.w3c {
        put(headers, TRACEPARENT, &format!("00-{trace:032x}-{span:016x}-0{}", u8::from(sampled)));
    }
    let decision = match (debug, sampled) {
        (true, _) => "d",
        (false, true) => "1",
        (false, false) => "0",
    };
    if formats.b3 {
        let parent = parent.map_or_else(String::new, |parent| format!("-{parent:016x}"));
        put(headers, B3, &format!("{trace:032x}-{span:016x}-{decision}{parent}"));
    }
    if formats.b3_several {
        put(headers, B3_TRACE, &format!("{trace:032x}"));
        put(headers, B3_SPAN, &format!("{span:016x}"));
        match parent {
            Some(parent) => put(headers, B3_PARENT, &format!("{parent:016x}")),
            None => drop(headers.remove(B3_PARENT)),
        }
        if debug {
            headers.remove(B3_SAMPLED);
            headers.insert(B3_FLAGS, HeaderValue::from_static("1"));
        } else {
            headers.insert(B3_SAMPLED, HeaderValue::from_static(if sampled { "1" } else { "0" }));
        }
    }
}

fn put(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

/// <https://www.w3.org/TR/trace-context/>: two lines of `traceparent` are none; a later version is read as far as this
/// one goes.
fn w3c(headers: &HeaderMap) -> Option<Incoming> {
    let mut lines = headers.get_all(TRACEPARENT).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else { return None };
    let mut parts = line.to_str().ok()?.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let ended = parts.next().is_none();
    if version.len() != 2 || version == "ff" || (version == "00" && !ended) {
        return None;
    }
    hex(version, 2)?;
    let flags = hex(flags, 2)?;
    let ids = (hex(trace, 32)?, u64::try_from(hex(span, 16)?).ok()?);
    if ids.0 == 0 || ids.1 == 0 {
        return None;
    }
    Some(Incoming {
        ids: Some(ids),
        sampled: Some(flags & 1 == 1),
        debug: false,
        formats: Formats::default(),
    })
}

/// <https://github.com/openzipkin/b3-propagation>: `{trace}-{span}[-{decision}[-{parent}]]`, or the decision alone.
fn b3(headers: &HeaderMap) -> Option<Incoming> {
    let text = headers.get(B3)?.to_str().ok()?;
    let alone = |text: &str| decision(text).map(|decided| incoming(None, decided));
    let Some((trace, rest)) = text.split_once('-') else { return alone(text) };
    let mut rest = rest.split('-');
    let ids = ids(trace, rest.next()?)?;
    let decided = match rest.next() {
        Some(text) => decision(text)?,
        None => (None, false),
    };
    Some(incoming(Some(ids), decided))
}

fn b3_several(headers: &HeaderMap) -> Option<Incoming> {
    let text = |name: &HeaderName| headers.get(name)?.to_str().ok();
    let debug = text(&B3_FLAGS) == Some("1");
    let sampled = match text(&B3_SAMPLED) {
        Some("1" | "true" | "True") => Some(true),
        Some("0" | "false" | "False") => Some(false),
        _ => None,
    };
    let found = text(&B3_TRACE).zip(text(&B3_SPAN)).and_then(|(trace, span)| ids(trace, span));
    if found.is_none() && sampled.is_none() && !debug {
        return None;
    }
    Some(incoming(found, (if debug { Some(true) } else { sampled }, debug)))
}

const fn incoming(ids: Option<(u128, u64)>, (sampled, debug): (Option<bool>, bool)) -> Incoming {
    let formats = Formats { w3c: false, b3: false, b3_several: false };
    Incoming { ids, sampled, debug, formats }
}

fn decision(text: &str) -> Option<(Option<bool>, bool)> {
    match text {
        "1" | "true" => Some((Some(true), false)),
        "0" | "false" => Some((Some(false), false)),
        "d" => Some((Some(true), true)),
        _ => None,
    }
}

/// Traces of 64 bits are the lower half of those of 128.
fn ids(trace: &str, span: &str) -> Option<(u128, u64)> {
    let trace = hex(trace, 32).or_else(|| hex(trace, 16))?;
    let span = u64::try_from(hex(span, 16)?).ok()?;
    (trace != 0 && span != 0).then_some((trace, span))
}

fn hex(text: &str, length: usize) -> Option<u128> {
    let digits = text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if digits { u128::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;
    const SPAN: u64 = 0xb7ad_6b71_6920_3331;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    type Said = Option<(Option<(u128, u64)>, Option<bool>)>;

    fn said(pairs: &[(&'static str, &str)]) -> Said {
        extract(&headers(pairs)).map(|incoming| (incoming.ids, incoming.sampled))
    }

    #[test]
    fn a_context_is_read_in_each_of_its_forms() {
        let ids = Some((TRACE, SPAN));
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(said(&[("traceparent", parent)]), Some((ids, Some(true))));
        assert_eq!(said(&[("traceparent", &parent.replace("-01", "-00"))]), Some((ids, Some(false))));
        // A later version may have more to say.
        assert_eq!(said(&[("traceparent", &format!("01{}-x", &parent[2..]))]), Some((ids, Some(true))));
        let b3 = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
        assert_eq!(said(&[("b3", b3)]), Some((ids, None)));
        assert_eq!(said(&[("b3", &format!("{b3}-0"))]), Some((ids, Some(false))));
        assert_eq!(said(&[("b3", &format!("{b3}-d-05e3ac9a4f6e3b90"))]), Some((ids, Some(true))));
        assert_eq!(said(&[("b3", "0")]), Some((None, Some(false))));
        let several = [
            ("x-b3-traceid", "8448eb211c80319c"),
            ("x-b3-spanid", "b7ad6b7169203331"),
            ("x-b3-sampled", "1"),
        ];
        assert_eq!(said(&several), Some((Some((0x8448_eb21_1c80_319c, SPAN)), Some(true))));
        assert_eq!(said(&[("x-b3-flags", "1")]), Some((None, Some(true))));
    }

    #[test]
    fn what_is_malformed_counts_as_absent() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for wrong in [
            "",
            "00",
            &good[..good.len() - 1],
            &format!("{good}-more"),
            &good.replace("00-", "ff-"),
            &good.to_ascii_uppercase(),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert_eq!(said(&[("traceparent", wrong)]), None, "{wrong}");
        }
        assert_eq!(said(&[("traceparent", good), ("traceparent", good)]), None);
        for wrong in ["2", "x-y", "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-x"] {
            assert_eq!(said(&[("b3", wrong)]), None, "{wrong}");
        }
        // The next form is looked at then.
        let both = [("traceparent", "00"), ("b3", "1")];
        assert_eq!(said(&both), Some((None, Some(true))));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let context = Context { trace: TRACE, span: SPAN, parent: Some(7), sampled: true, debug: false };
        for formats in [
            Formats { w3c: true, ..Formats::default() },
            Formats { b3: true, ..Formats::default() },
            Formats { b3_several: true, ..Formats::default() },
        ] {
            let mut written = headers(&[("tracestate", "a=b")]);
            inject(&mut written, &context, formats);
            let read = extract(&written).unwrap();
            assert_eq!((read.ids, read.sampled, read.formats), (Some((TRACE, SPAN)), Some(true), formats));
            assert_eq!(written["tracestate"], "a=b");
        }
        let mut written = HeaderMap::new();
        let debug = Context { debug: true, parent: None, ..context };
        inject(&mut written, &debug, Formats { b3: true, b3_several: true, w3c: false });
        assert_eq!(written["b3"], format!("{TRACE:032x}-{SPAN:016x}-d"));
        assert_eq!(written["x-b3-flags"], "1");
        assert!(extract(&written).unwrap().debug);
    }
}
