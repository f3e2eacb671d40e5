//! What endpoints are told of the certificate that a gateway's client has shown: `x-forwarded-client-cert`, with the
//! elements that Istio's gateways put there (Hash, Cert, Subject, URI, DNS).

use std::fmt::Write as _;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use mesh_core::tls::CertificateNames;
use rustls_pki_types::CertificateDer;

/// The header's value; none for what cannot be read, which no verified certificate is.
pub(super) fn header(leaf: &CertificateDer<'_>) -> Option<HeaderValue> {
    let names = CertificateNames::of(leaf).ok()?;
    let mut text = String::from("Hash=");
    for byte in digest(&SHA256, leaf).as_ref() {
        // Writing to a text cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    let _ = write!(text, ";Cert=\"{}\"", escaped(&pem(leaf)));
    let _ = write!(text, ";Subject={}", quoted(&names.subject));
    // Elements are told apart by `;` and whole values by `,`: what has one of them is put in quotes.
    for (key, values) in [("URI", &names.uris), ("DNS", &names.dns)] {
        for value in values {
            if value.contains([';', ',', '=', '"', '\\']) {
                let _ = write!(text, ";{key}={}", quoted(value));
            } else {
                let _ = write!(text, ";{key}={value}");
            }
        }
    }
    HeaderValue::try_from(text).ok()
}

/// In quotes, out of which nothing inside leads.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn pem(leaf: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(leaf);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// Percent-encoded but for what a URL has as it is.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_quotes_stays_one_element() {
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        let name = r#"x:a\";URI=spiffe://b"#;
        params.subject_alt_names = vec![rcgen::SanType::URI(name.try_into().unwrap())];
        let made = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let value = header(made.der()).unwrap();
        let text = value.to_str().unwrap();
        assert!(text.ends_with(r#";URI="x:a\\\";URI=spiffe://b""#), "{text}");
    }

    #[test]
    fn a_certificate_is_told_by_its_hash_itself_and_its_names() {
        let names = ["a.example".to_owned(), "b.example".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let value = header(made.cert.der()).unwrap();
        let text = value.to_str().unwrap();
        let parts: Vec<&str> = text.split(';').collect();
        let [hash, cert, subject, first, second] = parts.as_slice() else { panic!("{text}") };
        let bytes = digest(&SHA256, made.cert.der());
        let expected: String = bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(*hash, format!("Hash={expected}"));
        assert!(cert.starts_with("Cert=\"-----BEGIN%20CERTIFICATE-----%0A"), "{cert}");
        assert!(subject.starts_with("Subject=\"CN="), "{subject}");
        assert_eq!((*first, *second), ("DNS=a.example", "DNS=b.example"));
        assert_eq!(pem(made.cert.der()), made.cert.pem().replace("\r\n", "\n"));
    }
}
