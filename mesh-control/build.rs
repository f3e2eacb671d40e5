//! Embeds the map's page if `UM_MAP` names its directory at build time (`cargo xtask build` does). A plain `cargo check`
//! embeds nothing and needs no npm; the map then says so.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-env-changed=UM_MAP");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut entries = String::new();
    if let Some(map) = env::var_os("UM_MAP").filter(|map| !map.is_empty()) {
        let map = Path::new(&map);
        for name in ["index.html", "map.css", "map.js"] {
            let file = map.join(name);
            println!("cargo:rerun-if-changed={}", file.display());
            fs::copy(&file, out.join(name))
                .map_err(|error| format!("UM_MAP: {}: {error}", file.display()))?;
            entries += &format!("({name:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}\"))), ");
        }
    }
    let text = format!(
        "/// The map's page; empty if the build had none.\nstatic PAGE: &[(&str, &[u8])] = &[{entries}];\n"
    );
    fs::write(out.join("map.rs"), text)?;
    Ok(())
}
