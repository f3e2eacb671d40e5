//! Validation before objects are stored (`POST /validate`, admission.k8s.io/v1): the same reading that the source does, so
//! that what would be refused later is refused with the same words at once.
//!
//! Only objects that the mesh would use are judged: a Gateway of another controller's class, or a route that has no service
//! as its parent, is none of our business. What has no effect is allowed with a warning.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use mesh_core::admin::slots::{HEAD_TIMEOUT, Slots};
use serde::Deserialize;
use serde_json::{Value as Answer, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use super::MANAGER;
use crate::ca::store::CaStore;
use crate::convert::{Captured, Mesh, convert};
use crate::model::read::read;
use crate::model::{GATEWAY_CLASSES, Objects, WAYPOINT_CLASSES};
use crate::tree::{Json, Node, Value};

/// An object is at most a little over a mebibyte; the review holds two of them.
const LARGEST: usize = 8 << 20;
/// A TLS handshake takes no longer.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Name of our entry in the ValidatingWebhookConfiguration.
const WEBHOOK: &str = "validation.undermesh.io";
/// The configuration is looked at this often.
const PERIOD: Duration = Duration::from_secs(15);
/// Longest warning that the API server passes on whole.
const LONGEST_WARNING: usize = 250;

#[derive(Deserialize)]
struct Review {
    request: AdmissionRequest,
}

#[derive(Deserialize)]
struct AdmissionRequest {
    uid: String,
    object: Option<Json>,
}

/// The answer to a review: allowed unless the object would not be taken.
///
/// # Errors
/// The body is no review.
pub fn validate(body: &[u8], mesh: &Mesh) -> Result<Answer, serde_json::Error> {
    let Review { request } = serde_json::from_slice(body)?;
    let judged = request.object.as_ref().map(|Json(object)| object).filter(|object| concerns_us(object));
    let (refusal, warnings) = judged.map_or_else(Default::default, |object| judge(object, mesh));
    let mut response = json!({ "uid": request.uid, "allowed": refusal.is_none() });
    if let Some(message) = refusal {
        response["status"] = json!({ "code": 422, "reason": "Invalid", "message": message });
    }
    if !warnings.is_empty() {
        response["warnings"] = json!(warnings);
    }
    Ok(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
}

/// Why an object is refused, if it is, and what to warn of.
fn judge(object: &Node, mesh: &Mesh) -> (Option<String>, Vec<String>) {
    let found = read(object, &mesh.root_namespace);
    if found.object.is_none() {
        // Kinds that are not read are not judged.
        return (None, Vec::new());
    }
    match found.result {
        Err(errors) => {
            let all: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect();
            (Some(all.join("; ")), Vec::new())
        }
        Ok(object) => {
            let mut alone = Objects::default();
            alone.insert(object);
            // Of an object without the others only what it says itself can be judged.
            let conditions = convert(&alone, mesh, &Captured::new()).conditions;
            let without_effect = conditions.into_iter().filter(|c| c.reason == "UnsupportedValue");
            (None, without_effect.map(|c| short(c.message)).collect())
        }
    }
}

fn short(mut text: String) -> String {
    if text.len() > LONGEST_WARNING {
        let end = (0..=LONGEST_WARNING).rev().find(|i| text.is_char_boundary(*i)).unwrap_or_default();
        text.truncate(end);
    }
    text
}

/// Whether an object is one that the mesh would use.
fn concerns_us(object: &Node) -> bool {
    let Some((group, _)) = object.text("apiVersion").and_then(|v| v.split_once('/')) else { return true };
    if group != "gateway.networking.k8s.io" {
        return true;
    }
    let spec = object.get("spec");
    match object.text("kind") {
        Some("Gateway") => spec.and_then(|s| s.text("gatewayClassName")).is_some_and(|class| {
            WAYPOINT_CLASSES.iter().chain(GATEWAY_CLASSES).any(|(ours, _)| *ours == class)
        }),
        Some(kind) if kind.ends_with("Route") => {
            let parents = spec.and_then(|s| s.get("parentRefs")).map(|p| &p.value);
            let Some(Value::List(parents)) = parents else { return false };
            parents.iter().any(|p| matches!(p.text("kind"), Some("Service" | "ServiceEntry")))
        }
        _ => true,
    }
}

/// Answers on a listener.
#[derive(Debug, Clone)]
pub struct Webhook {
    /// Mesh defaults; the root namespace has a meaning to policies.
    pub mesh: Mesh,
    /// The listener's certificate and key, renewed by their owner.
    pub tls: Arc<ArcSwap<rustls::ServerConfig>>,
}

impl Webhook {
    /// Answers until `stop` says so. Connections are kept: an API server uses one for many reviews.
    pub async fn serve(self, listener: TcpListener, mut stop: watch::Receiver<bool>) {
        let slots = Slots::default();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stop.wait_for(|s| *s) => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "webhook listener");
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(slot) = slots.take(Some(peer.ip())) else {
                debug!(%peer, "webhook connection closed: too many are open");
                continue;
            };
            let webhook = self.clone();
            tokio::spawn(async move {
                let _slot = slot;
                webhook.connection(stream, peer).await;
            });
        }
    }

    async fn connection(self, stream: tokio::net::TcpStream, peer: SocketAddr) {
        let acceptor = TlsAcceptor::from(self.tls.load_full());
        let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return debug!(%peer, %error, "webhook handshake"),
            Err(_) => return debug!(%peer, "webhook handshake takes too long"),
        };
        let service = service_fn(move |request| {
            let mesh = self.mesh.clone();
            async move { Ok::<_, Infallible>(answer(request, &mesh).await) }
        });
        let mut http = auto::Builder::new(TokioExecutor::new());
        http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        http.http2().timer(TokioTimer::new()).keep_alive_interval(Some(Duration::from_secs(30)));
        if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
            debug!(%peer, %error, "webhook connection");
        }
    }
}

async fn answer(request: Request<Incoming>, mesh: &Mesh) -> Response<Full<Bytes>> {
    if request.method() != Method::POST || request.uri().path() != "/validate" {
        return plain(StatusCode::NOT_FOUND, "POST /validate is answered\n");
    }
    let body = match timeout(HEAD_TIMEOUT, Limited::new(request.into_body(), LARGEST).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return plain(StatusCode::BAD_REQUEST, &format!("{error}\n")),
        Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "the review takes too long to arrive\n"),
    };
    match validate(&body, mesh) {
        Ok(answer) => {
            let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
            let json = header::HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        }
        Err(error) => plain(StatusCode::BAD_REQUEST, &format!("no AdmissionReview: {error}\n")),
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    response
}

/// Keeps the CA bundle of the ValidatingWebhookConfiguration right while `leads`. Who does not want the webhook deletes the
/// configuration; it is not made again.
pub async fn keep_bundle(
    client: Client,
    root_namespace: String,
    store: Arc<CaStore>,
    mut leads: watch::Receiver<bool>,
) {
    let name = format!("undermesh-validator-{root_namespace}");
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
    while leads.wait_for(|l| *l).await.is_ok() {
        if let Err(error) = bundle(&api, &name, store.authority().roots()).await {
            warn!(name, %error, "the webhook's CA bundle cannot be written; objects are stored unchecked");
        }
        tokio::select! {
            () = sleep(PERIOD) => {}
            _ = leads.wait_for(|l| !*l) => {}
        }
    }
}

async fn bundle(
    api: &Api<ValidatingWebhookConfiguration>,
    name: &str,
    roots: &str,
) -> Result<(), kube::Error> {
    let Some(present) = api.get_opt(name).await? else { return Ok(()) };
    let entry = present.webhooks.iter().flatten().find(|w| w.name == WEBHOOK);
    let Some(entry) = entry else { return Ok(()) };
    if entry.client_config.ca_bundle.as_ref().is_some_and(|b| b.0 == roots.as_bytes()) {
        return Ok(());
    }
    let body = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": name },
        "webhooks": [{ "name": WEBHOOK, "clientConfig": { "caBundle": ByteString(roots.into()) } }],
    });
    api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await?;
    info!(name, "the webhook's CA bundle was written");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn review(object: &str) -> Answer {
        let object: Answer =
            serde_json::to_value(crate::tree::documents(object).pop().unwrap().unwrap().to_json()).unwrap();
        let body = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {"uid": "u1", "operation": "CREATE", "object": object},
        });
        validate(body.to_string().as_bytes(), &Mesh::default()).unwrap()["response"].clone()
    }

    #[test]
    fn what_would_not_be_taken_is_refused_with_field_and_fix() {
        let bad = review(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec: {rules: [{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]}\n",
        );
        assert_eq!((bad["uid"].as_str(), bad["allowed"].as_bool()), (Some("u1"), Some(false)));
        let message = bad["status"]["message"].as_str().unwrap();
        assert!(message.starts_with("spec.rules[0].from[0].source.ipBlocks[0]: "), "{message}");
        assert_eq!(bad["status"]["code"], 422);
    }

    #[test]
    fn what_has_no_effect_is_allowed_with_a_warning() {
        let allowed = review(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e, namespace: a}\nspec: {hosts: [x.example], ports: [{number: 80, name: http}], exportTo: [b]}\n",
        );
        assert_eq!(allowed["allowed"], true);
        assert!(allowed["warnings"][0].as_str().unwrap().contains("spec.exportTo"), "{allowed}");
    }

    #[test]
    fn what_is_not_ours_is_not_judged() {
        for foreign in [
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: a}\nspec: {gatewayClassName: other, addresses: [{type: other.io/X, value: y}], listeners: []}\n",
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: a}\nspec: {parentRefs: [{name: g}], rules: [{filters: [{type: Unheard}]}]}\n",
            "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {name: s, namespace: a}\nspec: {}\n",
        ] {
            assert_eq!(review(foreign)["allowed"], true, "{foreign}");
        }
        let ours = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: g, namespace: a}\nspec: {gatewayClassName: istio-waypoint, listeners: []}\n";
        assert_eq!(review(ours)["allowed"], false);
    }

    #[test]
    fn a_deletion_and_a_body_that_is_no_review_do_no_harm() {
        let deletion = json!({"request": {"uid": "u", "object": null}}).to_string();
        assert_eq!(validate(deletion.as_bytes(), &Mesh::default()).unwrap()["response"]["allowed"], true);
        assert!(validate(b"{}", &Mesh::default()).is_err());
    }
}
