//! Mesh settings for waypoints.

use mesh_core::xds::proto::l7 as wire;

use super::super::Context;
use crate::model::read::traffic::default_retry;

pub(super) fn settings(context: &Context<'_>) -> wire::Settings {
    let mesh = context.mesh;
    let given = context.objects.settings.as_ref().map(|s| s.waypoints.clone()).unwrap_or_default();
    wire::Settings {
        root_namespace: mesh.root_namespace.clone(),
        trust_domain: mesh.trust_domain.clone(),
        trust_domain_aliases: mesh.trust_domain_aliases.clone(),
        cluster_domain: mesh.cluster_domain.clone(),
        default_retry: Some(given.default_retry.unwrap_or_else(default_retry)),
        ..given
    }
}
