//! The program is killed, or an operation fails, at every single file operation of a save.

use super::*;
use crate::checkpoint::io::{Disk, Io};
use crate::checkpoint::stream::{Writer, set_direct};
use sha2::Digest;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Mutex;

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    /// It fails; all later ones work. The program goes on and tidies up.
    Error(ErrorKind),
    /// It is not done, or done in half, and nothing is done after it.
    Kill,
    /// The process kills itself.
    Sigkill,
    /// As `Kill`, and the machine loses power: what was written but not fsynced is gone.
    PowerLoss,
}

/// The file system until the k-th operation.
pub(super) struct Faulty {
    at: usize,
    fault: Fault,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    operations: Vec<String>,
    /// Files with bytes that no fsync has covered, and the length that is safe.
    unsynced: BTreeMap<PathBuf, u64>,
}

impl Faulty {
    pub(super) fn new(at: usize, fault: Fault) -> Arc<Faulty> {
        Arc::new(Faulty { at, fault, state: Mutex::new(State::default()) })
    }

    /// Runs an operation, or what is left of it; `half` is its partial effect.
    fn step<T>(
        &self,
        name: &str,
        path: &Path,
        half: impl FnOnce(),
        whole: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.state.lock().unwrap();
        let index = state.operations.len();
        state.operations.push(format!("{name} {}", path.file_name().unwrap().to_string_lossy()));
        let dead = match self.fault {
            Fault::Error(kind) if index == self.at => {
                half();
                return Err(kind.into());
            }
            Fault::Sigkill if index == self.at => {
                half();
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
                loop {
                    std::thread::park(); // until the signal has come
                }
            }
            Fault::Error(_) | Fault::Sigkill => false,
            Fault::Kill | Fault::PowerLoss => index >= self.at,
        };
        if dead {
            if index == self.at {
                half();
                if self.fault == Fault::PowerLoss {
                    for (path, length) in std::mem::take(&mut state.unsynced) {
                        if let Ok(file) = fs::OpenOptions::new().write(true).open(path) {
                            file.set_len(length).unwrap();
                        }
                    }
                }
            }
            return Err(io::Error::other("killed"));
        }
        whole()
    }

    pub(super) fn operations(&self) -> Vec<String> {
        self.state.lock().unwrap().operations.clone()
    }
}

impl Io for Faulty {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step("create_dir", path, || (), || Disk.create_dir(path))
    }
    fn create_file(&self, path: &Path) -> io::Result<File> {
        let file = self.step("create_file", path, || (), || Disk.create_file(path))?;
        self.state.lock().unwrap().unsynced.insert(path.into(), 0);
        Ok(file)
    }
    fn write(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut other = file.try_clone()?;
        let half = || Disk.write(&mut other, path, &bytes[..bytes.len() / 2]).unwrap();
        self.step("write", path, half, || Disk.write(file, path, bytes))
    }
    fn sync_file(&self, file: &File, path: &Path) -> io::Result<()> {
        self.step("sync_file", path, || (), || Disk.sync_file(file, path))?;
        self.state.lock().unwrap().unsynced.remove(path);
        Ok(())
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step("sync_dir", path, || (), || Disk.sync_dir(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("rename", from, || (), || Disk.rename(from, to))
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.step("exchange", a, || (), || Disk.exchange(a, b))
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step("remove_file", path, || (), || Disk.remove_file(path))
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step("remove_dir", path, || (), || Disk.remove_dir(path))
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        Disk.free_bytes(path)
    }
}

/// Saves `step` through a faulty disk, keeping one checkpoint; whether it was reported as saved, and the operations.
fn save_faulty(dir: &Path, step: u64, at: usize, fault: Fault) -> (bool, Vec<String>) {
    let io = Faulty::new(at, fault);
    let config = CheckpointConfig { keep: 1, ..Default::default() };
    let mut saver = Saver::with_io(io.clone(), dir, &config, None);
    saver.save(snapshot(&layout(), step)).unwrap();
    let report = saver.wait().unwrap();
    (report.result.is_ok(), io.operations())
}

pub(super) fn newest(dir: &Path) -> Newest {
    load_newest(dir, Some(&layout()), Want::All).unwrap().expect("a checkpoint")
}

/// Every operation of a save of `step` over an existing checkpoint of step 1, with each fault in turn.
fn at_every_operation(step: u64, check: impl Fn(&Path, bool, &str)) {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 1));
    let (ok, operations) = save_faulty(tmp.path(), step, usize::MAX, Fault::Kill);
    assert!(ok && operations.len() >= 12, "{operations:?}");
    for fault in [
        Fault::Kill,
        Fault::PowerLoss,
        Fault::Error(ErrorKind::StorageFull),
        Fault::Error(ErrorKind::ReadOnlyFilesystem),
    ] {
        for (at, operation) in operations.iter().enumerate() {
            let tmp = tempfile::tempdir().unwrap();
            save(tmp.path(), &snapshot(&layout(), 1));
            let (ok, _) = save_faulty(tmp.path(), step, at, fault);
            check(tmp.path(), ok, &format!("{fault:?} at {at}: {operation}"));
            // The next start tidies up, goes on, and its save works.
            let mut saver = Saver::new(tmp.path(), &CheckpointConfig { keep: 1, ..Default::default() }).unwrap();
            saver.save(snapshot(&layout(), 3)).unwrap();
            saver.wait().unwrap().result.unwrap();
            assert_eq!(newest(tmp.path()).snapshot.meta.step, 3);
            assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1, "{fault:?} at {operation}");
        }
    }
}

#[test]
fn a_fault_anywhere_leaves_the_old_checkpoint_or_the_new_one() {
    at_every_operation(2, |dir, ok, fault| {
        let found = newest(dir);
        assert!(found.skipped.is_empty(), "{fault}: {}", found.skipped[0]);
        let step = found.snapshot.meta.step;
        assert_same(&found.snapshot, &snapshot(&layout(), step));
        assert!(step == 2 || (step == 1 && !ok), "{fault}: step {step}, reported {ok}");
        if fault.starts_with("Error") && !ok {
            let temporary =
                fs::read_dir(dir).unwrap().filter(|e| e.as_ref().unwrap().path().to_string_lossy().contains(".tmp-"));
            assert_eq!(temporary.count(), 0, "{fault}: the failed save left its directory");
        }
    });
}

#[test]
fn a_fault_anywhere_while_a_step_is_saved_again_leaves_that_step() {
    at_every_operation(1, |dir, _, fault| {
        let found = newest(dir);
        assert!(found.skipped.is_empty() && found.snapshot.meta.step == 1, "{fault}");
        assert_same(&found.snapshot, &snapshot(&layout(), 1));
    });
}

#[test]
fn operations_are_in_the_order_that_survives_power_loss() {
    let tmp = tempfile::tempdir().unwrap();
    let (_, operations) = save_faulty(tmp.path(), 2, usize::MAX, Fault::Kill);
    let short: Vec<String> = operations.iter().map(|o| o.split(".tmp-").next().unwrap().to_string()).collect();
    assert_eq!(
        short,
        [
            "create_dir step-00000002",
            "create_file shard-00000-of-00001.safetensors",
            "write shard-00000-of-00001.safetensors",
            "sync_file shard-00000-of-00001.safetensors",
            "create_file manifest.json",
            "write manifest.json",
            "sync_file manifest.json",
            "sync_dir step-00000002",
            "rename step-00000002",
            &format!("sync_dir {}", tmp.path().file_name().unwrap().to_string_lossy()),
        ]
    );
}

/// Several chunks and an end that is no whole block, written to a disk that refuses one of the writes as direct ones are refused, after it
/// has taken half of it.
#[test]
fn a_disk_that_is_not_written_directly_gets_the_same_bytes() {
    let tmp = tempfile::tempdir().unwrap();
    let is_direct = set_direct(&tempfile::tempfile_in(tmp.path()).unwrap(), true).is_ok();
    if !is_direct {
        // Past the test harness, which keeps what a test that passes has said.
        let what = "writes past the page cache, which the file system of temporary files has not";
        io::Write::write_fmt(&mut io::stderr(), format_args!("NOT TESTED: {what}\n")).unwrap();
    }
    let values: Vec<f32> = (0..700_001).map(|i| i as f32).collect();
    let text = b"not a multiple of anything";
    let due: Vec<u8> = text.iter().copied().chain(values.iter().flat_map(|v| v.to_le_bytes())).collect();
    for at in [usize::MAX, 1, 2, 3] {
        let io = Faulty::new(at, Fault::Error(ErrorKind::InvalidInput));
        let path = tmp.path().join(format!("refuses-{at}"));
        let mut file = Writer::create(&*io, &path).unwrap();
        let written = file.write(text).and_then(|()| file.write_f32(&values)).and_then(|()| file.finish());
        // Such an error is real where a write is an ordinary one, as the last always is.
        if at == 3 || (at < 3 && !is_direct) {
            assert!(matches!(written, Err(CheckpointError::Io { .. })), "{written:?}");
            continue;
        }
        let (bytes, sha256) = written.unwrap();
        assert!(fs::read(&path).unwrap() == due, "refused at {at}");
        assert_eq!((bytes, sha256), (due.len() as u64, crate::files::hex(&sha2::Sha256::digest(&due))));
        assert_eq!(io.operations().len(), 5 + usize::from(at < 3), "{:?}", io.operations());
    }
}

#[test]
fn a_failed_save_is_an_alarm_and_the_next_one_works() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("checkpoints");
    let mut saver = Saver::new(&dir, &CheckpointConfig::default()).unwrap();
    fs::remove_dir(&dir).unwrap();
    fs::write(&dir, b"in the way").unwrap();
    saver.save(snapshot(&layout(), 1)).unwrap();
    let report = saver.wait().unwrap();
    let message = report.result.unwrap_err().to_string();
    assert!(report.step == 1 && message.contains("checkpoints"), "{message}");
    fs::remove_file(&dir).unwrap();
    fs::create_dir(&dir).unwrap();
    saver.save(snapshot(&layout(), 2)).unwrap();
    saver.wait().unwrap().result.unwrap();
    assert_eq!(newest(&dir).snapshot.meta.step, 2);
}

#[test]
fn a_save_that_cannot_fit_writes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(tmp.path(), &CheckpointConfig::default()).unwrap();
    // A layout far larger than the disk, with buffers that pretend nothing: the space is checked after the buffers.
    let huge = Arc::new(Layout::packed([("a", vec![1usize << 50])]).unwrap());
    let pretended = Buffers { range: 0..huge.elements(), ..Buffers::default() };
    saver.save(Snapshot::new(Meta::default(), huge.clone(), pretended)).unwrap();
    assert!(matches!(saver.wait().unwrap().result, Err(CheckpointError::Snapshot { group: "params", .. })));
    saver.save(Snapshot::new(Meta::default(), huge.clone(), Buffers::default())).unwrap();
    assert!(matches!(saver.wait().unwrap().result, Err(CheckpointError::Share { .. })));
    let e = check_room(tmp.path(), &huge, 0).unwrap_err();
    assert!(matches!(e, CheckpointError::NoRoom { .. }) && e.to_string().contains("16384.00 TiB"), "{e}");
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    assert!(check_room(tmp.path(), &huge, u64::MAX).is_ok(), "what is to be freed counts");
}
