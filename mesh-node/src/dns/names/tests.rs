use super::*;
use std::str::FromStr as _;

fn domain() -> ClusterDomain {
    ClusterDomain::new("cluster.local")
}

/// Candidates of a pod of namespace `shop` with the default search list: hostname, labels left.
fn of(name: &str) -> Vec<(String, Option<usize>)> {
    let search = domain().default_search("shop");
    candidates(name, "shop", &domain(), &search).into_iter().map(|c| (c.hostname, c.stripped)).collect()
}

fn asked(names: &[&str]) -> Vec<(String, Option<usize>)> {
    names.iter().map(|name| ((*name).to_owned(), None)).collect()
}

#[test]
fn one_label_is_a_service_of_the_own_namespace() {
    assert_eq!(of("cart"), asked(&["cart", "cart.shop.svc.cluster.local"]));
}

#[test]
fn two_labels_are_a_service_of_another_namespace_or_a_pod_of_a_service() {
    assert_eq!(
        of("cart.pay"),
        asked(&["cart.pay", "cart.pay.svc.cluster.local", "cart.pay.shop.svc.cluster.local"])
    );
}

#[test]
fn three_labels_lack_the_domain_if_they_end_in_svc() {
    assert_eq!(
        of("cart.pay.svc"),
        asked(&["cart.pay.svc", "cart.pay.svc.cluster.local", "cart.pay.svc.svc.cluster.local"])
    );
    assert_eq!(of("db-0.db.pay"), asked(&["db-0.db.pay", "db-0.db.pay.svc.cluster.local"]));
}

#[test]
fn four_labels_are_completed_only_if_they_end_in_svc() {
    assert_eq!(of("db-0.db.pay.svc"), asked(&["db-0.db.pay.svc", "db-0.db.pay.svc.cluster.local"]));
    assert_eq!(of("a.b.example.com"), asked(&["a.b.example.com"]));
}

#[test]
fn each_search_domain_is_taken_off_and_what_is_left_is_completed() {
    let left = |hostname: &str, labels| (hostname.to_owned(), Some(labels));
    let mut expected = asked(&["api.example.com.shop.svc.cluster.local"]);
    expected.extend([
        left("api.example.com", 3),
        left("api.example.com.svc.cluster.local", 3),
        left("api.example.com.shop", 4),
        left("api.example.com.shop.svc", 5),
    ]);
    assert_eq!(of("api.example.com.shop.svc.cluster.local"), expected);
}

#[test]
fn a_name_that_is_reached_twice_is_tried_once_and_as_it_was_asked() {
    // Taking off `shop.svc.cluster.local` and completing again leads back to the queried name.
    let list = of("cart.shop.svc.cluster.local");
    assert_eq!(list[0], ("cart.shop.svc.cluster.local".to_owned(), None));
    let mut names: Vec<_> = list.iter().map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), list.len(), "{list:?}");
}

#[test]
fn a_name_that_only_ends_like_a_search_domain_is_not_stripped() {
    assert_eq!(of("xcluster.local")[0], ("xcluster.local".to_owned(), None));
    assert!(of("xcluster.local").iter().all(|(_, stripped)| stripped.is_none()));
    assert!(of("cluster.local").iter().all(|(_, stripped)| stripped.is_none()), "nothing would be left");
}

#[test]
fn wildcards_go_from_the_longest_to_the_shortest() {
    assert_eq!(wildcards("a.b.c").collect::<Vec<_>>(), ["*.b.c", "*.c"]);
    assert_eq!(wildcards("a").count(), 0);
}

#[test]
fn a_query_is_looked_up_in_lower_case() {
    assert_eq!(text(&Name::from_str("CaRt.Shop.").unwrap()), Some("cart.shop".to_owned()));
}

#[test]
fn bytes_that_no_hostname_has_make_no_text() {
    assert_eq!(text(&Name::root()), None);
    for label in [&b"a.b"[..], b"a b", b"\xff", b"a/b", b"\0"] {
        assert_eq!(text(&Name::from_labels([label, b"c"]).unwrap()), None, "{label:?}");
    }
}

#[test]
fn search_lists_are_normalised_and_bounded() {
    let list: Vec<String> = ["Example.COM.", ".", "", "b"].map(str::to_owned).to_vec();
    assert_eq!(normal_search(&list), ["example.com", "b"]);
    assert_eq!(normal_search(&vec!["a".to_owned(); 100]).len(), MAX_SEARCH);
}

#[test]
fn a_cluster_without_a_domain_ends_in_svc() {
    let domain = ClusterDomain::new(".");
    assert_eq!(domain.default_search("shop"), ["shop.svc", "svc", ""]);
    assert!(domain.holds("cart.shop.svc"));
    assert!(!domain.holds("svc"));
}
