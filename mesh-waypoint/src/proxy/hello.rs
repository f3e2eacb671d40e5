//! What a TLS client says first: the name that it asks for, read without an answer, so that whoever goes on reads it again.

use std::io;

use bytes::{Bytes, BytesMut};
use mesh_core::state::Str;
use rustls::server::Acceptor;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A hello is not longer than this (Envoy's limit, too).
const LONGEST: usize = 16 << 10;
/// A fatal alert: nobody here has the name (RFC 6066 §3).
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// Why a client's first bytes are of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum HelloError {
    /// It left, or the connection broke.
    #[error("the client has left")]
    Left,
    /// It speaks something else.
    #[error("no TLS: {0}")]
    NoTls(rustls::Error),
    /// Its hello has no end.
    #[error("its hello is longer than {LONGEST} bytes")]
    TooLong,
}

/// Reads the name that a client asks for, lower case and empty for none; and the bytes that it was read from.
///
/// # Errors
/// There is no hello; the client has been told why.
pub(super) async fn read(stream: &mut TcpStream) -> Result<(Str, Bytes), HelloError> {
    let mut acceptor = Acceptor::default();
    let mut read = BytesMut::new();
    loop {
        let before = read.len();
        if stream.read_buf(&mut read).await.unwrap_or_default() == 0 {
            return Err(HelloError::Left);
        }
        let mut news = &read[before..];
        while !news.is_empty() {
            acceptor.read_tls(&mut news).map_err(|_full| HelloError::TooLong)?;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().unwrap_or_default().to_ascii_lowercase();
                return Ok((name.into(), read.freeze()));
            }
            Ok(None) if read.len() > LONGEST => return Err(HelloError::TooLong),
            Ok(None) => {}
            Err((error, mut alert)) => {
                let mut text = Vec::new();
                // In memory.
                let _ = alert.write_all(&mut text);
                say(stream, &text).await;
                return Err(HelloError::NoTls(error));
            }
        }
    }
}

/// Tells a client that nobody has the name that it asks for.
pub(super) async fn refuse(stream: &mut TcpStream) {
    say(stream, &UNRECOGNIZED_NAME).await;
}

/// The client may have left already.
async fn say(stream: &mut TcpStream, alert: &[u8]) {
    let said: io::Result<()> = async {
        stream.write_all(alert).await?;
        stream.shutdown().await
    }
    .await;
    drop(said);
}
