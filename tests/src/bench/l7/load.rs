//! wrk and h2load: what to run, and what they say.

use super::routes::HEADER;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;

/// What a load is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Load {
    /// HTTP/1.1, 64 connections, as fast as it goes.
    Http1,
    /// HTTP/2, 8 connections with 8 streams each, as fast as it goes.
    Http2,
    /// HTTP/1.1, 16 connections, so many requests a second in total.
    Paced(f64),
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Served {
    pub(super) requests: f64,
    pub(super) rate: f64,
    /// Milliseconds; only of a paced load.
    pub(super) p99: f64,
}

const PACED_CONNECTIONS: u32 = 16;

/// The load's command line; a paced one writes its times to `times`.
pub(super) fn command(
    load: Load,
    to: SocketAddr,
    path: &str,
    seconds: f64,
    headers: &[String],
    times: &str,
) -> Vec<String> {
    let url = format!("http://{to}{path}");
    let own = format!("{HEADER}: yes");
    let headers: Vec<String> =
        [own].iter().chain(headers).flat_map(|header| ["-H".to_owned(), header.clone()]).collect();
    let whole = format!("{seconds:.0}");
    let mut argv: Vec<String> = match load {
        Load::Http1 => {
            ["wrk", "-t1", "-c64", "-d", &format!("{whole}s"), "--latency"].map(str::to_owned).into()
        }
        Load::Http2 => ["h2load", "-t1", "-c8", "-m8", "-D", &whole].map(str::to_owned).into(),
        Load::Paced(rate) => {
            let each = format!("--rps={:.0}", rate / f64::from(PACED_CONNECTIONS));
            let connections = format!("-c{PACED_CONNECTIONS}");
            let log = format!("--log-file={times}");
            ["h2load", "--h1", "-t1", &connections, &each, "-D", &whole, &log].map(str::to_owned).into()
        }
    };
    argv.extend(headers);
    argv.push(url);
    argv
}

/// Reads what wrk or h2load wrote.
///
/// # Errors
/// A request was not answered with success, or the text is another.
pub(super) fn read(load: Load, text: &str, times: &str) -> Result<Served> {
    let served = if load == Load::Http1 { wrk(text) } else { h2load(text) };
    let mut served = served.with_context(|| format!("the load said {text:?}"))?;
    if let Load::Paced(_) = load {
        served.p99 = percentile(times, 0.99).context("the load wrote no times")?;
    }
    Ok(served)
}

fn wrk(text: &str) -> Result<Served> {
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        bail!("not every request was answered with 200");
    }
    let line = |of: &str| text.lines().map(str::trim).find(|line| line.contains(of));
    let requests = line("requests in").and_then(|line| line.split(' ').next()?.parse().ok());
    let rate = line("Requests/sec:").and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    let (requests, rate) = requests.zip(rate).context("no figures")?;
    Ok(Served { requests, rate, p99: 0.0 })
}

fn h2load(text: &str) -> Result<Served> {
    let line = |begin: &str| text.lines().find_map(|line| line.trim().strip_prefix(begin));
    let counts = line("requests: ").context("no counts")?;
    let count = |what: &str| {
        let part = counts.split(", ").find(|part| part.ends_with(what))?;
        part.split(' ').next()?.parse::<f64>().ok()
    };
    let codes = line("status codes: ").context("no status codes")?;
    let others = codes.split(", ").skip(1).any(|part| !part.starts_with("0 "));
    if others || count("failed") != Some(0.0) {
        bail!("not every request was answered with 200");
    }
    let rate = line("finished in ").and_then(|line| line.split(", ").nth(1)?.split(' ').next()?.parse().ok());
    let (requests, rate) = count("succeeded").zip(rate).context("no figures")?;
    Ok(Served { requests, rate, p99: 0.0 })
}

/// Of the times in h2load's log (start, status, microseconds), milliseconds.
fn percentile(log: &str, share: f64) -> Option<f64> {
    let mut times: Vec<f64> =
        log.lines().filter_map(|line| line.split('\t').nth(2)?.trim().parse().ok()).collect();
    times.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index of a list")]
    let at = ((times.len() as f64 * share) as usize).min(times.len().checked_sub(1)?);
    Some(times[at] / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_both_loads_are_read_and_failures_are_none() {
        let wrk = "Running 2s test\n  154309 requests in 2.00s, 1MB read\nRequests/sec:  77000.12\n";
        let served = read(Load::Http1, wrk, "").unwrap();
        assert_eq!((served.requests, served.rate), (154_309.0, 77_000.12));
        let failed = format!("{wrk}  Non-2xx or 3xx responses: 5\n");
        assert!(read(Load::Http1, &failed, "").is_err());
        let h2load = "finished in 2.00s, 49840.00 req/s, 53.1MB/s
requests: 99680 total, 99744 started, 99680 done, 99680 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 99680 2xx, 0 3xx, 0 4xx, 0 5xx
";
        let log = "1\t200\t1000\n2\t200\t3000\n";
        let served = read(Load::Paced(1.0), h2load, log).unwrap();
        assert_eq!((served.requests, served.rate, served.p99), (99_680.0, 49_840.0, 3.0));
        assert!(read(Load::Http2, &h2load.replace("0 5xx", "7 5xx"), "").is_err());
    }
}
