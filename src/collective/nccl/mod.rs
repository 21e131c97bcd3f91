//! Ranks with a GPU each, which add up between the GPUs where all have NCCL.
//!
//! The [host's collective](Host) does the rest: small messages, and finding out who is missing. NCCL itself would wait for a rank that never
//! comes for ever, and its errors name nobody. So its communicator is one whose calls return at once, every wait is a look at it that is
//! repeated until a deadline, and meanwhile the host's connections show who is gone. Before a step's results are read, the ranks call each
//! other on the host while their GPUs still compute ([`Collective::settle`]): a rank that does not come is named as it is on host memory.
//!
//! Sums that are captured in a CUDA graph are begun without any call of this room but one, which marks the graph's end. Where a rank's capture
//! fails, all meet again under a new communicator, and go on without graphs. Graphs go before
//! their communicator: programs are dropped before the collective that they run with. Where sums have to be ended under a graph, NCCL is
//! told at once, and waited for when this is dropped.

mod agreement;
mod waits;

use super::host::Host;
use super::{Collective, CollectiveError, Exchange};
use crate::device::cuda::nccl::{self, Adding, Communicator, Stage};
use crate::device::cuda::{Beacon, Cuda, CudaError, Mark, Memory};
use crate::device::{BufferId, Device, DeviceError};
use agreement::Agreed;
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};
use waits::Waits;

/// How often is looked whether a rank has hung up.
const LOOK: Duration = Duration::from_millis(100);
/// How long after NCCL's word that something is wrong a rank's connection may break that is the reason.
const NEWS: Duration = Duration::from_secs(1);
/// What a step waits for.
const SUMS: &str = "sums between GPUs";
/// For so long nothing is done between two looks at NCCL, and later this.
const BUSY: Duration = Duration::from_millis(1);
const PAUSE: Duration = Duration::from_micros(50);

/// The collective of ranks that have a GPU each.
#[derive(Debug)]
pub struct Nccl {
    /// None where sums go through the host. Dropped before the host, whose end the others take for this rank's.
    communicator: Option<Communicator>,
    host: Host,
    notice: Option<String>,
    patience: Duration,
    adding: Adding,
    /// Memory for sums, and how many floats they may have.
    scratch: Option<(Memory, usize)>,
    /// Number of the step that was begun last …
    step: u64,
    /// … and whether what is begun belongs to it.
    is_in_step: bool,
    /// Ends of the steps that were noted and not settled, with their numbers.
    noted: VecDeque<(u64, Mark)>,
    /// How long the GPU computed for the last one that was settled.
    own_time: Option<Duration>,
    waits: Waits,
    /// Tells where the GPU is, if it has kernels.
    beacon: Option<Beacon>,
}

impl Nccl {
    /// Ranks that have met; they add up over the host as long as they have not [joined their GPUs](Nccl::join_gpus).
    pub fn over(host: Host, patience: Duration) -> Nccl {
        Nccl {
            communicator: None,
            host,
            notice: None,
            patience,
            adding: Adding::Tree,
            scratch: None,
            step: 0,
            is_in_step: false,
            noted: VecDeque::new(),
            own_time: None,
            waits: Waits::default(),
            beacon: None,
        }
    }

    /// Lets the GPUs add up, if all ranks have one and a library for it, or leaves a [notice](Nccl::notice). All ranks call it.
    ///
    /// # Errors
    /// A rank that does not take part, or GPUs that do not find each other.
    pub fn join_gpus(&mut self, device: &mut Device) -> Result<(), CollectiveError> {
        let Device::Cuda(cuda) = device else { return Ok(()) };
        let id = match agreement::agree(&mut self.host)? {
            Agreed::Join(id) => id,
            Agreed::Apart(reason) => {
                self.notice =
                    Some(format!("gradients are summed through the memory of the host, which is slow: {reason}"));
                return Ok(());
            }
        };
        let (rank, size) = (self.host.rank(), self.host.world_size());
        let joined = Communicator::join(cuda.gpu(), id, rank, size);
        self.communicator = Some(self.unless_lost(joined)?);
        if self.beacon.is_none() {
            self.beacon = Beacon::new(cuda.gpu_mut()).map_err(device_error)?;
        }
        self.until("the GPUs' meeting", Communicator::is_ready)
    }

    /// Why the GPUs do not add up, for the log.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// The ranks on the host.
    pub fn host(&mut self) -> &mut Host {
        &mut self.host
    }

    fn gpus(&mut self) -> Result<&mut Communicator, CollectiveError> {
        self.communicator.as_mut().filter(|gpus| !gpus.is_ended()).ok_or(CollectiveError::Ended)
    }

    /// Whether sums go through the host.
    fn is_by_host(&self) -> bool {
        self.communicator.is_none()
    }

    /// Looks until something `is_over`, a rank is gone, or the deadline has passed. After an error there are no more sums.
    fn until(
        &mut self,
        operation: &str,
        is_over: impl FnMut(&mut Communicator) -> Result<bool, CudaError>,
    ) -> Result<(), CollectiveError> {
        let result = self.look_until(operation, is_over);
        if result.is_err() {
            self.end();
        }
        result
    }

    fn look_until(
        &mut self,
        operation: &str,
        mut is_over: impl FnMut(&mut Communicator) -> Result<bool, CudaError>,
    ) -> Result<(), CollectiveError> {
        let start = Instant::now();
        let mut looked = start;
        loop {
            match is_over(self.gpus()?) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(self.reason_of(error)),
            }
            if looked.elapsed() >= LOOK {
                self.host.look()?;
                looked = Instant::now();
            }
            if start.elapsed() >= self.patience {
                return Err(self.who_is_late(operation));
            }
            pause(start);
        }
    }

    fn unless_lost<T>(&mut self, result: Result<T, CudaError>) -> Result<T, CollectiveError> {
        result.map_err(|error| {
            let reason = self.reason_of(error);
            self.end();
            reason
        })
    }

    /// What NCCL or the GPU says is wrong, unless a rank is gone: then that is why.
    fn reason_of(&mut self, error: CudaError) -> CollectiveError {
        let start = Instant::now();
        while start.elapsed() < NEWS {
            if let Err(lost) = self.host.look() {
                return lost;
            }
            std::thread::sleep(LOOK / 2);
        }
        device_error(error)
    }

    /// Who does not answer a call either: ranks that wait for the same come to it within the same deadline.
    fn who_is_late(&mut self, operation: &str) -> CollectiveError {
        let place = self.beacon.as_ref().and_then(Beacon::place).filter(|_| operation == SUMS);
        let operation = &place.map_or(operation.to_string(), |place| self.waits.name(place));
        match self.host.barrier() {
            Err(CollectiveError::TimedOut { ranks, after, .. }) => {
                CollectiveError::TimedOut { ranks, operation: operation.into(), after }
            }
            Err(error) => error,
            Ok(()) => CollectiveError::Stuck(DeviceError::Cuda(nccl::stuck(operation, self.patience))),
        }
    }

    /// Ends what the GPUs have under way.
    fn end(&mut self) {
        if let Some(communicator) = &mut self.communicator {
            communicator.abort();
        }
    }

    /// Begins a sum, stage by stage.
    fn begin_sum(
        &mut self,
        exchange: Exchange,
        cuda: &mut Cuda,
        floats: Memory,
        stages: &[Stage],
    ) -> Result<(), CollectiveError> {
        let Some((scratch, _)) = self.scratch else { panic!("a sum before `reserve`") };
        for stage in stages {
            let begun = self.gpus()?.begin(*stage, cuda.gpu_mut(), floats, scratch);
            self.unless_lost(begun)?;
            self.until(exchange.name(), Communicator::is_ready)?;
        }
        self.gpus()?.is_begun(floats).map_err(device_error)
    }

    fn begin_gather(&mut self, memory: Memory) -> Result<(), CollectiveError> {
        let begun = self.gpus()?.begin_gather(memory);
        self.unless_lost(begun)?;
        self.until(Exchange::AllGather.name(), Communicator::is_ready)?;
        self.gpus()?.is_begun(memory).map_err(device_error)
    }

    /// Lets the GPU wait for what was begun with that memory, and tell so if that is part of a step.
    fn let_gpu_wait(&mut self, exchange: Exchange, memory: Memory) -> Result<(), CollectiveError> {
        if !self.is_in_step {
            return self.gpus()?.wait_for(memory).map_err(device_error);
        }
        self.waits.note(exchange);
        self.tell(Beacon::waits)?;
        self.gpus()?.wait_for(memory).map_err(device_error)?;
        self.tell(Beacon::has_sum)
    }

    fn tell(&self, what: impl Fn(&Beacon) -> Result<(), CudaError>) -> Result<(), CollectiveError> {
        self.beacon.as_ref().map_or(Ok(()), what).map_err(device_error)
    }

    /// Waits for what is before `mark`.
    fn settle_until(&mut self, mark: &Mark) -> Result<(), CollectiveError> {
        self.host.call_all()?;
        let start = Instant::now();
        // The host's deadline ends this.
        while !self.host.all_are_here()? {
            pause(start);
        }
        self.look_until(SUMS, |gpus| gpus.is_over(mark))
    }
}

/// Between two looks at something that began at `start`.
fn pause(start: Instant) {
    if start.elapsed() < BUSY {
        std::thread::yield_now();
    } else {
        std::thread::sleep(PAUSE);
    }
}

fn device_error(error: CudaError) -> CollectiveError {
    CollectiveError::Device(DeviceError::Cuda(error))
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn reserve(&mut self, device: &mut Device, longest: usize) -> Result<(), CollectiveError> {
        let is_there = self.scratch.is_some_and(|(_, floats)| longest <= floats);
        if is_there || self.is_by_host() {
            return Ok(());
        }
        let bytes = self.adding.scratch(longest, self.world_size());
        let buffer = device.allocate(bytes)?;
        if let Device::Cuda(cuda) = device {
            self.scratch = Some((cuda.whole(buffer), longest));
        }
        Ok(())
    }

    fn start(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        match device {
            Device::Cuda(cuda) if !self.is_by_host() => {
                let memory = cuda.bytes(buffer, &exchange.in_bytes(&range));
                match exchange {
                    Exchange::AllReduce => self.begin_sum(exchange, cuda, memory, self.adding.stages()),
                    Exchange::ReduceScatter => self.begin_sum(exchange, cuda, memory, self.adding.stages_for_slices()),
                    Exchange::AllGather => self.begin_gather(memory),
                }
            }
            device => self.host.start(exchange, device, buffer, range),
        }
    }

    fn wait(
        &mut self,
        exchange: Exchange,
        device: &mut Device,
        buffer: BufferId,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        match device {
            Device::Cuda(cuda) if !self.is_by_host() => {
                self.let_gpu_wait(exchange, cuda.bytes(buffer, &exchange.in_bytes(&range)))
            }
            device => self.host.wait(exchange, device, buffer, range),
        }
    }

    fn needs_the_host(&self) -> bool {
        self.is_by_host()
    }

    fn all_gather(&mut self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.host.all_gather(mine)
    }

    fn begin_step(&mut self, device: &mut Device, step: u64) -> Result<(), CollectiveError> {
        self.step = step;
        self.is_in_step = true;
        self.waits.begin();
        match (&mut self.beacon, device) {
            (Some(beacon), Device::Cuda(cuda)) => beacon.begin(cuda.gpu_mut(), step).map_err(device_error),
            _ => Ok(()),
        }
    }

    fn note_sums(&mut self) -> Result<(), CollectiveError> {
        if !self.is_by_host() {
            if std::mem::take(&mut self.is_in_step) {
                self.tell(Beacon::end)?;
            }
            let end = self.gpus()?.mark().map_err(device_error)?;
            self.noted.push_back((self.step, end));
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), CollectiveError> {
        let Some((step, mark)) = self.noted.pop_front() else { return Ok(()) };
        let settled = self.settle_until(&mark);
        match self.gpus() {
            Ok(gpus) if settled.is_ok() => gpus.forget(mark),
            _ => self.end(),
        }
        self.own_time = self.beacon.as_ref().map(|beacon| beacon.time(step));
        settled
    }

    fn own_time(&self) -> Option<Duration> {
        self.own_time
    }

    fn come_to_rest(&mut self) -> Result<(), CollectiveError> {
        let Some(last) = self.noted.pop_back() else { return Ok(()) };
        let rests = self.settle_until(&last.1);
        self.noted.push_back(last);
        if rests.is_err() {
            self.end();
        }
        rests
    }

    fn renew(&mut self, device: &mut Device) -> Result<(), CollectiveError> {
        // NCCL says of no error in a capture what it leaves behind; of ranks that have captured different numbers of sums neither.
        self.end();
        // The memory of the one is given back before the other takes its own.
        self.communicator = None;
        self.join_gpus(device)?;
        if self.communicator.is_none() {
            // From here on sums go through the host, which tells how long it works itself.
            (self.beacon, self.own_time) = (None, None);
            self.noted.clear();
        }
        Ok(())
    }

    fn choose(&mut self, adding: Adding) -> bool {
        self.adding = adding;
        !self.is_by_host() || self.host.choose(adding)
    }

    fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
        self.host.set_patience(patience);
    }
}
