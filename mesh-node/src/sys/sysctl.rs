//! Writing a sysctl of the calling thread's network namespace.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// A procfs of this process's own, in no directory.
static OWN_PROC: OnceLock<OwnedFd> = OnceLock::new();

/// Writes a sysctl such as `net/ipv4/fwmark_reflect`. In a container `/proc/sys` is read-only; what may mount procfs may
/// write all the same.
///
/// # Errors
/// There is no such sysctl, or it may not be written.
pub fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    match fs::write(Path::new("/proc/sys").join(name), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(own_proc()?, format!("sys/{name}"), flags, Mode::empty())?;
            File::from(file).write_all(value.as_bytes())
        }
        other => other,
    }
}

fn own_proc() -> io::Result<&'static OwnedFd> {
    if let Some(proc) = OWN_PROC.get() {
        return Ok(proc);
    }
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let proc = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    Ok(OWN_PROC.get_or_init(|| proc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sysctl_is_reached_without_a_writable_proc() {
        let Ok(proc) = own_proc() else {
            eprintln!("skipped: this process may not mount procfs");
            return;
        };
        let file = openat(proc, "sys/net/ipv4/fwmark_reflect", OFlags::RDONLY, Mode::empty()).unwrap();
        let text = io::read_to_string(File::from(file)).unwrap();
        assert_eq!(text, fs::read_to_string("/proc/sys/net/ipv4/fwmark_reflect").unwrap());
    }
}
