use super::*;

fn args() -> RunArgs {
    RunArgs {
        node: Some("n1".to_owned()),
        xds: Some("https://control:15012".to_owned()),
        ..RunArgs::default()
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn what_is_not_given_follows_from_what_is() {
    let config = args().load().unwrap();
    assert_eq!(config.ca.address, "https://control:15012");
    assert_eq!(config.capture.pin_dir, PathBuf::from("/sys/fs/bpf/undermesh/n1"));
    assert!(config.proxy.workers >= 1);
    assert_eq!(config.capture.fail, None);
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let file = file(
        "node: {clusterId: c9, network: n}\nproxy: {workers: 7, connectTimeout: 2s}\ncapture: {excludedPorts: [9000], excludedCidrs: [192.168.0.0/16]}\n",
    );
    let mut args = args();
    args.config = Some(file.path().to_owned());
    args.workers = Some(3);
    args.exclude_cidr = vec!["10.1.2.3/8".parse().unwrap()];
    let config = args.load().unwrap();
    assert_eq!(config.proxy.workers, 3);
    assert_eq!(config.capture.excluded_cidrs, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(config.capture.excluded_ports, [9000]);
    assert_eq!(config.proxy.connect_timeout, Duration::from_secs(2));
    assert_eq!(config.node.cluster_id, "c9");
    assert_eq!(config.node.cluster_domain, "cluster.local");
}

#[test]
fn an_unknown_field_of_the_file_is_refused_with_its_name() {
    let file = file("proxy:\n  workerz: 7\n");
    let mut args = args();
    args.config = Some(file.path().to_owned());
    let error = args.load().unwrap_err().to_string();
    assert!(error.contains("workerz"), "{error}");
}

#[test]
fn a_bad_duration_of_the_file_is_refused_with_its_text() {
    let file = file("drain: {limit: soon}\n");
    let mut args = args();
    args.config = Some(file.path().to_owned());
    let error = args.load().unwrap_err().to_string();
    assert!(error.contains("soon"), "{error}");
}

#[test]
fn values_that_cannot_work_are_refused_by_field() {
    type Change = fn(&mut RunArgs);
    let cases: [(&str, Change); 7] = [
        ("capture.excludedPorts", |a| a.exclude_port = vec![80, 0]),
        ("node.name", |a| a.node = None),
        ("node.name", |a| a.node = Some("a/b".to_owned())),
        ("xds.address", |a| a.xds = Some("control:15012".to_owned())),
        ("ca.address", |a| a.ca = Some("ftp://x:1".to_owned())),
        ("admin.address", |a| a.admin = Some("0.0.0.0:15000".parse().unwrap())),
        ("proxy.workers", |a| a.workers = Some(1000)),
    ];
    for (field, change) in cases {
        let mut args = args();
        change(&mut args);
        let error = args.load().unwrap_err().to_string();
        assert!(error.starts_with(field), "{field}: {error}");
    }
}

#[test]
fn a_config_survives_its_own_dump() {
    let config = args().load().unwrap();
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
}
