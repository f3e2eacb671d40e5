//! The map of own addresses follows the addresses of every enrolled pod, on one thread that sleeps until netlink
//! tells of a change.
//!
//! An address that two pods of the node claim belongs to nobody: connections to it are refused, because handing them
//! to the wrong pod would be worse.

use super::CaptureError;
use super::enrol::EnrolledPod;
use super::maps::Maps;
use super::routes::{OwnAddress, PodNetlink};
use crate::sys::bpf::Write;
use crate::sys::poll::Poll;
use mesh_ebpf::{Address, Endpoint, Owner, Pod, pod_flag};
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Longest time until the thread sees that it should end.
const LOOK_MS: i32 = 500;

struct Watched {
    pod: Arc<EnrolledPod>,
    netlink: PodNetlink,
}

#[derive(Default)]
struct Table {
    pods: HashMap<u64, Watched>,
    owners: HashMap<IpAddr, BTreeSet<u32>>,
}

struct Shared {
    maps: Arc<Maps>,
    poll: Poll,
    table: Mutex<Table>,
    stop: AtomicBool,
}

/// The thread; it ends when this is dropped.
pub(super) struct AddressWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let ready = match self.poll.wait(LOOK_MS) {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "watching addresses of pods failed");
                    return;
                }
            };
            for cookie in ready {
                let mut table = self.table();
                if let Err(error) = self.look(&mut table, cookie) {
                    tracing::warn!(%error, cookie, "cannot read the addresses of a pod");
                }
            }
        }
    }

    fn look(&self, table: &mut Table, cookie: u64) -> io::Result<()> {
        let Some(watched) = table.pods.get(&cookie) else { return Ok(()) };
        watched.netlink.drain()?;
        let found = watched.netlink.addresses()?;
        let pod = Arc::clone(&watched.pod);
        self.update(table, &pod, &found)
    }

    /// Brings maps and the pod's own list to what netlink says.
    fn update(&self, table: &mut Table, pod: &EnrolledPod, found: &[OwnAddress]) -> io::Result<()> {
        let before = pod.addresses();
        let now: Vec<IpAddr> = found.iter().map(|address| address.ip).collect();
        for ip in &now {
            table.owners.entry(*ip).or_default().insert(pod.slot);
            self.write_owner(table, *ip)?;
            for port in &pod.info.probe_ports {
                self.maps.probe_ports.set(&Endpoint::new((*ip).into(), *port), &1, Write::Any)?;
            }
        }
        let mut gone: Vec<IpAddr> = if pod.is_adopted {
            table.owners.iter().filter(|(_, slots)| slots.contains(&pod.slot)).map(|(ip, _)| *ip).collect()
        } else {
            // No other was ever written for it: a thousand pods need not look through the addresses of all of them.
            before.to_vec()
        };
        gone.retain(|ip| !now.contains(ip));
        // The rewritten destination moves before the old one stops being an own address.
        let on_segment = found.iter().any(|address| address.on_segment);
        pod.set_addresses(now, self.entry(pod, found, &before), on_segment);
        if pod.is_active() {
            self.maps.pods.set(&pod.cookie, &pod.entry(), Write::Any)?;
        }
        for ip in gone {
            self.disown(table, pod, ip)?;
        }
        Ok(())
    }

    /// The pod's entry: the first fit address of each family, the one of before while it is still there.
    fn entry(&self, pod: &EnrolledPod, found: &[OwnAddress], before: &[IpAddr]) -> Pod {
        let mut fit: Vec<IpAddr> = Vec::new();
        for address in found.iter().filter(|address| address.primary) {
            // One address with two prefixes is one source.
            if !fit.contains(&address.ip) {
                fit.push(address.ip);
            }
        }
        let current = pod.entry();
        let pick = |v4: bool, current: Address| {
            let of_family: Vec<IpAddr> = fit.iter().copied().filter(|ip| ip.is_ipv4() == v4).collect();
            let kept = of_family.iter().find(|ip| Address::from(**ip) == current && before.contains(ip));
            let chosen = kept.or(of_family.first()).map_or(Address::NONE, |ip| (*ip).into());
            (chosen, of_family.len() > 1)
        };
        let ((v4, several_v4), (v6, several_v6)) = (pick(true, current.v4), pick(false, current.v6));
        let flags = (if several_v4 { pod_flag::SEVERAL_V4 } else { 0 })
            | (if several_v6 { pod_flag::SEVERAL_V6 } else { 0 })
            | pod.own_flags();
        Pod { slot: pod.slot, flags, v4, v6 }
    }

    fn write_owner(&self, table: &Table, ip: IpAddr) -> io::Result<()> {
        let slots = table.owners.get(&ip);
        let slot = match slots.and_then(|slots| slots.first()) {
            None => return self.maps.own_addresses.remove(&ip.into()).map(|_| ()),
            Some(slot) if slots.is_some_and(|slots| slots.len() == 1) => *slot,
            Some(_) => {
                tracing::warn!(%ip, "several pods of this node claim the address: connections to it are refused");
                Owner::AMBIGUOUS
            }
        };
        self.maps.own_addresses.set(&ip.into(), &Owner { slot }, Write::Any)
    }

    fn disown(&self, table: &mut Table, pod: &EnrolledPod, ip: IpAddr) -> io::Result<()> {
        if let Some(slots) = table.owners.get_mut(&ip) {
            slots.remove(&pod.slot);
            if slots.is_empty() {
                table.owners.remove(&ip);
            }
        }
        let mut outcome = self.write_owner(table, ip);
        for port in &pod.info.probe_ports {
            let removed = self.maps.probe_ports.remove(&Endpoint::new(ip.into(), *port));
            outcome = outcome.and(removed.map(|_| ()));
        }
        outcome
    }
}

impl AddressWatch {
    pub(super) fn start(maps: Arc<Maps>) -> Result<Self, CaptureError> {
        const NAME: &str = "addresses";
        let failed = |source| CaptureError::Thread { name: NAME, source };
        let mut table = Table::default();
        // What an earlier agent knew holds until the pods are enrolled again.
        for (address, owner) in maps.own_addresses.entries().map_err(failed)? {
            if owner.slot != Owner::AMBIGUOUS {
                table.owners.entry(address.to_ip()).or_default().insert(owner.slot);
            }
        }
        let shared = Arc::new(Shared {
            maps,
            poll: Poll::new().map_err(failed)?,
            table: Mutex::new(table),
            stop: AtomicBool::new(false),
        });
        let runner = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name(NAME.into()).spawn(move || runner.run()).map_err(failed)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Follows a pod's addresses from now on; they are in the maps when this returns.
    pub(super) fn add(&self, pod: &Arc<EnrolledPod>, netlink: PodNetlink) -> io::Result<()> {
        let mut table = self.shared.table();
        // Subscribed first, read afterwards: no change falls between.
        let found = netlink.addresses()?;
        self.shared.poll.add(&netlink, pod.cookie)?;
        if let Err(error) = self.shared.update(&mut table, pod, &found) {
            // What an earlier agent wrote for it still holds.
            if !pod.is_adopted {
                self.remove_slot(&mut table, pod)?;
            }
            return Err(error);
        }
        table.pods.insert(pod.cookie, Watched { pod: Arc::clone(pod), netlink });
        Ok(())
    }

    /// Stops following a pod, whose addresses stay in the maps.
    pub(super) fn unwatch(&self, pod: &EnrolledPod) {
        self.shared.table().pods.remove(&pod.cookie);
    }

    /// Runs something while no entry of a pod is being written.
    pub(super) fn paused<T>(&self, run: impl FnOnce() -> T) -> T {
        let _table = self.shared.table();
        run()
    }

    /// Stops following a pod and removes its addresses.
    pub(super) fn remove(&self, pod: &EnrolledPod) -> io::Result<()> {
        let mut table = self.shared.table();
        table.pods.remove(&pod.cookie);
        self.remove_slot(&mut table, pod)
    }

    fn remove_slot(&self, table: &mut Table, pod: &EnrolledPod) -> io::Result<()> {
        let owned: Vec<IpAddr> =
            table.owners.iter().filter(|(_, slots)| slots.contains(&pod.slot)).map(|(ip, _)| *ip).collect();
        let mut outcome = Ok(());
        for ip in owned {
            outcome = outcome.and(self.shared.disown(table, pod, ip));
        }
        outcome
    }

    /// Removes the addresses of a slot that no pod holds any more.
    pub(super) fn forget_slot(&self, slot: u32) -> io::Result<()> {
        let mut table = self.shared.table();
        let owned: Vec<IpAddr> =
            table.owners.iter().filter(|(_, slots)| slots.contains(&slot)).map(|(ip, _)| *ip).collect();
        for ip in owned {
            if let Some(slots) = table.owners.get_mut(&ip) {
                slots.remove(&slot);
                if slots.is_empty() {
                    table.owners.remove(&ip);
                }
            }
            self.shared.write_owner(&table, ip)?;
        }
        Ok(())
    }
}

impl Drop for AddressWatch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been logged by the runtime; nothing is left to do.
            let _ = thread.join();
        }
    }
}
