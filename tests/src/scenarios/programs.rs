//! Unmodified programs through the mesh.

use super::shop::{SHOP, enrolled};
use super::{Scenario, scenario, skip};
use crate::bed::mesh::MeshOptions;
use crate::bed::process::{self, Proc, Program};
use crate::bed::{Pod, Testbed, Topology, net, wait};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("curl and python's web server work through the mesh", 60, python),
    scenario("nginx serves curl, wrk and h2load through the mesh without an error", 120, nginx),
    scenario("redis works through the mesh", 60, redis),
    scenario("PostgreSQL works through the mesh", 120, postgres),
    scenario("iperf3 runs eight streams both ways through the mesh", 90, iperf3),
];

/// Server pod `shop/program` on node b, with the mesh running.
fn open(port: u16, command: &[&str]) -> Result<Testbed> {
    let command = serde_json::to_string(command).context("a command is text")?;
    let pod = format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: program, namespace: shop, labels: {{app: program}}}}
spec:
  nodeName: b
  serviceAccountName: backend
  containers: [{{name: main, image: none, command: {command}, ports: [{{containerPort: {port}}}]}}]
"
    );
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    bed.start_mesh(&MeshOptions::default())?;
    bed.apply("program", &pod)?;
    enrolled(&bed, &["shop/frontend", "shop/program"])?;
    Ok(bed)
}

/// A program of the machine; without it the scenario is skipped.
pub(super) fn need(program: &str) -> Result<PathBuf> {
    process::find(program).ok_or_else(|| skip(format!("{program} is not installed: run `cargo xtask setup`")))
}

/// Runs a client for up to a minute with a capture that must show a tunnel and no word of the talk.
fn client(bed: &Testbed, argv: &[&str], secret: &str) -> Result<String> {
    let frontend: &Pod = bed.pod("shop/frontend")?;
    let capture = bed.capture("a")?;
    let done = process::finish(&frontend.place, argv.iter().copied(), Duration::from_secs(60))?;
    let segments = capture.stop()?;
    let out = done.ok().with_context(|| argv.join(" "))?;
    ensure!(segments.iter().any(|s| s.to.port() == 15_008), "no tunnel on the wire");
    ensure!(!crate::bed::capture::carries(&segments, secret.as_bytes()), "{secret:?} is on the wire");
    Ok(format!("{out}{}", done.err))
}

fn python() -> Result<()> {
    need("python3")?;
    let bed =
        open(8000, &["python3", "-m", "http.server", "8000", "--directory", "/usr/share/common-licenses"])?;
    let url = format!("http://{}/Apache-2.0", bed.pod("shop/program")?.at(8000));
    let out = client(&bed, &["curl", "-sfS", &url], "Licensor")?;
    ensure!(out.contains("Licensor"), "curl got {out:?}");
    // The server's own log has the client's true address.
    let own = bed.pod("shop/frontend")?.v4.to_string();
    let log = bed.pod("shop/program")?.log();
    ensure!(log.contains(&own), "python logged {log:?} instead of {own}");
    Ok(())
}

/// A directory with a file, and nginx's configuration for it.
fn nginx_config(dir: &Path) -> Result<PathBuf> {
    let servers = format!(
        "server {{ listen [::]:8080 ipv6only=off; root {at}; }} server {{ listen [::]:8082 ipv6only=off http2; root {at}; }}",
        at = dir.display()
    );
    let config = nginx_conf(dir, &servers)?;
    std::fs::write(dir.join("index.html"), "a page that nobody else reads\n")
        .context("cannot write a page")?;
    Ok(config)
}

/// nginx's configuration with these servers, in a directory where it keeps everything.
pub(crate) fn nginx_conf(dir: &Path, servers: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(dir).context("cannot make a directory")?;
    let config = dir.join("nginx.conf");
    let at = dir.display();
    let text = format!(
        "daemon off; worker_processes 1; pid {at}/pid; error_log stderr; user root;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
  uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;
  {servers}
}}
"
    );
    std::fs::write(&config, text).context("cannot write nginx.conf")?;
    Ok(config)
}

fn nginx() -> Result<()> {
    let (nginx, _, _) = (need("nginx")?, need("wrk")?, need("h2load")?);
    let dir = std::env::temp_dir().join(format!("um-{}-nginx", std::process::id()));
    let config = nginx_config(&dir)?;
    let bed = open(8080, &[&nginx.to_string_lossy(), "-e", "stderr", "-c", &config.to_string_lossy()]);
    let result = bed.and_then(|bed| {
        let pod = bed.pod("shop/program")?;
        let (h1, h2) = (format!("http://{}/", pod.at(8080)), format!("http://{}/", pod.at(8082)));
        let secret = "nobody else reads";
        let page = client(&bed, &["curl", "-sfS", &h1], secret)?;
        ensure!(page.contains(secret), "curl got {page:?}");
        let wrk = client(&bed, &["wrk", "-t1", "-c32", "-d2s", &h1], secret)?;
        ensure!(!wrk.contains("Socket errors") && !wrk.contains("Non-2xx"), "{wrk}");
        let closing = client(&bed, &["wrk", "-t1", "-c16", "-d2s", "-H", "Connection: close", &h1], secret)?;
        ensure!(!closing.contains("Non-2xx"), "{closing}");
        let h2load = client(&bed, &["h2load", "-n2000", "-c8", "-m8", &h2], secret)?;
        ensure!(h2load.contains("2000 succeeded, 0 failed, 0 errored"), "{h2load}");
        Ok(())
    });
    let _ = std::fs::remove_dir_all(&dir);
    result
}

fn redis() -> Result<()> {
    need("redis-server")?;
    need("redis-cli")?;
    let bed = open(
        6379,
        &[
            "redis-server",
            "--port",
            "6379",
            "--bind",
            "0.0.0.0",
            "::",
            "--save",
            "",
            "--protected-mode",
            "no",
        ],
    )?;
    let pod = bed.pod("shop/program")?;
    let host = pod.v4.to_string();
    let out = client(&bed, &["redis-cli", "-h", &host, "SET", "key", "an open secret"], "an open secret")?;
    ensure!(out.trim() == "OK", "{out}");
    let out = client(&bed, &["redis-cli", "-h", &host, "GET", "key"], "an open secret")?;
    ensure!(out.trim() == "an open secret", "{out}");
    // The server's own list of clients has the true address.
    let own = format!("addr={}:", bed.pod("shop/frontend")?.v4);
    let list = client(&bed, &["redis-cli", "-h", &host, "CLIENT", "LIST"], "cmd=client")?;
    ensure!(list.contains(&own), "redis sees {list}");
    Ok(())
}

fn postgres_dir() -> Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .map_err(|error| skip(format!("PostgreSQL's server is not installed ({error})")))?;
    let mut dirs: Vec<PathBuf> =
        versions.flatten().map(|v| v.path().join("bin")).filter(|bin| bin.join("initdb").is_file()).collect();
    dirs.sort();
    dirs.pop().ok_or_else(|| skip("PostgreSQL's server is not installed"))
}

fn postgres() -> Result<()> {
    let bin = postgres_dir()?;
    need("psql")?;
    let dir = std::env::temp_dir().join(format!("um-{}-postgres", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let made = crate::bed::netns::command(
        "install",
        ["-d", "-m", "0700", "-o", "postgres", &*dir.to_string_lossy()],
    );
    made.map_err(|error| skip(format!("there is no user postgres: {error:#}")))?;
    let result = postgres_in(&bin, &dir);
    let _ = std::fs::remove_dir_all(&dir);
    result
}

fn postgres_in(bin: &Path, dir: &Path) -> Result<()> {
    let data = dir.display().to_string();
    let initdb = format!("{}/initdb", bin.display());
    crate::bed::netns::command(
        "setpriv",
        [
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            &initdb,
            "-D",
            &data,
            "-A",
            "trust",
            "-N",
            "-U",
            "shop",
        ],
    )
    .context("initdb")?;
    let hba = format!("{data}/pg_hba.conf");
    std::fs::write(&hba, "host all all all trust\n").with_context(|| format!("cannot write {hba}"))?;
    let server = format!("{}/postgres", bin.display());
    let sockets = format!("unix_socket_directories={data}");
    let bed = open(
        5432,
        &[
            "setpriv",
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            &server,
            "-D",
            &data,
            "-c",
            "listen_addresses=*",
            "-c",
            &sockets,
        ],
    )?;
    let host = bed.pod("shop/program")?.v4.to_string();
    let psql = |sql: &str| -> Result<String> {
        client(
            &bed,
            &["psql", "-h", &host, "-U", "shop", "-d", "postgres", "-Atq", "-c", sql],
            "an open secret",
        )
    };
    wait::until("database that answers", Duration::from_secs(20), || psql("select 1").map(Some))?;
    psql(
        "create table t (v text); insert into t select 'an open secret ' || i from generate_series(1, 1000) i",
    )?;
    ensure!(psql("select count(*) from t where v like 'an open%'")?.trim() == "1000", "rows are missing");
    let seen = psql("select client_addr from pg_stat_activity where pid = pg_backend_pid()")?;
    ensure!(seen.trim() == bed.pod("shop/frontend")?.v4.to_string(), "PostgreSQL sees {seen}");
    Ok(())
}

fn iperf3() -> Result<()> {
    need("iperf3")?;
    let bed = open(5201, &["iperf3", "-s"])?;
    let host = bed.pod("shop/program")?.v4.to_string();
    let frontend = bed.pod("shop/frontend")?;
    for direction in [None, Some("-R")] {
        let argv = ["iperf3", "-J", "-c", &host, "-P", "8", "-t", "2"].into_iter().chain(direction);
        let done = process::finish(&frontend.place, Program::from(argv), Duration::from_secs(30))?;
        let report: serde_json::Value = serde_json::from_str(done.ok()?).context("no JSON")?;
        let bits = report.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
        ensure!(bits.is_some_and(|bits| bits > 1e7), "{direction:?}: {bits:?} bit/s, {}", report["error"]);
    }
    let open = net::established(&bed.pod("shop/program")?.netns)?;
    ensure!(open.iter().any(|(local, _)| local.port() == 15_008), "no tunnel to the server's pod");
    Ok(())
}

/// How many numbers a `redis-cli` that counts has been told so far: each exactly once, and it still runs.
pub(super) fn counted(session: &mut Proc) -> Result<usize> {
    ensure!(session.running()?, "redis-cli ended: {}", session.log());
    let log = session.log();
    // It may be in the middle of a line.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |line: &str| {
        line.trim_start_matches("(integer) ").parse().with_context(|| format!("redis-cli: {line}"))
    };
    let answers: Vec<u64> = whole.lines().map(number).collect::<Result<_>>()?;
    ensure!(answers.windows(2).all(|pair| pair[1] == pair[0] + 1), "redis-cli missed an answer");
    Ok(answers.len())
}

/// An `iperf3 -J` that has ended ran to its end and moved many bytes.
pub(super) fn moved(stream: &Proc) -> Result<()> {
    let report: serde_json::Value = serde_json::from_str(&stream.log()).context("iperf3 writes no JSON")?;
    let bytes = report.pointer("/end/sum_received/bytes").and_then(serde_json::Value::as_u64);
    ensure!(bytes.is_some_and(|b| b > 10_000_000), "iperf3: {bytes:?} bytes, {}", report["error"]);
    Ok(())
}
