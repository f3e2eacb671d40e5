//! Embeds the kernel programs if `UM_BPF_OBJECT` names their object at build time (`cargo xtask build` does). A plain
//! `cargo check` embeds nothing and needs no BPF toolchain; the agent then takes `--bpf-object`.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-env-changed=UM_BPF_OBJECT");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // A library of bytes aligned for the ELF parser.
    let body = match env::var_os("UM_BPF_OBJECT") {
        Some(object) if !object.is_empty() => {
            let object = Path::new(&object);
            println!("cargo:rerun-if-changed={}", object.display());
            fs::copy(object, out.join("mesh.o"))
                .map_err(|error| format!("UM_BPF_OBJECT={}: {error}", object.display()))?;
            "include_bytes!(concat!(env!(\"OUT_DIR\"), \"/mesh.o\"))"
        }
        _ => "&[]",
    };
    let text =
        format!("/// The kernel programs, empty if the build had none.\nstatic EMBEDDED: &[u8] = {body};\n");
    fs::write(out.join("object.rs"), text)?;
    Ok(())
}
