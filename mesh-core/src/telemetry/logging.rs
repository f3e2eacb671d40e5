//! Log lines of the programs themselves: one layout for all of them, levels that can be changed at run time.
//!
//! Text is `time TAB level TAB scope TAB message TAB key=value ...`; JSON has the keys `level`, `time`, `scope`, `message`
//! and then the fields.

use std::fmt::{self, Write as _};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use super::log_queue::LogQueue;

/// How long the last lines of a program may take to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// How lines are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Tab-separated, for people and Kiali.
    #[default]
    Text,
    /// One object per line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = InvalidLogSettings;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "" | "text" | "plain" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(InvalidLogSettings::Format(text.to_owned())),
        }
    }
}

/// What to log and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// Directives such as `info` or `info,mesh_node::proxy=debug,access=off`.
    pub level: String,
    /// The layout.
    pub format: LogFormat,
}

/// Why log settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidLogSettings {
    /// Not a format.
    #[error("log format {0:?} is not known; use `text` or `json` (LOG_FORMAT)")]
    Format(String),
    /// Not a level or filter.
    #[error(
        "log level {value:?} is not valid: {source}; use for example `info` or `info,access=off` (RUST_LOG)"
    )]
    Level {
        /// What was given.
        value: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The subscriber is gone or was never set.
    #[error("logging cannot be set up: {0}")]
    Setup(String),
}

impl LogSettings {
    /// From `RUST_LOG` (or `LOG_LEVEL`) and `LOG_FORMAT`; `info` and text when unset.
    ///
    /// # Errors
    /// `LOG_FORMAT` names no format.
    pub fn from_env() -> Result<Self, InvalidLogSettings> {
        let var = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let level = var("RUST_LOG").or_else(|| var("LOG_LEVEL")).unwrap_or_else(|| "info".to_owned());
        let format = var("LOG_FORMAT").unwrap_or_default().parse()?;
        Ok(Self { level, format })
    }

    /// Starts logging to standard output, from a thread of its own: nobody who logs waits for its reader. Once per
    /// process.
    ///
    /// # Errors
    /// The level is not valid, or logging was set up before.
    pub fn start(&self) -> Result<Logging, InvalidLogSettings> {
        let (filter, handle) = reload::Layer::new(parse(&self.level)?);
        let queue = LogQueue::start(self.format, Box::new(std::io::stdout()))
            .map_err(|error| InvalidLogSettings::Setup(error.to_string()))?;
        let lines =
            tracing_subscriber::fmt::layer().event_format(Lines(self.format)).with_writer(queue.clone());
        tracing_subscriber::registry()
            .with(filter)
            .with(lines)
            .try_init()
            .map_err(|error| InvalidLogSettings::Setup(error.to_string()))?;
        let current = Mutex::new(self.level.clone());
        Ok(Logging { handle, initial: self.level.clone(), current, queue })
    }
}

/// Level changes at run time. When it is dropped, the lines that are queued are written.
#[derive(Debug)]
pub struct Logging {
    handle: reload::Handle<EnvFilter, Registry>,
    initial: String,
    current: Mutex<String>,
    queue: LogQueue,
}

impl Drop for Logging {
    fn drop(&mut self) {
        self.queue.flush(LAST_LINES);
    }
}

impl Logging {
    /// The directives in force.
    #[must_use]
    pub fn level(&self) -> String {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds directives to those in force (the later ones win); a level without a target replaces all, and `reset` goes
    /// back to those of the start. Returns what is in force then.
    ///
    /// # Errors
    /// The directives are not valid; nothing changes then.
    pub fn set(&self, directives: &str) -> Result<String, InvalidLogSettings> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let next = if directives == "reset" {
            self.initial.clone()
        } else if directives.split(',').any(|directive| !directive.contains('=')) {
            directives.to_owned()
        } else {
            format!("{current},{directives}")
        };
        let filter = parse(&next)?;
        self.handle.reload(filter).map_err(|error| InvalidLogSettings::Setup(error.to_string()))?;
        current.clone_from(&next);
        Ok(next)
    }
}

fn parse(level: &str) -> Result<EnvFilter, InvalidLogSettings> {
    EnvFilter::builder()
        .parse(level)
        .map_err(|source| InvalidLogSettings::Level { value: level.to_owned(), source })
}

/// The layout of events.
pub(super) struct Lines(pub(super) LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        let time = humantime::format_rfc3339_micros(SystemTime::now());
        let level = match *meta.level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warn",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        let mut scope = meta.target().to_owned();
        if let Some(span) = ctx.lookup_current() {
            write!(scope, ":{}", span.name())?;
            if let Some(fields) = span.extensions().get::<tracing_subscriber::fmt::FormattedFields<N>>()
                && !fields.is_empty()
            {
                write!(scope, "{{{fields}}}")?;
            }
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        match self.0 {
            LogFormat::Text => {
                write!(out, "{time}\t{level}\t{scope}\t{}", fields.message)?;
                for (i, (name, value)) in fields.others.iter().enumerate() {
                    let space = if i == 0 { "\t" } else { " " };
                    match value {
                        Value::String(text) if text.contains([' ', '"', '\t', '\n']) => {
                            write!(out, "{space}{name}={text:?}")?;
                        }
                        Value::String(text) => write!(out, "{space}{name}={text}")?,
                        other => write!(out, "{space}{name}={other}")?,
                    }
                }
                writeln!(out)
            }
            LogFormat::Json => {
                let mut map = Map::new();
                map.insert("level".to_owned(), level.into());
                map.insert("time".to_owned(), time.to_string().into());
                map.insert("scope".to_owned(), scope.into());
                map.insert("message".to_owned(), fields.message.into());
                map.extend(fields.others);
                writeln!(out, "{}", Value::Object(map))
            }
        }
    }
}

/// Collects the fields of an event; line ends inside values must not forge lines.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text.replace('\n', "\\n").replace('\t', " "),
            ("message", other) => self.message = other.to_string(),
            (name, value) => self.others.push((name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}
