//! Diagnostics of the kernel programs: a thread that reads aya-log's ring buffer while they are on.

use super::CaptureError;
use crate::sys::poll::Poll;
use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Gives records of the programs to `tracing`.
struct Bridge;

impl Log for Bridge {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let (text, module) = (record.args(), record.module_path().unwrap_or_default());
        match record.level() {
            Level::Error => tracing::error!(target: "mesh_ebpf", module, "{text}"),
            Level::Warn => tracing::warn!(target: "mesh_ebpf", module, "{text}"),
            _ => tracing::info!(target: "mesh_ebpf", module, "{text}"),
        }
    }

    fn flush(&self) {}
}

/// The thread; it ends when this is dropped.
pub(super) struct KernelLog {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl KernelLog {
    /// Starts reading. Works once per loaded object: the ring buffer is taken out of it.
    pub(super) fn start(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        const NAME: &str = "kernel-log";
        let failed = |source| CaptureError::Thread { name: NAME, source };
        let mut logger = EbpfLogger::init_with_logger(ebpf, Bridge)
            .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
        let poll = Poll::new().map_err(failed)?;
        poll.add(&logger, 0).map_err(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let read = move || {
            while !stopped.load(Ordering::Relaxed) {
                // Also what came before the first wait; an error leaves the half second.
                if poll.wait(500).is_err() {
                    return;
                }
                logger.flush();
            }
        };
        let thread = std::thread::Builder::new().name(NAME.into()).spawn(read).map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for KernelLog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been logged by the runtime; nothing is left to do.
            let _ = thread.join();
        }
    }
}
