//! Copies of requests, whose answers nobody waits for.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderValue;
use http_body_util::BodyExt as _;

use super::body::{Replay, RequestBody};
use super::http::Downstream;
use super::message::Message;
use super::spoken::Spoken;
use super::tries::{self, Speak};
use crate::config::Snapshot;
use crate::routing::{Mirror, Rule, WeightedBackend, shadow_authority};

/// A copy may take this long unless its rule says how long requests may take.
const LONGEST: Duration = Duration::from_secs(15);

/// The copies that a request gets, by chance.
pub(super) fn of<'a>(
    rule: &'a Rule,
    backend: Option<&'a WeightedBackend>,
) -> impl Iterator<Item = &'a Mirror> {
    let further = backend.into_iter().flat_map(|backend| &backend.mirrors);
    rule.mirrors.iter().chain(further).filter(|mirror| mirror.share.takes(fastrand::u64(..)))
}

/// Sends one copy.
pub(super) fn send(
    downstream: &Rc<Downstream>,
    snapshot: &Arc<Snapshot>,
    mirror: &Mirror,
    message: &Message,
    body: Option<&Replay>,
    timeout: Option<Duration>,
) {
    let body = body.map_or_else(RequestBody::empty, Replay::follow);
    let mut shadow = message.outgoing(false, 1, body);
    let authority = shadow_authority(message.authority.to_str().unwrap_or_default());
    let Ok(authority) = HeaderValue::from_str(&authority) else { return };
    let (downstream, snapshot) = (Rc::clone(downstream), Arc::clone(snapshot));
    let spoken = Spoken::new(downstream.http2, &message.head.headers);
    let backend = mirror.backend.clone();
    let host = backend.hostname.clone();
    drop(tokio::task::spawn_local(async move {
        let make = |http2| {
            super::message::readdress(&mut shadow, &authority, http2);
            shadow
        };
        let copied = async {
            let (local, addressed) = (&downstream.worker, downstream.addressed.port());
            let speak = Speak::AsDeclared(spoken);
            let sent = tries::once(local, &snapshot, &backend, addressed, speak, make).await;
            let (response, lease) = sent.map_err(|refused| refused.text())?;
            let mut body = response.into_body();
            while let Some(frame) = body.frame().await {
                frame.map_err(|error| error.to_string())?;
            }
            lease.give_back();
            Ok::<_, String>(())
        };
        match tokio::time::timeout(timeout.unwrap_or(LONGEST), copied).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%host, %error, "a copy of a request was not answered"),
            Err(_) => tracing::debug!(%host, "a copy of a request was not answered in time"),
        }
    }));
}
