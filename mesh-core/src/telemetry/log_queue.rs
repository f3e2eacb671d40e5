//! Takes log lines off the threads that write them: whoever logs never waits for the reader of the log.
//!
//! When the reader does not keep up, lines are dropped, counted, and the count is written where they would have stood.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime};

use tracing_subscriber::fmt::MakeWriter;

use super::logging::LogFormat;

/// Lines that wait for the writer.
const QUEUE: usize = 8192;

enum Message {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// Where log lines go. Cheap to clone.
#[derive(Clone)]
pub(super) struct LogQueue {
    messages: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl std::fmt::Debug for LogQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogQueue").field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl LogQueue {
    /// Starts the writer thread. It ends when the last clone is dropped and the queue is written.
    pub(super) fn start(format: LogFormat, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let (messages, queued) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&queued, &counted, format, output))?;
        Ok(Self { messages, lost })
    }

    /// Waits until what is queued is written, at most for `patience`.
    pub(super) fn flush(&self, patience: Duration) {
        let (done, written) = sync_channel(1);
        // A queue that is full at the end has no reader.
        if self.messages.try_send(Message::Flush(done)).is_ok() {
            let _ = written.recv_timeout(patience);
        }
    }
}

/// One line: the subscriber writes each event at once.
impl Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.messages.try_send(Message::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

fn write_lines(
    queued: &Receiver<Message>,
    lost: &AtomicU64,
    format: LogFormat,
    mut output: Box<dyn Write + Send>,
) {
    while let Ok(message) = queued.recv() {
        // A log that cannot be written (closed pipe, full disk) must not take the program with it.
        let _ = match message {
            Message::Line(line) => output.write_all(&line).and_then(|()| output.flush()),
            Message::Flush(done) => {
                let _ = done.try_send(());
                Ok(())
            }
        };
        let count = lost.swap(0, Ordering::Relaxed);
        if count > 0 {
            let _ = output.write_all(lost_lines(count, format).as_bytes()).and_then(|()| output.flush());
        }
    }
}

fn lost_lines(count: u64, format: LogFormat) -> String {
    let time = humantime::format_rfc3339_micros(SystemTime::now());
    let message = "log lines lost: the reader of the log did not keep up";
    match format {
        LogFormat::Text => format!("{time}\twarn\tlog\t{message}\tcount={count}\n"),
        LogFormat::Json => {
            let line = serde_json::json!({
                "level": "warn", "time": time.to_string(), "scope": "log", "message": message, "count": count,
            });
            format!("{line}\n")
        }
    }
}
