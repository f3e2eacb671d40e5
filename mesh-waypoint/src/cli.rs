//! Flags and environment of `mesh-waypoint run`. Environment names are those of Istio's proxies where the meaning is the
//! same.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_core::hbone;
use mesh_core::identity::{DEFAULT_SERVICE_ACCOUNT, DEFAULT_TRUST_DOMAIN, SpiffeId};
use mesh_core::state::Locality;
use mesh_core::xds::again::Again;
use mesh_core::xds::channel::ControlPlane;
use serde::Serialize;

use crate::config::{Own, Role};

/// `mesh-waypoint run`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Example:\n  mesh-waypoint run --gateway waypoint --namespace shop --xds https://mesh-control:15012 \\\n    --token /run/undermesh/token --root-cert /run/undermesh/root-cert.pem"
)]
pub struct RunArgs {
    /// Name of the Gateway that this is a waypoint of
    #[arg(long, value_name = "NAME", env = "GATEWAY_NAME")]
    pub gateway: String,
    /// Namespace of the Gateway
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    pub namespace: String,
    /// What this is: a waypoint, or a gateway, which takes requests of clients outside the mesh
    #[arg(long, value_name = "ROLE", env = "UM_ROLE", default_value = "waypoint")]
    pub role: Role,
    /// Class of the Gateway [default: that of the role, istio-waypoint or istio]
    #[arg(long, value_name = "CLASS", env = "GATEWAY_CLASS")]
    pub class: Option<String>,
    /// Service account, whose identity the waypoint has [default: the name of the Gateway]
    #[arg(long, value_name = "NAME", env = "SERVICE_ACCOUNT")]
    pub service_account: Option<String>,
    /// Trust domain of that identity
    #[arg(long, value_name = "DOMAIN", env = "TRUST_DOMAIN", default_value = DEFAULT_TRUST_DOMAIN)]
    pub trust_domain: String,
    /// Name of the pod that this runs in [default: the name of the Gateway]
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub pod: Option<String>,
    /// Name of the node that this runs on
    #[arg(long, value_name = "NAME", env = "NODE_NAME", default_value = "")]
    pub node: String,
    /// Control plane: https://host:port, or http://host:port for plaintext
    #[arg(long, value_name = "URL", env = "XDS_ADDRESS")]
    pub xds: String,
    /// Certificate authority [default: the address of --xds]
    #[arg(long, value_name = "URL", env = "CA_ADDRESS")]
    pub ca: Option<String>,
    /// File with the service account's bearer token
    #[arg(long, value_name = "FILE", env = "AUTH_TOKEN")]
    pub token: Option<PathBuf>,
    /// PEM roots that the control plane's certificate must chain to
    #[arg(long, value_name = "FILE", env = "XDS_ROOT_CA")]
    pub root_cert: Option<PathBuf>,
    /// PEM roots of the certificate authority's server [default: --root-cert]
    #[arg(long, value_name = "FILE", env = "CA_ROOT_CA")]
    pub ca_root_cert: Option<PathBuf>,
    /// Name that the control plane's certificate must carry [default: the host of --xds]
    #[arg(long, value_name = "HOST", env = "ALT_XDS_HOSTNAME")]
    pub xds_hostname: Option<String>,
    /// Name that the authority's certificate must carry [default: that of --xds-hostname]
    #[arg(long, value_name = "HOST", env = "ALT_CA_HOSTNAME")]
    pub ca_hostname: Option<String>,
    /// Lifetime to ask for in certificates
    #[arg(long, value_name = "DURATION", env = "SECRET_TTL", default_value = "24h", value_parser = humantime::parse_duration)]
    pub secret_ttl: Duration,
    /// Id of the cluster
    #[arg(long, value_name = "ID", env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// DNS suffix of services
    #[arg(long, value_name = "DOMAIN", env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Id of the network of this waypoint
    #[arg(long, value_name = "ID", env = "NETWORK", default_value = "")]
    pub network: String,
    /// Where this runs: region[/zone[/subzone]] [default: as the control plane says of the pod]
    #[arg(long, value_name = "LOCALITY", env = "UM_LOCALITY", default_value = "")]
    pub locality: String,
    /// Address that takes tunnels; of a gateway only its IP address counts, its listeners have ports of their own
    #[arg(long, value_name = "ADDR", env = "UM_LISTEN", default_value_t = SocketAddr::from((Ipv6Addr::UNSPECIFIED, hbone::PORT)))]
    pub listen: SocketAddr,
    /// Data worker threads; 0 is one per core
    #[arg(long, value_name = "N", env = "UM_WORKERS", default_value_t = 0)]
    pub workers: usize,
    /// Admin address, loopback only
    #[arg(long, value_name = "ADDR", env = "UM_ADMIN", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 15_000)))]
    pub admin: SocketAddr,
    /// Prometheus address
    #[arg(long, value_name = "ADDR", env = "UM_METRICS", default_value_t = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15_020)))]
    pub metrics: SocketAddr,
    /// Readiness address
    #[arg(long, value_name = "ADDR", env = "UM_READINESS", default_value_t = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15_021)))]
    pub readiness: SocketAddr,
    /// How long requests may go on after SIGTERM
    #[arg(long, value_name = "DURATION", env = "CONNECTION_TERMINATION_DEADLINE", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_limit: Duration,
    /// Log one line per request
    #[arg(long, value_name = "BOOL", env = "UM_ACCESS_LOG", default_value_t = true, action = clap::ArgAction::Set)]
    pub access_log: bool,
}

/// What is wrong with the flags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgError {
    /// A text that must not be empty.
    #[error("--{0} is empty; give a name")]
    Empty(&'static str),
    /// The admin address is reachable from elsewhere.
    #[error(
        "--admin {0} can be reached from other machines; give a loopback address such as 127.0.0.1:15000"
    )]
    AdminNotLoopback(SocketAddr),
    /// Not a control plane's address.
    #[error("--{0} {1:?} is not a URL of a control plane; give http://host:port or https://host:port")]
    Url(&'static str, String),
    /// More than three parts.
    #[error("--locality {0:?} has more than three parts; give region/zone/subzone")]
    Locality(String),
}

/// What the process is told before it starts.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Which waypoint this is.
    #[serde(skip)]
    pub own: Own,
    /// Who it is.
    #[serde(skip)]
    pub identity: SpiffeId,
    /// Name of its pod.
    pub pod: String,
    /// Id of the cluster.
    pub cluster_id: String,
    /// The control plane.
    #[serde(skip)]
    pub xds: ControlPlane,
    /// The certificate authority.
    #[serde(skip)]
    pub ca: ControlPlane,
    /// Lifetime to ask for in certificates.
    #[serde(skip)]
    pub secret_ttl: Duration,
    /// Takes tunnels.
    pub listen: SocketAddr,
    /// Data workers, at least one.
    pub workers: usize,
    /// Admin address.
    pub admin: SocketAddr,
    /// Prometheus address.
    pub metrics: SocketAddr,
    /// Readiness address.
    pub readiness: SocketAddr,
    /// How long requests may go on after SIGTERM.
    #[serde(skip)]
    pub drain_limit: Duration,
    /// One line per request.
    pub access_log: bool,
}

impl RunArgs {
    /// Checks the flags and fills in what follows from others.
    ///
    /// # Errors
    /// [`ArgError`] names the flag that is wrong.
    pub fn complete(&self) -> Result<Config, ArgError> {
        for (name, value) in [("gateway", &self.gateway), ("namespace", &self.namespace)] {
            if value.is_empty() {
                return Err(ArgError::Empty(name));
            }
        }
        if !self.admin.ip().is_loopback() {
            return Err(ArgError::AdminNotLoopback(self.admin));
        }
        let again = Again::default();
        let xds = self.control_plane("xds", &self.xds, &again)?;
        let ca = ControlPlane {
            root_cert: self.ca_root_cert.clone().or_else(|| self.root_cert.clone()),
            server_name: self.ca_hostname.clone().or_else(|| self.xds_hostname.clone()),
            ..self.control_plane("ca", self.ca.as_ref().unwrap_or(&self.xds), &again)?
        };
        let account = self.service_account.as_deref().unwrap_or(&self.gateway);
        let account = if account.is_empty() { DEFAULT_SERVICE_ACCOUNT } else { account };
        let hostname = format!("{}.{}.svc.{}", self.gateway, self.namespace, self.cluster_domain);
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Config {
            own: Own {
                namespace: self.namespace.clone(),
                gateway: self.gateway.clone(),
                class: self.class.clone().unwrap_or_else(|| self.role.class().to_owned()),
                hostname,
                network: self.network.clone(),
                locality: locality(&self.locality)?,
                node: self.node.clone(),
                role: self.role,
            },
            identity: SpiffeId::new(&self.trust_domain, &self.namespace, account),
            pod: self.pod.clone().unwrap_or_else(|| self.gateway.clone()),
            cluster_id: self.cluster_id.clone(),
            xds,
            ca,
            secret_ttl: self.secret_ttl,
            listen: self.listen,
            workers: if self.workers == 0 { cores() } else { self.workers },
            admin: self.admin,
            metrics: self.metrics,
            readiness: self.readiness,
            drain_limit: self.drain_limit,
            access_log: self.access_log,
        })
    }

    fn control_plane(
        &self,
        flag: &'static str,
        address: &str,
        again: &Again,
    ) -> Result<ControlPlane, ArgError> {
        if !address.starts_with("http://") && !address.starts_with("https://") {
            return Err(ArgError::Url(flag, address.to_owned()));
        }
        Ok(ControlPlane {
            address: address.to_owned(),
            root_cert: self.root_cert.clone(),
            server_name: self.xds_hostname.clone(),
            token: self.token.clone(),
            cluster_id: self.cluster_id.clone(),
            headers: Vec::new(),
            again: again.clone(),
        })
    }
}

fn locality(text: &str) -> Result<Locality, ArgError> {
    let parts: Vec<&str> = text.split('/').collect();
    if parts.len() > 3 {
        return Err(ArgError::Locality(text.to_owned()));
    }
    let part = |i: usize| parts.get(i).copied().unwrap_or_default().into();
    Ok(Locality { region: part(0), zone: part(1), subzone: part(2) })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: RunArgs,
    }

    fn complete(more: &[&str]) -> Result<Config, ArgError> {
        let least = ["x", "--gateway=wp", "--namespace=shop", "--xds=http://127.0.0.1:15010"];
        Line::try_parse_from(least.iter().chain(more)).unwrap().args.complete()
    }

    #[test]
    fn name_namespace_and_control_plane_are_enough() {
        let config = complete(&[]).unwrap();
        assert_eq!(config.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/wp");
        assert_eq!(config.own.hostname, "wp.shop.svc.cluster.local");
        assert_eq!((config.ca.address, config.pod), ("http://127.0.0.1:15010".into(), "wp".into()));
        assert_eq!(config.listen.port(), 15_008);
        assert!(config.workers >= 1);
    }

    #[test]
    fn flags_that_cannot_work_are_named_with_what_would() {
        let wrong = |more: &[&str]| complete(more).unwrap_err().to_string();
        assert!(wrong(&["--admin=0.0.0.0:15000"]).contains("give a loopback address"));
        assert!(wrong(&["--ca=control:15012"]).starts_with("--ca \"control:15012\" is not a URL"));
        assert!(wrong(&["--locality=a/b/c/d"]).contains("more than three parts"));
    }

    #[test]
    fn a_locality_may_be_given_in_part() {
        let own = complete(&["--locality=r1/a"]).unwrap().own;
        assert_eq!((&*own.locality.region, &*own.locality.zone, &*own.locality.subzone), ("r1", "a", ""));
    }
}
