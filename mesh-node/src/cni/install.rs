//! Puts the plugin on the node and keeps it there, and takes it away.
//!
//! The binary comes before the configuration that names it, and goes after it: a configuration that names a plugin that is
//! not there keeps every pod of the node from starting.

use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use serde_json::json;
use tokio::sync::Notify;

use super::{NAME, conflist};

/// How often it is looked without a reason.
const LOOK: Duration = Duration::from_secs(30);
/// Another CNI's installer writes several times.
const SETTLE: Duration = Duration::from_millis(200);

/// Where CNI is on the node, as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// Plugins.
    pub bin_dir: PathBuf,
    /// Configuration.
    pub conf_dir: PathBuf,
    /// The agent's run directory, as the host sees it.
    pub run_dir: PathBuf,
    /// Directory of the file that stands in for the agent, as the host sees it.
    pub state_dir: PathBuf,
}

/// Why it is not there.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration cannot be chained to.
    #[error("{path} {source}")]
    Conflist {
        /// The file.
        path: PathBuf,
        /// Why.
        source: conflist::ConflistError,
    },
    /// The runtime does not look for plugins there: with ours in the list, no pod of the node would start.
    #[error(
        "{bin_dir} has none of the plugins that {path} names ({}): the container runtime looks for them elsewhere; set \
         `--cni-bin-dir` (chart: `node.cniBinDir`) to where they are",
        others.join(", ")
    )]
    Elsewhere {
        /// The configuration.
        path: PathBuf,
        /// Where ours would be.
        bin_dir: PathBuf,
        /// Types of the others.
        others: Vec<String>,
    },
    /// There is no CNI yet.
    #[error("{0} holds no CNI configuration yet")]
    Nothing(PathBuf),
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File { path, source }
}

/// Installs, and puts back what others overwrite, for ever.
pub async fn keep(places: Places) {
    let changed = std::sync::Arc::new(Notify::new());
    let heed = std::sync::Arc::clone(&changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            heed.notify_one();
        }
    });
    // Without a watch it is looked now and then.
    let _watcher = watcher.and_then(|mut watcher| {
        watcher.watch(&places.conf_dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    let (mut last, mut known) = (None, None);
    loop {
        match install_knowing(&places, &mut known) {
            Ok(false) => last = None,
            Ok(true) => {
                tracing::info!(directory = %places.conf_dir.display(), "CNI plugin chained");
                last = None;
            }
            Err(error) => {
                let problem = error.to_string();
                if last.as_ref() != Some(&problem) {
                    tracing::warn!(%problem, "the CNI plugin is not in place: a pod's first connections may leave uncaptured");
                }
                last = Some(problem);
            }
        }
        tokio::select! {
            () = changed.notified() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Brings the binary and the configuration into place; says whether the configuration had to be changed.
///
/// # Errors
/// What cannot be read, written or chained to.
pub fn install(places: &Places) -> Result<bool, InstallError> {
    install_knowing(places, &mut None)
}

fn install_knowing(places: &Places, known: &mut Option<Seen>) -> Result<bool, InstallError> {
    copy_self(&places.bin_dir, known)?;
    let names = names(&places.conf_dir)?;
    let primary = conflist::primary(names.iter().map(String::as_str));
    let primary = primary.ok_or_else(|| InstallError::Nothing(places.conf_dir.clone()))?;
    let path = places.conf_dir.join(primary);
    let text = fs::read_to_string(&path).map_err(failed(&path))?;
    let ours = json!({"type": NAME, "runDir": places.run_dir, "stateDir": places.state_dir});
    let edited = conflist::chained(&text, &ours)
        .map_err(|source| InstallError::Conflist { path: path.clone(), source })?;
    let others = conflist::others(&text);
    // A link may lead to where only the node's own processes see something.
    let is_there = |kind: &String| fs::symlink_metadata(places.bin_dir.join(kind)).is_ok();
    if !others.is_empty() && !others.iter().any(is_there) {
        if let Ok(Some(without)) = conflist::unchained(&text) {
            replace(&path, without.as_bytes())?;
        }
        return Err(InstallError::Elsewhere { path, bin_dir: places.bin_dir.clone(), others });
    }
    let Some(edited) = edited else { return Ok(false) };
    replace(&path, edited.as_bytes())?;
    Ok(true)
}

/// Takes the plugin out of every configuration, and then off the node. Says whether there was anything.
///
/// # Errors
/// What cannot be read or written; nothing is removed that a configuration still names.
pub fn remove(bin_dir: &Path, conf_dir: &Path) -> Result<bool, InstallError> {
    let mut any = false;
    for name in names(conf_dir)? {
        let path = conf_dir.join(&name);
        if conflist::primary([name.as_str()]).is_none() || !path.is_file() {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(failed(&path))?;
        // Another's broken file is not ours.
        if let Ok(Some(edited)) = conflist::unchained(&text) {
            replace(&path, edited.as_bytes())?;
            any = true;
        }
    }
    let binary = bin_dir.join(NAME);
    match fs::remove_file(&binary) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(any),
        Err(error) => Err(failed(&binary)(error)),
    }
}

fn names(directory: &Path) -> Result<Vec<String>, InstallError> {
    match fs::read_dir(directory) {
        Ok(entries) => Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(directory)(error)),
    }
}

/// What a file was when it was last found to be right.
type Seen = (u64, u64, i64, i64);

fn seen(path: &Path) -> Option<Seen> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
}

/// This process's own binary under the plugin's name, unless it is there. The files are large: they are neither read into
/// memory nor compared while nobody touched the copy.
fn copy_self(bin_dir: &Path, known: &mut Option<Seen>) -> Result<(), InstallError> {
    let own = Path::new("/proc/self/exe");
    let target = bin_dir.join(NAME);
    if known.is_some() && seen(&target) == *known {
        return Ok(());
    }
    if !is_same(own, &target).unwrap_or(false) {
        let temporary = bin_dir.join(format!(".{NAME}.{}", std::process::id()));
        let copied = fs::copy(own, &temporary).and_then(|_| {
            fs::set_permissions(&temporary, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            fs::rename(&temporary, &target)
        });
        copied.map_err(failed(&temporary))?;
    }
    *known = seen(&target);
    Ok(())
}

fn is_same(a: &Path, b: &Path) -> io::Result<bool> {
    if fs::metadata(a)?.len() != fs::metadata(b)?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (BufReader::new(fs::File::open(a)?), BufReader::new(fs::File::open(b)?));
    loop {
        let (left, right) = (a.fill_buf()?, b.fill_buf()?);
        let length = left.len().min(right.len());
        if length == 0 {
            return Ok(left.len() == right.len());
        }
        if left.get(..length) != right.get(..length) {
            return Ok(false);
        }
        a.consume(length);
        b.consume(length);
    }
}

/// Replaces a file in one step, with the permissions that it had.
fn replace(path: &Path, content: &[u8]) -> Result<(), InstallError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A name that no runtime reads.
    let temporary = path.with_file_name(format!(".{name}.{NAME}"));
    let permissions = fs::metadata(path).map_err(failed(path))?.permissions();
    fs::write(&temporary, content).map_err(failed(&temporary))?;
    fs::set_permissions(&temporary, permissions).map_err(failed(&temporary))?;
    fs::rename(&temporary, path).map_err(failed(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const NET: &str = r#"{"cniVersion":"0.4.0","name":"net","plugins":[{"type":"bridge"}]}"#;

    fn places(root: &Path) -> Places {
        let places = Places {
            bin_dir: root.join("bin"),
            conf_dir: root.join("conf"),
            run_dir: PathBuf::from("/run/undermesh"),
            state_dir: PathBuf::from("/var/lib/undermesh"),
        };
        fs::create_dir_all(&places.bin_dir).unwrap();
        fs::create_dir_all(&places.conf_dir).unwrap();
        fs::write(places.bin_dir.join("bridge"), "").unwrap();
        places
    }

    fn files(directory: &Path) -> Vec<String> {
        let mut names = names(directory).unwrap();
        names.sort();
        names
    }

    #[test]
    fn the_plugin_is_installed_once_put_back_and_removed_without_a_trace() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let path = places.conf_dir.join("10-net.conflist");
        fs::write(&path, NET).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(install(&places).unwrap());
        assert!(!install(&places).unwrap(), "it is there");
        assert!(fs::read_to_string(&path).unwrap().contains(NAME));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(files(&places.bin_dir), ["bridge", NAME]);
        fs::write(&path, NET).unwrap();
        assert!(install(&places).unwrap(), "another CNI wrote its file again");
        assert!(remove(&places.bin_dir, &places.conf_dir).unwrap());
        assert!(!fs::read_to_string(&path).unwrap().contains(NAME));
        assert_eq!(files(&places.bin_dir), ["bridge"]);
        assert_eq!(files(&places.conf_dir), ["10-net.conflist"]);
        assert!(!remove(&places.bin_dir, &places.conf_dir).unwrap());
    }

    #[test]
    fn without_a_configuration_or_with_one_that_cannot_be_chained_to_nothing_is_broken() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        assert!(matches!(install(&places), Err(InstallError::Nothing(_))));
        let path = places.conf_dir.join("10-net.conf");
        fs::write(&path, r#"{"type":"bridge"}"#).unwrap();
        let error = install(&places).unwrap_err().to_string();
        assert!(error.contains("10-net.conf") && error.contains(".conflist"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), r#"{"type":"bridge"}"#);
    }

    #[test]
    fn where_the_runtime_does_not_look_for_plugins_none_is_chained() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let path = places.conf_dir.join("10-net.conflist");
        fs::write(&path, NET).unwrap();
        assert!(install(&places).unwrap());
        // As when the runtime was upgraded to one that looks elsewhere.
        let bridge = places.bin_dir.join("bridge");
        fs::remove_file(&bridge).unwrap();
        std::os::unix::fs::symlink("/elsewhere/on/the/node", &bridge).unwrap();
        assert!(!install(&places).unwrap(), "a link that leads nowhere from here is a plugin, too");
        fs::remove_file(&bridge).unwrap();
        let error = install(&places).unwrap_err().to_string();
        assert!(error.contains("bridge") && error.contains("cniBinDir"), "{error}");
        assert!(!fs::read_to_string(&path).unwrap().contains(NAME), "every pod would wait for it");
    }

    #[test]
    fn a_copy_that_somebody_changed_is_made_again() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        fs::write(places.conf_dir.join("10-net.conflist"), NET).unwrap();
        let mut known = None;
        install_knowing(&places, &mut known).unwrap();
        let binary = places.bin_dir.join(NAME);
        fs::write(&binary, "another").unwrap();
        install_knowing(&places, &mut known).unwrap();
        assert!(is_same(Path::new("/proc/self/exe"), &binary).unwrap());
        assert_eq!(fs::metadata(&binary).unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[tokio::test]
    async fn a_foreign_installer_that_rewrites_the_configuration_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let places = places(root.path());
        let path = places.conf_dir.join("10-net.conflist");
        fs::write(&path, NET).unwrap();
        let keeper = tokio::spawn(keep(places.clone()));
        let chained = |path: PathBuf| async move {
            for _ in 0..500 {
                if fs::read_to_string(&path).unwrap_or_default().contains(NAME) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            panic!("the plugin is not chained");
        };
        chained(path.clone()).await;
        fs::write(&path, NET).unwrap();
        chained(path).await;
        keeper.abort();
    }
}
