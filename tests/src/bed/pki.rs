//! A certificate authority made with openssl, so that a test holds the mesh's own signing key.

use super::netns;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Root, intermediate, and the intermediate's books (`openssl ca`), in a directory that `mesh-control --ca-dir` takes.
#[derive(Debug)]
pub struct Pki {
    dir: PathBuf,
}

/// A certificate to be issued.
#[derive(Debug, Clone, Copy)]
pub struct Leaf<'a> {
    /// Subject alternative name as openssl writes it: `URI:spiffe://…`, `DNS:…`.
    pub san: &'a str,
    /// First and last moment, as `YYYYMMDDHHMMSSZ`; a month from now when not given.
    pub validity: Option<(&'a str, &'a str)>,
}

impl<'a> Leaf<'a> {
    /// Valid now.
    pub fn of(san: &'a str) -> Self {
        Self { san, validity: None }
    }
}

/// A certificate with its key.
#[derive(Debug, Clone)]
pub struct Issued {
    /// PEM: leaf and intermediate.
    pub chain: PathBuf,
    /// PEM: the key.
    pub key: PathBuf,
}

const CONFIG: &str = "
[req]
distinguished_name = name
prompt = no
[name]
CN = test
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[intermediate]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[ca]
default_ca = books
[books]
database = DIR/index.txt
new_certs_dir = DIR/issued
certificate = DIR/ca-cert.pem
private_key = DIR/ca-key.pem
rand_serial = yes
unique_subject = no
default_md = sha256
default_days = 30
default_crl_days = 30
policy = any
crl_extensions = crl
[any]
organizationName = optional
commonName = optional
[crl]
authorityKeyIdentifier = keyid
";

impl Pki {
    /// Makes a root and an intermediate with the names of `name` in a new directory.
    ///
    /// # Errors
    /// openssl is missing or fails.
    pub fn create(dir: &Path, name: &str) -> Result<Self> {
        let pki = Self { dir: dir.to_owned() };
        let issued = dir.join("issued");
        std::fs::create_dir_all(&issued).with_context(|| format!("cannot make {}", issued.display()))?;
        pki.write("openssl.cnf", &CONFIG.replace("DIR", &dir.to_string_lossy()))?;
        pki.write("index.txt", "")?;
        pki.request("root", &format!("/O={name}/CN=root"))?;
        pki.openssl("x509 -req -in root.csr -key root-key.pem -days 3650 -extfile openssl.cnf -extensions root -out root-cert.pem")?;
        pki.request("ca", &format!("/O={name}/CN=intermediate"))?;
        pki.openssl("x509 -req -in ca.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 1800 -extfile openssl.cnf -extensions intermediate -out ca-cert.pem")?;
        std::fs::copy(pki.path("ca-cert.pem"), pki.path("cert-chain.pem"))
            .context("cannot copy the chain")?;
        Ok(pki)
    }

    /// The directory, with `ca-cert.pem`, `ca-key.pem`, `root-cert.pem` and `cert-chain.pem`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root's certificate.
    pub fn root(&self) -> PathBuf {
        self.path("root-cert.pem")
    }

    /// Signs a certificate under a new key.
    ///
    /// # Errors
    /// openssl fails.
    pub fn issue(&self, name: &str, leaf: Leaf<'_>) -> Result<Issued> {
        self.request(name, &format!("/CN={name}"))?;
        let extensions = format!(
            "basicConstraints = critical, CA:FALSE\nkeyUsage = critical, digitalSignature\n\
             extendedKeyUsage = serverAuth, clientAuth\nsubjectAltName = {}\n",
            leaf.san
        );
        self.write(&format!("{name}.ext"), &extensions)?;
        let dates = leaf.validity.map(|(from, to)| format!(" -startdate {from} -enddate {to}"));
        let dates = dates.unwrap_or_default();
        self.openssl(&format!(
            "ca -batch -config openssl.cnf -notext -in {name}.csr -extfile {name}.ext{dates} -out {name}-leaf.pem"
        ))?;
        let read = |file: &str| {
            std::fs::read_to_string(self.path(file)).with_context(|| format!("cannot read {file}"))
        };
        let chain = format!("{}{}", read(&format!("{name}-leaf.pem"))?, read("ca-cert.pem")?);
        self.write(&format!("{name}-chain.pem"), &chain)?;
        Ok(Issued {
            chain: self.path(&format!("{name}-chain.pem")),
            key: self.path(&format!("{name}-key.pem")),
        })
    }

    /// Takes a certificate back (PEM), whoever had it signed by this authority.
    ///
    /// # Errors
    /// It was taken back before, or is not of this authority.
    pub fn revoke(&self, certificate: &str) -> Result<()> {
        self.write("revoked.pem", certificate)?;
        self.openssl("ca -batch -config openssl.cnf -revoke revoked.pem").map(drop)
    }

    /// The list of what was taken back (PEM).
    ///
    /// # Errors
    /// openssl fails.
    pub fn revocations(&self) -> Result<String> {
        self.openssl("ca -batch -config openssl.cnf -gencrl")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        std::fs::write(self.path(name), text).with_context(|| format!("cannot write {name}"))
    }

    /// A key on P-256 and a request for it: `<name>-key.pem`, `<name>.csr`.
    fn request(&self, name: &str, subject: &str) -> Result<()> {
        let (key, out) = (format!("{name}-key.pem"), format!("{name}.csr"));
        self.run(&[
            "req",
            "-new",
            "-config",
            "openssl.cnf",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            subject,
            "-keyout",
            &key,
            "-out",
            &out,
        ])
        .map(drop)
    }

    fn openssl(&self, line: &str) -> Result<String> {
        self.run(&line.split(' ').collect::<Vec<_>>())
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let dir = self.dir.to_string_lossy();
        // `env -C` because openssl takes some of its files relative to where it runs.
        let argv = ["-C", &*dir, "openssl"].into_iter().chain(args.iter().copied());
        netns::command("env", argv).with_context(|| format!("openssl {}", args.join(" ")))
    }
}
