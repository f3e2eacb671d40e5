//! Keys and certificates of a cluster, made new for each test.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

pub(crate) struct Pki;

impl Pki {
    /// Writes `ca.crt`, `apiserver.{crt,key}`, `admin.{crt,key}` and `sa.{key,pub}`.
    pub(crate) fn make(dir: &Path) {
        let key = KeyPair::generate().expect("a key");
        let mut ca = CertificateParams::default();
        ca.distinguished_name = name(&[(DnType::CommonName, "test-ca")]);
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        write(dir, "ca.crt", &ca.self_signed(&key).expect("a certificate").pem());
        let issuer = Issuer::new(ca, key);
        let names = ["127.0.0.1", "localhost", "kubernetes.default.svc"].map(str::to_owned);
        let mut server = CertificateParams::new(names).expect("names");
        server.distinguished_name = name(&[(DnType::CommonName, "kube-apiserver")]);
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf(dir, "apiserver", server, &issuer);
        let mut admin = CertificateParams::default();
        admin.distinguished_name =
            name(&[(DnType::OrganizationName, "system:masters"), (DnType::CommonName, "admin")]);
        admin.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        leaf(dir, "admin", admin, &issuer);
        let accounts = KeyPair::generate().expect("a key");
        write(dir, "sa.key", &accounts.serialize_pem());
        write(dir, "sa.pub", &accounts.public_key_pem());
    }
}

/// A root of its own with its key, PEM.
pub(crate) fn root(common_name: &str) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::default();
    ca.distinguished_name = name(&[(DnType::CommonName, common_name)]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (ca.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
}

fn name(parts: &[(DnType, &str)]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in parts {
        name.push(kind.clone(), *value);
    }
    name
}

fn leaf(dir: &Path, file: &str, params: CertificateParams, issuer: &Issuer<'_, KeyPair>) {
    let key = KeyPair::generate().expect("a key");
    let cert = params.signed_by(&key, issuer).expect("a certificate");
    write(dir, &format!("{file}.crt"), &cert.pem());
    write(dir, &format!("{file}.key"), &key.serialize_pem());
}

fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(name), text).expect("the file is written");
}
