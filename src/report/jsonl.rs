//! `log.jsonl`: one JSON object per line, one line per logged step.
//!
//! Numbers that JSON does not have (NaN, ±∞) are written as `null`, so every line is valid JSON.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::append::Append;
use super::{ReportError, write_atomically};
use crate::files::Durability;

/// A log of which every line is whole.
#[derive(Debug)]
pub struct JsonLines {
    file: Append,
}

impl JsonLines {
    /// Opens the log at `path` for a run that has done `done` steps; the file is created if it is missing.
    ///
    /// An earlier start may have logged further than the checkpoint from which the run goes on. Lines whose `step` is
    /// greater than `done` are removed, so that every step is there once, and so is a last line torn by a kill. The
    /// file is rewritten atomically and synced, and only if there is something to remove.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn resume(path: &Path, done: u64) -> Result<JsonLines, ReportError> {
        match fs::read(path) {
            Ok(bytes) => {
                let kept = keep(&bytes, done);
                if kept != bytes {
                    // A power failure must not cost the log of all the steps before.
                    write_atomically(path, Durability::PowerFailure, |file| {
                        file.write_all(&kept).map_err(ReportError::io("write", path))
                    })?;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => super::atomic::create_parent(path)?,
            Err(error) => return Err(ReportError::io("read", path)(error)),
        }
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(ReportError::io("open", path))?;
        Ok(JsonLines { file: Append::new(path, file) })
    }

    /// Opens an empty log at `path`, whatever was there before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn create(path: &Path) -> Result<JsonLines, ReportError> {
        write_atomically(path, Durability::PowerFailure, |_| Ok(()))?;
        JsonLines::resume(path, 0)
    }

    /// Appends `record`, a struct or map with a field `step`, as one line, and hands it to the system.
    ///
    /// # Errors
    /// The record is not expressible as JSON (a map whose keys are not strings), or the file cannot be written. In the latter case
    /// the line waits and goes out with the next one.
    pub fn write(&mut self, record: &impl Serialize) -> Result<(), ReportError> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| ReportError::Encode { path: self.file.path().to_owned(), message: error.to_string() })?;
        line.push(b'\n');
        self.file.push(&line)?;
        self.file.flush()
    }
}

/// The lines that stay: whole, valid, and not beyond the step `done`.
fn keep(bytes: &[u8], done: u64) -> Vec<u8> {
    let stays = |line: &&[u8]| {
        line.ends_with(b"\n")
            && serde_json::from_slice::<Value>(line)
                .is_ok_and(|record| record.get("step").and_then(Value::as_u64).is_none_or(|step| step <= done))
    };
    bytes.split_inclusive(|&byte| byte == b'\n').filter(stays).collect::<Vec<_>>().concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Record {
        step: u64,
        loss: f64,
        grad_norm: f32,
    }

    fn steps(path: &Path) -> Vec<u64> {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap()).collect()
    }

    fn write(log: &mut JsonLines, range: std::ops::RangeInclusive<u64>) {
        for step in range {
            log.write(&Record { step, loss: 0.5, grad_norm: 2.0 }).unwrap();
        }
    }

    #[test]
    fn a_line_per_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/log.jsonl");
        let mut log = JsonLines::resume(&path, 0).unwrap();
        write(&mut log, 1..=2);
        // Lines are in the file at once, before the log is closed.
        let line = |step| format!("{{\"step\":{step},\"loss\":0.5,\"grad_norm\":2.0}}\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), line(1) + &line(2));
    }

    #[test]
    fn numbers_json_does_not_have_are_null() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let mut log = JsonLines::create(&path).unwrap();
        log.write(&Record { step: 1, loss: f64::NAN, grad_norm: f32::INFINITY }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1,\"loss\":null,\"grad_norm\":null}\n");
    }

    #[test]
    fn a_resume_goes_on_after_its_step() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        write(&mut JsonLines::create(&path).unwrap(), 1..=9);
        write(&mut JsonLines::resume(&path, 6).unwrap(), 7..=8);
        assert_eq!(steps(&path), [1, 2, 3, 4, 5, 6, 7, 8]);
        // Nothing to remove: the file is not touched.
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        drop(JsonLines::resume(&path, 8).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
        assert_eq!(steps(&path), [1, 2, 3, 4, 5, 6, 7, 8]);
        drop(JsonLines::resume(&path, 0).unwrap());
        assert!(steps(&path).is_empty());
    }

    #[test]
    fn a_log_torn_at_any_byte_resumes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        write(&mut JsonLines::create(&path).unwrap(), 1..=3);
        let whole = fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let lines = whole[..length].iter().filter(|&&byte| byte == b'\n').count() as u64;
            write(&mut JsonLines::resume(&path, 3).unwrap(), 4..=4);
            assert_eq!(steps(&path), (1..=lines).chain([4]).collect::<Vec<_>>(), "torn at {length}");
        }
    }

    #[test]
    fn lines_without_a_step_stay_and_garbage_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        fs::write(&path, b"{\"note\":1}\n{\"step\":2}\n\0\0\xff\n{\"step\":3}\n").unwrap();
        drop(JsonLines::resume(&path, 2).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"note\":1}\n{\"step\":2}\n");
    }

    #[test]
    fn create_empties_and_a_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        write(&mut JsonLines::create(&path).unwrap(), 1..=3);
        drop(JsonLines::create(&path).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"");
        let error = JsonLines::resume(folder.path(), 0).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot read `{}`: ", folder.path().display())), "{error}");
        let error =
            JsonLines::create(&path).unwrap().write(&std::collections::BTreeMap::from([((1, 2), 3)])).unwrap_err();
        assert!(matches!(error, ReportError::Encode { .. }), "{error}");
    }
}
