//! Spans on their way to collectors, which are services of the mesh, over a worker's own connections.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use mesh_core::xds::proto::l7::Tracer;

use super::ask;
use super::worker::Local;
use crate::security::ext_authz::Reply;
use crate::trace::export;

/// Sends a worker's spans, for ever.
pub async fn serve(local: &Rc<Local>) {
    let send = |tracer, request| send(Rc::clone(local), tracer, request);
    local.spans.run(&local.shared.spans.service, send).await;
}

async fn send(local: Rc<Local>, tracer: Arc<Tracer>, request: Request<Bytes>) -> Result<Reply, String> {
    let snapshot = local.shared.snapshot.load_full();
    let to = tracer.service.as_ref().ok_or("the provider has no service")?;
    ask::whole(&local, &snapshot, to, 0, export::http2(&tracer), request).await
}
