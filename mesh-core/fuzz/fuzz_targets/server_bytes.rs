//! Whatever a peer sends once it is through TLS: the server must end, neither panic nor hang, and hold its streams'
//! contract. The first byte chooses whether the HTTP/2 preface is prepended.
#![no_main]

use std::future::poll_fn;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mesh_core::hbone::{HboneStream, Incoming, ServerConnection, Settings};
use mesh_core::tls::Channel;
use tokio::io::AsyncWriteExt;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let rt = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build_local(Default::default());
    let rt = rt.expect("a runtime");
    rt.block_on(async {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        if first & 1 == 1 {
            near.write_all(PREFACE).await.expect("room");
        }
        near.write_all(&rest[..rest.len().min(1 << 19)]).await.expect("room");
        near.shutdown().await.expect("open");
        tokio::time::timeout(Duration::from_secs(120), serve(far, first & 2 == 2)).await.expect("an end");
    });
});

async fn serve(io: tokio::io::DuplexStream, read: bool) {
    let Ok(mut server) = ServerConnection::handshake(Channel::bare(io), &Settings::server()).await else {
        return;
    };
    while let Some(Ok(incoming)) = server.accept().await {
        let Incoming::Connect(connect) = incoming else { continue };
        if let Ok(stream) = connect.accept(None) {
            tokio::task::spawn_local(echo(stream, read));
        }
    }
}

async fn echo(mut stream: HboneStream, read: bool) {
    while read && let Some(Ok(data)) = poll_fn(|cx| stream.recv.poll_data(cx)).await {
        let n = data.len();
        assert!(n > 0, "a piece is never empty");
        if stream.send.send(&data).is_err() {
            return;
        }
        stream.recv.passed_on(n);
    }
    // Its error, if any, is that the stream is gone.
    let _ = stream.send.finish();
}
