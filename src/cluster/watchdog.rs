//! A thread of every rank that publishes what the rank is doing, and reads what the others published when something went wrong.
//!
//! Each rank writes a small record to the store every now and then; nobody reads them while all is well, except that each rank looks at one
//! other at a time to know how long it has been silent. Clocks of two machines are never compared: a rank lives if its record changes between two
//! looks. The process that serves the store may be the one that is gone, so everything has a deadline, and the verdict then says that.

use super::behind::{Behind, Seen, behind};
use crate::collective::{Activity, CollectiveError, Record};
use crate::rendezvous::store::{Client, StoreError};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Least time between the two looks that tell the living from the dead.
const GAP: Duration = Duration::from_millis(1200);
/// How long the store may take over one answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Where the answer goes: all ranks as they were seen, or why that is not known.
type Question = SyncSender<Result<Vec<Seen>, String>>;

/// Publishes until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    questions: SyncSender<Question>,
}

/// Why the ranks did not come together.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What the collective said.
    pub error: String,
    /// Who holds up the others; nothing if it could not be found out.
    pub behind: Option<Vec<Behind>>,
    /// Why it could not.
    pub unknown: Option<String>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)?;
        match (&self.behind, &self.unknown) {
            (Some(behind), _) if behind.is_empty() => {
                write!(f, "; all ranks live and none is behind: see what is between them, or allow them more time")
            }
            (Some(behind), _) => behind.iter().try_for_each(|rank| write!(f, "; {rank}")),
            (None, Some(why)) => write!(f, "; what the others were doing is not known: {why}"),
            (None, None) => Ok(()),
        }
    }
}

impl Watchdog {
    /// Publishes `activity` as that of rank `rank` of `size` in `store`, `every` so often.
    ///
    /// # Errors
    /// A system that starts no thread.
    pub fn start(
        store: Client,
        rank: usize,
        size: usize,
        activity: Arc<Activity>,
        every: Duration,
    ) -> io::Result<Watchdog> {
        let (questions, asked) = sync_channel(1);
        let mut watch =
            Watch { store, rank, activity, every, beat: 0, next: rank, known: vec![None; size], lost: None };
        watch.store.answer_within(ANSWER);
        // It ends by itself when nobody can ask any more; nobody waits for it, as the store may have to be waited for.
        std::thread::Builder::new().name("watchdog".into()).spawn(move || watch.serve(&asked))?;
        Ok(Watchdog { questions })
    }

    /// Finds out who is behind, which takes two looks some seconds apart, and no longer than `patience`.
    pub fn explain(&self, error: &CollectiveError, patience: Duration) -> Verdict {
        let unknown = |why: String| Verdict { error: error.to_string(), behind: None, unknown: Some(why) };
        let (answer, answered) = sync_channel(1);
        if self.questions.try_send(answer).is_err() {
            return unknown("the watchdog has ended or is busy".into());
        }
        match answered.recv_timeout(patience) {
            Ok(Ok(seen)) => Verdict { error: error.to_string(), behind: Some(behind(&seen)), unknown: None },
            Ok(Err(lost)) => unknown(format!("{lost}; the process that served it may be the one that failed")),
            Err(RecvTimeoutError::Timeout) => unknown(format!("the store did not answer within {patience:?}")),
            Err(RecvTimeoutError::Disconnected) => unknown("the watchdog has ended".into()),
        }
    }
}

/// The thread's side.
struct Watch {
    store: Client,
    rank: usize,
    activity: Arc<Activity>,
    every: Duration,
    beat: u64,
    /// The rank that was looked at last.
    next: usize,
    /// The last change of each rank's record, and when it was seen.
    known: Vec<Option<(Record, Instant)>>,
    /// Why the store is of no use any more, in its own words.
    lost: Option<String>,
}

impl Watch {
    fn serve(&mut self, asked: &Receiver<Question>) {
        loop {
            if self.lost.is_none()
                && let Err(error) = self.publish().and_then(|()| self.look_at_next())
            {
                self.lost = Some(error.to_string());
            }
            match asked.recv_timeout(self.every) {
                Ok(answer) => {
                    let _ = answer.send(self.look_twice());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn publish(&mut self) -> Result<(), StoreError> {
        self.beat += 1;
        let record = self.activity.record(self.beat);
        // Numbers and text always have a JSON form.
        let json = serde_json::to_vec(&record).unwrap_or_default();
        self.store.set(&format!("watch/{}", self.rank), &json)
    }

    fn look_at_next(&mut self) -> Result<(), StoreError> {
        self.next = (self.next + 1) % self.known.len();
        match self.next == self.rank {
            true => Ok(()),
            false => self.look_at(self.next),
        }
    }

    fn look_at(&mut self, rank: usize) -> Result<(), StoreError> {
        let key = format!("watch/{rank}");
        if !self.store.has(&key)? {
            return Ok(());
        }
        let json = self.store.get(&key, ANSWER)?;
        let Ok(record) = serde_json::from_slice::<Record>(&json) else { return Ok(()) };
        let is_news = self.known[rank].as_ref().is_none_or(|(before, _)| before.beat != record.beat);
        if is_news {
            self.known[rank] = Some((record, Instant::now()));
        }
        Ok(())
    }

    fn look_at_all(&mut self) -> Result<(), StoreError> {
        let mine = self.rank;
        (0..self.known.len()).filter(|rank| *rank != mine).try_for_each(|rank| self.look_at(rank))
    }

    /// All ranks after two looks. This one goes on publishing meanwhile: others may be looking too.
    fn look_twice(&mut self) -> Result<Vec<Seen>, String> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        self.look_twice_in_store().map_err(|error| error.to_string())
    }

    fn look_twice_in_store(&mut self) -> Result<Vec<Seen>, StoreError> {
        self.publish()?;
        self.look_at_all()?;
        let first = Instant::now();
        let gap = GAP.max(2 * self.every);
        while first.elapsed() < gap {
            std::thread::sleep(self.every.min(gap.saturating_sub(first.elapsed())));
            self.publish()?;
        }
        self.look_at_all()?;
        let seen = |(rank, known): (usize, &Option<(Record, Instant)>)| {
            if rank == self.rank {
                return Seen { rank, record: Some(self.activity.record(self.beat)), silent: None };
            }
            let (record, since) = known.clone().unzip();
            // What changed after the first look changed between the two.
            let silent = match since {
                Some(since) if since > first => None,
                Some(since) => Some(since.elapsed()),
                None => Some(first.elapsed()),
            };
            Seen { rank, record, silent }
        };
        Ok(self.known.iter().enumerate().map(seen).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Collective;
    use crate::collective::host::{Host, Meeting};
    use crate::rendezvous::testing::{client, server};

    const PATIENCE: Duration = Duration::from_secs(20);
    const EVERY: Duration = Duration::from_millis(100);

    /// Returns when a rank's record in the store holds that word.
    fn publishes(port: u16, rank: usize, word: &str) {
        let (mut store, start) = (client(port, "test/"), Instant::now());
        while !String::from_utf8(store.get(&format!("watch/{rank}"), PATIENCE).unwrap()).unwrap().contains(word) {
            assert!(start.elapsed() < PATIENCE, "rank {rank} does not publish `{word}`");
            std::thread::sleep(EVERY / 10);
        }
    }

    /// Two ranks, of which the second goes no further than step 57; what the first one's watchdog says, and the error's delay. The server
    /// is dropped before it is asked if it `is_lost`.
    fn explained(second_lives: bool, store_is_lost: bool) -> (CollectiveError, Duration, Verdict, Duration) {
        let deadline = Duration::from_millis(400);
        let server = server();
        let server_port = server.address().port();
        let connect = || client(server_port, "test/");
        let stores: Vec<(Client, Client)> = (0..2).map(|_| (connect(), connect())).collect();
        let (over, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let [mine, theirs] = <[_; 2]>::try_from(stores).unwrap();
            scope.spawn(move || {
                let meeting = Meeting { rank: 1, size: 2, one_machine: true, store: theirs.0, patience: PATIENCE };
                let mut host = Host::join(meeting, PATIENCE).unwrap();
                let watchdog = Watchdog::start(theirs.1, 1, 2, host.activity(), EVERY).unwrap();
                host.barrier().unwrap();
                host.activity().note(57, "backward");
                publishes(server_port, 1, "backward");
                let _watchdog = second_lives.then_some(watchdog);
                let _ = wait.recv();
            });
            let meeting = Meeting { rank: 0, size: 2, one_machine: true, store: mine.0, patience: PATIENCE };
            let mut host = Host::join(meeting, PATIENCE).unwrap();
            let watchdog = Watchdog::start(mine.1, 0, 2, host.activity(), EVERY).unwrap();
            host.barrier().unwrap();
            publishes(server_port, 1, "backward");
            host.set_patience(deadline);
            let start = Instant::now();
            let error = host.barrier().unwrap_err();
            let after = start.elapsed();
            if store_is_lost {
                drop(server);
            }
            let asked = Instant::now();
            let verdict = watchdog.explain(&error, PATIENCE);
            let took = asked.elapsed();
            drop(over);
            assert!(after >= deadline);
            (error, after, verdict, took)
        })
    }

    #[test]
    fn a_rank_that_stopped_is_named_with_what_it_was_doing() {
        let (error, after, verdict, took) = explained(false, false);
        assert!(matches!(&error, CollectiveError::TimedOut { ranks, .. } if *ranks == [1]), "{error}");
        assert!(after < Duration::from_secs(3) && took < Duration::from_secs(5), "{after:?} {took:?}");
        let said = verdict.to_string();
        assert!(said.contains("rank 1 has shown no sign of life for"), "{said}");
        assert!(said.ends_with("last seen: step 57: backward, at gather 1 of 0 B (done), the others at 2"), "{said}");
        assert_eq!(verdict.behind.unwrap().len(), 1);
    }

    #[test]
    fn a_rank_that_lives_but_does_not_come_is_told_from_a_dead_one() {
        let (_, _, verdict, _) = explained(true, false);
        let said = verdict.to_string();
        assert!(
            said.ends_with("rank 1 lives but is behind: step 57: backward, at gather 1 of 0 B (done), the others at 2"),
            "{said}"
        );
    }

    #[test]
    fn a_store_that_is_gone_is_said_to_be_gone() {
        let (_, _, verdict, took) = explained(true, true);
        let said = verdict.to_string();
        assert!(said.contains("ranks [1] did not answer"), "{said}");
        assert_eq!(said.matches("is lost").count(), 1, "{said}");
        assert!(took < Duration::from_secs(5) && verdict.behind.is_none(), "{took:?}");
    }
}
