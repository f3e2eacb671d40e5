//! An ADS server whose every message the test writes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures_util::Stream as FutureStream;
use prost::Message;
use prost_types::Any;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::PATIENCE;
use crate::xds::proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use crate::xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};

/// Hands every stream that a client opens to the test.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    streams: mpsc::Receiver<Stream>,
    token: Arc<Mutex<Option<String>>>,
    /// Its own, so that all its connections can be dropped at once.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One stream: what the client asked, and where answers go.
pub(super) struct Stream {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    metadata: HashMap<String, String>,
}

struct Service {
    streams: mpsc::Sender<Stream>,
    token: Arc<Mutex<Option<String>>>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn FutureStream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let mut metadata = HashMap::new();
        for pair in request.metadata().iter() {
            if let tonic::metadata::KeyAndValueRef::Ascii(key, value) = pair {
                metadata.insert(key.to_string(), value.to_str().unwrap().to_owned());
            }
        }
        let wanted = self.token.lock().unwrap().clone();
        if wanted.is_some_and(|token| metadata.get("authorization") != Some(&format!("Bearer {token}"))) {
            return Err(Status::unauthenticated("who are you"));
        }
        let (responses, mut queue) = mpsc::channel(16);
        let stream = Stream { requests: request.into_inner(), responses, metadata };
        self.streams.send(stream).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(Box::pin(futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx)))))
    }
}

impl Server {
    pub(super) async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub(super) async fn start_at(address: SocketAddr) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (sender, streams) = mpsc::channel(4);
        let token = Arc::new(Mutex::new(None));
        let service = Service { streams: sender, token: Arc::clone(&token) };
        let (bound, address_of) = tokio::sync::oneshot::channel();
        runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            bound.send(listener.local_addr().unwrap()).unwrap();
            let server = AggregatedDiscoveryServiceServer::new(service);
            let incoming = TcpIncoming::from(listener);
            tonic::transport::Server::builder()
                .add_service(server)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        let address = address_of.await.unwrap();
        Self { address, streams, token, runtime: Some(runtime) }
    }

    pub(super) fn require_token(&self, token: &str) {
        *self.token.lock().unwrap() = Some(token.to_owned());
    }

    pub(super) async fn stream(&mut self) -> Stream {
        timeout(PATIENCE, self.streams.recv()).await.expect("the client did not come").unwrap()
    }

    /// Stops listening and drops every connection.
    pub(super) async fn kill(mut self) -> SocketAddr {
        let runtime = self.runtime.take().unwrap();
        let stop = move || runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        tokio::task::spawn_blocking(stop).await.unwrap();
        self.address
    }
}

impl Stream {
    pub(super) fn metadata(&self, key: &str) -> Option<String> {
        self.metadata.get(key).cloned()
    }

    pub(super) async fn request(&mut self) -> DeltaDiscoveryRequest {
        let message = timeout(PATIENCE, self.requests.message()).await.expect("the client said nothing");
        message.unwrap().expect("the client closed the stream")
    }

    /// Every resource gets the version `v-<nonce>`.
    pub(super) async fn respond<M: Message>(
        &self,
        type_url: &str,
        nonce: &str,
        resources: &[(String, M)],
        removed: &[&str],
    ) {
        let encoded: Vec<_> = resources.iter().map(|(name, m)| (name.as_str(), m.encode_to_vec())).collect();
        let mut response = response(type_url, nonce, &encoded);
        response.removed_resources = removed.iter().map(ToString::to_string).collect();
        self.responses.send(Ok(response)).await.unwrap();
    }

    pub(super) async fn respond_raw(&self, type_url: &str, nonce: &str, resources: &[(&str, Vec<u8>)]) {
        self.responses.send(Ok(response(type_url, nonce, resources))).await.unwrap();
    }

    pub(super) async fn respond_empty_resource(&self, type_url: &str, nonce: &str, name: &str) {
        let mut response = response(type_url, nonce, &[(name, Vec::new())]);
        response.resources[0].resource = None;
        self.responses.send(Ok(response)).await.unwrap();
    }

    /// Ends the stream in order.
    pub(super) async fn end(self) {
        drop(self.responses);
    }
}

fn response(type_url: &str, nonce: &str, resources: &[(&str, Vec<u8>)]) -> DeltaDiscoveryResponse {
    let resource = |(name, value): &(&str, Vec<u8>)| Resource {
        name: (*name).to_owned(),
        version: format!("v-{nonce}"),
        resource: Some(Any { type_url: type_url.to_owned(), value: value.clone() }),
        ..Resource::default()
    };
    DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources: resources.iter().map(resource).collect(),
        ..DeltaDiscoveryResponse::default()
    }
}

/// Answers every connection with bytes that are no HTTP and closes it.
pub(super) async fn serve_noise(address: SocketAddr) -> tokio::task::JoinHandle<()> {
    use tokio::io::AsyncWriteExt;
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(&[0xff; 4096]).await;
        }
    })
}
