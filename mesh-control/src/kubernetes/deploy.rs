//! Deploys a waypoint or gateway for every Gateway of our classes, and says in its status how far that is. The leader does
//! it, by server-side apply; what is deleted or changed by somebody is put right. The Gateway owns what is deployed, so
//! that it goes with it.

mod manifest;
mod parameters;
mod status;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, ResourceExt};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_stream::StreamExt;
use tracing::{debug, info, warn};

use self::manifest::{MANAGED, MANAGED_LABEL, Manifests, NAME_LABEL, manifests, place};
use self::parameters::Parameters;
use self::status::{Present, Stage};
use super::MANAGER;
use super::status::render::merge;
use crate::hub::{Hub, Published};
use crate::model::{
    GATEWAY_CLASSES, Gateway, GatewayHost, Key, Kind, Meta, ObjectRef, WAYPOINT_CLASSES, controller_of,
};
use crate::source::kube::observed::Observed;
use crate::source::kube::{Pauses, resource};

/// Pause between two looks at everything.
const QUIET: Duration = Duration::from_millis(200);
/// Without any event everything is looked at this often.
const PERIOD: Duration = Duration::from_secs(30);
/// What failed, or was undone by somebody, is done again after this.
const RETRY: Duration = Duration::from_secs(5);

/// What the controller works with.
pub struct Deployer {
    /// Connection to the API server.
    pub client: Client,
    /// Objects and what there is to say about them.
    pub hub: Arc<Hub>,
    /// Their status.
    pub observed: Arc<Observed>,
    /// Image of the waypoint; without one none is deployed.
    pub image: Option<String>,
}

impl std::fmt::Debug for Deployer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deployer").field("image", &self.image).finish_non_exhaustive()
    }
}

/// What is known of a Deployment: the number of its ready pods.
type Deployments = BTreeMap<Key, i64>;

/// What was done last, so that it is not done again in a loop.
#[derive(Default)]
struct Done {
    applied: HashMap<Key, (Manifests, Instant)>,
    written: HashMap<Key, (Value, Instant)>,
    /// What was read of a Gateway's parameters.
    parameters: HashMap<Key, (Result<Parameters, String>, Instant)>,
}

impl Deployer {
    /// Works while `leads`.
    pub async fn run(self, mut leads: watch::Receiver<bool>) {
        while leads.wait_for(|l| *l).await.is_ok() {
            tokio::select! {
                () = self.lead() => return,
                _ = leads.wait_for(|l| !*l) => {}
            }
        }
    }

    async fn lead(&self) {
        let config =
            watcher::Config::default().labels(&format!("{MANAGED_LABEL} in ({})", MANAGED.join(",")));
        let events = watcher(Api::<Deployment>::all(self.client.clone()), config).backoff(Pauses::default());
        let mut events = std::pin::pin!(events);
        // Where there is no Gateway API, this fails now and then, and the rest goes on.
        let classes = watcher(self.class_api(), watcher::Config::default()).backoff(Pauses::default());
        let mut classes = std::pin::pin!(classes);
        let (mut conversions, mut stored) = (self.hub.conversions(), self.observed.changes());
        let (mut deployments, mut listing) = (Deployments::new(), None);
        let mut listed = false;
        let mut done = Done::default();
        let mut classes_at: Option<Instant> = None;
        loop {
            conversions.mark_unchanged();
            stored.mark_unchanged();
            let published = self.hub.published();
            if listed && published.is_converted() {
                if classes_at.is_none_or(|at| at.elapsed() >= PERIOD) {
                    self.classes().await;
                    classes_at = Some(Instant::now());
                }
                self.look(&published, &deployments, &mut done).await;
            }
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        listed |= matches!(event, Event::InitDone);
                        take(event, &mut deployments, &mut listing);
                        continue;
                    }
                    Some(Err(error)) => info!(%error, "watch of waypoints' Deployments"),
                    None => return,
                },
                event = classes.next() => match event {
                    Some(Ok(_)) => classes_at = None,
                    Some(Err(_)) => continue,
                    None => return,
                },
                changed = conversions.changed() => if changed.is_err() { return },
                changed = stored.changed() => if changed.is_err() { return },
                () = sleep(PERIOD.min(RETRY)) => {}
            }
            sleep(QUIET).await;
        }
    }

    async fn look(&self, published: &Published, deployments: &Deployments, done: &mut Done) {
        let objects = published.objects();
        done.applied.retain(|key, _| objects.gateways.contains_key(key));
        done.written.retain(|key, _| objects.gateways.contains_key(key));
        done.parameters.retain(|key, _| objects.gateways.get(key).is_some_and(|g| g.parameters.is_some()));
        let ours = |g: &Gateway| g.is_waypoint() || g.gateway_controller().is_some();
        for gateway in objects.gateways.values().filter(|g| ours(g) && !g.meta.deleting) {
            let stage = self.deploy(gateway, published, deployments, done).await;
            self.say(gateway, &stage, published, done).await;
        }
    }

    /// Applies what is missing or not as it should be.
    async fn deploy(
        &self,
        gateway: &Gateway,
        published: &Published,
        deployments: &Deployments,
        done: &mut Done,
    ) -> Stage {
        if is_manual(gateway) {
            return Stage::Manual;
        }
        let Some(image) = &self.image else {
            let why = "no image of waypoints is configured; set --waypoint-image, or write spec.addresses";
            return Stage::Refused(why.into());
        };
        let listeners = published.attachments.listeners.get(&gateway.meta.key());
        if listeners.is_some_and(|all| all.iter().all(|listener| listener.refusal.is_some())) {
            return Stage::Refused("no listener can be served".into());
        }
        let key = place(gateway);
        if let Some(why) = foreign(gateway, published) {
            return Stage::Refused(why);
        }
        let parameters = match self.parameters(gateway, done).await {
            Ok(parameters) => parameters,
            Err(why) => return Stage::Misguided(why),
        };
        let wanted = parameters.over(manifests(gateway, &published.mesh, image));
        let objects = published.objects();
        let there = objects.services.contains_key(&key)
            && objects.service_accounts.contains_key(&key)
            && deployments.contains_key(&key);
        let last = done.applied.get(&gateway.meta.key());
        let rested = last.is_none_or(|(_, at)| at.elapsed() >= RETRY);
        let changed = last.is_none_or(|(manifests, _)| *manifests != wanted);
        if changed || !there && rested {
            let known = deployments.contains_key(&key);
            if let Err(error) = self.apply(&wanted, gateway, &key, known).await {
                warn!(gateway = %gateway.meta.key(), %error, "it cannot be deployed; trying again");
                done.applied.remove(&gateway.meta.key());
                return Stage::Refused(format!("cannot be deployed: {error}"));
            }
            done.applied.insert(gateway.meta.key(), (wanted, Instant::now()));
        }
        Stage::Deployed { ready: deployments.get(&key).copied().unwrap_or_default() }
    }

    /// What the Gateway's ConfigMap changes; looked at again every few seconds.
    async fn parameters(&self, gateway: &Gateway, done: &mut Done) -> Result<Parameters, String> {
        let Some(name) = parameters::named(gateway)? else { return Ok(Parameters::default()) };
        let key = gateway.meta.key();
        if let Some((known, _)) = done.parameters.get(&key).filter(|(_, at)| at.elapsed() < RETRY) {
            return known.clone();
        }
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &key.namespace);
        let read = match maps.get_opt(name).await {
            Ok(Some(map)) => parameters::read(name, &map.data.unwrap_or_default()),
            Ok(None) => Err(format!("ConfigMap {name} of spec.infrastructure.parametersRef does not exist")),
            // The API server is away, or the like: what was known holds.
            Err(error) => match done.parameters.get(&key) {
                Some((known, _)) => known.clone(),
                None => Err(format!("ConfigMap {name} cannot be read: {error}")),
            },
        };
        done.parameters.insert(key, (read.clone(), Instant::now()));
        read
    }

    async fn apply(
        &self,
        wanted: &Manifests,
        gateway: &Gateway,
        key: &Key,
        known: bool,
    ) -> Result<(), kube::Error> {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), &key.namespace);
        if !known && let Some(other) = deployments.get_opt(&key.name).await? {
            let ours = other.labels().get(NAME_LABEL) == Some(&gateway.meta.name);
            if !ours {
                let why = format!("Deployment {key} exists and is not of this Gateway; rename one of them");
                return Err(kube::Error::Service(why.into()));
            }
        }
        let parts = [
            ("", "ServiceAccount", &wanted.service_account),
            ("apps", "Deployment", &wanted.deployment),
            ("", "Service", &wanted.service),
        ];
        for (group, kind, body) in parts {
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), &key.namespace, &resource(group, "v1", kind));
            api.patch(&key.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(body)).await?;
        }
        info!(gateway = %gateway.meta.key(), class = gateway.class, "deployed");
        Ok(())
    }

    /// Writes the Gateway's status.
    async fn say(&self, gateway: &Gateway, stage: &Stage, published: &Published, done: &mut Done) {
        let object = ObjectRef::of(Kind::Gateway, &gateway.meta);
        let Some(stored) = self.observed.get(&object).filter(|s| s.generation == gateway.meta.generation)
        else {
            return;
        };
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let said = merge(published.conditions.iter().filter(|c| c.object == object));
        let key = gateway.meta.key();
        let present = Present {
            place: place(gateway),
            listeners: published.attachments.listeners.get(&key).map(Vec::as_slice),
            objects: published.objects(),
            mesh: &published.mesh,
        };
        let status = status::status(gateway, stage, said, &present, &stored, &now);
        let Some(status) = status else { return };
        if done.written.get(&key).is_some_and(|(last, at)| *last == status && at.elapsed() < RETRY) {
            return;
        }
        let (group, version) = stored.api_version.split_once('/').unwrap_or(("", &stored.api_version));
        let resource = resource(group, version, "Gateway");
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &key.namespace, &resource);
        let body = json!({
            "apiVersion": stored.api_version, "kind": "Gateway",
            "metadata": {"name": key.name, "namespace": key.namespace}, "status": status,
        });
        match api.patch_status(&key.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await {
            Ok(_) => debug!(gateway = %key, "status written"),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => warn!(gateway = %key, %error, "the status cannot be written"),
        }
        done.written.insert(key, (status, Instant::now()));
    }

    fn class_api(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &resource("gateway.networking.k8s.io", "v1", "GatewayClass"))
    }

    /// Makes the classes, where the cluster has the Gateway API, and accepts those that others have made with a controller
    /// of ours.
    async fn classes(&self) {
        let api = self.class_api();
        let waypoints = WAYPOINT_CLASSES.iter().map(|class| (class, "Waypoints of the mesh"));
        let gateways = GATEWAY_CLASSES.iter().map(|class| (class, "Gateways: ways into the mesh"));
        for ((name, controller), description) in waypoints.chain(gateways) {
            match self.class(&api, name, controller, description).await {
                Ok(()) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => return,
                Err(error) => warn!(class = name, %error, "the GatewayClass cannot be made"),
            }
        }
        let all = match api.list(&ListParams::default()).await {
            Ok(all) => all,
            Err(error) => return warn!(%error, "the GatewayClasses cannot be listed"),
        };
        for class in all {
            let said = class.data["spec"]["controllerName"].as_str();
            if said.is_some()
                && controller_of("", said).is_some()
                && let Err(error) = self.accept(&api, &class).await
            {
                warn!(class = class.name_any(), %error, "the GatewayClass cannot be accepted");
            }
        }
    }

    async fn class(
        &self,
        api: &Api<DynamicObject>,
        name: &str,
        controller: &str,
        description: &str,
    ) -> Result<(), kube::Error> {
        if api.get_opt(name).await?.is_none() {
            let mut body = class_head(name);
            body["spec"] = json!({"controllerName": controller, "description": description});
            api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await?;
        }
        Ok(())
    }

    /// Says of a class that its Gateways are served, unless its status says so.
    async fn accept(&self, api: &Api<DynamicObject>, class: &DynamicObject) -> Result<(), kube::Error> {
        let generation = class.metadata.generation.unwrap_or_default();
        let mut said = class.data["status"]["conditions"].as_array().into_iter().flatten();
        if said.any(|c| {
            c["type"] == "Accepted" && c["status"] == "True" && c["observedGeneration"] == generation
        }) {
            return Ok(());
        }
        let name = class.name_any();
        let mut body = class_head(&name);
        body["status"] = json!({"conditions": [{
            "type": "Accepted", "status": "True", "reason": "Accepted", "message": "served by mesh-control",
            "observedGeneration": generation,
            "lastTransitionTime": humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        }]});
        api.patch_status(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await.map(drop)
    }
}

fn class_head(name: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass", "metadata": {"name": name}})
}

/// Whether somebody deploys what a Gateway stands for himself: `spec.addresses` says where it is. For a gateway that is a
/// host name; an IP address is one that its load balancer should take.
fn is_manual(gateway: &Gateway) -> bool {
    let is_host = |host: &GatewayHost| matches!(host, GatewayHost::Hostname(_));
    !gateway.manual.is_empty() && (gateway.is_waypoint() || gateway.manual.iter().any(is_host))
}

/// Somebody's object that has the name which ours would get.
fn foreign(gateway: &Gateway, published: &Published) -> Option<String> {
    let (objects, key) = (published.objects(), place(gateway));
    let is_foreign = |meta: &Meta| meta.label(NAME_LABEL) != Some(&gateway.meta.name);
    let service = objects.services.get(&key).filter(|s| is_foreign(&s.meta)).map(|_| "Service");
    let account =
        objects.service_accounts.get(&key).filter(|a| is_foreign(&a.meta)).map(|_| "ServiceAccount");
    let kind = service.or(account)?;
    Some(format!("{kind} {key} exists and is not of this Gateway; rename one of them"))
}

fn take(event: Event<Deployment>, all: &mut Deployments, listing: &mut Option<Deployments>) {
    let key = |d: &Deployment| Key::new(d.namespace().unwrap_or_default(), d.name_any());
    let ready =
        |d: &Deployment| i64::from(d.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or_default());
    match event {
        Event::Init => *listing = Some(Deployments::new()),
        Event::InitApply(d) => listing.get_or_insert_default().extend([(key(&d), ready(&d))]),
        Event::InitDone => *all = listing.take().unwrap_or_default(),
        Event::Apply(d) => drop(all.insert(key(&d), ready(&d))),
        Event::Delete(d) => drop(all.remove(&key(&d))),
    }
}
