//! Sums of floats between GPUs: the ways to add them up, and what each begins.

use super::super::{Argument, CudaError, Gpu, Launch, Memory, Precision};
use super::Communicator;
use super::library::{BFLOAT16, FLOAT32, SUM};
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
    /// Everybody's slices go to those that add them up …
    Scatter,
    /// … which give the sums to all.
    Gather,
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

    /// Bytes of memory that it needs beside `len` floats which `size` GPUs add up.
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
    /// [`Adding::scratch`] says. After the last stage comes [`Communicator::sum_is_begun`].
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
            Stage::Reduce => {
                self.lane.follow()?;
                self.reduce(floats, len, FLOAT32)
            }
            Stage::ReduceInBf16 => {
                self.lane.follow()?;
                let rounded = first_bytes(scratch, Adding::FastInBf16.scratch(len, self.size));
                self.launch(gpu, &Launch::cast(len, Precision::Bf16), floats, rounded)?;
                self.reduce(rounded, len, BFLOAT16)
            }
            Stage::Widen => self.launch(gpu, &Launch::cast(len, Precision::F32), scratch, floats),
            Stage::Scatter => {
                self.lane.follow()?;
                self.exchange(slice, part)
            }
            Stage::Gather => {
                let parts = first_bytes(scratch, Adding::Tree.scratch(len, self.size));
                for launch in tree_sum(self.size, slices.stride, own) {
                    self.launch(gpu, &launch, parts, parts)?;
                }
                self.exchange(|_| part(0), slice)
            }
        }
    }

    fn reduce(&mut self, numbers: Memory, count: usize, kind: c_int) -> Result<(), CudaError> {
        let at = numbers.address as *mut c_void;
        // SAFETY: a memory lives as long as its GPU, whose queue ends before it, and it is that long.
        let status = unsafe { (self.library.all_reduce)(at, at, count, kind, SUM, self.handle, self.stream()) };
        self.checked(status, &format!("sum up {count} floats")).map(drop)
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
