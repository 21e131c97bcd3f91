//! How the writers of several ranks meet: through the store, so that a save never disturbs what training sends.
//!
//! Every save has keys of its own under `checkpoint/STEP/ATTEMPT/`. The attempt counts the saves of one step, so that a second one does
//! not meet the answers to the first; and since the step is part of the key, ranks that once disagreed on whether to save meet again
//! at the next step.
//!
//! | key | set by | says |
//! |---|---|---|
//! | `plan` | rank 0 | the uuid of the temporary directory, or why there is none |
//! | `shard-R` | rank R | its file with size and hash, or why there is none |
//! | `outcome` | rank 0 | the bytes of all shards, or which rank failed and why |
//!
//! A rank removes the keys that it may have set when it begins the save after the next one. By then every rank has read them: a rank takes
//! part in one save at a time. So the store never holds more than those of three saves.

use super::error::CheckpointError;
use super::layout::Layout;
use super::manifest::ShardFile;
use crate::files::is_unique_id;
use crate::machine::host_name;
use crate::rendezvous::store::{Client, StoreError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a wait goes on before it looks whether the save was called off.
const SLICE: Duration = Duration::from_millis(100);

/// The ranks that save together, seen from one of them.
#[derive(Debug)]
pub struct Team {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// A connection to the store that nobody else uses. Its prefix is that of this start of the run: a store that outlives it must not
    /// show the next one its keys.
    pub store: Client,
    /// How far one rank may be behind another: rank 0 waits this long for the shards after it has written its own. All ranks know of a
    /// failure at most twice this long after they have written theirs.
    pub patience: Duration,
}

/// What kept a save of several ranks from being whole, the same on all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TeamFailure {
    /// A rank could not do its part.
    #[error("rank {rank}{}: {reason}", on(.host))]
    Rank {
        /// Which one.
        rank: usize,
        /// Its machine.
        host: Option<String>,
        /// Its error.
        reason: String,
    },
    /// Ranks from which nothing was heard.
    #[error("{} took no part in it within {} s", named(.ranks), .after.as_secs_f32())]
    Absent {
        /// Which ones.
        ranks: Vec<usize>,
        /// How long they were waited for.
        after: Duration,
    },
}

fn on(host: &Option<String>) -> String {
    host.as_ref().map(|host| format!(" on {host}")).unwrap_or_default()
}

fn named(ranks: &[usize]) -> String {
    match ranks {
        [rank] => format!("rank {rank}"),
        ranks => format!("the ranks {ranks:?}"),
    }
}

/// A rank's side of all saves.
#[derive(Debug)]
pub(super) struct Meetings {
    team: Team,
    /// Step and attempt of the newest save.
    last: Option<(u64, u64)>,
    /// Keys of the saves before this one.
    past: VecDeque<Vec<String>>,
}

/// A rank's side of one save.
pub(super) struct Meeting<'a> {
    team: &'a mut Team,
    prefix: String,
    called_off: &'a AtomicBool,
    begun: Instant,
    announced: bool,
}

impl Meetings {
    pub fn new(team: Team) -> Meetings {
        Meetings { team, last: None, past: VecDeque::new() }
    }

    pub fn rank(&self) -> usize {
        self.team.rank
    }

    /// Begins the save of a step.
    pub fn begin<'a>(&'a mut self, step: u64, called_off: &'a AtomicBool) -> Meeting<'a> {
        let attempt = self.last.filter(|(last, _)| *last == step).map_or(0, |(_, attempt)| attempt + 1);
        self.last = Some((step, attempt));
        let prefix = format!("checkpoint/{step}/{attempt}");
        if self.past.len() == 2 {
            for key in self.past.pop_front().into_iter().flatten() {
                // What is wrong with the store shows at the first key that matters.
                let _ = self.team.store.delete(&key);
            }
        }
        let mut keys: Vec<String> = (1..self.team.size).map(|rank| format!("{prefix}/shard-{rank}")).collect();
        match self.team.rank {
            0 => keys.extend(["plan", "outcome"].map(|name| format!("{prefix}/{name}"))),
            rank => keys = vec![keys.swap_remove(rank - 1)],
        }
        self.past.push_back(keys);
        Meeting { team: &mut self.team, prefix, called_off, begun: Instant::now(), announced: false }
    }
}

impl Meeting<'_> {
    pub fn rank(&self) -> usize {
        self.team.rank
    }

    pub fn size(&self) -> usize {
        self.team.size
    }

    fn set<T: Serialize>(&mut self, name: &str, value: &T) -> Result<(), CheckpointError> {
        // Strings, numbers and paths that are text: nothing that JSON cannot hold.
        let text = serde_json::to_vec(value).map_err(|e| self.garbled(name, &e.to_string()))?;
        let key = format!("{}/{name}", self.prefix);
        self.team.store.set(&key, &text).map_err(|source| CheckpointError::Store { source })
    }

    /// The value of a key, or `None` when the deadline is over.
    fn get<T: DeserializeOwned>(&mut self, name: &str, deadline: Instant) -> Result<Option<T>, CheckpointError> {
        let key = format!("{}/{name}", self.prefix);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.team.store.get(&key, left.min(SLICE)) {
                Ok(text) => {
                    return serde_json::from_slice(&text).map(Some).map_err(|e| self.garbled(name, &e.to_string()));
                }
                Err(StoreError::TimedOut { .. }) if self.called_off.load(Ordering::Relaxed) => {
                    return Err(CheckpointError::CalledOff);
                }
                Err(StoreError::TimedOut { .. }) if left.is_zero() => return Ok(None),
                Err(StoreError::TimedOut { .. }) => {}
                Err(source) => return Err(CheckpointError::Store { source }),
            }
        }
    }

    /// What a key holds that no rank of this program would set.
    fn garbled(&self, name: &str, reason: &str) -> CheckpointError {
        let reason = format!("{}/{name} in the store is garbled: {reason}; are all ranks of one version?", self.prefix);
        CheckpointError::Team(TeamFailure::Rank { rank: self.team.rank, host: Some(host_name()), reason })
    }

    /// An error of this rank, as the others will see it.
    fn failure(&self, error: CheckpointError) -> TeamFailure {
        match error {
            CheckpointError::Team(failure) => failure,
            error => TeamFailure::Rank { rank: self.team.rank, host: Some(host_name()), reason: error.to_string() },
        }
    }

    /// Rank 0: the temporary directory is there.
    pub fn announce(&mut self, uuid: &str) -> Result<(), CheckpointError> {
        self.announced = true;
        self.set("plan", &Ok::<_, TeamFailure>(uuid))
    }

    /// Rank 0: waits until every other rank has written its shard or failed, for as long as its patience. Nothing of the directory may be
    /// removed before that: they may be writing there. Gives the files of the others, or what was wrong with the first of them.
    pub fn gather(&mut self, layout: &Layout) -> Result<Vec<ShardFile>, CheckpointError> {
        let after = self.team.patience;
        let deadline = Instant::now() + after;
        let (mut files, mut absent, mut failed) = (Vec::new(), Vec::new(), None);
        for rank in 1..self.team.size {
            let name = format!("shard-{rank}");
            match self.get::<Result<ShardFile, TeamFailure>>(&name, deadline)? {
                Some(Ok(file)) if file.is_shard(layout, rank, self.team.size) => files.push(file),
                Some(Ok(file)) => {
                    let reason = format!("it handed in {file:?}, which is not its share; are all ranks of one config?");
                    failed = failed.or(Some(TeamFailure::Rank { rank, host: None, reason }));
                }
                Some(Err(failure)) => failed = failed.or(Some(failure)),
                None => absent.push(rank),
            }
        }
        match failed {
            Some(failure) => Err(failure.into()),
            None if !absent.is_empty() => Err(TeamFailure::Absent { ranks: absent, after }.into()),
            None => Ok(files),
        }
    }

    /// Rank 0: tells all how the save ended, and gives it back as they see it.
    pub fn publish<T>(
        &mut self,
        result: Result<T, CheckpointError>,
        bytes: impl Fn(&T) -> u64,
    ) -> Result<T, CheckpointError> {
        match result {
            Ok(saved) => {
                // A checkpoint that is there is there, whether the others hear of it or not.
                let _ = self.set("outcome", &Ok::<_, TeamFailure>(bytes(&saved)));
                Ok(saved)
            }
            Err(error) => {
                let failure = self.failure(error);
                let refusal = Err::<(), _>(&failure);
                // Should the store be what failed, this rank's report still says so.
                let _ = if self.announced { Ok(()) } else { self.set("plan", &refusal) };
                let _ = self.set("outcome", &refusal);
                Err(failure.into())
            }
        }
    }

    /// The others: the uuid of the temporary directory that rank 0 made.
    pub fn plan(&mut self) -> Result<String, CheckpointError> {
        let after = self.team.patience;
        let plan = self.get::<Result<String, TeamFailure>>("plan", self.begun + after);
        match plan {
            // It becomes part of a path.
            Ok(Some(Ok(uuid))) if is_unique_id(&uuid) => Ok(uuid),
            Ok(Some(Ok(uuid))) => Err(self.garbled("plan", &format!("{uuid:?} is no uuid"))),
            Ok(Some(Err(failure))) => Err(failure.into()),
            other => {
                let absent = || TeamFailure::Absent { ranks: vec![0], after };
                let error = other.err().unwrap_or_else(|| absent().into());
                // Rank 0 may come yet: it need not wait for this rank.
                let _ = self.report(Err(CheckpointError::Team(self.failure_of_waiting(&error))));
                Err(error)
            }
        }
    }

    fn failure_of_waiting(&self, error: &CheckpointError) -> TeamFailure {
        let reason = format!("it gave up before rank 0 began: {error}");
        TeamFailure::Rank { rank: self.team.rank, host: Some(host_name()), reason }
    }

    /// The others: this rank's shard, or why there is none.
    pub fn report(&mut self, shard: Result<ShardFile, CheckpointError>) -> Result<(), CheckpointError> {
        let name = format!("shard-{}", self.team.rank);
        let shard = shard.map_err(|error| self.failure(error));
        self.set(&name, &shard)
    }

    /// The others: the bytes of all shards, once rank 0 has committed them.
    pub fn outcome(&mut self) -> Result<u64, CheckpointError> {
        // Rank 0 may be that far behind, and then wait that long for another rank.
        let after = 2 * self.team.patience;
        match self.get::<Result<u64, TeamFailure>>("outcome", Instant::now() + after)? {
            Some(outcome) => Ok(outcome?),
            None => Err(CheckpointError::NoOutcome { after }),
        }
    }
}
