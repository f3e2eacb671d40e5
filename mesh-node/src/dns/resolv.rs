//! The agent's own name servers, for queries of which capture does not know the server that was asked.

use std::net::{IpAddr, SocketAddr};

/// Port of DNS.
const PORT: u16 = 53;

/// The name servers of a `resolv.conf`, in order. Servers on loopback are left out with a warning: queries leave
/// from inside the pod, where loopback is the pod itself.
#[must_use]
pub fn nameservers(resolv_conf: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in resolv_conf.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let server = words.next().unwrap_or_default();
        match server.parse::<IpAddr>() {
            Ok(ip) if ip.is_loopback() => {
                tracing::warn!(
                    "resolv.conf: nameserver {ip} is left out: pods cannot reach the node's loopback"
                );
            }
            Ok(ip) => servers.push(SocketAddr::new(ip, PORT)),
            Err(error) => tracing::warn!("resolv.conf: nameserver {server:?} is left out: {error}"),
        }
    }
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_taken_in_order_without_those_that_pods_cannot_reach() {
        let text = "# comment\nsearch a b\nnameserver 10.0.0.53 # first\nnameserver\n nameserver fd00::53\n\
                    nameserver 127.0.0.53\nnameserver fe80::1%eth0\nnameserver ::1\noptions ndots:5\n";
        let expected: [SocketAddr; 2] = ["10.0.0.53:53".parse().unwrap(), "[fd00::53]:53".parse().unwrap()];
        assert_eq!(nameservers(text), expected);
    }
}
