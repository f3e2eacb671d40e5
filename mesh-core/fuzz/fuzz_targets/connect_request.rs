//! Authority and headers of a CONNECT. Input: one line each for authority, baggage, forwarded, traceparent, network.
//! What is read can be written and read again as the same, so that no node on the way tells the next one something else.
#![no_main]

use http::{HeaderValue, Method, Request};
use libfuzzer_sys::fuzz_target;
use mesh_core::hbone::{Authority, Baggage, BaggageHeader, ConnectRequest};

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|b| *b == b'\n');
    let authority = lines.next().unwrap_or_default();
    if let Ok(text) = std::str::from_utf8(authority)
        && let Ok(parsed) = text.parse::<Authority>()
    {
        assert_eq!(
            parsed.to_string().parse(),
            Ok(parsed.clone()),
            "what parses prints and parses as the same"
        );
        assert!(parsed.port() != 0);
        assert!(ConnectRequest::to(parsed).encode().is_ok());
    }
    let Ok(mut request) = Request::builder().method(Method::CONNECT).uri(authority).body(()) else { return };
    for (name, value) in ["baggage", "forwarded", "traceparent", "x-forwarded-network"].into_iter().zip(lines)
    {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            request.headers_mut().append(name, value);
        }
    }
    let Ok(connect) = ConnectRequest::parse(&request) else { return };
    if let Some(baggage) = &connect.baggage {
        said_again(baggage);
    }
    let encoded = connect.encode().expect("what was parsed can be sent on");
    let again = ConnectRequest::parse(&encoded).expect("and parsed again");
    assert_eq!(again, connect);
});

/// A description may lose on the way what the grammar cannot carry, but never says something else.
fn said_again(header: &BaggageHeader) {
    let read = header.parse();
    let again = read.to_header().map_or_else(Baggage::default, |written| written.parse());
    for (now, then) in [
        (&again.cluster, &read.cluster),
        (&again.namespace, &read.namespace),
        (&again.workload_name, &read.workload_name),
        (&again.service_name, &read.service_name),
        (&again.service_version, &read.service_version),
        (&again.region, &read.region),
        (&again.zone, &read.zone),
    ] {
        assert!(now == then || now.is_empty(), "{then:?} became {now:?}");
    }
    assert!(again.workload_name.is_empty() || again.workload_type == read.workload_type);
    assert_eq!(again.to_header().map(|written| written.parse()).unwrap_or_default(), again, "it settles");
}
