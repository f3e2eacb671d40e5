//! Waiting for many descriptors on one thread, outside of any async runtime.

use super::check;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An epoll instance whose descriptors are known by a number.
#[derive(Debug)]
pub struct Poll {
    fd: OwnedFd,
}

impl Poll {
    /// A new instance.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 takes flags only.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }.into())?;
        // SAFETY: the kernel has just handed this descriptor to us alone.
        #[allow(clippy::cast_possible_truncation, reason = "a descriptor fits an i32")]
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self { fd })
    }

    /// Watches a value's descriptor for input, edge-triggered, under a number of the caller's. It leaves by being closed.
    ///
    /// # Errors
    /// The descriptor is already watched, or cannot be.
    pub fn add(&self, watched: &impl AsRawFd, number: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: number };
        // SAFETY: `event` lives until the call returns; the kernel answers EBADF to a descriptor that is not open.
        check(
            unsafe {
                libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_ADD, watched.as_raw_fd(), &raw mut event)
            }
            .into(),
        )
        .map(|_| ())
    }

    /// Waits for at most `milliseconds` and returns the numbers of descriptors that are ready.
    ///
    /// # Errors
    /// Only if the kernel refuses to wait; an interruption by a signal counts as nothing ready.
    pub fn wait(&self, milliseconds: i32) -> io::Result<Vec<u64>> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        // SAFETY: the kernel writes at most 64 events to `events`, which is that long.
        let ready = check(
            unsafe {
                libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, milliseconds)
            }
            .into(),
        );
        match ready {
            Ok(count) => {
                Ok(events.iter().take(usize::try_from(count).unwrap_or(0)).map(|event| event.u64).collect())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
