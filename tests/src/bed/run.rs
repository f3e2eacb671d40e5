//! One run: its name, its directory, and its end, whichever way it comes.
//!
//! Ctrl-C and SIGTERM raise a flag that every wait looks at; the error travels up, and the drop of each testbed cleans
//! up. A second Ctrl-C cleans what it can and exits.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

static CANCELLED: AtomicBool = AtomicBool::new(false);
static BEDS: AtomicU32 = AtomicU32::new(0);
static LOGS: Mutex<String> = Mutex::new(String::new());
static DEADLINE: Mutex<Option<Instant>> = Mutex::new(None);

/// Parent of every run's directory.
pub const RUNS: &str = "/run/undermesh-tests";

/// Whether this run was asked to stop.
pub fn cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}

/// Sets the time by which the running scenario must be over.
pub fn set_deadline(at: Option<Instant>) {
    *DEADLINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = at;
}

/// An error once this run was asked to stop or the scenario's time is over; every wait calls it.
///
/// # Errors
/// The run was interrupted, or the deadline passed.
pub fn check() -> Result<()> {
    if cancelled() {
        bail!("interrupted");
    }
    let deadline = *DEADLINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if deadline.is_some_and(|at| Instant::now() > at) {
        bail!("the scenario's deadline passed");
    }
    Ok(())
}

/// Sleeps for a measured interval (never to wait for a state: that is [`super::until`]), or until interrupted.
///
/// # Errors
/// The run was interrupted.
pub fn pause(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        check()?;
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
    Ok(())
}

/// Runs a command of the testbed: as root, with signals watched, and after removing what dead runs left.
///
/// # Errors
/// Not root, or the command's own error.
pub fn guarded(command: impl FnOnce() -> Result<bool>) -> Result<bool> {
    if !rustix::process::geteuid().is_root() {
        bail!("the testbed makes network namespaces and loads kernel programs: run it as root");
    }
    watch_signals()?;
    mount_bpffs()?;
    super::leftovers::remove_dead()?;
    command()
}

/// Agents pin their programs on a bpffs, which bare machines and containers have not always mounted.
fn mount_bpffs() -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    if table.lines().any(|line| line.split(' ').nth(2) == Some("bpf")) {
        return Ok(());
    }
    rustix::mount::mount("bpf", "/sys/fs/bpf", "bpf", rustix::mount::MountFlags::empty(), None)
        .context("cannot mount a bpffs at /sys/fs/bpf")
}

fn watch_signals() -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    // xtask's end, however it comes, is ours too.
    if std::env::var_os("UM_PARENT").is_some() {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
            .context("cannot ask to hear of the parent's end")?;
    }
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).context("cannot watch signals")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for _ in signals.forever() {
                if CANCELLED.swap(true, Ordering::Relaxed) {
                    let _ = super::leftovers::remove_own();
                    std::process::exit(130);
                }
                eprintln!("\nstopping and cleaning up (once more to stop at once)");
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// The name of the next testbed of this run: `um-<pid>-<n>`, which leads every name that it makes.
pub fn next_name() -> String {
    format!("um-{}-{}", std::process::id(), BEDS.fetch_add(1, Ordering::Relaxed))
}

/// Keeps the logs of a testbed that ends, for a report of what failed.
pub fn remember_logs(text: String) {
    *LOGS.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = text;
}

/// The logs of the testbed that ended last.
pub fn last_logs() -> String {
    std::mem::take(&mut *LOGS.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// The directory of a testbed by name.
pub fn dir_of(name: &str) -> PathBuf {
    Path::new(RUNS).join(name)
}

/// The directory of the product's binaries: `UM_BIN`, by default where this program is.
///
/// # Errors
/// The own path cannot be found.
pub fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("UM_BIN").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir));
    }
    let own = std::env::current_exe().context("cannot find the own path")?;
    own.parent().map(Path::to_path_buf).context("the own path has no directory")
}

/// A binary of the product.
///
/// # Errors
/// It is not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = bin_dir()?.join(name);
    if !path.is_file() {
        bail!("{} is not there: run `cargo xtask build`, or set UM_BIN", path.display());
    }
    Ok(path)
}
