//! HTTP over TCP, TLS and unix sockets. Every endpoint is asked at once; one that does not answer costs the others
//! nothing and comes back as an error that says what to do.

mod tls;

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use mesh_core::admin::http::NODE_HEADER;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::cli::Proof;
use crate::endpoint::{Endpoint, Places, Relayed};

/// What helps where nodes are asked through the control plane.
const RELAYED: &str = "ask the agent on its node, or with --node";

/// A dump of ten thousand workloads is some ten megabytes; more than this is no admin endpoint.
const MAX_BODY: usize = 256 << 20;

/// Who answers at an endpoint; decides on what is to be done when nobody does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// A node agent.
    Node,
    /// The control plane.
    Control,
    /// A waypoint or gateway.
    Waypoint,
}

/// Why an endpoint gave no usable answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AskError {
    /// Where.
    pub endpoint: String,
    /// Who should have answered.
    pub role: Role,
    /// What happened.
    pub problem: String,
    /// What to do.
    pub fix: String,
}

impl fmt::Display for AskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.role {
            Role::Node => "the node agent",
            Role::Control => "the control plane",
            Role::Waypoint => "the waypoint",
        };
        write!(f, "cannot ask {who} at {}: {}\n  fix: {}", self.endpoint, self.problem, self.fix)
    }
}

impl std::error::Error for AskError {}

/// Status and body of an answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// Body, complete.
    pub body: Bytes,
    /// Whether it is a node's agent that answered, through the control plane.
    by_node: bool,
}

impl Reply {
    /// The body as text, for people.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim().to_owned()
    }
}

/// Answers of several endpoints, in their order.
#[derive(Debug)]
pub struct Asked<T> {
    /// Those that answered.
    pub answers: Vec<(Endpoint, T)>,
    /// Those that did not.
    pub errors: Vec<AskError>,
}

/// One server and how long to wait for it.
#[derive(Debug, Clone, Copy)]
pub struct Server<'a> {
    /// Where.
    pub endpoint: &'a Endpoint,
    /// Who.
    pub role: Role,
    /// Patience for the whole exchange.
    pub timeout: Duration,
    /// How it is told who asks; only the control plane is.
    pub proof: Option<&'a Proof>,
}

impl Server<'_> {
    fn error(&self, problem: impl Into<String>, fix: impl Into<String>) -> AskError {
        AskError {
            endpoint: self.endpoint.to_string(),
            role: self.role,
            problem: problem.into(),
            fix: fix.into(),
        }
    }

    /// `GET path`.
    ///
    /// # Errors
    /// Nobody listens, it is not allowed, or the answer is late or no HTTP.
    pub async fn get(&self, path: &str) -> Result<Reply, AskError> {
        match tokio::time::timeout(self.timeout, self.exchange(path)).await {
            Ok(result) => result,
            Err(_) => {
                let waited = humantime::format_duration(self.timeout);
                Err(self.error(
                    format!("no answer within {waited}"),
                    "it may be overloaded; allow more with --timeout",
                ))
            }
        }
    }

    /// `GET path`, whose answer must be a success and JSON of that shape.
    ///
    /// # Errors
    /// As [`Self::get`]; another status, or another shape.
    pub async fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, AskError> {
        let reply = self.get(path).await?;
        self.parse(path, &reply)
    }

    /// Reads a reply as JSON of some shape.
    ///
    /// # Errors
    /// Another status than 200, or another shape.
    pub fn parse<T: DeserializeOwned>(&self, path: &str, reply: &Reply) -> Result<T, AskError> {
        let versions = "compare the versions with `meshctl version`";
        if reply.status != StatusCode::OK {
            let text: String = reply.text().chars().take(200).collect();
            return Err(self.error(format!("GET {path} was answered with {} {text}", reply.status), versions));
        }
        serde_json::from_slice(&reply.body).map_err(|e| {
            self.error(format!("GET {path} was answered with other JSON than expected: {e}"), versions)
        })
    }

    async fn exchange(&self, path: &str) -> Result<Reply, AskError> {
        match self.endpoint {
            Endpoint::Unix(file) => {
                let stream = UnixStream::connect(file).await.map_err(|e| self.no_connection(&e))?;
                self.request(stream, "localhost", path).await
            }
            Endpoint::Tcp(host, port) => {
                let address = (host.as_str(), *port);
                let stream = TcpStream::connect(address).await.map_err(|e| self.no_connection(&e))?;
                self.request(stream, host, path).await
            }
            Endpoint::Relayed(relayed) => Box::pin(self.exchange_relayed(relayed, path)).await,
            // Boxed: TLS's state is large, and every command would carry room for it.
            Endpoint::Tls(host, port) => Box::pin(self.exchange_secured(host, *port, path)).await,
        }
    }

    /// Has the control plane ask. What it says itself, in place of the node, is an error.
    async fn exchange_relayed(&self, relayed: &Relayed, path: &str) -> Result<Reply, AskError> {
        let Relayed { node, control, proof } = relayed;
        let (role, timeout) = (Role::Control, self.timeout);
        let server = Server { endpoint: control, role, timeout, proof: Some(proof) };
        let reply = server.exchange(&format!("/nodes/{node}{path}")).await?;
        if reply.by_node {
            return Ok(reply);
        }
        let text: String = reply.text().chars().take(300).collect();
        Err(self.error(format!("the control plane answered with {}: {text}", reply.status), RELAYED))
    }

    async fn exchange_secured(&self, host: &str, port: u16, path: &str) -> Result<Reply, AskError> {
        let fix = "name the mesh's roots with --root-cert and, where it wants one, a certificate with --client-cert";
        let wrong = |problem: String| self.error(problem, fix);
        let settings = tls::settings(&self.proof.cloned().unwrap_or_default()).map_err(wrong)?;
        let stream = TcpStream::connect((host, port)).await.map_err(|e| self.no_connection(&e))?;
        let stream = tls::connect(stream, host, settings).await.map_err(wrong)?;
        self.request(stream, host, path).await
    }

    async fn request(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        host: &str,
        path: &str,
    ) -> Result<Reply, AskError> {
        // Over TLS, a server that wants another certificate says so only now.
        let fix = match self.endpoint {
            Endpoint::Tls(..) => {
                "did it refuse us? where it wants a client certificate, name one with --client-cert"
            }
            _ => "is it the admin port? it must speak HTTP/1.1",
        };
        let broken = |what: &str, e: &dyn std::error::Error| {
            let cause = e.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            self.error(format!("{what}: {e}{cause}"), fix)
        };
        let mut request = Request::get(path)
            .header(header::HOST, host)
            .header(header::ACCEPT, "application/json, text/plain");
        if let Some(token) = self.token()? {
            request = request.header(header::AUTHORIZATION, token);
        }
        let request =
            request.body(Empty::<Bytes>::new()).map_err(|e| broken("cannot make the request", &e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken("no HTTP", &e))?;
        // Its errors reach the request, too.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(|e| broken("no HTTP answer", &e))?;
        let status = response.status();
        let by_node = response.headers().contains_key(NODE_HEADER);
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(|e| broken("the answer broke off", &*e))?.to_bytes();
        Ok(Reply { status, body, by_node })
    }

    /// The `Authorization` header. A token goes over TLS or stays on this machine.
    fn token(&self) -> Result<Option<HeaderValue>, AskError> {
        let Some(path) = self.proof.and_then(|proof| proof.token.as_ref()) else { return Ok(None) };
        match self.endpoint {
            Endpoint::Tcp(host, _) if !is_this_machine(host) => {
                return Err(self.error(
                    "a token is not sent in the clear to another machine",
                    "ask https://HOST:PORT, or forward the port to this machine (kubectl port-forward)",
                ));
            }
            _ => {}
        }
        let wrong = |problem: String| {
            let fix = "give a file with a token, as kubectl create token prints it";
            self.error(format!("--token {}: {problem}", path.display()), fix)
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let mut value = HeaderValue::try_from(format!("Bearer {}", text.trim()))
            .map_err(|_no_header| wrong("holds characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn no_connection(&self, error: &io::Error) -> AskError {
        let fix = match (error.kind(), self.role, self.endpoint) {
            (io::ErrorKind::PermissionDenied, ..) => "run meshctl as root: the socket belongs to root",
            (_, Role::Node, Endpoint::Unix(_)) => {
                "is the agent running (mesh-node run)? name its socket with --node unix:PATH"
            }
            (_, Role::Node, Endpoint::Tcp(..) | Endpoint::Tls(..)) => {
                "run meshctl on the node, or name the agent with --node or UM_NODE_ADMIN"
            }
            (_, Role::Node, Endpoint::Relayed(_)) => RELAYED,
            (_, Role::Waypoint, _) => {
                "name its admin port with --waypoint; in a cluster: kubectl port-forward -n NAMESPACE deploy/NAME 15000"
            }
            (_, Role::Control, _) => {
                "is the control plane running (mesh-control run)? name it with --control or UM_CONTROL"
            }
        };
        self.error(error.to_string(), fix)
    }
}

/// The nodes whose agents answer through the control plane; none where it does not pass questions on.
///
/// # Errors
/// It cannot be asked, or refuses.
pub async fn relayed(places: &Places) -> Result<Option<Vec<Endpoint>>, AskError> {
    let Places { control, proof, timeout, .. } = places;
    let (role, timeout) = (Role::Control, *timeout);
    let server = Server { endpoint: control, role, timeout, proof: Some(proof) };
    let reply = server.get("/nodes").await?;
    if reply.status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    if reply.status != StatusCode::OK {
        let text: String = reply.text().chars().take(300).collect();
        return Err(server.error(format!("it answered with {}: {text}", reply.status), RELAYED));
    }
    let nodes: Vec<String> = server.parse("/nodes", &reply)?;
    if nodes.is_empty() {
        let fix = "is an agent running? its log says why it cannot reach the control plane; with several replicas each knows \
                   the agents that are connected to it";
        return Err(server.error("no node's agent is connected to it", fix));
    }
    let endpoint =
        |node| Endpoint::Relayed(Box::new(Relayed { node, control: control.clone(), proof: proof.clone() }));
    Ok(Some(nodes.into_iter().map(endpoint).collect()))
}

/// Asks every node for the same JSON.
pub async fn nodes<T: DeserializeOwned>(endpoints: &[Endpoint], path: &str, timeout: Duration) -> Asked<T> {
    each(endpoints, Role::Node, path, timeout).await
}

/// Asks all of these for the same JSON.
pub async fn each<T: DeserializeOwned>(
    endpoints: &[Endpoint],
    role: Role,
    path: &str,
    timeout: Duration,
) -> Asked<T> {
    let results = join_all(endpoints.iter().map(|endpoint| async move {
        let server = Server { endpoint, role, timeout, proof: None };
        (endpoint.clone(), server.json(path).await)
    }));
    let mut asked = Asked { answers: Vec::new(), errors: Vec::new() };
    for (endpoint, result) in results.await {
        match result {
            Ok(answer) => asked.answers.push((endpoint, answer)),
            Err(error) => asked.errors.push(error),
        }
    }
    asked
}

fn is_this_machine(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// A value for a query string: everything but RFC 3986's unreserved characters is percent-encoded.
#[must_use]
pub fn query_value(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_not_sent_in_the_clear_to_another_machine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "abc\n").unwrap();
        let proof = Proof { token: Some(path), ..Proof::default() };
        let header = |endpoint: &str| {
            let endpoint = endpoint.parse().unwrap();
            let timeout = Duration::from_secs(1);
            Server { endpoint: &endpoint, role: Role::Control, timeout, proof: Some(&proof) }.token()
        };
        for allowed in ["http://127.0.0.1:1", "http://localhost:1", "https://istiod:1", "unix:/a"] {
            assert_eq!(header(allowed).unwrap().unwrap(), "Bearer abc");
        }
        let error = header("http://istiod:15014").unwrap_err().to_string();
        assert!(error.contains("in the clear") && error.contains("https://"), "{error}");
        std::fs::write(proof.token.as_ref().unwrap(), "a\nb").unwrap();
        assert!(header("https://istiod:1").unwrap_err().problem.contains("no token has"));
    }

    #[test]
    fn query_values_carry_any_reference() {
        assert_eq!(query_value("shop/front end-1.x~_&=%"), "shop%2Ffront%20end-1.x~_%26%3D%25");
        assert_eq!(query_value("fd00::1"), "fd00%3A%3A1");
    }
}
