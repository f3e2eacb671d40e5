//! What is valid and converts, and yet does nothing: mostly names and labels that match nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::{Finding, Severity};
use crate::convert::{Decision, Mesh, complete, decide, namespace_joins};
use crate::model::{Kind, Meta, ObjectRef, Objects, Service, selects};

/// All of them.
pub(super) fn all(objects: &Objects, mesh: &Mesh) -> Vec<Finding> {
    let mut findings = Vec::new();
    selectors(objects, mesh, &mut findings);
    subsets(objects, mesh, &mut findings);
    outside(objects, mesh, &mut findings);
    tokens(objects, mesh, &mut findings);
    findings
}

/// What has a selector for workloads: object, selector.
fn selective(objects: &Objects) -> Vec<(ObjectRef, &Meta, &BTreeMap<String, String>)> {
    let policies = objects
        .authorization_policies
        .values()
        .map(|o| (ObjectRef::of(Kind::AuthorizationPolicy, &o.meta), &o.meta, &o.selector));
    let peers = objects.peer_authentications.values();
    let peers = peers.map(|o| (ObjectRef::of(Kind::PeerAuthentication, &o.meta), &o.meta, &o.selector));
    let requests = objects
        .request_authentications
        .values()
        .map(|o| (ObjectRef::of(Kind::RequestAuthentication, &o.meta), &o.meta, &o.selector));
    policies.chain(peers).chain(requests).collect()
}

/// Labels of every workload that a selector of this namespace may be about.
fn workloads<'a>(
    objects: &'a Objects,
    mesh: &'a Mesh,
    namespace: &'a str,
) -> impl Iterator<Item = &'a BTreeMap<String, String>> {
    let within = move |meta: &Meta| namespace == mesh.root_namespace || meta.namespace == namespace;
    let pods = objects.pods.values().filter(move |pod| within(&pod.meta)).map(|pod| &pod.meta.labels);
    let entries = objects.workload_entries.values().filter(move |entry| within(&entry.meta));
    pods.chain(entries.map(|entry| &entry.meta.labels))
}

fn selectors(objects: &Objects, mesh: &Mesh, findings: &mut Vec<Finding>) {
    for (object, meta, selector) in selective(objects) {
        if selector.is_empty()
            || workloads(objects, mesh, &meta.namespace).any(|labels| selects(selector, labels))
        {
            continue;
        }
        let wanted: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let place = if meta.namespace == mesh.root_namespace { "any namespace" } else { "its namespace" };
        let message = format!(
            "spec.selector: no workload of {place} has the labels {}; no effect until one has",
            wanted.join(", ")
        );
        findings.push(Finding::of(Severity::Warning, "SelectorMatchesNothing", object, message));
    }
}

/// The Service that a DestinationRule's host names, where it is one.
fn service<'a>(objects: &'a Objects, mesh: &Mesh, host: &str, namespace: &str) -> Option<&'a Service> {
    let host = complete(host, namespace, mesh);
    let is_it = |service: &&Service| host == mesh.hostname(&service.meta.namespace, &service.meta.name);
    objects.services.values().map(AsRef::as_ref).find(is_it)
}

fn subsets(objects: &Objects, mesh: &Mesh, findings: &mut Vec<Finding>) {
    for rule in objects.destination_rules.values() {
        let Some(service) = service(objects, mesh, &rule.host, &rule.meta.namespace) else { continue };
        // Endpoints of a Service without selector are not known by their labels.
        if service.selector.is_empty() {
            continue;
        }
        let behind: Vec<_> = objects
            .pods
            .values()
            .filter(|pod| pod.meta.namespace == service.meta.namespace)
            .map(|pod| &pod.meta.labels)
            .filter(|labels| selects(&service.selector, labels))
            .collect();
        for (i, subset) in rule.subsets.iter().enumerate() {
            let wanted: BTreeMap<String, String> =
                subset.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            if behind.iter().any(|labels| selects(&wanted, labels)) {
                continue;
            }
            let labels: Vec<String> = wanted.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let message = format!(
                "spec.subsets[{i}]: no pod of Service {} has the labels {}; requests for subset {} fail until one has",
                service.meta.key(),
                labels.join(", "),
                subset.name
            );
            let object = ObjectRef::of(Kind::DestinationRule, &rule.meta);
            findings.push(Finding::of(Severity::Warning, "SubsetMatchesNothing", object, message));
        }
    }
}

/// Policies for workloads of namespaces that have none in the mesh.
fn outside(objects: &Objects, mesh: &Mesh, findings: &mut Vec<Finding>) {
    let mut inside: BTreeSet<&str> = BTreeSet::from([mesh.root_namespace.as_str()]);
    let enrolled = objects.pods.values().filter(|pod| decide(objects, pod) == Decision::Enrol);
    inside.extend(enrolled.map(|pod| pod.meta.namespace.as_str()));
    for (object, meta, _) in selective(objects) {
        let targets = objects
            .authorization_policies
            .get(&object.key)
            .is_some_and(|p| object.kind == Kind::AuthorizationPolicy && !p.targets.is_empty());
        let namespace = meta.namespace.as_str();
        let joins = inside.contains(namespace) || namespace_joins(objects, namespace);
        // Where the namespace itself is not known, its labels are not either.
        if targets || joins || !objects.namespaces.contains_key(namespace) {
            continue;
        }
        let message = format!(
            "namespace {namespace} has no workload in the mesh; kubectl label namespace {namespace} istio.io/dataplane-mode=ambient"
        );
        findings.push(Finding::of(Severity::Info, "NamespaceNotInMesh", object, message));
    }
}

/// Policies that ask for a token where nobody checks tokens: every request is without one.
fn tokens(objects: &Objects, mesh: &Mesh, findings: &mut Vec<Finding>) {
    let checked: BTreeSet<&str> =
        objects.request_authentications.values().map(|o| o.meta.namespace.as_str()).collect();
    for policy in objects.authorization_policies.values().filter(|policy| !policy.targets.is_empty()) {
        let asks = policy.requests.iter().any(|rule| {
            rule.from.iter().any(|source| !source.request_principals.is_empty())
                || rule.when.iter().any(|when| when.key.starts_with("request.auth."))
        });
        let namespace = policy.meta.namespace.as_str();
        if asks && !checked.contains(namespace) && !checked.contains(mesh.root_namespace.as_str()) {
            let message = format!(
                "asks for a token's content, and no RequestAuthentication of namespace {namespace} or {} checks tokens: \
                 no request ever has one",
                mesh.root_namespace
            );
            let object = ObjectRef::of(Kind::AuthorizationPolicy, &policy.meta);
            findings.push(Finding::of(Severity::Warning, "NoTokenIssuer", object, message));
        }
    }
}
