//! Which tunnels a workload accepts, and for what.

use super::*;

fn arrive(
    mesh: &mut Mesh,
    local: &str,
    local_ip: &str,
    authority: &str,
) -> Result<InboundTarget, InboundError> {
    let workload = mesh.workload(local);
    inbound(&mesh.state(), &workload, ip(local_ip), &authority.parse().unwrap(), &ILLEGAL)
}

fn target(mesh: &mut Mesh, local: &str, local_ip: &str, authority: &str) -> String {
    arrive(mesh, local, local_ip, authority).unwrap().address.to_string()
}

fn local() -> Mesh {
    Mesh::default().with(pod("a", &["10.0.0.2", "2001:db8::2"]))
}

#[test]
fn the_address_of_the_connection_is_accepted_with_its_port() {
    let mut mesh = local();
    assert_eq!(target(&mut mesh, "a", "10.0.0.2", "10.0.0.2:8080"), "10.0.0.2:8080");
    assert_eq!(target(&mut mesh, "a", "2001:db8::2", "[2001:db8::2]:8080"), "[2001:db8::2]:8080");
    assert_eq!(target(&mut mesh, "a", "::ffff:10.0.0.2", "10.0.0.2:8080"), "10.0.0.2:8080");
}

#[test]
fn the_address_of_somebody_else_is_refused_with_400() {
    let mut mesh = local().with(pod("b", &["10.0.0.3"])).with(service("web", "10.1.0.1", &[(80, 8080)]));
    for authority in ["10.0.0.3:80", "10.1.0.1:80", "192.0.2.1:80", "127.0.0.1:80"] {
        let error = arrive(&mut mesh, "a", "10.0.0.2", authority).unwrap_err();
        assert_eq!((error.status(), error.code().code()), (400, "M0306"), "{authority}");
    }
    let error = arrive(&mut mesh, "a", "10.0.0.2", "10.0.0.3:80").unwrap_err();
    assert_eq!(error.to_string(), "ip mismatch: 10.0.0.3 != 10.0.0.2");
}

#[test]
fn our_own_ports_are_refused_with_503_however_they_are_named() {
    let mut mesh = local().with(pod("a", &["10.0.0.2"]).serving("web", &[(80, 15008)])).with(service(
        "web",
        "10.1.0.1",
        &[(80, 80)],
    ));
    for authority in ["10.0.0.2:15001", "10.0.0.2:15006", "10.0.0.2:15008", "web.shop.svc.cluster.local:80"] {
        let error = arrive(&mut mesh, "a", "10.0.0.2", authority).unwrap_err();
        assert_eq!((error.status(), error.code().code()), (503, "M0307"), "{authority}");
        assert_eq!(error.to_string(), "attempted recursive call to ourselves");
    }
}

#[test]
fn a_hostname_means_the_service_as_the_local_workload_sees_it() {
    let mut private = service("bank/vault", "", &[(80, 8080)]);
    private.visibility = wire::Visibility::Namespace.into();
    let mut mesh = Mesh::default()
        .with(service("web", "10.1.0.1", &[(80, 8080), (81, 0), (82, 0)]))
        .with(private)
        .with(pod("a", &["10.0.0.2"]).serving("web", &[(80, 9090), (81, 7070)]));
    let host = "web.shop.svc.cluster.local";
    let found = arrive(&mut mesh, "a", "10.0.0.2", &format!("{host}:80")).unwrap();
    assert_eq!(found.address.to_string(), "10.0.0.2:9090", "the endpoint's own mapping");
    assert_eq!(&*found.service.unwrap().name, "web");
    assert_eq!(target(&mut mesh, "a", "10.0.0.2", &format!("{host}:81")), "10.0.0.2:7070");
    for (authority, code) in [
        (format!("{host}:82"), "M0308"),
        (format!("{host}:83"), "M0308"),
        ("nowhere.example.com:80".to_owned(), "M0308"),
        ("vault.bank.svc.cluster.local:80".to_owned(), "M0308"),
    ] {
        let error = arrive(&mut mesh, "a", "10.0.0.2", &authority).unwrap_err();
        assert_eq!((error.status(), error.code().code()), (503, code), "{authority}");
    }
    let error = arrive(&mut mesh, "a", "10.0.0.2", "nowhere.example.com:80").unwrap_err();
    assert_eq!(error.to_string(), "no service or workload for hostname: nowhere.example.com");
}

#[test]
fn an_application_tunnel_takes_any_address_and_its_own_port() {
    let tunnel = |protocol, port| wire::Workload {
        application_tunnel: Some(wire::ApplicationTunnel { protocol, port }),
        ..pod("a", &["10.0.0.2"])
    };
    let mut mesh = Mesh::default().with(tunnel(1, 9000));
    let found = arrive(&mut mesh, "a", "10.0.0.2", "10.1.0.1:80").unwrap();
    assert_eq!((found.address.to_string().as_str(), found.proxy_protocol), ("10.0.0.2:9000", true));
    mesh.add(tunnel(0, 9000));
    assert!(!arrive(&mut mesh, "a", "10.0.0.2", "10.1.0.1:80").unwrap().proxy_protocol);
    mesh.add(tunnel(1, 0));
    assert_eq!(target(&mut mesh, "a", "10.0.0.2", "10.1.0.1:80"), "10.0.0.2:80");
    assert_eq!(arrive(&mut mesh, "a", "10.0.0.2", "10.1.0.1:15008").unwrap_err().status(), 503);
}

#[test]
fn a_waypoint_accepts_what_it_is_the_waypoint_of_and_sends_it_to_itself() {
    let behind = wire::Workload { waypoint: Some(waypoint_for("wp")), ..pod("b", &["10.0.0.3"]) };
    let mut by_ip = service("ip", "10.1.0.2", &[(80, 8080)]);
    by_ip.waypoint = Some(gateway_by_ip("", "10.0.0.100", 15008));
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let mut canary = service("canary", "10.1.0.3", &[(80, 8080)]);
    canary.waypoint = Some(waypoint_for("other"));
    canary.weighted_waypoints =
        vec![wire::WeightedWaypoint { destination: Some(waypoint_for("wp")), weight: 1 }];
    let mut foreign = service("foreign", "10.1.0.4", &[(80, 8080)]);
    foreign.waypoint = Some(waypoint_for("other"));
    let mut mesh = with_waypoint(local()).with(behind).with(by_ip).with(web).with(canary).with(foreign);
    for authority in ["10.0.0.3:80", "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80"] {
        let found = arrive(&mut mesh, "wp-1", "10.0.0.100", authority).unwrap();
        assert_eq!(found.address.to_string(), "10.0.0.100:80", "{authority}");
        assert_eq!(found.resolved_by, ResolvedBy::WaypointOf);
    }
    assert_eq!(arrive(&mut mesh, "wp-1", "10.0.0.100", "10.1.0.4:80").unwrap_err().status(), 400);
    assert_eq!(
        arrive(&mut mesh, "a", "10.0.0.2", "10.1.0.1:80").unwrap_err().status(),
        400,
        "another workload"
    );
}
