//! The device behind [`Device::Cuda`](crate::device::Device): buffers, libraries, and ops whose operands have addresses.

use super::blas::Blas;
use super::capture::Graphs;
use super::dnn::Dnn;
use super::plans::{Libraries, Plans};
use super::staging::Staging;
use super::{Capture, Card, CudaError, Gpu, Graph, Memory, Piece, PlanTable, versions};
use crate::device::{BufferId, DeviceError, Element, Slot, StagingId};
use std::ops::Range;

/// Bytes that libraries may use while they compute: the fast engines for f32 gradients of 128 pictures of 32×32 with 256 channels need 258 MiB.
pub const WORKSPACE: usize = 512 << 20;

/// A GPU with its libraries and buffers.
pub struct Cuda {
    name: String,
    pub(super) dnn: Dnn,
    pub(super) blas: Blas,
    pub(super) workspace: Memory,
    graphs: Graphs,
    pub(super) plans: Plans,
    pub(super) buffers: Vec<Memory>,
    stagings: Vec<Staging>,
    /// What kernels read beside their inputs; equal ones are there once.
    pub(super) constants: Vec<(Vec<u8>, Memory)>,
    /// The last to be dropped: the libraries' handles are destroyed while its context is there.
    pub(super) gpu: Gpu,
}

impl Cuda {
    /// The GPU of that number.
    ///
    /// # Errors
    /// No driver, GPU or library, or one that is too old; a `DDPM_DIST_CUDA_GRAPH` or `DDPM_DIST_CUDA_PLANS` that says nothing known.
    pub fn open(ordinal: usize) -> Result<Cuda, CudaError> {
        Cuda::with(Gpu::open(ordinal)?)
    }

    /// The same for copies, libraries and sums between GPUs alone, in a program that has no kernels.
    ///
    /// # Errors
    /// No driver, GPU or library, or one that is too old.
    pub fn without_kernels(ordinal: usize) -> Result<Cuda, CudaError> {
        Cuda::with(Gpu::without_kernels(ordinal)?)
    }

    fn with(gpu: Gpu) -> Result<Cuda, CudaError> {
        let graphs = Graphs::new()?;
        let workspace = gpu.allocate(WORKSPACE)?;
        let blas = Blas::open(gpu.stream().cu_stream(), workspace)?;
        let (name, dnn) = (gpu.name()?, Dnn::open(&gpu)?);
        let (capability, cudnn, cublaslt) = (gpu.compute_capability()?, dnn.version(), blas.version());
        let card = Card { gpu: name.clone(), capability, cudnn, cublaslt };
        let plans = Plans::of(card, WORKSPACE)?;
        let (buffers, stagings, constants) = (vec![], vec![], vec![]);
        Ok(Cuda { name, dnn, blas, workspace, graphs, plans, buffers, stagings, constants, gpu })
    }

    /// `NVIDIA H200, cuDNN 9.10.2`
    pub fn describe(&self) -> String {
        format!("{}, cuDNN {}", self.name, self.dnn.version())
    }

    /// `NVIDIA H200`
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of all buffers, and of what else is taken from the GPU's memory here.
    pub fn memory(&self) -> u64 {
        let constants = self.constants.iter().map(|(_, memory)| memory);
        self.buffers.iter().chain(constants).chain([&self.workspace]).map(|memory| memory.bytes as u64).sum()
    }

    /// What is to be said of a driver and of libraries that this program is not written for.
    ///
    /// # Errors
    /// The driver's.
    pub fn untested(&self) -> Result<Vec<String>, CudaError> {
        let driver = Gpu::driver()?;
        let driver = versions::DRIVER.warning(&format!("{}.{}", driver / 1000, driver % 1000 / 10));
        let libraries =
            [versions::CUDNN.warning(&self.dnn.version()), versions::CUBLASLT.warning(&self.blas.version())];
        Ok([driver].into_iter().chain(libraries).flatten().collect())
    }

    /// What it computes on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The same, for kernels that are none of a program's.
    pub fn gpu_mut(&mut self) -> &mut Gpu {
        &mut self.gpu
    }

    /// Allocates a zeroed buffer.
    ///
    /// # Errors
    /// Too little memory.
    pub fn allocate(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        let memory = self.gpu.allocate(bytes).map_err(|error| match error.is_out_of_memory() {
            true => DeviceError::OutOfMemory { device: "the GPU".into(), bytes },
            false => error.into(),
        })?;
        self.gpu.clear(memory)?;
        self.buffers.push(memory);
        Ok(BufferId(self.buffers.len() - 1))
    }

    /// A range of a buffer.
    ///
    /// # Panics
    /// If it lies outside.
    fn part<T: Element>(&self, buffer: BufferId, offset: usize, len: usize) -> Memory {
        let memory = self.buffers[buffer.0];
        let (first, bytes) = (offset * size_of::<T>(), len * size_of::<T>());
        assert!(first + bytes <= memory.bytes, "{bytes} bytes from {first} on of a buffer of {}", memory.bytes);
        Memory { address: memory.address + first as u64, bytes }
    }

    /// All of a buffer, for a library.
    pub fn whole(&self, buffer: BufferId) -> Memory {
        self.buffers[buffer.0]
    }

    /// Bytes of a buffer, likewise.
    ///
    /// # Panics
    /// If they lie outside.
    pub fn bytes(&self, buffer: BufferId, range: &Range<usize>) -> Memory {
        self.part::<u8>(buffer, range.start, range.len())
    }

    /// Copies `data` into a buffer from element `offset` on.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    ///
    /// # Panics
    /// If it lies outside.
    pub fn upload<T: Element>(&self, buffer: BufferId, offset: usize, data: &[T]) -> Result<(), CudaError> {
        self.gpu.upload(self.part::<T>(buffer, offset, data.len()), bytes_of(data))
    }

    /// Copies elements from `offset` on out of a buffer.
    ///
    /// # Errors
    /// An earlier kernel that failed.
    ///
    /// # Panics
    /// If they lie outside.
    pub fn download<T: Element>(&self, buffer: BufferId, offset: usize, out: &mut [T]) -> Result<(), CudaError> {
        self.gpu.download_to(self.part::<T>(buffer, offset, out.len()), bytes_of_mut(out))
    }

    /// Makes `words` words of host memory, zeroed, that the GPU copies from and to.
    ///
    /// # Errors
    /// Too little memory that can be locked.
    pub fn stage(&mut self, words: usize) -> Result<StagingId, CudaError> {
        self.stagings.push(Staging::new(&self.gpu, words)?);
        Ok(StagingId(self.stagings.len() - 1))
    }

    /// Their content, when the copies that were begun have ended.
    ///
    /// # Errors
    /// What the GPU did wrong until then.
    pub fn staged(&mut self, id: StagingId) -> Result<&mut [u32], CudaError> {
        self.stagings[id.0].words()
    }

    /// Begins to copy words from `first` on to a slot.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If words or slot end before.
    pub fn begin_upload(&mut self, id: StagingId, first: usize, buffer: BufferId, slot: Slot) -> Result<(), CudaError> {
        let to = self.part::<u8>(buffer, slot.offset, slot.bytes());
        self.stagings[id.0].begin_upload(first, to)
    }

    /// Begins to copy a slot to words from `first` on.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If words or slot end before.
    pub fn begin_download(
        &mut self,
        buffer: BufferId,
        slot: Slot,
        id: StagingId,
        first: usize,
    ) -> Result<(), CudaError> {
        let from = self.part::<u8>(buffer, slot.offset, slot.bytes());
        self.stagings[id.0].begin_download(from, first)
    }

    /// Has a plan for each of these pieces, by a search where it knows none. Gives false if it left off, as `goes_on` said.
    ///
    /// # Errors
    /// There is none for one of them, too little memory, or the GPU or a library fails.
    pub fn find_plans(&mut self, pieces: &[Piece], goes_on: &dyn Fn() -> bool) -> Result<bool, CudaError> {
        let Cuda { gpu, dnn, blas, plans, .. } = self;
        plans.find(&mut Libraries { gpu, dnn, blas }, pieces, goes_on)
    }

    /// How many of these pieces need a search, which takes seconds for each.
    pub fn unknown_plans(&self, pieces: &[Piece]) -> usize {
        self.plans.unknown(pieces)
    }

    /// Takes plans from a table, where a piece has none yet. Gives false if they are for another card.
    pub fn prefer_plans(&mut self, table: &PlanTable) -> bool {
        self.plans.prefer(table)
    }

    /// How convolutions and products are computed.
    pub fn plans(&self) -> PlanTable {
        self.plans.in_use()
    }

    /// What plans hold for.
    pub fn card(&self) -> &Card {
        self.plans.card()
    }

    /// Returns when all that was begun has ended.
    ///
    /// # Errors
    /// What a kernel or a library did wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.gpu.synchronize()
    }

    /// Whether what runs often should be captured: until that has failed, or never with `DDPM_DIST_CUDA_GRAPH=off`.
    pub fn makes_graphs(&self) -> bool {
        self.graphs.are_on()
    }

    /// Captures what is begun on this device from now on by this thread, in place of running it.
    ///
    /// # Errors
    /// The driver's.
    pub fn capture(&self) -> Result<Capture, CudaError> {
        Capture::begin(self.gpu.stream())
    }

    /// Begins what was captured on this device.
    ///
    /// # Errors
    /// As [`Cuda::run`].
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: this is the device.
        unsafe { graph.launch() }
    }

    /// Makes no more graphs; [`Cuda::take_notice`] then says why.
    pub fn give_up_graphs(&mut self, why: &str) {
        self.graphs.give_up(why);
    }

    /// Has the user told something about plans.
    pub fn notify(&mut self, notice: String) {
        self.plans.notify(notice);
    }

    /// What the user should know and has not been told.
    pub fn take_notice(&mut self) -> Option<String> {
        self.plans.take_notice().or_else(|| self.graphs.take_notice())
    }
}

fn bytes_of<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: plain numbers without padding.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

fn bytes_of_mut<T: Element>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: plain numbers without padding, of which every bit pattern is one.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}
