//! One GPU through its driver: memory, the program's kernels, and how long they take.

use super::{Argument, Image, Launch};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdeviceptr, CUfunction, CUmodule};
use cudarc::driver::{CudaContext, CudaStream};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::time::Duration;

/// The driver of CUDA 13.0, as `cuDriverGetVersion` has it: what nvcc 13 compiles needs it.
const OLDEST_DRIVER: i32 = 13_000;

/// What keeps a GPU from working.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// Neither a GPU nor a driver, or a container that was not given them.
    #[error(
        "there is no CUDA driver here (libcuda.so.1): install NVIDIA's driver, or start the container with --gpus all"
    )]
    NoDriver,
    /// `cuDriverGetVersion`, 1000·major + 10·minor.
    #[error("the driver is for CUDA {}.{}, and {}.{} or later is needed: update it", .0 / 1000, .0 % 1000 / 10, OLDEST_DRIVER / 1000, OLDEST_DRIVER % 1000 / 10)]
    OldDriver(i32),
    /// See [`Image::embedded`].
    #[error("this program has no CUDA kernels, as there was no nvcc where it was built")]
    NoKernels,
    /// The driver refused something.
    #[error("CUDA cannot {action}: {source}")]
    Driver {
        /// What was asked for.
        action: String,
        /// Why not.
        source: DriverError,
    },
    /// A library of NVIDIA's that is nowhere.
    #[error(
        "there is no {library} here ({file}, looked for in LD_LIBRARY_PATH and where the system has its libraries): {install}"
    )]
    NoLibrary {
        /// `cuDNN 9`
        library: &'static str,
        /// Its file.
        file: &'static str,
        /// What to do.
        install: &'static str,
    },
    /// A library of a version that this program does not know.
    #[error("this is {library} {found}, and {needed} is needed: {install}")]
    WrongLibrary {
        /// `cuDNN`
        library: &'static str,
        /// Version, or what is missing in it.
        found: String,
        /// Versions.
        needed: &'static str,
        /// What to do.
        install: &'static str,
    },
    /// A library refused something.
    #[error("{library} cannot {action}: {status}{}{said}", if said.is_empty() { "" } else { "; " })]
    Library {
        /// With its version.
        library: String,
        /// What was asked for.
        action: String,
        /// Number and name of its status.
        status: String,
        /// What it says further; may be empty.
        said: String,
    },
    /// Nothing that a library offers may be used.
    #[error("{library} has nothing for the {what} that this program accepts: {}", refusals.join("; "))]
    NoPlan {
        /// With its version.
        library: String,
        /// Sizes.
        what: String,
        /// Why each was refused.
        refusals: Vec<String>,
    },
    /// A choice made elsewhere that does not hold here.
    #[error("a plan for the {what} was chosen by {chosen_by}, and this is {here}: choose again")]
    OtherPlan {
        /// Sizes.
        what: String,
        /// Library and GPU.
        chosen_by: String,
        /// Library and GPU.
        here: String,
    },
}

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
}

// SAFETY: the driver's handles belong to the context, not to a thread; every method binds the context to its thread first.
unsafe impl Send for Gpu {}

impl Gpu {
    /// The GPU of that number.
    ///
    /// # Errors
    /// No driver, no GPU of that number, or one that none of the kernels was compiled for.
    pub fn open(ordinal: usize) -> Result<Gpu, CudaError> {
        let mut gpu = Gpu::without_kernels(ordinal)?;
        let image = Image::embedded().ok_or(CudaError::NoKernels)?;
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
        let mut version = 0;
        // SAFETY: the driver writes to a number that lives.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(cannot("tell its version"))?;
        if version < OLDEST_DRIVER {
            return Err(CudaError::OldDriver(version));
        }
        let context = CudaContext::new(ordinal).map_err(cannot(format!("open GPU {ordinal}")))?;
        let stream = context.new_stream().map_err(cannot("make a stream"))?;
        Ok(Gpu { context, stream, module: None, functions: HashMap::new() })
    }

    /// `NVIDIA H200`
    ///
    /// # Errors
    /// The driver's.
    pub fn name(&self) -> Result<String, CudaError> {
        self.context.name().map_err(cannot("tell the GPU's name"))
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
        Ok(Memory { address: address.map_err(cannot(format!("allocate {bytes} bytes")))?, bytes })
    }

    /// Gives memory back when what uses it has ended.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    pub fn free(&self, memory: Memory) -> Result<(), CudaError> {
        self.synchronize()?;
        // SAFETY: it came from `allocate`, and nothing that runs uses it.
        unsafe { result::free_sync(memory.address as CUdeviceptr) }.map_err(cannot("free memory"))
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
        self.synchronize()?;
        let mut bytes = vec![0; memory.bytes];
        // SAFETY: both sides are that long.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, memory.address as CUdeviceptr) }
            .map_err(cannot("copy from the GPU"))?;
        Ok(bytes)
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
    /// A kernel that is not there, or a launch that the driver refuses. What a kernel does wrong comes with a later call.
    ///
    /// # Panics
    /// If the grid has more than 65535 blocks along y or z: ops put images there, and no card has room for so many.
    ///
    /// # Safety
    /// The addresses are those of memory of this GPU, as long as the launch makes of it, until it has ended.
    pub unsafe fn launch(&mut self, launch: &Launch, address: impl Fn(&Argument) -> u64) -> Result<(), CudaError> {
        self.bind()?;
        let function = self.function(&launch.kernel, launch.shared)?;
        let mut values: Vec<Vec<u8>> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Value(bytes) => bytes.clone(),
                Argument::Null => vec![0; size_of::<u64>()],
                buffer => address(buffer).to_ne_bytes().into(),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
        let [_, y, z] = launch.grid;
        assert!(y.max(z) <= 65_535, "{}: a grid of {:?}", launch.kernel, launch.grid);
        let [grid, block] = [launch.grid, launch.block].map(|[x, y, z]| (x as u32, y as u32, z as u32));
        // SAFETY: the arguments are those that the op's `cuda.rs` says the kernel takes, copied by the driver before it returns.
        unsafe {
            let (shared, stream) = (launch.shared as u32, self.stream.cu_stream());
            result::launch_kernel(function, grid, block, shared, stream, &mut pointers)
        }
        .map_err(cannot(format!("launch {} with grid {grid:?} of {block:?}", launch.kernel)))
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

    /// How long the GPU takes for what `work` begins, by its own clock.
    ///
    /// # Errors
    /// Those of `work`, and of what it begins.
    pub fn time(&mut self, work: impl FnOnce(&mut Gpu) -> Result<(), CudaError>) -> Result<Duration, CudaError> {
        self.synchronize()?;
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = self.stream.record_event(flags).map_err(cannot("record an event"))?;
        work(self)?;
        let end = self.stream.record_event(flags).map_err(cannot("record an event"))?;
        // It waits for the end.
        let milliseconds = start.elapsed_ms(&end).map_err(cannot("finish what was begun"))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let (Ok(()), Some(module)) = (self.synchronize(), self.module) {
            // SAFETY: nothing of it runs any more. Where it fails the context goes next, and the module with it.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
