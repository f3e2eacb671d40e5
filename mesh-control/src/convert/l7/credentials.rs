//! The certificates that a gateway's listeners present.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7 as wire;

use super::super::Context;
use super::origin;
use crate::convert::attachments::Refusal;
use crate::model::credential::secret_of;
use crate::model::l7::Reference;
use crate::model::{Gateway, Key, Kind, Listener};

const INVALID: &str = "InvalidCertificateRef";

/// What a listener's `certificateRefs` come to.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// By resource name.
    pub(super) credentials: BTreeMap<String, wire::Credential>,
    /// What of them cannot be used.
    pub(super) unresolved: Option<Refusal>,
}

/// Looks for the certificates of a listener.
pub(super) fn of(context: &Context<'_>, gateway: &Gateway, listener: &Listener) -> Found {
    let references = listener.tls.as_ref().map(|tls| tls.certificates.as_slice()).unwrap_or_default();
    let (mut found, mut refusals) = (Found::default(), Vec::new());
    if references.is_empty() {
        refusals.push((
            INVALID,
            "tls.certificateRefs is missing; name a Secret of type kubernetes.io/tls".into(),
        ));
    }
    for (i, reference) in references.iter().enumerate() {
        let field = format!("tls.certificateRefs[{i}]");
        match credential(context, gateway, reference) {
            Ok(((name, credential), problem)) => {
                found.credentials.insert(name, credential);
                refusals.extend(
                    problem.map(|why| (INVALID, format!("{field}: {why}; the last good one is in force"))),
                );
            }
            Err((reason, why)) => refusals.push((reason, format!("{field}: {why}"))),
        }
    }
    found.unresolved = refusals.first().map(|(reason, _)| {
        let all: Vec<&str> = refusals.iter().map(|(_, why)| why.as_str()).collect();
        (*reason, all.join("; "))
    });
    found
}

type Named = (String, wire::Credential);

/// The certificate that a reference names, and what is wrong with a newer version of it.
fn credential(
    context: &Context<'_>,
    gateway: &Gateway,
    reference: &Reference,
) -> Result<(Named, Option<String>), Refusal> {
    let key = secret_of(reference, gateway).map_err(|why| (INVALID, why))?;
    let own = &gateway.meta.namespace;
    if !context.objects.may_name("Gateway", own, "Secret", &key) {
        let why = format!(
            "Secret {key} is of another namespace, and no ReferenceGrant there lets Gateways of namespace {own} name it"
        );
        return Err(("RefNotPermitted", why));
    }
    if !context.objects.credentials.get(&key).is_some_and(|secret| secret.is_tls) {
        return Err((INVALID, format!("there is no Secret {key} of type kubernetes.io/tls")));
    }
    any(context, &gateway.meta.key(), &key).map_err(|why| (INVALID, why))
}

/// The certificate of a Secret of any type, for the proxies of a gateway; and what is wrong with a newer version of it.
///
/// # Errors
/// Why there is none.
pub(super) fn any(
    context: &Context<'_>,
    gateway: &Key,
    key: &Key,
) -> Result<(Named, Option<String>), String> {
    let Some(secret) = context.objects.credentials.get(key) else {
        return Err(format!("there is no Secret {key} with tls.crt and tls.key"));
    };
    let Some(pair) = &secret.pair else {
        let why = secret.problem.as_deref().unwrap_or("it holds no certificate");
        return Err(format!("Secret {key}: {why}"));
    };
    let credential = wire::Credential {
        origin: Some(origin(Kind::Secret, &secret.meta)),
        certificate_chain: pair.chain.clone(),
        private_key: pair.key.clone(),
    };
    let name = format!("Gateway/{gateway}/Secret/{key}");
    Ok(((name, credential), secret.problem.as_ref().map(|why| format!("Secret {key}: {why}"))))
}

/// Who issues clients' certificates, and which of those are revoked: of the first of these Secrets that says it.
///
/// # Errors
/// None says it.
pub(super) fn roots(context: &Context<'_>, keys: &[Key]) -> Result<(String, String), String> {
    let secrets = keys.iter().filter_map(|key| context.objects.credentials.get(key));
    let mut with = secrets.filter_map(|secret| Some((secret.roots.clone()?, &secret.revocations)));
    match with.next() {
        Some((roots, revocations)) => Ok((roots, revocations.clone().unwrap_or_default())),
        None => Err(format!(
            "no Secret {} has ca.crt, by which clients' certificates are told",
            keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
        )),
    }
}
