use super::*;

const LINGER: Duration = Duration::from_secs(5);

fn key(name: &str) -> PodKey {
    PodKey { namespace: "shop".into(), name: name.into(), service_account: "sa".into() }
}

fn info(name: &str, uid: &str) -> PodInfo {
    let json = serde_json::json!({
        "uid": uid, "name": name, "namespace": "shop", "service_account": "sa",
        "netns": format!("/run/netns/{uid}"), "cgroup": format!("/sys/fs/cgroup/{uid}"),
    });
    serde_json::from_value(json).unwrap()
}

fn wants(names: &[&str]) -> BTreeMap<PodKey, Wanted> {
    let wanted = Wanted { workload: "uid".into(), identity: SpiffeId::new("", "shop", "sa") };
    names.iter().map(|n| (key(n), wanted.clone())).collect()
}

fn has(pods: &[PodInfo]) -> HashMap<PodKey, PodInfo> {
    pods.iter().map(|p| (p.key(), p.clone())).collect()
}

fn holds(pods: &[PodInfo]) -> BTreeMap<PodKey, Held> {
    let held = |p: &PodInfo| Held { info: p.clone(), unwanted_since: None, alive: true };
    pods.iter().map(|p| (p.key(), held(p))).collect()
}

#[test]
fn a_wanted_pod_of_the_node_is_enrolled_once() {
    let (wanted, present) = (wants(&["a"]), has(&[info("a", "1")]));
    let now = Instant::now();
    let first = plan(&wanted, &present, &mut BTreeMap::new(), now, LINGER);
    assert_eq!(first, Plan { enrol: vec![key("a")], ..Plan::default() });
    let second = plan(&wanted, &present, &mut holds(&[info("a", "1")]), now, LINGER);
    assert_eq!(second, Plan::default());
}

#[test]
fn a_wanted_pod_that_the_node_does_not_have_is_missing() {
    let plan = plan(&wants(&["a"]), &has(&[]), &mut BTreeMap::new(), Instant::now(), LINGER);
    assert_eq!(plan.missing, [key("a")]);
}

#[test]
fn an_unwanted_pod_stays_for_the_linger_time_and_then_leaves() {
    let pods = [info("a", "1")];
    let (present, mut held) = (has(&pods), holds(&pods));
    let now = Instant::now();
    let first = plan(&wants(&[]), &present, &mut held, now, LINGER);
    assert_eq!(first, Plan { again: Some(LINGER), ..Plan::default() });
    let later = plan(&wants(&[]), &present, &mut held, now + Duration::from_secs(2), LINGER);
    assert_eq!(later.again, Some(Duration::from_secs(3)));
    let last = plan(&wants(&[]), &present, &mut held, now + LINGER, LINGER);
    assert_eq!(last, Plan { leave: vec![key("a")], ..Plan::default() });
}

#[test]
fn a_pod_that_is_wanted_again_in_time_starts_over() {
    let pods = [info("a", "1")];
    let (present, mut held) = (has(&pods), holds(&pods));
    let now = Instant::now();
    plan(&wants(&[]), &present, &mut held, now, LINGER);
    plan(&wants(&["a"]), &present, &mut held, now + Duration::from_secs(4), LINGER);
    let again = plan(&wants(&[]), &present, &mut held, now + Duration::from_secs(6), LINGER);
    assert!(again.leave.is_empty() && again.release.is_empty());
}

#[test]
fn a_pod_that_the_node_no_longer_has_goes_at_once() {
    let plan = plan(&wants(&["a"]), &has(&[]), &mut holds(&[info("a", "1")]), Instant::now(), LINGER);
    assert_eq!((plan.release, plan.missing), (vec![key("a")], vec![key("a")]));
}

#[test]
fn a_pod_that_was_replaced_under_its_name_is_let_go_and_enrolled_anew() {
    let present = has(&[info("a", "2")]);
    let plan = plan(&wants(&["a"]), &present, &mut holds(&[info("a", "1")]), Instant::now(), LINGER);
    assert_eq!((plan.release, plan.enrol), (vec![key("a")], vec![key("a")]));
}

#[test]
fn a_pod_whose_namespace_is_gone_is_let_go() {
    let pods = [info("a", "1")];
    let mut held = holds(&pods);
    held.get_mut(&key("a")).unwrap().alive = false;
    let plan = plan(&wants(&["a"]), &has(&pods), &mut held, Instant::now(), LINGER);
    assert_eq!((plan.release, plan.enrol), (vec![key("a")], vec![key("a")]));
}

#[test]
fn an_unwanted_pod_that_ends_while_it_lingers_is_gone_and_has_not_left() {
    let pods = [info("a", "1")];
    let mut held = holds(&pods);
    let now = Instant::now();
    plan(&wants(&[]), &has(&pods), &mut held, now, LINGER);
    let last = plan(&wants(&[]), &has(&[]), &mut held, now + LINGER, LINGER);
    assert_eq!(last, Plan { release: vec![key("a")], ..Plan::default() });
}
