//! The copy loops, over real sockets.

use std::io;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::super::copy::{Ended, Transferred, socket_and_tunnel, sockets};
use super::*;
use crate::identity::SpiffeId;
use crate::tls::testing::TestCa;

/// One relayed connection: the application's ends, and the copy tasks between them.
struct Path {
    client: TcpStream,
    server: TcpStream,
    near: Relay,
    far: Relay,
}

struct Relay {
    bytes: Rc<Transferred>,
    ended: JoinHandle<Ended>,
    cancel: Option<oneshot::Sender<()>>,
}

impl Relay {
    fn new(run: impl AsyncFnOnce(Rc<Transferred>, oneshot::Receiver<()>) -> Ended + 'static) -> Self {
        let (cancel, cancelled) = oneshot::channel();
        let bytes = Rc::new(Transferred::default());
        let ended = tokio::task::spawn_local(run(Rc::clone(&bytes), cancelled));
        Self { bytes, ended, cancel: Some(cancel) }
    }

    fn transferred(&self) -> (u64, u64) {
        (self.bytes.forward.load(Ordering::Relaxed), self.bytes.backward.load(Ordering::Relaxed))
    }
}

async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (client, server) = (client.unwrap(), server.unwrap().0);
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    (client, server)
}

async fn relay(client: &ClientConnection, far: &mut Far) -> Path {
    let (near, far) = open(client, far).await;
    let (client, near_socket) = socket_pair().await;
    let (server, far_socket) = socket_pair().await;
    let start = |socket, stream| {
        Relay::new(async move |bytes: Rc<Transferred>, cancelled| {
            let cancel = async move {
                if cancelled.await.is_err() {
                    std::future::pending().await
                }
            };
            socket_and_tunnel(socket, stream, bytes, cancel).await
        })
    };
    Path { client, server, near: start(near_socket, near), far: start(far_socket, far) }
}

/// The whole way of production: sockets, read-ahead, TLS, HTTP/2.
async fn tls_tunnel() -> (ClientConnection, Far) {
    let ca = TestCa::new();
    let pay = SpiffeId::new("", "shop", "pay");
    let config = ca.issue(&pay).client_config(std::slice::from_ref(&pay)).unwrap();
    let server = ca.issue(&pay).server_config();
    let (near, far) = socket_pair().await;
    let (near, far) = tokio::join!(crate::tls::connect(config, near), crate::tls::accept(server, far));
    let (client, driver) = ClientConnection::handshake(near.unwrap().0, &Settings::client());
    tokio::task::spawn_local(driver);
    (client, serve(far.unwrap().0))
}

/// Runs a test as a worker runs: one thread, one runtime, local tasks.
fn worker(test: impl Future<Output = ()>) {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limit = Duration::from_secs(120);
    tokio::task::LocalSet::new()
        .block_on(&rt, async { tokio::time::timeout(limit, test).await })
        .expect("in time");
}

/// Bytes that reveal any loss, doubling or reordering.
fn pattern(from: u64, len: usize) -> Vec<u8> {
    let byte = |i: u64| {
        let word = (i / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        word[usize::try_from(i % 8).unwrap()]
    };
    (from..).take(len).map(byte).collect()
}

async fn send_pattern(to: &mut (impl tokio::io::AsyncWrite + Unpin), total: usize) {
    let mut sent = 0;
    while sent < total {
        let chunk = pattern(sent as u64, (total - sent).min(100_003));
        to.write_all(&chunk).await.unwrap();
        sent += chunk.len();
    }
    to.shutdown().await.unwrap();
}

async fn check_pattern(from: &mut (impl tokio::io::AsyncRead + Unpin), total: usize) {
    let mut buffer = vec![0; 1 << 20];
    let mut got = 0;
    loop {
        let n = from.read(&mut buffer).await.unwrap();
        if n == 0 {
            break;
        }
        assert!(buffer[..n] == pattern(got as u64, n), "bytes differ after {got}");
        got += n;
    }
    assert_eq!(got, total);
}

fn is_reset(result: io::Result<usize>) -> bool {
    result.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
}

async fn read_some(socket: &mut TcpStream) -> io::Result<usize> {
    socket.read(&mut [0; 1024]).await
}

#[test]
fn a_hundred_mebibytes_each_way_arrive_unchanged_and_are_counted() {
    worker(async {
        let (client, mut far) = tls_tunnel().await;
        let Path { mut client, mut server, near, far } = relay(&client, &mut far).await;
        let total = 100 << 20;
        let (mut client_read, mut client_write) = client.split();
        let (mut server_read, mut server_write) = server.split();
        tokio::join!(
            send_pattern(&mut client_write, total),
            check_pattern(&mut server_read, total),
            send_pattern(&mut server_write, total),
            check_pattern(&mut client_read, total),
        );
        let expected = (total as u64, total as u64);
        assert_eq!((near.transferred(), far.transferred()), (expected, expected));
        assert!(matches!(near.ended.await.unwrap(), Ended::Finished));
        assert!(matches!(far.ended.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn a_worn_key_is_replaced_while_bytes_flow() {
    worker(async {
        let (client, mut far) = tls_tunnel().await;
        let mut path = relay(&client, &mut far).await;
        for _ in 0..3 {
            client.wear_key();
            let bytes = pattern(0, 3 << 20);
            let mut got = vec![0; bytes.len()];
            let (sent, received) =
                tokio::join!(path.client.write_all(&bytes), path.server.read_exact(&mut got));
            assert!(sent.is_ok() && received.is_ok() && got == bytes);
            assert!(!client.has_worn_key());
        }
    });
}

#[test]
fn each_direction_ends_on_its_own() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        for client_first in [true, false] {
            let Path { mut client, mut server, near, far } = relay(&client, &mut far).await;
            let (first, second) =
                if client_first { (&mut client, &mut server) } else { (&mut server, &mut client) };
            send_pattern(first, 10).await;
            check_pattern(second, 10).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(!near.ended.is_finished() && !far.ended.is_finished());
            tokio::join!(send_pattern(second, 1 << 20), check_pattern(first, 1 << 20));
            assert!(matches!(near.ended.await.unwrap(), Ended::Finished));
            assert!(matches!(far.ended.await.unwrap(), Ended::Finished));
        }
    });
}

#[test]
fn a_finished_connection_closes_in_good_order_although_its_last_bytes_are_still_unread() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let Path { mut client, mut server, near, far } = relay(&client, &mut far).await;
        server.shutdown().await.unwrap();
        send_pattern(&mut client, 500_000).await;
        assert!(matches!(near.ended.await.unwrap(), Ended::Finished));
        assert!(matches!(far.ended.await.unwrap(), Ended::Finished));
        // The relay's sockets are closed by now; a reset would throw away what they have sent.
        check_pattern(&mut server, 500_000).await;
        assert_eq!(read_some(&mut client).await.unwrap(), 0);
    });
}

#[test]
fn bytes_are_counted_while_the_connection_is_open() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let Path { mut client, mut server, near, far } = relay(&client, &mut far).await;
        client.write_all(&[1; 1000]).await.unwrap();
        server.read_exact(&mut [0; 1000]).await.unwrap();
        server.write_all(&[1; 77]).await.unwrap();
        client.read_exact(&mut [0; 77]).await.unwrap();
        // Forward is from the socket into the tunnel: the far side sees it the other way round.
        assert_eq!((near.transferred(), far.transferred()), ((1000, 77), (77, 1000)));
    });
}

#[test]
fn a_reset_by_either_application_reaches_the_other_as_a_reset() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        for by_client in [true, false] {
            let Path { client, server, near, far } = relay(&client, &mut far).await;
            let (resetting, mut other, own, opposite) =
                if by_client { (client, server, near, far) } else { (server, client, far, near) };
            resetting.set_zero_linger().unwrap();
            drop(resetting);
            assert!(is_reset(read_some(&mut other).await), "by the client: {by_client}");
            assert!(matches!(own.ended.await.unwrap(), Ended::FirstReset(_)));
            let ended = opposite.ended.await.unwrap();
            assert!(matches!(ended, Ended::Tunnel(Error::Reset(Reason::CONNECT_ERROR))), "{ended:?}");
        }
    });
}

#[test]
fn a_reset_is_passed_on_although_the_other_application_reads_nothing() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let Path { mut client, mut server, near, far } = relay(&client, &mut far).await;
        // Until everything on the way is full.
        let filling = async {
            loop {
                client.write_all(&[1; 100_000]).await.unwrap();
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(1), filling).await.is_err());
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(matches!(near.ended.await.unwrap(), Ended::FirstReset(_)));
        assert!(matches!(far.ended.await.unwrap(), Ended::Tunnel(Error::Reset(Reason::CONNECT_ERROR))));
        let mut read = Ok(1);
        while matches!(read, Ok(1..)) {
            read = server.read(&mut vec![0; 1 << 20]).await;
        }
        assert!(is_reset(read));

        let (mut client, first) = socket_pair().await;
        let (_server, second) = socket_pair().await;
        let relay = plain(first, second);
        while let Ok(written) =
            tokio::time::timeout(Duration::from_millis(300), client.write_all(&[1; 100_000])).await
        {
            written.unwrap();
        }
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(matches!(relay.ended.await.unwrap(), Ended::FirstReset(_)));
    });
}

#[test]
fn a_cancelled_connection_is_reset_on_both_sides_at_once() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        for at_client in [true, false] {
            let Path { mut client, mut server, mut near, mut far } = relay(&client, &mut far).await;
            client.write_all(b"x").await.unwrap();
            server.read_exact(&mut [0]).await.unwrap();
            let cancelled = if at_client { &mut near } else { &mut far };
            cancelled.cancel.take().unwrap().send(()).unwrap();
            assert!(is_reset(read_some(&mut client).await));
            assert!(is_reset(read_some(&mut server).await));
            let (near, far) = (near.ended.await.unwrap(), far.ended.await.unwrap());
            let (own, other) = if at_client { (near, far) } else { (far, near) };
            assert!(matches!(own, Ended::Cancelled));
            assert!(matches!(other, Ended::Tunnel(Error::Reset(Reason::CANCEL))), "{other:?}");
        }
    });
}

#[test]
fn a_copy_that_is_dropped_resets_both_sides() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let (stream, _theirs) = open(&client, &mut far).await;
        let (mut app, socket) = socket_pair().await;
        drop(socket_and_tunnel(socket, stream, Rc::new(Transferred::default()), std::future::pending()));
        assert!(is_reset(read_some(&mut app).await), "also before the first poll");

        let Path { mut client, mut server, near, far } = relay(&client, &mut far).await;
        tokio::task::yield_now().await;
        near.ended.abort();
        assert!(is_reset(read_some(&mut client).await));
        assert!(is_reset(read_some(&mut server).await));
        assert!(matches!(far.ended.await.unwrap(), Ended::Tunnel(Error::Reset(Reason::CANCEL))));
    });
}

#[test]
fn an_abort_is_seen_although_the_peers_direction_has_ended() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let Path { mut client, mut server, near, mut far } = relay(&client, &mut far).await;
        server.shutdown().await.unwrap();
        assert_eq!(read_some(&mut client).await.unwrap(), 0);
        far.cancel.take().unwrap().send(()).unwrap();
        let ended = near.ended.await.unwrap();
        assert!(matches!(ended, Ended::Tunnel(Error::Reset(_))), "{ended:?}");
        // A write into the reset socket fails; its own read side has ended already.
        let mut write = Ok(());
        while write.is_ok() {
            write = client.write_all(b"x").await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn a_broken_tunnel_resets_the_application() {
    worker(async {
        let (client, mut far, driver) = tunnel().await;
        let mut path = relay(&client, &mut far).await;
        driver.abort();
        assert!(is_reset(read_some(&mut path.client).await));
        let ended = path.near.ended.await.unwrap();
        assert!(matches!(ended, Ended::Tunnel(_)), "{ended:?}");
    });
}

#[test]
fn a_slow_reader_stops_the_sender_within_the_windows_and_starves_nobody() {
    worker(async {
        let (client, mut far_connection) = tls_tunnel().await;
        let mut slow = relay(&client, &mut far_connection).await;
        let total = 64 << 20;
        let sending = tokio::task::spawn_local(async move {
            send_pattern(&mut slow.client, total).await;
            slow.client
        });
        // Until nothing moves any more.
        let mut before = u64::MAX;
        while slow.near.transferred().0 != before {
            before = slow.near.transferred().0;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let far_socket_buffers = slow.far.transferred().1;
        let in_our_hands = before - far_socket_buffers;
        let bound = (4 << 20) + (400 << 10) + (512 << 10);
        assert!(!sending.is_finished());
        assert!(in_our_hands <= bound, "{in_our_hands} bytes are held for a reader that does not read");

        // Another stream of the same connection is not held up by it.
        let mut other = relay(&client, &mut far_connection).await;
        tokio::join!(send_pattern(&mut other.client, 8 << 20), check_pattern(&mut other.server, 8 << 20));

        check_pattern(&mut slow.server, total).await;
        sending.await.unwrap();
    });
}

#[test]
fn idle_streams_keep_no_share_of_the_connections_window() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let mut idle = Vec::new();
        for _ in 0..90 {
            let mut path = relay(&client, &mut far).await;
            path.client.write_all(b"x").await.unwrap();
            path.server.read_exact(&mut [0]).await.unwrap();
            idle.push(path);
        }
        let Path { mut client, mut server, .. } = relay(&client, &mut far).await;
        tokio::join!(send_pattern(&mut client, 20 << 20), check_pattern(&mut server, 20 << 20));
    });
}

#[test]
fn an_idle_connection_holds_no_buffer_and_its_task_is_small() {
    worker(async {
        let (client, mut far, _) = tunnel().await;
        let mut paths = Vec::new();
        for _ in 0..20 {
            paths.push(relay(&client, &mut far).await);
        }
        for Path { client, server, .. } in &mut paths {
            client.write_all(&[1; 200_000]).await.unwrap();
            server.read_exact(&mut vec![0; 200_000]).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(crate::tls::buffers::kept() <= 4, "{} buffers for one thread", crate::tls::buffers::kept());

        let (near, _theirs) = open(&client, &mut far).await;
        let (socket, _) = socket_pair().await;
        let bytes = Rc::new(Transferred::default());
        let copying = socket_and_tunnel(socket, near, bytes, std::future::pending());
        let size = size_of_val(&copying);
        assert!(size <= 1024, "the future has {size} bytes");
    });
}

fn plain(first: TcpStream, second: TcpStream) -> Relay {
    Relay::new(async move |bytes: Rc<Transferred>, cancelled| {
        let cancel = async move {
            if cancelled.await.is_err() {
                std::future::pending().await
            }
        };
        sockets(first, second, &*bytes, cancel).await
    })
}

#[test]
fn two_sockets_are_joined_with_half_close_and_counts() {
    worker(async {
        let (mut client, first) = socket_pair().await;
        let (mut server, second) = socket_pair().await;
        let relay = plain(first, second);
        tokio::join!(send_pattern(&mut client, 20 << 20), check_pattern(&mut server, 20 << 20));
        assert!(!relay.ended.is_finished());
        tokio::join!(send_pattern(&mut server, 10 << 20), check_pattern(&mut client, 10 << 20));
        assert_eq!(relay.transferred(), (20 << 20, 10 << 20));
        assert!(matches!(relay.ended.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn two_sockets_share_a_reset_and_a_cancellation() {
    worker(async {
        for first_resets in [true, false] {
            let (client, first) = socket_pair().await;
            let (server, second) = socket_pair().await;
            let relay = plain(first, second);
            let (resetting, mut other) = if first_resets { (client, server) } else { (server, client) };
            resetting.set_zero_linger().unwrap();
            drop(resetting);
            assert!(is_reset(read_some(&mut other).await));
            let ended = relay.ended.await.unwrap();
            assert!(
                matches!(
                    (&ended, first_resets),
                    (Ended::FirstReset(_), true) | (Ended::SecondReset(_), false)
                ),
                "{ended:?}"
            );
        }
        let (mut client, first) = socket_pair().await;
        let (mut server, second) = socket_pair().await;
        let mut relay = plain(first, second);
        relay.cancel.take().unwrap().send(()).unwrap();
        assert!(is_reset(read_some(&mut client).await));
        assert!(is_reset(read_some(&mut server).await));
        assert!(matches!(relay.ended.await.unwrap(), Ended::Cancelled));
    });
}

async fn check_part(from: &mut TcpStream, begin: usize, end: usize) {
    let mut got = vec![0; end - begin];
    from.read_exact(&mut got).await.unwrap();
    assert!(got == pattern(begin as u64, got.len()), "bytes differ after {begin}");
}

/// The peer has said `total` bytes and its end, and listens no more.
async fn said_all(mut far: HboneStream, total: usize) {
    let mut sent = 0;
    while sent < total {
        let room = std::future::poll_fn(|cx| far.send.poll_room(cx, total - sent)).await.unwrap();
        far.send.send(&pattern(sent as u64, room)).unwrap();
        sent += room;
    }
    far.send.finish().unwrap();
}

/// An application behind one side of a tunnel, and the bare other side.
async fn half_relay(client: &ClientConnection, far: &mut Far) -> (TcpStream, HboneStream, JoinHandle<Ended>) {
    let (near, far) = open(client, far).await;
    let (application, socket) = socket_pair().await;
    let copying = socket_and_tunnel(socket, near, Rc::new(Transferred::default()), std::future::pending());
    (application, far, tokio::task::spawn_local(copying))
}

#[test]
fn what_a_peer_has_said_arrives_whole_though_it_listens_no_more() {
    worker(async {
        let (client, mut far) = tls_tunnel().await;
        let (mut application, far, copying) = half_relay(&client, &mut far).await;
        let total = 6 << 20;
        let saying = tokio::task::spawn_local(said_all(far, total));
        check_part(&mut application, 0, total / 2).await;
        saying.await.unwrap();
        // It talks to somebody who has left, as to a server that has closed its socket.
        for part in [total / 2..total - 1, total - 1..total] {
            application.write_all(b"are you there?").await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            check_part(&mut application, part.start, part.end).await;
        }
        assert_eq!(application.read(&mut [0]).await.unwrap(), 0, "and its end");
        drop(application);
        assert!(matches!(copying.await.unwrap(), Ended::Finished));
    });
}

#[test]
fn what_a_peer_has_said_arrives_whole_though_its_tunnel_is_closed() {
    worker(async {
        let (client, mut far_connection) = tls_tunnel().await;
        let (mut application, far, copying) = half_relay(&client, &mut far_connection).await;
        let total = 6 << 20;
        let saying = tokio::task::spawn_local(said_all(far, total));
        check_part(&mut application, 0, total / 2).await;
        saying.await.unwrap();
        far_connection.drain.send(()).unwrap();
        far_connection.ended.await.unwrap().unwrap();
        check_part(&mut application, total / 2, total).await;
        assert_eq!(application.read(&mut [0]).await.unwrap(), 0, "and its end");
        assert!(matches!(copying.await.unwrap(), Ended::Finished));
    });
}
