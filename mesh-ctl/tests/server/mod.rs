//! A small HTTP server with fixed answers, over TCP or a unix socket, for as long as it is held.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

/// Status and body by path with query.
type Answers = Arc<Mutex<HashMap<String, (u16, String)>>>;

pub(crate) struct Server {
    /// For `--node` and `--control`.
    pub(crate) url: String,
    /// Where the unix socket is.
    pub(crate) socket: Option<PathBuf>,
    answers: Answers,
    task: JoinHandle<()>,
    _dir: Option<tempfile::TempDir>,
}

impl Server {
    /// On a port of loopback.
    pub(crate) fn tcp(answers: &[(&str, u16, String)]) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answers = table(answers);
        let shared = answers.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self { url, socket: None, answers, task, _dir: None }
    }

    /// On `admin.sock` of a directory of its own.
    pub(crate) fn unix(answers: &[(&str, u16, String)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("admin.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let answers = table(answers);
        let shared = answers.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        let url = format!("unix:{}", socket.display());
        Self { url, socket: Some(socket), answers, task, _dir: Some(dir) }
    }

    /// Changes an answer.
    pub(crate) fn set(&self, path: &str, status: u16, body: &serde_json::Value) {
        self.answers.lock().unwrap().insert(path.to_owned(), (status, body.to_string()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn table(answers: &[(&str, u16, String)]) -> Answers {
    let entry = |(path, status, body): &(&str, u16, String)| ((*path).to_owned(), (*status, body.clone()));
    Arc::new(Mutex::new(answers.iter().map(entry).collect()))
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, answers: Answers) {
    let service = service_fn(|request: Request<Incoming>| {
        let asked = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
        let found = answers.lock().unwrap().get(&asked).cloned();
        let (status, body) = found.unwrap_or_else(|| (404, format!("nothing at {asked}")));
        let response = Response::builder().status(status).body(Full::new(Bytes::from(body))).unwrap();
        async move { Ok::<_, Infallible>(response) }
    });
    // A client that hangs up early is no failure of the server.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
