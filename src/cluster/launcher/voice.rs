//! What the launcher says, and what it passes on of its ranks.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// A line longer than this is passed on in pieces.
const LONGEST_LINE: u64 = 64 << 10;

type Shared = Arc<Mutex<dyn Write + Send>>;

/// Where the launcher and its ranks are heard. Clones share it; lines of several threads do not mix.
#[derive(Clone)]
pub struct Voice {
    stdout: Shared,
    stderr: Shared,
    is_quiet: bool,
    /// Whether ranks can write there without help.
    is_own: bool,
}

impl fmt::Debug for Voice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Voice").field("is_quiet", &self.is_quiet).field("is_own", &self.is_own).finish()
    }
}

/// Where a rank's output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// As it comes.
    Stdout,
    /// As it comes.
    Stderr,
    /// To stderr, line by line, each with this before it.
    Prefixed(String),
}

impl Voice {
    /// The stdout and stderr of this process. A quiet launcher says only what went wrong.
    pub fn of_this_process(is_quiet: bool) -> Voice {
        let (stdout, stderr) = (Arc::new(Mutex::new(io::stdout())), Arc::new(Mutex::new(io::stderr())));
        Voice { stdout, stderr, is_quiet, is_own: true }
    }

    /// Something else in place of stdout and stderr.
    pub fn to(stdout: Shared, stderr: Shared) -> Voice {
        Voice { stdout, stderr, is_quiet: false, is_own: false }
    }

    pub(super) fn is_own(&self) -> bool {
        self.is_own
    }

    /// Says what happens.
    pub(super) fn say(&self, text: &str) {
        if !self.is_quiet {
            self.alarm(text);
        }
    }

    /// Says what a person must know.
    pub(super) fn alarm(&self, text: &str) {
        put(&self.stderr, format!("launcher: {text}\n").as_bytes());
    }

    /// Passes a pipe on to its target, and to a file, until it ends; then the receiver's other side is gone.
    pub(super) fn pass_on(
        &self,
        pipe: impl Read + Send + 'static,
        target: Target,
        log: Option<File>,
    ) -> io::Result<Receiver<()>> {
        let (ended, end) = channel();
        let voice = self.clone();
        std::thread::Builder::new().name("output".into()).spawn(move || voice.copy(pipe, &target, log, ended))?;
        Ok(end)
    }

    fn copy(&self, pipe: impl Read, target: &Target, mut log: Option<File>, _ended: Sender<()>) {
        let mut pipe = BufReader::new(pipe);
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let read = match target {
                Target::Prefixed(_) => (&mut pipe).take(LONGEST_LINE).read_until(b'\n', &mut bytes),
                Target::Stdout | Target::Stderr => pipe.fill_buf().map(|ready| {
                    bytes.extend_from_slice(ready);
                    ready.len()
                }),
            };
            match read {
                Ok(0) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            if let Some(file) = &mut log
                && let Err(error) = file.write_all(&bytes)
            {
                self.alarm(&format!("a rank's log cannot be written and ends here: {error}"));
                log = None;
            }
            match target {
                Target::Prefixed(prefix) => {
                    let text = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
                    put(&self.stderr, &[prefix.as_bytes(), text, b"\n"].concat());
                }
                Target::Stdout | Target::Stderr => {
                    put(if *target == Target::Stdout { &self.stdout } else { &self.stderr }, &bytes);
                    pipe.consume(bytes.len());
                }
            }
        }
    }
}

/// A terminal or pipe that is gone is no reason for ranks to stop: they are read on, so that they do not block.
fn put(out: &Shared, bytes: &[u8]) {
    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::super::tests::{PATIENCE, Screen};
    use super::*;

    #[test]
    fn lines_get_their_prefix_and_results_stay_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        for (target, input, out, err) in [
            (Target::Stdout, &b"a\nb"[..], &b"a\nb"[..], &b""[..]),
            (Target::Stderr, b"a\rb\xff", b"", b"a\rb\xff"),
            (Target::Prefixed("[1] ".into()), b"a\n\nb\xff", b"", b"[1] a\n[1] \n[1] b\xff\n"),
            (Target::Prefixed("[1] ".into()), b"", b"", b""),
        ] {
            let screen = Screen::default();
            let path = dir.path().join("log");
            let log = File::create(&path).unwrap();
            let end = screen.voice().pass_on(io::Cursor::new(input.to_vec()), target, Some(log)).unwrap();
            assert!(end.recv_timeout(PATIENCE).is_err());
            assert_eq!((screen.stdout(), screen.stderr_bytes()), (out.to_vec(), err.to_vec()));
            assert_eq!(std::fs::read(&path).unwrap(), input);
        }
    }

    #[test]
    fn a_line_without_end_does_not_fill_the_memory() {
        let screen = Screen::default();
        let input = vec![b'x'; (LONGEST_LINE + 5) as usize];
        let end = screen.voice().pass_on(io::Cursor::new(input), Target::Prefixed("> ".into()), None).unwrap();
        assert_eq!(end.recv_timeout(PATIENCE), Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
        let lengths: Vec<usize> = screen.stderr().lines().map(str::len).collect();
        assert_eq!(lengths, [LONGEST_LINE as usize + 2, 7]);
    }
}
