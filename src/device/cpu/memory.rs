//! Buffers on the host, and the view of them that one instruction gets.

use super::{Cpu, Pool};
use crate::device::{ALIGNMENT, Binding, BufferId, DeviceError, Element, Region, Slot, StagingId};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::ptr::NonNull;

/// Elements that one thread copies at a time: so many that waking it does not matter.
const COPY: usize = 1 << 18;

/// One zeroed, aligned allocation.
pub(super) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a buffer owns its bytes; access goes through `Cpu`, which follows the usual borrowing rules.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `Cpu::allocate` with this very layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Cpu {
    /// Allocates a zeroed buffer.
    pub fn allocate(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        let no_memory = || DeviceError::OutOfMemory { device: "this machine".into(), bytes };
        let layout = Layout::from_size_align(bytes.max(ALIGNMENT), ALIGNMENT).map_err(|_| no_memory())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(no_memory)?;
        self.buffers.push(Buffer { start, layout });
        Ok(BufferId(self.buffers.len() - 1))
    }

    /// A buffer as a slice of elements.
    pub fn elements<T: Element>(&self, id: BufferId) -> &[T] {
        let buffer = &self.buffers[id.0];
        // SAFETY: the bytes are initialised (zeroed at first), aligned for any element, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(buffer.start.as_ptr().cast(), buffer.layout.size() / size_of::<T>()) }
    }

    /// A buffer as a mutable slice of elements.
    pub fn elements_mut<T: Element>(&mut self, id: BufferId) -> &mut [T] {
        let buffer = &self.buffers[id.0];
        // SAFETY: as in `elements`; `self` is borrowed mutably, so the slice is the only one.
        unsafe { std::slice::from_raw_parts_mut(buffer.start.as_ptr().cast(), buffer.layout.size() / size_of::<T>()) }
    }

    /// Copies elements from `offset` on out of a buffer, on all threads: one cannot use up the memory's bandwidth.
    pub fn download<T: Element>(&self, id: BufferId, offset: usize, out: &mut [T]) {
        let elements = &self.elements(id)[offset..offset + out.len()];
        self.pool.for_chunks(out, COPY, |i, out, _| out.copy_from_slice(&elements[i * COPY..][..out.len()]));
    }

    /// Zeroed words through which inputs and results pass.
    pub fn stage(&mut self, words: usize) -> Result<StagingId, DeviceError> {
        let bytes = words.saturating_mul(size_of::<u32>());
        let mut staging = Vec::new();
        let room = staging.try_reserve_exact(words);
        room.map_err(|_| DeviceError::OutOfMemory { device: "this machine".into(), bytes })?;
        staging.resize(words, 0u32);
        self.stagings.push(staging);
        Ok(StagingId(self.stagings.len() - 1))
    }

    /// Their content.
    pub fn staged(&mut self, id: StagingId) -> &mut [u32] {
        &mut self.stagings[id.0]
    }

    /// Copies words from `first` on to a slot.
    pub fn copy_from_staging(&mut self, id: StagingId, first: usize, buffer: BufferId, slot: Slot) {
        let staging = std::mem::take(&mut self.stagings[id.0]);
        let bytes = &bytemuck::cast_slice(&staging[first..])[..slot.bytes()];
        self.elements_mut::<u8>(buffer)[slot.offset..][..slot.bytes()].copy_from_slice(bytes);
        self.stagings[id.0] = staging;
    }

    /// Copies a slot to words from `first` on.
    pub fn copy_to_staging(&mut self, buffer: BufferId, slot: Slot, id: StagingId, first: usize) {
        let mut staging = std::mem::take(&mut self.stagings[id.0]);
        let bytes = &mut bytemuck::cast_slice_mut(&mut staging[first..])[..slot.bytes()];
        bytes.copy_from_slice(&self.elements::<u8>(buffer)[slot.offset..][..slot.bytes()]);
        self.stagings[id.0] = staging;
    }

    /// The view of memory for one instruction.
    ///
    /// # Panics
    /// If a slot lies outside its buffer or is not aligned for its elements, if a region has no buffer, or if an output overlaps another
    /// operand. All of these would be errors of the planner.
    pub fn launch<'a>(
        &'a mut self,
        binding: &Binding,
        inputs: &'a [Slot],
        outputs: &'a [Slot],
        updates: u32,
        scratch: Option<Slot>,
    ) -> Launch<'a> {
        let mut bases = [std::ptr::null_mut(); Region::COUNT];
        for slot in inputs.iter().chain(outputs).chain(scratch.as_ref()) {
            let Some(id) = binding.get(slot.region) else { panic!("no buffer for region {}", slot.region.name()) };
            let buffer = &self.buffers[id.0];
            let end = slot.len.checked_mul(slot.dtype.size()).and_then(|bytes| bytes.checked_add(slot.offset));
            assert!(end.is_some_and(|end| end <= buffer.layout.size()), "slot outside its buffer: {slot:?}");
            assert!(slot.offset.is_multiple_of(slot.dtype.size()), "slot not aligned: {slot:?}");
            bases[slot.region as usize] = buffer.start.as_ptr();
        }
        // Two regions may be bound to one buffer.
        let overlap = |a: &Slot, b: &Slot| {
            binding.get(a.region) == binding.get(b.region) && Slot { region: b.region, ..*a }.overlaps(b)
        };
        for (i, written) in outputs.iter().chain(scratch.as_ref()).enumerate() {
            for (j, other) in outputs.iter().chain(scratch.as_ref()).chain(inputs).enumerate() {
                assert!(i == j || !overlap(written, other), "operands overlap: {written:?} and {other:?}");
            }
        }
        Launch { pool: &self.pool, bases, inputs, outputs, scratch, updates, taken: Cell::new(0) }
    }
}

/// What one instruction sees: its operands and the threads to compute with.
pub struct Launch<'a> {
    pool: &'a Pool,
    bases: [*mut u8; Region::COUNT],
    inputs: &'a [Slot],
    outputs: &'a [Slot],
    scratch: Option<Slot>,
    updates: u32,
    taken: Cell<u32>,
}

impl<'a> Launch<'a> {
    /// The threads.
    pub fn pool(&self) -> &'a Pool {
        self.pool
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// The elements of input `i`.
    ///
    /// # Panics
    /// If `T` is not the input's element type.
    pub fn input<T: Element>(&self, i: usize) -> &'a [T] {
        let slot = &self.inputs[i];
        assert_eq!(slot.dtype, T::DTYPE, "input {i}");
        // SAFETY: `Cpu::launch` checked that the slot lies inside its buffer, which outlives 'a, and that no output overlaps it.
        unsafe { std::slice::from_raw_parts(self.bases[slot.region as usize].add(slot.offset).cast(), slot.len) }
    }

    /// The elements of output `i`, to be written (or, where [`Launch::updates`], read and written).
    ///
    /// # Panics
    /// If `T` is not the output's element type, or if the output was taken before.
    pub fn output<T: Element>(&self, i: usize) -> &'a mut [T] {
        let slot = &self.outputs[i];
        assert_eq!(slot.dtype, T::DTYPE, "output {i}");
        self.take(i);
        self.exclusive(slot)
    }

    /// Whether output `i` already holds a value that the instruction must add to (gradients) or update in place.
    pub fn updates(&self, i: usize) -> bool {
        self.updates & (1 << i) != 0
    }

    /// The instruction's workspace in the arena, of undefined content.
    pub fn scratch(&self) -> &'a mut [f32] {
        match &self.scratch {
            Some(slot) => {
                self.take(31);
                self.exclusive(slot)
            }
            None => &mut [],
        }
    }

    fn take(&self, bit: usize) {
        assert_eq!(self.taken.get() & (1 << bit), 0, "an output can be taken once");
        self.taken.set(self.taken.get() | (1 << bit));
    }

    fn exclusive<T: Element>(&self, slot: &Slot) -> &'a mut [T] {
        // SAFETY: `Cpu::launch` checked that the slot lies inside its buffer and overlaps no other operand; `take` made sure that it
        // is handed out once; the launch borrows the device mutably, so there is no other launch.
        unsafe { std::slice::from_raw_parts_mut(self.bases[slot.region as usize].add(slot.offset).cast(), slot.len) }
    }
}
