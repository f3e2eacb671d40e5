//! The service on the wire. A response is a client's own few fields, and behind them resources that were encoded once for
//! everybody: all nodes of a mesh start with the same state, and are told of the same changes. tonic's encoder would write
//! it anew for each, into a buffer that a stream keeps for as long as it is open.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, header};
use hyper::body::{Body as HttpBody, Frame};
use mesh_core::xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use prost::{DecodeError, Message};
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::codec::Codec as _;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::{Code, Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::AdsServer;

/// Bytes before a message: whether it is compressed, and its length (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;
const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// One response. On the wire, fields of a message may come in any order, and those of repeated ones in several places.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Push {
    /// What is this client's own.
    pub own: DeltaDiscoveryResponse,
    /// More resources, encoded as the same message has them.
    pub shared: Bytes,
}

impl Push {
    /// Bytes of the message.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        self.own.encoded_len() + self.shared.len()
    }

    /// The message as a client reads it.
    ///
    /// # Errors
    /// What is shared is no part of such a message.
    pub fn read(&self) -> Result<DeltaDiscoveryResponse, DecodeError> {
        let mut whole = self.own.clone();
        whole.merge(&*self.shared)?;
        Ok(whole)
    }

    /// The message with its prefix, in two parts.
    fn framed(self) -> Result<[Bytes; 2], Status> {
        let length = self.encoded_len();
        let mut own = BytesMut::with_capacity(PREFIX + self.own.encoded_len());
        own.put_u8(0);
        own.put_u32(
            u32::try_from(length).map_err(|_too_long| Status::internal("a response of more than 4 GiB"))?,
        );
        self.own.encode(&mut own).map_err(|error| Status::internal(error.to_string()))?;
        Ok([own.freeze(), self.shared])
    }
}

/// The body of an answer: responses as they come, then how it ended.
struct Pushes {
    queue: mpsc::Receiver<Result<Push, Status>>,
    /// The second part of the response that is being sent.
    rest: Bytes,
    ended: bool,
}

impl Pushes {
    fn end(&mut self, status: &Status) -> Frame<Bytes> {
        self.ended = true;
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            trailers.insert(Status::GRPC_STATUS, HeaderValue::from(Code::Internal as i32));
        }
        Frame::trailers(trailers)
    }
}

impl HttpBody for Pushes {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.rest)))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let frame = match ready!(self.queue.poll_recv(cx)).map(|push| push.and_then(Push::framed)) {
            Some(Ok([own, shared])) => {
                self.rest = shared;
                Frame::data(own)
            }
            Some(Err(status)) => self.end(&status),
            None => self.end(&Status::ok("")),
        };
        Poll::Ready(Some(Ok(frame)))
    }
}

/// Serves `envoy.service.discovery.v3.AggregatedDiscoveryService`, of which the delta method is spoken.
#[derive(Debug, Clone)]
pub struct AdsService {
    server: AdsServer,
    /// Largest request, in bytes.
    largest: usize,
}

impl AdsService {
    /// The service of a server.
    #[must_use]
    pub const fn new(server: AdsServer, largest: usize) -> Self {
        Self { server, largest }
    }

    async fn answer(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        if request.uri().path() != METHOD {
            return Err(Status::unimplemented("only the delta protocol is served: DeltaAggregatedResources"));
        }
        let mut codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
        let read = |body| Streaming::new_request(codec.decoder(), body, None, Some(self.largest));
        let queue = self.server.open(Request::from_http(request.map(read))).await?;
        let mut response = http::Response::new(Body::new(Pushes { queue, rest: Bytes::new(), ended: false }));
        let kind = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok(response)
    }
}

impl NamedService for AdsService {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl Service<http::Request<Body>> for AdsService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { Ok(service.answer(request).await.unwrap_or_else(Status::into_http)) })
    }
}
