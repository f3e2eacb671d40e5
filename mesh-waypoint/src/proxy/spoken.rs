//! Whether an endpoint is spoken to in HTTP/2 or in HTTP/1.1.

use http::HeaderMap;
use mesh_core::state::AppProtocol;

use super::headers;
use crate::config::Role;
use crate::upstream::ConnectionPolicy;

/// In what a request came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spoken {
    http2: bool,
    grpc: bool,
}

impl Spoken {
    /// A request with these headers, in HTTP/2 or in HTTP/1.1.
    pub(super) fn new(http2: bool, headers: &HeaderMap) -> Self {
        Self { http2, grpc: http2 && headers::is_grpc(headers) }
    }

    /// Whether it goes on in HTTP/2 to a port that is declared to speak something, or nothing.
    ///
    /// At a port without a declaration a waypoint speaks as its client does, and a gateway HTTP/1.1, as Istio's do: what
    /// a browser agrees on with a gateway says nothing of the application. gRPC has no other way than HTTP/2.
    pub(super) fn goes_on_in_http2(
        self,
        policy: &ConnectionPolicy,
        declared: AppProtocol,
        role: Role,
    ) -> bool {
        if policy.use_client_protocol {
            return self.http2;
        }
        match declared {
            AppProtocol::Http2 | AppProtocol::Grpc => true,
            _ if policy.h2_upgrade => true,
            AppProtocol::Http11 => false,
            AppProtocol::Unknown | AppProtocol::Tcp | AppProtocol::Tls => match role {
                Role::Waypoint => self.http2,
                Role::Gateway => self.grpc,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use http::header::{CONTENT_TYPE, HeaderValue};

    use super::*;
    use crate::upstream::Policy;

    #[test]
    fn only_a_waypoint_speaks_to_an_undeclared_port_as_its_client_does_and_grpc_stays_http_2() {
        let plain = HeaderMap::new();
        let grpc = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))]);
        let goes_on = |http2, headers, declared, role| {
            Spoken::new(http2, headers).goes_on_in_http2(&Policy::default().connection, declared, role)
        };
        for (http2, headers, declared, waypoint, gateway) in [
            (true, &plain, AppProtocol::Unknown, true, false),
            (true, &grpc, AppProtocol::Unknown, true, true),
            (false, &plain, AppProtocol::Unknown, false, false),
            (false, &grpc, AppProtocol::Unknown, false, false),
            (true, &plain, AppProtocol::Http11, false, false),
            (false, &plain, AppProtocol::Http2, true, true),
            (false, &plain, AppProtocol::Grpc, true, true),
        ] {
            assert_eq!(goes_on(http2, headers, declared, Role::Waypoint), waypoint, "{declared:?}");
            assert_eq!(goes_on(http2, headers, declared, Role::Gateway), gateway, "{declared:?}");
        }
    }

    #[test]
    fn a_destination_rule_decides_over_what_is_declared() {
        let follow = ConnectionPolicy { use_client_protocol: true, ..Policy::default().connection };
        let upgrade = ConnectionPolicy { h2_upgrade: true, ..Policy::default().connection };
        let plain = HeaderMap::new();
        for declared in [AppProtocol::Unknown, AppProtocol::Http11] {
            for http2 in [true, false] {
                let spoken = Spoken::new(http2, &plain);
                assert_eq!(spoken.goes_on_in_http2(&follow, declared, Role::Gateway), http2);
                assert!(spoken.goes_on_in_http2(&upgrade, declared, Role::Gateway));
            }
        }
    }
}
