//! Authority and headers of a CONNECT. Input: one line each for authority, baggage, forwarded, traceparent, network.
#![no_main]

use http::{HeaderValue, Method, Request};
use libfuzzer_sys::fuzz_target;
use mesh_core::hbone::{Authority, Baggage, ConnectRequest};

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|b| *b == b'\n');
    let authority = lines.next().unwrap_or_default();
    if let Ok(text) = std::str::from_utf8(authority)
        && let Ok(parsed) = text.parse::<Authority>()
    {
        assert_eq!(parsed.to_string().parse(), Ok(parsed.clone()), "what parses prints and parses as the same");
        assert!(parsed.port() != 0);
        assert!(ConnectRequest::to(parsed).encode().is_ok());
    }
    let Ok(mut request) = Request::builder().method(Method::CONNECT).uri(authority).body(()) else { return };
    for (name, value) in ["baggage", "forwarded", "traceparent", "x-forwarded-network"].into_iter().zip(lines) {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            request.headers_mut().append(name, value);
        }
    }
    let Ok(connect) = ConnectRequest::parse(&request) else { return };
    if let Some(baggage) = &connect.baggage {
        let read = baggage.parse();
        // Writing may leave out what the grammar cannot carry, but never says something else.
        let again = read.to_header().map(|h| h.parse()).unwrap_or_default();
        assert!(again == read || again != Baggage::default() || read != Baggage::default());
        assert!(again.namespace == read.namespace || again.namespace.is_empty());
    }
    let encoded = connect.encode().expect("what was parsed can be sent on");
    let again = ConnectRequest::parse(&encoded).expect("and parsed again");
    assert_eq!((again.authority, again.traceparent), (connect.authority, connect.traceparent));
});
