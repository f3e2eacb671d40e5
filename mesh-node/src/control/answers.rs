//! Answers what the control plane asks on behalf of operators: what the admin endpoint would answer them on this node.
//!
//! Who may ask is decided there; nothing but GETs is answered, so nobody changes anything from afar.

use http::header;
use http_body_util::BodyExt as _;
use mesh_core::admin::http::{Ask, Handler};
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::node::node_service_client::NodeServiceClient;
use mesh_core::xds::proto::node::{NodeAnswer, NodeQuestion};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Request, Streaming};

use super::attempts::{Attempts, Ended};

/// Questions that are answered at once; the next is told to come again.
const AT_ONCE: usize = 8;
/// Bytes of a body in one message.
const PIECE: usize = 256 << 10;

/// Answers for as long as this agent is the node's.
pub async fn run(server: &ControlPlane, admin: Handler) {
    let mut attempts = Attempts::default();
    loop {
        let ended = stream(server, &admin).await;
        server.again.sleep(attempts.after("questions to nodes", &ended)).await;
    }
}

async fn stream(server: &ControlPlane, admin: &Handler) -> Result<(), Ended> {
    let channel = server.connect().await?;
    let (sender, mut queue) = mpsc::channel(1);
    let mut request = Request::new(futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx)));
    server.authorize(request.metadata_mut())?;
    let asked = NodeServiceClient::new(channel).answer_questions(request).await?;
    let mut questions: Streaming<NodeQuestion> = asked.into_inner();
    let mut answering = JoinSet::new();
    loop {
        let Some(question) = questions.message().await? else { return Ok(()) };
        while answering.try_join_next().is_some() {}
        let (admin, sender) = (Handler::clone(admin), sender.clone());
        let busy = answering.len() >= AT_ONCE;
        answering.spawn_local(async move { answer(question, busy, admin, sender).await });
    }
}

async fn answer(question: NodeQuestion, busy: bool, admin: Handler, out: mpsc::Sender<NodeAnswer>) {
    let NodeQuestion { id, target } = question;
    if busy {
        let body = format!("this node answers {AT_ONCE} questions already; come again\n").into();
        let content_type = "text/plain; charset=utf-8".to_owned();
        // As below: a control plane that has gone does not miss it.
        let _ = out.send(NodeAnswer { id, status: 503, content_type, body, more: false }).await;
        return;
    }
    let reply = admin(Ask::get(&target)).await;
    let status = u32::from(reply.status().as_u16());
    let content_type = reply.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default().to_owned();
    let Ok(collected) = reply.into_body().collect().await;
    let mut body = collected.to_bytes();
    loop {
        let piece = body.split_to(body.len().min(PIECE)).into();
        let more = !body.is_empty();
        let content_type = content_type.clone();
        if out.send(NodeAnswer { id, status, content_type, body: piece, more }).await.is_err() || !more {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use futures_util::FutureExt as _;
    use http::StatusCode;
    use mesh_core::admin::http::text;

    use super::*;

    async fn answers(target: &str, busy: bool) -> Vec<NodeAnswer> {
        let admin: Handler = Rc::new(|ask| {
            let body = match ask.parameter("size") {
                Some(size) => "x".repeat(size.parse().unwrap_or_default()),
                None => format!("{} {}", ask.method, ask.path),
            };
            std::future::ready(text(StatusCode::OK, body)).boxed_local()
        });
        let (sender, mut received) = mpsc::channel(16);
        answer(NodeQuestion { id: 7, target: target.to_owned() }, busy, admin, sender).await;
        let mut all = Vec::new();
        while let Some(answer) = received.recv().await {
            all.push(answer);
        }
        all
    }

    #[tokio::test]
    async fn an_answer_is_what_the_admin_endpoint_says_and_a_long_one_comes_in_pieces() {
        let short = answers("/sockets", false).await;
        assert_eq!(short.len(), 1);
        assert_eq!((short[0].id, short[0].status, short[0].more), (7, 200, false));
        assert_eq!(short[0].body, b"GET /sockets");
        assert!(short[0].content_type.starts_with("text/plain"));
        let size = 2 * PIECE + 1;
        let long = answers(&format!("/dump?size={size}"), false).await;
        assert_eq!(long.iter().map(|piece| piece.body.len()).collect::<Vec<_>>(), [PIECE, PIECE, 1]);
        assert_eq!(long.iter().map(|piece| piece.more).collect::<Vec<_>>(), [true, true, false]);
        let nothing = answers("/dump?size=0", false).await;
        assert!(nothing.len() == 1 && nothing[0].body.is_empty() && !nothing[0].more);
    }

    #[tokio::test]
    async fn a_node_that_answers_enough_already_says_so() {
        let told = answers("/sockets", true).await;
        assert_eq!((told.len(), told[0].status), (1, 503));
        assert!(String::from_utf8_lossy(&told[0].body).contains("come again"));
    }
}
