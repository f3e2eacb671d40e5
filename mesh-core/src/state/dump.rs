//! Snapshots as JSON for people and tools, in the shape and spelling of ztunnel's config dump, which Kiali reads
//! with strict types.

use serde_json::{Map, Value, json};

use super::{
    AppProtocol, GatewayAddress, Health, IpFamilies, MeshState, Mode, NetworkMode, Scope, Service,
    ServiceEndpoints, Workload,
};

impl MeshState {
    /// Array `workloads` of the dump, by uid.
    #[must_use]
    pub fn dump_workloads(&self) -> Value {
        let mut workloads: Vec<_> = self.workloads().collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        workloads.into_iter().map(|w| w.dump()).collect()
    }

    /// Array `services` of the dump, by namespace and hostname.
    #[must_use]
    pub fn dump_services(&self) -> Value {
        let mut services: Vec<_> = self.services().collect();
        services.sort_by(|a, b| a.service.host.key().cmp(b.service.host.key()));
        services.into_iter().map(ServiceEndpoints::dump).collect()
    }

    /// Array `policies` of the dump, by namespace and name.
    #[must_use]
    pub fn dump_policies(&self) -> Value {
        let mut policies: Vec<_> = self.policies().collect();
        policies.sort_by(|a, b| a.key.cmp(&b.key));
        policies.into_iter().map(|p| p.dump()).collect()
    }
}

impl Workload {
    /// One entry of `workloads`.
    #[must_use]
    pub fn dump(&self) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_owned(), value);
        };
        put("uid", json!(&*self.uid));
        put("name", json!(&*self.name));
        put("namespace", json!(&*self.namespace));
        put("workloadIps", self.addresses.iter().map(|ip| json!(ip.to_string())).collect());
        put("protocol", json!(if self.is_hbone() { "HBONE" } else { "TCP" }));
        let mode = match self.network_mode {
            NetworkMode::Standard => "Standard",
            NetworkMode::HostNetwork => "HostNetwork",
        };
        put("networkMode", json!(mode));
        put("network", json!(&*self.network));
        put("trustDomain", json!(self.identity.trust_domain()));
        put("serviceAccount", json!(self.identity.service_account()));
        put("workloadName", json!(&*self.workload_name));
        put("workloadType", json!(self.workload_type.as_str()));
        put("canonicalName", json!(&*self.canonical_name));
        put("canonicalRevision", json!(&*self.canonical_revision));
        put("clusterId", json!(&*self.cluster_id));
        put("node", json!(&*self.node));
        put("status", json!(if self.health == Health::Healthy { "Healthy" } else { "Unhealthy" }));
        put("services", self.services.iter().map(|(key, _)| json!(&**key)).collect());
        put("capacity", json!(self.capacity));
        let (region, zone, subzone) = (&self.locality.region, &self.locality.zone, &self.locality.subzone);
        put("locality", json!({"region": &**region, "zone": &**zone, "subzone": &**subzone}));
        if self.native_tunnel {
            put("nativeTunnel", json!(true));
        }
        if let Some(hostname) = &self.hostname {
            put("hostname", json!(&**hostname));
        }
        if let Some(waypoint) = &self.waypoint {
            put("waypoint", dump_gateway(waypoint));
        }
        if let Some(gateway) = &self.network_gateway {
            put("networkGateway", dump_gateway(gateway));
        }
        if let Some(tunnel) = &self.application_tunnel {
            let protocol = if tunnel.proxy_protocol { "PROXY" } else { "NONE" };
            put("applicationTunnel", json!({"protocol": protocol, "port": tunnel.port}));
        }
        if !self.authorization_policies.is_empty() {
            put("authorizationPolicies", self.authorization_policies.iter().map(|k| json!(&**k)).collect());
        }
        Value::Object(map)
    }
}

impl ServiceEndpoints {
    /// One entry of `services`.
    #[must_use]
    pub fn dump(&self) -> Value {
        let endpoints: Map<String, Value> = self
            .all_endpoints()
            .map(|endpoint| {
                let uid = endpoint.workload.uid.to_string();
                let healthy = endpoint.workload.health == Health::Healthy;
                let ports: Map<_, _> =
                    endpoint.ports.iter().map(|(port, target)| (port.to_string(), json!(target))).collect();
                let status = if healthy { "Healthy" } else { "Unhealthy" };
                (uid.clone(), json!({"workloadUid": uid, "port": ports, "status": status}))
            })
            .collect();
        let mut value = self.service.dump();
        value["endpoints"] = Value::Object(endpoints);
        value
    }
}

impl Service {
    fn dump(&self) -> Value {
        // Kiali wants a number for every port; 0 is how the API itself says "named".
        let ports: Map<_, _> = self
            .ports
            .iter()
            .map(|(port, target)| (port.to_string(), json!(target.target.unwrap_or(0))))
            .collect();
        let prefixes = self.cidr_vips.iter().map(ToString::to_string);
        let vips: Vec<_> = self.vips.iter().map(ToString::to_string).chain(prefixes).collect();
        let mut value = json!({
            "name": &*self.name,
            "namespace": self.host.namespace(),
            "hostname": self.host.hostname(),
            "vips": vips,
            "ports": ports,
            "subjectAltNames": self.subject_alt_names.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "canonical": self.canonical,
        });
        if let Some(families) = match self.ip_families {
            IpFamilies::Automatic => None,
            IpFamilies::V4Only => Some("IPv4"),
            IpFamilies::V6Only => Some("IPv6"),
            IpFamilies::Dual => Some("Dual"),
        } {
            value["ipFamilies"] = json!(families);
        }
        if let Some(waypoint) = &self.waypoint {
            value["waypoint"] = dump_gateway(waypoint);
        }
        if self.load_balancing.mode != Mode::Unspecified {
            let mode = match self.load_balancing.mode {
                Mode::Strict => "Strict",
                Mode::Failover => "Failover",
                Mode::Passthrough => "Passthrough",
                Mode::Unspecified => "Standard",
            };
            let scopes: Vec<_> = self.load_balancing.scopes.iter().map(|scope| scope.as_str()).collect();
            value["loadBalancer"] = json!({"mode": mode, "routingPreferences": scopes});
        }
        value
    }
}

impl Scope {
    fn as_str(self) -> &'static str {
        match self {
            Self::Region => "Region",
            Self::Zone => "Zone",
            Self::Subzone => "Subzone",
            Self::Node => "Node",
            Self::Cluster => "Cluster",
            Self::Network => "Network",
        }
    }
}

impl AppProtocol {
    /// For tables: `http`, `http2`, `grpc`, `tcp`, `tls`; empty when not declared.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "",
            Self::Http11 => "http",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
        }
    }
}

fn dump_gateway(gateway: &GatewayAddress) -> Value {
    let destination = match gateway {
        GatewayAddress::Hostname(name, _) => name.to_string(),
        GatewayAddress::Address(address, _) => address.to_string(),
    };
    json!({"destination": destination, "hboneMtlsPort": gateway.port()})
}
