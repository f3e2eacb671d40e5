//! Named network namespaces: made and removed with `ip`, entered by threads of this process.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where `ip netns` keeps its names.
pub const DIR: &str = "/run/netns";

/// A network namespace of this testbed; removed on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with loopback up.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn create(name: &str) -> Result<Self> {
        command("ip", ["netns", "add", name])?;
        let netns = Self { name: name.to_owned() };
        netns.batch(&["link set lo up".to_owned()])?;
        Ok(netns)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file, as `setns` and the agent take it.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// Runs lines of `ip` in it, all or an error that shows which failed.
    ///
    /// # Errors
    /// A line failed.
    pub fn batch(&self, lines: &[String]) -> Result<()> {
        batch(&self.name, lines)
    }

    /// Lets it outlive this process; returns its name.
    pub fn leave(self) -> String {
        std::mem::ManuallyDrop::new(self).name.clone()
    }

    /// Loads nftables rules in it (a whole script).
    ///
    /// # Errors
    /// The rules were refused.
    pub fn nft(&self, script: &str) -> Result<()> {
        let path = self.path();
        feed(
            Command::new("nsenter").arg(format!("--net={}", path.display())).args(["nft", "-f", "-"]),
            script,
        )
        .with_context(|| format!("in namespace {}", self.name))
    }

    /// Sets sysctls below /proc/sys/net in it; `key` with slashes.
    ///
    /// # Errors
    /// A key is missing or refuses the value.
    pub fn sysctl(&self, values: &[(&str, &str)]) -> Result<()> {
        self.within(|| {
            for (key, value) in values {
                let path = format!("/proc/sys/net/{key}");
                std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))?;
            }
            Ok(())
        })?
    }

    /// Runs a closure on a thread inside the namespace: sockets that it makes belong there, files below
    /// /proc/thread-self/net and /proc/sys/net are those of the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.path();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                enter(&path)?;
                Ok(work())
            });
            match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("the work inside {} panicked", path.display()),
            }
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = command("ip", ["netns", "del", &self.name]);
    }
}

/// Moves the calling thread into a namespace.
///
/// # Errors
/// It does not exist or may not be entered.
pub fn enter(path: &Path) -> Result<()> {
    let file =
        File::open(path).with_context(|| format!("cannot open the network namespace {}", path.display()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter the network namespace {}", path.display()))
}

/// Runs lines of `ip` in a namespace by name, all or an error that shows which failed.
///
/// # Errors
/// A line failed.
pub fn batch(name: &str, lines: &[String]) -> Result<()> {
    feed(Command::new("ip").args(["-n", name, "-batch", "-"]), &lines.join("\n"))
        .with_context(|| format!("in namespace {name}"))
}

/// Runs a program to its end and fails with its standard error.
///
/// # Errors
/// It cannot be started or fails.
pub fn command<'a>(program: &str, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let args: Vec<&str> = args.into_iter().collect();
    let out = Command::new(program)
        .args(&args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}: run `cargo xtask setup`"))?;
    if !out.status.success() {
        bail!("`{program} {}`: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn feed(command: &mut Command, input: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}: run `cargo xtask setup`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).with_context(|| format!("{name} does not take its input"))?;
    }
    let out = child.wait_with_output().with_context(|| format!("cannot wait for {name}"))?;
    if !out.status.success() {
        bail!("{name}: {}\ninput was:\n{input}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
