//! What external authorizers answer. Input: the first byte says which variant, the second the status of HTTP, the rest is
//! the body. A reply lets a request pass only if it says so, and never changes what belongs to the connection.
#![no_main]

use http::{HeaderMap, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;
use mesh_core::xds::proto::ext_authz::CheckResponse;
use mesh_core::xds::proto::l7;
use mesh_waypoint::security::ext_authz::{Answer, HeaderChange, Reply, answer};
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let [variant, status, body @ ..] = data else { return };
    let grpc = variant % 2 == 0;
    let mut headers = HeaderMap::new();
    headers.insert("grpc-status", HeaderValue::from_static("0"));
    if let Ok(value) = HeaderValue::from_bytes(body) {
        headers.insert("x-envoy-auth-headers-to-remove", value);
    }
    let status = if grpc { Ok(StatusCode::OK) } else { StatusCode::from_u16(200 + u16::from(*status) * 2) };
    let Ok(status) = status else { return };
    let provider = l7::Provider { grpc, ..Default::default() };
    let reply = Reply { status, trailers: headers.clone(), headers, body: body.to_vec().into() };
    let Answer::Allow(allowed) = answer(&provider, Ok(reply)) else { return };
    if grpc {
        let response = CheckResponse::decode(&body[5..]).expect("it was read");
        assert_eq!(response.status.map_or(0, |status| status.code), 0, "a refusal let the request pass");
    } else {
        assert_eq!(status, StatusCode::OK);
    }
    for change in allowed.headers.iter().chain(&allowed.response_headers) {
        let (HeaderChange::Set(name, _)
        | HeaderChange::Append(name, _)
        | HeaderChange::AddIfAbsent(name, _)
        | HeaderChange::OverwriteIfExists(name, _)
        | HeaderChange::Remove(name)) = change;
        let name = name.as_str();
        assert!(!matches!(name, "host" | "content-length" | "transfer-encoding" | "connection"), "{name}");
    }
});
