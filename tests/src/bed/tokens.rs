//! Tokens of an issuer that only this run knows.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

const MAKER: &str = include_str!("../foreign/tokens.py");

/// The issuer `https://issuer.example`: its keys, and tokens of alice, who is an admin.
pub struct Tokens {
    /// As JWKS.
    pub keys: String,
    /// One that holds for an hour.
    pub good: String,
    /// One that has expired.
    pub expired: String,
    /// One that another key has signed.
    pub foreign: String,
    /// One of a guest.
    pub guest: String,
}

impl Tokens {
    /// Makes a key in a directory, and the tokens. Needs python3 and openssl.
    ///
    /// # Errors
    /// One of them fails.
    pub fn issue(dir: &Path) -> Result<Self> {
        Self::of_key(dir, "one")
    }

    /// The same with a key of some id.
    ///
    /// # Errors
    /// As [`Tokens::issue`].
    pub fn of_key(dir: &Path, id: &str) -> Result<Self> {
        let made = Command::new("python3").args(["-c", MAKER]).arg(dir).arg(id).output();
        let made = made.context("cannot start python3")?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let made = String::from_utf8(made.stdout).context("tokens are text")?;
        let lines: Vec<String> = made.lines().map(str::to_owned).collect();
        let [keys, good, expired, foreign, guest] = lines.try_into().map_err(|lines: Vec<_>| {
            anyhow::anyhow!("the maker of tokens wrote {} lines and not five", lines.len())
        })?;
        Ok(Self { keys, good, expired, foreign, guest })
    }
}
