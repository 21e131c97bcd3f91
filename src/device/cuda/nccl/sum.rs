//! Sums of floats between GPUs, of which each gets all or its slice: the ways to add them up, and what each begins.

use super::super::{Argument, CudaError, Gpu, Launch, Memory, Precision};
use super::Communicator;
use super::library::{BFLOAT16, FLOAT32, SUM, UINT8};
use super::tree::{Slices, tree_sum};
use std::ffi::{c_int, c_void};

/// How floats are added up between GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adding {
    /// In the order that NCCL finds fastest.
    #[default]
    Fast,
    /// Likewise, rounded to bf16 before and wherever two are added: half as many bytes are sent.
    FastInBf16,
    /// Along a binary tree over the numbers of the GPUs: each gets its slice of everybody's floats, adds it up and gives the sum to all,
    /// which moves as many bytes as a ring does.
    Tree,
}

/// A part of a sum, begun when the communicator [is ready](Communicator::is_ready).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// All of the sum.
    Reduce,
    /// The floats are rounded to bf16 beside their place and added up there …
    ReduceInBf16,
    /// … and the sums brought back.
    Widen,
    /// All of the sum, of which each GPU gets its slice.
    ReduceSlices,
    /// The floats are rounded to bf16 beside their place, and each GPU gets the sum of its slice there …
    ReduceSlicesInBf16,
    /// … and brings it back.
    WidenSlice,
    /// Everybody's slices go to those that add them up …
    Scatter,
    /// … which give the sums to all …
    Gather,
    /// … or keep them.
    Keep,
}

impl Adding {
    /// What makes up a sum, in order.
    pub fn stages(self) -> &'static [Stage] {
        match self {
            Adding::Fast => &[Stage::Reduce],
            Adding::FastInBf16 => &[Stage::ReduceInBf16, Stage::Widen],
            Adding::Tree => &[Stage::Scatter, Stage::Gather],
        }
    }

    /// The same where each GPU gets its slice of the sum.
    pub fn stages_for_slices(self) -> &'static [Stage] {
        match self {
            Adding::Fast => &[Stage::ReduceSlices],
            Adding::FastInBf16 => &[Stage::ReduceSlicesInBf16, Stage::WidenSlice],
            Adding::Tree => &[Stage::Scatter, Stage::Keep],
        }
    }

    /// Bytes of memory that it needs beside `len` floats which `size` GPUs add up, for all of the sum or for slices.
    pub fn scratch(self, len: usize, size: usize) -> usize {
        match self {
            Adding::Fast => 0,
            Adding::FastInBf16 => len * Precision::Bf16.bytes(),
            Adding::Tree => Slices::new(len, size).scratch() * size_of::<f32>(),
        }
    }
}

impl Communicator {
    /// Begins a stage of the sum of floats over all GPUs, the first one when what was begun on this GPU before has ended; `scratch` is as
    /// [`Adding::scratch`] says. After the last stage comes [`Communicator::is_begun`].
    ///
    /// # Errors
    /// What the library or the driver refuses.
    ///
    /// # Panics
    /// If the scratch is too small.
    pub fn begin(&mut self, stage: Stage, gpu: &mut Gpu, floats: Memory, scratch: Memory) -> Result<(), CudaError> {
        let len = floats.bytes / size_of::<f32>();
        let slices = Slices::new(len, self.size);
        let slice = |rank| floats_of(floats, slices.of(rank));
        let own = slices.of(self.rank).len();
        let part = |rank: usize| floats_of(scratch, rank * slices.stride..rank * slices.stride + own);
        match stage {
            Stage::Reduce | Stage::ReduceSlices | Stage::ReduceInBf16 | Stage::ReduceSlicesInBf16 | Stage::Scatter => {
                self.lane.follow()?;
            }
            Stage::Widen | Stage::WidenSlice | Stage::Gather | Stage::Keep => {}
        }
        let halves = || first_bytes(scratch, Adding::FastInBf16.scratch(len, self.size));
        let parts = || first_bytes(scratch, Adding::Tree.scratch(len, self.size));
        match stage {
            Stage::Reduce => self.reduce(floats, len, FLOAT32),
            Stage::ReduceSlices => self.reduce_slices(floats, len, FLOAT32),
            Stage::ReduceInBf16 => {
                self.launch(gpu, &Launch::cast(len, Precision::Bf16), floats, halves())?;
                self.reduce(halves(), len, BFLOAT16)
            }
            Stage::ReduceSlicesInBf16 => {
                self.launch(gpu, &Launch::cast(len, Precision::Bf16), floats, halves())?;
                self.reduce_slices(halves(), len, BFLOAT16)
            }
            Stage::Widen => self.launch(gpu, &Launch::cast(len, Precision::F32), halves(), floats),
            Stage::WidenSlice => {
                let sum = self.slice_of(halves());
                self.launch(gpu, &Launch::cast(own, Precision::F32), sum, slice(self.rank))
            }
            Stage::Scatter => self.exchange(slice, part),
            Stage::Gather => {
                self.add_up(gpu, &slices, parts())?;
                self.exchange(|_| part(0), slice)
            }
            Stage::Keep => {
                self.add_up(gpu, &slices, parts())?;
                self.lane.copy(part(0), slice(self.rank))
            }
        }
    }

    /// Begins to give all GPUs each one's slice of a memory, when what was begun on this GPU before has ended. After it comes
    /// [`Communicator::is_begun`].
    ///
    /// # Errors
    /// What the library or the driver refuses.
    ///
    /// # Panics
    /// If the GPUs cannot have equal parts of the memory.
    pub fn begin_gather(&mut self, memory: Memory) -> Result<(), CudaError> {
        self.lane.follow()?;
        let own = self.slice_of(memory);
        let [from, to] = [own, memory].map(|memory| memory.address as *mut c_void);
        // SAFETY: as in `reduce`; the slice is where the library looks for it.
        let status = unsafe { (self.library.all_gather)(from, to, own.bytes, UINT8, self.handle, self.stream()) };
        self.checked(status, &format!("gather {} bytes", memory.bytes)).map(drop)
    }

    /// This GPU's of the equal parts of a memory.
    fn slice_of(&self, memory: Memory) -> Memory {
        assert!(memory.bytes.is_multiple_of(self.size), "{} bytes for {} GPUs", memory.bytes, self.size);
        let bytes = memory.bytes / self.size;
        Memory { address: memory.address + (self.rank * bytes) as u64, bytes }
    }

    fn reduce(&mut self, numbers: Memory, count: usize, kind: c_int) -> Result<(), CudaError> {
        let at = numbers.address as *mut c_void;
        // SAFETY: a memory lives as long as its GPU, whose queue ends before it, and it is that long.
        let status = unsafe { (self.library.all_reduce)(at, at, count, kind, SUM, self.handle, self.stream()) };
        self.checked(status, &format!("sum up {count} floats")).map(drop)
    }

    fn reduce_slices(&mut self, numbers: Memory, count: usize, kind: c_int) -> Result<(), CudaError> {
        let [from, to] = [numbers, self.slice_of(numbers)].map(|memory| memory.address as *mut c_void);
        let own = count / self.size;
        // SAFETY: as in `reduce`; the slice is where the library looks for it.
        let status = unsafe { (self.library.reduce_scatter)(from, to, own, kind, SUM, self.handle, self.stream()) };
        self.checked(status, &format!("sum up {count} floats")).map(drop)
    }

    /// Adds up everybody's parts of this GPU's slice.
    fn add_up(&self, gpu: &mut Gpu, slices: &Slices, parts: Memory) -> Result<(), CudaError> {
        let own = slices.of(self.rank).len();
        let mut launches = tree_sum(self.size, slices.stride, own).into_iter();
        launches.try_for_each(|launch| self.launch(gpu, &launch, parts, parts))
    }

    /// Begins to send a memory to each GPU and to receive one from each, this one included; empty ones are left out.
    fn exchange(&mut self, send: impl Fn(usize) -> Memory, receive: impl Fn(usize) -> Memory) -> Result<(), CudaError> {
        const ACTION: &str = "exchange floats";
        // SAFETY: it takes nothing.
        let status = unsafe { (self.library.group_start)() };
        self.checked(status, ACTION)?;
        let begun = (0..self.size).try_for_each(|rank| self.exchange_with(rank, send(rank), receive(rank)));
        // SAFETY: a group has been started on this thread.
        let status = unsafe { (self.library.group_end)() };
        begun.and(self.checked(status, ACTION).map(drop))
    }

    fn exchange_with(&mut self, rank: usize, send: Memory, receive: Memory) -> Result<(), CudaError> {
        let count = |memory: Memory| memory.bytes / size_of::<f32>();
        if send.bytes > 0 {
            let from = send.address as *const c_void;
            // SAFETY: as in `reduce`.
            let status =
                unsafe { (self.library.send)(from, count(send), FLOAT32, rank as c_int, self.handle, self.stream()) };
            self.checked(status, &format!("send {} floats", count(send)))?;
        }
        if receive.bytes > 0 {
            let to = receive.address as *mut c_void;
            // SAFETY: as in `reduce`.
            let status = unsafe {
                (self.library.receive)(to, count(receive), FLOAT32, rank as c_int, self.handle, self.stream())
            };
            self.checked(status, &format!("receive {} floats", count(receive)))?;
        }
        Ok(())
    }

    fn launch(&self, gpu: &mut Gpu, launch: &Launch, from: Memory, to: Memory) -> Result<(), CudaError> {
        let kernel = gpu.prepare(launch, |argument| match argument {
            Argument::Input(_) => from.address,
            _ => to.address,
        })?;
        // SAFETY: both memories are as long as the launch was made for, and live as long as the GPU.
        unsafe { self.lane.begin(&kernel) }
    }

    fn stream(&self) -> *mut c_void {
        self.lane.stream().cu_stream().cast()
    }
}

/// # Panics
/// If the memory has fewer.
fn first_bytes(memory: Memory, bytes: usize) -> Memory {
    assert!(bytes <= memory.bytes, "{bytes} bytes of {}", memory.bytes);
    Memory { bytes, ..memory }
}

fn floats_of(memory: Memory, range: std::ops::Range<usize>) -> Memory {
    let bytes = size_of::<f32>();
    Memory { address: memory.address + (range.start * bytes) as u64, bytes: range.len() * bytes }
}
