//! What is done in a cluster besides reading it: tokens are checked, the CA lives in a Secret, roots are handed out, and
//! what there is to say about objects is written into their status.
//!
//! | module | for |
//! |---|---|
//! | [`review`] | TokenReview: who a caller is |
//! | [`viewers`] | SubjectAccessReview: who may see the events of a namespace |
//! | [`secret`] | the CA in a Secret that every replica shares |
//! | [`leader`] | the Lease of the one replica that writes |
//! | [`roots`] | the ConfigMap with the trusted roots in every namespace |
//! | [`deploy`] | waypoints for Gateways, and the Gateways' status |
//! | [`status`] | conditions in the status of objects |
//! | [`redirection`] | the annotation of pods under capture |
//! | [`webhook`] | validation before objects are stored |

pub mod deploy;
pub mod leader;
pub mod redirection;
mod remembered;
pub mod review;
pub mod roots;
pub mod secret;
pub mod status;
pub mod viewers;
pub mod webhook;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kube::Client;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::ads::Clients;
use crate::ca::store::{CaStore, ROOTS};
use crate::convert::Mesh;
use crate::enrol::Enrolments;
use crate::hub::Hub;
use crate::model::Key;
use crate::relay::questions::Agents;
use crate::replicas;
use crate::source::kube::observed::Observed;
use crate::source::kube::{KubernetesSource, connect};
use crate::source::{SourceError, State};
use deploy::Deployer;
use leader::Candidate;
use redirection::Redirection;
use review::Reviewer;
use secret::CaSecret;
use status::StatusWriter;
use viewers::Viewers;

/// By this name the API server knows what we wrote.
pub(crate) const MANAGER: &str = "undermesh-control";

/// What `mesh-control run --source kubernetes` is told besides.
#[derive(Debug, Clone)]
pub struct Options {
    /// Context of the kubeconfig; none takes the present one, or the cluster that this process runs in.
    pub context: Option<String>,
    /// Service accounts of node agents.
    pub agents: Vec<Key>,
    /// Name of this process among its replicas.
    pub replica: String,
    /// The service account of all replicas.
    pub replica_account: Key,
    /// The token that they show each other.
    pub replica_token: PathBuf,
    /// Image of the waypoints that Gateways get.
    pub waypoint_image: Option<String>,
    /// Validation before objects are stored; none turns it off.
    pub listen_webhook: Option<SocketAddr>,
}

/// What the process has for everyone.
#[derive(Debug)]
pub struct Shared {
    /// Objects, and what there is to say about them.
    pub hub: Arc<Hub>,
    /// Proxies that are connected.
    pub clients: Arc<Clients>,
    /// What agents say.
    pub enrolments: Arc<Enrolments>,
    /// Who answers questions: agents, and other replicas.
    pub agents: Arc<Agents>,
    /// The certificate authority.
    pub store: Arc<CaStore>,
}

/// A connection to a cluster, and what is made from it.
pub struct Cluster {
    client: Client,
    options: Options,
    root_namespace: String,
    observed: Arc<Observed>,
}

impl Cluster {
    /// Connects. The API server need not be there.
    ///
    /// # Errors
    /// There is no cluster to connect to.
    pub async fn connect(options: &Options, mesh: &Mesh) -> Result<Self, SourceError> {
        let client = connect(options.context.as_deref()).await?;
        Ok(Self {
            client,
            options: options.clone(),
            root_namespace: mesh.root_namespace.clone(),
            observed: Arc::default(),
        })
    }

    /// The CA's Secret.
    #[must_use]
    pub fn secret(&self) -> CaSecret {
        CaSecret::new(self.client.clone(), &self.root_namespace)
    }

    /// Checks tokens.
    #[must_use]
    pub fn reviewer(&self, hub: Arc<Hub>) -> Reviewer {
        Reviewer::new(self.client.clone(), hub, self.options.agents.clone())
    }

    /// How replicas find and trust each other.
    #[must_use]
    pub fn replicas(&self, state_dir: &Path) -> replicas::Settings {
        replicas::Settings {
            replica: self.options.replica.clone(),
            namespace: self.root_namespace.clone(),
            token: self.options.replica_token.clone(),
            roots: state_dir.join(ROOTS),
        }
    }

    /// Says who may see events.
    #[must_use]
    pub fn viewers(&self) -> Viewers {
        Viewers::new(self.client.clone())
    }

    /// The source of objects.
    #[must_use]
    pub fn source(&self) -> KubernetesSource {
        KubernetesSource {
            client: self.client.clone(),
            root_namespace: self.root_namespace.clone(),
            observed: self.observed.clone(),
        }
    }

    /// Starts what follows the CA, takes part in the election, and writes while it leads.
    pub fn spawn(
        &self,
        tasks: &mut JoinSet<()>,
        Shared { hub, clients, enrolments, agents, store }: &Shared,
        states: &watch::Receiver<Arc<State>>,
        stop: &watch::Receiver<bool>,
    ) {
        tasks.spawn(self.secret().follow(store.clone()));
        let candidate =
            Candidate::new(self.client.clone(), &self.root_namespace, self.options.replica.clone());
        let leads = candidate.leads();
        tasks.spawn(candidate.run(stop.clone()));
        tasks.spawn(roots::distribute(self.client.clone(), store.clone(), states.clone(), leads.clone()));
        let deployer = Deployer {
            client: self.client.clone(),
            hub: hub.clone(),
            observed: self.observed.clone(),
            image: self.options.waypoint_image.clone(),
        };
        tasks.spawn(deployer.run(leads.clone()));
        let namespace = self.root_namespace.clone();
        tasks.spawn(webhook::keep_bundle(self.client.clone(), namespace, store.clone(), leads.clone()));
        let (client, hub_of, enrolments) = (self.client.clone(), hub.clone(), enrolments.clone());
        tasks.spawn(Redirection { client, hub: hub_of, enrolments }.run());
        let writer = StatusWriter {
            client: self.client.clone(),
            hub: hub.clone(),
            observed: self.observed.clone(),
            clients: clients.clone(),
            agents: agents.clone(),
        };
        tasks.spawn(writer.run(leads));
    }
}
