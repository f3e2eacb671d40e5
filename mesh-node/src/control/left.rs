//! Pods that have left the mesh and live on. What they had open through this agent goes on until it ends, the pod does, or
//! the agent has drained; all else of them is forgotten.

use std::sync::Arc;

use mesh_core::admin::{self, PodState};

use crate::capture::EnrolledPod;
use crate::pods::PodKey;
use crate::proxy::Pod;

/// A pod with connections of before.
struct Leaver {
    key: PodKey,
    pod: Arc<Pod>,
    kernel: Arc<EnrolledPod>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Left(Vec<Leaver>);

impl Left {
    /// Remembers a pod until its last connection has ended.
    pub(super) fn add(&mut self, key: PodKey, pod: Arc<Pod>, kernel: Arc<EnrolledPod>) {
        self.0.push(Leaver { key, pod, kernel });
    }

    /// Ends the connections of pods that do not live any more, and forgets pods that have none.
    pub(super) fn look(&mut self, lives: impl Fn(&PodKey, &EnrolledPod) -> bool) {
        self.0.retain(|leaver| {
            // Workers hold the pod by its listeners and connections, and the command that tells them of its leaving.
            let is_used = Arc::strong_count(&leaver.pod) > 1;
            let stays = is_used && lives(&leaver.key, &leaver.kernel);
            if !stays {
                leaver.pod.gone.cancel();
            }
            stays
        });
    }

    /// As the status shows them.
    pub(super) fn status(&self) -> impl Iterator<Item = (&PodKey, admin::Pod)> {
        self.0.iter().map(|Leaver { key, kernel, .. }| {
            let pod = admin::Pod {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                service_account: key.service_account.clone(),
                state: PodState::Left,
                problem: None,
                addresses: kernel.addresses().iter().map(ToString::to_string).collect(),
            };
            (key, pod)
        })
    }
}
