//! What the tests of the binary share: a small data set, a small config, the program itself.

#![allow(dead_code)] // each test file uses a part of it

pub mod processes;
pub mod ranks;

use ddpm_dist::checkpoint::{self, GROUPS, Snapshot, Want};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Twelve colour images of 8×8 pixels, a model of two levels, and everything random switched on.
const CONFIG: &str = r#"
[data]
path = "pictures"
size = 8
flip = true

[model]
channels = [8, 16]
blocks = 1
attention_levels = [1]
groups = 4
dropout = 0.1

[diffusion]
timesteps = 100

[train]
steps = 20
batch = 4
seed = 11

[optim]
lr = 2e-3
warmup_steps = 4

[ema]
decay = 0.9

[checkpoint]
every = 5
keep = 10

[sample]
sampler = "ddim"
steps = 4
every = 0
count = 0
batch = 4

[log]
every = 1
"#;

/// Says that something is not tested here, and why: past the harness, which keeps what a test prints that passes.
pub fn not_tested(what: &str) {
    // Nothing could be done about it.
    let _ = writeln!(std::io::stderr(), "NOT TESTED: {what}");
}

/// A `.npy` file of bytes.
pub fn npy(shape: &[usize], pixels: &[u8]) -> Vec<u8> {
    let shape: String = shape.iter().map(|d| format!("{d}, ")).collect();
    let header = format!("{:<117}\n", format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({shape}), }}"));
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(pixels);
    bytes
}

/// A folder with the config and the pictures, in which runs are made.
pub struct Project {
    dir: tempfile::TempDir,
}

/// How the program ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code.
    pub code: i32,
    /// What it printed for people.
    pub stderr: String,
    /// What it printed for programs.
    pub stdout: String,
}

impl Project {
    pub fn new() -> Project {
        let project = Project { dir: tempfile::tempdir().unwrap() };
        project.write("config.toml", CONFIG);
        std::fs::create_dir(project.path("pictures")).unwrap();
        for i in 0..12 {
            project.picture(&format!("pictures/{i:02}.png"), [8, 8], i);
        }
        project
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    pub fn read(&self, name: impl AsRef<Path>) -> Vec<u8> {
        let path = self.path(name);
        std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// A colour PNG with content of its own.
    pub fn picture(&self, name: &str, [height, width]: [u32; 2], seed: u32) {
        let colour = |x: u32, y: u32| image::Rgb([(seed * 20 + x * 8) as u8, (y * 30) as u8, (seed * x * y) as u8]);
        image::RgbImage::from_fn(width, height, colour).save(self.path(name)).unwrap();
    }

    /// The program, in this folder, with a cache folder of its own.
    pub fn program(&self) -> Command {
        self.program_by(env!("CARGO_BIN_EXE_ddpm-dist"))
    }

    /// Another program that starts it.
    pub fn program_by(&self, starter: &str) -> Command {
        let mut command = Command::new(starter);
        command.current_dir(self.dir.path()).env("XDG_CACHE_HOME", self.path("cache")).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        let output = self.program().args(arguments).output().unwrap();
        Ended {
            code: output.status.code().unwrap_or_else(|| panic!("{arguments:?} was killed: {output:?}")),
            stderr: String::from_utf8(output.stderr).unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
        }
    }

    /// Runs it and expects it to end well.
    pub fn done(&self, arguments: &[&str]) -> Ended {
        let ended = self.run(arguments);
        assert_eq!(ended.code, 0, "{arguments:?}: {}", ended.stderr);
        ended
    }

    /// Trains with these arguments and expects a refusal that leaves no run behind.
    pub fn train_refused(&self, more: &[&str], code: i32, words: &[&str]) {
        self.train("run", more).refused(code, words);
        assert!(!self.path("run").exists(), "{more:?} left a run directory");
    }

    /// Trains in `run_dir`.
    pub fn train(&self, run_dir: &str, more: &[&str]) -> Ended {
        self.run(&train_arguments(run_dir, more))
    }

    /// Trains and expects it to end well.
    pub fn trained(&self, run_dir: &str, more: &[&str]) -> Ended {
        self.done(&train_arguments(run_dir, more))
    }

    /// Begins to train for longer than anyone waits, with checkpoints every five steps.
    pub fn train_on(&self, run_dir: &str, more: &[&str]) -> Running {
        let steps = ["--set", "train.steps=10000000"];
        let mut command = self.program();
        command.args(train_arguments(run_dir, &[&steps, more].concat()));
        self.start(run_dir, command)
    }

    /// Starts a command; what it prints for people goes to `name.stderr`.
    pub fn start(&self, name: &str, mut command: Command) -> Running {
        let stderr = self.path(format!("{name}.stderr"));
        command.stdout(Stdio::null()).stderr(std::fs::File::create(&stderr).unwrap());
        Running { child: command.spawn().unwrap(), stderr }
    }

    /// Steps of the checkpoints of a run, oldest first.
    pub fn checkpoints(&self, run_dir: &str) -> Vec<u64> {
        checkpoint::list(&self.path(run_dir).join("checkpoints")).unwrap().into_iter().map(|(s, _)| s).collect()
    }

    pub fn checkpoint(&self, run_dir: &str, step: u64) -> PathBuf {
        self.path(run_dir).join("checkpoints").join(checkpoint::write::dir_name(step))
    }

    /// SHA-256 of a checkpoint's shards, by its manifest, after the files were compared with it.
    pub fn hashes(&self, run_dir: &str, step: u64) -> Vec<String> {
        let dir = self.checkpoint(run_dir, step);
        let manifest = checkpoint::verify(&dir).unwrap();
        assert_eq!(manifest.meta.step, step);
        manifest.files.into_iter().map(|f| f.sha256).collect()
    }

    /// Weights, moments and averages of a checkpoint, as bits.
    pub fn state(&self, run_dir: &str, step: u64) -> Vec<Vec<u32>> {
        let snapshot: Snapshot = checkpoint::load(&self.checkpoint(run_dir, step), None, Want::All).unwrap();
        GROUPS.map(|group| snapshot.group(group).iter().map(|x| x.to_bits()).collect()).to_vec()
    }

    /// The lines of `log.jsonl`.
    pub fn log(&self, run_dir: &str) -> Vec<serde_json::Value> {
        let text = String::from_utf8(self.read(format!("{run_dir}/log.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Lines of a log that may be half written, or not be there yet.
    pub fn log_lines(&self, run_dir: &str) -> usize {
        let log = std::fs::read(self.path(run_dir).join("log.jsonl")).unwrap_or_default();
        log.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Waits until a run has logged so many steps.
    pub fn until_steps(&self, running: &mut Running, run_dir: &str, steps: usize) {
        running.until(&format!("{steps} steps"), || self.log_lines(run_dir) >= steps);
    }

    /// What each step measured, without what depends on the clock.
    pub fn measured(&self, run_dir: &str) -> Vec<serde_json::Value> {
        let mut lines = self.log(run_dir);
        for line in &mut lines {
            line.as_object_mut().unwrap().remove("images_per_second").unwrap();
        }
        lines
    }

    /// Exchanges two paths at once: nobody sees either missing, and makes it anew.
    pub fn exchange(&self, one: &str, other: &str) {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, self.path(one), CWD, self.path(other), RenameFlags::EXCHANGE).unwrap();
    }

    /// Copies a folder, a run directory for example, to a name that is not there yet.
    pub fn copy(&self, from: &str, to: &str) {
        copy(&self.path(from), &self.path(to));
    }

    /// Names and hashes of everything in a folder, to see that nothing changed. Who locked it last may change.
    pub fn content(&self, folder: impl AsRef<Path>) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        let mut left = vec![self.path(folder)];
        while let Some(dir) = left.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    left.push(path);
                } else if !path.ends_with("run.lock") {
                    let hash = format!("{:x?}", Sha256::digest(std::fs::read(&path).unwrap()));
                    found.push((path, hash));
                }
            }
        }
        found.sort();
        found
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { std::fs::copy(&path, &target).map(drop).unwrap() }
    }
}

fn train_arguments<'a>(run_dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "config.toml", "--run-dir", run_dir, "--threads", "2"], more].concat()
}

impl Ended {
    /// Expects an end with `code`, one message, which holds every one of `words`, and no panic.
    pub fn refused(&self, code: i32, words: &[&str]) {
        let Ended { stderr, .. } = self;
        assert_eq!(self.code, code, "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        assert_eq!(stderr.matches("ddpm-dist: ").count(), 1, "one message: {stderr}");
        let message = stderr.split("ddpm-dist: ").nth(1).unwrap();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }

    /// Expects the command line to be refused.
    pub fn refused_by_parser(&self, words: &[&str]) {
        assert_eq!(self.code, 2, "{}", self.stderr);
        assert!(words.iter().all(|word| self.stderr.contains(word)), "{}", self.stderr);
    }

    /// Expects an alarm with these words.
    pub fn warned(&self, words: &[&str]) {
        let is_it = |line: &str| line.starts_with("warning: ") && words.iter().all(|word| line.contains(word));
        assert!(self.stderr.lines().any(is_it), "no warning with {words:?}: {}", self.stderr);
    }
}

/// A process that goes on; what it says for people is in a file.
pub struct Running {
    pub child: Child,
    stderr: PathBuf,
}

impl Running {
    pub fn stderr(&self) -> String {
        self.words()()
    }

    /// Waits until `condition` holds.
    pub fn until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{what}: the run ended ({status}): {}", self.stderr());
            }
            assert!(start.elapsed() < PATIENCE, "{what}: waited in vain: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What reads what it has said, while something else has it.
    pub fn words(&self) -> impl Fn() -> String + use<> {
        let stderr = self.stderr.clone();
        move || std::fs::read_to_string(&stderr).unwrap()
    }

    /// Waits until it has said this.
    pub fn until_said(&mut self, words: &str) {
        let said = self.words();
        self.until(&format!("{words:?}"), || said().contains(words));
    }

    /// Exit code, `None` if a signal ended it.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self.stderr());
            }
            assert!(start.elapsed() < PATIENCE, "the run does not end: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    /// A test that fails leaves no process behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
