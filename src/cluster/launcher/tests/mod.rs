//! Ranks that are small shell commands, on one node and on several.

use super::ends::{Asked, How, Place, RankEnd};
use super::*;
use std::io::Write;
use std::sync::{Arc, Mutex};

/// Longer than anything here takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What a launcher and its ranks print.
#[derive(Clone, Default)]
pub(super) struct Screen {
    stdout: Arc<Mutex<Vec<u8>>>,
    stderr: Arc<Mutex<Vec<u8>>>,
}

struct Into(Arc<Mutex<Vec<u8>>>);

impl Write for Into {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Screen {
    pub(super) fn voice(&self) -> Voice {
        let into = |bytes: &Arc<Mutex<Vec<u8>>>| Arc::new(Mutex::new(Into(Arc::clone(bytes))));
        Voice::to(into(&self.stdout), into(&self.stderr))
    }

    pub(super) fn stdout(&self) -> Vec<u8> {
        self.stdout.lock().unwrap().clone()
    }

    pub(super) fn stderr_bytes(&self) -> Vec<u8> {
        self.stderr.lock().unwrap().clone()
    }

    pub(super) fn stderr(&self) -> String {
        String::from_utf8(self.stderr_bytes()).unwrap()
    }
}

/// The exit codes of the program, as far as the tests need them.
pub(super) fn meaning(code: i32) -> Meaning {
    match code {
        0 => Meaning::Done,
        2 => Meaning::Final("usage"),
        3 => Meaning::Final("bad data"),
        5 => Meaning::Final("diverged"),
        6 => Meaning::PeerLost,
        75 => Meaning::Left,
        _ => Meaning::Failed("failed"),
    }
}

/// The end of a rank of node 0, place by rank, that was not told to end.
pub(super) fn end(rank: usize, how: How, at: f64) -> RankEnd {
    let place = Place { node: 0, slot: rank };
    RankEnd { rank, place, host: "here".into(), how, asked: Asked::No, at, message: None }
}
