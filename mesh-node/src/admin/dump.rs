//! The config dump in ztunnel's shape. Types matter: Kiali gives the whole dump up at the first wrong one.

use mesh_core::admin::{Certificate, CertificateInfo};
use mesh_core::tls::WorkloadCertificate;
use mesh_core::tls::certificate::to_pem;
use rustls::pki_types::CertificateDer;
use serde_json::{Map, Value, json};

use super::Admin;
use crate::certs::{Certificates, Slot};
use crate::config::Config;
use crate::proxy::OWN_PORTS;

pub(super) fn config_dump(admin: &Admin) -> Value {
    let state = admin.shared.state.load();
    json!({
        "workloads": state.dump_workloads(),
        "services": state.dump_services(),
        "policies": state.dump_policies(),
        "certificates": certificates(&admin.shared.certificates),
        "config": settings(&admin.shared.config),
        "version": { "version": env!("CARGO_PKG_VERSION"), "component": "ztunnel" },
        "settings": &admin.shared.config,
    })
}

/// One entry per identity, sorted; chain and roots without keys.
pub(super) fn certificates(certificates: &Certificates) -> Vec<Certificate> {
    let slots = certificates.snapshot();
    let mut dumped: Vec<_> = slots.iter().map(|(id, slot)| certificate(id.to_string(), slot)).collect();
    dumped.sort_by(|a, b| a.identity.cmp(&b.identity));
    dumped
}

fn certificate(identity: String, slot: &Slot) -> Certificate {
    let state = match (&slot.certificate, &slot.failure) {
        (Some(c), _) if c.is_valid_at(std::time::SystemTime::now()) => "Available",
        (None, None) => "Initializing",
        _ => "Unavailable",
    };
    let chain = slot.certificate.as_deref().map(|c| chain(c, c.chain())).unwrap_or_default();
    let roots = slot.certificate.as_deref().map(|c| chain_of_roots(c.roots())).unwrap_or_default();
    Certificate {
        identity,
        state: state.to_owned(),
        cert_chain: chain,
        problem: slot.failure.as_ref().map(ToString::to_string),
        rest: Map::from_iter([("rootCerts".to_owned(), json!(roots))]),
    }
}

/// The leaf with its dates; of intermediates the PEM only.
fn chain(certificate: &WorkloadCertificate, ders: &[CertificateDer<'static>]) -> Vec<CertificateInfo> {
    let date = |at| humantime::format_rfc3339_seconds(at).to_string();
    let mut infos = chain_of_roots(ders);
    if let Some(leaf) = infos.first_mut() {
        certificate.serial().clone_into(&mut leaf.serial_number);
        leaf.valid_from = date(certificate.not_before());
        leaf.expiration_time = date(certificate.not_after());
    }
    infos
}

fn chain_of_roots(ders: &[CertificateDer<'static>]) -> Vec<CertificateInfo> {
    let info = |der: &CertificateDer<'static>| CertificateInfo {
        pem: to_pem(std::slice::from_ref(der)),
        ..CertificateInfo::default()
    };
    ders.iter().map(info).collect()
}

/// The keys that Kiali's type has, with ztunnel's types.
fn settings(config: &Config) -> Value {
    let seconds = |d: std::time::Duration| json!({ "secs": d.as_secs(), "nanos": d.subsec_nanos() });
    json!({
        "adminAddr": config.admin.address.to_string(),
        "statsAddr": config.admin.metrics.to_string(),
        "readinessAddr": config.admin.readiness.to_string(),
        "inboundAddr": "[::]:15008",
        "inboundPlaintextAddr": "[::]:15006",
        "outboundAddr": "[::]:15001",
        "illegalPorts": OWN_PORTS,
        "caAddress": config.ca.address,
        "xdsAddress": config.xds.address,
        "clusterDomain": config.node.cluster_domain,
        "clusterId": config.node.cluster_id,
        "dnsProxy": config.capture.dns,
        "fakeCa": false,
        "localNode": config.node.name,
        "network": config.node.network,
        "numWorkerThreads": config.proxy.workers,
        "packetMark": 0x539,
        "poolMaxStreamsPerConn": config.proxy.pool_max_streams,
        "poolUnusedReleaseTimeout": seconds(config.proxy.pool_unused_release),
        "proxy": true,
        "proxyMode": "Shared",
        "secretTtl": seconds(config.ca.secret_ttl),
        "selfTerminationDeadline": seconds(config.drain.limit),
        "windowSize": 4 << 20,
        "connectionWindowSize": 16 << 20,
        "frameSize": 1 << 20,
        "xdsOnDemand": false,
    })
}
