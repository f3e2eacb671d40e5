//! Whatever a pod sends to port 53: read, decided, answered; and whatever a server sends back. Nothing panics, every
//! answer is a message with the query's id that fits the client, and no answer is ever answered.
#![no_main]

use std::sync::{Arc, LazyLock};

use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;
use mesh_core::state::{MeshOptions, MeshState, StateIndex};
use mesh_core::xds::proto::workload as wire;
use mesh_node::dns::{Client, ClusterDomain, Outcome, Rules, answer, message};

const POD: &str = "Kubernetes//Pod/shop/client";

/// A pod, a service, a headless one with many endpoints, a wildcard host.
static MESH: LazyLock<Arc<MeshState>> = LazyLock::new(|| {
    use wire::address::Type;
    let service = |hostname: &str, vip: Option<[u8; 4]>| wire::Service {
        name: "s".into(),
        namespace: "shop".into(),
        hostname: hostname.into(),
        addresses: vip
            .map(|ip| wire::NetworkAddress { network: String::new(), address: ip.to_vec(), length: None })
            .into_iter()
            .collect(),
        ..Default::default()
    };
    let pod = |uid: String, ip: [u8; 4], service: &str| wire::Workload {
        uid,
        name: "client".into(),
        namespace: "shop".into(),
        addresses: vec![ip.to_vec()],
        services: [(service.to_owned(), wire::PortList::default())].into(),
        ..Default::default()
    };
    let mut index = StateIndex::new(MeshOptions::default());
    let pods = (0..200).map(|i| pod(format!("p{i}"), [10, 0, 1, i], "shop/b.shop.svc.cluster.local"));
    let resources = [
        Type::Service(service("a.shop.svc.cluster.local", Some([10, 0, 0, 1]))),
        Type::Service(service("b.shop.svc.cluster.local", None)),
        Type::Service(service("*.com", Some([240, 240, 0, 1]))),
        Type::Workload(pod(POD.into(), [10, 0, 0, 2], "")),
    ];
    for resource in resources.into_iter().chain(pods.map(Type::Workload)) {
        index.apply_address("sample", &wire::Address { r#type: Some(resource) }).expect("well-formed");
    }
    index.snapshot()
});

static RULES: LazyLock<Rules> =
    LazyLock::new(|| Rules { domain: ClusterDomain::new("cluster.local"), preferred_namespace: None });

fuzz_target!(|data: &[u8]| {
    match message::read(data) {
        Err(refused) => {
            if let Some(reply) = refused.reply {
                check(&reply, data, usize::from(u16::MAX));
            }
        }
        Ok(query) => {
            let search = RULES.domain.default_search("shop");
            let workload = MESH.workload(POD).expect("in the sample");
            let client = Client { workload, search: &search };
            let mut rng = fastrand::Rng::with_seed(1);
            if let Outcome::Reply(reply) = answer(&query.message, Some(client), &MESH, &RULES, &mut rng) {
                let limit = query.udp_limit();
                check(&message::encode(&reply, limit), data, limit);
            }
            // The same bytes as what a server sent.
            assert!(!message::is_answer(data, data, &query.question), "a query is no answer");
            let mut echo = data.to_vec();
            echo[2] |= 0x80;
            assert!(message::is_answer(&echo, data, &query.question));
            assert!(message::is_truncated(&message::cut(&echo, &query.question)));
        }
    }
});

fn check(reply: &[u8], query: &[u8], limit: usize) {
    assert!(reply.len() <= limit && reply[..2] == query[..2]);
    Message::from_vec(reply).expect("what we send can be read");
    assert_eq!(message::read(reply).expect_err("no answer is a query").reply, None);
}
