//! Ranks that meet over sockets: for CPU ranks on one machine, small tests, and whatever is not worth a GPU's time.
//!
//! Every rank holds a connection to every other ([`mesh`]). An operation is one or two rounds in which each rank sends one message to some
//! others and receives one from some ([`exchange`]); all have a deadline, and name the rank that was missing. A sum is two rounds:
//! everyone sends the others their slices, adds up its own slice along the [tree](super::tree), and sends the result to all. That moves as
//! little as a ring does, in an order of additions that depends on the number of ranks alone.

mod exchange;
mod mesh;

#[cfg(test)]
mod tests;

use super::tree::sum_along_tree;
use super::{Collective, CollectiveError};
use crate::device::{BufferId, Device};
use crate::rendezvous::store::Client;
use exchange::{Kind, Round};
use mesh::Mesh;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

pub use mesh::{Meeting, MeetingError};

/// Sums under way at a time: no program has more buckets.
const DEPTH: usize = 1024;
/// Slices begin at multiples of this many floats.
const SLICE: usize = 16;

/// The collective of ranks on the host.
///
/// A thread of its own does the work in the order in which it was begun, on copies.
#[derive(Debug)]
pub struct Host {
    rank: usize,
    size: usize,
    /// Taken when the thread is to end.
    jobs: Option<SyncSender<(Job, Duration)>>,
    done: Receiver<Result<Job, CollectiveError>>,
    thread: Option<JoinHandle<()>>,
    /// Copies that are not in use.
    spare: Vec<Vec<f32>>,
    /// Deadline of what is begun next.
    patience: Duration,
}

/// What the thread does, with its data; given back when it is done.
#[derive(Debug)]
enum Job {
    /// Replaces the floats by their sum over all ranks.
    Sum(Vec<f32>),
    /// Replaces the bytes of all ranks by rank 0's.
    Broadcast(Vec<u8>),
    /// Replaces this rank's bytes by all ranks' bytes, in the order of the ranks.
    Gather(Vec<Vec<u8>>),
}

impl Host {
    /// Meets the other ranks. `patience` is the deadline of every later operation.
    ///
    /// # Errors
    /// Ranks that do not come, or come twice.
    pub fn join(mut meeting: Meeting, patience: Duration) -> Result<Host, MeetingError> {
        let (rank, size) = (meeting.rank, meeting.size);
        let mesh = Mesh::join(&mut meeting)?;
        let (jobs, todo) = sync_channel::<(Job, Duration)>(DEPTH);
        let (give, done) = sync_channel(DEPTH);
        let mut worker = Worker { mesh, store: meeting.store, patience, sequence: 0, parts: Vec::new() };
        let work = move || {
            while let Ok((job, patience)) = todo.recv() {
                worker.patience = patience;
                let result = worker.work(job).map_err(|error| worker.agree(error));
                let failed = result.is_err();
                // Nobody listens any more when the collective is dropped. After an error ranks are out of step for good.
                if give.send(result).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("collective".into())
            .spawn(work)
            .map_err(|source| MeetingError::Io { action: "start a thread", source })?;
        Ok(Host { rank, size, jobs: Some(jobs), done, thread: Some(thread), spare: Vec::new(), patience })
    }

    fn begin(&mut self, job: Job) -> Result<(), CollectiveError> {
        match self.jobs.as_ref().map(|jobs| jobs.send((job, self.patience))) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.done.try_iter().find_map(Result::err).unwrap_or(CollectiveError::Ended)),
        }
    }

    fn finish(&mut self) -> Result<Job, CollectiveError> {
        self.done.recv().unwrap_or(Err(CollectiveError::Ended))
    }

    /// Rank 0's bytes, at every rank; the others' do not matter.
    ///
    /// # Errors
    /// A rank that does not take part.
    pub fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>, CollectiveError> {
        self.begin(Job::Broadcast(bytes))?;
        match self.finish()? {
            Job::Broadcast(bytes) => Ok(bytes),
            Job::Sum(_) | Job::Gather(_) => Err(CollectiveError::Ended),
        }
    }

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// A rank that does not take part.
    pub fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.all_gather(Vec::new()).map(drop)
    }
}

impl Collective for Host {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.size
    }

    fn all_reduce_start(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        let mut data = self.spare.pop().unwrap_or_default();
        data.resize(range.len(), 0.0);
        device.download(buffer, range.start, &mut data);
        self.begin(Job::Sum(data))
    }

    fn all_reduce_wait(
        &mut self,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        match self.finish()? {
            Job::Sum(data) => {
                device.upload(buffer, range.start, &data);
                self.spare.push(data);
                Ok(())
            }
            Job::Broadcast(_) | Job::Gather(_) => Err(CollectiveError::Ended),
        }
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.begin(Job::Gather(vec![mine]))?;
        match self.finish()? {
            Job::Gather(all) => Ok(all),
            Job::Sum(_) | Job::Broadcast(_) => Err(CollectiveError::Ended),
        }
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Worker {
    mesh: Mesh,
    store: Client,
    patience: Duration,
    /// Operations so far: the same number at every rank, or they are out of step.
    sequence: u64,
    /// This rank's slice as the others have it.
    parts: Vec<Vec<f32>>,
}

impl Worker {
    fn work(&mut self, job: Job) -> Result<Job, CollectiveError> {
        self.sequence += 1;
        match job {
            Job::Sum(mut data) => self.sum(&mut data).map(|()| Job::Sum(data)),
            Job::Broadcast(bytes) => self.broadcast(bytes).map(Job::Broadcast),
            Job::Gather(mut mine) => self.gather(mine.pop().unwrap_or_default()).map(Job::Gather),
        }
    }

    /// The rank that was lost first, as the ranks agree in the store. A rank that finds another gone hangs up on all, and those would take
    /// it for the one that failed; but it says so in the store before.
    fn agree(&mut self, error: CollectiveError) -> CollectiveError {
        let (suspect, said) = match &error {
            CollectiveError::PeerLost { rank, operation } => (Some(*rank), operation.clone()),
            CollectiveError::TimedOut { ranks, .. } => (ranks.first().copied(), String::new()),
            CollectiveError::OutOfStep { .. } | CollectiveError::Io { .. } | CollectiveError::Ended => return error,
        };
        let Some(suspect) = suspect else { return error };
        let first = self.store.compare_set("collective/lost", b"", suspect.to_string().as_bytes());
        let first = first.ok().and_then(|first| String::from_utf8(first).ok()?.parse().ok());
        match first {
            Some(rank) if rank != suspect && rank != self.mesh.rank && rank < self.mesh.size => {
                CollectiveError::PeerLost {
                    rank,
                    operation: if said.is_empty() { "an earlier operation".into() } else { said },
                }
            }
            // A store that is gone with its rank has nothing to add.
            _ => error,
        }
    }

    fn round(&self, kind: Kind) -> Round<'_> {
        Round::new(&self.mesh, kind, self.sequence, self.patience)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.mesh.rank;
        (0..self.mesh.size).filter(move |&other| other != rank)
    }

    fn sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let Mesh { rank, size, .. } = self.mesh;
        let len = data.len();
        // Slice r belongs to rank r.
        let cut = |r: usize| (len.div_ceil(SLICE) * r / size * SLICE).min(len);
        let slice = |r: usize| cut(r)..cut(r + 1);
        let mut parts = std::mem::take(&mut self.parts);
        parts.resize(size, Vec::new());
        parts.iter_mut().for_each(|part| part.resize(slice(rank).len(), 0.0));
        parts[rank].copy_from_slice(&data[slice(rank)]);

        let mut round = self.round(Kind::Scatter);
        for other in self.others() {
            round.send(other, bytemuck::cast_slice(&data[slice(other)]));
        }
        for (other, part) in parts.iter_mut().enumerate().filter(|(other, _)| *other != rank) {
            round.receive(other, bytemuck::cast_slice_mut(part));
        }
        round.run()?;
        sum_along_tree(&mut parts);
        let mine = &parts[0];
        data[slice(rank)].copy_from_slice(mine);

        let mut round = self.round(Kind::Gather);
        for other in self.others() {
            round.send(other, bytemuck::cast_slice(mine));
        }
        let mut rest = data;
        for other in 0..size {
            let (theirs, later) = std::mem::take(&mut rest).split_at_mut(slice(other).len());
            rest = later;
            if other != rank {
                round.receive(other, bytemuck::cast_slice_mut(theirs));
            }
        }
        round.run()?;
        self.parts = parts;
        Ok(())
    }

    fn broadcast(&mut self, mut bytes: Vec<u8>) -> Result<Vec<u8>, CollectiveError> {
        let mut len = (bytes.len() as u64).to_le_bytes();
        for step in [Kind::Length, Kind::Broadcast] {
            let mut round = self.round(step);
            let content: &mut [u8] = if step == Kind::Length { &mut len } else { &mut bytes };
            if self.mesh.rank == 0 {
                self.others().for_each(|other| round.send(other, content));
                round.run()?;
            } else {
                round.receive(0, content);
                round.run()?;
                if step == Kind::Length {
                    bytes = vec![0; exchange::bounded(u64::from_le_bytes(len), 0)?];
                }
            }
        }
        Ok(bytes)
    }

    fn gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let size = self.mesh.size;
        let len = (mine.len() as u64).to_le_bytes();
        let mut lens = vec![len; size];
        let mut round = self.round(Kind::Length);
        for (other, theirs) in lens.iter_mut().enumerate().filter(|(other, _)| *other != self.mesh.rank) {
            round.send(other, &len);
            round.receive(other, theirs);
        }
        round.run()?;
        let mut all = Vec::new();
        for (rank, len) in lens.iter().enumerate() {
            all.push(vec![0; exchange::bounded(u64::from_le_bytes(*len), rank)?]);
        }
        let mut round = self.round(Kind::Gather);
        for (other, theirs) in all.iter_mut().enumerate().filter(|(other, _)| *other != self.mesh.rank) {
            round.send(other, &mine);
            round.receive(other, theirs);
        }
        round.run()?;
        all[self.mesh.rank] = mine;
        Ok(all)
    }
}
