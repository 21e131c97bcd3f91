//! The GPUs that add up together.

use super::super::lane::{Lane, Mark};
use super::super::{CudaError, Gpu, Memory};
use super::library::{Config, FLOAT32, Handle, Library, SUCCESS, SUM, Status, UniqueId};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::mpsc::{RecvTimeoutError, channel};
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
#[derive(Debug)]
pub struct Communicator {
    library: &'static Library,
    /// Null once it is given back.
    handle: Handle,
    lane: Lane,
    /// Ends of sums that nothing waits for yet.
    sums: VecDeque<Mark>,
    has_failed: bool,
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
        let mut joined = Communicator { library, handle, lane, sums: VecDeque::new(), has_failed: false };
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

    fn checked(&mut self, status: Status, action: &str) -> Result<bool, CudaError> {
        let result = self.library.check(status, self.handle, action);
        self.has_failed |= result.is_err();
        result
    }

    /// Begins to replace floats by their sums over all GPUs, when what was begun on this GPU before has ended. To be followed by
    /// [`Communicator::sum_is_begun`] when it [is ready](Communicator::is_ready).
    ///
    /// # Errors
    /// What the library refuses.
    pub fn begin_sum(&mut self, floats: Memory) -> Result<(), CudaError> {
        self.lane.follow()?;
        let (at, count) = (floats.address as *mut c_void, floats.bytes / size_of::<f32>());
        let stream = self.lane.stream().cu_stream().cast();
        // SAFETY: a memory lives as long as its GPU, whose queue ends before it, and it is that long.
        let status = unsafe { (self.library.all_reduce)(at, at, count, FLOAT32, SUM, self.handle, stream) };
        self.checked(status, &format!("sum up {count} floats")).map(drop)
    }

    /// Marks the end of the sum that was begun last.
    ///
    /// # Errors
    /// The driver's.
    pub fn sum_is_begun(&mut self) -> Result<(), CudaError> {
        let end = self.lane.mark()?;
        self.sums.push_back(end);
        Ok(())
    }

    /// What the GPU computes from now on finds the first of the sums that were begun and not waited for. Nobody waits here.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there is none.
    pub fn wait_for_sum(&mut self) -> Result<(), CudaError> {
        let Some(end) = self.sums.pop_front() else { panic!("a sum is waited for that was not begun") };
        self.lane.lead(end)
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

    /// Ends all sums that are under way, whatever is in the memory then. There are no more.
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

    /// Gives the handle back by a call that may wait for a GPU or a process that is gone: no longer than a limit.
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
            let _: Result<(), RecvTimeoutError> = is_done.recv_timeout(RELEASE);
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.handle.is_null() {
            return;
        }
        let is_well = !self.has_failed && !std::thread::panicking() && self.lane.bind().is_ok();
        match is_well && self.leave() {
            true => self.release(self.library.destroy),
            false => self.abort(),
        }
    }
}
