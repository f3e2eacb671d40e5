//! What an API server can check of each kind's `spec`. Sources: the API reference of Istio 1.28, `networking`, `security`
//! and `telemetry`.

use serde_json::{Map, Value, json};

/// Lists are bounded where a rule looks at each of their items: the API server wants to know what rules cost.
const ITEMS: usize = 512;

/// A schema that lets unknown fields pass.
#[derive(Debug, Clone, Default)]
pub(super) struct Schema {
    properties: Map<String, Value>,
    required: Vec<&'static str>,
    rules: Vec<Value>,
}

impl Schema {
    fn field(mut self, name: &str, schema: impl Into<Value>) -> Self {
        self.properties.insert(name.to_owned(), schema.into());
        self
    }

    fn required(mut self, name: &'static str) -> Self {
        self.required.push(name);
        self
    }

    /// A rule in CEL, and what its breach is told with.
    fn rule(mut self, rule: &str, message: &str) -> Self {
        self.rules.push(json!({"rule": rule, "message": message}));
        self
    }

    /// As the definition has it.
    pub(super) fn value(self) -> Value {
        let mut schema = json!({
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": true,
            "properties": self.properties,
        });
        if !self.required.is_empty() {
            schema["required"] = self.required.into();
        }
        if !self.rules.is_empty() {
            schema["x-kubernetes-validations"] = self.rules.into();
        }
        schema
    }
}

impl From<Schema> for Value {
    fn from(schema: Schema) -> Self {
        schema.value()
    }
}

fn words(values: &[&str]) -> Value {
    json!({"type": "string", "enum": values})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn name() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 253})
}

fn port() -> Value {
    json!({"type": "integer", "minimum": 1, "maximum": 65535})
}

fn list(items: impl Into<Value>, most: usize) -> Value {
    json!({"type": "array", "maxItems": most, "items": items.into()})
}

fn texts() -> Value {
    json!({"type": "array", "items": text()})
}

/// A list in which each `name` stands once.
fn named(items: impl Into<Value>, most: usize) -> Value {
    let mut list = list(items, most);
    list["x-kubernetes-list-type"] = "map".into();
    list["x-kubernetes-list-map-keys"] = json!(["name"]);
    list
}

/// By port number, written as a string.
fn by_port(value: impl Into<Value>) -> Value {
    json!({"type": "object", "maxProperties": 128, "additionalProperties": value.into()})
}

fn labels() -> Schema {
    let labels = json!({"type": "object", "maxProperties": 4096, "additionalProperties": {"type": "string", "maxLength": 63}});
    Schema::default().field("matchLabels", labels)
}

/// `selector`, `targetRef` and `targetRefs`, of which there is one at most.
fn attached() -> Schema {
    let target = || {
        Schema::default()
            .field("group", text())
            .field("kind", name())
            .field("name", name())
            .field("namespace", text())
            .required("kind")
            .required("name")
    };
    Schema::default()
        .field("selector", labels())
        .field("targetRef", target())
        .field("targetRefs", list(target(), 16))
        .rule(
            "[has(self.selector), has(self.targetRef), has(self.targetRefs)].filter(x, x).size() <= 1",
            "write one of selector, targetRef and targetRefs",
        )
}

pub(super) fn peer_authentication() -> Schema {
    let mode = || Schema::default().field("mode", words(&["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]));
    Schema::default()
        .field("selector", labels())
        .field("mtls", mode())
        .field("portLevelMtls", by_port(mode()))
        .rule(
            "!has(self.portLevelMtls) || (has(self.selector) && has(self.selector.matchLabels) && \
             self.selector.matchLabels.size() > 0)",
            "portLevelMtls needs a selector with matchLabels: ports are those of workloads",
        )
        .rule(
            "!has(self.portLevelMtls) || self.portLevelMtls.all(port, port.matches('^[1-9][0-9]{0,4}$') && int(port) <= 65535)",
            "the keys of portLevelMtls are port numbers, 1 to 65535",
        )
}

pub(super) fn authorization_policy() -> Schema {
    attached()
        .field("action", words(&["ALLOW", "DENY", "AUDIT", "CUSTOM"]))
        .field("provider", Schema::default().field("name", text()))
        .rule(
            "has(self.provider) == (has(self.action) && self.action == 'CUSTOM')",
            "provider goes with action CUSTOM, which needs one",
        )
}

pub(super) fn request_authentication() -> Schema {
    let rule = Schema::default()
        .field("issuer", name())
        .field("jwks", text())
        .field("jwksUri", json!({"type": "string", "minLength": 1, "maxLength": 2048}))
        .required("issuer")
        .rule("!(has(self.jwks) && has(self.jwksUri))", "write jwks or jwksUri, not both")
        .rule(
            "!has(self.jwksUri) || isURL(self.jwksUri) && url(self.jwksUri).getScheme() in ['http', 'https']",
            "jwksUri is an http or https URL",
        );
    attached().field("jwtRules", list(rule, 64))
}

pub(super) fn telemetry() -> Schema {
    attached()
}

pub(super) fn service_entry() -> Schema {
    let service_port = Schema::default()
        .field("number", port())
        .field("name", name())
        .field("protocol", json!({"type": "string", "maxLength": 256}))
        .required("number")
        .required("name");
    Schema::default()
        .field("hosts", json!({"type": "array", "minItems": 1, "maxItems": 256, "items": name()}))
        .field("addresses", json!({"type": "array", "maxItems": 256, "items": {"type": "string", "maxLength": 64}}))
        .field("ports", named(service_port, 256))
        .field("location", words(&["MESH_EXTERNAL", "MESH_INTERNAL"]))
        .field("resolution", words(&["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"]))
        .field("workloadSelector", Schema::default())
        .field("endpoints", list(Schema::default(), 4096))
        .required("hosts")
        .rule("!(has(self.workloadSelector) && has(self.endpoints))", "write workloadSelector or endpoints, not both")
        .rule(
            "!has(self.endpoints) || self.endpoints.size() == 0 || !has(self.resolution) || self.resolution != 'NONE'",
            "resolution NONE takes no endpoints: connections go where they were going",
        )
        .rule(
            "!has(self.ports) || self.ports.all(a, self.ports.exists_one(b, b.number == a.number))",
            "each port number stands once",
        )
}

pub(super) fn workload_entry() -> Schema {
    Schema::default()
        .field("address", json!({"type": "string", "maxLength": 256}))
        .field("network", json!({"type": "string", "maxLength": 2048}))
        .field("serviceAccount", json!({"type": "string", "maxLength": 253}))
        .field("weight", json!({"type": "integer", "minimum": 0}))
        .field("ports", json!({"type": "object", "maxProperties": 128, "additionalProperties": port()}))
        .rule(
            "has(self.address) || has(self.network)",
            "write address, or network where the address is of another one",
        )
}

pub(super) fn virtual_service() -> Schema {
    let weighted = || Schema::default().field("weight", json!({"type": "integer", "minimum": 0}));
    let http = Schema::default()
        .field("route", json!({"type": "array", "items": weighted().value()}))
        .field("redirect", Schema::default())
        .field("directResponse", Schema::default().field("status", json!({"type": "integer", "minimum": 200, "maximum": 599})))
        .field("delegate", Schema::default())
        .rule(
            "[has(self.route), has(self.redirect), has(self.directResponse), has(self.delegate)].filter(x, x).size() <= 1",
            "write one of route, redirect, directResponse and delegate",
        );
    let stream = || Schema::default().field("route", json!({"type": "array", "items": weighted().value()}));
    Schema::default()
        .field("hosts", texts())
        .field("gateways", texts())
        .field("exportTo", texts())
        .field("http", list(http, ITEMS))
        .field("tls", list(stream(), ITEMS))
        .field("tcp", list(stream(), ITEMS))
        .rule(
            "has(self.http) || has(self.tls) || has(self.tcp)",
            "write http, tls or tcp: there is nothing to route",
        )
}

pub(super) fn istio_gateway() -> Schema {
    let of_server = Schema::default()
        .field("number", port())
        .field("name", name())
        .field("protocol", name())
        .required("number")
        .required("name")
        .required("protocol");
    let versions = || words(&["TLS_AUTO", "TLSV1_0", "TLSV1_1", "TLSV1_2", "TLSV1_3"]);
    let modes = ["PASSTHROUGH", "SIMPLE", "MUTUAL", "AUTO_PASSTHROUGH", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"];
    let tls = Schema::default()
        .field("httpsRedirect", json!({"type": "boolean"}))
        .field("mode", words(&modes))
        .field("credentialName", text())
        .field("credentialNames", texts())
        .field("subjectAltNames", texts())
        .field("minProtocolVersion", versions())
        .field("maxProtocolVersion", versions())
        .rule(
            "!(has(self.credentialName) && has(self.credentialNames))",
            "write credentialName or credentialNames, not both",
        );
    let server = Schema::default()
        .field("port", of_server)
        .field("hosts", json!({"type": "array", "minItems": 1, "items": text()}))
        .field("tls", tls)
        .required("port")
        .required("hosts")
        .rule(
            "!(self.port.protocol in ['HTTPS', 'TLS']) || has(self.tls)",
            "write tls: the port's protocol needs it",
        );
    Schema::default()
        .field("selector", json!({"type": "object", "additionalProperties": text()}))
        .field("servers", list(server, ITEMS))
        .required("servers")
}

pub(super) fn destination_rule() -> Schema {
    let subset = Schema::default().field("name", name()).required("name");
    let tls = Schema::default().field("mode", words(&["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"]));
    let simple =
        words(&["UNSPECIFIED", "LEAST_CONN", "RANDOM", "PASSTHROUGH", "ROUND_ROBIN", "LEAST_REQUEST"]);
    let balancer = Schema::default()
        .field("simple", simple)
        .field("consistentHash", Schema::default())
        .rule("!(has(self.simple) && has(self.consistentHash))", "write simple or consistentHash, not both");
    let policy = Schema::default().field("tls", tls).field("loadBalancer", balancer);
    Schema::default()
        .field("host", name())
        .field("trafficPolicy", policy)
        .field("subsets", named(subset, ITEMS))
        .field("exportTo", texts())
        .required("host")
}
