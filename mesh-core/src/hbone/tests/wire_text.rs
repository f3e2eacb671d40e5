//! Authority, baggage, headers: pure encoding and parsing.

use std::net::SocketAddr;

use http::{HeaderValue, Method, Request, StatusCode};
use proptest::prelude::*;

use super::super::authority::InvalidAuthority;
use super::super::baggage::WorkloadType;
use super::*;
use crate::error::Code;

fn host(host: &str, port: u16) -> Authority {
    Authority::Host { host: host.into(), port }
}

#[test]
fn an_authority_is_an_address_with_a_port_or_a_host_with_a_port() {
    let socket = |text: &str| Authority::Socket(text.parse().unwrap());
    for (text, expected) in [
        ("10.1.2.3:80", socket("10.1.2.3:80")),
        ("[fd00::1]:65535", socket("[fd00::1]:65535")),
        ("[::ffff:10.1.2.3]:80", socket("10.1.2.3:80")),
        ("pay.shop.svc.cluster.local:8080", host("pay.shop.svc.cluster.local", 8080)),
        ("PAY.shop.svc:1", host("pay.shop.svc", 1)),
        ("pay.shop.svc.:1", host("pay.shop.svc", 1)),
        ("a_b-c:1", host("a_b-c", 1)),
    ] {
        assert_eq!(text.parse(), Ok(expected), "{text}");
    }
}

#[test]
fn an_authority_that_names_no_destination_says_what_is_wrong() {
    use InvalidAuthority as Bad;
    type Kind = fn(String) -> InvalidAuthority;
    for (text, kind) in [
        ("", Bad::NoPort as Kind),
        ("10.1.2.3", Bad::NoPort),
        ("pay.shop", Bad::NoPort),
        ("10.1.2.3:", Bad::BadHost),
        ("pay:", Bad::BadPort),
        ("pay:0", Bad::BadPort),
        ("10.1.2.3:0", Bad::BadPort),
        ("pay:65536", Bad::BadPort),
        ("pay:+80", Bad::BadPort),
        ("pay:http", Bad::BadPort),
        ("fd00::1:80", Bad::BadHost),
        ("[fd00::1]", Bad::NoPort),
        ("[fd00::1]:99999", Bad::BadHost),
        (":80", Bad::BadHost),
        ("a..b:80", Bad::BadHost),
        ("user@pay:80", Bad::BadHost),
        ("pay/x:80", Bad::BadHost),
        ("1.2.3.4.5:80", Bad::BadHost),
        ("999.1.1.1:80", Bad::BadHost),
        ("a b:80", Bad::BadHost),
    ] {
        assert_eq!(text.parse::<Authority>(), Err(kind(text.to_owned())), "{text:?}");
    }
    let long = format!("{}:80", "a".repeat(100_000));
    let error = long.parse::<Authority>().unwrap_err().to_string();
    assert!(error.len() < 200, "a peer's text is cut in our logs: {} bytes", error.len());
}

#[test]
fn a_request_carries_exactly_the_headers_that_are_set() {
    let mut connect = to_pay();
    let request = connect.encode().unwrap();
    assert_eq!(request.method(), Method::CONNECT);
    assert_eq!(request.uri().to_string(), "10.0.0.7:8080");
    assert!(request.uri().scheme().is_none() && request.uri().path().is_empty());
    assert!(request.headers().is_empty());

    connect.forwarded =
        Some(Forwarded { client: "10.0.0.1:999".parse().ok(), host: Some("pay.shop.svc".into()) });
    connect.traceparent = Some(TraceParent { trace: 0xabc, span: 0xd });
    connect.network = Some("west".into());
    connect.baggage = Baggage { namespace: "shop".into(), ..Baggage::default() }.to_header();
    let request = connect.encode().unwrap();
    let mut headers: Vec<_> =
        request.headers().iter().map(|(k, v)| format!("{k}: {}", v.to_str().unwrap())).collect();
    headers.sort();
    assert_eq!(
        headers,
        [
            "baggage: k8s.namespace.name=shop",
            "forwarded: for=\"10.0.0.1:999\";host=pay.shop.svc",
            "traceparent: 00-00000000000000000000000000000abc-000000000000000d-00",
            "x-forwarded-network: west",
        ]
    );
    assert_eq!(ConnectRequest::parse(&request).unwrap(), connect);
}

#[test]
fn a_request_that_is_no_connect_is_a_400_with_a_code() {
    let get = Request::get("http://10.0.0.7:8080/").body(()).unwrap();
    let error = ConnectRequest::parse(&get).unwrap_err();
    assert_eq!((error.status(), error.code()), (StatusCode::BAD_REQUEST, Code::ConnectMethod));
    assert_eq!(error.to_string(), "the tunnel takes only CONNECT, not GET");

    let nowhere = Request::builder().method(Method::CONNECT).uri("/").body(()).unwrap();
    let error = ConnectRequest::parse(&nowhere).unwrap_err();
    assert_eq!((error.status(), error.code()), (StatusCode::BAD_REQUEST, Code::ConnectAuthority));

    let no_port = Request::builder().method(Method::CONNECT).uri("pay.shop.svc").body(()).unwrap();
    let error = ConnectRequest::parse(&no_port).unwrap_err();
    assert_eq!((error.status(), error.code()), (StatusCode::BAD_REQUEST, Code::ConnectAuthority));
    assert!(error.to_string().contains("has no port"), "{error}");
}

#[test]
fn headers_that_cannot_be_read_count_as_absent() {
    let mut request = to_pay().encode().unwrap();
    let headers = request.headers_mut();
    headers.insert("forwarded", HeaderValue::from_static("by=me;proto=http"));
    headers.insert("traceparent", HeaderValue::from_static("01-xyz"));
    headers.insert("x-forwarded-network", HeaderValue::from_bytes(b"\xff").unwrap());
    assert_eq!(ConnectRequest::parse(&request).unwrap(), to_pay());
}

#[test]
fn forwarded_is_read_from_any_spelling_of_its_first_element() {
    let read = |text: &str| Forwarded::parse(text);
    let both = Forwarded { client: "[fd00::1]:80".parse().ok(), host: Some("pay".into()) };
    assert_eq!(read("For=\"[fd00::1]:80\"; Host=\"pay\""), Some(both.clone()));
    assert_eq!(read("for=\"[fd00::1]:80\";host=pay,for=x;host=other"), Some(both));
    assert_eq!(read("for=_hidden;host=pay"), Some(Forwarded { client: None, host: Some("pay".into()) }));
    assert_eq!(read("host="), None);
    assert_eq!(read(""), None);
}

#[test]
fn baggage_has_its_keys_in_the_order_of_the_reference_and_leaves_empty_ones_out() {
    let baggage = Baggage {
        cluster: "Kubernetes".into(),
        namespace: "shop".into(),
        workload_type: WorkloadType::Deployment,
        workload_name: "pay".into(),
        service_name: "pay".into(),
        service_version: "v1".into(),
        region: "r1".into(),
        zone: "z1".into(),
    };
    let header = baggage.to_header().unwrap();
    let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=pay,service.name=pay,\
                service.version=v1,cloud.region=r1,cloud.availability_zone=z1";
    assert_eq!(header.0, text);
    assert_eq!(header.parse(), baggage);
    assert_eq!(Baggage::default().to_header(), None);
    let only_zone = Baggage { zone: "z".into(), ..Baggage::default() };
    assert_eq!(only_zone.to_header().unwrap().0, "cloud.availability_zone=z");
}

#[test]
fn a_value_that_the_grammar_cannot_carry_is_left_out() {
    for bad in ["a,k8s.namespace.name=kube-system", "a=b", "a b", "ä", "a\n"] {
        let baggage = Baggage { service_name: bad.into(), zone: "z".into(), ..Baggage::default() };
        assert_eq!(baggage.to_header().unwrap().0, "cloud.availability_zone=z", "{bad:?}");
    }
}

#[test]
fn baggage_spans_lines_ignores_unknown_keys_and_takes_the_element_after_the_first_equals_sign() {
    let mut request = to_pay().encode().unwrap();
    let headers = request.headers_mut();
    headers.append("baggage", HeaderValue::from_static("k8s.cluster.name=c, k8s.job.name = j ,x=y"));
    headers.append("baggage", HeaderValue::from_static("service.name=s=t,service.version=,,=,nonsense"));
    let baggage = ConnectRequest::parse(&request).unwrap().baggage.unwrap().parse();
    let expected = Baggage {
        cluster: "c".into(),
        workload_type: WorkloadType::Job,
        workload_name: "j".into(),
        service_name: "s".into(),
        ..Baggage::default()
    };
    assert_eq!(baggage, expected);
}

#[test]
fn a_traceparent_is_version_00_in_lower_case_hex_with_ids_other_than_zero() {
    let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let parent: TraceParent = good.parse().unwrap();
    assert_eq!(parent.to_string(), format!("{}00", &good[..good.len() - 2]));
    for bad in [
        "",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ] {
        assert!(bad.parse::<TraceParent>().is_err(), "{bad}");
    }
    let random = TraceParent::random();
    assert_eq!(random.to_string().parse(), Ok(random));
}

fn text() -> impl Strategy<Value = String> {
    // Mostly what the grammars are made of, so that the parsers get past their first test.
    "([a-z0-9.:=;,\\[\\]\"%+ -]|\\PC){0,60}"
}

proptest! {
    #[test]
    fn whatever_parses_as_an_authority_prints_and_parses_as_the_same(text in text()) {
        if let Ok(authority) = text.parse::<Authority>() {
            prop_assert_eq!(authority.to_string().parse(), Ok(authority.clone()));
            let encoded = ConnectRequest::to(authority.clone()).encode().unwrap();
            prop_assert_eq!(ConnectRequest::parse(&encoded).unwrap().authority, authority);
        }
    }

    #[test]
    fn every_socket_address_with_a_port_survives_the_wire(ip: std::net::IpAddr, port in 1u16..) {
        let request = ConnectRequest::to(SocketAddr::new(ip, port)).encode().unwrap();
        let read = ConnectRequest::parse(&request).unwrap().authority;
        prop_assert_eq!(read, Authority::Socket(SocketAddr::new(ip.to_canonical(), port)));
    }

    #[test]
    fn no_header_makes_parsing_panic_or_fail(name in 0..4usize, value: Vec<u8>) {
        let mut request = to_pay().encode().unwrap();
        let name = ["baggage", "forwarded", "traceparent", "x-forwarded-network"][name];
        if let Ok(value) = HeaderValue::from_bytes(&value) {
            request.headers_mut().append(name, value.clone());
            request.headers_mut().append(name, value);
        }
        let read = ConnectRequest::parse(&request).unwrap();
        let _ = read.baggage.map(|b| b.parse());
    }

    #[test]
    fn baggage_that_can_be_written_is_read_back(
        fields in proptest::array::uniform7("[a-zA-Z0-9._/-]{0,12}"), kind in 0..4usize
    ) {
        let [cluster, namespace, workload_name, service_name, service_version, region, zone] = fields;
        let workload_type = if workload_name.is_empty() {
            WorkloadType::Pod
        } else {
            [WorkloadType::Deployment, WorkloadType::CronJob, WorkloadType::Pod, WorkloadType::Job][kind]
        };
        let baggage = Baggage {
            cluster, namespace, workload_type, workload_name, service_name, service_version, region, zone,
        };
        let read = baggage.to_header().map(|h| h.parse()).unwrap_or_default();
        prop_assert_eq!(read, baggage);
    }
}
