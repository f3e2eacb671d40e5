//! Ports of a gateway: what is spoken at each, which listener a TLS client has come to by the name that it asks for, and
//! with which certificate it is answered. No I/O.
//!
//! A listener that did not change is the very same in the next snapshot, so that clients can resume their sessions. One
//! whose certificate is on its way keeps the one that it had.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use mesh_core::state::Str;
use mesh_core::tls::{client_verifier, public_provider, server_key};
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::gateway::Inside;
use mesh_core::xds::proto::l7::listener_tls::{Mode, Version};
use rustls::client::verify_server_name;
use rustls::server::{ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::ServerName;

/// Names of the protocols inside, the better one first.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Certificates by resource name, as they came.
pub type Credentials = BTreeMap<String, Arc<l7::Credential>>;

/// All ports.
#[derive(Debug, Default)]
pub struct Ports(BTreeMap<u16, Port>);

/// One port.
#[derive(Debug, Clone)]
pub enum Port {
    /// HTTP in the clear.
    Plain,
    /// Bytes of any protocol, in the clear.
    Stream,
    /// TLS: the listeners, the narrowest name first.
    Secure(Arc<[Arc<Listener>]>),
}

/// A listener for TLS.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: Str,
    /// Listeners that have this in common share the connections of clients.
    pub server: Str,
    /// Lower case; empty: every name; may begin with `*.`.
    hostname: Box<str>,
    /// What becomes of its clients.
    pub way: Way,
    /// What it was made from.
    source: l7::gateway::Listener,
    credentials: Vec<Option<Arc<l7::Credential>>>,
}

/// What becomes of a listener's clients.
#[derive(Clone)]
pub enum Way {
    /// TLS ends here, and this is inside.
    Terminate(Arc<ServerConfig>, Inside),
    /// An endpoint ends it.
    Pass,
    /// Nobody can be served, and why.
    Nowhere(Str),
}

/// Never what the certificate's key is.
impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Terminate(_, inside) => f.debug_tuple("Terminate").field(inside).finish(),
            Self::Pass => f.write_str("Pass"),
            Self::Nowhere(why) => f.debug_tuple("Nowhere").field(why).finish(),
        }
    }
}

impl Ports {
    /// The ports of a Gateway; what did not change since `last` is taken from it.
    #[must_use]
    pub fn build(gateway: Option<&l7::Gateway>, credentials: &Credentials, last: Option<&Self>) -> Self {
        let mut secure: BTreeMap<u16, Vec<Arc<Listener>>> = BTreeMap::new();
        let mut ports = BTreeMap::new();
        for listener in gateway.map_or(&[][..], |gateway| &gateway.listeners) {
            let Some(port) = u16::try_from(listener.port).ok().filter(|port| *port != 0) else { continue };
            if listener.tls.is_none() {
                let plain = if listener.inside() == Inside::Stream { Port::Stream } else { Port::Plain };
                ports.insert(port, plain);
                continue;
            }
            let before = last.and_then(|last| last.named(port, &listener.name));
            secure.entry(port).or_default().push(Listener::build(listener, credentials, before));
        }
        for (port, mut listeners) in secure {
            // The control plane does not tell of both on one port.
            listeners.sort_by_key(|listener| std::cmp::Reverse(listener.narrowness()));
            ports.entry(port).or_insert_with(|| Port::Secure(listeners.into()));
        }
        Self(ports)
    }

    /// One port.
    #[must_use]
    pub fn get(&self, port: u16) -> Option<&Port> {
        self.0.get(&port)
    }

    /// The ports at which somebody can be served.
    #[must_use]
    pub fn numbers(&self) -> Vec<u16> {
        let open = self.0.iter().filter(|(_, port)| match port {
            Port::Plain | Port::Stream => true,
            Port::Secure(listeners) => listeners.iter().any(|l| !matches!(l.way, Way::Nowhere(_))),
        });
        open.map(|(port, _)| *port).collect()
    }

    /// What is wrong with listeners.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let all =
            self.0.iter().flat_map(|(port, of)| of.listeners().iter().map(move |listener| (port, listener)));
        all.filter_map(|(port, listener)| match &listener.way {
            Way::Nowhere(why) => {
                Some(format!("listener {} of port {port} serves nobody: {why}", listener.name))
            }
            _ => None,
        })
    }

    fn named(&self, port: u16, name: &str) -> Option<&Arc<Listener>> {
        self.get(port)?.listeners().iter().find(|listener| *listener.name == *name)
    }
}

impl Port {
    /// The listener for a name that a client asks for: the narrowest that fits. A client without one gets the listener for
    /// every name.
    #[must_use]
    pub fn listener(&self, name: Option<&str>) -> Option<&Arc<Listener>> {
        self.listeners().iter().find(|listener| listener.fits(name))
    }

    /// Those for TLS.
    fn listeners(&self) -> &[Arc<Listener>] {
        match self {
            Self::Plain | Self::Stream => &[],
            Self::Secure(listeners) => listeners,
        }
    }
}

impl Listener {
    fn build(source: &l7::gateway::Listener, all: &Credentials, before: Option<&Arc<Self>>) -> Arc<Self> {
        let names = source.tls.as_ref().map(|tls| tls.credentials.as_slice()).unwrap_or_default();
        let credentials: Vec<_> = names.iter().map(|name| all.get(name).cloned()).collect();
        if let Some(before) = before.filter(|b| b.source == *source && b.credentials == credentials) {
            return Arc::clone(before);
        }
        let mut way = way(source, &credentials);
        let on_its_way = credentials.iter().any(Option::is_none);
        // Not where the clients that it takes are others now: who shows no certificate would go on being served.
        let demands = |of: &l7::gateway::Listener| of.tls.as_ref().and_then(|tls| tls.clients.clone());
        let same = |before: &&Arc<Self>| demands(&before.source) == demands(source);
        if let (Way::Nowhere(_), true, Some(before)) = (&way, on_its_way, before.filter(same)) {
            way = before.way.clone();
        }
        let hostname = source.hostname.to_ascii_lowercase().into();
        let server = if source.server.is_empty() { &source.name } else { &source.server };
        Arc::new(Self {
            name: source.name.as_str().into(),
            server: server.as_str().into(),
            hostname,
            way,
            source: source.clone(),
            credentials,
        })
    }

    fn fits(&self, name: Option<&str>) -> bool {
        match (&*self.hostname, name) {
            ("", _) => true,
            (_, None) => false,
            (own, Some(name)) => match own.strip_prefix('*') {
                Some(suffix) => {
                    let start = name.len().checked_sub(suffix.len()).filter(|start| *start > 0);
                    start
                        .is_some_and(|start| name.as_bytes()[start..].eq_ignore_ascii_case(suffix.as_bytes()))
                }
                None => own.eq_ignore_ascii_case(name),
            },
        }
    }

    /// Exact names, then the longest wildcard, then every name.
    fn narrowness(&self) -> (bool, usize) {
        (!self.hostname.is_empty() && !self.hostname.starts_with('*'), self.hostname.len())
    }
}

fn way(source: &l7::gateway::Listener, credentials: &[Option<Arc<l7::Credential>>]) -> Way {
    let Some(tls) = &source.tls else { return Way::Nowhere("it is not for TLS".into()) };
    if tls.mode() == Mode::Passthrough {
        return Way::Pass;
    }
    let mut keys = Vec::new();
    let mut why = String::new();
    for credential in credentials.iter().flatten() {
        let read = server_key(credential.certificate_chain.as_bytes(), credential.private_key.as_bytes());
        match read {
            Ok(key) => keys.push(Arc::new(key)),
            Err(error) => why = error.to_string(),
        }
    }
    if keys.is_empty() {
        return Way::Nowhere(if !why.is_empty() {
            why.into()
        } else if credentials.is_empty() {
            "it has no certificate; the status of the Gateway says why".into()
        } else {
            "its certificate was not told to this proxy; keys are told over TLS only, and to who has the identity of the \
             Gateway"
                .into()
        });
    }
    match config(keys, tls, source.inside()) {
        Ok(config) => Way::Terminate(Arc::new(config), source.inside()),
        Err(error) => Way::Nowhere(error.into()),
    }
}

/// # Errors
/// What cannot be used.
fn config(
    keys: Vec<Arc<CertifiedKey>>,
    tls: &l7::ListenerTls,
    inside: Inside,
) -> Result<ServerConfig, String> {
    let text = |error: rustls::Error| error.to_string();
    let builder = ServerConfig::builder_with_provider(public_provider())
        .with_protocol_versions(versions(tls.min_version(), tls.max_version()))
        .map_err(text)?;
    let builder = match &tls.clients {
        None => builder.with_no_client_auth(),
        Some(clients) => {
            let names = clients.subject_alt_names.clone();
            let verifier = client_verifier(&clients.roots, &clients.revocations, names, clients.optional)
                .map_err(|error| format!("certificates of clients: {error}"))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(Choice(keys)));
    if inside == Inside::Http {
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).into();
    }
    // Sessions are kept by the clients, under a key that only this listener has.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().map_err(text)?;
    Ok(config)
}

/// Of the versions that are spoken at all, those within bounds; the control plane tells of no empty range.
fn versions(min: Version, max: Version) -> &'static [&'static SupportedProtocolVersion] {
    static NEW: [&SupportedProtocolVersion; 1] = [&TLS13];
    static OLD: [&SupportedProtocolVersion; 1] = [&TLS12];
    static BOTH: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    match (min, max) {
        (Version::Tls13, _) => &NEW,
        (_, Version::Tls12) => &OLD,
        _ => &BOTH,
    }
}

/// Certificates of a listener.
#[derive(Debug)]
struct Choice(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for Choice {
    /// The first that is for the name and whose key the client can verify; else the first whose key it can.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let [only] = &*self.0 {
            return Some(Arc::clone(only));
        }
        let usable =
            || self.0.iter().filter(|key| key.key.choose_scheme(hello.signature_schemes()).is_some());
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let is_for = |key: &&Arc<CertifiedKey>| {
            let leaf = key.end_entity_cert().ok().and_then(|leaf| ParsedCertificate::try_from(leaf).ok());
            leaf.zip(name.as_ref()).is_some_and(|(leaf, name)| verify_server_name(&leaf, name).is_ok())
        };
        usable().find(is_for).or_else(|| usable().next()).map(Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(name: &str) -> Arc<l7::Credential> {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let (certificate_chain, private_key) = (made.cert.pem(), made.signing_key.serialize_pem());
        Arc::new(l7::Credential { certificate_chain, private_key, ..Default::default() })
    }

    fn listener(name: &str, hostname: &str, credentials: &[&str]) -> l7::gateway::Listener {
        let credentials = credentials.iter().map(|c| (*c).to_owned()).collect();
        l7::gateway::Listener {
            name: name.into(),
            port: 443,
            hostname: hostname.into(),
            tls: Some(l7::ListenerTls { mode: Mode::Terminate.into(), credentials, ..Default::default() }),
            ..Default::default()
        }
    }

    fn gateway(listeners: Vec<l7::gateway::Listener>) -> l7::Gateway {
        l7::Gateway { listeners, ..Default::default() }
    }

    fn named(ports: &Ports, name: Option<&str>) -> Option<String> {
        ports.get(443)?.listener(name).map(|listener| listener.name.to_string())
    }

    #[test]
    fn the_narrowest_listener_that_fits_a_name_takes_the_client() {
        let credentials = Credentials::from([("c".to_owned(), credential("a.example"))]);
        let mut all = vec![
            listener("wide", "*.example", &["c"]),
            listener("exact", "A.b.example", &["c"]),
            listener("longer", "*.b.example", &["c"]),
        ];
        let ports = Ports::build(Some(&gateway(all.clone())), &credentials, None);
        for (name, expected) in [
            ("a.b.example", Some("exact")),
            ("A.B.EXAMPLE", Some("exact")),
            ("c.b.example", Some("longer")),
            ("d.c.b.example", Some("longer")),
            ("b.example", Some("wide")),
            ("example", None),
            (".example", None),
            ("other", None),
        ] {
            assert_eq!(named(&ports, Some(name)).as_deref(), expected, "{name}");
        }
        assert_eq!(
            named(&ports, None),
            None,
            "who asks for no name gets the listener for all, if there is one"
        );
        all.push(listener("all", "", &["c"]));
        let ports = Ports::build(Some(&gateway(all)), &credentials, None);
        assert_eq!(named(&ports, None).as_deref(), Some("all"));
        assert_eq!(named(&ports, Some("other")).as_deref(), Some("all"));
    }

    #[test]
    fn a_listener_without_a_certificate_still_keeps_its_names_from_a_wider_one() {
        let credentials = Credentials::from([("c".to_owned(), credential("a.example"))]);
        let all = gateway(vec![listener("wide", "", &["c"]), listener("narrow", "a.example", &[])]);
        let ports = Ports::build(Some(&all), &credentials, None);
        let narrow = ports.get(443).unwrap().listener(Some("a.example")).unwrap();
        assert!(matches!(narrow.way, Way::Nowhere(_)), "{narrow:?}");
        assert_eq!(ports.numbers(), [443]);
        let alone = gateway(vec![listener("narrow", "a.example", &[])]);
        assert!(
            Ports::build(Some(&alone), &credentials, None).numbers().is_empty(),
            "nobody could be served"
        );
    }

    #[test]
    fn what_did_not_change_stays_and_a_certificate_on_its_way_is_waited_for_with_the_old_one() {
        let mut credentials = Credentials::from([("old".to_owned(), credential("a.example"))]);
        let first = Ports::build(Some(&gateway(vec![listener("l", "", &["old"])])), &credentials, None);
        let get = |ports: &Ports| Arc::clone(ports.get(443).unwrap().listener(None).unwrap());
        let again =
            Ports::build(Some(&gateway(vec![listener("l", "", &["old"])])), &credentials, Some(&first));
        assert!(Arc::ptr_eq(&get(&first), &get(&again)), "sessions can be resumed");
        // The listener names another certificate, which has not come yet, and the old one is gone.
        credentials.clear();
        let renamed = gateway(vec![listener("l", "", &["new"])]);
        let waiting = Ports::build(Some(&renamed), &credentials, Some(&first));
        assert!(matches!(get(&waiting).way, Way::Terminate(..)));
        let mut stricter = renamed.clone();
        if let Some(tls) = &mut stricter.listeners[0].tls {
            tls.clients = Some(l7::ClientCertificates::default());
        }
        let waiting_too = Ports::build(Some(&stricter), &credentials, Some(&first));
        assert!(matches!(get(&waiting_too).way, Way::Nowhere(_)), "the old one lets everybody in");
        credentials.insert("new".to_owned(), credential("a.example"));
        let there = Ports::build(Some(&renamed), &credentials, Some(&waiting));
        let config = |listener: Arc<Listener>| match &listener.way {
            Way::Terminate(config, _) => Arc::as_ptr(config).addr(),
            other => panic!("{other:?}"),
        };
        assert_ne!(config(get(&there)), config(get(&first)));
        // Told that there is none, it serves nobody.
        let none = Ports::build(Some(&gateway(vec![listener("l", "", &[])])), &credentials, Some(&there));
        assert!(matches!(get(&none).way, Way::Nowhere(_)));
    }

    #[test]
    fn what_is_inside_and_which_clients_are_asked_for_is_as_the_listener_says() {
        let credentials = Credentials::from([("c".to_owned(), credential("a.example"))]);
        let way = |edit: &dyn Fn(&mut l7::gateway::Listener)| {
            let mut one = listener("l", "", &["c"]);
            edit(&mut one);
            let ports = Ports::build(Some(&gateway(vec![one])), &credentials, None);
            ports.get(443).unwrap().listener(None).unwrap().way.clone()
        };
        let Way::Terminate(config, Inside::Http) = way(&|_| {}) else { panic!() };
        assert_eq!(config.alpn_protocols, ALPN.map(<[u8]>::to_vec));
        let Way::Terminate(config, Inside::Stream) = way(&|l| l.set_inside(Inside::Stream)) else { panic!() };
        assert!(config.alpn_protocols.is_empty(), "what is spoken inside is not known");
        let asking = |roots: &str| {
            let roots = roots.to_owned();
            way(&move |l| {
                let clients = l7::ClientCertificates { roots: roots.clone(), ..Default::default() };
                l.tls.as_mut().unwrap().clients = Some(clients);
            })
        };
        let Way::Nowhere(why) = asking("junk") else { panic!("it would let everybody in") };
        assert!(why.starts_with("certificates of clients: who issues them is no PEM"), "{why}");
        assert!(matches!(asking(&credentials["c"].certificate_chain), Way::Terminate(..)));
        let stream = l7::gateway::Listener { port: 31_400, ..Default::default() };
        let mut stream = gateway(vec![stream]);
        stream.listeners[0].set_inside(Inside::Stream);
        let ports = Ports::build(Some(&stream), &credentials, None);
        assert!(matches!(ports.get(31_400), Some(Port::Stream)));
        assert_eq!(ports.numbers(), [31_400]);
    }

    #[test]
    fn versions_are_those_within_bounds() {
        for (min, max, expected) in [
            (Version::Auto, Version::Auto, 2),
            (Version::Tls12, Version::Tls13, 2),
            (Version::Tls13, Version::Auto, 1),
            (Version::Auto, Version::Tls12, 1),
            (Version::Tls13, Version::Tls13, 1),
        ] {
            assert_eq!(versions(min, max).len(), expected, "{min:?} {max:?}");
        }
        assert_eq!(versions(Version::Auto, Version::Tls12)[0].version, rustls::ProtocolVersion::TLSv1_2);
        assert_eq!(versions(Version::Tls13, Version::Auto)[0].version, rustls::ProtocolVersion::TLSv1_3);
    }

    #[test]
    fn keys_are_never_printed() {
        let credential = credential("a.example");
        let secret = credential.private_key.lines().nth(1).unwrap().to_owned();
        let credentials = Credentials::from([("c".to_owned(), credential)]);
        let ports = Ports::build(Some(&gateway(vec![listener("l", "", &["c"])])), &credentials, None);
        let text = format!("{ports:?} {credentials:?}");
        assert!(!text.contains(&secret[..16]) && !text.contains("PRIVATE"), "{text}");
    }
}
