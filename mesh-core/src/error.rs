//! Stable codes for everything that can go wrong with somebody's traffic.
//!
//! A connection that fails leaves a trace in three places: the access log, `istio_tcp_connections_failed_total` and
//! `meshctl why`. All three name the same code, so that one search finds the cause, whose side it is on, and the fix.
//! Codes are never reused and never renumbered; [`Code::ALL`] is the table from which the documentation is written.

use std::fmt;

/// Who has to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The one that opens the connection.
    Client,
    /// The one that the connection goes to.
    Server,
    /// The mesh itself: this node, its control plane, its settings.
    Mesh,
}

/// The value of the `response_flags` label and log field, as Istio's node proxy writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResponseFlag {
    /// A policy said no, at the start or later.
    Deny,
    /// The connection could not be made, for any reason without a flag of its own.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// The HTTP/2 handshake or connection failed.
    H2HandshakeFailure,
    /// A tunnel port that does not answer: most likely a NetworkPolicy blocks it.
    NetworkPolicy,
    /// There is no certificate for the workload's identity.
    IdentityError,
    /// The peer's certificate is on the revocation list.
    CertRevoked,
}

impl ResponseFlag {
    /// The text on the wire: label value and log field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

macro_rules! codes {
    ($($name:ident = $code:literal, $side:ident, $retry:literal, $flag:ident, $cause:literal, $fix:literal;)*) => {
        /// A stable reason. The doc text of each variant is its cause.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $(#[doc = $cause] $name,)*
        }

        impl Code {
            /// Every code, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The number, for example `M0101`.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// Who has to act.
            #[must_use]
            pub const fn side(self) -> Side {
                match self { $(Self::$name => Side::$side,)* }
            }

            /// Whether trying again, at once and elsewhere, can do no harm and may help: no byte of the application's
            /// was delivered.
            #[must_use]
            pub const fn retry(self) -> bool {
                match self { $(Self::$name => $retry,)* }
            }

            /// The `response_flags` value that metrics and logs carry.
            #[must_use]
            pub const fn flag(self) -> ResponseFlag {
                match self { $(Self::$name => ResponseFlag::$flag,)* }
            }

            /// The cause, one line.
            #[must_use]
            pub const fn summary(self) -> &'static str {
                match self { $(Self::$name => $cause,)* }
            }

            /// What to do about it, one line.
            #[must_use]
            pub const fn fix(self) -> &'static str {
                match self { $(Self::$name => $fix,)* }
            }
        }
    };
}

codes! {
    // Identity and TLS.
    PeerIdentity = "M0101", Server, true, TlsFailure,
        "the peer's certificate names another identity than the workload at this address",
        "the address may have been reused: check that the workload feed is current; else somebody answers in its place";
    PeerTrustDomain = "M0102", Client, false, TlsFailure,
        "the peer's certificate is of another trust domain",
        "let both sides use one trust domain, or reach the service through a gateway";
    PeerWithoutIdentity = "M0103", Client, false, TlsFailure,
        "the peer's certificate carries no SPIFFE identity",
        "issue workload certificates from the mesh's CA";
    PeerExpired = "M0104", Server, true, TlsFailure,
        "the peer's certificate has expired",
        "see why the peer's node cannot renew (its log, the CA's log); compare the clocks";
    PeerNotYetValid = "M0105", Server, true, TlsFailure,
        "the peer's certificate is not valid yet",
        "compare the clocks of both nodes and of the CA";
    PeerIssuer = "M0106", Server, false, TlsFailure,
        "the peer's certificate was not issued by a CA that this workload trusts",
        "both sides need the same root: check a CA rotation that has not finished, or a foreign cluster";
    PeerRevoked = "M0107", Server, false, CertRevoked,
        "the peer's certificate is on the revocation list",
        "restart the workload with a new certificate, or remove the entry from the list";
    PeerCertificate = "M0108", Server, false, TlsFailure,
        "the peer's certificate cannot be used: malformed, wrong purpose or bad signature",
        "issue workload certificates from the mesh's CA";
    PeerWithoutCertificate = "M0109", Client, false, TlsFailure,
        "the peer sent no certificate",
        "only mesh nodes may connect to the tunnel port";
    PeerRefusedUs = "M0110", Mesh, true, TlsFailure,
        "the peer does not accept our certificate",
        "the alert says why; the peer's log says more: trust domain, root, clock or revocation list";
    NotTls = "M0111", Client, false, TlsFailure,
        "the peer does not speak TLS on the tunnel port",
        "do not send plain traffic to port 15008; only mesh nodes may";
    TlsParameters = "M0112", Client, false, TlsFailure,
        "both sides share no TLS version, cipher suite, key exchange or application protocol",
        "the peer must offer TLS 1.3 with AES-GCM and ALPN h2";
    TlsTimeout = "M0113", Server, true, TlsFailure,
        "the TLS handshake did not finish in time",
        "check load and packet loss between the nodes; a middlebox may swallow large handshakes";
    TlsTransport = "M0114", Server, true, TlsFailure,
        "the connection broke during the TLS handshake",
        "see the peer's log for its reason";
    NoCertificate = "M0120", Mesh, true, IdentityError,
        "there is no certificate for the local workload's identity",
        "see the CA's answer in this node's log; is the pod known to the control plane as scheduled on this node?";
    CertificateUnusable = "M0121", Mesh, true, IdentityError,
        "the CA's answer is not a usable certificate for the requested identity",
        "check the CA: leaf first, roots last, the leaf's first URI SAN equal to the requested identity";
    RevocationList = "M0122", Mesh, false, IdentityError,
        "the revocation list cannot be read",
        "it must be PEM with X509 CRL blocks; the last good list stays in force";

    // The tunnel.
    TunnelHandshake = "M0201", Server, true, H2HandshakeFailure,
        "the peer did not complete the HTTP/2 handshake",
        "something else than a mesh node answers on the tunnel port, or it is overloaded";
    TunnelLost = "M0202", Server, false, Connect,
        "the tunnel's connection broke while it carried data",
        "the peer's node or the network between failed; see its log and `meshctl status`";
    TunnelSilent = "M0203", Server, false, Connect,
        "the peer stopped answering keepalive pings",
        "the peer's node is gone or cut off; its connections were closed";
    TunnelDraining = "M0204", Server, true, Connect,
        "the peer is draining and takes no new connection on this tunnel",
        "none needed: a new tunnel is opened";
    ConnectMethod = "M0205", Client, false, Connect,
        "a request in the tunnel was not CONNECT",
        "only mesh nodes may speak to the tunnel port";
    ConnectAuthority = "M0206", Client, false, Connect,
        "the CONNECT authority is not address:port or host:port",
        "the sender must name a destination with a port";
    TunnelViolation = "M0207", Client, false, H2HandshakeFailure,
        "the peer broke the rules of HTTP/2, or flooded the connection",
        "only mesh nodes may speak to the tunnel port; update the peer if it is one";
    TunnelReset = "M0208", Server, false, Connect,
        "the peer aborted the connection",
        "the application or its node closed it abruptly; see the peer's access log";
    PeerBadRequest = "M0211", Server, false, Connect,
        "the peer refused the destination (400)",
        "the address belongs to no workload behind that node any more, or the peer wants another form";
    PeerDenied = "M0212", Client, false, Connect,
        "the peer's policy denied the connection (401)",
        "see the server's access log, which names the deciding policy, or `meshctl why`";
    PeerUnavailable = "M0213", Server, true, Connect,
        "the peer could not reach the application (503)",
        "is the application listening on that port?";
    PeerStatus = "M0214", Server, false, Connect,
        "the peer answered CONNECT with an unexpected status",
        "see the peer's log";

    // Routing and dialling.
    DialFailed = "M0301", Server, true, Connect,
        "the destination refused the connection or is unreachable",
        "is the application listening on that port?";
    DialTimeout = "M0302", Server, true, Connect,
        "the destination did not answer in time",
        "check that the address is alive and no NetworkPolicy drops the traffic";
    TunnelTimeout = "M0303", Server, true, NetworkPolicy,
        "the destination's tunnel port 15008 did not answer in time",
        "a NetworkPolicy or firewall most likely blocks TCP 15008 between the nodes: allow it";
    NoEndpoint = "M0304", Server, true, Connect,
        "the service has no endpoint that can take the connection",
        "check the endpoints' readiness, their ports and the traffic distribution";
    WorkloadUnknown = "M0305", Mesh, true, Connect,
        "the local workload is not known to the control plane yet",
        "check that the control plane sees this pod (`meshctl workloads`) and this node is connected to it";
    NotHere = "M0306", Client, true, Connect,
        "the tunnel asked for an address that is not this pod's",
        "the caller's view of the workload is old, or it is misconfigured";
    OwnPort = "M0307", Client, false, Connect,
        "the destination is one of the mesh's own ports",
        "connect to the application's port";
    ServiceUnresolved = "M0308", Client, false, Connect,
        "the service or port in the authority is not known here",
        "check the service's name and port; is the workload part of that service?";
    WaypointUnavailable = "M0309", Server, true, Connect,
        "the destination asks for a waypoint and none is ready; it is never bypassed",
        "start the waypoint or remove the `istio.io/use-waypoint` label";
    GatewayUnavailable = "M0310", Server, true, Connect,
        "the destination is in another network and no gateway to it is known",
        "check the gateway of that network and its addresses";
    NoOriginalDestination = "M0311", Mesh, true, Connect,
        "a captured connection has no record of where it was going",
        "the capture map may be full, see `meshctl doctor`";
    SelfCall = "M0312", Client, false, Connect,
        "the application called one of the mesh's own ports on loopback",
        "connect to the application's port";
    Overloaded = "M0313", Mesh, true, Connect,
        "this node or pod is at its limit of connections",
        "raise the limit, or find who opens so many (`meshctl top`)";
    Draining = "M0314", Mesh, true, Connect,
        "the node agent is shutting down and closed the connection at its drain limit",
        "none needed; raise the drain limit if connections live longer";
    PodGone = "M0315", Mesh, false, Connect,
        "the pod's network namespace is gone",
        "none needed: the pod was deleted";
    TunnelRefused = "M0316", Server, true, Connect,
        "the destination's tunnel port 15008 refused the connection",
        "nobody serves it there: an agent or waypoint that does not run, or a NetworkPolicy that rejects TCP 15008";

    // Policy.
    PolicyDenied = "M0401", Client, false, Deny,
        "an authorization policy denies the connection",
        "the text names the policy; `meshctl why` shows how it was decided";
    PolicyChanged = "M0402", Client, false, Deny,
        "a policy changed and no longer allows this open connection",
        "the text names the policy; `meshctl why` shows how it was decided";

    // Control.
    ControlUnreachable = "M0501", Mesh, true, Connect,
        "the control plane cannot be reached",
        "this node keeps working with what it knows; check the address, the network and the token";
    ControlRefused = "M0502", Mesh, false, Connect,
        "the control plane does not accept this node",
        "check the node's token and name";
    ConfigRejected = "M0503", Mesh, false, Connect,
        "the control plane sent a resource that cannot be used",
        "the last good version stays in force; the text names resource and field";

    // Names.
    DnsUpstream = "M0701", Server, true, Connect,
        "the name server that the application asked did not answer",
        "check the name server and that nothing blocks port 53";
    DnsMalformed = "M0702", Client, false, Connect,
        "a DNS message could not be read",
        "check the client; the message was answered with FORMERR or dropped";
    DnsClientUnknown = "M0703", Mesh, true, Connect,
        "a DNS question came from a workload that is not known yet",
        "check that the control plane sees this pod (`meshctl workloads`)";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code(), self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_ascending_and_have_a_cause_and_a_fix() {
        for pair in Code::ALL.windows(2) {
            assert!(pair[0].code() < pair[1].code(), "{} before {}", pair[0].code(), pair[1].code());
        }
        for code in Code::ALL {
            assert!(code.code().len() == 5 && code.code().starts_with('M'), "{code}");
            assert!(!code.summary().is_empty() && !code.fix().is_empty(), "{code}");
            assert!(!code.summary().ends_with('.') && !code.fix().ends_with('.'), "{code}");
        }
    }

    #[test]
    fn only_a_revoked_peer_and_policies_carry_their_own_flags() {
        assert_eq!(Code::PeerRevoked.flag().as_str(), "CERT_REVOKED");
        assert_eq!(Code::PolicyChanged.flag().as_str(), "DENY");
        assert_eq!(Code::TunnelTimeout.flag().as_str(), "NETWORK_POLICY");
        assert_eq!(
            Code::PeerDenied.flag().as_str(),
            "CONNECT",
            "the client sees a refusal, not its own policy"
        );
    }
}
