//! What many objects say in the same words is held once: in a mesh of ten thousand pods namespaces, nodes, applications and
//! identities are few.

use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use super::Str;
use super::service::{Service, ServicePort};
use super::workload::{PortMap, Workload};
use crate::identity::SpiffeId;

/// So many are kept before those that nobody holds any more are looked for.
const FEW: usize = 1024;

/// Texts and identities that objects have in common.
#[derive(Debug, Default)]
pub(super) struct Shared {
    texts: HashSet<Str>,
    identities: HashSet<SpiffeId>,
    /// Of services.
    ports: HashSet<Arc<BTreeMap<u16, ServicePort>>>,
    /// Of endpoints.
    targets: HashSet<PortMap>,
    /// How many there were when it was last looked for those that nobody holds.
    swept: usize,
}

impl Shared {
    pub(super) fn workload(&mut self, workload: &mut Workload) {
        let Workload { locality, .. } = workload;
        let texts = [
            &mut workload.namespace,
            &mut workload.network,
            &mut workload.node,
            &mut workload.canonical_name,
            &mut workload.canonical_revision,
            &mut workload.workload_name,
            &mut workload.cluster_id,
            &mut locality.region,
            &mut locality.zone,
            &mut locality.subzone,
        ];
        texts.into_iter().for_each(|text| share(&mut self.texts, text));
        for (key, ports) in &mut workload.services {
            share(&mut self.texts, key);
            share(&mut self.targets, ports);
        }
        workload.authorization_policies.iter_mut().for_each(|key| share(&mut self.texts, key));
        share(&mut self.identities, &mut workload.identity);
    }

    pub(super) fn service(&mut self, service: &mut Service) {
        service.vips.iter_mut().for_each(|vip| share(&mut self.texts, &mut vip.network));
        share(&mut self.ports, &mut service.ports);
    }

    /// Lets go of what nobody else holds, once there may be much of it.
    pub(super) fn sweep(&mut self) {
        if self.len() < FEW + 2 * self.swept {
            return;
        }
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.identities.retain(SpiffeId::is_shared);
        self.ports.retain(|ports| Arc::strong_count(ports) > 1);
        self.targets.retain(PortMap::is_shared);
        self.swept = self.len();
    }

    pub(super) fn len(&self) -> usize {
        self.texts.len() + self.identities.len() + self.ports.len() + self.targets.len()
    }
}

/// Replaces a value by the one that is known, or makes it known.
fn share<T: Clone + Eq + Hash>(known: &mut HashSet<T>, value: &mut T) {
    match known.get(value) {
        Some(known) => value.clone_from(known),
        None => drop(known.insert(value.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::pod;
    use super::*;

    fn workload(name: &str, node: &str) -> Workload {
        let mut wire = pod(name, &["10.0.0.1"]);
        node.clone_into(&mut wire.node);
        Workload::decode(&wire).unwrap()
    }

    #[test]
    fn what_objects_have_in_common_is_held_once() {
        let mut shared = Shared::default();
        let (mut one, mut other) = (workload("a", "n1"), workload("b", "n1"));
        let plain = other.clone();
        shared.workload(&mut one);
        shared.workload(&mut other);
        assert!(Arc::ptr_eq(&one.namespace, &other.namespace) && Arc::ptr_eq(&one.node, &other.node));
        assert!(Arc::ptr_eq(&one.locality.region, &other.network), "nothing is nothing");
        assert_eq!(other, plain);
    }

    #[test]
    fn what_nobody_holds_any_more_is_let_go() {
        let mut shared = Shared::default();
        let mut kept = workload("a", "kept");
        shared.workload(&mut kept);
        for n in 0..3 * FEW {
            shared.workload(&mut workload("a", &format!("gone-{n}")));
        }
        assert!(shared.len() > 3 * FEW);
        shared.sweep();
        assert!(shared.len() < 16, "{}", shared.len());
        let mut again = workload("a", "kept");
        shared.workload(&mut again);
        assert!(Arc::ptr_eq(&kept.node, &again.node) && kept.identity == again.identity);
    }
}
