//! A growing file whose entries stay whole when the disk fails for a while.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::ReportError;

/// Entries that could not be written are kept up to this many bytes.
const BACKLOG: usize = 32 << 20;

/// An append-only file. Bytes leave the buffer only when the system has taken them, so that after a failed write the
/// next one goes on at the very byte where the last one stopped: no entry is torn, none is written twice.
#[derive(Debug)]
pub(super) struct Append<W: Write = File> {
    path: PathBuf,
    file: W,
    pending: Vec<u8>,
}

impl<W: Write> Append<W> {
    pub fn new(path: &Path, file: W) -> Append<W> {
        Append { path: path.to_owned(), file, pending: Vec::new() }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes wait to be written.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Adds one entry to the buffer.
    ///
    /// # Errors
    /// Too much is waiting already, and the system still does not take it; the entry is dropped.
    pub fn push(&mut self, entry: &[u8]) -> Result<(), ReportError> {
        let is_full = |pending: &[u8]| !pending.is_empty() && pending.len() + entry.len() > BACKLOG;
        if is_full(&self.pending) && self.flush().is_err() && is_full(&self.pending) {
            return Err(ReportError::Backlog { path: self.path.clone() });
        }
        self.pending.extend_from_slice(entry);
        Ok(())
    }

    /// Hands the buffer to the system.
    ///
    /// # Errors
    /// The system takes only a part, or nothing; the rest waits for the next call.
    pub fn flush(&mut self) -> Result<(), ReportError> {
        let mut done = 0;
        let outcome = loop {
            if done == self.pending.len() {
                break self.file.flush();
            }
            match self.file.write(&self.pending[done..]) {
                Ok(0) => break Err(ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.pending.drain(..done);
        outcome.map_err(ReportError::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// Takes what it is given a few bytes at a time, up to its room.
    struct Disk {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(3).min(self.room);
            if n == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            self.room -= n;
            self.taken.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_tears_no_entry() {
        let mut file = Append::new(Path::new("log"), Disk { taken: Vec::new(), room: 8 });
        file.push(b"first\n").unwrap();
        file.flush().unwrap();
        file.push(b"second\n").unwrap();
        assert!(matches!(file.flush(), Err(ReportError::Io { action: "write", .. })));
        assert_eq!(file.file.taken, b"first\nse");
        file.push(b"third\n").unwrap();
        assert!(file.flush().is_err());
        file.file.room = 100;
        file.flush().unwrap();
        assert_eq!(file.file.taken, b"first\nsecond\nthird\n");
        assert_eq!(file.pending(), 0);
    }

    #[test]
    fn the_backlog_is_bounded() {
        let mut file = Append::new(Path::new("log"), Disk { taken: Vec::new(), room: 0 });
        let entry = vec![7; BACKLOG / 2];
        file.push(&entry).unwrap();
        file.push(&entry).unwrap();
        let error = file.push(&[1]).unwrap_err();
        assert_eq!(error.to_string(), "`log` could not be written for so long that new entries are dropped");
        assert_eq!(file.pending(), BACKLOG);
        // When there is room again, what waited goes first.
        file.file.room = usize::MAX;
        file.push(&[1]).unwrap();
        file.flush().unwrap();
        assert_eq!((file.pending(), file.file.taken.len()), (0, BACKLOG + 1));
    }
}
