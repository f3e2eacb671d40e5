//! Network namespaces: running code in one, and making sockets in one.
//!
//! A socket belongs for life to the namespace that its thread was in when it was made; bind, connect and accept do
//! not care. So only `socket(2)` itself needs the namespace.

use super::check;
use socket2::{Domain, Protocol, Socket, Type};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// An open network namespace. Cheap to clone; keeps the namespace alive.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
}

/// The namespace of the process (of its main thread), opened once.
static HOME: OnceLock<OwnedFd> = OnceLock::new();

fn home() -> io::Result<BorrowedFd<'static>> {
    if let Some(fd) = HOME.get() {
        return Ok(fd.as_fd());
    }
    let fd: OwnedFd = File::open("/proc/self/ns/net")?.into();
    Ok(HOME.get_or_init(|| fd).as_fd())
}

fn enter(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns takes a descriptor and a flag, touches no memory of ours, and changes only this thread.
    check(unsafe { libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) }.into()).map(|_| ())
}

/// Brings the thread home when dropped. A thread that stayed in a pod's namespace would make later sockets there,
/// so failing to return ends the process.
struct Visit;

impl Drop for Visit {
    fn drop(&mut self) {
        if let Err(error) = home().and_then(enter) {
            eprintln!("cannot return to the node's network namespace: {error}; giving up");
            std::process::abort();
        }
    }
}

impl Netns {
    /// Opens the namespace behind a path such as `/var/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// The path cannot be opened, or is no network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// Takes an open descriptor of a namespace.
    ///
    /// # Errors
    /// The descriptor is no network namespace.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
        // SAFETY: this ioctl takes no argument and touches no memory.
        let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) };
        if kind != libc::CLONE_NEWNET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace"));
        }
        Ok(Self { fd: Arc::new(fd) })
    }

    /// The namespace of the process.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn home() -> io::Result<Self> {
        Self::from_fd(home()?.try_clone_to_owned()?)
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Makes a new, empty namespace (with `lo` down) and returns it; the calling thread stays where it is.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or beyond the limit of namespaces.
    pub fn create() -> io::Result<Self> {
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                // SAFETY: unshare changes only this short-lived thread.
                check(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into())?;
                Self::current()
            });
            made.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the new namespace panicked")))
        })
    }

    /// Runs `work` on the calling thread inside the namespace. The thread, which must be in the process's own namespace,
    /// is back there when this returns. A visit is two system calls: what a pod needs is best made in one.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        home()?;
        enter(self.fd.as_fd())?;
        let _visit = Visit;
        Ok(work())
    }

    /// Makes a socket in the namespace from the calling thread, which must be in the process's own namespace (any
    /// thread is, unless it is inside [`Netns::run`]). The thread visits the namespace for `socket(2)` only.
    /// The socket is close-on-exec and blocking.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the socket not be made (limits, address family off).
    pub fn socket(&self, domain: Domain, kind: Type, protocol: Option<Protocol>) -> io::Result<Socket> {
        self.run(|| Socket::new(domain, kind, protocol))?
    }

    /// The namespace's cookie: unique on this machine until it reboots, what the kernel programs know it by.
    ///
    /// # Errors
    /// The kernel is older than 5.14, or out of descriptors.
    pub fn cookie(&self) -> io::Result<u64> {
        const SO_NETNS_COOKIE: libc::c_int = 71;
        // AF_UNIX sockets have the option too and need no address family of the network.
        let socket = self.socket(Domain::UNIX, Type::DGRAM, None)?;
        let mut cookie = 0_u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `cookie`, which is that long.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        check(result.into())?;
        Ok(cookie)
    }

    /// The namespace's inode: equal for two descriptors of one namespace.
    ///
    /// # Errors
    /// Only if the kernel refuses `fstat`.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_ino)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
