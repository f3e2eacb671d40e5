//! What is installed, kept in the cluster.

use serde_json::{Value, json};

use super::Problem;
use crate::cluster::{Cluster, Reference};

const NAME: &str = "undermesh-installation";

/// The ConfigMap's content.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub(super) version: String,
    /// As the operator gave them.
    pub(super) values: Value,
    pub(super) objects: Vec<Reference>,
}

pub(super) fn reference(namespace: &str) -> Reference {
    Reference::new("v1", "ConfigMap", Some(namespace), NAME)
}

impl Record {
    /// The record of a namespace, if `meshctl` installed the mesh there.
    pub(super) async fn read(cluster: &Cluster, namespace: &str) -> Result<Option<Self>, Problem> {
        let Some(object) = cluster.get(&reference(namespace)).await? else { return Ok(None) };
        Self::parse(&object).map(Some).ok_or_else(|| {
            Problem::Told(format!(
                "ConfigMap {namespace}/{NAME} cannot be read; delete it and run `meshctl install` again"
            ))
        })
    }

    fn parse(object: &Value) -> Option<Self> {
        let text = |name: &str| object.pointer(&format!("/data/{name}"))?.as_str();
        let objects: Vec<Value> = serde_json::from_str(text("objects")?).ok()?;
        Some(Self {
            version: text("version")?.to_owned(),
            values: serde_json::from_str(text("values")?).ok()?,
            objects: objects.iter().map(Reference::of).collect::<Result<_, _>>().ok()?,
        })
    }

    pub(super) fn object(&self, namespace: &str) -> Value {
        let objects: Vec<Value> = self.objects.iter().map(shape).collect();
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": NAME, "namespace": namespace, "labels": {"app.kubernetes.io/name": "undermesh"}},
            "data": {
                "version": self.version,
                "values": self.values.to_string(),
                "objects": Value::from(objects).to_string(),
            },
        })
    }
}

fn shape(object: &Reference) -> Value {
    let mut metadata = json!({"name": object.name});
    if let (Some(namespace), Some(map)) = (&object.namespace, metadata.as_object_mut()) {
        map.insert("namespace".to_owned(), namespace.as_str().into());
    }
    json!({"apiVersion": object.api_version, "kind": object.kind, "metadata": metadata})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_installed_is_read_back() {
        let record = Record {
            version: "1.2.3".into(),
            values: json!({"node": {"drainSeconds": 5}}),
            objects: vec![
                Reference::new("v1", "Namespace", None, "a"),
                Reference::new("apps/v1", "DaemonSet", Some("a"), "b"),
            ],
        };
        assert_eq!(Record::parse(&record.object("a")), Some(record));
        assert_eq!(Record::parse(&json!({"data": {}})), None);
    }
}
