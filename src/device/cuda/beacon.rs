//! `kernels/beacon.cu`: where the GPU is in a step, told to the host while the step runs, and how long it computed for it.
//!
//! The host sees nothing of what a CUDA graph does. So kernels of one thread stand in it, and in what is begun one by one, before and after
//! each wait for a sum between GPUs; they write to page-locked memory, which the host reads whenever it wants.

use super::{Argument, CudaError, Gpu, Launch, Memory, PreparedKernel};
use cudarc::driver::CudaStream;
use cudarc::driver::result::{self, DriverError};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

fn cannot(action: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |source| CudaError::Driver { action: action.into(), source }
}

/// Numbers that the kernel keeps, and that it tells: a place, and the times of the last steps.
const STATE: usize = 4;
const KEPT: usize = 4;
const TOLD: usize = 1 + KEPT;
/// A place is a step's number times this, and how far the GPU is in it.
const PLACES: u64 = 1 << 16;

/// What the kernel is told.
#[derive(Clone, Copy)]
enum What {
    Step,
    Waits,
    HasSum,
    Done,
}

/// Where a GPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the step.
    pub step: u64,
    /// How far it is.
    pub at: At,
}

/// How far a GPU is in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// It computes, after so many waits.
    Computes(usize),
    /// It waits for a sum of that number, from 0.
    Waits(usize),
    /// It has done the step.
    End,
}

/// What tells the host where the GPU is.
pub struct Beacon {
    stream: Arc<CudaStream>,
    state: Memory,
    told: *mut u64,
    waits: PreparedKernel,
    has_sum: PreparedKernel,
    done: PreparedKernel,
}

// SAFETY: it owns its words, and the driver's handles belong to the context, not to a thread.
unsafe impl Send for Beacon {}

impl fmt::Debug for Beacon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Beacon")
    }
}

impl Beacon {
    /// For what is begun on the GPU's stream; nothing where there are no kernels.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(gpu: &mut Gpu) -> Result<Option<Beacon>, CudaError> {
        if !gpu.has_kernels() {
            return Ok(None);
        }
        let state = gpu.allocate(STATE * size_of::<u64>())?;
        gpu.clear(state)?;
        // SAFETY: the size is not zero.
        let told = unsafe { result::malloc_host(TOLD * size_of::<u64>(), 0) };
        let told: *mut u64 = told.map_err(cannot("lock memory of the host"))?.cast();
        // SAFETY: there are that many words, aligned to a page.
        unsafe { told.write_bytes(0, TOLD) };
        let mut kernel = |what| prepare(gpu, [state.address, told as u64], 0, what);
        let (waits, has_sum, done) = (kernel(What::Waits)?, kernel(What::HasSum)?, kernel(What::Done)?);
        Ok(Some(Beacon { stream: Arc::clone(gpu.stream()), state, told, waits, has_sum, done }))
    }

    /// From here on the GPU is in step `step`.
    ///
    /// # Errors
    /// The driver's.
    pub fn begin(&mut self, gpu: &mut Gpu, step: u64) -> Result<(), CudaError> {
        let kernel = prepare(gpu, [self.state.address, self.told as u64], step, What::Step)?;
        self.launch(&kernel)
    }

    /// From here on it waits for the next sum …
    ///
    /// # Errors
    /// The driver's.
    pub fn waits(&self) -> Result<(), CudaError> {
        self.launch(&self.waits)
    }

    /// … and from here on it has that.
    ///
    /// # Errors
    /// The driver's.
    pub fn has_sum(&self) -> Result<(), CudaError> {
        self.launch(&self.has_sum)
    }

    /// Here the step ends.
    ///
    /// # Errors
    /// The driver's.
    pub fn end(&self) -> Result<(), CudaError> {
        self.launch(&self.done)
    }

    /// Where the GPU is, if it has begun a step.
    pub fn place(&self) -> Option<Place> {
        let told = self.told(0);
        let (step, at) = (told / PLACES, (told % PLACES) as usize);
        let at = match at {
            0xFFFF => At::End,
            at if at % 2 == 1 => At::Waits(at / 2),
            at => At::Computes(at / 2),
        };
        (told > 0).then_some(Place { step, at })
    }

    /// How long the GPU computed for one of the last four steps, which has ended: what it waited for sums is left out.
    pub fn time(&self, step: u64) -> Duration {
        Duration::from_nanos(self.told(1 + (step % KEPT as u64) as usize))
    }

    fn told(&self, number: usize) -> u64 {
        // SAFETY: there are that many words, which a GPU may write meanwhile, each at once.
        unsafe { self.told.add(number).read_volatile() }
    }

    fn launch(&self, kernel: &PreparedKernel) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().map_err(cannot("use the GPU on this thread"))?;
        // SAFETY: the arguments are the kernel's; the state lives as long as the GPU, the words as long as this, which outlives what is begun.
        unsafe { kernel.launch(self.stream.cu_stream()) }
            .map_err(|source| CudaError::Driver { action: format!("launch {kernel}"), source })
    }
}

fn prepare(gpu: &mut Gpu, [state, told]: [u64; 2], step: u64, what: What) -> Result<PreparedKernel, CudaError> {
    let arguments = vec![Argument::Output(0), Argument::Output(1), Argument::u64(step), Argument::u32(what as usize)];
    let launch = Launch { kernel: "beacon".into(), grid: [1; 3], block: [1; 3], shared: 0, arguments };
    // Page-locked memory has one address for the host and for GPUs ("Unified Addressing").
    gpu.prepare(&launch, |argument| if *argument == Argument::Output(0) { state } else { told })
}

impl Drop for Beacon {
    fn drop(&mut self) {
        let bound = self.stream.context().bind_to_thread();
        if bound.and_then(|()| self.stream.synchronize()).is_ok() {
            // SAFETY: it was locked in `new`, and nothing writes to it any more. What is not given back goes with the process.
            let _ = unsafe { result::free_host(self.told.cast()) };
        }
    }
}
