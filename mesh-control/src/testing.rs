//! What tests share: objects from text.

use std::sync::Arc;

use mesh_core::xds::proto::workload::{Service, Workload, address};

use crate::convert::{Captured, Mesh, Resources, convert};
use crate::model::{Condition, Objects};
use crate::source::State;
use crate::source::dir::{Files, Loader};

/// Files by name.
pub(crate) fn files(given: &[(&str, &str)]) -> Files {
    given.iter().map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned()))).collect()
}

/// What a fresh loader makes of one file.
pub(crate) fn load(yaml: &str) -> State {
    Loader::new("istio-system").load(files(&[("a.yaml", yaml)])).unwrap()
}

/// Objects of a file without errors.
pub(crate) fn objects(yaml: &str) -> Arc<Objects> {
    let state = load(yaml);
    let problems: Vec<String> = state.problems.iter().map(ToString::to_string).collect();
    assert!(problems.is_empty(), "{problems:#?}");
    state.objects
}

/// Resources of a file without errors, nothing captured.
pub(crate) fn resources(yaml: &str) -> Resources {
    resources_with(yaml, &Captured::new())
}

/// The same with reports of nodes.
pub(crate) fn resources_with(yaml: &str, captured: &Captured) -> Resources {
    let objects = objects(yaml);
    convert(&objects, &Mesh::default().with_settings(&objects), captured)
}

/// A certificate for a name with its key, PEM.
pub(crate) fn certificate(name: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// A Secret of type kubernetes.io/tls as a document.
pub(crate) fn secret(namespace: &str, name: &str, (chain, key): &(String, String)) -> String {
    format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: {namespace}}}\ntype: kubernetes.io/tls\nstringData: {{tls.crt: {chain:?}, tls.key: {key:?}}}\n"
    )
}

impl Resources {
    pub(crate) fn workload(&self, uid: &str) -> &Workload {
        match &self
            .addresses
            .get(uid)
            .unwrap_or_else(|| panic!("no {uid} in {:?}", self.addresses.keys()))
            .message
            .r#type
        {
            Some(address::Type::Workload(workload)) => workload,
            other => panic!("{uid} is {other:?}"),
        }
    }

    pub(crate) fn service(&self, name: &str) -> &Service {
        match &self
            .addresses
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.addresses.keys()))
            .message
            .r#type
        {
            Some(address::Type::Service(service)) => service,
            other => panic!("{name} is {other:?}"),
        }
    }

    pub(crate) fn condition(&self, object: &str, kind: &str) -> &Condition {
        let found = self.conditions.iter().find(|c| c.object.to_string() == object && c.kind == kind);
        found.unwrap_or_else(|| panic!("no {kind} on {object} in {:#?}", self.conditions))
    }
}
