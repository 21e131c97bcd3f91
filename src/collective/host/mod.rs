//! Ranks that meet over sockets: for CPU ranks on one machine, small tests, and whatever is not worth a GPU's time.
//!
//! Every rank holds a connection to every other ([`mesh`]). An operation is some rounds in which each rank sends one message to some others
//! and receives one from some ([`exchange`]); all have a deadline, and name the rank that was missing. In a sum each rank adds up its own
//! slice of everybody's gradients along the [tree](super::tree) and gives it to all. That moves as little as a ring does, in an order of
//! additions that depends on the number of ranks alone. Ranks of one machine find the slices in each other's memory ([`shared`]), others
//! send them; the bits are the same.

mod exchange;
mod mesh;
mod segment;
mod shared;
mod stream;
mod worker;

#[cfg(test)]
mod tests;

use super::activity::Activity;
use super::{Collective, CollectiveError, Exchange, slice_of};
use crate::device::{BufferId, Device};
use mesh::Mesh;
use segment::Span;
use shared::{Part, Shared};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;
use worker::{Data, Job, Task, Worker};

pub use mesh::{Meeting, MeetingError};

/// Operations under way at a time: no program has more buckets.
const DEPTH: usize = 1024;
/// Sums in shared memory that are taken before the ranks tell each other so, unless none is under way sooner.
const TAKEN: usize = 16;
/// Slices begin at multiples of this many floats where they cannot be of one length.
const SLICE: usize = 16;

/// The slice of `len` floats that rank `rank` of `size` adds up.
fn slice(len: usize, rank: usize, size: usize) -> Range<usize> {
    if len.is_multiple_of(size) {
        return slice_of(&(0..len), rank, size);
    }
    let cut = |r: usize| (len.div_ceil(SLICE) * r / size * SLICE).min(len);
    cut(rank)..cut(rank + 1)
}

/// Where a part of a range stands in it.
fn within(part: &Range<usize>, whole: &Range<usize>) -> Range<usize> {
    part.start - whole.start..part.end - whole.start
}

/// Refuses what the others would not believe.
fn short(operation: &'static str, bytes: &[u8]) -> Result<(), CollectiveError> {
    let (bytes, most) = (bytes.len(), exchange::MAX_BYTES as usize);
    if bytes > most { Err(CollectiveError::TooLong { operation, bytes, most }) } else { Ok(()) }
}

/// The collective of ranks on the host.
///
/// A thread of its own does the work in the order in which it was begun, on copies.
#[derive(Debug)]
pub struct Host {
    rank: usize,
    size: usize,
    /// Taken when the thread is to end.
    jobs: Option<SyncSender<Task>>,
    done: Receiver<Result<Task, CollectiveError>>,
    thread: Option<JoinHandle<()>>,
    /// Where the ranks share memory; copies are parts of it then.
    shared: Option<Shared>,
    notice: Option<String>,
    /// Sums begun and not waited for.
    under_way: usize,
    /// Parts of sums that this rank has taken and others may still be reading.
    taken: Vec<Span>,
    /// Copies that are not in use, where they share none.
    spare: Vec<Vec<f32>>,
    /// Deadline of what is begun next.
    patience: Duration,
    activity: Arc<Activity>,
}

impl Host {
    /// Meets the other ranks. `patience` is the deadline of every later operation.
    ///
    /// # Errors
    /// Ranks that do not come, or come twice.
    pub fn join(mut meeting: Meeting, patience: Duration) -> Result<Host, MeetingError> {
        let (rank, size) = (meeting.rank, meeting.size);
        let mesh = Mesh::join(&mut meeting)?;
        let activity = Arc::new(Activity::new(rank));
        let may_share = meeting.one_machine && size > 1;
        let mut worker = Worker::new(mesh, meeting.store, Arc::clone(&activity));
        let agreed = if may_share { Some(worker.share(meeting.patience)?) } else { None };
        let (shared, notice) = match agreed {
            Some(Ok(shared)) => (Some(shared), None),
            Some(Err(reason)) => (None, Some(format!("sums go through sockets: {reason}"))),
            None => (None, None),
        };
        let (jobs, todo) = sync_channel::<Task>(DEPTH);
        let (give, done) = sync_channel(DEPTH);
        let thread = std::thread::Builder::new()
            .name("collective".into())
            .spawn(move || worker.serve(&todo, &give))
            .map_err(|source| MeetingError::Io { action: "start a thread", source })?;
        Ok(Host {
            rank,
            size,
            jobs: Some(jobs),
            done,
            thread: Some(thread),
            shared,
            notice,
            under_way: 0,
            taken: Vec::new(),
            spare: Vec::new(),
            patience,
            activity,
        })
    }

    /// Why ranks of one machine share no memory, for the log; nothing if they do, or are on several.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// What this rank is doing, for a watchdog, and for the loop to say more about it.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.activity)
    }

    fn begin(&mut self, name: &'static str, bytes: usize, job: Job) -> Result<(), CollectiveError> {
        let sequence = self.activity.queued(name, bytes);
        self.hand_over(sequence, job)
    }

    fn hand_over(&mut self, sequence: u64, job: Job) -> Result<(), CollectiveError> {
        let task = Task { sequence, patience: self.patience, job };
        match self.jobs.as_ref().map(|jobs| jobs.send(task)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.done.try_iter().find_map(Result::err).unwrap_or(CollectiveError::Ended)),
        }
    }

    fn finish(&mut self) -> Result<Task, CollectiveError> {
        self.done.recv().unwrap_or(Err(CollectiveError::Ended))
    }

    /// Memory for so many bytes that the others can read, where the ranks share any.
    fn part(&self, bytes: usize) -> Result<Option<Part>, CollectiveError> {
        let Some(shared) = &self.shared else { return Ok(None) };
        let operation = || format!("finding {bytes} bytes of shared memory");
        let span = shared.window.allocate(bytes.div_ceil(size_of::<f32>()));
        let span = span.map_err(|source| CollectiveError::Io { operation: operation(), source })?;
        Ok(Some(Part { span, places: vec![0; self.size] }))
    }

    /// Says that what others have given in shared memory has been taken: one word for many, at the same place of every rank's program.
    fn note_taken(&mut self, sequence: u64, span: Span) -> Result<(), CollectiveError> {
        self.taken.push(span);
        if self.under_way > 0 && self.taken.len() < TAKEN {
            return Ok(());
        }
        let taken = self.taken.drain(..).map(Span::returning).collect();
        self.hand_over(sequence, Job::Taken(taken))
    }

    /// Begins what [`Host::barrier`] does; to be followed by [`Host::all_are_here`] until they are.
    pub(super) fn call_all(&mut self) -> Result<(), CollectiveError> {
        self.begin("gather", 0, Job::Gather(vec![Vec::new()]))
    }

    /// Whether every rank has come to where this one [called](Host::call_all). Nobody waits.
    pub(super) fn all_are_here(&mut self) -> Result<bool, CollectiveError> {
        match self.done.try_recv() {
            Ok(done) => done.map(|_| true),
            Err(TryRecvError::Empty) => Ok(false),
            Err(TryRecvError::Disconnected) => Err(CollectiveError::Ended),
        }
    }

    /// Finds out, at once and alone, whether a rank has hung up.
    pub(super) fn look(&mut self) -> Result<(), CollectiveError> {
        self.hand_over(0, Job::Look)?;
        self.finish().map(drop)
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

    fn start(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        let whole = exchange.in_bytes(&range);
        // What this rank has of it.
        let mine = match exchange {
            Exchange::AllReduce | Exchange::ReduceScatter => whole.clone(),
            Exchange::AllGather => slice_of(&whole, self.rank, self.size),
        };
        let data = match self.part(mine.len())? {
            Some(mut part) => {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(part.span.floats_mut());
                device.download(buffer, mine.start, &mut bytes[..mine.len()])?;
                Data::Shared(part)
            }
            None => {
                let mut data = self.spare.pop().unwrap_or_default();
                data.resize(whole.len().div_ceil(size_of::<f32>()), 0.0);
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut data);
                device.download(buffer, mine.start, &mut bytes[within(&mine, &whole)])?;
                Data::Own { data, bytes: whole.len() }
            }
        };
        self.begin(exchange.name(), whole.len(), Job::Exchange(exchange, data))?;
        self.under_way += 1;
        Ok(())
    }

    fn wait(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        let Task { sequence, job: Job::Exchange(_, data), .. } = self.finish()? else {
            return Err(CollectiveError::Ended);
        };
        self.under_way = self.under_way.saturating_sub(1);
        let whole = exchange.in_bytes(&range);
        // What this rank gets of it.
        let result = match exchange {
            Exchange::AllReduce | Exchange::AllGather => whole.clone(),
            Exchange::ReduceScatter => exchange.in_bytes(&slice_of(&range, self.rank, self.size)),
        };
        let here = within(&result, &whole);
        match (data, &self.shared) {
            (Data::Own { data, .. }, _) => {
                device.upload(buffer, result.start, &bytemuck::cast_slice::<f32, u8>(&data)[here])?;
                self.spare.push(data);
                Ok(())
            }
            (Data::Shared(part), Some(shared)) => {
                let mut taken = Ok(());
                match exchange {
                    // Nobody else reads it any more.
                    Exchange::ReduceScatter => {
                        let bytes: &[u8] = bytemuck::cast_slice(part.span.floats());
                        return Ok(device.upload(buffer, result.start, &bytes[here])?);
                    }
                    Exchange::AllReduce => {
                        device.upload_with(buffer, range, |out| taken = shared.take(&part, out))?;
                    }
                    Exchange::AllGather => {
                        device.upload_with(buffer, range, |out| taken = shared.take_slices(&part, out))?;
                    }
                }
                taken?;
                self.note_taken(sequence, part.span)
            }
            (Data::Shared(_), None) => Err(CollectiveError::Ended),
        }
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        short("gather", &mine)?;
        self.begin("gather", mine.len(), Job::Gather(vec![mine]))?;
        match self.finish()?.job {
            Job::Gather(all) => Ok(all),
            _ => Err(CollectiveError::Ended),
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
