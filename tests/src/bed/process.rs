//! Processes that a testbed starts: their output in files that stay readable, their end certain.

use super::{run, wait};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Where a program runs.
#[derive(Debug, Clone)]
pub struct Place {
    /// Network namespace file.
    pub netns: PathBuf,
    /// cgroup2 directory.
    pub cgroup: PathBuf,
    /// File seen as /etc/resolv.conf, if not the machine's.
    pub resolv: Option<PathBuf>,
}

/// What to run, beside the place.
#[derive(Debug, Clone, Default)]
pub struct Program {
    /// Program and arguments; `mesh-tests` means this program.
    pub argv: Vec<String>,
    /// Environment on top of ours.
    pub env: Vec<(String, String)>,
    /// The only CPU it may use.
    pub cpu: Option<usize>,
}

impl<S: Into<String>, I: IntoIterator<Item = S>> From<I> for Program {
    fn from(argv: I) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }
}

/// A running program; killed on drop.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    what: String,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

/// A program that ran to its end.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Finished {
    /// The output, if it ended well.
    ///
    /// # Errors
    /// It did not; the message has both outputs.
    pub fn ok(&self) -> Result<&str> {
        if self.status.success() {
            return Ok(&self.out);
        }
        bail!("{}: {} {}", self.status, self.out.trim(), self.err.trim())
    }
}

/// A program of the machine, also where only root's programs are.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn command(place: &Place, program: &Program) -> Result<Command> {
    let own = std::env::current_exe().context("cannot find the own path")?;
    let mut command = Command::new(&own);
    command.arg("in").arg("--netns").arg(&place.netns).arg("--cgroup").arg(&place.cgroup);
    if let Some(resolv) = &place.resolv {
        command.arg("--resolv").arg(resolv);
    }
    if let Some(cpu) = program.cpu {
        command.args(["--cpu", &cpu.to_string()]);
    }
    command.arg("--");
    for (i, arg) in program.argv.iter().enumerate() {
        let own_tool = i == 0 && arg == "mesh-tests";
        command.arg(if own_tool { own.clone().into_os_string() } else { OsString::from(arg) });
    }
    command.envs(program.env.iter().map(|(key, value)| (key, value)));
    // Ctrl-C is for us: we end our programs in order.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    Ok(command)
}

impl Proc {
    /// Starts a program with its output (both streams) in a file.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(place: &Place, program: impl Into<Program>, log: &Path) -> Result<Self> {
        let program = program.into();
        let what = program.argv.join(" ");
        let out = File::options().create(true).append(true).open(log);
        let out = out.with_context(|| format!("cannot write {}", log.display()))?;
        let err = out.try_clone().context("cannot share a log file")?;
        let child = command(place, &program)?
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("cannot start `{what}`"))?;
        Ok(Self { child, what, log: log.to_owned(), ended: None })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Its log file.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn running(&mut self) -> Result<bool> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().with_context(|| format!("cannot look at `{}`", self.what))?;
        }
        Ok(self.ended.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("an impossible process id")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal `{}`", self.what))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("end of `{}`", self.what);
        wait::until(&what, deadline, || {
            self.running()?;
            Ok(self.ended)
        })
        .with_context(|| format!("its log ends with: {}", tail(&self.log(), 5)))
    }

    /// Kills it and waits.
    pub fn kill(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }

    /// CPU time it used so far, user and system, in seconds (its own threads).
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))
            .with_context(|| format!("`{}` has ended", self.what))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        Ok((ticks(11) + ticks(12)) / 100.0)
    }

    /// Resident memory in bytes: all, and the part that is its own (anonymous).
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .with_context(|| format!("`{}` has ended", self.what))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
                .unwrap_or(0)
                * 1024
        };
        Ok((field("VmRSS:"), field("RssAnon:")))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a program to its end, with its output kept.
///
/// # Errors
/// It cannot be started, or does not end in time (it is killed then).
pub fn finish(place: &Place, program: impl Into<Program>, deadline: Duration) -> Result<Finished> {
    let program = program.into();
    let what = program.argv.join(" ");
    let child = command(place, &program)?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{what}`"))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("an impossible process id")?;
    // The output must be read while it runs, or a full pipe stops it.
    let reader = std::thread::spawn(move || child.wait_with_output());
    let end = Instant::now() + deadline;
    while !reader.is_finished() {
        let stopped = run::check();
        if Instant::now() > end || stopped.is_err() {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
            stopped?;
            bail!("`{what}` does not end within {deadline:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let Ok(out) = reader.join() else { bail!("reading the output of `{what}` panicked") };
    let out = out.with_context(|| format!("cannot read the output of `{what}`"))?;
    Ok(Finished {
        status: out.status,
        out: String::from_utf8_lossy(&out.stdout).into_owned(),
        err: String::from_utf8_lossy(&out.stderr).into_owned(),
    })
}

/// What a log says of an end: its lines without a backtrace, the last of them.
pub fn gist(log: &str) -> String {
    let plain = |line: &&str| {
        let start = line.trim_start();
        !start.starts_with("at ") && start.split(':').next().is_none_or(|n| n.parse::<u32>().is_err())
    };
    let lines: Vec<&str> = log.lines().filter(plain).collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
