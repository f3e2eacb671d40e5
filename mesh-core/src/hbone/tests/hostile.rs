//! A peer that got through TLS and sends what it should not. Each case has an outcome that is bounded and named, and
//! where HTTP/2 allows it the other streams of the connection live on.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::*;
use crate::error::Code;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// RFC 9113 §7.
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// HPACK without indexing or Huffman.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut field = match name {
        ":authority" => vec![1],
        ":method" => vec![2],
        ":path" => vec![4],
        ":scheme" => vec![6],
        _ => [&[0, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat(),
    };
    match u8::try_from(value.len()) {
        Ok(short @ 0..=126) => field.push(short),
        _ => {
            field.push(127);
            let mut rest = value.len() - 127;
            while rest >= 128 {
                field.push(128 | u8::try_from(rest & 127).unwrap());
                rest >>= 7;
            }
            field.push(u8::try_from(rest).unwrap());
        }
    }
    field.extend(value.as_bytes());
    field
}

fn connect(stream: u32) -> Vec<u8> {
    let fields = [literal(":method", "CONNECT"), literal(":authority", "10.0.0.7:80")].concat();
    frame(HEADERS, END_HEADERS, stream, &fields)
}

/// A client that writes its own frames.
struct Raw {
    write: WriteHalf<DuplexStream>,
    read: ReadHalf<DuplexStream>,
}

#[derive(Debug, PartialEq)]
struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Raw {
    async fn new() -> (Self, Far) {
        let (near, far) = tokio::io::duplex(64 << 10);
        let far = serve(Channel::bare(far));
        let (read, write) = tokio::io::split(near);
        let mut raw = Self { write, read };
        raw.write.write_all(PREFACE).await.unwrap();
        raw.write.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        (raw, far)
    }

    async fn next(&mut self) -> Option<Frame> {
        next_frame(&mut self.read).await
    }

    /// The next frame of a kind.
    async fn until(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.next().await.expect("the server closed without the frame");
            if frame.kind == kind {
                return frame;
            }
        }
    }

    /// Writes until the server closes, takes no more for a while, or `most` bytes are through, while everything that
    /// the server sends is read. Returns the bytes written and the reason of a GOAWAY.
    async fn flood(mut self, bytes: impl Fn(u32) -> Vec<u8>, most: usize) -> (usize, Option<u32>) {
        const QUIET: Duration = Duration::from_millis(500);
        let mut write = self.write;
        let writing = async {
            let mut written = 0;
            for n in 0.. {
                let chunk = bytes(n);
                let result = tokio::time::timeout(QUIET, write.write_all(&chunk)).await;
                if !matches!(result, Ok(Ok(()))) || written >= most {
                    break;
                }
                written += chunk.len();
            }
            written
        };
        let reading = async {
            let mut reason = None;
            while let Ok(Some(frame)) = tokio::time::timeout(2 * QUIET, next_frame(&mut self.read)).await {
                if frame.kind == GOAWAY {
                    reason = Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()));
                }
            }
            reason
        };
        tokio::join!(writing, reading)
    }
}

async fn next_frame(read: &mut ReadHalf<DuplexStream>) -> Option<Frame> {
    let mut head = [0; 9];
    read.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    read.read_exact(&mut payload).await.ok()?;
    Some(Frame { kind: head[3], stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload })
}

#[tokio::test(flavor = "local")]
async fn something_else_than_http2_is_named() {
    for text in [&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], &[0; 64], b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"] {
        let (mut near, far) = tokio::io::duplex(4096);
        let far = serve(Channel::bare(far));
        near.write_all(text).await.unwrap();
        let error = far.ended.await.unwrap().unwrap_err();
        assert_eq!(error.code(), Code::TunnelHandshake, "{error}");
    }
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_peer_that_never_begins_is_given_up() {
    let (_near, far) = tokio::io::duplex(4096);
    let error = serve(Channel::bare(far)).ended.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::TunnelHandshake);
}

#[tokio::test(flavor = "local")]
async fn a_request_that_names_no_destination_is_a_400_and_the_connection_lives_on() {
    let (mut raw, mut far) = Raw::new().await;
    let bad = [
        vec![literal(":method", "GET"), literal(":scheme", "http"), literal(":path", "/")],
        vec![literal(":method", "CONNECT"), literal(":authority", "10.0.0.7")],
        vec![literal(":method", "CONNECT"), literal(":authority", "pay:0")],
        vec![literal(":method", "CONNECT"), literal(":authority", "me@pay:80")],
        vec![literal(":method", "CONNECT")],
    ];
    let codes = [
        Code::ConnectMethod,
        Code::ConnectAuthority,
        Code::ConnectAuthority,
        Code::ConnectAuthority,
        Code::ConnectAuthority,
    ];
    for ((n, fields), code) in (0u32..).zip(bad).zip(codes) {
        raw.write.write_all(&frame(HEADERS, END_HEADERS, 2 * n + 1, &fields.concat())).await.unwrap();
        let answer = raw.until(HEADERS).await;
        assert_eq!((answer.stream, answer.payload[0]), (2 * n + 1, 0x8c), "status 400 is index 12");
        assert_eq!(far.malformed().await.code(), code);
    }
    raw.write.write_all(&connect(99)).await.unwrap();
    far.connect().await.refuse(http::StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test(flavor = "local")]
async fn a_connect_with_a_path_or_an_unreadable_authority_is_a_stream_error_only() {
    let (mut raw, mut far) = Raw::new().await;
    let with_path = [
        literal(":method", "CONNECT"),
        literal(":scheme", "https"),
        literal(":authority", "10.0.0.7:80"),
        literal(":path", "/"),
    ];
    raw.write.write_all(&frame(HEADERS, END_HEADERS, 1, &with_path.concat())).await.unwrap();
    assert_eq!(raw.until(RST_STREAM).await.stream, 1);
    let unreadable = [literal(":method", "CONNECT"), literal(":authority", "a b:80")];
    raw.write.write_all(&frame(HEADERS, END_HEADERS, 3, &unreadable.concat())).await.unwrap();
    assert_eq!(raw.until(RST_STREAM).await.stream, 3);
    raw.write.write_all(&connect(5)).await.unwrap();
    far.connect().await.refuse(http::StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test(flavor = "local")]
async fn headers_above_64_kib_are_refused_and_the_connection_lives_on() {
    let (mut raw, mut far) = Raw::new().await;
    let fields = [
        literal(":method", "CONNECT"),
        literal(":authority", "10.0.0.7:80"),
        literal("baggage", &"x".repeat(70 << 10)),
    ]
    .concat();
    raw.write.write_all(&frame(HEADERS, END_HEADERS, 1, &fields)).await.unwrap();
    let answer = raw.until(HEADERS).await;
    let status = answer.payload.windows(3).any(|w| w == b"431");
    assert!(answer.stream == 1 && (status || answer.payload.len() < 8), "{answer:?}");
    raw.write.write_all(&connect(3)).await.unwrap();
    far.connect().await.refuse(http::StatusCode::SERVICE_UNAVAILABLE);

    let (mut raw, mut far) = Raw::new().await;
    let fields = [
        literal(":method", "CONNECT"),
        literal(":authority", "10.0.0.7:80"),
        literal("baggage", &"x".repeat(60 << 10)),
    ]
    .concat();
    raw.write.write_all(&frame(HEADERS, END_HEADERS, 1, &fields)).await.unwrap();
    assert!(far.connect().await.request.baggage.is_some(), "60 KiB are within the limit");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn endless_continuation_is_cut_off() {
    let (raw, far) = Raw::new().await;
    let start = frame(HEADERS, 0, 1, &literal(":method", "CONNECT"));
    let more = move |n: u32| {
        if n == 0 {
            start.clone()
        } else {
            frame(CONTINUATION, 0, 1, &literal("x-filler", &"x".repeat(1000)))
        }
    };
    let (written, reason) = raw.flood(more, 16 << 20).await;
    assert_eq!(reason, Some(ENHANCE_YOUR_CALM));
    assert!(written < 2 << 20, "{written} bytes were read");
    assert_eq!(far.ended.await.unwrap().unwrap_err().code(), Code::TunnelViolation);
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn streams_opened_and_reset_in_a_row_end_the_connection() {
    let (raw, far) = Raw::new().await;
    let (_, reason) = raw
        .flood(|n| [connect(2 * n + 1), frame(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8])].concat(), 1 << 20)
        .await;
    assert_eq!(reason, Some(ENHANCE_YOUR_CALM));
    assert_eq!(far.ended.await.unwrap().unwrap_err().code(), Code::TunnelViolation);
}

#[tokio::test(flavor = "local")]
async fn more_than_200_streams_at_once_are_refused_one_by_one() {
    let (mut raw, mut far) = Raw::new().await;
    for n in 0..201 {
        raw.write.write_all(&connect(2 * n + 1)).await.unwrap();
    }
    let reset = raw.until(RST_STREAM).await;
    assert_eq!((reset.stream, &reset.payload[..]), (401, &[0, 0, 0, 7][..]), "REFUSED_STREAM");
    let mut kept = Vec::new();
    for _ in 0..200 {
        kept.push(far.connect().await);
    }
}

#[tokio::test(flavor = "local")]
async fn data_beyond_the_window_ends_the_stream() {
    let (mut raw, mut far) = Raw::new().await;
    raw.write.write_all(&connect(1)).await.unwrap();
    let mut stream = far.connect().await.accept(None).unwrap();
    for _ in 0..(4 << 20) / (16 << 10) + 1 {
        raw.write.write_all(&frame(DATA, 0, 1, &[0; 16 << 10])).await.unwrap();
    }
    let reset = raw.until(RST_STREAM).await;
    assert_eq!((reset.stream, &reset.payload[..]), (1, &[0, 0, 0, 3][..]), "FLOW_CONTROL_ERROR");
    let error = loop {
        if let Err(error) = next(&mut stream).await.unwrap() {
            break error;
        }
    };
    assert_eq!(error.code(), Code::TunnelViolation, "{error:?}");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_flood_of_tiny_data_frames_ends_the_connection() {
    let (mut raw, mut far) = Raw::new().await;
    raw.write.write_all(&connect(1)).await.unwrap();
    let _unread = far.connect().await.accept(None).unwrap();
    let tiny = frame(DATA, 0, 1, b"x").repeat(1000);
    let (written, reason) = raw.flood(|_| tiny.clone(), 64 << 20).await;
    assert_eq!(reason, Some(ENHANCE_YOUR_CALM), "after {written} bytes");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_flood_of_empty_data_frames_ends_the_connection() {
    let (mut raw, mut far) = Raw::new().await;
    raw.write.write_all(&connect(1)).await.unwrap();
    let _unread = far.connect().await.accept(None).unwrap();
    let empty = frame(DATA, 0, 1, b"").repeat(1000);
    let (written, reason) = raw.flood(|_| empty.clone(), 64 << 20).await;
    assert_eq!(reason, Some(ENHANCE_YOUR_CALM), "after {written} bytes");
}

/// A peer that asks and does not read the answers must be made to wait: its questions must not pile up in our memory.
async fn taken_from_a_peer_that_does_not_read(question: &[u8]) -> usize {
    let (mut raw, _far) = Raw::new().await;
    let chunk = question.repeat(100);
    let mut written = 0;
    while written < 64 << 20 {
        match tokio::time::timeout(Duration::from_millis(300), raw.write.write_all(&chunk)).await {
            Ok(Ok(())) => written += chunk.len(),
            _ => break,
        }
    }
    written
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn pings_and_settings_of_a_peer_that_does_not_read_are_not_hoarded() {
    let taken = taken_from_a_peer_that_does_not_read(&frame(PING, 0, 0, b"12345678")).await;
    assert!(taken < 1 << 20, "{taken} bytes of PING");
    let taken = taken_from_a_peer_that_does_not_read(&frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9])).await;
    assert!(taken < 1 << 20, "{taken} bytes of SETTINGS");
}

#[tokio::test(flavor = "local")]
async fn a_goaway_in_mid_stream_lets_the_stream_finish() {
    let (mut raw, mut far) = Raw::new().await;
    raw.write.write_all(&connect(1)).await.unwrap();
    let mut stream = far.connect().await.accept(None).unwrap();
    raw.write.write_all(&frame(GOAWAY, 0, 0, &[0; 8])).await.unwrap();
    raw.write.write_all(&frame(DATA, END_STREAM, 1, b"last words")).await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap().unwrap(), "last words");
    assert!(next(&mut stream).await.is_none());
    stream.send.send(b"bye").unwrap();
    stream.send.finish().unwrap();
    assert_eq!(raw.until(DATA).await.payload, b"bye");
    drop((stream, raw));
    assert!(far.ended.await.unwrap().is_ok());
}

#[tokio::test(flavor = "local")]
async fn a_header_block_that_is_no_hpack_ends_the_connection() {
    let (mut raw, far) = Raw::new().await;
    raw.write.write_all(&frame(HEADERS, END_HEADERS, 1, &[0xff; 20])).await.unwrap();
    assert_eq!(far.ended.await.unwrap().unwrap_err().code(), Code::TunnelViolation);
}

#[tokio::test(flavor = "local")]
async fn an_answer_with_headers_above_16_kib_fails_that_connect_only() {
    let (near, far) = tokio::io::duplex(256 << 10);
    tokio::task::spawn_local(async move {
        let mut server = h2::server::handshake(far).await.unwrap();
        let mut big = true;
        while let Some(Ok((_, mut respond))) = server.accept().await {
            let mut response = http::Response::new(());
            if std::mem::take(&mut big) {
                let value = http::HeaderValue::try_from("x".repeat(20 << 10)).unwrap();
                response.headers_mut().insert("baggage", value);
            }
            // h2 itself refuses to send what the client has said it will not take; then the stream is reset.
            if respond.send_response(response, true).is_err() {
                respond.send_reset(h2::Reason::INTERNAL_ERROR);
            }
        }
    });
    let (client, _driver) = super::client(near).await;
    let error = client.open(&to_pay()).await.unwrap_err();
    assert!(matches!(error, Error::Reset(_) | Error::Violation(_)), "{error:?}");
    assert!(client.open(&to_pay()).await.is_ok());
}

fn arbitrary_frames() -> impl Strategy<Value = Vec<u8>> {
    let one = (0u8..12, any::<u8>(), 0u32..8, proptest::collection::vec(any::<u8>(), 0..40))
        .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload));
    let connect = (0u32..4).prop_map(|n| connect(2 * n + 1));
    let garbage = proptest::collection::vec(any::<u8>(), 0..64);
    proptest::collection::vec(prop_oneof![4 => one, 2 => connect, 1 => garbage], 0..30)
        .prop_map(|frames| frames.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_bytes_make_the_server_panic_or_hang(bytes in arbitrary_frames(), preface: bool) {
        let rt = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build_local(Default::default()).unwrap();
        rt.block_on(async move {
            let (mut near, far) = tokio::io::duplex(1 << 20);
            let far = serve(Channel::bare(far));
            if preface {
                near.write_all(PREFACE).await.unwrap();
            }
            near.write_all(&bytes).await.unwrap();
            near.shutdown().await.unwrap();
            let ended = tokio::time::timeout(Duration::from_secs(60), far.ended).await;
            assert!(ended.expect("the connection ends").is_ok(), "a panic");
        });
    }
}
