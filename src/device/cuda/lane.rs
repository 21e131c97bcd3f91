//! A second queue of a GPU beside the one that computes, and marks at which one waits for the other.

use super::{CudaError, Gpu, Memory, PreparedKernel};
use cudarc::driver::result::{self, DriverError, stream};
use cudarc::driver::{CudaEvent, CudaStream};
use std::fmt;
use std::sync::Arc;

fn cannot(action: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |source| CudaError::Driver { action: action.into(), source }
}

/// A place in a queue: all that was begun there before it.
pub struct Mark(CudaEvent);

/// A queue beside that of a [`Gpu`]: neither waits for the other unless it is told to.
pub struct Lane {
    compute: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    /// Marks that nobody looks at any more.
    spare: Vec<Mark>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lane")
    }
}

impl Lane {
    /// An empty queue. Where both have something to begin, this one's goes first: what it does for others is short beside what is computed,
    /// and they wait for it.
    ///
    /// # Errors
    /// The driver's.
    pub fn beside(gpu: &Gpu) -> Result<Lane, CudaError> {
        let compute = Arc::clone(gpu.stream());
        compute.context().bind_to_thread().map_err(cannot("use the GPU on this thread"))?;
        let (_, highest) = stream::get_priority_range().map_err(cannot("tell the priorities of streams"))?;
        let stream = compute.context().new_stream_with_priority(highest).map_err(cannot("make a stream"))?;
        Ok(Lane { compute, stream, spare: Vec::new() })
    }

    /// The queue, for libraries.
    pub(super) fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// Begins a kernel here.
    ///
    /// # Errors
    /// A launch that the driver refuses.
    ///
    /// # Safety
    /// As [`Gpu::begin`].
    pub(super) unsafe fn begin(&self, kernel: &PreparedKernel) -> Result<(), CudaError> {
        // SAFETY: the caller vouches for it.
        unsafe { kernel.launch(self.stream.cu_stream()) }
            .map_err(|source| CudaError::Driver { action: format!("launch {kernel}"), source })
    }

    /// Copies one memory to another of the same size here.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the sizes differ.
    pub(super) fn copy(&self, from: Memory, to: Memory) -> Result<(), CudaError> {
        assert_eq!(from.bytes, to.bytes);
        // SAFETY: both sides are that long.
        unsafe { result::memcpy_dtod_async(to.address, from.address, from.bytes, self.stream.cu_stream()) }
            .map_err(cannot("copy on the GPU"))
    }

    /// Lets this thread use the GPU.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().map_err(cannot("use the GPU on this thread"))
    }

    /// What is begun here from now on waits for all that was begun where the GPU computes.
    ///
    /// # Errors
    /// The driver's.
    pub fn follow(&mut self) -> Result<(), CudaError> {
        let mark = self.compute_mark()?;
        self.stream.wait(&mark.0).map_err(cannot("wait for an event"))?;
        // The wait is for what was recorded when it was asked for.
        self.spare.push(mark);
        Ok(())
    }

    /// What the GPU computes from now on waits for what was begun here before `mark`.
    ///
    /// # Errors
    /// The driver's.
    pub fn lead(&mut self, mark: Mark) -> Result<(), CudaError> {
        self.compute.wait(&mark.0).map_err(cannot("wait for an event"))?;
        self.spare.push(mark);
        Ok(())
    }

    /// Marks what was begun here so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn mark(&mut self) -> Result<Mark, CudaError> {
        let mark = self.unused()?;
        mark.0.record(&self.stream).map_err(cannot("record an event"))?;
        Ok(mark)
    }

    /// Marks what was begun where the GPU computes.
    ///
    /// # Errors
    /// The driver's.
    pub fn compute_mark(&mut self) -> Result<Mark, CudaError> {
        let mark = self.unused()?;
        mark.0.record(&self.compute).map_err(cannot("record an event"))?;
        Ok(mark)
    }

    /// Takes back a mark that nobody looks at any more.
    pub fn reuse(&mut self, mark: Mark) {
        self.spare.push(mark);
    }

    fn unused(&mut self) -> Result<Mark, CudaError> {
        let made = || self.stream.context().new_event(None).map(Mark).map_err(cannot("make an event"));
        self.spare.pop().map_or_else(made, Ok)
    }

    /// Whether all before a mark has ended. Nobody waits.
    ///
    /// # Errors
    /// What a kernel did wrong.
    pub fn is_over(&self, mark: &Mark) -> Result<bool, CudaError> {
        self.bind()?;
        mark.0.try_is_complete().map_err(cannot("finish what was begun"))
    }
}
