//! Several ranks save together: threads, each with a saver and a connection of its own to a real store, and real files.

use super::faults::{Fault, Faulty, newest};
use super::*;
use crate::checkpoint::io::{Disk, Io};
use crate::rendezvous::store::Server;
use crate::rendezvous::testing::{client, server};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
pub(super) const LONG: Duration = Duration::from_secs(60);
/// Where someone is waited for in vain.
pub(super) const SHORT: Duration = Duration::from_millis(1500);

/// The savers of all ranks, and their store.
pub(super) struct Ranks {
    server: Server,
    savers: Vec<Saver>,
}

pub(super) fn team(port: u16, rank: usize, size: usize, patience: Duration) -> Team {
    Team { rank, size, store: client(port, "run/0/"), patience }
}

impl Ranks {
    pub fn new(dir: &Path, size: usize) -> Ranks {
        std::fs::create_dir_all(dir).unwrap();
        Ranks::with(dir, size, LONG, |_| Arc::new(Disk))
    }

    fn with(dir: &Path, size: usize, patience: Duration, io: impl Fn(usize) -> Arc<dyn Io>) -> Ranks {
        let server = server();
        let config = CheckpointConfig { keep: 100, ..Default::default() };
        let port = server.address().port();
        let saver = |rank| Saver::with_io(io(rank), dir, &config, Some(team(port, rank, size, patience)));
        let savers = (0..size).map(saver).collect();
        Ranks { server, savers }
    }

    /// The ranks that are not absent save their shares; their reports, after the slowest.
    fn save_without(&mut self, snapshot: &Snapshot, absent: &[usize]) -> Vec<SaveReport> {
        let size = self.savers.len();
        let present = |rank: &usize| !absent.contains(rank);
        for rank in (0..size).rev().filter(present) {
            self.savers[rank].save(share(snapshot, rank, size)).unwrap();
        }
        (0..size).filter(present).map(|rank| self.savers[rank].wait().unwrap()).collect()
    }

    pub fn save(&mut self, snapshot: &Snapshot) -> Vec<SaveReport> {
        self.save_without(snapshot, &[])
    }

    /// The saves work again, and the newest checkpoint is the one of `step`.
    fn works(&mut self, dir: &Path, step: u64) {
        self.save(&snapshot(&layout(), step)).into_iter().for_each(|report| drop(report.result.unwrap()));
        let found = newest(dir);
        assert!(found.skipped.is_empty());
        assert_same(&found.snapshot, &snapshot(&layout(), step));
    }
}

/// Every rank reports the same failure with these words, nothing temporary is left, and the newest checkpoint is that of step 1.
fn all_failed(dir: &Path, reports: Vec<SaveReport>, words: &[&str]) {
    let messages: Vec<String> = reports.into_iter().map(|report| report.result.unwrap_err().to_string()).collect();
    for message in &messages {
        assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        assert_eq!(message, &messages[0]);
    }
    old_one_stays(dir);
}

fn old_one_stays(dir: &Path) {
    let found = newest(dir);
    assert!(found.skipped.is_empty());
    assert_same(&found.snapshot, &snapshot(&layout(), 1));
    assert_eq!(names(dir), ["step-00000001"]);
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn any_number_of_ranks_saves_and_any_other_loads() {
    let saved = snapshot(&layout(), 3);
    for size in [1, 2, 3, 4, 8, 40] {
        let tmp = tempfile::tempdir().unwrap();
        let reports = Ranks::new(tmp.path(), size).save(&saved);
        let path = tmp.path().join("step-00000003");
        let manifest = verify(&path).unwrap();
        assert_eq!((manifest.files.len(), &manifest.meta), (size, &saved.meta));
        for report in reports {
            let done = report.result.unwrap();
            assert_eq!((report.step, &done.path, done.bytes), (3, &path, manifest.bytes()));
        }
        assert_eq!(names(tmp.path()), ["step-00000003"], "nothing temporary is left");
        // Whoever loads gets all of it; what each of another number of ranks then saves is its share of the same.
        let loaded = load(&path, Some(&layout()), Want::All).unwrap();
        assert_same(&loaded, &saved);
        for other in [1, 2, 8] {
            let tmp = tempfile::tempdir().unwrap();
            let again = load(&save_sharded(tmp.path(), &loaded, other), None, Want::All).unwrap();
            assert_same(&again, &saved);
        }
    }
}

#[test]
fn a_rank_holds_and_gets_back_buffers_for_its_share_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let (whole, layout) = (snapshot(&layout(), 3), layout());
    let mut ranks = Ranks::new(tmp.path(), 3);
    let given = |saver: &mut Saver| {
        let buffers = saver.buffers(&layout);
        (buffers.range.clone(), buffers.params.len())
    };
    for step in 3..6 {
        let mut whole = whole.clone();
        whole.meta.step = step;
        ranks.save(&whole).into_iter().for_each(|report| drop(report.result.unwrap()));
    }
    for (rank, saver) in ranks.savers.iter_mut().enumerate() {
        let (range, elements) = given(saver);
        assert_eq!((range.clone(), elements), (layout.shard(rank, 3), range.len()));
        let part = share(&whole, rank, 3);
        for t in layout.tensors() {
            let inside = range.start <= t.range().start && t.range().end <= range.end;
            let found = part.tensor(Group::Ema, &t.name).map(bits);
            assert_eq!(found, inside.then(|| bits(whole.tensor(Group::Ema, &t.name).unwrap())), "{}", t.name);
        }
    }
    // What is not the rank's share is refused, on all ranks.
    ranks.savers[0].save(share(&whole, 0, 3)).unwrap();
    ranks.savers[1].save(share(&whole, 2, 3)).unwrap();
    ranks.savers[2].save(share(&whole, 2, 3)).unwrap();
    for saver in &mut ranks.savers {
        let message = saver.wait().unwrap().result.unwrap_err().to_string();
        assert!(message.contains("rank 1") && message.contains("the share of this rank is"), "{message}");
    }
}

#[test]
fn a_rank_that_never_comes_is_named_by_the_deadline() {
    for absent in [0, 1, 2] {
        let tmp = tempfile::tempdir().unwrap();
        save(tmp.path(), &snapshot(&layout(), 1));
        let mut ranks = Ranks::with(tmp.path(), 3, SHORT, |_| Arc::new(Disk));
        let start = Instant::now();
        let reports = ranks.save_without(&snapshot(&layout(), 2), &[absent]);
        assert!(start.elapsed() < LONG / 2);
        all_failed(tmp.path(), reports, &[&format!("rank {absent} took no part in it within 1.5 s")]);
    }
}

#[test]
fn a_save_that_some_ranks_leave_out_harms_no_later_one() {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 1));
    let mut ranks = Ranks::with(tmp.path(), 2, SHORT, |_| Arc::new(Disk));
    let reports = ranks.save_without(&snapshot(&layout(), 2), &[1]);
    all_failed(tmp.path(), reports, &["rank 1 took no part"]);
    let reports = ranks.save_without(&snapshot(&layout(), 3), &[0]);
    all_failed(tmp.path(), reports, &["rank 0 took no part"]);
    ranks.works(tmp.path(), 4);
}

#[test]
fn a_rank_whose_disk_fails_anywhere_fails_the_save_for_all() {
    let size = 3;
    for rank in [0, 1, 2] {
        // What this rank does in a save that works.
        let tmp = tempfile::tempdir().unwrap();
        let watched = Faulty::new(usize::MAX, Fault::Kill);
        let io = |r| if r == rank { watched.clone() as Arc<dyn Io> } else { Arc::new(Disk) };
        Ranks::with(tmp.path(), size, LONG, io).works(tmp.path(), 2);
        let operations = watched.operations();
        assert_eq!(operations.len(), if rank == 0 { 10 } else { 4 }, "{operations:?}");
        // The last operation of rank 0 comes after the rename: the checkpoint is there, and only its name may not be safe.
        let last = operations.len() - usize::from(rank == 0);
        for kind in [ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem] {
            for at in 0..last {
                let tmp = tempfile::tempdir().unwrap();
                save(tmp.path(), &snapshot(&layout(), 1));
                let faulty = Faulty::new(at, Fault::Error(kind));
                let io = |r| if r == rank { faulty.clone() as Arc<dyn Io> } else { Arc::new(Disk) };
                let mut ranks = Ranks::with(tmp.path(), size, LONG, io);
                let reports = ranks.save(&snapshot(&layout(), 2));
                let (path, reason) = (tmp.path().to_string_lossy(), std::io::Error::from(kind).to_string());
                let host = crate::machine::host_name();
                let who = format!("rank {rank} on {host}: ");
                all_failed(tmp.path(), reports, &[&who, &path, &reason]);
                // The same step again, with the same savers: no answer to the first attempt is taken for one to the second.
                ranks.works(tmp.path(), 2);
            }
        }
    }
}

#[test]
fn a_shard_that_rank_0_does_not_see_is_not_committed() {
    /// Writes into a directory that only this rank has.
    struct Elsewhere(std::path::PathBuf);
    impl Elsewhere {
        fn away(&self, path: &Path) -> std::path::PathBuf {
            self.0.join(path.file_name().unwrap())
        }
    }
    impl Io for Elsewhere {
        fn create_file(&self, path: &Path) -> std::io::Result<std::fs::File> {
            Disk.create_file(&self.away(path))
        }
        fn create_dir(&self, path: &Path) -> std::io::Result<()> {
            Disk.create_dir(path)
        }
        fn write(&self, file: &mut std::fs::File, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
            Disk.write(file, path, bytes)
        }
        fn sync_file(&self, file: &std::fs::File, path: &Path) -> std::io::Result<()> {
            Disk.sync_file(file, path)
        }
        fn sync_dir(&self, path: &Path) -> std::io::Result<()> {
            Disk.sync_dir(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
            Disk.rename(from, to)
        }
        fn exchange(&self, a: &Path, b: &Path) -> std::io::Result<()> {
            Disk.exchange(a, b)
        }
        fn remove_file(&self, path: &Path) -> std::io::Result<()> {
            Disk.remove_file(path)
        }
        fn remove_dir(&self, path: &Path) -> std::io::Result<()> {
            Disk.remove_dir(path)
        }
        fn free_bytes(&self, path: &Path) -> std::io::Result<u64> {
            Disk.free_bytes(path)
        }
    }
    let (tmp, away) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(tmp.path(), &snapshot(&layout(), 1));
    let elsewhere = away.path().to_path_buf();
    let io = |rank| if rank == 1 { Arc::new(Elsewhere(elsewhere.clone())) as Arc<dyn Io> } else { Arc::new(Disk) };
    let reports = Ranks::with(tmp.path(), 2, LONG, io).save(&snapshot(&layout(), 2));
    all_failed(tmp.path(), reports, &["rank 1", "shard-00001-of-00002", "shared by all nodes"]);
}

#[test]
fn saves_that_are_called_off_wait_for_nobody() {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 1));
    let mut ranks = Ranks::new(tmp.path(), 3);
    let start = Instant::now();
    for rank in [0, 1] {
        ranks.savers[rank].save(share(&snapshot(&layout(), 2), rank, 3)).unwrap();
    }
    ranks.savers[..2].iter().for_each(Saver::call_off);
    for rank in [0, 1] {
        let message = ranks.savers[rank].wait().unwrap().result.unwrap_err().to_string();
        assert!(message.contains("called off"), "{message}");
    }
    assert!(start.elapsed() < LONG / 2);
    old_one_stays(tmp.path());
    // What rank 0 has whole it can still save alone.
    save(tmp.path(), &snapshot(&layout(), 2));
    assert_eq!(newest(tmp.path()).snapshot.meta.step, 2);
}

#[test]
fn a_store_that_is_lost_fails_the_save_on_all_ranks() {
    let tmp = tempfile::tempdir().unwrap();
    save(tmp.path(), &snapshot(&layout(), 1));
    let Ranks { server, mut savers } = Ranks::new(tmp.path(), 2);
    drop(server);
    for (rank, saver) in savers.iter_mut().enumerate() {
        saver.save(share(&snapshot(&layout(), 2), rank, 2)).unwrap();
        let message = saver.wait().unwrap().result.unwrap_err().to_string();
        assert!(message.contains("the store at 127.0.0.1"), "{message}");
    }
    old_one_stays(tmp.path());
}

#[test]
fn saves_leave_few_keys_in_the_store() {
    let tmp = tempfile::tempdir().unwrap();
    let size = 3;
    let mut ranks = Ranks::new(tmp.path(), size);
    let mut counts = Vec::new();
    for step in 1..=8 {
        ranks.save(&snapshot(&layout(), step)).into_iter().for_each(|report| drop(report.result.unwrap()));
        counts.push(ranks.server.len());
    }
    // A plan, an outcome and two shards for each of the last two saves.
    assert_eq!(counts, [4, 8, 8, 8, 8, 8, 8, 8]);
}
