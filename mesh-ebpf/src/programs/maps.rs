//! The maps, and the small questions that several programs ask them.
//!
//! All hash maps whose loss would let a connection through uncaptured are plain hashes, not LRU: a full map refuses,
//! it never forgets. Sizes here are defaults; user space sets the real ones.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, bpf_sock};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, PerCpuArray, SockMap};
use mesh_ebpf::{
    Address, Authorised, CAPTURE_PORTS, CAPTURE_PORTS_START, COUNTERS as COUNTERS_LEN, DNS_PORTS,
    DNS_PORTS_START, Endpoint, Flow, HEARTBEAT_STALE_NS, LISTENERS_PER_POD, NameserverKey, Original, Owner,
    Pod, Reason, Socket, Tuple, Verdict, VerdictKey, config, destination, pod_flag,
};

#[map]
pub(crate) static CONFIG: Array<u64> = Array::with_max_entries(config::LEN, 0);
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_LEN, 0);
/// Netns cookie -> enrolled pod.
#[map]
pub(crate) static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// Local address -> pod.
#[map]
pub(crate) static OWN_ADDRESSES: HashMap<Address, Owner> =
    HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static LISTENERS: SockMap = SockMap::with_max_entries(4096 * LISTENERS_PER_POD, 0);
/// Process id of an agent -> its last sign of life: a reused process id is not exempt for long.
#[map]
pub(crate) static AGENTS: HashMap<u32, u64> = HashMap::with_max_entries(64, 0);
/// Cgroup id of an agent.
#[map]
pub(crate) static AGENT_CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(64, 0);
#[map]
pub(crate) static ORIGINALS: HashMap<Tuple, Original> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static AUTHORISED: HashMap<Tuple, Authorised> =
    HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static VERDICTS: HashMap<VerdictKey, Verdict> =
    HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// Socket cookie of the client -> figures. Every connection of the fast path is in it: only so can each be ended.
#[map]
pub(crate) static FLOWS: HashMap<u64, Flow> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
#[map]
pub(crate) static NAMESERVERS: HashMap<NameserverKey, Endpoint> =
    HashMap::with_max_entries(4096 * DNS_PORTS as u32, BPF_F_NO_PREALLOC);
/// Prefix -> leave or capture.
#[map]
pub(crate) static DESTINATIONS: LpmTrie<[u32; 4], u32> = LpmTrie::with_max_entries(4096, 0);
/// Destination ports that are left to the kernel.
#[map]
pub(crate) static EXCLUDED_PORTS: HashMap<u32, u32> = HashMap::with_max_entries(1024, 0);
/// Cgroup id of a kubelet.
#[map]
pub(crate) static KUBELETS: HashMap<u64, u32> = HashMap::with_max_entries(64, 0);
/// Declared probe ports of enrolled pods.
#[map]
pub(crate) static PROBE_PORTS: HashMap<Endpoint, u32> = HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);
/// What the hooks know of a socket.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<Socket> = SkStorage::new();

/// One entry of CONFIG, 0 for an index that does not exist.
#[inline(always)]
pub(crate) fn setting(index: u32) -> u64 {
    match CONFIG.get_ptr(index) {
        // SAFETY: array entries live as long as the map; user space writes them whole.
        Some(value) => unsafe { value.read_volatile() },
        None => 0,
    }
}

#[inline(always)]
pub(crate) fn count(reason: Reason) {
    if let Some(value) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: per-CPU entries are only touched by this CPU, with preemption between programs ordered by it.
        unsafe { *value += 1 }
    }
}

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper takes nothing and reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

/// Whether an agent showed a sign of life within the last three seconds.
#[inline(always)]
pub(crate) fn agent_alive() -> bool {
    now().wrapping_sub(setting(config::HEARTBEAT)) < HEARTBEAT_STALE_NS
}

/// Whether the calling task is an agent.
#[inline(always)]
pub(crate) fn called_by_agent() -> bool {
    let process = (bpf_get_current_pid_tgid() >> 32) as u32;
    // SAFETY: the entry is plain data; user space only overwrites it with a newer time.
    if let Some(seen) = unsafe { AGENTS.get(&process) } {
        if now().wrapping_sub(*seen) < HEARTBEAT_STALE_NS {
            return true;
        }
    }
    // SAFETY: the helper takes nothing; the map's value is not read.
    unsafe { AGENT_CGROUPS.get(&bpf_get_current_cgroup_id()) }.is_some()
}

#[inline(always)]
pub(crate) fn is_capture_port(port: u16) -> bool {
    port.wrapping_sub(CAPTURE_PORTS_START) < CAPTURE_PORTS
}

#[inline(always)]
pub(crate) fn is_dns_port(port: u16) -> bool {
    port.wrapping_sub(DNS_PORTS_START) < DNS_PORTS
}

/// The slot of the pod that owns a local address.
#[inline(always)]
pub(crate) fn owner(address: &Address) -> Option<u32> {
    // SAFETY: the entry is one word.
    unsafe { OWN_ADDRESSES.get(address) }.map(|owner| owner.slot)
}

/// Loopback, and `0.0.0.0` and `::`, which mean it.
#[inline(always)]
fn is_loopback(address: &Address) -> bool {
    if address.is_v4() {
        let first = u32::from_be(address.0[3]) >> 24;
        return first == 127 || address.0[3] == 0;
    }
    address.0[0] == 0 && address.0[1] == 0 && address.0[2] == 0 && u32::from_be(address.0[3]) <= 1
}

/// IPv6 link-local (no address of the pod stands for it: it needs an interface) and multicast.
#[inline(always)]
fn is_link_scoped(address: &Address) -> bool {
    let head = u32::from_be(address.0[0]);
    if address.is_v4() {
        return u32::from_be(address.0[3]) >> 28 == 0xe;
    }
    head >> 22 == 0xfe80 >> 6 || head >> 24 == 0xff
}

/// Why a destination is left to the kernel, if it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// The pod itself.
    Own,
    /// Loopback or link scope.
    Local,
    /// By setting.
    Excluded,
    /// Outside of what is to be captured (does not hold for DNS).
    Unlisted,
}

/// Whether a destination is left to the kernel.
#[inline(always)]
pub(crate) fn left_to_kernel(pod: &Pod, to: &Endpoint) -> Option<Leave> {
    if is_loopback(&to.address) || is_link_scoped(&to.address) {
        return Some(Leave::Local);
    }
    if owner(&to.address) == Some(pod.slot) {
        return Some(Leave::Own);
    }
    // SAFETY: the value is not read.
    if unsafe { EXCLUDED_PORTS.get(&(to.port as u32)) }.is_some() {
        return Some(Leave::Excluded);
    }
    match DESTINATIONS.get(Key::new(128, to.address.0)) {
        Some(&destination::LEAVE) => Some(Leave::Excluded),
        Some(_) => None,
        None if setting(config::LEAVE_UNLISTED) != 0 => Some(Leave::Unlisted),
        None => None,
    }
}

/// Whether a pod's port 53 goes to its DNS listener.
#[inline(always)]
pub(crate) fn answers_dns(pod: &Pod) -> bool {
    setting(config::DNS) != 0 && pod.flags & pod_flag::LEAVE_DNS == 0
}

/// The verdict on a pair, if it allows the fast path in the current generation.
#[inline(always)]
pub(crate) fn allowed(key: &VerdictKey) -> Option<Verdict> {
    // SAFETY: the entry is copied; a concurrent write of a newer verdict is caught by its generation at sk_lookup.
    let verdict = unsafe { VERDICTS.get(key) }.copied()?;
    let current = setting(config::GENERATION) as u32;
    // The agent writes verdicts of the next generation before it flips.
    let fresh = verdict.generation.wrapping_sub(current) as i32 >= 0;
    (verdict.allow == 1 && fresh).then_some(verdict)
}

/// A connection of the fast path at its start.
#[inline(always)]
pub(crate) fn flow(netns: u64, tuple: Tuple, state: u32, known: &Socket) -> Flow {
    let now = now();
    Flow {
        tuple,
        state,
        netns,
        opened_ns: now,
        updated_ns: now,
        bytes_sent: 0,
        bytes_received: 0,
        srtt_us: 0,
        retransmits: 0,
        generation: known.generation,
        policy: known.policy,
        verdict_flags: known.verdict_flags,
        astray: 0,
    }
}

/// A spread of destinations over the ports of a range.
#[inline(always)]
pub(crate) fn spread(to: &Endpoint) -> u32 {
    let mut hash = to.port as u32;
    hash = (hash ^ to.address.0[0]).wrapping_mul(0x9e37_79b1);
    hash = (hash.rotate_left(13) ^ to.address.0[1]).wrapping_mul(0x85eb_ca6b);
    hash = (hash.rotate_left(13) ^ to.address.0[2]).wrapping_mul(0xc2b2_ae35);
    hash = (hash.rotate_left(13) ^ to.address.0[3]).wrapping_mul(0x27d4_eb2f);
    // Addresses are network order, so neighbours differ in the top bits: mix them down to the ones that count.
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// What is known of a socket; with `create`, something always is unless the kernel is out of memory.
#[inline(always)]
pub(crate) fn socket_storage<'a>(socket: *mut bpf_sock, create: bool) -> Option<&'a mut Socket> {
    let map = core::ptr::from_ref(&SOCKETS).cast_mut().cast();
    // SAFETY: the caller gives a socket of its context (the verifier checks); the value lives until the program ends.
    unsafe {
        bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), u64::from(create))
            .cast::<Socket>()
            .as_mut()
    }
}

/// Whether diagnostics are on.
#[inline(always)]
pub(crate) fn logging() -> bool {
    setting(config::LOG) != 0
}
