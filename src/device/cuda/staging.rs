//! Host memory that a GPU copies from and to by itself while the host does other things.

use super::{CudaError, Gpu, Memory};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaEvent, CudaStream};
use std::ops::Range;
use std::sync::Arc;

fn cannot(action: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |source| CudaError::Driver { action: action.into(), source }
}

/// Words of page-locked memory: from other memory the driver would first copy by itself, and keep the host waiting meanwhile.
pub(super) struct Staging {
    start: *mut u32,
    len: usize,
    stream: Arc<CudaStream>,
    /// Stands after the last copy that was begun.
    copied: CudaEvent,
}

// SAFETY: it owns its words, and the driver's handles belong to the context, not to a thread.
unsafe impl Send for Staging {}

impl Staging {
    /// `len` zeros.
    ///
    /// # Errors
    /// Too little memory that can be locked.
    pub fn new(gpu: &Gpu, len: usize) -> Result<Staging, CudaError> {
        let stream = Arc::clone(gpu.stream());
        let context = stream.context();
        context.bind_to_thread().map_err(cannot("use the GPU on this thread"))?;
        let copied = context.new_event(None).map_err(cannot("make an event"))?;
        // SAFETY: the size is not zero.
        let start = unsafe { result::malloc_host(len.max(1) * size_of::<u32>(), 0) };
        let start: *mut u32 = start.map_err(cannot("lock memory of the host"))?.cast();
        // SAFETY: there are that many words, aligned to a page.
        unsafe { start.write_bytes(0, len) };
        Ok(Staging { start, len, stream, copied })
    }

    /// The words, when no copy of them is under way.
    ///
    /// # Errors
    /// What the GPU did wrong before the end of the copy.
    pub fn words(&mut self) -> Result<&mut [u32], CudaError> {
        self.settle()?;
        // SAFETY: the words are initialised, nothing copies them, and they are borrowed with `self`, which a copy needs too.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start, self.len) })
    }

    fn settle(&self) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().map_err(cannot("use the GPU on this thread"))?;
        self.copied.synchronize().map_err(cannot("finish what was begun"))
    }

    /// Begins to copy the words from `first` on to a memory.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn begin_upload(&mut self, first: usize, to: Memory) -> Result<(), CudaError> {
        let words = self.place(first, to.bytes);
        // SAFETY: both sides are that long, and nobody has the words before the copy has ended; dropping waits for it.
        unsafe {
            let from = std::slice::from_raw_parts(self.start.add(words.start).cast::<u8>(), to.bytes);
            result::memcpy_htod_async(to.address, from, self.stream.cu_stream())
        }
        .map_err(cannot("copy to the GPU"))?;
        self.note()
    }

    /// Begins to copy a memory to the words from `first` on.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn begin_download(&mut self, from: Memory, first: usize) -> Result<(), CudaError> {
        let words = self.place(first, from.bytes);
        // SAFETY: as above.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.start.add(words.start).cast::<u8>(), from.bytes);
            result::memcpy_dtoh_async(to, from.address, self.stream.cu_stream())
        }
        .map_err(cannot("copy from the GPU"))?;
        self.note()
    }

    fn place(&self, first: usize, bytes: usize) -> Range<usize> {
        let end = first + bytes.div_ceil(size_of::<u32>());
        assert!(end <= self.len, "words {first} to {end} of {}", self.len);
        first..end
    }

    fn note(&self) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().map_err(cannot("use the GPU on this thread"))?;
        self.copied.record(&self.stream).map_err(cannot("record an event"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Where a copy failed the context is no more, and nothing copies.
        let _ = self.settle();
        // SAFETY: it was locked in `new`, and no copy is under way. What is not given back goes with the process.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}
