//! Load of one shape, with figures at the end (or at SIGTERM) as one line of JSON.

mod shapes;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a load does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// Round trips on open connections
    Pp,
    /// Connect, one round trip, close
    Crr,
    /// Send as fast as it goes
    Bulk,
    /// Receive as fast as it goes
    Bulkr,
    /// Open connections, one round trip each, and keep them
    Hold,
    /// One HTTP request per connection; everything but a 200 is a failure
    Http,
}

/// Which load.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Server addresses, taken in turn
    #[arg(long, required = true)]
    to: Vec<SocketAddr>,
    /// The shape
    #[arg(long, value_enum)]
    shape: Shape,
    /// Connections, or connections in flight
    #[arg(long, default_value_t = 1)]
    conns: usize,
    /// How long; 0 means until SIGTERM
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes of a round trip
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Pause between round trips on a connection, or reads and writes of a stream, in milliseconds
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Round trips or connections.
    pub ops: u64,
    /// Bytes moved (bulk shapes).
    pub bytes: u64,
    /// Connections or round trips that failed.
    pub errors: u64,
    /// The first failure.
    pub first_error: String,
    /// Connections that were open at the end, unharmed (pp, hold).
    pub alive: u64,
    /// Time measured.
    pub seconds: f64,
    /// Median time of an operation in microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Figures {
    /// Operations per second.
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
        let ops = self.ops as f64;
        ops / self.seconds
    }

    /// Gigabits per second.
    pub fn gbits(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "bytes of a few seconds")]
        let bytes = self.bytes as f64;
        bytes * 8e-9 / self.seconds
    }

    fn fail(&mut self, what: &str, error: &std::io::Error) {
        self.errors += 1;
        if self.first_error.is_empty() {
            self.first_error = format!("{what}: {error}");
        }
    }
}

/// The stop signal and the end of the measured time.
#[derive(Clone)]
struct Stop {
    flag: Arc<AtomicBool>,
    end: Option<Instant>,
}

impl Stop {
    fn now(&self) -> bool {
        self.flag.load(Ordering::Relaxed) || self.end.is_some_and(|end| Instant::now() >= end)
    }

    /// How long a wait may last so that the end is not missed.
    fn left(&self) -> Duration {
        let tick = Duration::from_millis(50);
        self.end.map_or(tick, |end| end.saturating_duration_since(Instant::now()).min(tick))
    }
}

/// Runs and prints [`Figures`].
///
/// # Errors
/// The first connection already fails, or signals cannot be caught.
pub fn run(args: &Args) -> Result<()> {
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&flag))
        .context("cannot catch SIGTERM")?;
    let start = Instant::now();
    let end = (args.seconds > 0.0).then(|| start + Duration::from_secs_f64(args.seconds));
    let stop = Stop { flag, end };
    let mut times = Vec::new();
    let mut figures = match args.shape {
        Shape::Pp if args.conns == 1 => shapes::one(args, &stop, &mut times),
        Shape::Pp => shapes::many(args, &stop, &mut times, false),
        Shape::Crr if args.conns == 1 => shapes::connect_one(args, &stop, &mut times),
        Shape::Crr => shapes::many(args, &stop, &mut times, true),
        Shape::Bulk => shapes::bulk(args, &stop, true),
        Shape::Bulkr => shapes::bulk(args, &stop, false),
        Shape::Http => shapes::http(args, &stop, &mut times),
        Shape::Hold => shapes::hold(args, &stop, &mut times),
    }?;
    if figures.seconds == 0.0 {
        figures.seconds = start.elapsed().as_secs_f64();
    }
    percentiles(&mut figures, &mut times);
    println!("{}", serde_json::to_string(&figures).context("cannot print the figures")?);
    Ok(())
}

fn percentiles(figures: &mut Figures, nanos: &mut [u32]) {
    nanos.sort_unstable();
    let at = |share: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index within the slice"
        )]
        #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
        let index = (nanos.len().saturating_sub(1) as f64 * share) as usize;
        nanos.get(index).map_or(0.0, |nanos| f64::from(*nanos) / 1e3)
    };
    figures.p50_us = at(0.5);
    figures.p99_us = at(0.99);
    figures.max_us = at(1.0);
}

/// Nanoseconds since, as many as fit.
fn nanos(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX)
}
