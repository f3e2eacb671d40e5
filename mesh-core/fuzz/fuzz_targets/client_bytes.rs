//! Whatever a peer that we dialled answers once it is through TLS: the client must end, neither panic nor hang, and take
//! nothing for a tunnel but an answer of 200 to its CONNECT.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mesh_core::hbone::{Authority, ClientConnection, ConnectRequest, Settings};
use mesh_core::tls::Channel;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// SETTINGS without any, which lets a client begin.
const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let rt = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build_local(Default::default());
    let rt = rt.expect("a runtime");
    rt.block_on(async {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (mut theirs, mut answers) = tokio::io::split(far);
        // What the client sends goes nowhere; only its end is waited for.
        tokio::task::spawn_local(async move { tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await });
        let is_silent_at_the_end = first & 2 == 2;
        let answered = async {
            if first & 1 == 1 {
                answers.write_all(SETTINGS).await.expect("room");
            }
            answers.write_all(rest).await.expect("room");
            if !is_silent_at_the_end {
                answers.shutdown().await.expect("open");
            }
        };
        let end = tokio::time::timeout(Duration::from_secs(300), tunnel(near));
        let ((), end) = tokio::join!(answered, end);
        end.expect("the client ends");
    });
});

async fn tunnel(io: tokio::io::DuplexStream) {
    let (client, driver) = ClientConnection::handshake(Channel::bare(io), &Settings::client());
    let driver = tokio::task::spawn_local(driver);
    let to: Authority = "10.0.0.7:8080".parse().expect("an authority");
    // A peer that never answers is given up by whoever waits, as the proxy does.
    let opened = tokio::time::timeout(Duration::from_secs(10), client.open(&ConnectRequest::to(to))).await;
    if let Ok(Ok(opened)) = opened {
        let mut stream = opened.stream.into_io();
        let exchange = async {
            // Their errors, if any, are that the stream is gone.
            let _ = stream.write_all(b"a request").await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let _ = tokio::time::timeout(Duration::from_secs(60), exchange).await;
    }
    drop(client);
    driver.abort();
    let ended = driver.await;
    assert!(ended.is_ok() || ended.is_err_and(|error| error.is_cancelled()), "the driver panicked");
}
