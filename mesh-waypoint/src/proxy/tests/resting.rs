//! Connections of HTTP/1 whose client is quiet.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::bed::*;

const GET: &str = "GET / HTTP/1.1\r\nhost: web.shop.svc.cluster.local\r\n\r\n";

async fn answer(stream: &mut (impl tokio::io::AsyncRead + Unpin), body: &str) {
    let mut read = Vec::new();
    while !read.ends_with(format!("\r\n\r\n{body}").as_bytes()) {
        let n = stream.read_buf(&mut read).await.unwrap();
        assert!(n > 0, "the connection has ended after {:?}", String::from_utf8_lossy(&read));
    }
    assert!(read.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&read));
}

async fn resting(waypoint: &Waypoint, count: usize) {
    while waypoint.shared.resting() != count {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_quiet_connection_rests_and_goes_on_with_whatever_its_client_says_next() {
    run(async {
        let app = app("web", |request| {
            let length = request.body().len();
            std::future::ready(text(200, format!("{} {length}", request.method())))
        });
        let waypoint = Bed::new(&[app.await]).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        stream.write_all(GET.as_bytes()).await.unwrap();
        answer(&mut stream, "GET 0").await;
        resting(&waypoint, 1).await;
        // A head in two pieces, between which it does not rest again.
        let (first, second) = GET.split_at(9);
        stream.write_all(first.as_bytes()).await.unwrap();
        resting(&waypoint, 0).await;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(waypoint.shared.resting(), 0);
        stream.write_all(second.as_bytes()).await.unwrap();
        answer(&mut stream, "GET 0").await;
        // A head that has begun before the connection rests is the next request's.
        stream.write_all(first.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        stream.write_all(second.as_bytes()).await.unwrap();
        answer(&mut stream, "GET 0").await;
        resting(&waypoint, 1).await;
        let post = GET.replace("GET", "POST").replace("\r\n\r\n", "\r\ncontent-length: 5\r\n\r\nhello");
        stream.write_all(post.as_bytes()).await.unwrap();
        answer(&mut stream, "POST 5").await;
        resting(&waypoint, 1).await;
        waypoint.expect_metric("istio_requests_total", &["response_code=\"200\""], 4.0).await;
        // A drain does not wait for it.
        waypoint.shared.drain.cancel();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty());
    });
}

#[test]
fn a_connection_with_something_owed_to_it_does_not_rest() {
    const LARGE: usize = 24 << 20;
    run(async {
        let app = app("web", |request| async move {
            if request.uri().path() == "/slow" {
                tokio::time::sleep(Duration::from_millis(3500)).await;
                return text(200, "slow");
            }
            text(200, vec![b'x'; LARGE])
        });
        let waypoint = Bed::new(&[app.await]).start().await;
        let never = async {
            let end = Instant::now() + Duration::from_millis(3200);
            while Instant::now() < end {
                assert_eq!(waypoint.shared.resting(), 0);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let mut slow = waypoint.connect(VIP).await.unwrap();
        slow.write_all(GET.replace("/ ", "/slow ").as_bytes()).await.unwrap();
        let mut stuck = waypoint.connect(VIP).await.unwrap();
        stuck.write_all(GET.as_bytes()).await.unwrap();
        never.await;
        answer(&mut slow, "slow").await;
        let mut read = 0;
        let mut room = vec![0; 64 << 10];
        while read < LARGE {
            let n = stuck.read(&mut room).await.unwrap();
            assert!(n > 0, "it ended after {read} bytes");
            read += n;
        }
        resting(&waypoint, 2).await;
    });
}
