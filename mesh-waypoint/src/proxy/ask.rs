//! Requests of our own to services of the mesh, with their whole answers: questions to authorizers, spans to collectors.

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Limited};
use mesh_core::xds::proto::l7::ServiceRef;

use super::body::RequestBody;
use super::headers;
use super::tries::{self, Speak};
use super::worker::Local;
use crate::config::Snapshot;
use crate::routing::Backend;
use crate::security::ext_authz::Reply;

/// The largest answer that is read, bytes.
const LARGEST: usize = 64 << 10;

/// Sends a request and collects the answer; `addressed` is the port of a service that names none.
///
/// # Errors
/// Why there is no answer; for logs.
pub(super) async fn whole(
    local: &Local,
    snapshot: &Snapshot,
    service: &ServiceRef,
    addressed: u16,
    http2: bool,
    request: Request<Bytes>,
) -> Result<Reply, String> {
    let backend = Backend {
        hostname: service.hostname.as_str().into(),
        key: (!service.namespace.is_empty())
            .then(|| format!("{}/{}", service.namespace, service.hostname).into()),
        port: u16::try_from(service.port).ok().filter(|port| *port != 0),
        subset: None,
        invalid: None,
    };
    let mut request = request.map(RequestBody::whole);
    if !http2 {
        in_origin_form(&mut request);
    }
    let answered = tries::once(local, snapshot, &backend, addressed, Speak::Http2(http2), |_| request);
    let (response, lease) = answered.await.map_err(|refused| refused.text())?;
    let (head, body) = response.into_parts();
    let collected = Limited::new(body, LARGEST).collect().await.map_err(|error| error.to_string())?;
    lease.give_back();
    let trailers = collected.trailers().cloned().unwrap_or_else(HeaderMap::new);
    Ok(Reply { status: head.status, headers: head.headers, body: collected.to_bytes(), trailers })
}

/// To servers of HTTP/1.1 the host is said in its header, which they demand, and not in the target (RFC 9112 §3.2).
fn in_origin_form<B>(request: &mut Request<B>) {
    let uri = request.uri();
    let Some(host) = uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok()) else {
        return;
    };
    let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = headers::target(path, None, false);
    request.headers_mut().entry(header::HOST).or_insert(host);
}
