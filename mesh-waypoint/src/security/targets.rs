//! Which policy applies to which service.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use super::authn::{self, Rule, Rules};
use super::authz::{PolicySet, compile};
use super::jwks::KeyStore;
use super::{Policies, Problem, ServicePolicies, object_name};
use crate::config::{Own, Resources};

/// Istio's default for the root namespace.
const DEFAULT_ROOT_NAMESPACE: &str = "istio-system";

/// What a policy is attached to, of what this waypoint knows.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Everything that goes through this waypoint.
    pub(crate) everything: bool,
    /// Keys of services.
    pub(crate) services: Vec<Str>,
}

pub(super) fn build(resources: &Resources, own: &Own, keys: &KeyStore) -> Policies {
    let settings = &*resources.settings;
    let mut problems = Vec::new();
    let mut sets = Sets::default();

    for policy in resources.authorizations.values() {
        let origin = policy.origin.as_ref();
        let attachment = attach(&policy.targets, origin, own, settings, &mut problems);
        if attachment == Attachment::default() {
            continue;
        }
        let compiled = Arc::new(compile::policy(policy, settings, &mut problems));
        sets.each(&attachment, |parts| parts.authorizations.push(Arc::clone(&compiled)));
    }
    for authentication in resources.authentications.values() {
        let origin = authentication.origin.as_ref();
        let attachment = attach(&authentication.targets, origin, own, settings, &mut problems);
        if attachment == Attachment::default() {
            continue;
        }
        let rules = authn::read(authentication, keys, &mut problems);
        sets.each(&attachment, |parts| parts.token_rules.extend_from_slice(&rules));
    }

    let finish = |parts: Parts| {
        Arc::new(ServicePolicies {
            authn: Rules::new(parts.token_rules),
            authz: PolicySet::new(&parts.authorizations, settings),
        })
    };
    let services = sets.services.into_iter().map(|(key, parts)| (key, finish(parts))).collect();
    let common = finish(sets.common);
    let normalization = normalization(settings, &mut problems);
    Policies { services, common, normalization, problems }
}

/// The policies of one service before they are put together.
#[derive(Debug, Default, Clone)]
struct Parts {
    authorizations: Vec<Arc<compile::Policy>>,
    token_rules: Vec<Arc<Rule>>,
}

#[derive(Debug, Default)]
struct Sets {
    common: Parts,
    services: BTreeMap<Str, Parts>,
}

impl Sets {
    /// Adds to all that the attachment names; a service that is named for the first time has what holds for everything.
    fn each(&mut self, attachment: &Attachment, mut add: impl FnMut(&mut Parts)) {
        for key in &attachment.services {
            self.services.entry(key.clone()).or_insert_with(|| self.common.clone());
        }
        if attachment.everything {
            add(&mut self.common);
            self.services.values_mut().for_each(add);
        } else {
            for key in &attachment.services {
                if let Some(parts) = self.services.get_mut(key) {
                    add(parts);
                }
            }
        }
    }
}

/// What targets mean to this waypoint.
pub(crate) fn attach(
    targets: &[l7::Target],
    origin: Option<&l7::Origin>,
    own: &Own,
    settings: &l7::Settings,
    problems: &mut Vec<Problem>,
) -> Attachment {
    let mut attachment = Attachment::default();
    let root = match settings.root_namespace.as_str() {
        "" => DEFAULT_ROOT_NAMESPACE,
        namespace => namespace,
    };
    let mut report = |field: String, message: &str| {
        problems.push(Problem { object: object_name(origin), field, message: message.to_owned() });
    };
    if targets.is_empty() {
        report(
            "targetRefs".into(),
            "is empty; a policy without targets is applied to all that this waypoint serves",
        );
        attachment.everything = true;
    }
    let own_namespace = origin.map_or("", |origin| origin.namespace.as_str());
    for (i, target) in targets.iter().enumerate() {
        // A target without a namespace is in that of the policy.
        let namespace = if target.namespace.is_empty() { own_namespace } else { &target.namespace };
        match l7::target::Kind::try_from(target.kind) {
            Ok(l7::target::Kind::Gateway) => {
                attachment.everything |= target.name == own.gateway && namespace == own.namespace;
            }
            Ok(l7::target::Kind::GatewayClass) if target.name != own.class => {}
            Ok(l7::target::Kind::GatewayClass) => {
                if own_namespace == root {
                    attachment.everything = true;
                } else {
                    // As in Istio: whoever may write into any namespace must not write policies for the whole mesh.
                    report(
                        format!("targetRefs[{i}]"),
                        &format!("names a GatewayClass, which counts only in the root namespace ({root})"),
                    );
                }
            }
            Ok(l7::target::Kind::Service | l7::target::Kind::ServiceEntry) => {
                if target.hostnames.is_empty() {
                    report(format!("targetRefs[{i}]"), "has no hostname, so that no service is meant by it");
                }
                attachment.services.extend(
                    target
                        .hostnames
                        .iter()
                        .map(|hostname| Str::from(format!("{namespace}/{}", hostname.to_ascii_lowercase()))),
                );
            }
            Err(_) => {
                report(
                    format!("targetRefs[{i}].kind"),
                    "is not known to this version; the policy is applied to all that this waypoint serves",
                );
                attachment.everything = true;
            }
        }
    }
    attachment
}

fn normalization(settings: &l7::Settings, problems: &mut Vec<Problem>) -> l7::settings::PathNormalization {
    l7::settings::PathNormalization::try_from(settings.path_normalization).unwrap_or_else(|error| {
        problems.push(Problem {
            object: "MeshConfig".into(),
            field: "pathNormalization.normalization".into(),
            message: format!("{error}; paths are normalised as DECODE_AND_MERGE_SLASHES says"),
        });
        l7::settings::PathNormalization::DecodeAndMergeSlashes
    })
}
