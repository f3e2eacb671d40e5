//! Loads the object, makes or adopts pins, attaches programs.
//!
//! Links are pinned, not programs: a new agent loads its own object against the pinned maps and swaps the program of
//! every pinned link atomically, and only if the object's hash differs from the one that is attached. So there is no
//! moment without programs and none with half of them.

use super::maps::{self, Maps};
use super::{CaptureConfig, CaptureError, Limits, ObjectSource};
use crate::sys::Netns;
use crate::sys::bpf::{self, AttachType};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use mesh_ebpf::{LAYOUT_VERSION, LISTENERS_PER_POD, config};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

include!(concat!(env!("OUT_DIR"), "/object.rs"));

/// The cgroup programs: name, attach type, whether on the host's cgroup (else the pods').
const CGROUP_PROGRAMS: [(&str, AttachType, bool); 13] = [
    // The programs that record come before the ones that make records necessary.
    ("pod_sockets", AttachType::CgroupSockOps, false),
    ("getpeername4", AttachType::Getpeername4, false),
    ("getpeername6", AttachType::Getpeername6, false),
    ("recvmsg4", AttachType::Recvmsg4, false),
    ("recvmsg6", AttachType::Recvmsg6, false),
    ("sendmsg4", AttachType::Sendmsg4, false),
    ("sendmsg6", AttachType::Sendmsg6, false),
    ("connect4", AttachType::Connect4, false),
    ("connect6", AttachType::Connect6, false),
    ("pod_egress", AttachType::CgroupEgress, false),
    ("host_sockets", AttachType::CgroupSockOps, true),
    ("host_connect4", AttachType::Connect4, true),
    ("host_connect6", AttachType::Connect6, true),
];

const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// The loaded programs and where they are attached.
pub(super) struct Programs {
    steer: OwnedFd,
    /// `<pins>/v<layout>`, if anything is pinned.
    pins: Option<PathBuf>,
    /// Links that no pin keeps: they end with this value.
    links: Mutex<Vec<(String, OwnedFd)>>,
    /// Keeps the programs and maps loaded, and the ring buffer of diagnostics.
    ebpf: Mutex<Ebpf>,
    /// Whether this object's programs differ from the ones that were attached.
    changed: bool,
    hash: u64,
}

/// The object's bytes.
fn object(source: &ObjectSource) -> Result<Vec<u8>, CaptureError> {
    match source {
        ObjectSource::Embedded if EMBEDDED.is_empty() => Err(CaptureError::NoObject),
        ObjectSource::Embedded => Ok(EMBEDDED.to_vec()),
        ObjectSource::File(path) => {
            fs::read(path).map_err(|source| CaptureError::Object { path: path.clone(), source })
        }
    }
}

/// FNV-1a: tells one object from another across agents; nobody attacks it.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn capacities(limits: &Limits) -> [(&'static str, u32); 9] {
    [
        ("PODS", limits.pods),
        ("OWN_ADDRESSES", limits.pods.saturating_mul(8)),
        ("LISTENERS", limits.pods.saturating_mul(LISTENERS_PER_POD)),
        ("NAMESERVERS", limits.pods.saturating_mul(u32::from(mesh_ebpf::DNS_PORTS))),
        ("ORIGINALS", limits.pending),
        ("AUTHORISED", limits.authorised),
        ("VERDICTS", limits.verdicts),
        ("FLOWS", limits.flows),
        ("TRACE_EVENTS", limits.trace_bytes),
    ]
}

/// Loads and attaches everything but the per-pod programs.
pub(super) fn load(settings: &CaptureConfig) -> Result<(Programs, Maps), CaptureError> {
    let bytes = object(&settings.object)?;
    let pins = settings.pins.as_deref().map(pin_directory).transpose()?;
    let netns_cookie = u8::from(kernel_at_least(6, 15));
    let mut loader = EbpfLoader::new();
    loader.override_global("SKB_HAS_NETNS_COOKIE", &netns_cookie, true);
    for (name, entries) in capacities(&settings.limits) {
        loader.map_max_entries(name, entries);
    }
    if let Some(pins) = &pins {
        for name in maps::NAMES {
            loader.map_pin_path(name, pins.join(name));
        }
    }
    let mut ebpf = loader.load(&bytes).map_err(|error| CaptureError::Load(Box::new(error)))?;
    let maps = Maps::of(&ebpf)?;
    let object_hash = hash(&bytes);
    let changed = maps.config(config::OBJECT_HASH)? != object_hash;
    let steer = load_program(&mut ebpf, "steer")?;
    let programs = Programs {
        steer,
        pins,
        links: Mutex::new(Vec::new()),
        ebpf: Mutex::new(ebpf),
        changed,
        hash: object_hash,
    };
    programs.attach_cgroups(settings)?;
    if changed {
        programs.replace_pods()?;
    }
    maps.set_config(config::OBJECT_HASH, object_hash)?;
    Ok((programs, maps))
}

/// Whether the running kernel is at least this version.
pub(super) fn kernel_at_least(major: u32, minor: u32) -> bool {
    aya::util::KernelVersion::current().is_ok_and(|now| now.code() >= (major << 16) + (minor << 8))
}

fn pin_directory(base: &Path) -> Result<PathBuf, CaptureError> {
    let path = base.join(format!("v{LAYOUT_VERSION}"));
    let failed = |source| CaptureError::PinDirectory { path: path.clone(), source };
    fs::create_dir_all(path.join("pods")).map_err(failed)?;
    let file_system = rustix::fs::statfs(&path).map_err(|error| failed(error.into()))?;
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    if file_system.f_type != BPF_FS_MAGIC {
        return Err(failed(io::Error::other("not on a bpffs")));
    }
    Ok(path)
}

pub(super) fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, CaptureError> {
    let program = ebpf.program_mut(name).ok_or(CaptureError::NoProgram(name))?;
    let failed = |source| CaptureError::Program { name, source: Box::new(source) };
    if let Ok(fd) = program.fd() {
        // From an earlier time that it was attached.
        return fd.as_fd().try_clone_to_owned().map_err(|source| CaptureError::Map { map: name, source });
    }
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => return Err(CaptureError::NoProgram(name)),
    }
    .map_err(failed)?;
    let fd = program.fd().map_err(failed)?;
    fd.as_fd().try_clone_to_owned().map_err(|source| CaptureError::Map { map: name, source })
}

/// A cgroup2 directory: the one given (or its `unified`, on a machine with both hierarchies), or the hierarchy's root.
///
/// # Errors
/// None is given, and cgroup2 is not mounted.
pub fn cgroup(path: Option<&Path>) -> Result<PathBuf, CaptureError> {
    let Some(path) = path else { return cgroup2_mount().ok_or(CaptureError::NoCgroup2) };
    let unified = path.join("unified");
    Ok(if !is_cgroup2(path) && is_cgroup2(&unified) { unified } else { path.to_owned() })
}

fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|file_system| file_system.f_type == CGROUP2_MAGIC)
}

/// Where cgroup2 is mounted.
pub(super) fn cgroup2_mount() -> Option<PathBuf> {
    cgroup2_mounts().into_iter().next()
}

/// Everywhere where cgroup2 is mounted: a container may see its own part of the hierarchy and the host's.
pub(super) fn cgroup2_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let kind = after.split(' ').next()?;
        let path = before.split(' ').nth(4)?;
        (kind == "cgroup2").then(|| PathBuf::from(path))
    };
    mounts.lines().filter_map(path).collect()
}

pub(super) fn open_cgroup(path: &Path) -> Result<File, CaptureError> {
    let failed = |source| CaptureError::Cgroup { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let file_system = rustix::fs::fstatfs(&file).map_err(|error| failed(error.into()))?;
    if file_system.f_type != CGROUP2_MAGIC {
        return Err(failed(io::Error::other("not in a cgroup2 hierarchy")));
    }
    Ok(file)
}

impl Programs {
    fn attach_cgroups(&self, settings: &CaptureConfig) -> Result<(), CaptureError> {
        let host = cgroup(settings.host_cgroup.as_deref())?;
        let pods = settings.pods_cgroup.clone().unwrap_or_else(|| host.clone());
        let (host_dir, pods_dir) = (open_cgroup(&host)?, open_cgroup(&pods)?);
        for (name, kind, on_host) in CGROUP_PROGRAMS {
            let program = load_program(&mut self.ebpf(), name)?;
            let (path, directory) = if on_host { (&host, &host_dir) } else { (&pods, &pods_dir) };
            self.attach(name, program.as_fd(), directory.as_fd(), kind, self.changed).map_err(|source| {
                CaptureError::Attach { name, target: format!("cgroup {}", path.display()), source }
            })?;
        }
        Ok(())
    }

    /// Where this layout's pins are, if anything is pinned.
    pub(super) fn pins(&self) -> Option<&Path> {
        self.pins.as_deref()
    }

    /// The loaded object. A panic elsewhere while it was locked leaves it usable: nothing changes it halfway.
    pub(super) fn ebpf(&self) -> std::sync::MutexGuard<'_, Ebpf> {
        self.ebpf.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.links.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Attaches a program under a link of this name, or adopts the pinned link of this name, whose program it `replaces`
    /// or not.
    fn attach(
        &self,
        link: &str,
        program: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        kind: AttachType,
        replaces: bool,
    ) -> io::Result<()> {
        let Some(pins) = &self.pins else {
            let fd = bpf::attach(program, target, kind)?;
            self.links().push((link.to_owned(), fd));
            return Ok(());
        };
        let path = pins.join(link);
        match bpf::open_pin(&path) {
            Ok(pinned) if is_attached(&pinned, target, kind)? => {
                if replaces {
                    bpf::replace(pinned.as_fd(), program)?;
                }
                return Ok(());
            }
            // The cgroup or namespace that it was attached to is gone, or another is meant now.
            Ok(_) => fs::remove_file(&path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let fd = bpf::attach(program, target, kind)?;
        bpf::pin(fd.as_fd(), &path)
    }

    fn pod_link(cookie: u64) -> String {
        format!("pods/{cookie}")
    }

    /// Attaches `sk_lookup` to a pod's namespace; nothing to do if it already is. `noted` is the hash of the object that
    /// the maps name: the agent whose object it is replaces what an older agent attached in the meantime, and an older
    /// one leaves what is there.
    pub(super) fn attach_pod(&self, netns: &Netns, cookie: u64, noted: u64) -> io::Result<()> {
        let link = Self::pod_link(cookie);
        if self.pins.is_none() && self.links().iter().any(|(name, _)| *name == link) {
            return Ok(());
        }
        self.attach(&link, self.steer.as_fd(), netns.as_fd(), AttachType::SkLookup, noted == self.hash)
    }

    /// Detaches `sk_lookup` from a pod's namespace. When this returns, no SYN meets it any more, so that the pod's
    /// listeners can go without a connection being refused for their lack.
    pub(super) fn detach_pod(&self, cookie: u64) -> io::Result<()> {
        let link = Self::pod_link(cookie);
        let Some(pins) = &self.pins else {
            let mut links = self.links();
            for (_, fd) in links.extract_if(.., |(name, _)| *name == link) {
                bpf::detach(fd.as_fd())?;
            }
            return Ok(());
        };
        let path = pins.join(link);
        match bpf::open_pin(&path) {
            Ok(fd) => {
                bpf::detach(fd.as_fd())?;
                fs::remove_file(&path)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether `sk_lookup` is attached to a living namespace under this cookie.
    pub(super) fn is_pod_attached(&self, netns: &Netns, cookie: u64) -> bool {
        let link = Self::pod_link(cookie);
        let check = |fd: &OwnedFd| is_attached(fd, netns.as_fd(), AttachType::SkLookup).unwrap_or(false);
        match &self.pins {
            None => self.links().iter().any(|(name, fd)| *name == link && check(fd)),
            Some(pins) => bpf::open_pin(&pins.join(link)).is_ok_and(|fd| check(&fd)),
        }
    }

    /// Gives this object's `sk_lookup` to every pod of an earlier agent.
    fn replace_pods(&self) -> Result<(), CaptureError> {
        let Some(pins) = &self.pins else { return Ok(()) };
        let directory = pins.join("pods");
        let entries = fs::read_dir(&directory)
            .map_err(|source| CaptureError::PinDirectory { path: directory.clone(), source })?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let failed = |source| CaptureError::Pin { path: path.clone(), source };
            let link = bpf::open_pin(&path).map_err(failed)?;
            match bpf::replace(link.as_fd(), self.steer.as_fd()) {
                // The namespace is gone: so is the need for the pin.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                    fs::remove_file(&path).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

/// Whether a link is attached to this very target.
fn is_attached(link: &OwnedFd, target: BorrowedFd<'_>, kind: AttachType) -> io::Result<bool> {
    let info = bpf::link_info(link.as_fd())?;
    let inode = rustix::fs::fstat(target)?.st_ino;
    Ok(match kind {
        AttachType::SkLookup => u64::from(info.target[0]) == inode,
        // A cgroup's id is its directory's inode.
        _ => u64::from(info.target[0]) | (u64::from(info.target[1]) << 32) == inode,
    })
}
