//! Reader of Istio's Gateway.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::xds::proto::l7::listener_tls::Version;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::Object;
use super::super::istio_gateway::{
    IstioGateway, Server, ServerHost, ServerProtocol, ServerTls, ServerTlsMode,
};
use super::istio::Resource;
use super::{Check, Document, FieldError, is_dns_name, meta, shape};

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    selector: BTreeMap<String, String>,
    servers: Vec<ServerText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServerText {
    port: PortText,
    bind: String,
    hosts: Vec<String>,
    tls: Option<TlsText>,
    default_endpoint: String,
    #[serde(rename = "name")]
    _name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PortText {
    number: i64,
    name: String,
    protocol: String,
    target_port: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TlsText {
    https_redirect: bool,
    mode: ModeText,
    server_certificate: String,
    private_key: String,
    ca_certificates: String,
    tls_certificates: Vec<FilesText>,
    credential_name: String,
    credential_names: Vec<String>,
    ca_cert_credential_name: String,
    ca_crl: String,
    subject_alt_names: Vec<String>,
    verify_certificate_spki: Vec<String>,
    verify_certificate_hash: Vec<String>,
    min_protocol_version: VersionText,
    max_protocol_version: VersionText,
    cipher_suites: Vec<String>,
    insecure_skip_verify: Option<bool>,
}

/// Files of an Envoy's pod.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct FilesText {
    #[serde(rename = "serverCertificate")]
    _server_certificate: Option<IgnoredAny>,
    #[serde(rename = "privateKey")]
    _private_key: Option<IgnoredAny>,
    #[serde(rename = "caCertificates")]
    _ca_certificates: Option<IgnoredAny>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum ModeText {
    #[default]
    Passthrough,
    Simple,
    Mutual,
    AutoPassthrough,
    IstioMutual,
    OptionalMutual,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
enum VersionText {
    #[default]
    #[serde(rename = "TLS_AUTO")]
    Auto,
    #[serde(rename = "TLSV1_0")]
    V10,
    #[serde(rename = "TLSV1_1")]
    V11,
    #[serde(rename = "TLSV1_2")]
    V12,
    #[serde(rename = "TLSV1_3")]
    V13,
}

impl VersionText {
    /// What is older than anything that is spoken bounds nothing.
    const fn on_wire(self) -> Version {
        match self {
            Self::Auto | Self::V10 | Self::V11 => Version::Auto,
            Self::V12 => Version::Tls12,
            Self::V13 => Version::Tls13,
        }
    }
}

/// Protocols of ports, and what they come to.
const PROTOCOLS: [(&str, ServerProtocol); 8] = [
    ("HTTP", ServerProtocol::Http),
    ("HTTP2", ServerProtocol::Http),
    ("GRPC", ServerProtocol::Http),
    ("GRPC-WEB", ServerProtocol::Http),
    ("HTTPS", ServerProtocol::Https),
    ("TLS", ServerProtocol::Tls),
    ("TCP", ServerProtocol::Tcp),
    ("MONGO", ServerProtocol::Tcp),
];

pub(super) fn istio_gateway(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<Spec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    if spec.servers.is_empty() {
        check.error("spec.servers", "missing; write at least one, with port and hosts");
    }
    let (mut servers, mut unsupported, mut names) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (i, text) in spec.servers.into_iter().enumerate() {
        let field = format!("spec.servers[{i}]");
        if text.port.name.is_empty() {
            check
                .error(format!("{field}.port.name"), "missing; each port of a Gateway has a name of its own");
        } else if !names.insert(text.port.name.clone()) {
            let name = &text.port.name;
            check.error(
                format!("{field}.port.name"),
                format!("{name:?} is there already; give each port its own"),
            );
        }
        servers.extend(server(text, &field, &meta.namespace, &mut unsupported, &mut check));
    }
    check.finish(Object::IstioGateway(Arc::new(IstioGateway {
        meta,
        selector: spec.selector,
        servers,
        unsupported,
    })))
}

fn server(
    text: ServerText,
    field: &str,
    namespace: &str,
    unsupported: &mut Vec<String>,
    check: &mut Check<'_>,
) -> Option<Server> {
    let port = check.port(&format!("{field}.port.number"), text.port.number);
    let given = text.port.protocol.to_ascii_uppercase();
    let protocol = PROTOCOLS.iter().find(|(name, _)| *name == given).map(|(_, protocol)| *protocol);
    if protocol.is_none() {
        let names = PROTOCOLS.map(|(name, _)| name).join(", ");
        check.error(
            format!("{field}.port.protocol"),
            format!("{:?} is not served; write one of {names}", text.port.protocol),
        );
    }
    let hosts = hosts(&text.hosts, field, namespace, check);
    for (name, set) in [
        ("bind", !text.bind.is_empty()),
        ("defaultEndpoint", !text.default_endpoint.is_empty()),
        ("port.targetPort", text.port.target_port.is_some()),
    ] {
        if set {
            unsupported.push(format!("{field}.{name}"));
        }
    }
    let protocol = protocol?;
    let at = format!("{field}.tls");
    let https_redirect = text.tls.as_ref().is_some_and(|tls| tls.https_redirect);
    let (mut tls, mut refused) = (None, None);
    match (protocol, text.tls) {
        (ServerProtocol::Http | ServerProtocol::Tcp, None) => {}
        (ServerProtocol::Http, Some(text)) => {
            if text.mode != ModeText::Passthrough || names_certificates(&text) {
                let why = "has settings of TLS beside httpsRedirect, and port.protocol is HTTP; write HTTPS";
                check.error(&at, why);
            }
        }
        (ServerProtocol::Tcp, Some(_)) => {
            check.error(&at, "does not go with port.protocol TCP; write port.protocol TLS, or take it away");
        }
        (ServerProtocol::Https | ServerProtocol::Tls, None) => {
            check.error(&at, format!("missing; port.protocol {given} needs it"));
        }
        (ServerProtocol::Https | ServerProtocol::Tls, Some(text)) => {
            if https_redirect {
                check.error(format!("{at}.httpsRedirect"), "is for servers of port.protocol HTTP");
            }
            match server_tls(text, &at, unsupported, check) {
                Ok(read) => tls = Some(read),
                Err(why) => refused = Some(why),
            }
        }
    }
    Some(Server { port, protocol, hosts, https_redirect, tls, refused })
}

fn names_certificates(text: &TlsText) -> bool {
    let files = [&text.server_certificate, &text.private_key, &text.credential_name];
    files.iter().any(|name| !name.is_empty())
        || !text.credential_names.is_empty()
        || !text.tls_certificates.is_empty()
}

fn hosts(given: &[String], field: &str, namespace: &str, check: &mut Check<'_>) -> Vec<ServerHost> {
    if given.is_empty() {
        check.error(format!("{field}.hosts"), "missing; write at least one, \"*\" for every");
    }
    let mut hosts = Vec::new();
    for (i, text) in given.iter().enumerate() {
        let (of, host) = text.split_once('/').unwrap_or(("*", text));
        let of = if of == "." { namespace } else { of };
        if of != "*" && !is_dns_name(of)
            || host != "*" && !is_dns_name(host.strip_prefix("*.").unwrap_or(host))
        {
            check.error(
                format!("{field}.hosts[{i}]"),
                format!(
                    "{text:?} is no host; write *, *.domain or a name, with namespace/ in front to bind \
                         the VirtualServices of that alone"
                ),
            );
            continue;
        }
        hosts.push(ServerHost { namespace: of.to_owned(), host: host.to_owned() });
    }
    hosts
}

/// # Errors
/// What would be left out to a stranger's advantage: the server is not served then.
fn server_tls(
    text: TlsText,
    at: &str,
    unsupported: &mut Vec<String>,
    check: &mut Check<'_>,
) -> Result<ServerTls, String> {
    let refuse = |name: &str, why: &str| Err(format!("{at} ({name} {why}; the server is not served)"));
    let credentials: Vec<String> = if text.credential_name.is_empty() {
        text.credential_names.clone()
    } else {
        vec![text.credential_name.clone()]
    };
    if !text.credential_name.is_empty() && !text.credential_names.is_empty() {
        check.error(format!("{at}.credentialNames"), "is there beside credentialName; keep one");
    }
    let files = !text.server_certificate.is_empty()
        || !text.private_key.is_empty()
        || !text.tls_certificates.is_empty();
    let mode = match text.mode {
        ModeText::Passthrough => ServerTlsMode::Passthrough,
        ModeText::Simple => ServerTlsMode::Simple,
        ModeText::Mutual => ServerTlsMode::Mutual,
        ModeText::OptionalMutual => ServerTlsMode::OptionalMutual,
        ModeText::AutoPassthrough | ModeText::IstioMutual => {
            let why = "write PASSTHROUGH, SIMPLE, MUTUAL or OPTIONAL_MUTUAL; the server is not served";
            return Err(format!("{at}.mode ({why})"));
        }
    };
    if mode == ServerTlsMode::Passthrough {
        if names_certificates(&text) {
            check.error(
                at,
                "names certificates, and with mode PASSTHROUGH TLS does not end here; write SIMPLE",
            );
        }
    } else if credentials.is_empty() && !files {
        check.error(
            format!("{at}.credentialName"),
            "missing; name a Secret of the namespace of the gateway's pods",
        );
    }
    if files && credentials.is_empty() {
        let why = "names files of the gateway's pod, which are not read: put the certificate into a Secret and name \
                   that in credentialName";
        let named = if text.tls_certificates.is_empty() { "serverCertificate" } else { "tlsCertificates" };
        return refuse(named, why);
    }
    for (name, set) in [
        ("verifyCertificateSpki", !text.verify_certificate_spki.is_empty()),
        ("verifyCertificateHash", !text.verify_certificate_hash.is_empty()),
        ("caCrl", !text.ca_crl.is_empty()),
        ("caCertificates", !text.ca_certificates.is_empty()),
    ] {
        if set {
            let why = "is not looked at, and more clients would be let in than are meant: write \
                       caCertCredentialName and subjectAltNames";
            return refuse(name, why);
        }
    }
    for (name, set) in [
        ("cipherSuites", !text.cipher_suites.is_empty()),
        ("insecureSkipVerify", text.insecure_skip_verify.is_some()),
    ] {
        if set {
            unsupported.push(format!("{at}.{name}"));
        }
    }
    let (min, max) = (text.min_protocol_version, text.max_protocol_version);
    if max != VersionText::Auto && max < VersionText::V12 {
        return refuse("maxProtocolVersion", "is older than TLSV1_2, the oldest that is spoken");
    }
    if max != VersionText::Auto && min > max {
        check.error(format!("{at}.minProtocolVersion"), "is newer than maxProtocolVersion");
    }
    Ok(ServerTls {
        mode,
        credentials,
        client_roots: text.ca_cert_credential_name,
        subject_alt_names: text.subject_alt_names,
        min: min.on_wire(),
        max: max.on_wire(),
    })
}
