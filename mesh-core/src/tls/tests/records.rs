//! Our record layer against rustls' own.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::*;
use crate::tls::{Channel, record};

type Ours = Channel<DuplexStream>;
type Theirs = TlsStream<DuplexStream>;

/// Our end and rustls' end of a connection; the pipe between them holds little, so that records are cut anywhere.
async fn pair(we_connect: bool) -> (Ours, Theirs) {
    let ca = TestCa::new();
    let server = ca.issue(&pay()).server_config();
    let client = ca.issue(&cart()).client_config(&[pay()]).unwrap();
    let (a, b) = tokio::io::duplex(3000);
    if we_connect {
        let accepting = async {
            let mut theirs = TlsAcceptor::from(server).accept(b).await.unwrap();
            theirs.flush().await.unwrap();
            theirs
        };
        // The last of our handshake leaves with the first bytes.
        let connecting = async {
            let mut ours = connect(client, a).await.unwrap().0;
            ours.flush().await.unwrap();
            ours
        };
        let (ours, theirs) = tokio::join!(connecting, accepting);
        (ours, theirs.into())
    } else {
        let name = rustls_pki_types::ServerName::try_from("pay.example").unwrap();
        let (ours, theirs) = tokio::join!(accept(server, a), TlsConnector::from(client).connect(name, b));
        (ours.unwrap().0, theirs.unwrap().into())
    }
}

fn text(n: usize) -> Vec<u8> {
    (0..n).map(|i| u8::try_from(i.wrapping_mul(31) % 251).unwrap()).collect()
}

/// Both send `bytes` and both get the other's.
async fn exchange(ours: &mut Ours, theirs: &mut Theirs, bytes: &[u8]) {
    let (mut our_read, mut our_write) = tokio::io::split(ours);
    let (mut their_read, mut their_write) = tokio::io::split(theirs);
    let (mut to_us, mut to_them) = (vec![0; bytes.len()], vec![0; bytes.len()]);
    tokio::join!(
        async {
            our_write.write_all(bytes).await.unwrap();
            our_write.flush().await.unwrap();
        },
        async {
            their_write.write_all(bytes).await.unwrap();
            their_write.flush().await.unwrap();
        },
        async { our_read.read_exact(&mut to_us).await.map(|_| ()).unwrap() },
        async { their_read.read_exact(&mut to_them).await.map(|_| ()).unwrap() },
    );
    assert!(to_us == bytes && to_them == bytes);
}

#[tokio::test]
async fn bytes_pass_both_ways_whoever_connects() {
    for we_connect in [true, false] {
        let (mut ours, mut theirs) = pair(we_connect).await;
        for n in [1, 100, 16_384, 16_385, 1_000_003] {
            exchange(&mut ours, &mut theirs, &text(n)).await;
        }
    }
}

#[tokio::test]
async fn the_peer_may_change_its_key_and_ask_for_ours() {
    for we_connect in [true, false] {
        let (mut ours, mut theirs) = pair(we_connect).await;
        for _ in 0..3 {
            match &mut theirs {
                TlsStream::Client(stream) => stream.get_mut().1.refresh_traffic_keys().unwrap(),
                TlsStream::Server(stream) => stream.get_mut().1.refresh_traffic_keys().unwrap(),
            }
            exchange(&mut ours, &mut theirs, &text(5000)).await;
            let next = ours.receiving.next_sealer(false).unwrap().expect("the peer asked for a new key");
            ours.sending.replace_sealer(next);
            exchange(&mut ours, &mut theirs, &text(5000)).await;
        }
    }
}

#[tokio::test]
async fn a_key_that_has_sealed_enough_is_replaced() {
    let (mut ours, mut theirs) = pair(true).await;
    exchange(&mut ours, &mut theirs, b"before").await;
    assert!(!ours.sending.is_worn());
    let next = ours.receiving.next_sealer(true).unwrap().expect("a key");
    ours.sending.replace_sealer(next);
    exchange(&mut ours, &mut theirs, &text(100_000)).await;
    ours.sending.wear();
    assert!(ours.sending.is_worn());
}

#[tokio::test]
async fn a_clean_end_is_told_from_a_cut() {
    let (mut ours, mut theirs) = pair(true).await;
    theirs.write_all(b"bye").await.unwrap();
    theirs.shutdown().await.unwrap();
    let mut all = Vec::new();
    ours.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"bye");
    ours.shutdown().await.unwrap();
    assert_eq!(theirs.read(&mut [0; 8]).await.unwrap(), 0, "close_notify reaches the peer");

    let (mut ours, mut theirs) = pair(false).await;
    theirs.write_all(b"by").await.unwrap();
    theirs.flush().await.unwrap();
    drop(theirs);
    let error = ours.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

/// A transport in the middle that changes one byte of what passes to us.
async fn tampered(change: impl Fn(&mut Vec<u8>)) -> io::Error {
    let ca = TestCa::new();
    let server = ca.issue(&pay()).server_config();
    let client = ca.issue(&cart()).client_config(&[pay()]).unwrap();
    let (a, a_far) = tokio::io::duplex(1 << 20);
    let (b, b_far) = tokio::io::duplex(1 << 20);
    let name = rustls_pki_types::ServerName::try_from("pay.example").unwrap();
    let (mut from_them, mut to_us) = (b_far, a_far);
    let relay = async {
        let done = tokio::time::timeout(
            std::time::Duration::from_millis(200),
            tokio::io::copy_bidirectional(&mut from_them, &mut to_us),
        );
        assert!(done.await.is_err(), "the handshake is over and both are quiet");
        (from_them, to_us)
    };
    let (ours, theirs, (mut from_them, mut to_us)) =
        tokio::join!(accept(server, a), TlsConnector::from(client).connect(name, b), relay);
    let (mut ours, mut theirs) = (ours.unwrap().0, theirs.unwrap());
    theirs.write_all(b"a message").await.unwrap();
    theirs.flush().await.unwrap();
    let mut record = vec![0; record::HEADER + 9 + record::TRAILER];
    from_them.read_exact(&mut record).await.unwrap();
    change(&mut record);
    to_us.write_all(&record).await.unwrap();
    ours.read_to_end(&mut Vec::new()).await.expect_err("it was accepted")
}

#[tokio::test]
async fn a_record_that_was_changed_on_the_way_ends_the_connection() {
    let inner = |e: &io::Error| e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()).cloned();
    for at in [record::HEADER, record::HEADER + 8, record::HEADER + 9 + record::TRAILER - 1] {
        let error = tampered(|record| record[at] ^= 1).await;
        assert_eq!(inner(&error), Some(rustls::Error::DecryptError), "byte {at}");
    }
    let error = tampered(|record| record[0] = 22).await;
    assert!(matches!(inner(&error), Some(rustls::Error::InvalidMessage(_))), "{error}");
    let error = tampered(|record| record[3] = 0xff).await;
    assert_eq!(inner(&error), Some(rustls::Error::PeerSentOversizedRecord));
    let error = tampered(|record| {
        let copy = record.clone();
        record.splice(..0, copy);
    })
    .await;
    assert_eq!(inner(&error), Some(rustls::Error::DecryptError), "a record that comes twice");
}
