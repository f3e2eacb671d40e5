//! The toolchain of the kernel programs, and their build.
//!
//! Two ways lead to the same object: Debian's `rustc-web` with `core` prebuilt for the BPF target, or a nightly with
//! rust-src and `-Z build-std=core`. bpf-linker must be built against an LLVM at least as new as the compiler's,
//! because it reads the compiler's bitcode; a mismatch otherwise shows up as an unreadable linker crash.

use crate::{paths, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The nightly that `setup` installs where the distribution has no compiler for the BPF target.
pub(crate) const NIGHTLY: &str = "nightly-2026-04-15";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
/// The object, below the target directory of the kernel programs.
pub(crate) const OBJECT: &str = "mesh.o";
/// What the compiler leaves, with debug sections ten times as large as the rest.
const COMPILED: &str = "bpfel-unknown-none/bpf/mesh";

/// A compiler that can produce the kernel programs.
pub(crate) enum Toolchain {
    /// The distribution's compiler, which ships `core` for the target.
    Distribution,
    /// A rustup toolchain that builds `core` itself.
    Nightly(String),
}

impl Toolchain {
    /// The best one on this machine, if any.
    pub(crate) fn find() -> Option<Self> {
        let core = Path::new("/usr/lib/rustlib").join(TARGET);
        if Path::new(DEBIAN_RUSTC).is_file() && core.join("lib").is_dir() {
            return Some(Self::Distribution);
        }
        [NIGHTLY, "nightly"]
            .into_iter()
            .find(|name| has_rust_src(name))
            .map(|name| Self::Nightly(name.to_owned()))
    }

    fn rustc(&self) -> Command {
        match self {
            Self::Distribution => Command::new(DEBIAN_RUSTC),
            Self::Nightly(name) => {
                let mut command = Command::new("rustup");
                command.args(["run", name, "rustc"]);
                command
            }
        }
    }

    /// The compiler's version and its LLVM's major version.
    pub(crate) fn versions(&self) -> Result<(String, u32)> {
        let text = run::output(self.rustc().arg("-vV"))?;
        let version = text.lines().next().unwrap_or("rustc").to_owned();
        let llvm = text
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))
            .and_then(|version| version.split('.').next()?.parse().ok())
            .with_context(|| format!("`rustc -vV` names no LLVM version: {text}"))?;
        Ok((version, llvm))
    }
}

fn has_rust_src(toolchain: &str) -> bool {
    run::output(Command::new("rustup").args(["run", toolchain, "rustc", "--print", "sysroot"]))
        .is_ok_and(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir())
}

/// The LLVM major version that the cached bpf-linker was built with, as setup noted it.
pub(crate) fn linker_llvm() -> Result<Option<u32>> {
    let tools = paths::tools()?;
    if !tools.join("bin/bpf-linker").is_file() && !run::have("bpf-linker") {
        return Ok(None);
    }
    if let Ok(note) = std::fs::read_to_string(tools.join("bpf-linker.llvm")) {
        return Ok(note.trim().parse().ok());
    }
    // Built by hand or by another setup: the shared library it asks the loader for tells.
    let ldd = run::output(Command::new("ldd").arg(linker()?)).unwrap_or_default();
    let number = ldd.lines().find_map(|line| line.trim().strip_prefix("libLLVM")).map(|rest| {
        rest.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect()
    });
    Ok(number.and_then(|digits: String| digits.parse().ok()))
}

fn linker() -> Result<PathBuf> {
    let path = paths::path_with_tools()?;
    std::env::split_paths(&path)
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
        .context("bpf-linker is not installed: run `cargo xtask setup`")
}

/// Builds the kernel programs and returns the object's path.
///
/// # Errors
/// No toolchain (the message says how to get one), or the compiler's own error.
pub(crate) fn build() -> Result<PathBuf> {
    let toolchain = Toolchain::find()
        .context("no compiler for the kernel programs on this machine: run `cargo xtask setup` as root")?;
    linker()?;
    let (version, llvm) = toolchain.versions()?;
    if let Some(linker) = linker_llvm()?.filter(|linker| *linker < llvm) {
        bail!(
            "bpf-linker was built with LLVM {linker}, older than the compiler's LLVM {llvm}: run `cargo xtask setup`"
        );
    }
    run::step(&format!("kernel programs ({version}, LLVM {llvm})"));
    let dir = paths::bpf_target()?;
    let mut cargo = Command::new("cargo");
    if let Toolchain::Nightly(name) = &toolchain {
        cargo = Command::new("rustup");
        cargo.args(["run", name, "cargo"]);
    }
    cargo
        .current_dir(paths::root())
        .args(["build", "-p", "mesh-ebpf", "--bin", "mesh", "--features", "programs", "--profile", "bpf"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&dir)
        .env("PATH", paths::path_with_tools()?)
        .env("RUSTFLAGS", "-C linker=bpf-linker -C link-arg=--btf -C debuginfo=2")
        // What this process got from `cargo run` describes another build.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER");
    match &toolchain {
        // aya-ebpf uses unstable features, which a stable compiler allows only when told so.
        Toolchain::Distribution => cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1"),
        Toolchain::Nightly(_) => {
            cargo.args(["-Z", "build-std=core"]).env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN")
        }
    };
    run::check(&mut cargo)?;
    let object = dir.join(OBJECT);
    strip(&dir.join(COMPILED), &object)?;
    Ok(object)
}

/// Copies an object without its debug sections: type information (BTF) is made from them, after which nobody reads them.
/// The file is left alone if it would not change, so that nothing is built again for it.
fn strip(compiled: &Path, object: &Path) -> Result<()> {
    let data = std::fs::read(compiled)
        .with_context(|| format!("the build succeeded but {} cannot be read", compiled.display()))?;
    let unreadable = || format!("{} is no ELF object", compiled.display());
    let mut elf = object::build::elf::Builder::read(data.as_slice()).with_context(unreadable)?;
    for section in &mut elf.sections {
        let name = section.name.to_string();
        section.delete = name.starts_with(".debug") || name.starts_with(".rel.debug");
    }
    // LLVM names sections and symbols from one table; here each has its own.
    let names = elf.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = object::build::elf::SectionData::SectionString;
    elf.delete_orphans();
    elf.delete_unused_versions();
    let mut stripped = Vec::new();
    elf.write(&mut stripped).with_context(|| format!("cannot strip {}", compiled.display()))?;
    if std::fs::read(object).is_ok_and(|old| old == stripped) {
        return Ok(());
    }
    std::fs::write(object, stripped).with_context(|| format!("cannot write {}", object.display()))
}
