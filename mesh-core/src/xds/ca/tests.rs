//! The CA client against a real server, in clear and over TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, ServerTlsConfig};
use tonic::{Response, Status};

use super::*;
use crate::xds::proto::ca::IstioCertificateResponse;
use crate::xds::proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};

type Asked = Arc<Mutex<Vec<(IstioCertificateRequest, Option<String>)>>>;
type Answer = fn() -> Result<Vec<String>, Status>;

struct Ca {
    asked: Asked,
    answer: Answer,
}

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let token = request.metadata().get("authorization").map(|v| v.to_str().unwrap().to_owned());
        self.asked.lock().unwrap().push((request.into_inner(), token));
        Ok(Response::new(IstioCertificateResponse { cert_chain: (self.answer)()? }))
    }
}

async fn serve(answer: Answer, tls: Option<ServerTlsConfig>) -> (SocketAddr, Asked) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Asked::default();
    let service = IstioCertificateServiceServer::new(Ca { asked: Arc::clone(&asked), answer });
    let mut server = tonic::transport::Server::builder();
    if let Some(tls) = tls {
        server = server.tls_config(tls).unwrap();
    }
    tokio::spawn(server.add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
    (address, asked)
}

fn cart() -> SpiffeId {
    SpiffeId::new("", "shop", "cart")
}

async fn sign(client: &CaClient) -> Result<Vec<String>, CaError> {
    client.sign("CSR", &cart(), Duration::from_secs(3600)).await
}

fn good() -> Result<Vec<String>, Status> {
    Ok(vec!["leaf".into(), "roots".into()])
}

/// A certificate for `control.test` with its key, and the root that signed it, as PEM.
fn server_certificate() -> (String, String, String) {
    let root_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).unwrap();
    let issuer = rcgen::Issuer::from_params(&params, &root_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["control.test".to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    (leaf.pem(), key.serialize_pem(), root.pem())
}

fn over_tls(address: SocketAddr, root: &Path) -> ControlPlane {
    ControlPlane {
        address: format!("https://{address}"),
        root_cert: Some(root.into()),
        server_name: Some("control.test".into()),
        ..Default::default()
    }
}

#[tokio::test]
async fn the_request_carries_csr_lifetime_identity_and_token() {
    let (address, asked) = serve(good, None).await;
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "secret\n").unwrap();
    let client = CaClient::new(ControlPlane {
        address: format!("http://{address}"),
        token: Some(token.path().into()),
        ..Default::default()
    });
    assert_eq!(sign(&client).await.unwrap(), ["leaf", "roots"]);
    std::fs::write(token.path(), "newer").unwrap();
    sign(&client).await.unwrap();
    let asked = asked.lock().unwrap();
    let (request, token) = &asked[0];
    assert_eq!((request.csr.as_str(), request.validity_duration), ("CSR", 3600));
    let identity = &request.metadata.as_ref().unwrap().fields["ImpersonatedIdentity"];
    assert_eq!(identity.kind, Some(Kind::StringValue("spiffe://cluster.local/ns/shop/sa/cart".into())));
    assert_eq!(token.as_deref(), Some("Bearer secret"));
    assert_eq!(asked[1].1.as_deref(), Some("Bearer newer"), "read again for every call");
}

#[tokio::test]
async fn refusals_and_incomplete_answers_say_who_what_and_why() {
    let (address, _) = serve(|| Err(Status::unauthenticated("not scheduled on this node")), None).await;
    let client =
        |address| CaClient::new(ControlPlane { address: format!("http://{address}"), ..Default::default() });
    let error = sign(&client(address)).await.unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(
        error.to_string(),
        format!(
            "the CA at http://{address} did not sign for spiffe://cluster.local/ns/shop/sa/cart: \
             Unauthenticated: not scheduled on this node"
        )
    );
    let (address, _) = serve(|| Ok(vec!["leaf".into()]), None).await;
    let error = sign(&client(address)).await.unwrap_err();
    assert!(error.to_string().contains("with 1 certificates; expected the leaf first, the roots last"));
    let nobody: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let error = sign(&client(nobody)).await.unwrap_err();
    assert!(!error.is_refusal() && error.to_string().starts_with("cannot connect"), "{error}");
}

#[tokio::test]
async fn the_server_must_chain_to_the_roots_and_the_file_is_read_again() {
    let (leaf, key, root) = server_certificate();
    let (_, _, foreign) = server_certificate();
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(leaf, key));
    let (address, _) = serve(good, Some(tls)).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), foreign).unwrap();
    let client = CaClient::new(over_tls(address, file.path()));
    let error = sign(&client).await.unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
    std::fs::write(file.path(), root).unwrap();
    assert_eq!(sign(&client).await.unwrap().len(), 2);
    let misnamed = ControlPlane { server_name: Some("other.test".into()), ..over_tls(address, file.path()) };
    let error = sign(&CaClient::new(misnamed)).await.unwrap_err().to_string();
    assert!(error.contains("NotValidForName") || error.contains("not valid for name"), "{error}");
}
