//! Whatever the order in which resources come and go, the model is that of what is left.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// One message of a control plane about a few workloads and services.
#[derive(Debug, Clone)]
enum Event {
    Workload { name: u8, ip: u8, services: Vec<u8>, sick: bool },
    RemoveWorkload(u8),
    Service { name: u8, vip: u8, prefix: bool },
    RemoveService(u8),
}

fn event() -> impl Strategy<Value = Event> {
    let workload = (0..5_u8, 0..3_u8, prop::collection::vec(0..3_u8, 0..3), any::<bool>())
        .prop_map(|(name, ip, services, sick)| Event::Workload { name, ip, services, sick });
    let service = (0..3_u8, 0..2_u8, any::<bool>()).prop_map(|(name, vip, prefix)| Event::Service {
        name,
        vip,
        prefix,
    });
    prop_oneof![
        4 => workload,
        2 => (0..5_u8).prop_map(Event::RemoveWorkload),
        3 => service,
        1 => (0..3_u8).prop_map(Event::RemoveService),
    ]
}

/// Addresses of different workloads and services differ, so that no rank depends on the order of arrival.
fn resource(event: &Event) -> Resource {
    match event {
        Event::Workload { name, ip, services, sick } => {
            let mut it = pod(&format!("w{name}"), &[&format!("10.0.{name}.{ip}")]);
            it.status = i32::from(*sick);
            services
                .iter()
                .fold(it, |w, s| w.serving(&format!("s{s}"), &[(80, 8080 + u32::from(*ip))]))
                .into()
        }
        Event::Service { name, vip, prefix } => {
            let vip =
                if *prefix { format!("10.{}.0.0/16", 100 + name) } else { format!("10.1.{name}.{vip}") };
            service(&format!("s{name}"), &vip, &[(80, 8080)]).into()
        }
        Event::RemoveWorkload(_) | Event::RemoveService(_) => unreachable!("not a resource"),
    }
}

fn service_key(name: u8) -> String {
    format!("shop/{}", host("shop", &format!("s{name}")))
}

fn apply(mesh: &mut Mesh, event: &Event) {
    match event {
        Event::RemoveWorkload(name) => mesh.index.remove_address(&uid(&format!("w{name}"))),
        Event::RemoveService(name) => mesh.index.remove_address(&service_key(*name)),
        add => mesh.add(resource(add)),
    }
}

/// Everything that lookups can tell.
fn observe(mesh: &mut Mesh) -> BTreeMap<String, String> {
    let state = mesh.state();
    let mut seen = BTreeMap::new();
    let mut note = |what: String, value: Option<String>| {
        seen.extend(value.map(|value| (what, value)));
    };
    for name in 0..5 {
        let found = state.workload(&uid(&format!("w{name}")));
        note(format!("w{name}"), found.map(|w| format!("{w:?}")));
        let local = LocalWorkload::new("shop", &format!("w{name}"), &format!("w{name}"), "n1");
        note(format!("local w{name}"), state.local_workload(&local).map(|w| w.uid.to_string()));
        for last in 0..3 {
            let found = state.workload_by_ip("", ip(&format!("10.0.{name}.{last}")));
            note(format!("10.0.{name}.{last}"), found.map(|w| w.uid.to_string()));
        }
    }
    for name in 0..3 {
        let key = service_key(name);
        let found = state.service(&key);
        let ports = |e: &Endpoint| (e.workload.uid.clone(), e.ports.iter().collect::<Vec<_>>());
        let endpoints = found.map(|s| format!("{:?}", s.all_endpoints().map(ports).collect::<BTreeSet<_>>()));
        note(format!("endpoints {key}"), endpoints);
        let by_name = state.service_by_hostname(&host("shop", &format!("s{name}")), None);
        note(format!("by name {key}"), by_name.map(|s| s.service.host.to_string()));
        for address in [format!("10.{}.7.7", 100 + name), format!("10.1.{name}.0"), format!("10.1.{name}.1")]
        {
            let found = state.service_by_ip("", ip(&address), None);
            note(address, found.map(|s| s.service.host.to_string()));
        }
    }
    for (key, waiting) in mesh.index.staged() {
        note(format!("staged {key}"), Some(waiting.to_string()));
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_history_leaves_what_its_last_versions_make(events in prop::collection::vec(event(), 0..40)) {
        let mut lived = Mesh::default();
        let mut last: BTreeMap<(bool, u8), &Event> = BTreeMap::new();
        for event in &events {
            apply(&mut lived, event);
            match event {
                Event::Workload { name, .. } => last.insert((true, *name), event),
                Event::Service { name, .. } => last.insert((false, *name), event),
                Event::RemoveWorkload(name) => last.remove(&(true, *name)),
                Event::RemoveService(name) => last.remove(&(false, *name)),
            };
        }
        let mut fresh = Mesh::default();
        for event in last.values() {
            apply(&mut fresh, event);
        }
        prop_assert_eq!(observe(&mut lived), observe(&mut fresh));
    }

    #[test]
    fn a_snapshot_does_not_change_when_the_model_does(events in prop::collection::vec(event(), 1..30)) {
        let (before, after) = events.split_at(events.len() / 2);
        let mut mesh = Mesh::default();
        for event in before {
            apply(&mut mesh, event);
        }
        let snapshot = mesh.state();
        let dump = (snapshot.dump_workloads(), snapshot.dump_services());
        for event in after {
            apply(&mut mesh, event);
        }
        prop_assert_eq!(dump, (snapshot.dump_workloads(), snapshot.dump_services()));
    }
}
