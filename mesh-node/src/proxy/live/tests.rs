use std::net::{IpAddr, SocketAddr};

use mesh_core::xds::proto::security;

use super::*;
use crate::proxy::tests::bed::{mesh, pod, policy};

fn ip(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

fn conn(port: u16) -> Conn {
    Conn { src: SocketAddr::new(ip(1), 1000), identity: None, dst: SocketAddr::new(ip(2), port) }
}

fn deny_port(port: u32) -> MeshState {
    mesh(ip(1), ip(2), |index| {
        let matches = vec![security::Match { destination_ports: vec![port], ..Default::default() }];
        let rule = security::Rule { clauses: vec![security::Clause { matches }] };
        index.apply_policy(&policy("port", security::Action::Deny as i32, vec![rule])).unwrap();
    })
}

#[tokio::test]
async fn only_connections_that_are_no_longer_allowed_end() {
    let registry = Registry::default();
    let pod = pod("b", ip(2), "n2");
    let (kept, cut) = (registry.register(&pod, conn(80)), registry.register(&pod, conn(81)));
    assert_eq!(registry.reevaluate(&deny_port(81)), 1);
    assert_eq!(cut.denied().await.decided_by.as_deref(), Some("AuthorizationPolicy shop/port"));
    assert!(futures_util::poll!(std::pin::pin!(kept.denied())).is_pending());
    assert_eq!(registry.reevaluate(&deny_port(81)), 0, "an end is told once");
}

#[tokio::test]
async fn a_connection_that_waits_already_is_woken() {
    let registry = Registry::default();
    let cut = registry.register(&pod("b", ip(2), "n2"), conn(81));
    let mut denied = std::pin::pin!(cut.denied());
    assert!(futures_util::poll!(&mut denied).is_pending());
    registry.reevaluate(&deny_port(81));
    assert!(futures_util::poll!(&mut denied).is_ready());
}

#[test]
fn an_ended_connection_is_no_longer_registered() {
    let registry = Registry::default();
    let connection = registry.register(&pod("b", ip(2), "n2"), conn(81));
    assert_eq!(registry.len(), 1);
    drop(connection);
    assert!(registry.is_empty());
}

#[test]
fn a_pod_that_is_no_longer_announced_keeps_its_connections_until_it_leaves() {
    let registry = Registry::default();
    let _connection = registry.register(&pod("c", ip(3), "n2"), conn(81));
    assert_eq!(registry.reevaluate(&deny_port(81)), 0);
}
