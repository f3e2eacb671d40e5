//! Container images without an engine or a registry: archives in the layout of the Open Container Initiative, which
//! containerd, kind and Docker import.
//!
//! An image holds one program and the shared libraries that it asks for (what is shipped asks for none), nothing else. The
//! same files give the same bytes, so that a node that has an image is not given it again.

use crate::build::Built;
use crate::{kubernetes, run};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Largest image of a component as it is shipped, in bytes.
const LIMIT: u64 = 40_000_000;

/// Users that programs ask for by name.
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\n\
     nobody:x:65534:65534::/nonexistent:/bin/false\nnonroot:x:65532:65532::/home/nonroot:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\nnonroot:x:65532:\n";

/// A component that is shipped: its program, and the user it runs as.
const COMPONENTS: &[(&str, &str)] =
    &[("mesh-node", ROOT), ("mesh-control", NOBODY), ("mesh-waypoint", NOBODY), ("meshctl", NOBODY)];

/// Users and groups of images.
pub(crate) const NOBODY: &str = "65532:65532";
pub(crate) const ROOT: &str = "0:0";

/// Programs of the distribution that run in pods of the tests, or help to look at them.
const TEST_PROGRAMS: &[&str] = &[
    "sh",
    "cat",
    "ls",
    "env",
    "sleep",
    "grep",
    "head",
    "tail",
    "mkdir",
    "rm",
    "cp",
    "id",
    "curl",
    "nginx",
    "dig",
    "ip",
    "ss",
    "redis-server",
    "redis-cli",
    "iperf3",
    "wrk",
    "h2load",
    "nsenter",
];

/// An image to be made.
pub(crate) struct Image {
    /// Name of its archive.
    name: String,
    /// Names by which pods ask for it.
    references: Vec<String>,
    /// Files by their absolute path in the image.
    files: BTreeMap<PathBuf, Content>,
    entrypoint: Vec<String>,
    user: &'static str,
}

enum Content {
    Text(&'static str),
    /// A program or a library of this machine.
    File(PathBuf),
}

/// Makes every image from built binaries; returns the directory of the archives.
pub(crate) fn build(built: &Built, shipped: bool) -> Result<PathBuf> {
    let dir = built.bin.join("images");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    run::step(&format!("images: {}", dir.display()));
    for (name, user) in COMPONENTS {
        let image = component(built, name, user)?;
        if shipped && image.libraries() > 0 {
            bail!("{name} is to be static, and asks for shared libraries");
        }
        let size = image.write(&dir)?;
        if shipped && size > LIMIT {
            bail!("the image of {name} has {size} bytes, more than {LIMIT}");
        }
    }
    tests(built)?.write(&dir)?;
    pause()?.write(&dir)?;
    dns()?.write(&dir)?;
    Ok(dir)
}

/// An image of one static program and further files, under names of others, for a user and group.
pub(crate) fn foreign(
    name: &str,
    references: Vec<String>,
    entrypoint: &[&str],
    user: &'static str,
    files: &[(&str, PathBuf)],
) -> Image {
    let mut image = base(name, entrypoint, user);
    image.references = references;
    image.files.extend(files.iter().map(|(at, from)| ((*at).into(), Content::File(from.clone()))));
    image
}

fn base(name: &str, entrypoint: &[&str], user: &'static str) -> Image {
    let files = BTreeMap::from([
        ("/etc/passwd".into(), Content::Text(PASSWD)),
        ("/etc/group".into(), Content::Text(GROUP)),
    ]);
    let entrypoint = entrypoint.iter().map(|&word| word.to_owned()).collect();
    let references = vec![format!("docker.io/undermesh/{name}:dev")];
    Image { name: name.to_owned(), references, files, entrypoint, user }
}

fn component(built: &Built, name: &str, user: &'static str) -> Result<Image> {
    let at = format!("/usr/local/bin/{name}");
    let mut image = base(name, &[&at], user);
    image.program(&stripped(&built.bin, name)?, &at)?;
    Ok(image)
}

fn tests(built: &Built) -> Result<Image> {
    let mut image = base("mesh-tests", &[], ROOT);
    image.program(&stripped(&built.bin, "mesh-tests")?, "/usr/local/bin/mesh-tests")?;
    for name in TEST_PROGRAMS {
        let path = run::find(name).with_context(|| {
            format!("{name} is not in PATH, and the image of the tests holds it: run `cargo xtask setup`")
        })?;
        // The names by which scripts and people call them.
        image.program(&path, &format!("/usr/bin/{name}"))?;
        if *name == "sh" {
            image.program(&path, "/bin/sh")?;
        }
    }
    Ok(image)
}

fn pause() -> Result<Image> {
    let mut image = base("pause", &["/pause"], NOBODY);
    image.files.insert("/pause".into(), Content::File(kubernetes::pause()?));
    Ok(image)
}

fn dns() -> Result<Image> {
    let mut image = base("coredns", &["/coredns"], ROOT);
    image.files.insert("/coredns".into(), Content::File(kubernetes::dns()?));
    Ok(image)
}

/// A copy of a binary without what only a debugger reads.
fn stripped(bin: &Path, name: &str) -> Result<PathBuf> {
    let out = bin.join("images").join(name);
    let path = bin.join(name);
    run::output(Command::new("strip").arg("-o").arg(&out).arg(&path))
        .with_context(|| format!("cannot strip {} (package binutils)", path.display()))?;
    Ok(out)
}

/// The shared libraries of a program, the dynamic loader among them, from what `ldd` prints.
fn libraries(ldd: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in ldd.lines().map(str::trim) {
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        if path.starts_with("not found") {
            bail!("a library is missing on this machine: {line}");
        }
        let path = path.split(" (0x").next().unwrap_or_default();
        if path.starts_with('/') {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

impl Image {
    /// Adds a program of this machine with its libraries, those where the loader looks for them.
    fn program(&mut self, from: &Path, at: &str) -> Result<()> {
        self.files.insert(at.into(), Content::File(from.to_owned()));
        // A static program has none, and `ldd` then fails.
        let text = run::output(Command::new("ldd").arg(from)).unwrap_or_default();
        for library in libraries(&text).with_context(|| format!("cannot pack {}", from.display()))? {
            self.files.insert(library.clone(), Content::File(library));
        }
        Ok(())
    }

    /// How many shared libraries it holds.
    fn libraries(&self) -> usize {
        self.files.keys().filter(|path| path.to_string_lossy().contains(".so")).count()
    }

    /// The one layer: an uncompressed archive, the same bytes for the same files.
    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (dir, mode) in [
            ("dev", 0o755),
            ("etc", 0o755),
            ("home/nonroot", 0o755),
            ("proc", 0o755),
            ("run", 0o755),
            ("sys", 0o755),
            ("tmp", 0o1777),
            ("var/lib/nginx", 0o755),
            ("var/log/nginx", 0o755),
        ] {
            let mut header = header(0, mode);
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, dir, std::io::empty()).context("cannot add a directory")?;
        }
        for (path, content) in &self.files {
            let (bytes, mode) = match content {
                Content::Text(text) => (text.as_bytes().to_vec(), 0o644),
                Content::File(from) => {
                    let bytes =
                        std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
                    (bytes, 0o755)
                }
            };
            let inside = path.strip_prefix("/").unwrap_or(path);
            tar.append_data(&mut header(bytes.len() as u64, mode), inside, bytes.as_slice())
                .with_context(|| format!("cannot add {}", path.display()))?;
        }
        tar.into_inner().context("cannot finish a layer")
    }

    /// Writes the archive and, beside it, the names and digest by which a node knows the image; returns the archive's
    /// size.
    pub(crate) fn write(&self, dir: &Path) -> Result<u64> {
        let layer = self.layer()?;
        let config = serde_json::to_vec(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "User": self.user,
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
            "history": [{"created_by": "cargo xtask cluster images"}],
        }))
        .context("cannot write an image's configuration")?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described("application/vnd.oci.image.config.v1+json", &config),
            "layers": [described("application/vnd.oci.image.layer.v1.tar", &layer)],
        }))
        .context("cannot write an image's manifest")?;
        let entry = |reference: &String| {
            let mut entry = described("application/vnd.oci.image.manifest.v1+json", &manifest);
            entry["annotations"] = json!({
                "io.containerd.image.name": reference,
                "org.opencontainers.image.ref.name": reference.rsplit(':').next(),
            });
            entry
        };
        let entries: Vec<Value> = self.references.iter().map(entry).collect();
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": entries}))
            .context("cannot write an image's index")?;
        let mut tar = tar::Builder::new(Vec::new());
        let mut add = |path: &str, bytes: &[u8]| {
            tar.append_data(&mut header(bytes.len() as u64, 0o644), path, bytes)
                .with_context(|| format!("cannot add {path}"))
        };
        add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        add("index.json", &index)?;
        for blob in [&layer, &config, &manifest] {
            add(&format!("blobs/sha256/{}", hex(blob)), blob)?;
        }
        let archive = tar.into_inner().context("cannot finish an archive")?;
        let path = dir.join(format!("{}.tar", self.name));
        std::fs::write(&path, &archive).with_context(|| format!("cannot write {}", path.display()))?;
        let known: String =
            self.references.iter().map(|name| format!("{name} {}\n", digest(&manifest))).collect();
        std::fs::write(path.with_extension("names"), known)
            .with_context(|| format!("cannot write the names of {}", path.display()))?;
        println!("  {:<14} {:6.1} MB", self.name, archive.len() as f64 / 1e6);
        Ok(archive.len() as u64)
    }
}

/// As Go, and so every image, names this machine's.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn header(size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(bytes))
}

fn described(kind: &str, blob: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": digest(blob), "size": blob.len()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_ldd_found_and_the_loader() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = libraries(text).unwrap();
        assert_eq!(found, [PathBuf::from("/lib/x/libc.so.6"), "/lib64/ld-linux-x86-64.so.2".into()]);
        let error = libraries("\tlibgone.so => not found\n").unwrap_err().to_string();
        assert!(error.contains("libgone.so"), "{error}");
    }

    #[test]
    fn the_same_files_give_the_same_image() {
        let image = || base("one", &["/x"], ROOT).layer().unwrap();
        assert_eq!(digest(&image()), digest(&image()));
        let mut other = base("one", &["/x"], ROOT);
        other.files.insert("/x".into(), Content::Text("x"));
        assert_ne!(digest(&image()), digest(&other.layer().unwrap()));
    }
}
