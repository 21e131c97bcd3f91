//! The GPUs that add up together.

use super::super::lane::{Lane, Mark};
use super::super::{CudaError, Gpu, Memory};
use super::library::{Config, Handle, Library, SUCCESS, Status, UniqueId};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Length of what names a communicator.
pub const ID_BYTES: usize = 128;

/// How long the ranks may take to leave a communicator together.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the library may take to give its memory back.
const RELEASE: Duration = Duration::from_secs(5);
/// Between two looks at what is under way.
const PAUSE: Duration = Duration::from_micros(200);

/// This process's GPU among those that add up together, and the queue on which it does.
///
/// The library gives a communicator back only when no CUDA graph is left that has sums of it: what captures them is dropped before this.
#[derive(Debug)]
pub struct Communicator {
    pub(super) library: &'static Library,
    /// Null once it is given back.
    pub(super) handle: Handle,
    pub(super) lane: Lane,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// Ends of sums that nothing waits for yet, with their addresses.
    sums: Vec<(u64, Mark)>,
    has_failed: bool,
    /// Says when the handle has been given back.
    release: Option<Receiver<()>>,
}

impl std::fmt::Debug for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mark")
    }
}

// SAFETY: a communicator belongs to no thread; the library asks that one thread at a time uses it.
unsafe impl Send for Communicator {}

impl Communicator {
    /// A name for a communicator, for all that are to be in it.
    ///
    /// # Errors
    /// No library, or no network.
    pub fn new_id() -> Result<[u8; ID_BYTES], CudaError> {
        let library = Library::get()?;
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: it writes a name to a place that lives.
        let status = unsafe { (library.unique_id)(&mut id) };
        library.check(status, std::ptr::null_mut(), "name a communicator")?;
        Ok(id.0)
    }

    /// Begins to join the others, as number `rank` of `size`. It is done when [`Communicator::is_ready`].
    ///
    /// # Errors
    /// No library, or what it refuses.
    pub fn join(gpu: &Gpu, id: [u8; ID_BYTES], rank: usize, size: usize) -> Result<Communicator, CudaError> {
        let library = Library::get()?;
        let lane = Lane::beside(gpu)?;
        lane.bind()?;
        let (mut handle, mut config) = (std::ptr::null_mut(), Config::non_blocking());
        // SAFETY: the handle and the config live until it returns, and the config is that of the header.
        let status = unsafe { (library.init)(&mut handle, size as i32, UniqueId(id), rank as i32, &mut config) };
        let mut joined =
            Communicator { library, handle, lane, rank, size, sums: Vec::new(), has_failed: false, release: None };
        joined.checked(status, "join the other GPUs")?;
        Ok(joined)
    }

    /// Whether it takes another request; before, it does not.
    ///
    /// # Errors
    /// What has gone wrong since the last call, here or at another GPU.
    pub fn is_ready(&mut self) -> Result<bool, CudaError> {
        let mut state: Status = SUCCESS;
        // SAFETY: the communicator has not been given back, and the number lives.
        let status = unsafe { (self.library.async_error)(self.handle, &mut state) };
        let asked = self.checked(status, "tell how far it is")?;
        Ok(asked && self.checked(state, "sum up between the GPUs")?)
    }

    pub(super) fn checked(&mut self, status: Status, action: &str) -> Result<bool, CudaError> {
        let result = self.library.check(status, self.handle, action);
        self.has_failed |= result.is_err();
        result
    }

    /// Marks the end of the sum of these floats, which was begun last.
    ///
    /// # Errors
    /// The driver's.
    pub fn is_begun(&mut self, floats: Memory) -> Result<(), CudaError> {
        let end = self.lane.mark()?;
        // One that was never waited for belongs to a capture that failed.
        self.sums.retain(|(address, _)| *address != floats.address);
        self.sums.push((floats.address, end));
        Ok(())
    }

    /// What the GPU computes from now on finds the sum of these floats. Nobody waits here.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If it was not begun.
    pub fn wait_for(&mut self, floats: Memory) -> Result<(), CudaError> {
        let Some(place) = self.sums.iter().position(|(address, _)| *address == floats.address) else {
            panic!("a sum is waited for that was not begun")
        };
        self.lane.lead(self.sums.remove(place).1)
    }

    /// Marks all that was begun on the GPU so far, sums that were waited for among it.
    ///
    /// # Errors
    /// The driver's.
    pub fn mark(&mut self) -> Result<Mark, CudaError> {
        self.lane.compute_mark()
    }

    /// Whether all before a mark has ended.
    ///
    /// # Errors
    /// What a kernel did wrong, or a GPU between which it was summed.
    pub fn is_over(&mut self, mark: &Mark) -> Result<bool, CudaError> {
        Ok(self.is_ready()? && self.lane.is_over(mark)?)
    }

    /// Takes back a mark that nobody looks at any more.
    pub fn forget(&mut self, mark: Mark) {
        self.lane.reuse(mark);
    }

    /// Whether it has been [ended](Communicator::abort).
    pub fn is_ended(&self) -> bool {
        self.handle.is_null()
    }

    /// Ends all sums that are under way, whatever is in the memory then. There are no more. Nobody waits here for the library to be done.
    pub fn abort(&mut self) {
        self.release(self.library.abort);
    }

    /// Leaves the others when all do; gives whether they did.
    fn leave(&mut self) -> bool {
        let start = Instant::now();
        // SAFETY: the communicator is ready, as every sum is waited for to begin.
        let mut status = unsafe { (self.library.finalize)(self.handle) };
        loop {
            match self.checked(status, "leave the other GPUs").and_then(|_| self.is_ready()) {
                Ok(true) => return true,
                Ok(false) if start.elapsed() < FAREWELL => std::thread::sleep(PAUSE),
                Ok(false) | Err(_) => return false,
            }
            status = SUCCESS;
        }
    }

    /// Gives the handle back, on a thread of its own: the call waits for a GPU or a process that may be gone, and for CUDA graphs.
    fn release(&mut self, call: unsafe extern "C" fn(Handle) -> Status) {
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut()) as usize;
        if handle == 0 {
            return;
        }
        let (done, is_done) = channel();
        let release = move || {
            // SAFETY: nothing else has the handle any more.
            unsafe { call(handle as Handle) };
            // Nobody listens any more where it took too long.
            let _ = done.send(());
        };
        if std::thread::Builder::new().name("nccl-release".into()).spawn(release).is_ok() {
            self.release = Some(is_done);
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if !self.is_ended() {
            let is_well = !self.has_failed && !std::thread::panicking() && self.lane.bind().is_ok();
            match is_well && self.leave() {
                true => self.release(self.library.destroy),
                false => self.abort(),
            }
        }
        if let Some(is_done) = &self.release {
            // What is left after that goes with the process.
            let _ = is_done.recv_timeout(RELEASE);
        }
    }
}
