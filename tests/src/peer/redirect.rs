//! Traffic of a pod into ztunnel's in-pod listeners, as Istio ambient redirects it (15001 outbound, 15006 inbound
//! plaintext; 15008 is dialled as it is).
//!
//! ztunnel marks its own sockets 0x539. A connection that it makes to the application carries the client's address;
//! the answers find their way back over the connection mark 0x111 and a local route.

/// The marks of ztunnel's sockets and of connections to the application.
const ZTUNNEL_MARK: &str = "0x539";
const ANSWER_MARK: &str = "0x111";
const ANSWER_TABLE: u32 = 100;

/// nftables rules for the pod's namespace.
#[must_use]
pub fn nft_script() -> String {
    format!(
        "table inet um_peer {{
  chain mark_in {{
    type filter hook prerouting priority -150;
    meta mark & 0xfff == {ZTUNNEL_MARK} ct mark set {ANSWER_MARK}
  }}
  chain mark_out {{
    type route hook output priority -150;
    ct mark {ANSWER_MARK} meta mark set ct mark
  }}
  chain inbound {{
    type nat hook prerouting priority -100;
    meta mark & 0xfff == {ZTUNNEL_MARK} accept
    iifname lo accept
    meta l4proto tcp tcp dport != 15008 redirect to :15006
  }}
  chain outbound {{
    type nat hook output priority -100;
    meta mark & 0xfff == {ZTUNNEL_MARK} accept
    meta mark & 0xfff == {ANSWER_MARK} accept
    oifname lo accept
    meta l4proto tcp redirect to :15001
  }}
}}
"
    )
}

/// Arguments of `ip` (after the namespace) that lead answers back to ztunnel, one address family each.
#[must_use]
pub fn ip_commands() -> Vec<Vec<String>> {
    let words = |line: String| line.split(' ').map(str::to_owned).collect();
    [("-4", "0.0.0.0/0"), ("-6", "::/0")]
        .into_iter()
        .flat_map(|(family, all)| {
            [
                words(format!("{family} rule add fwmark {ANSWER_MARK}/0xfff lookup {ANSWER_TABLE}")),
                words(format!("{family} route add local {all} dev lo table {ANSWER_TABLE}")),
            ]
        })
        .collect()
}
