//! Fetching of keys, with servers on loopback.

use std::sync::atomic::{AtomicUsize, Ordering};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Far more than anything here takes.
const DEADLINE: Duration = Duration::from_secs(20);
const PATIENT: Duration = Duration::from_secs(10);

/// Fetches only when something happens.
const CALM: Timing = Timing {
    refresh: Duration::from_secs(3600),
    least: Duration::from_secs(3600),
    first_retry: Duration::from_secs(3600),
    longest_retry: Duration::from_secs(3600),
};
/// Fetches again at once.
const EAGER: Timing = Timing { least: Duration::ZERO, ..CALM };

fn document(kid: &str) -> String {
    let key = Ed25519KeyPair::generate().unwrap();
    let x = URL_SAFE_NO_PAD.encode(key.public_key().as_ref());
    format!(r#"{{"keys": [{{"kty": "OKP", "crv": "Ed25519", "kid": "{kid}", "x": "{x}"}}]}}"#)
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Whether a key with this id is there.
fn has(keys: Option<&KeySet>, kid: &str) -> bool {
    keys.is_some_and(|keys| {
        keys.verify(Algorithm::EdDsa, Some(kid), b"", &[0; 64]) == Err(SignatureError::Mismatch)
    })
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, answer: &str) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut buffer = [0; 1024];
        match stream.read(&mut buffer).await {
            Ok(read) if read > 0 => request.extend_from_slice(&buffer[..read]),
            _ => break,
        }
    }
    // A client that has had enough is no failure of the server.
    drop(stream.write_all(answer.as_bytes()).await);
    drop(stream.shutdown().await);
    String::from_utf8(request).unwrap()
}

/// Answers the n-th request with the n-th answer, and then with the last one; `None` never answers. Returns the address
/// and the number of requests so far.
async fn server(answers: Vec<Option<String>>) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let i = counter.fetch_add(1, Ordering::SeqCst);
            match answers.get(i).or(answers.last()).unwrap() {
                Some(answer) => drop(serve(stream, answer).await),
                None => kept.push(stream),
            }
        }
    });
    (address, count)
}

fn store(timing: Timing) -> KeyStore {
    let (store, fetcher) = KeyStore::with_timing(Roots::System, timing);
    tokio::spawn(fetcher.run());
    store
}

async fn in_time<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("within the deadline")
}

/// The state after some fetch for which this holds.
async fn eventually(source: &KeySource, holds: impl FnMut(&Attempts) -> bool) {
    drop(in_time(source.attempts.subscribe().wait_for(holds)).await.unwrap());
}

#[tokio::test]
async fn many_requests_for_the_keys_of_one_uri_are_one_fetch() {
    let (address, count) = server(vec![Some(ok(&document("a")))]).await;
    let store = store(CALM);
    let uri = format!("http://{address}/keys");
    let sources: Vec<_> = (0..100).map(|_| store.source(&uri, PATIENT)).collect();
    let waiting = sources.iter().map(|source| async { has(source.keys().await.as_deref(), "a") });
    let found = in_time(futures_util::future::join_all(waiting)).await;
    assert!(found.into_iter().all(|found| found));
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert_eq!(sources[0].error(), None);
}

#[tokio::test]
async fn a_key_id_that_is_not_known_has_keys_fetched_again_but_not_too_often() {
    let answers = || vec![Some(ok(&document("a"))), Some(ok(&document("b")))];
    let (address, count) = server(answers()).await;
    let source = store(EAGER).source(&format!("http://{address}/"), PATIENT);
    assert!(has(in_time(source.keys()).await.as_deref(), "a"));
    in_time(source.refresh()).await;
    assert!(has(in_time(source.keys()).await.as_deref(), "b"));
    assert_eq!(count.load(Ordering::SeqCst), 2);

    let (address, count) = server(answers()).await;
    let source = store(CALM).source(&format!("http://{address}/"), PATIENT);
    in_time(source.keys()).await;
    for _ in 0..100 {
        in_time(source.refresh()).await;
    }
    assert!(has(in_time(source.keys()).await.as_deref(), "a"));
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn keys_are_fetched_again_after_a_while_and_the_last_good_ones_stay() {
    let timing = Timing {
        refresh: Duration::from_millis(5),
        first_retry: Duration::from_millis(5),
        longest_retry: Duration::from_millis(20),
        ..CALM
    };
    let (a, b) = (ok(&document("a")), ok(&document("b")));
    let broken = ["HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n".to_owned(), ok("{"), ok(r#"{"keys": []}"#)];
    let answers = [a].into_iter().chain(broken).chain([b]).map(Some).collect();
    let (address, _) = server(answers).await;
    let source = store(timing).source(&format!("http://{address}/"), PATIENT);
    for (failures, problem) in [(1, "answered 500"), (2, "no JSON"), (3, "no public key")] {
        eventually(&source, |attempts| attempts.count > failures).await;
        let attempts = source.attempts.borrow().clone();
        // The next fetch may already have ended.
        if attempts.count == failures + 1 {
            assert!(attempts.error.is_some_and(|error| error.contains(problem)), "{problem}");
        }
        if attempts.failures > 0 {
            assert!(has(source.keys.load_full().as_deref(), "a"), "after {failures} failures");
        }
    }
    eventually(&source, |attempts| attempts.count >= 5 && attempts.failures == 0).await;
    assert!(has(in_time(source.keys()).await.as_deref(), "b"));
    assert_eq!(source.error(), None);
}

#[tokio::test]
async fn a_failed_first_fetch_is_told_at_once_and_tried_again_when_it_is_due() {
    let (address, count) =
        server(vec![Some("HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n".into()), Some(ok(&document("a")))])
            .await;
    let source = store(CALM).source(&format!("http://{address}/"), PATIENT);
    assert!(in_time(source.keys()).await.is_none());
    assert!(in_time(source.keys()).await.is_none(), "the backoff is not over");
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert!(source.error().is_some_and(|error| error.contains("404")));

    let timing = Timing { first_retry: Duration::from_millis(1), ..CALM };
    let (address, _) = server(vec![Some("nonsense\r\n\r\n".into()), Some(ok(&document("a")))]).await;
    let source = store(timing).source(&format!("http://{address}/"), PATIENT);
    eventually(&source, |attempts| attempts.count == 2).await;
    assert!(has(in_time(source.keys()).await.as_deref(), "a"));
}

#[tokio::test]
async fn a_server_that_is_silent_costs_the_timeout_once() {
    let (address, count) = server(vec![None]).await;
    let timeout = Duration::from_millis(50);
    let source = store(CALM).source(&format!("http://{address}/"), timeout);
    assert!(in_time(source.keys()).await.is_none());
    eventually(&source, |attempts| attempts.count == 1).await;
    assert!(in_time(source.keys()).await.is_none());
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert_eq!(source.error().as_deref(), Some("no answer within 50ms"));
}

#[tokio::test]
async fn a_document_that_is_too_large_is_refused() {
    let (address, _) = server(vec![Some(ok(&" ".repeat(2 * 1024 * 1024)))]).await;
    let source = store(CALM).source(&format!("http://{address}/"), PATIENT);
    assert!(in_time(source.keys()).await.is_none());
    let error = source.error().unwrap();
    assert!(error.contains("no whole document"), "{error}");
}

#[tokio::test]
async fn redirects_are_followed_a_few_times() {
    let (keys, _) = server(vec![Some(ok(&document("a")))]).await;
    let to = |target: &str| format!("HTTP/1.1 302 Found\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n");
    let (once, _) = server(vec![Some(to(&format!("http://{keys}/x")))]).await;
    let store = store(CALM);
    let source = store.source(&format!("http://{once}/"), PATIENT);
    assert!(has(in_time(source.keys()).await.as_deref(), "a"));

    let (around, count) = server(vec![Some(to("/again"))]).await;
    let source = store.source(&format!("http://{around}/"), PATIENT);
    assert!(in_time(source.keys()).await.is_none());
    assert_eq!(count.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn what_is_no_uri_is_an_error_that_names_it() {
    let store = store(CALM);
    for uri in ["nonsense", "ftp://x/keys", "/keys", "http://", "https:///keys"] {
        let source = store.source(uri, PATIENT);
        assert!(in_time(source.keys()).await.is_none());
        let error = source.error().unwrap();
        assert!(error.contains("URI"), "{uri}: {error}");
    }
}

#[tokio::test]
async fn a_source_that_nobody_holds_is_not_fetched_any_more() {
    let (address, count) = server(vec![Some(ok(&document("a")))]).await;
    let store = store(Timing { refresh: Duration::from_millis(1), ..CALM });
    let source = store.source(&format!("http://{address}/"), PATIENT);
    eventually(&source, |attempts| attempts.count >= 3).await;
    let weak = Arc::downgrade(&source);
    drop(source);
    in_time(async {
        while weak.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let after = count.load(Ordering::SeqCst);
    // A fetch that is forgotten would come every millisecond.
    let another = store.source(&format!("http://{address}/again"), PATIENT);
    in_time(another.keys()).await;
    assert!(count.load(Ordering::SeqCst) > after);
    assert_eq!(store.0.sources.lock().unwrap().len(), 1);
}

/// A server certificate for 127.0.0.1 and localhost.
fn certificate() -> (rustls_pki_types::CertificateDer<'static>, tokio_rustls::TlsAcceptor) {
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder_with_provider(mesh_core::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    (cert.der().clone(), tokio_rustls::TlsAcceptor::from(Arc::new(config)))
}

#[tokio::test]
async fn https_needs_a_certificate_of_a_root_that_was_given() {
    let (certificate, acceptor) = certificate();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(stream).await {
                let request = serve(stream, &ok(&document("a"))).await;
                assert!(request.starts_with("GET /keys?a=b HTTP/1.1\r\n"), "{request}");
                assert!(request.contains(&format!("host: 127.0.0.1:{port}\r\n")), "{request}");
            }
        }
    });
    let uri = format!("https://127.0.0.1:{port}/keys?a=b");
    let (trusting, fetcher) = KeyStore::with_timing(Roots::Given(vec![certificate]), CALM);
    tokio::spawn(fetcher.run());
    let source = trusting.source(&uri, PATIENT);
    let keys = in_time(source.keys()).await;
    assert!(has(keys.as_deref(), "a"), "{:?}", source.error());

    let (other, _) = self::certificate();
    let (distrusting, fetcher) = KeyStore::with_timing(Roots::Given(vec![other]), CALM);
    tokio::spawn(fetcher.run());
    let source = distrusting.source(&uri, PATIENT);
    assert!(in_time(source.keys()).await.is_none());
    assert!(source.error().is_some_and(|error| error.contains("certificate")), "{:?}", source.error());

    let (nobody, fetcher) = KeyStore::with_timing(Roots::Given(Vec::new()), CALM);
    tokio::spawn(fetcher.run());
    let source = nobody.source(&uri, PATIENT);
    assert!(in_time(source.keys()).await.is_none());
    assert!(source.error().is_some_and(|error| error.contains("no certificates of authorities")));
}
