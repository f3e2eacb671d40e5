//! Enrolling a pod, and letting it go.

use super::routes::PodNetlink;
use super::{Capture, CaptureError};
use crate::pods::PodInfo;
use crate::sys::Netns;
use crate::sys::bpf::Write;
use arc_swap::ArcSwap;
use mesh_ebpf::{LISTENERS_PER_POD, NameserverKey, Pod, pod_flag};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Descriptors that one pod needs: its namespace, netlink, and listeners of the workers.
const DESCRIPTORS_PER_POD: u64 = 16;
/// Descriptors kept free for connections and everything else.
const DESCRIPTORS_KEPT: u64 = 1024;

impl std::fmt::Display for PodInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod whose namespace is prepared, and captured once it is activated.
#[derive(Debug)]
pub struct EnrolledPod {
    pub info: PodInfo,
    /// Where sockets of this pod are made.
    pub netns: Netns,
    /// What the kernel programs know the namespace by.
    pub cookie: u64,
    /// The pod's place in the listener map.
    pub slot: u32,
    addresses: ArcSwap<Vec<IpAddr>>,
    entry: ArcSwap<Pod>,
    active: AtomicBool,
    leaves_dns: AtomicBool,
    joining: AtomicBool,
    on_segment: AtomicBool,
    /// An earlier agent captured it: giving up on it must not uncapture it.
    pub(super) is_adopted: bool,
}

impl EnrolledPod {
    /// The pod's addresses of this moment, of every interface and family, without loopback's.
    #[must_use]
    pub fn addresses(&self) -> Arc<Vec<IpAddr>> {
        self.addresses.load_full()
    }

    /// Whether an address of the pod is part of a subnet on its link, where neighbours could claim it.
    #[must_use]
    pub fn on_segment(&self) -> bool {
        self.on_segment.load(Ordering::Acquire)
    }

    /// Whether the pod is captured.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// The flags of its entry that do not come from its addresses.
    pub(super) fn own_flags(&self) -> u32 {
        let dns = if self.leaves_dns.load(Ordering::Acquire) { pod_flag::LEAVE_DNS } else { 0 };
        let joining = if self.joining.load(Ordering::Acquire) { pod_flag::JOINING } else { 0 };
        dns | joining
    }

    /// Brings the flags of its entry up to date. Call it while no entry is being written.
    fn refresh_flags(&self) {
        let entry = self.entry();
        let of_addresses = entry.flags & !(pod_flag::LEAVE_DNS | pod_flag::JOINING);
        self.entry.store(Arc::new(Pod { flags: of_addresses | self.own_flags(), ..entry }));
    }

    pub(super) fn entry(&self) -> Pod {
        **self.entry.load()
    }

    pub(super) fn set_addresses(&self, addresses: Vec<IpAddr>, entry: Pod, on_segment: bool) {
        self.on_segment.store(on_segment, Ordering::Release);
        self.addresses.store(Arc::new(addresses));
        self.entry.store(Arc::new(entry));
    }
}

#[derive(Default)]
struct State {
    pods: HashMap<u64, Arc<EnrolledPod>>,
    /// Pods that were let go, as long as somebody looks after what is left of their connections.
    left: HashMap<u64, Weak<EnrolledPod>>,
    /// Slots of pods that an earlier agent enrolled and this one has not yet.
    adopted: HashMap<u64, u32>,
    /// What an earlier agent enrolled and this one did not has been let go.
    has_taken_over: bool,
    free: BTreeSet<u32>,
}

impl State {
    /// Takes back a pod's slot.
    fn return_slot(&mut self, pod: &EnrolledPod) {
        if pod.is_adopted && !self.has_taken_over {
            self.adopted.insert(pod.cookie, pod.slot);
        } else {
            self.free.insert(pod.slot);
        }
    }
}

/// Which pods hold which slots.
pub(super) struct Registry {
    state: Mutex<State>,
    size: u32,
}

impl Registry {
    /// Takes over what an earlier agent left in the maps.
    pub(super) fn adopt(maps: &super::maps::Maps, size: u32) -> Result<Self, CaptureError> {
        let entries = maps.pods.entries().map_err(|source| CaptureError::Map { map: "PODS", source })?;
        let adopted: HashMap<u64, u32> = entries.iter().map(|(cookie, pod)| (*cookie, pod.slot)).collect();
        let taken: BTreeSet<u32> = adopted.values().copied().collect();
        let free = (0..size).filter(|slot| !taken.contains(slot)).collect();
        Ok(Self { state: Mutex::new(State { adopted, free, ..State::default() }), size })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed(pod: &PodInfo, action: &'static str) -> impl FnOnce(io::Error) -> CaptureError {
    let pod = pod.to_string();
    move |source| CaptureError::Pod { pod, action, source }
}

impl Capture {
    /// Prepares a pod: opens its namespace, makes the rule and route of the agent's connections, gives it a slot and
    /// follows its addresses. The pod is not captured yet (unless an earlier agent captured it). Enrolling a pod
    /// that is enrolled answers the same pod.
    ///
    /// # Errors
    /// The namespace is gone, the node's own, or enrolled under another uid; all slots are taken; too few
    /// descriptors are left.
    pub fn enrol(&self, info: &PodInfo) -> Result<Arc<EnrolledPod>, CaptureError> {
        let netns = Netns::open(&info.netns).map_err(failed(info, "open its network namespace"))?;
        check_descriptors(info, &netns)?;
        let home =
            Netns::home().and_then(|home| home.inode()).map_err(failed(info, "read the node's namespace"))?;
        let inode = netns.inode().map_err(failed(info, "read its network namespace"))?;
        if info.host_network || inode == home {
            return Err(CaptureError::HostNetwork { pod: info.to_string() });
        }
        let cookie = netns.cookie().map_err(failed(info, "read the cookie of its network namespace"))?;
        if let Some(pod) = self.enrolled(cookie) {
            if pod.info.uid == info.uid {
                return Ok(pod);
            }
            return Err(CaptureError::Duplicate { pod: info.to_string(), other: pod.info.to_string() });
        }
        let netlink =
            PodNetlink::open(&netns).map_err(failed(info, "open netlink in its network namespace"))?;
        netlink.prepare(&netns).map_err(failed(info, "prepare its network namespace"))?;
        let (slot, is_adopted) = self.take_slot(info, cookie)?;
        let pod = Arc::new(EnrolledPod {
            info: info.clone(),
            netns,
            cookie,
            slot,
            addresses: ArcSwap::default(),
            entry: ArcSwap::from_pointee(Pod { slot, ..Pod::default() }),
            active: AtomicBool::new(false),
            leaves_dns: AtomicBool::new(false),
            joining: AtomicBool::new(false),
            on_segment: AtomicBool::new(false),
            is_adopted,
        });
        if let Err(source) = self.addresses.add(&pod, netlink) {
            self.enrolled.state().return_slot(&pod);
            return Err(failed(info, "read its addresses")(source));
        }
        self.enrolled.state().pods.insert(cookie, Arc::clone(&pod));
        Ok(pod)
    }

    /// A slot, and whether it is the one that an earlier agent gave the pod.
    fn take_slot(&self, info: &PodInfo, cookie: u64) -> Result<(u32, bool), CaptureError> {
        let mut state = self.enrolled.state();
        if let Some(slot) = state.adopted.remove(&cookie) {
            return Ok((slot, true));
        }
        let max = self.enrolled.size;
        let slot = state.free.pop_first();
        slot.map(|slot| (slot, false)).ok_or_else(|| CaptureError::NoSlot { pod: info.to_string(), max })
    }

    /// The enrolled pod of a network namespace.
    #[must_use]
    pub fn enrolled(&self, cookie: u64) -> Option<Arc<EnrolledPod>> {
        self.enrolled.state().pods.get(&cookie).cloned()
    }

    /// The pod of a network namespace, if it is enrolled, or was and connections of it are still looked after.
    pub(super) fn known(&self, cookie: u64) -> Option<Arc<EnrolledPod>> {
        let state = self.enrolled.state();
        let left = || state.left.get(&cookie).and_then(Weak::upgrade);
        state.pods.get(&cookie).cloned().or_else(left)
    }

    /// All enrolled pods.
    #[must_use]
    pub fn enrolled_pods(&self) -> Vec<Arc<EnrolledPod>> {
        self.enrolled.state().pods.values().cloned().collect()
    }

    /// Starts capturing a pod whose listeners are registered: inbound first, then outbound.
    ///
    /// # Errors
    /// The namespace is gone, or a map is full. A pod that was not captured before is not captured then, in neither
    /// direction.
    pub fn activate(&self, pod: &EnrolledPod) -> Result<(), CaptureError> {
        let noted = self.maps.config(mesh_ebpf::config::OBJECT_HASH)?;
        self.programs
            .attach_pod(&pod.netns, pod.cookie, noted)
            .map_err(failed(&pod.info, "attach sk_lookup to its network namespace"))?;
        // The watch of addresses writes entries of active pods, too.
        let written = self.addresses.paused(|| {
            // What an earlier agent captured has joined long ago.
            if !pod.is_active() && !pod.is_adopted {
                pod.joining.store(true, Ordering::Release);
                pod.refresh_flags();
            }
            let written = self.maps.pods.set(&pod.cookie, &pod.entry(), Write::Any);
            if written.is_ok() {
                pod.active.store(true, Ordering::Release);
            }
            written
        });
        if written.is_err()
            && !pod.is_active()
            && !pod.is_adopted
            && let Err(error) = self.programs.detach_pod(pod.cookie)
        {
            tracing::error!(%error, pod = %pod.info, "sk_lookup stays attached to a pod that is not captured");
        }
        written.map_err(failed(&pod.info, "write it to the map PODS"))
    }

    /// Gives up on a pod that was enrolled and could not be activated. What an earlier agent captured stays captured,
    /// which means refused, until it is enrolled after all or [`Capture::forget_unclaimed`] lets it go.
    ///
    /// # Errors
    /// As for [`Capture::release`].
    pub fn abandon(&self, pod: &EnrolledPod) -> Result<(), CaptureError> {
        let keep = pod.is_adopted && !self.enrolled.state().has_taken_over;
        if !keep {
            return self.release(pod);
        }
        pod.active.store(false, Ordering::Release);
        self.addresses.unwatch(pod);
        let mut state = self.enrolled.state();
        if state.pods.remove(&pod.cookie).is_some() {
            state.return_slot(pod);
        }
        Ok(())
    }

    /// Says whether the pod's DNS queries go to its DNS listeners (the default), as far as the mesh captures DNS at all
    /// ([`super::MeshSettings::dns`]).
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn set_dns(&self, pod: &EnrolledPod, answered: bool) -> Result<(), CaptureError> {
        if pod.leaves_dns.swap(!answered, Ordering::AcqRel) != answered {
            return Ok(());
        }
        self.write_flags(pod)
    }

    /// Says that a pod was captured long enough ago: connect calls from before have done what they could. From now on
    /// a SYN that the connect hook has not seen does not leave.
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn joined(&self, pod: &EnrolledPod) -> Result<(), CaptureError> {
        if pod.joining.swap(false, Ordering::AcqRel) { self.write_flags(pod) } else { Ok(()) }
    }

    fn write_flags(&self, pod: &EnrolledPod) -> Result<(), CaptureError> {
        // The watch of addresses writes entries, too.
        let written = self.addresses.paused(|| {
            pod.refresh_flags();
            if pod.is_active() { self.maps.pods.set(&pod.cookie, &pod.entry(), Write::Any) } else { Ok(()) }
        });
        written.map_err(failed(&pod.info, "write it to the map PODS"))
    }

    /// Whether the kernel's state of an activated pod is what it should be: attached, and in the maps.
    #[must_use]
    pub fn is_intact(&self, pod: &EnrolledPod) -> bool {
        self.programs.is_pod_attached(&pod.netns, pod.cookie)
            && self.maps.pods.get(&pod.cookie).is_ok_and(|entry| entry == Some(pod.entry()))
    }

    /// Captures no new outbound connection of a pod. One whose connect call came before is still on its way to the
    /// outbound listener: give it a moment before [`Capture::release`].
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn let_out(&self, pod: &EnrolledPod) -> Result<(), CaptureError> {
        // The watch of addresses writes entries of active pods.
        let removed = self.addresses.paused(|| {
            pod.active.store(false, Ordering::Release);
            self.maps.pods.remove(&pod.cookie)
        });
        removed.map(drop).map_err(failed(&pod.info, "remove it from the map PODS"))
    }

    /// Stops capturing a pod: outbound first, then inbound. Its connections of this moment go on; close its listeners
    /// afterwards.
    ///
    /// # Errors
    /// Only if the kernel refuses; everything that can be removed is removed all the same.
    pub fn release(&self, pod: &EnrolledPod) -> Result<(), CaptureError> {
        pod.active.store(false, Ordering::Release);
        let outcome = self.clear(pod.cookie, pod.slot).and(self.addresses.remove(pod));
        let mut state = self.enrolled.state();
        if let Some(released) = state.pods.remove(&pod.cookie) {
            state.free.insert(pod.slot);
            state.left.retain(|_, left| left.strong_count() > 0);
            state.left.insert(pod.cookie, Arc::downgrade(&released));
        }
        outcome.map_err(failed(&pod.info, "release it"))
    }

    /// Removes a pod's traces from maps and pins, each whatever becomes of the others.
    fn clear(&self, cookie: u64, slot: u32) -> io::Result<()> {
        let mut outcome = self.clear_pod(cookie);
        for kind in 0..LISTENERS_PER_POD {
            let removed = self.maps.listeners.remove(&(slot * LISTENERS_PER_POD + kind));
            outcome = outcome.and(removed.map(|_| ()));
        }
        for index in 0..u32::from(mesh_ebpf::DNS_PORTS) {
            let removed = self.maps.nameservers.remove(&NameserverKey { slot, index });
            outcome = outcome.and(removed.map(|_| ()));
        }
        outcome
    }

    /// Removes what is kept under a pod's cookie, and leaves its slot alone.
    fn clear_pod(&self, cookie: u64) -> io::Result<()> {
        let pods = self.maps.pods.remove(&cookie);
        let link = self.programs.detach_pod(cookie);
        pods.map(|_| ()).and(link)
    }

    /// Lets go of pods that an earlier agent enrolled and that this one was not told to, and of programs of other
    /// layouts. Call it once the pods of the node have been enrolled after start. Returns how many pods.
    ///
    /// # Errors
    /// Only if the kernel refuses.
    pub fn forget_unclaimed(&self) -> Result<usize, CaptureError> {
        let (adopted, held): (Vec<(u64, u32)>, BTreeSet<u32>) = {
            let mut state = self.enrolled.state();
            state.has_taken_over = true;
            let held = state.pods.values().map(|pod| pod.slot).collect();
            (state.adopted.drain().collect(), held)
        };
        let mut outcome = Ok(());
        for (cookie, slot) in &adopted {
            // An agent that drained wrote a pod that was gone once more, when the next had given its slot to another.
            if held.contains(slot) {
                outcome = outcome.and(self.clear_pod(*cookie));
                continue;
            }
            let cleared = self.clear(*cookie, *slot).and(self.addresses.forget_slot(*slot));
            outcome = outcome.and(cleared);
            self.enrolled.state().free.insert(*slot);
        }
        outcome.map_err(|source| CaptureError::Map { map: "PODS", source })?;
        self.others().iter_mut().try_for_each(super::layouts::OtherLayout::stop_capturing)?;
        Ok(adopted.len())
    }
}

/// Pods that fit into a limit of open files.
pub(super) const fn pods_that_fit(limit: u64) -> u64 {
    let kept = if limit / 4 < DESCRIPTORS_KEPT { limit / 4 } else { DESCRIPTORS_KEPT };
    (limit - kept) / DESCRIPTORS_PER_POD
}

/// Refuses a pod that would not leave enough descriptors. The namespace's own descriptor is the lowest free number,
/// which is about how many are open.
fn check_descriptors(info: &PodInfo, netns: &Netns) -> Result<(), CaptureError> {
    let open = u64::try_from(netns.as_fd().as_raw_fd()).unwrap_or(0);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    if open + DESCRIPTORS_PER_POD + DESCRIPTORS_KEPT.min(limit / 4) > limit {
        let needed = DESCRIPTORS_PER_POD;
        return Err(CaptureError::Descriptors { pod: info.to_string(), open, limit, needed });
    }
    Ok(())
}
