//! Tests of the tunnel, by theme.

mod connections;
mod copying;
mod hostile;
mod wire_text;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::tls::Channel;

/// A server connection that is being polled, and what came in.
struct Far {
    incoming: mpsc::UnboundedReceiver<Incoming>,
    drain: mpsc::UnboundedSender<()>,
    ended: JoinHandle<Result<(), Error>>,
}

impl Far {
    async fn connect(&mut self) -> IncomingConnect {
        match self.incoming.recv().await {
            Some(Incoming::Connect(connect)) => connect,
            other => panic!("expected a CONNECT, got {other:?}"),
        }
    }

    async fn malformed(&mut self) -> RequestError {
        match self.incoming.recv().await {
            Some(Incoming::Malformed(error)) => error,
            other => panic!("expected a malformed request, got {other:?}"),
        }
    }
}

fn serve<IO: AsyncRead + AsyncWrite + Unpin + 'static>(channel: Channel<IO>) -> Far {
    let (seen, incoming) = mpsc::unbounded_channel();
    let (drain, mut draining) = mpsc::unbounded_channel();
    let ended = tokio::task::spawn_local(async move {
        let mut server = ServerConnection::handshake(channel, &Settings::server()).await?;
        loop {
            tokio::select! {
                next = server.accept() => match next {
                    Some(next) => _ = seen.send(next?),
                    None => return Ok(()),
                },
                Some(()) = draining.recv() => server.drain(),
            }
        }
    });
    Far { incoming, drain, ended }
}

/// Both ends of a tunnel without TLS, and the task of the client's driver.
async fn tunnel() -> (ClientConnection, Far, JoinHandle<Result<(), Error>>) {
    let (near, far) = tokio::io::duplex(256 << 10);
    let far = serve(Channel::bare(far));
    let (client, driver) = client(near).await;
    (client, far, driver)
}

async fn client(near: DuplexStream) -> (ClientConnection, JoinHandle<Result<(), Error>>) {
    let (client, driver) = ClientConnection::handshake(Channel::bare(near), &Settings::client());
    (client, tokio::task::spawn_local(driver))
}

fn to_pay() -> ConnectRequest {
    ConnectRequest::to(std::net::SocketAddr::from(([10, 0, 0, 7], 8080)))
}

/// Opens a stream and accepts it on the other side.
async fn open(client: &ClientConnection, far: &mut Far) -> (HboneStream, HboneStream) {
    let request = to_pay();
    let accept = async { far.connect().await.accept(None).unwrap() };
    let (near, far) = tokio::join!(client.open(&request), accept);
    (near.unwrap().stream, far)
}

async fn next(stream: &mut HboneStream) -> Option<Result<bytes::Bytes, Error>> {
    let data = std::future::poll_fn(|cx| stream.recv.poll_data(cx)).await;
    if let Some(Ok(data)) = &data {
        stream.recv.passed_on(data.len());
    }
    data
}
