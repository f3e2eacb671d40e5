//! The CA's files.
//!
//! Self-signed: `<state>/ca/<n>/{root-cert,root-key,ca-cert,ca-key}.pem` per generation, and
//! `<state>/ca/generations.json`, which says from when a generation signs and until when it is trusted.
//! Plugged in: a directory with `ca-cert.pem`, `ca-key.pem`, `root-cert.pem` and optionally `cert-chain.pem`, as
//! in Istio's secret `cacerts`. Both are looked at again every few seconds, so that `mesh-control ca rotate` and
//! replaced files need no restart. `<state>/root-cert.pem` always holds the bundle of trusted roots.
//!
//! Rotation: a new generation is trusted at once and signs after the overlap, in which every node fetches a
//! certificate (and with it the new bundle); the old root stays trusted until the last certificate that it
//! signed has ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::authority::{Authority, AuthorityError, MAX_TTL, SignError, new_intermediate, new_root};
use crate::ads::seconds;
use crate::files;

/// The bundle of trusted roots, in the state directory.
pub(crate) const ROOTS: &str = "root-cert.pem";
/// An intermediate is replaced when less than this of its life is left.
const RENEW_INTERMEDIATE: Duration = Duration::from_secs(365 * 24 * 3600);

/// One root with its intermediate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Directory name, counts up.
    pub id: u32,
    /// Seconds since 1970 from which it signs.
    pub signs_from: u64,
    /// Seconds since 1970 until which its root is trusted; none for the newest.
    pub trusted_until: Option<u64>,
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("{path}: {cause}")]
    File {
        /// The file.
        path: String,
        /// The operating system's reason.
        cause: std::io::Error,
    },
    /// `generations.json` cannot be read.
    #[error("{path}: {cause}; restore it from a backup, or remove the directory to start with a new root")]
    Generations {
        /// The file.
        path: String,
        /// What is wrong.
        cause: String,
    },
    /// The files do not make an authority.
    #[error("{path}: {cause}")]
    Authority {
        /// The directory.
        path: String,
        /// What is wrong.
        cause: AuthorityError,
    },
    /// A key or certificate could not be made.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Rotation of a plugged-in CA.
    #[error(
        "this CA is plugged in: rotate it by replacing the files of --ca-dir (keep the old root in root-cert.pem)"
    )]
    PluggedIn,
}

fn file(path: &Path) -> impl Fn(std::io::Error) -> CaError + '_ {
    move |cause| CaError::File { path: path.display().to_string(), cause }
}

/// Where the authority is read from.
#[derive(Debug)]
enum Origin {
    /// Files of the state directory, made on first use.
    Own,
    /// Files of somebody else.
    PluggedIn(PathBuf),
    /// Somebody hands it in ([`CaStore::replace`]).
    HandedIn,
}

/// The current authority; readers never wait.
#[derive(Debug)]
pub struct CaStore {
    state_dir: PathBuf,
    origin: Origin,
    authority: ArcSwap<Authority>,
    /// Until when the newest certificate of each identity holds, of those that this process signed.
    issued: Mutex<BTreeMap<String, SystemTime>>,
}

/// Identities whose certificates are remembered; those that end first are forgotten.
const REMEMBERED: usize = 50_000;

impl CaStore {
    /// Opens the CA of a state directory, making it on first use, or a plugged-in one.
    ///
    /// # Errors
    /// Files cannot be read or written, or do not make an authority.
    pub fn open(state_dir: &Path, plugged_in: Option<&Path>, now: SystemTime) -> Result<Self, CaError> {
        files::create_private_dir(state_dir).map_err(file(state_dir))?;
        let authority = match plugged_in {
            Some(dir) => load_plugged_in(dir)?,
            None => load_own(state_dir, now)?,
        };
        let store = Self {
            state_dir: state_dir.to_owned(),
            origin: plugged_in.map_or(Origin::Own, |dir| Origin::PluggedIn(dir.to_owned())),
            authority: ArcSwap::from_pointee(authority),
            issued: Mutex::default(),
        };
        store.publish_roots()?;
        Ok(store)
    }

    /// Holds an authority that was read elsewhere; no key is written to files.
    ///
    /// # Errors
    /// The bundle of roots cannot be written.
    pub fn holding(state_dir: &Path, authority: Authority) -> Result<Self, CaError> {
        files::create_private_dir(state_dir).map_err(file(state_dir))?;
        let store = Self {
            state_dir: state_dir.to_owned(),
            origin: Origin::HandedIn,
            authority: ArcSwap::from_pointee(authority),
            issued: Mutex::default(),
        };
        store.publish_roots()?;
        Ok(store)
    }

    /// Takes another authority.
    pub fn replace(&self, authority: Authority) {
        let before = self.authority.swap(Arc::new(authority));
        let after = self.authority.load();
        if before.roots() != after.roots() || before.not_after() != after.not_after() {
            info!("the certificate authority changed");
        }
        if let Err(error) = self.publish_roots() {
            warn!(%error, "the bundle of roots cannot be written");
        }
    }

    /// The authority that signs now.
    #[must_use]
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.load_full()
    }

    /// Notes that a certificate was signed.
    pub fn note_issued(&self, identity: &str, until: SystemTime) {
        let mut issued = self.issued.lock().unwrap_or_else(PoisonError::into_inner);
        if issued.len() >= REMEMBERED && !issued.contains_key(identity) {
            let first = issued.iter().min_by_key(|(_, until)| **until).map(|(identity, _)| identity.clone());
            first.and_then(|identity| issued.remove(&identity));
        }
        issued.insert(identity.to_owned(), until);
    }

    /// Until when the newest certificate of an identity holds; none where this process has signed none.
    #[must_use]
    pub fn issued_until(&self, identity: &str) -> Option<SystemTime> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner).get(identity).copied()
    }

    /// Looks at the files again. What cannot be used is told and leaves the authority as it is.
    pub fn refresh(&self, now: SystemTime) {
        let loaded = match &self.origin {
            Origin::PluggedIn(dir) => load_plugged_in(dir),
            Origin::Own => load_own(&self.state_dir, now),
            Origin::HandedIn => return,
        };
        match loaded {
            Ok(authority) => self.replace(authority),
            Err(error) => warn!(%error, "the certificate authority cannot be read again; it stays as it was"),
        }
    }

    /// Writes the bundle for those who connect to us.
    fn publish_roots(&self) -> Result<(), CaError> {
        let path = self.state_dir.join(ROOTS);
        let authority = self.authority.load();
        if std::fs::read_to_string(&path).is_ok_and(|old| old == authority.roots()) {
            return Ok(());
        }
        files::write(&path, authority.roots().as_bytes(), files::PUBLIC).map_err(file(&path))
    }
}

/// Adds a generation that signs after `overlap`. The root of the present one stays trusted until every
/// certificate that it can have signed has ended.
///
/// # Errors
/// The CA is plugged in, or files cannot be read or written.
pub fn rotate(
    state_dir: &Path,
    plugged_in: Option<&Path>,
    overlap: Duration,
    now: SystemTime,
) -> Result<Vec<Generation>, CaError> {
    if plugged_in.is_some() {
        return Err(CaError::PluggedIn);
    }
    let mut generations = generations(state_dir, now)?;
    let id = generations.iter().map(|g| g.id).max().unwrap_or(0) + 1;
    let signs_from = seconds(now + overlap);
    create_generation(state_dir, id, now)?;
    for old in generations.iter_mut().filter(|g| g.trusted_until.is_none()) {
        old.trusted_until = Some(signs_from + MAX_TTL.as_secs());
    }
    generations.push(Generation { id, signs_from, trusted_until: None });
    write_generations(state_dir, &generations)?;
    CaStore::open(state_dir, None, now)?;
    Ok(generations)
}

/// The generations of a state directory; the first call makes one.
///
/// # Errors
/// Files cannot be read or written.
pub fn generations(state_dir: &Path, now: SystemTime) -> Result<Vec<Generation>, CaError> {
    let path = state_dir.join("ca/generations.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| CaError::Generations { path: path.display().to_string(), cause: e.to_string() }),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            create_generation(state_dir, 1, now)?;
            let first = vec![Generation { id: 1, signs_from: 0, trusted_until: None }];
            write_generations(state_dir, &first)?;
            Ok(first)
        }
        Err(cause) => Err(CaError::File { path: path.display().to_string(), cause }),
    }
}

fn write_generations(state_dir: &Path, generations: &[Generation]) -> Result<(), CaError> {
    let path = state_dir.join("ca/generations.json");
    files::write_json(&path, &generations).map_err(file(&path))
}

fn generation_dir(state_dir: &Path, id: u32) -> PathBuf {
    state_dir.join(format!("ca/{id}"))
}

fn create_generation(state_dir: &Path, id: u32, now: SystemTime) -> Result<(), CaError> {
    let dir = generation_dir(state_dir, id);
    files::create_private_dir(&dir).map_err(file(&dir))?;
    let (root_cert, root_key) = new_root(&format!("undermesh root {id}"), now)?;
    write_pem(&dir, "root-cert.pem", &root_cert)?;
    write_pem(&dir, "root-key.pem", &root_key)?;
    create_intermediate(&dir, &root_cert, &root_key, now)
}

fn create_intermediate(dir: &Path, root_cert: &str, root_key: &str, now: SystemTime) -> Result<(), CaError> {
    let (cert, key) = new_intermediate("undermesh intermediate", root_cert, root_key, now)?;
    write_pem(dir, "ca-key.pem", &key)?;
    write_pem(dir, "ca-cert.pem", &cert)
}

fn write_pem(dir: &Path, name: &str, pem: &str) -> Result<(), CaError> {
    let path = dir.join(name);
    files::write(&path, pem.as_bytes(), files::PRIVATE).map_err(file(&path))
}

fn read_pem(dir: &Path, name: &str) -> Result<String, CaError> {
    let path = dir.join(name);
    std::fs::read_to_string(&path).map_err(file(&path))
}

fn load_own(state_dir: &Path, now: SystemTime) -> Result<Authority, CaError> {
    let present = seconds(now);
    let generations = generations(state_dir, now)?;
    let trusted = |g: &&Generation| g.trusted_until.is_none_or(|until| present < until);
    let mut roots = String::new();
    for generation in generations.iter().filter(trusted) {
        roots.push_str(&read_pem(&generation_dir(state_dir, generation.id), "root-cert.pem")?);
    }
    let signing = generations.iter().filter(trusted).filter(|g| g.signs_from <= present).max_by_key(|g| g.id);
    let Some(signing) = signing else {
        return Err(CaError::Generations {
            path: state_dir.join("ca/generations.json").display().to_string(),
            cause: "no generation signs now".into(),
        });
    };
    let dir = generation_dir(state_dir, signing.id);
    let load = || -> Result<Authority, CaError> {
        let (cert, key) = (read_pem(&dir, "ca-cert.pem")?, read_pem(&dir, "ca-key.pem")?);
        Authority::new(&cert, &key, "", &roots)
            .map_err(|cause| CaError::Authority { path: dir.display().to_string(), cause })
    };
    let authority = load();
    // Also mends a pair that was torn by a crash between its two files.
    let renew = authority
        .as_ref()
        .map_or(true, |a| a.not_after() < now + RENEW_INTERMEDIATE && a.not_after() < a.root_not_after());
    if !renew {
        return authority;
    }
    let (root_cert, root_key) = (read_pem(&dir, "root-cert.pem")?, read_pem(&dir, "root-key.pem")?);
    create_intermediate(&dir, &root_cert, &root_key, now)?;
    load()
}

fn load_plugged_in(dir: &Path) -> Result<Authority, CaError> {
    let between = match read_pem(dir, "cert-chain.pem") {
        Ok(pem) => pem,
        Err(CaError::File { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let (cert, key, roots) =
        (read_pem(dir, "ca-cert.pem")?, read_pem(dir, "ca-key.pem")?, read_pem(dir, "root-cert.pem")?);
    Authority::new(&cert, &key, &between, &roots)
        .map_err(|cause| CaError::Authority { path: dir.display().to_string(), cause })
}
