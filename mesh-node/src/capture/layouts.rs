//! Programs of agents with another layout: replaced without losing a connection.
//!
//! The programs of both layouts are attached for a while, each with maps of its own, in this order:
//! 1. This layout's programs are attached beside the others, which enforce no more from then on: they would drop what
//!    only this layout knows of.
//! 2. Pods are enrolled here. What the others still capture goes to their agent's listeners; what arrives is already
//!    this agent's.
//! 3. Once every pod is enrolled ([`super::Capture::forget_unclaimed`]) the others stop capturing, and a moment later,
//!    when the SYNs that they have rewritten have arrived, stop steering.
//! 4. Connections of the fast path that they let go stay in their figures, which are read with this layout's own, so
//!    that policy can end them. With the last one the rest of the other layout goes.
//!
//! What the others let go on the fast path while its server's pod is enrolled here and its client's is not, or while its SYN
//! is on its way at that moment, is not known here: it comes to this agent's plaintext listener, and policy decides about it
//! as about any plaintext.

use super::CaptureError;
use crate::sys::bpf::{self, Table};
use mesh_ebpf::Flow;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The links that drop.
const ENFORCING: [&str; 1] = ["pod_egress"];
/// The links that send connections elsewhere.
const CAPTURING: [&str; 6] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "host_connect4", "host_connect6"];
/// From a connect call's hook to its SYN's arrival inside one kernel.
const IN_FLIGHT: Duration = Duration::from_millis(200);

/// What agents of another layout left.
pub(super) struct OtherLayout {
    directory: PathBuf,
    /// Figures of its connections of the fast path.
    pub(super) flows: Option<Table<u64, Flow>>,
    /// Whether there are any.
    pub(super) is_used: bool,
    has_stopped: bool,
}

/// The other layouts beside `pins`, a directory of this one.
pub(super) fn beside(pins: &Path) -> Result<Vec<OtherLayout>, CaptureError> {
    let Some(base) = pins.parent() else { return Ok(Vec::new()) };
    let failed = |source| CaptureError::PinDirectory { path: base.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(base).map_err(failed)? {
        let directory = entry.map_err(failed)?.path();
        let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_layout = name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok());
        if is_layout && directory != pins {
            found.push(OtherLayout::open(directory));
        }
    }
    Ok(found)
}

/// Detaches and removes everything below a directory of pins, of every layout, and the directory.
///
/// # Errors
/// The kernel refuses; what is left can be removed by another call.
pub fn remove_pins(base: &Path) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::PinDirectory { path: base.to_owned(), source };
    let entries = match fs::read_dir(base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    for layout in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        // What sends connections to listeners that are gone goes first.
        for link in CAPTURING.iter().chain(&ENFORCING) {
            detach(&layout.join(link))?;
        }
        detach_all(&layout.join("pods"))?;
        detach_all(&layout)?;
        fs::remove_dir_all(&layout).map_err(|source| CaptureError::Pin { path: layout.clone(), source })?;
    }
    fs::remove_dir(base).map_err(failed)?;
    // Other nodes of this machine may have pins beside it.
    if let Some(parent) = base.parent() {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

impl OtherLayout {
    fn open(directory: PathBuf) -> Self {
        let flows = bpf::open_pin(&directory.join("FLOWS")).and_then(Table::new);
        let flows = flows
            .inspect_err(|error| {
                tracing::error!(%error, directory = %directory.display(),
                    "connections of the fast path of another layout cannot be ended by policy");
            })
            .ok();
        Self { directory, flows, is_used: true, has_stopped: false }
    }

    /// Step 1.
    pub(super) fn stop_enforcing(&self) -> Result<(), CaptureError> {
        self.detach(&ENFORCING)
    }

    /// Step 3.
    pub(super) fn stop_capturing(&mut self) -> Result<(), CaptureError> {
        self.detach(&CAPTURING)?;
        std::thread::sleep(IN_FLIGHT);
        self.has_stopped = true;
        detach_all(&self.directory.join("pods"))
    }

    /// Step 4: removes the rest if nothing uses it any more, and says whether it did.
    pub(super) fn is_over(&self) -> bool {
        if self.is_used || !self.has_stopped {
            return false;
        }
        match self.remove() {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "programs of another layout stay");
                false
            }
        }
    }

    fn remove(&self) -> Result<(), CaptureError> {
        detach_all(&self.directory)?;
        fs::remove_dir_all(&self.directory)
            .map_err(|source| CaptureError::Pin { path: self.directory.clone(), source })?;
        tracing::info!(directory = %self.directory.display(), "programs of another layout removed");
        Ok(())
    }

    fn detach(&self, links: &[&str]) -> Result<(), CaptureError> {
        links.iter().try_for_each(|link| detach(&self.directory.join(link)))
    }
}

/// Detaches every link of a directory, and removes the pins.
fn detach_all(directory: &Path) -> Result<(), CaptureError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| CaptureError::PinDirectory { path: directory.to_owned(), source })?,
    };
    let files = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file());
    files.collect::<Vec<_>>().iter().try_for_each(|path| detach(path))
}

/// Detaches one pinned link, if it is one, and removes the pin.
fn detach(path: &Path) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Pin { path: path.to_owned(), source };
    let pinned = match bpf::open_pin(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    match bpf::detach(pinned.as_fd()) {
        // A map; what was attached to a cgroup or namespace that is gone.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLINK)) => {}
        other => other.map_err(failed)?,
    }
    fs::remove_file(path).map_err(failed)
}
