//! The thread that talks with the other ranks.

use super::super::activity::Activity;
use super::super::{CollectiveError, Exchange, slice_of, sum_along_tree};
use super::exchange::{self, Kind, Round};
use super::mesh::Mesh;
use super::segment::Span;
use super::shared::{Part, Shared};
use super::slice;
use crate::rendezvous::store::Client;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

/// How long the store may take to say who was lost first: it may be served by the rank that was.
const AGREEMENT: Duration = Duration::from_secs(1);

/// What ranks exchange.
#[derive(Debug)]
pub(super) enum Data {
    /// A copy of this rank's: so many bytes of all ranks' range.
    Own { data: Vec<f32>, bytes: usize },
    /// What this rank has of it, in memory that the ranks share. A sum leaves each rank's slice of it in that rank's part.
    Shared(Part),
}

/// What the thread does, with its data; given back when it is done.
#[derive(Debug)]
pub(super) enum Job {
    /// Replaces the data by what comes of the exchange, or lets others find it there.
    Exchange(Exchange, Data),
    /// This rank has taken from such parts what it was to get; when all have, the memory is free. Nothing is given back.
    Taken(Vec<Span>),
    /// Replaces this rank's bytes by all ranks' bytes, in the order of the ranks.
    Gather(Vec<Vec<u8>>),
    /// Whether a rank has hung up: nothing is sent, and no other rank takes part.
    Look,
}

impl Job {
    /// Whether all ranks do it together, under a number.
    fn is_operation(&self) -> bool {
        !matches!(self, Job::Taken(_) | Job::Look)
    }
}

/// A job, its number among the operations and its deadline.
#[derive(Debug)]
pub(super) struct Task {
    pub sequence: u64,
    pub patience: Duration,
    pub job: Job,
}

/// The thread's side.
pub(super) struct Worker {
    mesh: Mesh,
    store: Client,
    patience: Duration,
    /// The operation under way: the same number at every rank, or they are out of step.
    sequence: u64,
    /// This rank's slice as the others have it, or a block of it.
    parts: Vec<Vec<f32>>,
    shared: Option<Shared>,
    activity: Arc<Activity>,
}

impl Worker {
    pub fn new(mesh: Mesh, store: Client, activity: Arc<Activity>) -> Worker {
        Worker { mesh, store, patience: Duration::ZERO, sequence: 0, parts: Vec::new(), shared: None, activity }
    }

    /// Agrees with the other ranks to share memory, which all can or none does; gives the first reason why not.
    pub fn share(&mut self, patience: Duration) -> Result<Result<Shared, String>, CollectiveError> {
        self.patience = patience;
        let mine = Shared::exchange(&self.mesh, patience)?;
        let reason = mine.as_ref().err().cloned().unwrap_or_default();
        let all = self.gather(reason.into_bytes())?;
        let refused = all.iter().enumerate().find(|(_, reason)| !reason.is_empty());
        let refused = refused.map(|(rank, reason)| format!("at rank {rank}: {}", String::from_utf8_lossy(reason)));
        Ok(match (mine, refused) {
            (Ok(shared), None) => {
                self.shared = Some(shared.clone());
                Ok(shared)
            }
            (Err(reason), None) | (_, Some(reason)) => Err(reason),
        })
    }

    /// Works until there is nothing more to come, or something has failed: after an error ranks are out of step for good.
    pub fn serve(mut self, todo: &Receiver<Task>, give: &SyncSender<Result<Task, CollectiveError>>) {
        while let Ok(Task { sequence, patience, job }) = todo.recv() {
            (self.sequence, self.patience) = (sequence, patience);
            let is_operation = job.is_operation();
            if is_operation {
                self.activity.begun();
            }
            match self.work(job) {
                Ok(None) => {}
                Ok(Some(job)) => {
                    if is_operation {
                        self.activity.completed();
                    }
                    // Nobody listens any more when the collective is dropped.
                    if give.send(Ok(Task { sequence, patience, job })).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    let _ = give.send(Err(self.agree(error)));
                    return;
                }
            }
        }
    }

    fn work(&mut self, job: Job) -> Result<Option<Job>, CollectiveError> {
        Ok(match job {
            Job::Exchange(exchange, mut data) => {
                self.exchange(exchange, &mut data)?;
                Some(Job::Exchange(exchange, data))
            }
            Job::Taken(spans) => {
                let floats: usize = spans.iter().map(Span::len).sum();
                self.say(Kind::Taken, floats * size_of::<f32>(), &[], &mut [])?;
                None
            }
            Job::Look => match self.mesh.others().find(|&rank| self.mesh.has_hung_up(rank)) {
                Some(rank) => {
                    return Err(CollectiveError::PeerLost { rank, operation: "sums between GPUs".into() });
                }
                None => Some(Job::Look),
            },
            Job::Gather(mut mine) => Some(Job::Gather(self.gather(mine.pop().unwrap_or_default())?)),
        })
    }

    fn exchange(&mut self, exchange: Exchange, data: &mut Data) -> Result<(), CollectiveError> {
        match (exchange, data) {
            (Exchange::AllReduce | Exchange::ReduceScatter, Data::Shared(part)) => self.sum_shared(part),
            // Where the others' slices are is enough.
            (Exchange::AllGather, Data::Shared(part)) => self.offer(Kind::Share, part),
            (Exchange::AllReduce, Data::Own { data, .. }) => self.sum(data),
            (Exchange::ReduceScatter, Data::Own { data, .. }) => self.reduce_scatter(data),
            (Exchange::AllGather, Data::Own { data, bytes }) => {
                let (all, size) = (0..*bytes, self.mesh.size);
                let data: &mut [u8] = bytemuck::cast_slice_mut(data);
                self.spread(&mut data[..*bytes], |rank| slice_of(&all, rank, size))
            }
        }
    }

    /// The rank that was lost first, as the ranks agree in the store. A rank that finds another gone hangs up on all, and those would take
    /// it for the one that failed; but it says so in the store before.
    fn agree(&mut self, error: CollectiveError) -> CollectiveError {
        let (suspect, said) = match &error {
            CollectiveError::PeerLost { rank, operation } => (Some(*rank), operation.clone()),
            CollectiveError::TimedOut { ranks, .. } => (ranks.first().copied(), String::new()),
            CollectiveError::OutOfStep { .. }
            | CollectiveError::TooLong { .. }
            | CollectiveError::Io { .. }
            | CollectiveError::Device(_)
            | CollectiveError::DeviceOf { .. }
            | CollectiveError::Stuck(_)
            | CollectiveError::Ended => return error,
        };
        let Some(suspect) = suspect else { return error };
        self.store.answer_within(AGREEMENT);
        let first = self.store.compare_set("collective/lost", b"", suspect.to_string().as_bytes());
        let first = match first {
            Ok(first) => String::from_utf8(first).ok().and_then(|first| first.parse().ok()),
            // A store that is gone has gone with rank 0, where that served it: what others hung up for. By now its connection is closed too.
            // After a time-out it may have given up as this rank does.
            Err(_) => (matches!(error, CollectiveError::PeerLost { .. }) && self.mesh.has_hung_up(0)).then_some(0),
        };
        match first {
            Some(rank) if rank != suspect && rank != self.mesh.rank && rank < self.mesh.size => {
                CollectiveError::PeerLost {
                    rank,
                    operation: if said.is_empty() { "an earlier operation".into() } else { said },
                }
            }
            _ => error,
        }
    }

    fn round(&self, kind: Kind) -> Round<'_> {
        Round::new(&self.mesh, kind, self.sequence, self.patience)
    }

    /// Says the same to all and hears one word of each, into `words` at its place if there is more to it than that it came.
    fn say(&self, kind: Kind, about: usize, mine: &[u8], words: &mut [u8]) -> Result<(), CollectiveError> {
        let mut round = self.round(kind).about(about);
        let mut words = words.chunks_exact_mut(mine.len().max(1));
        for rank in 0..self.mesh.size {
            let theirs = words.next().unwrap_or_default();
            if rank != self.mesh.rank {
                round.send(rank, mine);
                round.receive(rank, theirs);
            }
        }
        round.run()
    }

    fn sum_shared(&mut self, part: &mut Part) -> Result<(), CollectiveError> {
        let Some(shared) = &self.shared else { return Err(CollectiveError::Ended) };
        self.offer(Kind::Offer, part)?;
        shared.sum(part, &mut self.parts)?;
        self.say(Kind::Summed, part.span.len() * size_of::<f32>(), &[], &mut [])
    }

    /// Says where this rank's part is, and hears where the others' are.
    fn offer(&self, kind: Kind, part: &mut Part) -> Result<(), CollectiveError> {
        let place = part.span.offset().to_ne_bytes();
        let bytes = part.span.len() * size_of::<f32>();
        self.say(kind, bytes, &place, bytemuck::cast_slice_mut(&mut part.places))
    }

    fn sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.reduce_scatter(data)?;
        let (len, size) = (data.len(), self.mesh.size);
        let in_bytes = |floats: Range<usize>| floats.start * size_of::<f32>()..floats.end * size_of::<f32>();
        self.spread(bytemuck::cast_slice_mut(data), |rank| in_bytes(slice(len, rank, size)))
    }

    fn reduce_scatter(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let Mesh { rank, size, .. } = self.mesh;
        let len = data.len();
        let slice = |r: usize| slice(len, r, size);
        let mut parts = std::mem::take(&mut self.parts);
        parts.resize(size, Vec::new());
        parts.iter_mut().for_each(|part| part.resize(slice(rank).len(), 0.0));
        parts[rank].copy_from_slice(&data[slice(rank)]);

        let mut round = self.round(Kind::Scatter);
        for other in self.mesh.others() {
            round.send(other, bytemuck::cast_slice(&data[slice(other)]));
        }
        for (other, part) in parts.iter_mut().enumerate().filter(|(other, _)| *other != rank) {
            round.receive(other, bytemuck::cast_slice_mut(part));
        }
        round.run()?;
        sum_along_tree(&mut parts);
        data[slice(rank)].copy_from_slice(&parts[0]);
        self.parts = parts;
        Ok(())
    }

    /// Gives all ranks each rank's slice of the bytes.
    fn spread(&self, data: &mut [u8], slice: impl Fn(usize) -> Range<usize>) -> Result<(), CollectiveError> {
        let mut round = self.round(Kind::Gather);
        let (mut mine, mut rest): (&[u8], _) = (&[], data);
        for rank in 0..self.mesh.size {
            let (part, later) = std::mem::take(&mut rest).split_at_mut(slice(rank).len());
            rest = later;
            match rank == self.mesh.rank {
                true => mine = part,
                false => round.receive(rank, part),
            }
        }
        for other in self.mesh.others() {
            round.send(other, mine);
        }
        round.run()
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
