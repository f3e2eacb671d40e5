//! Kubernetes's own client, as an operator uses it.

use crate::bed::run;
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A kubectl that talks to one cluster.
#[derive(Debug, Clone)]
pub struct Kubectl {
    /// The program.
    pub program: PathBuf,
    /// Which cluster, and as whom.
    pub kubeconfig: PathBuf,
}

impl Kubectl {
    /// A command to be completed.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.env("KUBECONFIG", &self.kubeconfig).args(args);
        command
    }

    /// Runs it; its standard output.
    ///
    /// # Errors
    /// It failed, with what it said.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        self.feed(args, "")
    }

    /// Runs it with a text as its input; its standard output.
    ///
    /// # Errors
    /// It failed, with what it said.
    pub fn feed(&self, args: &[&str], input: &str) -> Result<String> {
        let program = self.program.file_name().unwrap_or_default().to_string_lossy();
        let shown = format!("{program} {}", args.join(" "));
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A kubectl that has failed before it read says why below.
            let _ = stdin.write_all(input.as_bytes());
        }
        let pid =
            i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("an impossible process id")?;
        // The output must be read while it runs, or a full pipe stops it.
        let reader = std::thread::spawn(move || child.wait_with_output());
        while !reader.is_finished() {
            if let Err(stopped) = run::check() {
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                return Err(stopped).with_context(|| format!("during `{shown}`"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let Ok(out) = reader.join() else { bail!("reading the output of `{shown}` panicked") };
        let out = out.with_context(|| format!("cannot wait for `{shown}`"))?;
        if !out.status.success() {
            let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
            bail!("`{shown}`: {} {}", said(&out.stdout), said(&out.stderr));
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// What it answers as JSON (`-o json` is added).
    ///
    /// # Errors
    /// It failed, or answered something else.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let args: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let text = self.run(&args)?;
        serde_json::from_str(&text).with_context(|| format!("kubectl {} gave no JSON", args.join(" ")))
    }

    /// Makes objects what a YAML text says they are.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.feed(&["apply", "--server-side", "--force-conflicts", "-f", "-"], yaml).map(drop)
    }

    /// Whether the API server says that it is ready.
    pub fn api_ready(&self) -> bool {
        self.run(&["get", "--raw", "/readyz", "--request-timeout=2s"]).is_ok()
    }

    /// Names of the nodes that are ready.
    ///
    /// # Errors
    /// The API server does not answer.
    pub fn ready_nodes(&self) -> Result<Vec<String>> {
        let list = self.json(&["get", "nodes"])?;
        let nodes = list["items"].as_array().cloned().unwrap_or_default();
        Ok(nodes.iter().filter(|node| has_condition(node, "Ready")).map(name).collect())
    }
}

/// An object's name.
pub fn name(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

/// Whether a condition of an object is true.
pub fn has_condition(object: &Value, kind: &str) -> bool {
    object["status"]["conditions"]
        .as_array()
        .is_some_and(|conditions| conditions.iter().any(|c| c["type"] == kind && c["status"] == "True"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_condition_that_is_true_counts() {
        let node = |status: &str| json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
        assert!(has_condition(&node("True"), "Ready"));
        assert!(!has_condition(&node("Unknown"), "Ready"));
        assert!(!has_condition(&node("True"), "Available"));
        assert!(!has_condition(&json!({}), "Ready"));
    }
}
