use super::*;

#[test]
fn each_of_istios_kinds_that_is_read_has_a_definition() {
    for info in kinds().filter(|info| info.group.ends_with(".istio.io")) {
        assert!(shape(info.kind).is_some(), "{} has none", info.kind);
    }
}

#[test]
fn each_definition_stores_one_version_and_serves_all_that_are_read() {
    for definition in all() {
        let versions = definition["spec"]["versions"].as_array().unwrap();
        assert_eq!(versions.iter().filter(|v| v["storage"] == true).count(), 1, "{definition:#}");
        assert!(versions.iter().all(|v| v["served"] == true));
    }
}

#[test]
fn the_chart_has_them_as_they_are() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/charts/undermesh/crds/istio.yaml");
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == yaml().unwrap(),
        "out of date: mesh-control definitions > deploy/charts/undermesh/crds/istio.yaml"
    );
}
