//! TensorBoard event files.
//!
//! Messages, record format and checksums are those of `tensorboard-rs`. The file is ours: its background writer panics when the
//! disk fails and truncates when a run restarts within a second.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use tensorboard_rs::record_writer::RecordWriter;

use super::append::Append;
use super::event::{What, encode};
use super::{Picture, ReportError};
use crate::machine;

/// Events reach the file at the latest this long after they were written (when more come) …
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// … or when this many bytes wait.
const FLUSH_BYTES: usize = 1 << 20;

/// The event file of one start of a run.
#[derive(Debug)]
pub struct TensorBoard {
    file: Append,
    last_flush: Instant,
    behind: bool,
}

impl TensorBoard {
    /// Creates a new event file in `folder` (created if missing) for a run that has done `done` steps; earlier files
    /// stay as they are.
    ///
    /// If there are earlier files, the run goes on after an earlier start that may have reported further than the
    /// checkpoint in use: TensorBoard is told to forget what they say about steps after `done`.
    ///
    /// # Errors
    /// The folder or the file cannot be created or written.
    pub fn create(folder: &Path, done: u64) -> Result<TensorBoard, ReportError> {
        fs::create_dir_all(folder).map_err(ReportError::io("create folder", folder))?;
        let restarted = fs::read_dir(folder)
            .map_err(ReportError::io("read folder", folder))?
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("tfevents"));
        let stem = format!(
            "events.out.tfevents.{:010}.{}.{}",
            machine::since_1970().as_secs_f64() as u64,
            host_name(),
            std::process::id()
        );
        let mut n = 0;
        let file = loop {
            let path = folder.join(format!("{stem}.{n}"));
            match OpenOptions::new().append(true).create_new(true).open(&path) {
                Ok(file) => break Append::new(&path, file),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => n += 1,
                Err(error) => return Err(ReportError::io("create", &path)(error)),
            }
        };
        let mut this = TensorBoard { file, last_flush: Instant::now(), behind: false };
        this.push(0, What::FileVersion("brain.Event:2"))?;
        if restarted {
            this.push(done + 1, What::Restart)?;
        }
        this.flush()?;
        Ok(this)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reports numbers at `step`, by tag (`loss`, `optim/lr`, …). TensorBoard keeps them as f32.
    ///
    /// # Errors
    /// The file cannot be written. What waits is tried again at the next call, so a caller may go on.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<(), ReportError> {
        self.push(step, What::Scalars(scalars))?;
        self.flush_if_due()
    }

    /// Reports a picture at `step`.
    ///
    /// # Errors
    /// The picture cannot be encoded, or the file not be written (see [`TensorBoard::scalars`]).
    pub fn image(&mut self, tag: &str, step: u64, picture: &Picture) -> Result<(), ReportError> {
        let png = picture.png().map_err(|message| ReportError::Encode { path: self.path().to_owned(), message })?;
        self.push(step, What::Image { tag, picture, png })?;
        self.flush_if_due()
    }

    /// Hands everything to the system.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<(), ReportError> {
        self.last_flush = Instant::now();
        let outcome = self.file.flush();
        self.behind = outcome.is_err();
        outcome
    }

    /// Whether the file could not be written when that was last tried: events wait, and a call that did not try may still have succeeded.
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    fn flush_if_due(&mut self) -> Result<(), ReportError> {
        if self.last_flush.elapsed() < FLUSH_EVERY && self.file.pending() < FLUSH_BYTES {
            return Ok(());
        }
        self.flush()
    }

    fn push(&mut self, step: u64, what: What) -> Result<(), ReportError> {
        let event = encode(machine::since_1970().as_secs_f64(), step, what)
            .map_err(|error| ReportError::Encode { path: self.file.path().to_owned(), message: error.to_string() })?;
        let mut record = Vec::with_capacity(event.len() + 16);
        let framed = RecordWriter::new(&mut record).write(&event);
        framed.map_err(ReportError::io("write", self.file.path()))?;
        self.file.push(&record)
    }
}

impl Drop for TensorBoard {
    fn drop(&mut self) {
        // Callers who want to know of a failure call `flush` themselves.
        let _ = self.file.flush();
    }
}

/// The name of this machine, fit for a file name.
fn host_name() -> String {
    machine::host_name()
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() || "-._".contains(letter) { letter } else { '-' })
        .collect()
}

#[cfg(test)]
#[path = "tensorboard_tests.rs"]
mod tests;
