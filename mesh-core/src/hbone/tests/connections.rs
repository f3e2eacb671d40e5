//! Client and server against each other, and each against a bare `h2` peer.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::error::Code;
use crate::identity::SpiffeId;
use crate::tls::testing::TestCa;

#[tokio::test(flavor = "local")]
async fn a_connect_reaches_the_other_side_and_bytes_flow_both_ways() {
    let (client, mut far, _) = tunnel().await;
    let mut request = to_pay();
    request.baggage = Baggage { namespace: "shop".into(), ..Baggage::default() }.to_header();
    request.traceparent = Some(TraceParent::random());
    let answer = Baggage { workload_name: "pay".into(), ..Baggage::default() };
    let serve = async {
        let connect = far.connect().await;
        assert_eq!(connect.request, request);
        connect.accept(answer.to_header().as_ref()).unwrap()
    };
    let (opened, mut theirs) = tokio::join!(client.open(&request), serve);
    let Opened { stream: mut ours, baggage } = opened.unwrap();
    assert_eq!(baggage.unwrap().parse(), answer);

    ours.send.send(b"ping").unwrap();
    assert_eq!(next(&mut theirs).await.unwrap().unwrap(), "ping");
    theirs.send.send(b"pong").unwrap();
    assert_eq!(next(&mut ours).await.unwrap().unwrap(), "pong");
    theirs.send.finish().unwrap();
    assert!(next(&mut ours).await.is_none(), "the end of one direction");
    ours.send.send(b"more").unwrap();
    ours.send.finish().unwrap();
    assert_eq!(next(&mut theirs).await.unwrap().unwrap(), "more", "the other one goes on");
    assert!(next(&mut theirs).await.is_none());
}

#[tokio::test(flavor = "local")]
async fn a_refusal_is_an_error_with_its_status_and_code() {
    let (client, mut far, _) = tunnel().await;
    for (status, code) in [
        (StatusCode::BAD_REQUEST, Code::PeerBadRequest),
        (StatusCode::UNAUTHORIZED, Code::PeerDenied),
        (StatusCode::SERVICE_UNAVAILABLE, Code::PeerUnavailable),
        (StatusCode::IM_A_TEAPOT, Code::PeerStatus),
    ] {
        let request = to_pay();
        let (opened, ()) = tokio::join!(client.open(&request), async { far.connect().await.refuse(status) });
        let error = opened.unwrap_err();
        assert_eq!((error.code(), error.to_string()), (code, format!("http status: {status}")));
        assert_eq!(client.active_streams(), 0);
    }
}

#[tokio::test(flavor = "local")]
async fn open_streams_are_counted_until_both_halves_are_gone() {
    let (client, mut far, _) = tunnel().await;
    let (ours, _theirs) = open(&client, &mut far).await;
    let (second, _) = open(&client, &mut far).await;
    assert_eq!(client.active_streams(), 2);
    let HboneStream { send, recv } = ours;
    drop(send);
    assert_eq!(client.active_streams(), 2);
    drop(recv);
    drop(second);
    assert_eq!(client.active_streams(), 0);
}

#[tokio::test(flavor = "local")]
async fn the_pool_stops_using_a_connection_one_stream_before_the_limit() {
    let (near, far) = tokio::io::duplex(64 << 10);
    tokio::task::spawn_local(async move {
        let mut server =
            h2::server::Builder::new().max_concurrent_streams(3).handshake::<_, Bytes>(far).await.unwrap();
        let mut kept = Vec::new();
        while let Some(Ok((_, mut respond))) = server.accept().await {
            kept.push(respond.send_response(Response::new(()), false).unwrap());
        }
    });
    let (client, _driver) = super::client(near).await;
    assert_eq!(client.max_streams(), 100, "assumed until the peer's settings arrive");
    let _first = client.open(&to_pay()).await.unwrap();
    assert_eq!(client.max_streams(), 3);
    assert!(client.has_room());
    let _second = client.open(&to_pay()).await.unwrap();
    assert!(!client.has_room());
    assert!(!client.is_closed());
}

#[tokio::test(flavor = "local")]
async fn a_peer_without_a_limit_still_gets_at_most_a_hundred_streams() {
    let (near, far) = tokio::io::duplex(64 << 10);
    tokio::task::spawn_local(async move {
        let mut server = h2::server::handshake(far).await.unwrap();
        let mut kept = Vec::new();
        while let Some(Ok((_, mut respond))) = server.accept().await {
            kept.push(respond.send_response(Response::new(()), false).unwrap());
        }
    });
    let (client, _driver) = super::client(near).await;
    let _first = client.open(&to_pay()).await.unwrap();
    assert_eq!(client.max_streams(), 100);
}

#[tokio::test(flavor = "local")]
async fn a_draining_server_finishes_its_streams_and_takes_no_more() {
    let (client, mut far, driver) = tunnel().await;
    let (mut ours, mut theirs) = open(&client, &mut far).await;
    far.drain.send(()).unwrap();
    while !client.is_closed() {
        tokio::task::yield_now().await;
    }
    let error = client.open(&to_pay()).await.unwrap_err();
    assert!(matches!(error, Error::Draining) && error.unprocessed(), "{error:?}");
    assert_eq!(error.code(), Code::TunnelDraining);

    ours.send.send(b"still here").unwrap();
    assert_eq!(next(&mut theirs).await.unwrap().unwrap(), "still here");
    theirs.send.finish().unwrap();
    ours.send.finish().unwrap();
    assert!(next(&mut theirs).await.is_none());
    assert!(next(&mut ours).await.is_none());
    drop((ours, theirs));
    far.ended.await.unwrap().unwrap();
    drop(client);
    driver.await.unwrap().unwrap();
}

#[tokio::test(flavor = "local")]
async fn a_connection_closes_when_its_handles_and_streams_are_gone() {
    let (client, mut far, driver) = tunnel().await;
    let (mut ours, mut theirs) = open(&client, &mut far).await;
    drop(client);
    ours.send.send(b"x").unwrap();
    assert_eq!(next(&mut theirs).await.unwrap().unwrap(), "x", "an open stream keeps it");
    drop((ours, theirs));
    driver.await.unwrap().unwrap();
    far.ended.await.unwrap().unwrap();
}

#[tokio::test(flavor = "local")]
async fn dropping_a_stream_resets_it_and_the_peer_sees_no_clean_end() {
    let (client, mut far, _) = tunnel().await;
    let (ours, mut theirs) = open(&client, &mut far).await;
    drop(ours);
    let error = next(&mut theirs).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Reset(Reason::CANCEL)), "{error:?}");
    assert_eq!(error.code(), Code::TunnelReset);

    let (mut ours, theirs) = open(&client, &mut far).await;
    drop(theirs);
    assert!(matches!(next(&mut ours).await, Some(Err(Error::Reset(Reason::CANCEL)))));
}

#[tokio::test(flavor = "local")]
async fn giving_up_an_open_tells_the_server_before_it_answered() {
    let (client, mut far, _) = tunnel().await;
    let opening = tokio::task::spawn_local(async move { client.open(&to_pay()).await.map(|_| ()) });
    let mut connect = far.connect().await;
    opening.abort();
    assert!(matches!(connect.abandoned().await, Error::Reset(Reason::CANCEL)));
}

#[tokio::test(flavor = "local")]
async fn a_broken_connection_ends_every_stream_with_an_error() {
    let (client, mut far, driver) = tunnel().await;
    let (mut ours, _theirs) = open(&client, &mut far).await;
    far.ended.abort();
    let error = next(&mut ours).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::TunnelLost, "{error:?}");
    // The peer closed its side in good order; what is wrong shows where a stream was cut.
    driver.await.unwrap().unwrap();
    assert!(client.is_closed());
    assert!(client.open(&to_pay()).await.is_err());
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_client_gives_up_a_peer_that_answers_no_ping() {
    let (near, mut far) = tokio::io::duplex(64 << 10);
    let (client, driver) = super::client(near).await;
    // The peer reads and sends its settings, and then nothing ever.
    far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let started = tokio::time::Instant::now();
    let opening = client.open(&to_pay()).await.unwrap_err();
    assert!(matches!(driver.await.unwrap(), Err(Error::Silent)));
    assert_eq!(started.elapsed().as_secs(), 30, "10 s until the ping, 20 s for the answer");
    assert_eq!(opening.code(), Code::TunnelSilent);
    assert!(client.is_closed());
    let mut sent = Vec::new();
    far.read_to_end(&mut sent).await.unwrap();
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_server_says_goodbye_to_a_peer_that_answers_no_ping() {
    let (mut near, far) = tokio::io::duplex(64 << 10);
    let far = serve(Channel::bare(far));
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let error = far.ended.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::TunnelSilent);
    let mut sent = Vec::new();
    near.read_to_end(&mut sent).await.unwrap();
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(sent.windows(goaway.len()).any(|w| w == goaway), "GOAWAY(NO_ERROR), last stream 0: {sent:?}");
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_quiet_connection_lives_as_long_as_pings_are_answered() {
    let (client, mut far, driver) = tunnel().await;
    let (mut ours, mut theirs) = open(&client, &mut far).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(!driver.is_finished() && !client.is_closed());
    ours.send.send(b"x").unwrap();
    assert_eq!(next(&mut theirs).await.unwrap().unwrap(), "x");
}

#[tokio::test(flavor = "local")]
async fn both_sides_announce_the_windows_of_the_reference() {
    let (near, mut far) = tokio::io::duplex(64 << 10);
    let (_client, _driver) = super::client(near).await;
    let mut sent = vec![0; 24 + 9 + 24 + 13];
    far.read_exact(&mut sent).await.unwrap();
    let settings: Vec<_> = sent[33..57].chunks(6).map(setting).collect();
    assert_eq!(settings, [(2, 0), (4, 4 << 20), (5, 1 << 20), (6, 16 << 10)]);
    let increment = u32::from_be_bytes(sent[66..70].try_into().unwrap());
    assert_eq!(increment, (16 << 20) - 65_535, "the connection window");

    let (mut near, far) = tokio::io::duplex(64 << 10);
    let _far = serve(Channel::bare(far));
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut sent = vec![0; 9 + 24];
    near.read_exact(&mut sent).await.unwrap();
    let settings: Vec<_> = sent[9..].chunks(6).map(setting).collect();
    assert_eq!(settings, [(3, 200), (4, 4 << 20), (5, 1 << 20), (6, 64 << 10)]);
}

fn setting(entry: &[u8]) -> (u16, u32) {
    (u16::from_be_bytes([entry[0], entry[1]]), u32::from_be_bytes(entry[2..6].try_into().unwrap()))
}

#[tokio::test(flavor = "local")]
async fn a_bare_http2_client_gets_what_the_reference_says() {
    let (near, far) = tokio::io::duplex(64 << 10);
    let mut far = serve(Channel::bare(far));
    let (mut requests, connection) = h2::client::handshake(near).await.unwrap();
    tokio::task::spawn_local(connection);

    let get = Request::get("http://10.0.0.7/").body(()).unwrap();
    let (response, _) = requests.send_request(get, true).unwrap();
    assert_eq!(response.await.unwrap().status(), StatusCode::BAD_REQUEST);
    assert_eq!(far.malformed().await.code(), Code::ConnectMethod);

    let connect = to_pay().encode().unwrap();
    let (response, mut send) = requests.send_request(connect, false).unwrap();
    let mut theirs = far.connect().await.accept(None).unwrap();
    let response = response.await.unwrap();
    assert_eq!((response.status(), response.headers().len()), (StatusCode::OK, 0));
    send.send_data(Bytes::from_static(b"hello"), true).unwrap();
    assert_eq!(next(&mut theirs).await.unwrap().unwrap(), "hello");
    assert!(next(&mut theirs).await.is_none());
    theirs.send.reset(Reason::INTERNAL_ERROR);
    let error = response.into_body().data().await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::INTERNAL_ERROR));
}

#[tokio::test(flavor = "local")]
async fn a_refused_certificate_shows_as_such_when_the_tunnel_is_used() {
    let ca = TestCa::new();
    let (near, far) = tokio::io::duplex(64 << 10);
    let (cart, pay) = (SpiffeId::new("other.example", "shop", "cart"), SpiffeId::new("", "shop", "pay"));
    let config = ca.issue(&cart).client_config(std::slice::from_ref(&pay)).unwrap();
    let server = ca.issue(&pay).server_config();
    let server = tokio::task::spawn_local(async move { crate::tls::accept(server, far).await.map(|_| ()) });
    let (stream, _) = crate::tls::connect(config, near).await.unwrap();
    let (client, driver) = ClientConnection::handshake(stream, &Settings::client());
    let driver = tokio::task::spawn_local(driver);
    let opened = client.open(&to_pay()).await.unwrap_err();
    let driven = driver.await.unwrap().unwrap_err();
    assert!(server.await.unwrap().is_err());
    assert_eq!(driven.code(), Code::PeerRefusedUs, "{driven}");
    assert!(matches!(opened.code(), Code::PeerRefusedUs | Code::TunnelLost), "{opened:?}");
}

#[tokio::test(flavor = "local")]
async fn a_tunnel_inside_a_tunnel_carries_tls_and_streams() {
    let (client, mut far, _) = tunnel().await;
    let (near, far_end) = open(&client, &mut far).await;
    let ca = TestCa::new();
    let pay = SpiffeId::new("", "shop", "pay");
    let config = ca.issue(&pay).client_config(std::slice::from_ref(&pay)).unwrap();
    let server = ca.issue(&pay).server_config();
    let (inner, outer) = tokio::join!(
        crate::tls::connect(config, near.into_io()),
        crate::tls::accept(server, far_end.into_io())
    );
    let mut inner_far = serve(outer.unwrap().0);
    let (inner, driver) = ClientConnection::handshake(inner.unwrap().0, &Settings::client());
    tokio::task::spawn_local(driver);
    let (mut ours, mut theirs) = open(&inner, &mut inner_far).await;
    let big = Bytes::from(vec![7; 3 << 20]);
    let send = async {
        let mut rest = big.clone();
        while !rest.is_empty() {
            let room = std::future::poll_fn(|cx| ours.send.poll_room(cx, rest.len())).await.unwrap();
            ours.send.send(&rest.split_to(room)).unwrap();
        }
        ours.send.finish().unwrap();
    };
    let receive = async {
        let mut got = Vec::new();
        while let Some(data) = next(&mut theirs).await {
            got.extend_from_slice(&data.unwrap());
        }
        got
    };
    let ((), got) = tokio::join!(send, receive);
    assert_eq!(got, big);
}

#[tokio::test(flavor = "local", start_paused = true)]
async fn a_ping_that_is_asked_for_goes_out_at_once_and_its_answer_counts() {
    let (client, _far, _driver) = tunnel().await;
    let begin = tokio::time::Instant::now();
    for n in 1..=3 {
        client.ping();
        while client.pongs() < n {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    assert!(begin.elapsed() < Settings::client().ping_interval / 2, "it took {:?}", begin.elapsed());
    assert_eq!(client.pongs(), 3);
}

#[tokio::test(flavor = "local")]
async fn a_stream_that_waits_for_its_window_leaves_the_connection_at_rest() {
    let (near, far) = tokio::io::duplex(256 << 10);
    let mut far = serve(Channel::bare(far));
    let (client, mut driver) = ClientConnection::handshake(Channel::bare(near), &Settings::client());
    let polls = Rc::new(Cell::new(0));
    let counted = Rc::clone(&polls);
    tokio::task::spawn_local(std::future::poll_fn(move |cx| {
        counted.set(counted.get() + 1);
        Pin::new(&mut driver).poll(cx)
    }));
    let (mut ours, mut unread) = open(&client, &mut far).await;
    let asked = Rc::new(Cell::new(0));
    let asks = Rc::clone(&asked);
    let sending = tokio::task::spawn_local(async move {
        let chunk = vec![7; 64 << 10];
        let mut sent = 0;
        while sent < 8 << 20 {
            let room = std::future::poll_fn(|cx| {
                asks.set(asks.get() + 1);
                ours.send.poll_room(cx, chunk.len())
            });
            let room = room.await.unwrap();
            ours.send.send(&chunk[..room]).unwrap();
            sent += room;
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!sending.is_finished());
    let before = (polls.get(), asked.get());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let more = (polls.get() - before.0, asked.get() - before.1);
    assert!(more.0 + more.1 < 5, "driver and stream were polled {more:?} times while nothing could be sent");

    let mut got = 0;
    while got < 8 << 20 {
        got += next(&mut unread).await.unwrap().unwrap().len();
    }
    sending.await.unwrap();
}
