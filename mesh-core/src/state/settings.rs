//! What the mesh, a namespace or a pod's annotation sets for one workload, as our control plane sends it in the
//! extension [`SETTINGS_EXTENSION`]. Without the extension everything is at its default.

use prost::Message as _;
use prost_types::value::Kind;

use super::Cidr;
use super::workload::Workload;
use crate::xds::SETTINGS_EXTENSION;

/// Settings of one workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// `sameNode`: whether traffic within the node must take the tunnel; none leaves it to the node.
    pub same_node: Option<SameNode>,
    /// `failOpen`: without a living agent connections go on in plaintext instead of being refused.
    pub fail_open: bool,
    /// `excludedCIDRs`: destinations that are left to the kernel.
    pub excluded_cidrs: Vec<Cidr>,
    /// `excludedPorts`: destination ports that are left to the kernel.
    pub excluded_ports: Vec<u16>,
    /// `captureOutside`: whether connections to addresses that the mesh does not know are captured.
    pub capture_outside: Option<bool>,
    /// `dnsCapture`: whether DNS queries are answered by the node.
    pub dns_capture: Option<bool>,
}

/// The path between two pods of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SameNode {
    /// The kernel's, once policy allowed the pair.
    Fast,
    /// Always mutual TLS.
    Tunnel,
}

/// Why settings cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("workload {workload}: extension {SETTINGS_EXTENSION}: {field}: {problem}")]
pub struct SettingsError {
    workload: String,
    field: &'static str,
    problem: &'static str,
}

impl Workload {
    /// Its settings. Keys that this version does not know are left alone: a newer control plane may send them.
    ///
    /// # Errors
    /// The payload is no `google.protobuf.Struct`, or a key has a value that it cannot have.
    pub fn settings(&self) -> Result<Settings, SettingsError> {
        let mut settings = Settings::default();
        let Some(payload) = self.extension(SETTINGS_EXTENSION) else { return Ok(settings) };
        let error = |field, problem| SettingsError { workload: self.uid.to_string(), field, problem };
        let fields = prost_types::Struct::decode(payload)
            .map_err(|_decode| error("config", "is no google.protobuf.Struct"))?
            .fields;
        for (key, value) in fields {
            match (key.as_str(), value.kind) {
                ("sameNode", Some(Kind::StringValue(word))) => {
                    settings.same_node = Some(match word.as_str() {
                        "fast" => SameNode::Fast,
                        "tunnel" => SameNode::Tunnel,
                        _ => return Err(error("sameNode", "must be fast or tunnel")),
                    });
                }
                ("failOpen", Some(Kind::BoolValue(open))) => settings.fail_open = open,
                ("captureOutside", Some(Kind::BoolValue(capture))) => {
                    settings.capture_outside = Some(capture)
                }
                ("dnsCapture", Some(Kind::BoolValue(capture))) => settings.dns_capture = Some(capture),
                ("excludedCIDRs", Some(Kind::ListValue(list))) => {
                    let cidr = |kind| match kind {
                        Some(Kind::StringValue(text)) => text.parse().ok(),
                        _ => None,
                    };
                    let cidrs: Option<_> = list.values.into_iter().map(|v| cidr(v.kind)).collect();
                    settings.excluded_cidrs =
                        cidrs.ok_or_else(|| error("excludedCIDRs", "must be prefixes such as 10.0.0.0/8"))?;
                }
                ("excludedPorts", Some(Kind::ListValue(list))) => {
                    let ports: Option<_> = list.values.into_iter().map(|v| port(v.kind)).collect();
                    settings.excluded_ports =
                        ports.ok_or_else(|| error("excludedPorts", "must be numbers from 1 to 65535"))?;
                }
                ("sameNode", _) => return Err(error("sameNode", "must be fast or tunnel")),
                ("failOpen", _) => return Err(error("failOpen", "must be true or false")),
                ("captureOutside", _) => return Err(error("captureOutside", "must be true or false")),
                ("dnsCapture", _) => return Err(error("dnsCapture", "must be true or false")),
                ("excludedCIDRs", _) => return Err(error("excludedCIDRs", "must be a list of prefixes")),
                ("excludedPorts", _) => return Err(error("excludedPorts", "must be a list of ports")),
                _ => {}
            }
        }
        Ok(settings)
    }

    /// Whether its traffic within the node must take the tunnel. Settings that cannot be read mean yes, the stricter
    /// side.
    #[must_use]
    pub fn keeps_to_tunnel(&self) -> bool {
        self.settings().map_or(true, |settings| settings.same_node == Some(SameNode::Tunnel))
    }
}

/// JSON has no integers: whole numbers in range.
fn port(kind: Option<Kind>) -> Option<u16> {
    match kind {
        Some(Kind::NumberValue(number)) => (1..=u16::MAX).find(|port| f64::from(*port) == number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use prost_types::{ListValue, Struct, Value};

    use super::*;
    use crate::xds::proto::workload as wire;

    fn workload(payload: Option<Vec<u8>>) -> Workload {
        let config = payload.map(|value| prost_types::Any { type_url: String::new(), value });
        let extension = wire::Extension { name: SETTINGS_EXTENSION.into(), config };
        let extensions = vec![extension];
        Workload::decode(&wire::Workload { uid: "u".into(), extensions, ..Default::default() }).unwrap()
    }

    fn of(fields: &[(&str, Kind)]) -> Workload {
        let value = |kind: &Kind| Value { kind: Some(kind.clone()) };
        let fields = fields.iter().map(|(key, kind)| ((*key).to_owned(), value(kind))).collect();
        workload(Some(Struct { fields }.encode_to_vec()))
    }

    fn list(kinds: Vec<Kind>) -> Kind {
        let values = kinds.into_iter().map(|kind| Value { kind: Some(kind) }).collect();
        Kind::ListValue(ListValue { values })
    }

    #[test]
    fn settings_are_read_as_the_control_plane_writes_them() {
        let text = |s: &str| Kind::StringValue(s.to_owned());
        let workload = of(&[
            ("sameNode", text("tunnel")),
            ("failOpen", Kind::BoolValue(true)),
            ("dnsCapture", Kind::BoolValue(false)),
            ("excludedCIDRs", list(vec![text("192.168.0.0/16"), text("fd00::/8")])),
            ("excludedPorts", list(vec![Kind::NumberValue(9000.0)])),
            ("ofTheFuture", Kind::NumberValue(1.0)),
        ]);
        let expected = Settings {
            same_node: Some(SameNode::Tunnel),
            fail_open: true,
            excluded_cidrs: vec!["192.168.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
            excluded_ports: vec![9000],
            capture_outside: None,
            dns_capture: Some(false),
        };
        assert_eq!(workload.settings().unwrap(), expected);
        assert!(workload.keeps_to_tunnel());
        assert!(!of(&[("sameNode", text("fast"))]).keeps_to_tunnel());
        assert_eq!(workload_without().settings().unwrap(), Settings::default());
        assert!(!workload_without().keeps_to_tunnel());
    }

    fn workload_without() -> Workload {
        Workload::decode(&wire::Workload { uid: "u".into(), ..Default::default() }).unwrap()
    }

    #[test]
    fn settings_that_cannot_be_read_are_named_and_keep_to_the_tunnel() {
        for (field, kind) in [
            ("sameNode", Kind::StringValue("quick".into())),
            ("sameNode", Kind::BoolValue(true)),
            ("failOpen", Kind::StringValue("yes".into())),
            ("excludedCIDRs", list(vec![Kind::StringValue("10.0.0.0/99".into())])),
            ("excludedPorts", list(vec![Kind::NumberValue(0.0)])),
            ("excludedPorts", list(vec![Kind::NumberValue(80.5)])),
        ] {
            let workload = of(&[(field, kind)]);
            let error = workload.settings().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
            assert!(workload.keeps_to_tunnel(), "{error}");
        }
        let garbage = workload(Some(vec![0xff, 0xff, 0xff]));
        assert!(garbage.settings().unwrap_err().to_string().contains("no google.protobuf.Struct"));
        assert!(garbage.keeps_to_tunnel());
    }
}
