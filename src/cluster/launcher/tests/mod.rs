//! Ranks that are small shell commands, on one node and on several.

mod nodes;
mod one_node;

use super::ends::{Asked, How, Place, RankEnd};
use super::*;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

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

/// Ranks that run a shell script in which `$DIR` is a folder of the test's.
struct Script {
    dir: tempfile::TempDir,
    job: Job,
    screen: Screen,
}

/// A launcher at work.
struct Running {
    doorbell: Doorbell,
    launcher: JoinHandle<Result<Outcome, LaunchError>>,
    screen: Screen,
}

impl Script {
    fn new(ranks: usize, script: &str) -> Script {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("DIR={}; {script}", dir.path().display());
        let command = Command { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] };
        let job = Job {
            command,
            ranks,
            node: 0,
            nodes: 1,
            meet: None,
            interface: None,
            patience: PATIENCE,
            max_restarts: 0,
            min_ranks: None,
            log_dir: None,
            // What a test does not wait for is as good as never.
            timing: Timing { settle: Duration::from_millis(300), grace: 10 * PATIENCE, silence: PATIENCE },
            codes: Codes { meaning, peer_lost: 6, of_error: |_| 8 },
        };
        Script { dir, job, screen: Screen::default() }
    }

    /// The same ranks as a node of several.
    fn node(&self, node: usize, nodes: usize, port: u16) -> Script {
        let dir = tempfile::tempdir().unwrap();
        let meet = Some(("127.0.0.1".to_string(), port));
        Script { dir, job: Job { node, nodes, meet, ..self.job.clone() }, screen: Screen::default() }
    }

    fn start(&self) -> Running {
        let mut inbox = Inbox::new();
        let doorbell = inbox.doorbell();
        let (job, screen) = (self.job.clone(), self.screen.clone());
        let voice = screen.voice();
        let launcher = std::thread::spawn(move || launch(&job, &is_allowed, &voice, &mut inbox));
        Running { doorbell, launcher, screen }
    }

    fn run(&self) -> Result<Outcome, LaunchError> {
        self.start().end()
    }

    /// Exit code and message.
    fn ended(&self) -> (u8, String) {
        self.start().ended()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The content of a file that a rank writes under another name and then moves here.
    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}: {}", self.screen.stderr()))
    }

    /// Waits until all of these are there.
    fn until(&self, names: &[&str]) {
        until(&format!("{names:?}"), || names.iter().all(|name| self.path(name).exists()));
    }
}

impl Running {
    fn end(self) -> Result<Outcome, LaunchError> {
        until("the launcher's end", || self.launcher.is_finished());
        self.launcher.join().unwrap()
    }

    fn ended(self) -> (u8, String) {
        let screen = self.screen.clone();
        let outcome = self.end().unwrap_or_else(|e| panic!("{e}: {}", screen.stderr()));
        (outcome.code, outcome.message.unwrap_or_default())
    }
}

/// Which numbers of ranks can share the work in these tests.
fn is_allowed(world: usize) -> bool {
    world.is_power_of_two() || world == 3
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}: waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process is there and no zombie.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}
