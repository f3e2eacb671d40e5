//! Whatever a control plane sends: responses of delta ADS, one after the other, into a node's model. Input: messages
//! `DeltaDiscoveryResponse`, each after its length.
//!
//! - The model is that of the last good version of what was not removed, whatever came in between.
//! - A rejected resource changes nothing.
//! - Every response gets its answer: the nonce, and an error if and only if something was rejected.
//! - A value that a policy's reader does not understand makes the policy stricter, never wider.
//! - Routing decides, or says why not, for every address that the model knows.
#![no_main]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use mesh_core::identity::SpiffeId;
use mesh_core::policy::{Conn, Policy, PolicySet, evaluate};
use mesh_core::route::{self, Outbound};
use mesh_core::state::{MeshOptions, MeshState, Service, StateIndex};
use mesh_core::xds::delta::{DeltaState, Handler};
use mesh_core::xds::proto::discovery::DeltaDiscoveryResponse;
use mesh_core::xds::proto::security::{self, Authorization};
use mesh_core::xds::proto::workload::{self as wire, Address, address::Type};
use prost::Message as _;

/// A node's model, and what should be in it.
struct Model {
    index: StateIndex,
    workloads: BTreeMap<String, Address>,
    services: BTreeMap<String, Address>,
    policies: BTreeMap<String, Authorization>,
    commits: usize,
}

fn index() -> StateIndex {
    StateIndex::new(MeshOptions::default())
}

impl Handler for Model {
    fn address(&mut self, name: &str, address: &Address) -> Result<(), String> {
        let before = self.index.snapshot().version();
        if let Err(error) = self.index.apply_address(name, address) {
            assert_eq!(self.index.snapshot().version(), before, "a rejected resource changes nothing");
            return Err(error.to_string());
        }
        match address.r#type.as_ref().expect("it was taken") {
            Type::Workload(workload) => self.workloads.insert(workload.uid.clone(), address.clone()),
            Type::Service(service) => self.services.insert(key(service), address.clone()),
        };
        Ok(())
    }

    fn remove_address(&mut self, name: &str) {
        self.index.remove_address(name);
        let is_service = name.split_once('/').is_some_and(|(_, host)| !host.contains('/'));
        if self.workloads.remove(name).is_none() && is_service {
            self.services.remove(name);
        }
    }

    fn policy(&mut self, _name: &str, policy: &Authorization) -> Result<(), String> {
        let before = self.index.snapshot().policy_version();
        if let Err(error) = self.index.apply_policy(policy) {
            assert_eq!(self.index.snapshot().policy_version(), before, "a rejected policy changes nothing");
            return Err(error.to_string());
        }
        self.policies.insert(format!("{}/{}", policy.namespace, policy.name), policy.clone());
        stricter(policy);
        Ok(())
    }

    fn remove_policy(&mut self, name: &str) {
        self.index.remove_policy(name);
        self.policies.remove(name);
    }

    fn commit(&mut self, _synced: bool) {
        self.commits += 1;
    }
}

fn key(service: &wire::Service) -> String {
    Service::decode(service).expect("it was taken").host.key().to_string()
}

fuzz_target!(|data: &[u8]| {
    let mut model = Model {
        index: index(),
        workloads: BTreeMap::new(),
        services: BTreeMap::new(),
        policies: BTreeMap::new(),
        commits: 0,
    };
    let mut client = DeltaState::new(Default::default());
    let mut rest = data;
    let mut known = 0;
    while let Ok(response) = DeltaDiscoveryResponse::decode_length_delimited(&mut rest) {
        let nonce = response.nonce.clone();
        let received = client.receive(response, &mut model);
        known += usize::from(received.type_url.is_some());
        assert_eq!(received.answer.response_nonce, nonce);
        assert_eq!(received.answer.error_detail.is_some(), !received.rejected.is_empty());
        if rest.is_empty() {
            break;
        }
    }
    assert_eq!(model.commits, known, "every response of a type that was asked for is published");
    let lived = model.index.snapshot();
    assert_eq!(seen(&lived), seen(&rebuilt(&model)));
    routes(&lived);
});

/// A model that never knew anything else.
fn rebuilt(model: &Model) -> Arc<MeshState> {
    let mut fresh = index();
    for address in model.services.values().chain(model.workloads.values()) {
        fresh.apply_address("", address).expect("it was taken before");
    }
    for policy in model.policies.values() {
        fresh.apply_policy(policy).expect("it was taken before");
    }
    fresh.snapshot()
}

/// What does not depend on the order of arrival.
fn seen(state: &MeshState) -> (serde_json::Value, serde_json::Value, BTreeMap<String, Vec<String>>) {
    let endpoints = state.services().map(|service| {
        let mut uids: Vec<String> =
            service.all_endpoints().map(|e| format!("{} {:?}", e.workload.uid, e.ports)).collect();
        uids.sort();
        (format!("{:?}", service.service), uids)
    });
    (state.dump_workloads(), state.dump_policies(), endpoints.collect())
}

/// Routes of every workload to every address, and into every workload.
fn routes(state: &MeshState) {
    const MOST: usize = 8;
    let ports = [80, 8080, 15008];
    let mut rng = fastrand::Rng::with_seed(1);
    let vips = state.services().flat_map(|s| s.service.vips.iter().map(|vip| vip.ip)).take(MOST);
    let pods = state.workloads().flat_map(|w| w.addresses.iter().copied()).take(MOST);
    let unknown = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))];
    let destinations: Vec<IpAddr> = vips.chain(pods).chain(unknown).collect();
    for workload in state.workloads().take(MOST) {
        let client = workload.addresses.first().copied().unwrap_or(unknown[1]);
        for destination in &destinations {
            for port in ports {
                let to = SocketAddr::new(*destination, port);
                let ask = Outbound {
                    source: workload,
                    client,
                    destination: to,
                    excluded: &[],
                    illegal_ports: &[15008],
                };
                let _ = route::outbound(state, &ask, &mut rng);
                if let Ok(target) = route::inbound(state, workload, client, &to.into(), &[15008]) {
                    assert_eq!(
                        target.address.ip(),
                        client.to_canonical(),
                        "a tunnel leads to its own pod only"
                    );
                }
            }
        }
        let _ = workload.settings();
        let _ = state.policies_for(workload);
    }
}

/// Puts a value that nobody can read into every list of the policy that is not empty, and compares.
fn stricter(policy: &Authorization) {
    let mut unread = policy.clone();
    for m in unread.rules.iter_mut().flat_map(|r| &mut r.clauses).flat_map(|c| &mut c.matches) {
        let text = security::StringMatch { match_type: None };
        let net = security::Address { address: vec![1], length: 8 };
        for list in [&mut m.namespaces, &mut m.not_namespaces, &mut m.principals, &mut m.not_principals] {
            blur(list, &text);
        }
        for list in
            [&mut m.source_ips, &mut m.not_source_ips, &mut m.destination_ips, &mut m.not_destination_ips]
        {
            blur(list, &net);
        }
        for list in [&mut m.destination_ports, &mut m.not_destination_ports] {
            blur(list, &70_000);
        }
    }
    let (Ok(read), Ok(unread)) = (Policy::decode(policy), Policy::decode(&unread)) else {
        panic!("unreadable values are no reason to reject a policy");
    };
    if read.is_partly_unreadable() || read.dry_run {
        return;
    }
    let action = read.action;
    let (read, unread) = (alone(read), alone(unread));
    for conn in connections() {
        let (with, without) = (evaluate(&unread, &conn), evaluate(&read, &conn));
        assert!(without.is_allowed() || !with.is_allowed(), "{action:?} became wider for {conn:?}");
    }
}

fn blur<T: Clone>(list: &mut Vec<T>, with: &T) {
    if !list.is_empty() {
        list.push(with.clone());
    }
}

fn alone(policy: Policy) -> PolicySet {
    PolicySet { policies: vec![Arc::new(policy)], unknown: Vec::new() }
}

fn connections() -> Vec<Conn> {
    let identities =
        [None, Some(SpiffeId::new("cluster.local", "shop", "cart")), Some(SpiffeId::new("x", "y", "z"))];
    let ends = [("10.0.0.1:1", "10.0.0.2:80"), ("[fd00::1]:1", "[fd00::2]:8080")];
    let mut all = Vec::new();
    for identity in identities {
        for (src, dst) in ends {
            let parse = |text: &str| text.parse().expect("an address");
            all.push(Conn { src: parse(src), identity: identity.clone(), dst: parse(dst) });
        }
    }
    all
}
