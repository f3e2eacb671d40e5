//! `bpf(2)` where aya's own types do not fit: map access through `&self` (workers share maps without a lock),
//! look-up-and-delete in one call, and links that are pinned and whose program is replaced atomically.

use super::check;
use aya::Pod;
use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Commands of `bpf(2)` (include/uapi/linux/bpf.h).
#[derive(Clone, Copy)]
#[repr(i64)]
enum Command {
    Lookup = 1,
    Update = 2,
    Delete = 3,
    NextKey = 4,
    Pin = 6,
    Get = 7,
    Info = 15,
    LookupAndDelete = 21,
    LookupBatch = 24,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// Where a program can be attached through a link (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    CgroupEgress = 1,
    CgroupSockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    SkLookup = 36,
}

/// How [`Table::set`] treats an existing entry.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub enum Write {
    Any = 0,
    /// Fails with `AlreadyExists` (EEXIST) if there is one.
    New = 1,
}

#[repr(C)]
struct Element {
    fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Batch {
    /// The position that the last call left, null for the first.
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Link {
    /// LinkCreate: program, target, attach type, flags. LinkUpdate: link, new program, flags, old program. LinkDetach:
    /// link.
    words: [u32; 4],
}

#[repr(C)]
struct Info {
    fd: u32,
    length: u32,
    info: u64,
}

/// Calls `bpf(2)`.
///
/// # Safety
/// Addresses inside `attr` must be valid for what the command reads and writes there.
unsafe fn bpf<T>(command: Command, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live repr(C) value of the size we give; the caller vouches for the addresses inside.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, std::ptr::from_mut(attr), size_of::<T>())
    })
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Pins a map, program or link at a path on a bpffs.
///
/// # Errors
/// The path exists or is not on a bpffs.
pub fn pin(object: BorrowedFd<'_>, at: &Path) -> io::Result<()> {
    let text = path(at)?;
    let mut attr = Object { path: text.as_ptr() as u64, fd: object.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: `text` is NUL-terminated and lives until the call returns.
    unsafe { bpf(Command::Pin, &mut attr) }.map(|_| ())
}

/// Opens a pinned map, program or link.
///
/// # Errors
/// `NotFound` if there is none.
pub fn open_pin(at: &Path) -> io::Result<OwnedFd> {
    let text = path(at)?;
    let mut attr = Object { path: text.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: `text` is NUL-terminated and lives until the call returns.
    let fd = unsafe { bpf(Command::Get, &mut attr) }?;
    Ok(owned(fd))
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just handed this descriptor to us alone; descriptors fit an i32.
    #[allow(clippy::cast_possible_truncation, reason = "a descriptor fits an i32")]
    unsafe {
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// Attaches a program to a cgroup directory or network namespace. The link ends when its last descriptor and pin do.
///
/// # Errors
/// EINVAL if the program's type does not fit, E2BIG beyond 64 programs of one kind on one target.
pub fn attach(program: BorrowedFd<'_>, target: BorrowedFd<'_>, kind: AttachType) -> io::Result<OwnedFd> {
    let mut attr = Link {
        words: [program.as_raw_fd().cast_unsigned(), target.as_raw_fd().cast_unsigned(), kind as u32, 0],
    };
    // SAFETY: the attribute holds no addresses.
    let fd = unsafe { bpf(Command::LinkCreate, &mut attr) }?;
    Ok(owned(fd))
}

/// Replaces the program of a link atomically.
///
/// # Errors
/// ENOLINK if the link's target is gone.
pub fn replace(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        Link { words: [link.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned(), 0, 0] };
    // SAFETY: the attribute holds no addresses.
    unsafe { bpf(Command::LinkUpdate, &mut attr) }.map(|_| ())
}

/// Detaches a link from its target before this returns. (A link whose last pin is removed is detached some time later.)
///
/// # Errors
/// Only if the descriptor is no link.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = Link { words: [link.as_raw_fd().cast_unsigned(), 0, 0, 0] };
    // SAFETY: the attribute holds no addresses.
    unsafe { bpf(Command::LinkDetach, &mut attr) }.map(|_| ())
}

/// Type, id, program and target of a link (`struct bpf_link_info`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    pub kind: u32,
    pub id: u32,
    pub program: u32,
    zero: u32,
    /// Network namespace links: its inode, 0 once it is gone. Cgroup links: the cgroup's id (both words).
    pub target: [u32; 2],
    rest: [u32; 26],
}

/// Reads what the kernel knows about a link.
///
/// # Errors
/// The descriptor is no BPF object.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attr = Info {
        fd: link.as_raw_fd().cast_unsigned(),
        length: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which is that long and lives until it returns.
    unsafe { bpf(Command::Info, &mut attr) }?;
    Ok(info)
}

/// Entries that one call reads.
const BATCH: usize = 1024;

/// A map with keys `K` and values `V`, shared by any number of threads: every operation is one system call.
#[derive(Debug)]
pub struct Table<K, V> {
    fd: OwnedFd,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Takes a map's descriptor.
    ///
    /// # Errors
    /// `InvalidData` if the map's key or value size is not that of `K` or `V`: a pin of another layout.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let (key, value) = sizes(fd.as_fd())?;
        if (key as usize, value as usize) != (size_of::<K>(), size_of::<V>()) {
            let text = format!(
                "the map has keys of {key} and values of {value} bytes, expected {} and {}",
                size_of::<K>(),
                size_of::<V>()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { fd, types: PhantomData })
    }

    fn element<T>(&self, key: &K, value: *mut T, flags: u64) -> Element {
        Element {
            fd: self.fd.as_raw_fd().cast_unsigned(),
            zero: 0,
            key: std::ptr::from_ref(key) as u64,
            value: value as u64,
            flags,
        }
    }

    /// Reads with a command that writes one value.
    fn read(&self, command: Command, key: &K) -> io::Result<Option<V>> {
        let mut value = std::mem::MaybeUninit::<V>::uninit();
        let mut attr = self.element(key, value.as_mut_ptr(), 0);
        // SAFETY: key and value have the sizes that `new` checked against the map.
        match unsafe { bpf(command, &mut attr) } {
            // SAFETY: the kernel filled the value, and V is plain data that any bytes are valid for (Pod).
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// Only if the kernel refuses (permissions).
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        self.read(Command::Lookup, key)
    }

    /// Takes the value of `key` out of a hash map in one call (5.14).
    ///
    /// # Errors
    /// Only if the kernel refuses (permissions, map type).
    pub fn take(&self, key: &K) -> io::Result<Option<V>> {
        self.read(Command::LookupAndDelete, key)
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// E2BIG if the map is full, EEXIST with [`Write::New`].
    pub fn set(&self, key: &K, value: &V, how: Write) -> io::Result<()> {
        let mut attr = self.element(key, std::ptr::from_ref(value).cast_mut(), how as u64);
        // SAFETY: key and value have the sizes that `new` checked against the map; the kernel only reads them.
        unsafe { bpf(Command::Update, &mut attr) }.map(|_| ())
    }

    /// Removes an entry; says whether there was one.
    ///
    /// # Errors
    /// Only if the kernel refuses (permissions).
    pub fn remove(&self, key: &K) -> io::Result<bool> {
        let mut attr = self.element::<V>(key, std::ptr::null_mut(), 0);
        // SAFETY: the key has the size that `new` checked against the map.
        match unsafe { bpf(Command::Delete, &mut attr) } {
            Ok(_) => Ok(true),
            // A socket map says EINVAL for an index without a socket.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::EINVAL) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// All keys of this moment; a map that changes meanwhile may show a key twice or miss a new one.
    ///
    /// # Errors
    /// Only if the kernel refuses (permissions).
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys = Vec::new();
        loop {
            let mut next = std::mem::MaybeUninit::<K>::uninit();
            let mut attr = Element {
                fd: self.fd.as_raw_fd().cast_unsigned(),
                zero: 0,
                key: keys.last().map_or(0, |key| std::ptr::from_ref::<K>(key) as u64),
                value: next.as_mut_ptr() as u64,
                flags: 0,
            };
            // SAFETY: both addresses are null or of the key's size that `new` checked.
            match unsafe { bpf(Command::NextKey, &mut attr) } {
                // SAFETY: the kernel filled the key; K is plain data.
                Ok(_) => keys.push(unsafe { next.assume_init() }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    /// All entries of a hash map, of this moment: what changes meanwhile may be missed, nothing comes twice. A thousand
    /// take one call (5.6).
    ///
    /// # Errors
    /// Only if the kernel refuses (permissions, map type).
    pub fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let (mut position, mut is_first) = (0_u32, true);
        let mut room = BATCH;
        loop {
            let (mut keys, mut values) = (Vec::<K>::with_capacity(room), Vec::<V>::with_capacity(room));
            let mut next = 0_u32;
            let mut attr = Batch {
                from: if is_first { 0 } else { (&raw const position) as u64 },
                next: (&raw mut next) as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: u32::try_from(room).unwrap_or(u32::MAX),
                fd: self.fd.as_raw_fd().cast_unsigned(),
                element_flags: 0,
                flags: 0,
            };
            // SAFETY: keys and values have room for `count` of the sizes that `new` checked against the map; a hash map's
            // position is four bytes.
            let is_last = match unsafe { bpf(Command::LookupBatch, &mut attr) } {
                Ok(_) => false,
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                // What shares one bucket comes together, or not at all.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let count = (attr.count as usize).min(room);
            // SAFETY: the kernel filled `count` of both, and they are plain data.
            unsafe {
                keys.set_len(count);
                values.set_len(count);
            }
            entries.extend(keys.into_iter().zip(values));
            if is_last {
                return Ok(entries);
            }
            (position, is_first) = (next, false);
        }
    }
}

impl<K, V> AsFd for Table<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads a value that a program wrote into a ring buffer; nothing if the bytes are not of its size.
#[must_use]
pub fn plain<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: the bytes are of T's size, need no alignment here, and any are valid for it (Pod).
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Key and value size of a map (`struct bpf_map_info`).
fn sizes(map: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let mut info = [0_u32; 32];
    let mut attr = Info {
        fd: map.as_raw_fd().cast_unsigned(),
        length: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which is that long.
    unsafe { bpf(Command::Info, &mut attr) }?;
    Ok((info[2], info[3]))
}

/// A per-CPU array of counters.
#[derive(Debug)]
pub struct PerCpuCounters {
    fd: OwnedFd,
    cpus: usize,
}

impl PerCpuCounters {
    /// Takes the descriptor of a per-CPU array of `u64`.
    ///
    /// # Errors
    /// The map is another one, or the number of CPUs unknown.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        match sizes(fd.as_fd())? {
            (4, 8) => Ok(Self { fd, cpus }),
            other => {
                Err(io::Error::new(io::ErrorKind::InvalidData, format!("not a map of counters: {other:?}")))
            }
        }
    }

    /// The sum of one counter over all CPUs.
    ///
    /// # Errors
    /// The index is beyond the map.
    pub fn sum(&self, index: u32) -> io::Result<u64> {
        let mut values = vec![0_u64; self.cpus];
        let mut attr = Element {
            fd: self.fd.as_raw_fd().cast_unsigned(),
            zero: 0,
            key: (&raw const index) as u64,
            value: values.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the kernel writes eight bytes per possible CPU, which is what `values` holds.
        unsafe { bpf(Command::Lookup, &mut attr) }?;
        Ok(values.iter().sum())
    }
}
