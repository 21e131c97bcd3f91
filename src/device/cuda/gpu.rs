//! One GPU through its driver: memory, the program's kernels, and how long they take.

use super::error::{BLOCK_MEMORY, LARGEST_GRID, OLDEST_DRIVER};
use super::{Argument, CudaError, Image, Launch, PreparedKernel};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdeviceptr, CUfunction, CUmodule};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;
use std::time::Duration;

/// How often something is timed.
const TIMES: usize = 3;
/// What takes less than this is timed several times in a row …
const LONG: Duration = Duration::from_millis(1);
/// … but no more often.
const MOST_RUNS: u32 = 20;

fn cannot(action: impl Into<String>) -> impl FnOnce(DriverError) -> CudaError {
    |source| CudaError::Driver { action: action.into(), source }
}

/// Memory of a [`Gpu`]; freed with it, or by [`Gpu::free`].
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// As kernels see it; a multiple of 256.
    pub address: u64,
    /// Its size.
    pub bytes: usize,
}

/// A kernel, and how much dynamic shared memory it has been allowed so far.
struct Function {
    handle: CUfunction,
    shared: usize,
}

/// A GPU with the kernels of this program, and a stream on which all happens in order.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// None where only libraries are used.
    module: Option<CUmodule>,
    functions: HashMap<String, Function>,
    /// Addresses of memory that has not been freed. A context may live on in a library, and its memory with it: it is freed here.
    allocated: RefCell<Vec<u64>>,
}

// SAFETY: the driver's handles belong to the context, not to a thread; every method binds the context to its thread first.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Number of GPUs of this machine.
    ///
    /// # Errors
    /// No driver.
    pub fn count() -> Result<usize, CudaError> {
        // SAFETY: it loads a library that has no requirements at loading.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let count = CudaContext::device_count().map_err(cannot("count the GPUs"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The GPU of that number.
    ///
    /// # Errors
    /// No driver, no GPU of that number, or one that the kernels are not for.
    pub fn open(ordinal: usize) -> Result<Gpu, CudaError> {
        let mut gpu = Gpu::without_kernels(ordinal)?;
        let image = Image::embedded().ok_or(CudaError::NoKernels)?;
        must_suit(ordinal, &gpu.context, image)?;
        // SAFETY: the image is a fatbin as nvcc wrote it, aligned, and lives as long as the program.
        let module = unsafe { result::module::load_data(image.fatbin.as_ptr().cast()) };
        gpu.module = Some(module.map_err(cannot(format!("load kernels for {}", image.architectures)))?);
        Ok(gpu)
    }

    /// The same for libraries alone, in a program that has no kernels: it launches none.
    ///
    /// # Errors
    /// No driver, or no GPU of that number.
    pub fn without_kernels(ordinal: usize) -> Result<Gpu, CudaError> {
        // SAFETY: it loads a library that has no requirements at loading.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let version = Gpu::driver()?;
        if version < OLDEST_DRIVER {
            return Err(CudaError::OldDriver(version));
        }
        let count = Gpu::count()?;
        if ordinal >= count {
            return Err(CudaError::TooFewGpus { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(cannot(format!("open GPU {ordinal}")))?;
        let stream = context.new_stream().map_err(cannot("make a stream"))?;
        let (functions, allocated) = (HashMap::new(), RefCell::default());
        Ok(Gpu { context, stream, module: None, functions, allocated })
    }

    /// Whether it has this program's kernels.
    pub(super) fn has_kernels(&self) -> bool {
        self.module.is_some()
    }

    /// Its driver's version: 1000·major + 10·minor of the newest CUDA that it knows.
    pub(super) fn driver() -> Result<i32, CudaError> {
        let mut version = 0;
        // SAFETY: the driver writes to a number that lives.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(cannot("tell its version"))?;
        Ok(version)
    }

    /// `NVIDIA H200`
    ///
    /// # Errors
    /// The driver's.
    pub fn name(&self) -> Result<String, CudaError> {
        self.context.name().map_err(cannot("tell the GPU's name"))
    }

    /// Major and minor.
    ///
    /// # Errors
    /// The driver's.
    pub fn compute_capability(&self) -> Result<(i32, i32), CudaError> {
        capability(&self.context)
    }

    /// The stream that all kernels and copies are on, for libraries.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(cannot("use the GPU on this thread"))
    }

    /// Takes memory; what is in it is undefined.
    ///
    /// # Errors
    /// Too little memory.
    pub fn allocate(&self, bytes: usize) -> Result<Memory, CudaError> {
        self.bind()?;
        // SAFETY: the size is not zero.
        let address = unsafe { result::malloc_sync(bytes.max(1)) };
        let address = address.map_err(cannot(format!("allocate {bytes} bytes")))?;
        self.allocated.borrow_mut().push(address);
        Ok(Memory { address, bytes })
    }

    /// Bytes of memory that are free, and all that there are.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_memory(&self) -> Result<[u64; 2], CudaError> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(cannot("tell how much memory is free"))?;
        Ok([free as u64, total as u64])
    }

    /// Gives memory back when what uses it has ended.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    pub fn free(&self, memory: Memory) -> Result<(), CudaError> {
        self.synchronize()?;
        // SAFETY: it came from `allocate`, and nothing that runs uses it.
        unsafe { result::free_sync(memory.address as CUdeviceptr) }.map_err(cannot("free memory"))?;
        self.allocated.borrow_mut().retain(|address| *address != memory.address);
        Ok(())
    }

    /// Copies `bytes` to the beginning of a memory.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    ///
    /// # Panics
    /// If it is too small.
    pub fn upload(&self, memory: Memory, bytes: &[u8]) -> Result<(), CudaError> {
        assert!(bytes.len() <= memory.bytes, "{} bytes into {}", bytes.len(), memory.bytes);
        self.bind()?;
        // In the stream's order: the call without one may return before the bytes are there, and this stream would not wait for them.
        // SAFETY: both sides are that long, and the bytes live until the copy has ended.
        unsafe { result::memcpy_htod_async(memory.address as CUdeviceptr, bytes, self.stream.cu_stream()) }
            .map_err(cannot("copy to the GPU"))?;
        self.synchronize()
    }

    /// All bytes of a memory.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    pub fn download(&self, memory: Memory) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; memory.bytes];
        self.download_to(memory, &mut bytes)?;
        Ok(bytes)
    }

    /// The same into `bytes`.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    ///
    /// # Panics
    /// If they are not as many.
    pub fn download_to(&self, memory: Memory, bytes: &mut [u8]) -> Result<(), CudaError> {
        assert_eq!(bytes.len(), memory.bytes);
        self.synchronize()?;
        // SAFETY: both sides are that long.
        unsafe { result::memcpy_dtoh_sync(bytes, memory.address as CUdeviceptr) }.map_err(cannot("copy from the GPU"))
    }

    /// Fills a memory with zeros.
    ///
    /// # Errors
    /// The driver's.
    pub fn clear(&self, memory: Memory) -> Result<(), CudaError> {
        if memory.bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the memory is that long.
        unsafe { result::memset_d8_async(memory.address as CUdeviceptr, 0, memory.bytes, self.stream.cu_stream()) }
            .map_err(cannot("clear memory"))
    }

    /// Copies one memory to another of the same size.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn copy(&self, from: Memory, to: Memory) -> Result<(), CudaError> {
        assert_eq!(from.bytes, to.bytes);
        self.bind()?;
        // SAFETY: both sides are that long.
        unsafe { result::memcpy_dtod_async(to.address, from.address, from.bytes, self.stream.cu_stream()) }
            .map_err(cannot("copy on the GPU"))
    }

    /// Begins a launch whose buffers stand at the addresses that `address` gives.
    ///
    /// # Errors
    /// As [`Gpu::prepare`] and [`Gpu::begin`].
    ///
    /// # Panics
    /// As [`Gpu::prepare`].
    ///
    /// # Safety
    /// As [`Gpu::begin`].
    pub unsafe fn launch(&mut self, launch: &Launch, address: impl Fn(&Argument) -> u64) -> Result<(), CudaError> {
        let kernel = self.prepare(launch, address)?;
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.begin(&kernel) }
    }

    /// A launch whose buffers stand at the addresses that `address` gives.
    ///
    /// # Errors
    /// A kernel that is not there, that cannot have as much shared memory, or whose grid no card has: ops put images there.
    pub fn prepare(
        &mut self,
        launch: &Launch,
        address: impl Fn(&Argument) -> u64,
    ) -> Result<PreparedKernel, CudaError> {
        let Launch { kernel, grid, .. } = launch;
        if grid.iter().zip(LARGEST_GRID).any(|(blocks, most)| *blocks > most) {
            return Err(CudaError::LargeGrid { kernel: kernel.clone(), grid: *grid });
        }
        self.bind()?;
        let function = self.function(&launch.kernel, launch.shared)?;
        Ok(PreparedKernel::new(function, launch, address))
    }

    /// Begins a kernel.
    ///
    /// # Errors
    /// A launch that the driver refuses. What a kernel does wrong comes with a later call.
    ///
    /// # Safety
    /// The addresses that it was prepared with are those of memory of this GPU, as long as the launch makes of it, until it has ended.
    pub unsafe fn begin(&self, kernel: &PreparedKernel) -> Result<(), CudaError> {
        // SAFETY: the arguments are those that the op's `cuda.rs` says the kernel takes, copied by the driver before it returns.
        unsafe { kernel.launch(self.stream.cu_stream()) }
            .map_err(|source| CudaError::Driver { action: format!("launch {kernel}"), source })
    }

    fn function(&mut self, name: &str, shared: usize) -> Result<CUfunction, CudaError> {
        if !self.functions.contains_key(name) {
            let find = cannot(format!("find the kernel `{name}`"));
            let Ok(terminated) = CString::new(name) else {
                return Err(find(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)));
            };
            let module = self.module.ok_or(CudaError::NoKernels)?;
            // SAFETY: the module is loaded.
            let handle = unsafe { result::module::get_function(module, terminated) }.map_err(find)?;
            self.functions.insert(name.to_string(), Function { handle, shared: 0 });
        }
        let Some(function) = self.functions.get_mut(name) else { unreachable!("it has just been put there") };
        if shared > function.shared {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a module that is loaded.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared as i32) }
                .map_err(cannot(format!("give `{name}` {shared} bytes of shared memory")))?;
            function.shared = shared;
        }
        Ok(function.handle)
    }

    /// Returns when all that was begun has ended.
    ///
    /// # Errors
    /// What a kernel did wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        self.stream.synchronize().map_err(cannot("finish what was begun"))
    }

    /// Why nothing works on this GPU any more, if so. It waits for nothing, and may be asked during a capture.
    pub(super) fn lost(&self) -> Option<CudaError> {
        // "Note that this function may also return error codes from previous, asynchronous launches."
        self.stream.capture_status().err().map(cannot("go on"))
    }

    /// How long the GPU takes for what `work` begins, by its own clock.
    ///
    /// # Errors
    /// Those of `work`, and of what it begins.
    pub fn time(&mut self, work: impl FnOnce(&mut Gpu) -> Result<(), CudaError>) -> Result<Duration, CudaError> {
        self.synchronize()?;
        let start = self.tick()?;
        work(self)?;
        start.until(&self.tick()?)
    }

    /// How long the GPU takes for `work` where it is begun again and again; a median. The time that the host takes to begin it, which is more
    /// than many kernels take, is no part of it.
    ///
    /// # Errors
    /// Those of `work`, and of what it begins.
    pub fn median_time(&mut self, work: impl Fn() -> Result<(), CudaError>) -> Result<Duration, CudaError> {
        let once = self.time(|_| work())?;
        let runs = (LONG.as_nanos() / once.as_nanos().max(1)).clamp(1, MOST_RUNS.into()) as u32;
        let time = |_| Ok(self.time(|_| (0..runs).try_for_each(|_| work()))? / runs);
        let mut times = (0..TIMES).map(time).collect::<Result<Vec<Duration>, CudaError>>()?;
        times.sort();
        Ok(times[TIMES / 2])
    }

    /// The moment when all that was begun has ended.
    ///
    /// # Errors
    /// The driver's.
    pub fn tick(&self) -> Result<Tick, CudaError> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(flags).map(Tick).map_err(cannot("record an event"))
    }
}

/// A moment by a GPU's clock.
#[derive(Debug)]
pub struct Tick(CudaEvent);

impl Tick {
    /// Time from here to a later one, which is waited for.
    ///
    /// # Errors
    /// What the GPU did wrong until then.
    pub fn until(&self, later: &Tick) -> Result<Duration, CudaError> {
        let milliseconds = self.0.elapsed_ms(&later.0).map_err(cannot("finish what was begun"))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

fn capability(context: &CudaContext) -> Result<(i32, i32), CudaError> {
    context.compute_capability().map_err(cannot("tell the GPU's compute capability"))
}

/// Refuses a card before it is asked to load kernels, which its driver would refuse in fewer words, or later.
fn must_suit(ordinal: usize, context: &CudaContext, image: Image) -> Result<(), CudaError> {
    let name = || context.name().map_err(cannot("tell the GPU's name"));
    let found = capability(context)?;
    if let Some(oldest) = image.oldest().filter(|oldest| found < *oldest) {
        return Err(CudaError::OldCard { ordinal, name: name()?, found, oldest, architectures: image.architectures });
    }
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let found = context.attribute(attribute).map_err(cannot("tell how much shared memory a block can have"))? as usize;
    if found < BLOCK_MEMORY {
        return Err(CudaError::SmallCard { ordinal, name: name()?, found });
    }
    Ok(())
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A context that has failed takes no call any more; all that it has goes with the process.
        if self.synchronize().is_err() {
            return;
        }
        for address in self.allocated.take() {
            // SAFETY: it came from `allocate`, and nothing that runs uses it. Nobody could do anything about a failure.
            let _ = unsafe { result::free_sync(address as CUdeviceptr) };
        }
        if let Some(module) = self.module {
            // SAFETY: nothing of it runs any more. As above.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
