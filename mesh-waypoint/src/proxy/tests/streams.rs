//! What is no HTTP, what switches protocols, and the end.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::workload::AppProtocol;
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::bed::*;

/// An application that greets first and then echoes.
async fn greeter() -> App {
    raw("greeter", |mut stream| async move {
        stream.write_all(b"220 hello\r\n").await.unwrap();
        let (mut reading, mut writing) = stream.split();
        let _ = tokio::io::copy(&mut reading, &mut writing).await;
    })
    .await
}

#[test]
fn a_declared_tcp_stream_is_copied_both_ways_to_its_end() {
    run(async {
        let greeter = App { tunnel: true, ..greeter().await };
        let waypoint = Bed::new(&[greeter]).speaks(AppProtocol::Tcp).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        stream.write_all(b"EHLO\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "220 hello\r\nEHLO\r\n");
        let labels = ["reporter=\"waypoint\"", "destination_workload=\"greeter\""];
        waypoint.expect_metric("istio_tcp_connections_closed_total", &labels, 1.0).await;
        waypoint.expect_metric("istio_tcp_sent_bytes_total", &labels, 17.0).await;
        waypoint.expect_metric("istio_tcp_received_bytes_total", &labels, 6.0).await;
    });
}

#[test]
fn an_undeclared_stream_is_http_or_not_by_who_speaks_first_and_how() {
    run(async {
        // The server speaks first: nobody waits for the client.
        let waypoint = Bed::new(&[greeter().await]).speaks(AppProtocol::Unknown).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        let mut hello = [0; 11];
        tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut hello)).await.unwrap().unwrap();
        assert_eq!(&hello, b"220 hello\r\n");
        // The client speaks first, and no HTTP.
        let mut stream = waypoint.connect(VIP).await.unwrap();
        stream.write_all(b"\x00\x01").await.unwrap();
        stream.read_exact(&mut hello).await.unwrap();
        let mut echo = [0; 2];
        stream.read_exact(&mut echo).await.unwrap();
        assert_eq!(echo, [0, 1]);
        // HTTP, however late and in however small pieces.
        let waypoint = Bed::new(&[named("http").await]).speaks(AppProtocol::Unknown).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        for piece in ["GE", "T / HT", "TP/1.1\r\nhost: a\r\n\r\n"] {
            stream.write_all(piece.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        waypoint.expect_metric("istio_requests_total", &["response_code=\"200\""], 1.0).await;
    });
}

#[test]
fn an_application_with_tls_is_reached_by_it_if_it_proves_its_name() {
    run(async {
        let issued = rcgen::generate_simple_self_signed(vec![WEB.to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(issued.signing_key.serialize_der().into());
        let config = rustls::ServerConfig::builder_with_provider(mesh_core::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![issued.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let app = raw("app", move |stream| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut head = [0; 4096];
                let _ = stream.read(&mut head).await;
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret").await.unwrap();
            }
        });
        let app = app.await;
        let simple = |names: &[&str]| l7::Destination {
            policy: Some(l7::TrafficPolicy {
                tls: Some(l7::ClientTls {
                    mode: l7::client_tls::Mode::Simple as i32,
                    roots: issued.cert.pem(),
                    subject_alt_names: names.iter().map(|&name| name.to_owned()).collect(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let with = |names| Bed::new(std::slice::from_ref(&app)).destination(simple(names));
        assert_eq!(said(&with(&[]).start().await.get("/").await), (200, "secret"));
        assert_eq!(said(&with(&["other", WEB]).start().await.get("/").await), (200, "secret"));
        let refused = with(&["other"]).start().await;
        let answer = refused.get("/").await;
        assert!(answer.status() == 503 && said(&answer).1.contains("TLS error"), "{:?}", said(&answer));
    });
}

#[test]
fn both_sides_may_switch_to_another_protocol() {
    run(async {
        let app = raw("app", |mut stream| async move {
            let mut head = vec![0; 4096];
            let n = stream.read(&mut head).await.unwrap();
            let head = String::from_utf8_lossy(&head[..n]).to_lowercase();
            assert!(head.contains("upgrade: websocket") && head.contains("connection: upgrade"), "{head}");
            let answer =
                "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nfirst";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut reading, mut writing) = stream.split();
            let _ = tokio::io::copy(&mut reading, &mut writing).await;
        });
        let waypoint = Bed::new(&[app.await]).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        let request =
            "GET /chat HTTP/1.1\r\nhost: web.shop\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut read = Vec::new();
        while !read.ends_with(b"first") {
            let mut more = [0; 1024];
            let n = stream.read(&mut more).await.unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&more[..n]);
        }
        let head = String::from_utf8_lossy(&read).to_lowercase();
        assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: websocket"), "{head}");
        stream.write_all(b"ping").await.unwrap();
        let mut pong = [0; 4];
        stream.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"ping");
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        waypoint.expect_metric("istio_requests_total", &["response_code=\"101\""], 1.0).await;
    });
}

#[test]
fn a_stream_of_http_2_may_switch_to_websocket_beside_others() {
    run(async {
        let app = raw("app", |mut stream| async move {
            let mut head = vec![0; 4096];
            let n = stream.read(&mut head).await.unwrap();
            let head = String::from_utf8_lossy(&head[..n]).to_lowercase();
            assert!(head.starts_with("get /chat http/1.1"), "{head}");
            assert!(head.contains("upgrade: websocket") && head.contains("sec-websocket-key: "), "{head}");
            let answer = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
                          sec-websocket-accept: x\r\nsec-websocket-protocol: chat\r\n\r\nfirst";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut reading, mut writing) = stream.split();
            let _ = tokio::io::copy(&mut reading, &mut writing).await;
        });
        let waypoint = Bed::new(&[app.await]).start().await;
        let stream = waypoint.connect(VIP).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::task::spawn_local(connection);
        let mut client = client.ready().await.unwrap();
        // Its settings say that it can.
        while !client.is_extended_connect_protocol_enabled() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for _ in 0..2 {
            let mut request = http::Request::connect("http://web.shop/chat");
            request = request.extension(h2::ext::Protocol::from_static("websocket"));
            request = request.header("sec-websocket-version", "13");
            let (answer, mut sending) = client.send_request(request.body(()).unwrap(), false).unwrap();
            let answer = answer.await.unwrap();
            assert_eq!(answer.status().as_u16(), 200);
            assert_eq!(answer.headers()["sec-websocket-protocol"], "chat");
            assert!(!answer.headers().contains_key("upgrade"), "{answer:?}");
            let mut receiving = answer.into_body();
            assert_eq!(receiving.data().await.unwrap().unwrap(), "first");
            sending.send_data("ping".into(), true).unwrap();
            assert_eq!(receiving.data().await.unwrap().unwrap(), "ping");
            assert!(receiving.data().await.is_none_or(|end| end.unwrap().is_empty()));
        }
        waypoint.expect_metric("istio_requests_total", &["response_code=\"101\""], 2.0).await;
    });
}

#[test]
fn an_answer_that_its_client_reads_slowly_arrives_whole_although_the_connection_ends_with_it() {
    run(async {
        let large = app("large", |_| std::future::ready(text(200, vec![b'x'; 3 << 20])));
        let waypoint = Bed::new(&[large.await]).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        let request = "GET / HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        waypoint.expect_metric("istio_requests_total", &["response_code=\"200\""], 1.0).await;
        let mut read = Vec::new();
        stream.read_to_end(&mut read).await.unwrap();
        assert!(read.len() > 3 << 20, "{} bytes", read.len());
    });
}

#[test]
fn a_draining_waypoint_finishes_what_it_has_and_takes_nothing_new() {
    run(async {
        let slow = app("slow", |_| async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            text(200, "done")
        });
        let waypoint = Bed::new(&[slow.await]).start().await;
        let tunnel = waypoint.tunnel("client").await;
        let mut connection = waypoint.http1().await;
        let asked = connection.ask(get("/"));
        let drain = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            waypoint.shared.drain.cancel();
        };
        let (answer, ()) = futures_util::join!(asked, drain);
        assert_eq!(said(&answer), (200, "done"));
        let authority: mesh_core::hbone::Authority = VIP.parse().unwrap();
        assert!(tunnel.open(&mesh_core::hbone::ConnectRequest::to(authority)).await.is_err());
        while waypoint.shared.open() + waypoint.shared.tunnels() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}
