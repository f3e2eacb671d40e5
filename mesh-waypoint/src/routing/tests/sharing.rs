//! What a change of configuration compiles again.

use super::*;

fn rule_of(routes: &Routes, path: &str) -> Arc<crate::routing::Rule> {
    matched(routes, &get(path)).rule.clone()
}

#[test]
fn objects_that_did_not_change_are_not_compiled_again() {
    let vs = |name: &str, at: &str| route("VirtualService", name, [rule(name, [path(at)])]);
    let mut resources = resources([vs("a", "=/a"), vs("b", "=/b")]);
    let mesh = mesh();
    let before = Routes::build(&resources, &mesh, &own(), &Routes::default());
    resources.routes.insert("VirtualService/shop/c".into(), vs("c", "=/c").into());
    let after = Routes::build(&resources, &mesh, &own(), &before);
    assert_eq!(routed(&after, &get("/c")), "c");
    assert!(Arc::ptr_eq(&rule_of(&before, "/a"), &rule_of(&after, "/a")));
    resources.routes.insert("VirtualService/shop/a".into(), vs("a", "=/d").into());
    resources.routes.remove("VirtualService/shop/b");
    let last = Routes::build(&resources, &mesh, &own(), &after);
    assert_eq!(routed(&last, &get("/d")), "a");
    assert_eq!(routed(&last, &get("/a")), "404");
    assert_eq!(routed(&last, &get("/b")), "404");
    // What is in use stays as it was.
    assert_eq!(routed(&before, &get("/b")), "b");
}

#[test]
fn what_was_compiled_stays_in_force_without_what_it_was_compiled_from() {
    let vs = |name: &str, at: &str| route("VirtualService", name, [rule(name, [path(at)])]);
    let mut resources = resources([vs("a", "=/a"), vs("b", "=/b")]);
    let before = Routes::build(&resources, &mesh(), &own(), &Routes::default());
    before.settle(&mut resources.routes);
    resources.routes.insert("VirtualService/shop/c".into(), vs("c", "=/c").into());
    let after = Routes::build(&resources, &mesh(), &own(), &before);
    for name in ["a", "b", "c"] {
        assert_eq!(routed(&after, &get(&format!("/{name}"))), name);
    }
    assert!(Arc::ptr_eq(&rule_of(&before, "/a"), &rule_of(&after, "/a")));
    // Also where nothing is known of before.
    after.settle(&mut resources.routes);
    assert_eq!(routed(&Routes::build(&resources, &mesh(), &own(), &Routes::default()), &get("/c")), "c");
    // The same rule told anew is the same.
    resources.routes.insert("VirtualService/shop/a".into(), vs("a", "=/a").into());
    let again = Routes::build(&resources, &mesh(), &own(), &after);
    assert!(Arc::ptr_eq(&rule_of(&after, "/a"), &rule_of(&again, "/a")));
}

#[test]
fn of_an_object_only_the_rules_that_changed_are_compiled_again() {
    let of = |paths: &[&str]| {
        let rules = paths.iter().map(|at| rule(at, [path(at)]));
        resources([route("VirtualService", "v", rules)])
    };
    let mesh = mesh();
    let next = |paths: &[&str], previous: &Routes| Routes::build(&of(paths), &mesh, &own(), previous);
    let first = next(&["=/a", "=/b", "=/c"], &Routes::default());
    let second = next(&["=/a", "=/x", "=/c"], &first);
    assert!(Arc::ptr_eq(&rule_of(&first, "/a"), &rule_of(&second, "/a")));
    assert!(Arc::ptr_eq(&rule_of(&first, "/c"), &rule_of(&second, "/c")));
    assert_eq!(routed(&second, &get("/x")), "=/x");
    assert_eq!(routed(&second, &get("/b")), "404");
    // Rules that come or go in between, and twice the same.
    let third = next(&["=/a", "=/a", "=/c", "=/d"], &second);
    assert_eq!(routed(&third, &get("/a")), "=/a");
    assert_eq!(routed(&third, &get("/x")), "404");
    let fourth = next(&["=/d"], &third);
    assert!(Arc::ptr_eq(&rule_of(&third, "/d"), &rule_of(&fourth, "/d")));
    assert_eq!(routed(&fourth, &get("/a")), "404");
    let twice = next(&["=/d", "=/d"], &fourth);
    assert!(Arc::ptr_eq(&rule_of(&fourth, "/d"), &rule_of(&twice, "/d")));
    assert_eq!(routed(&next(&["=/d"], &twice), &get("/d")), "=/d");
}

#[test]
fn services_that_no_change_touches_keep_their_index() {
    let details = "details.shop.svc.cluster.local";
    let reviews = route("VirtualService", "r", [rule("r", [])]);
    let other = l7::Route {
        parents: vec![parent("shop", details, 0)],
        ..route("VirtualService", "d", [rule("d", [])])
    };
    let mut resources = resources([reviews, other]);
    let mesh = mesh();
    let before = Routes::build(&resources, &mesh, &own(), &Routes::default());
    resources.routes.insert("VirtualService/shop/r".into(), route("VirtualService", "r", []).into());
    let after = Routes::build(&resources, &mesh, &own(), &before);
    let of = |routes: &Routes, hostname: &str| routes.services[&*format!("shop/{hostname}")].clone();
    assert!(Arc::ptr_eq(&of(&before, details), &of(&after, details)));
    assert!(!Arc::ptr_eq(&of(&before, REVIEWS), &of(&after, REVIEWS)));
}

#[test]
fn a_change_of_the_objects_kind_is_seen() {
    let rules = || [rule("any", []), rule("exact", [path("=/a")])];
    let mesh = mesh();
    let build = |kind, previous: &Routes| {
        let resources = Resources {
            routes: [("one".to_owned(), route(kind, "one", rules()).into())].into(),
            ..Resources::default()
        };
        Routes::build(&resources, &mesh, &own(), previous)
    };
    let first = build("VirtualService", &Routes::default());
    let second = build("HTTPRoute", &first);
    assert_eq!(routed(&first, &get("/a")), "any");
    assert_eq!(routed(&second, &get("/a")), "exact");
    let path_of = |routes| matched(routes, &get("/b")).path;
    assert_eq!(path_of(&first), crate::routing::MatchedPath::Characters(1));
    assert_eq!(path_of(&second), crate::routing::MatchedPath::Segments(0));
}

#[test]
fn rules_apply_as_soon_as_the_service_is_known() {
    let resources = resources([route("VirtualService", "v", [rule("it", [])])]);
    let before = Routes::build(&resources, &mesh_of([]), &own(), &Routes::default());
    assert_eq!(routed(&before, &get("/")), "default");
    let after = Routes::build(&resources, &mesh(), &own(), &before);
    assert_eq!(routed(&after, &get("/")), "it");
}

#[test]
fn expressions_that_are_still_in_use_are_compiled_once() {
    let patterns = crate::routing::pattern::Patterns::default();
    let first = patterns.anywhere("a+b").unwrap();
    let second = patterns.anywhere("a+b").unwrap();
    assert!(Arc::ptr_eq(&first, &second));
    let weak = Arc::downgrade(&first);
    drop((first, second));
    assert!(weak.upgrade().is_none());
    // And those that are not are forgotten in time.
    for n in 0..1000 {
        drop(patterns.anywhere(&format!("a+{n}")).unwrap());
    }
    assert!(patterns.known() <= 200, "{}", patterns.known());
}
