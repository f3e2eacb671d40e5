//! Edits of headers.

use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_core::xds::proto::l7;

use super::problem::Invalid;

/// What is done to the headers of a request or a response, in this order: remove, set, add. Most rules do nothing, and there
/// are many rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeaderEdits(Option<Box<Edits>>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Edits {
    remove: Box<[HeaderName]>,
    set: Box<[(HeaderName, HeaderValue)]>,
    add: Box<[(HeaderName, HeaderValue)]>,
    authority: Option<Box<Authority>>,
}

/// Headers that say how a message is framed or what becomes of its connection: they are the proxy's (RFC 9110, section
/// 7.6.1), and an edit of them would let one message be read as two.
const FRAMING: [&str; 7] =
    ["connection", "content-length", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"];

impl HeaderEdits {
    /// Edits of framing are left out and go to `without_effect`.
    pub(super) fn compile(
        msg: Option<&l7::HeaderEdits>,
        of_request: bool,
        without_effect: &mut Vec<Invalid>,
    ) -> Result<Self, Invalid> {
        let Some(msg) = msg else { return Ok(Self::default()) };
        let mut authority = None;
        let mut pairs = |list: &[l7::Header], field: &str| {
            let mut pairs = Vec::with_capacity(list.len());
            for header in list {
                let at = || format!("{field} {:?}", header.name);
                let lower = header.name.to_ascii_lowercase();
                if of_request && (lower == "host" || lower == ":authority") {
                    authority =
                        Some(Box::new(compile_authority(&header.value).map_err(|r| Invalid::new(at(), r))?));
                } else if FRAMING.contains(&&*lower) {
                    without_effect.push(framing(at()));
                } else {
                    pairs.push((name(&lower, at)?, value(&header.value, at)?));
                }
            }
            Ok(pairs.into())
        };
        let set = pairs(&msg.set, "set")?;
        let add = pairs(&msg.add, "add")?;
        let mut remove = Vec::with_capacity(msg.remove.len());
        for header in &msg.remove {
            let at = || format!("remove {header:?}");
            let lower = header.to_ascii_lowercase();
            if FRAMING.contains(&&*lower) || lower == "host" {
                without_effect.push(framing(at()));
            } else {
                remove.push(name(&lower, at)?);
            }
        }
        let edits = Edits { remove: remove.into(), set, add, authority };
        Ok(Self((edits != Edits::default()).then(|| Box::new(edits))))
    }

    /// Applies the edits to headers; see [`Self::authority`] for the host.
    pub fn apply(&self, headers: &mut HeaderMap) {
        let Some(edits) = &self.0 else { return };
        for name in &edits.remove {
            headers.remove(name);
        }
        for (name, value) in &edits.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &edits.add {
            headers.append(name, value.clone());
        }
    }

    /// What setting the `Host` header of a request makes its authority.
    #[must_use]
    pub fn authority(&self) -> Option<&Authority> {
        self.0.as_ref()?.authority.as_deref()
    }

    /// Whether nothing is done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

/// A host, with or without port.
pub(super) fn compile_authority(text: &str) -> Result<Authority, String> {
    match text.parse::<Authority>() {
        Ok(authority) if !text.contains('@') => Ok(authority),
        _ => Err(format!("{text:?} is no host, nor host:port")),
    }
}

fn name(lower: &str, at: impl Fn() -> String) -> Result<HeaderName, Invalid> {
    lower.parse().ok().ok_or_else(|| Invalid::new(at(), "is no name of a header (RFC 9110, section 5.1)"))
}

fn value(text: &str, at: impl Fn() -> String) -> Result<HeaderValue, Invalid> {
    let reason = "the value has characters that no header may have: control characters";
    HeaderValue::from_bytes(text.as_bytes()).ok().ok_or_else(|| Invalid::new(at(), reason))
}

fn framing(at: String) -> Invalid {
    Invalid::new(at, "how messages are framed and sent is for the proxy to say")
}
