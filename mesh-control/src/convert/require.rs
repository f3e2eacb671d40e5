//! Workloads that are reached through their waypoints only (`undermesh.io/require-waypoint`).
//!
//! Bound to a waypoint, a workload's clients go through it; but whoever dials its address himself still reaches it. With
//! this annotation on the namespace, the service or the pod, nodes refuse everybody but the waypoints: it is a DENY policy
//! for every other principal, which any node of an ambient mesh can enforce.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::security as wire;
use mesh_core::xds::proto::security::string_match::MatchType;
use mesh_core::xds::proto::workload::Workload;

use super::waypoint::Binding;
use super::{Context, peer};
use crate::model::istio_gateway::GATEWAY_NAME;
use crate::model::{Condition, Key, Kind, Meta, ObjectRef, Pod};

const REQUIRE: &str = "undermesh.io/require-waypoint";
/// Nobody has it: it is no name of a service account.
const NOBODY: &str = "-/ns/-/sa/-";

/// What the endpoints of a service are to be reached through.
#[derive(Default)]
pub(super) struct Through {
    required: bool,
    waypoints: Vec<Key>,
}

/// Notes what a service asks of its endpoints.
pub(super) fn note(
    context: &mut Context<'_>,
    name: &str,
    object: &ObjectRef,
    meta: &Meta,
    binding: &Binding,
) {
    let required = asks(context, object, meta);
    context.through.insert(name.to_owned(), Through { required, waypoints: binding.gateways() });
}

/// Whether an object has the annotation. What is no answer closes.
fn asks(context: &mut Context<'_>, object: &ObjectRef, meta: &Meta) -> bool {
    match meta.annotation(REQUIRE) {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let message =
                format!("annotation {REQUIRE} is {other:?}; write \"true\" or \"false\" (taken as true)");
            context.conditions.push(Condition::new(
                object.clone(),
                "Accepted",
                false,
                "InvalidValue",
                message,
            ));
            true
        }
    }
}

/// The policy that a pod lists, if it is to be reached through waypoints only.
pub(super) fn policy(
    context: &mut Context<'_>,
    authorizations: &mut BTreeMap<String, wire::Authorization>,
    pod: &Pod,
    workload: &Workload,
    binding: &Binding,
) -> Option<String> {
    if context.waypoints.is_part_of_one(&pod.meta) {
        return None;
    }
    let namespace = context.objects.namespaces.get(&pod.meta.namespace).map(|n| n.meta.clone());
    let of_namespace =
        namespace.is_some_and(|meta| asks(context, &ObjectRef::of(Kind::Namespace, &meta), &meta));
    let object = ObjectRef::of(Kind::Pod, &pod.meta);
    let mut required = asks(context, &object, &pod.meta);
    let mut waypoints: BTreeSet<Key> = binding.gateways().into_iter().collect();
    for through in workload.services.keys().filter_map(|service| context.through.get(service)) {
        required |= through.required;
        waypoints.extend(through.waypoints.iter().cloned());
    }
    // A namespace means those of its pods that have a waypoint.
    if !required && (!of_namespace || waypoints.is_empty()) {
        return None;
    }
    if waypoints.is_empty() {
        let message = format!(
            "{REQUIRE}: neither the pod nor a service of it asks for a waypoint; everybody is refused"
        );
        context.conditions.push(Condition::new(object, "Accepted", false, "NoWaypoint", message));
    }
    let names: Vec<String> = waypoints.iter().map(|key| format!("{}.{}", key.name, key.namespace)).collect();
    let name = format!("undermesh_require_waypoint_{}", names.join("_"));
    let key = format!("{}/{name}", pod.meta.namespace);
    let principals = principals(context, &waypoints);
    authorizations.entry(key.clone()).or_insert_with(|| {
        let exact = |principal: String| wire::StringMatch { match_type: Some(MatchType::Exact(principal)) };
        let others = wire::Match {
            not_principals: principals.into_iter().map(exact).collect(),
            ..wire::Match::default()
        };
        peer::policy(&pod.meta.namespace, &name, vec![peer::rule(vec![others])])
    });
    Some(key)
}

/// Who the waypoints are: the account of the Gateway's name, and those of its pods, where somebody else deployed them.
fn principals(context: &Context<'_>, waypoints: &BTreeSet<Key>) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let domain = &context.mesh.trust_domain;
    for key in waypoints {
        all.insert(format!("{domain}/ns/{}/sa/{}", key.namespace, key.name));
        let pods = context.objects.pods.values().filter(|pod| {
            pod.meta.namespace == key.namespace && pod.meta.label(GATEWAY_NAME) == Some(&key.name)
        });
        all.extend(pods.map(|pod| format!("{domain}/ns/{}/sa/{}", key.namespace, pod.service_account)));
    }
    if all.is_empty() {
        all.insert(NOBODY.to_owned());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::resources;

    /// Namespace shop with waypoint wp, Service web with these annotations, and its pod with those.
    fn shop(namespace: &str, service: &str, pod: &str) -> crate::convert::Resources {
        resources(&format!(
            "
apiVersion: v1
kind: Namespace
metadata: {{name: shop, annotations: {{{namespace}}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: wp, namespace: shop}}
spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}
status: {{addresses: [{{type: Hostname, value: wp.shop.svc.cluster.local}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop, labels: {{istio.io/use-waypoint: wp}}, annotations: {{{service}}}}}
spec: {{selector: {{app: web}}, ports: [{{name: http, port: 80}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: web, namespace: shop, labels: {{app: web}}, annotations: {{{pod}}}}}
spec: {{nodeName: n, containers: [{{name: c}}]}}
status: {{podIP: 10.0.0.1, conditions: [{{type: Ready, status: 'True'}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: alone, namespace: shop}}
spec: {{nodeName: n, containers: [{{name: c}}]}}
status: {{podIP: 10.0.0.2, conditions: [{{type: Ready, status: 'True'}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: wp-1, namespace: shop, labels: {{gateway.networking.k8s.io/gateway-name: wp}}}}
spec: {{nodeName: n, serviceAccountName: other, containers: [{{name: c}}]}}
status: {{podIP: 10.0.0.3, conditions: [{{type: Ready, status: 'True'}}]}}
"
        ))
    }

    const ASKED: &str = "undermesh.io/require-waypoint: 'true'";

    fn listed(resources: &crate::convert::Resources, pod: &str) -> Vec<String> {
        resources.workload(&format!("Kubernetes//Pod/shop/{pod}")).authorization_policies.clone()
    }

    #[test]
    fn the_annotation_of_namespace_service_or_pod_closes_the_pod_to_all_but_its_waypoint() {
        let key = "shop/undermesh_require_waypoint_wp.shop";
        for (namespace, service, pod) in [(ASKED, "", ""), ("", ASKED, ""), ("", "", ASKED)] {
            let resources = shop(namespace, service, pod);
            assert_eq!(listed(&resources, "web"), [key]);
            assert!(listed(&resources, "alone").is_empty(), "it has no waypoint");
            assert!(listed(&resources, "wp-1").is_empty(), "it is the waypoint");
            let matched = &resources.authorizations[key].rules[0].clauses[0].matches[0];
            let allowed: Vec<_> =
                matched.not_principals.iter().filter_map(|p| p.match_type.clone()).collect();
            let account = |name: &str| MatchType::Exact(format!("cluster.local/ns/shop/sa/{name}"));
            assert_eq!(allowed, [account("other"), account("wp")]);
            assert_eq!(resources.authorizations[key].action, i32::from(wire::Action::Deny));
        }
        assert!(listed(&shop("", "", ""), "web").is_empty());
    }

    #[test]
    fn a_pod_that_requires_a_waypoint_and_has_none_is_closed_and_says_so() {
        let text = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, annotations: {undermesh.io/require-waypoint: 'yes'}}
spec: {nodeName: n, containers: [{name: c}]}
status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}
";
        let resources = resources(text);
        assert_eq!(listed(&resources, "web").len(), 1);
        let said: Vec<&str> = resources.conditions.iter().map(|c| c.reason.as_str()).collect();
        assert!(said.contains(&"NoWaypoint") && said.contains(&"InvalidValue"), "{said:?}");
    }
}
