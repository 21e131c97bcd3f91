//! What passes between the host and a rank's device in a step: pixels and scalars there, losses and timesteps back.
//!
//! All of it goes through staging memory and in the order of the programs, so that the host need not wait for the device before it prepares
//! the next step. There is one staging for each step that may be under way.

use super::Share;
use crate::device::{BufferId, Device, DeviceError, Slot, StagingId};
use crate::ops::adam_ema::Hyper;
use crate::tape::Program;
use std::ops::Range;

/// Steps that may be under way: one that the device computes, and one that waits for it.
const MOST: usize = 2;

/// What a rank's images of a step are given by.
#[derive(Clone, Copy, Debug)]
pub enum Images<'a> {
    /// [N, H, W, C].
    Pixels(&'a [u8]),
    /// Their numbers among the images that the device holds.
    Numbers(&'a [u32]),
}

impl<'a> Images<'a> {
    /// As they are copied to the device.
    fn bytes(self) -> &'a [u8] {
        match self {
            Images::Pixels(pixels) => pixels,
            Images::Numbers(numbers) => bytemuck::cast_slice(numbers),
        }
    }
}

/// What a rank's images of a step gave.
#[derive(Clone, Copy, Debug)]
pub struct Losses<'a> {
    /// Mean squared error of each image, in the order of the batch.
    pub losses: &'a [f32],
    /// The timestep that was drawn for each.
    pub timesteps: &'a [u32],
    /// Global norm of the gradient before clipping, and 1 if all of it is finite, else 0.
    pub norm: [f32; 2],
}

/// The way of a step's inputs and results.
pub(super) struct Transfer {
    io: BufferId,
    share: Share,
    slots: Slots,
    stagings: [StagingId; MOST],
    /// Steps so far.
    begun: usize,
    finished: usize,
    losses: Vec<f32>,
    drawn: Vec<u32>,
}

/// Places in the program's inputs and results.
struct Slots {
    images: Slot,
    clock: Slot,
    loss: Slot,
    t: Slot,
    hyper: Slot,
    norm: Slot,
}

/// What a shard has of its own, in the order in which it stands in staging memory.
#[derive(Clone, Copy)]
enum OfShard {
    Images,
    Clock,
    Loss,
    T,
}

/// What a step has once, after its shards.
#[derive(Clone, Copy)]
enum OfStep {
    Hyper,
    Norm,
}

impl Slots {
    fn of_shard(&self) -> [Slot; 4] {
        [self.images, self.clock, self.loss, self.t]
    }

    fn of_step(&self) -> [Slot; 2] {
        [self.hyper, self.norm]
    }
}

fn words(slots: &[Slot]) -> usize {
    slots.iter().map(|slot| slot.bytes().div_ceil(size_of::<u32>())).sum()
}

impl Transfer {
    /// For steps of `program`, and of those that have their inputs and results at the same places of `io`; images are given by their pixels,
    /// or by their numbers.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(
        device: &mut Device,
        program: &Program,
        io: BufferId,
        share: Share,
        by_number: bool,
    ) -> Result<Transfer, DeviceError> {
        let images = if by_number { "numbers" } else { "pixels" };
        let [images, clock, loss, t, hyper, norm] =
            [images, "clock", "loss", "t", "hyper", "norm"].map(|name| program.io(name));
        let slots = Slots { images, clock, loss, t, hyper, norm };
        let len = share.shards * words(&slots.of_shard()) + words(&slots.of_step());
        let stagings = [device.stage(len)?, device.stage(len)?];
        let (losses, drawn) = (vec![0.0; share.images()], vec![0; share.images()]);
        Ok(Transfer { io, share, slots, stagings, begun: 0, finished: 0, losses, drawn })
    }

    /// Steps that have been opened and not finished.
    pub fn under_way(&self) -> usize {
        self.begun - self.finished
    }

    /// The slot of a part of a shard, and its words in staging memory.
    fn of_shard(&self, shard: usize, part: OfShard) -> (Slot, Range<usize>) {
        let slots = self.slots.of_shard();
        let at = shard * words(&slots) + words(&slots[..part as usize]);
        let slot = slots[part as usize];
        (slot, at..at + words(&[slot]))
    }

    /// The same of what the step has once.
    fn of_step(&self, part: OfStep) -> (Slot, Range<usize>) {
        let slots = self.slots.of_step();
        let at = self.share.shards * words(&self.slots.of_shard()) + words(&slots[..part as usize]);
        let slot = slots[part as usize];
        (slot, at..at + words(&[slot]))
    }

    /// Staging of the step that was opened last.
    fn staging(&self) -> StagingId {
        self.stagings[(self.begun - 1) % MOST]
    }

    fn begin_upload(&self, device: &mut Device, (slot, at): (Slot, Range<usize>)) -> Result<(), DeviceError> {
        device.begin_upload(self.staging(), at.start, self.io, slot)
    }

    fn begin_download(&self, device: &mut Device, (slot, at): (Slot, Range<usize>)) -> Result<(), DeviceError> {
        device.begin_download(self.io, slot, self.staging(), at.start)
    }

    /// Takes over the scalars and the rank's images of step `step`, which may be others as soon as this returns.
    ///
    /// # Errors
    /// What went wrong on the device in an earlier step.
    ///
    /// # Panics
    /// If as many steps as possible are under way.
    pub fn open(
        &mut self,
        device: &mut Device,
        step: u64,
        hyper: &Hyper,
        images: Images<'_>,
    ) -> Result<(), DeviceError> {
        assert!(self.under_way() < MOST, "{MOST} steps are under way already");
        self.begun += 1;
        let Share { shard, shards, .. } = self.share;
        let first = self.share.places().start;
        let words = device.staged(self.staging())?;
        words[self.of_step(OfStep::Hyper).1].copy_from_slice(bytemuck::cast_slice(&hyper.to_array()));
        let images = images.bytes();
        for (i, images) in images.chunks_exact(images.len() / shards).enumerate() {
            let staged: &mut [u8] = bytemuck::cast_slice_mut(&mut words[self.of_shard(i, OfShard::Images).1]);
            staged[..images.len()].copy_from_slice(images);
            let clock = [step as u32, (first + i * shard) as u32, 0, 0];
            words[self.of_shard(i, OfShard::Clock).1].copy_from_slice(&clock);
        }
        self.begin_upload(device, self.of_step(OfStep::Hyper))
    }

    /// Begins to copy what shard `shard` of the rank needs: to be called before its program.
    ///
    /// # Errors
    /// The device's.
    pub fn give(&self, device: &mut Device, shard: usize) -> Result<(), DeviceError> {
        self.begin_upload(device, self.of_shard(shard, OfShard::Images))?;
        self.begin_upload(device, self.of_shard(shard, OfShard::Clock))
    }

    /// Begins to copy what it gives: to be called after its program.
    ///
    /// # Errors
    /// The device's.
    pub fn take(&self, device: &mut Device, shard: usize) -> Result<(), DeviceError> {
        self.begin_download(device, self.of_shard(shard, OfShard::Loss))?;
        self.begin_download(device, self.of_shard(shard, OfShard::T))
    }

    /// Begins to copy what the step gives beside that: to be called after all shards.
    ///
    /// # Errors
    /// The device's.
    pub fn close(&self, device: &mut Device) -> Result<(), DeviceError> {
        self.begin_download(device, self.of_step(OfStep::Norm))
    }

    /// Forgets the step that was opened last, which could not be begun.
    pub fn withdraw(&mut self) {
        self.begun -= 1;
    }

    /// Waits for the first of the steps that are under way, and gives its results.
    ///
    /// # Errors
    /// What went wrong on the device in it.
    ///
    /// # Panics
    /// If there is none.
    pub fn finish(&mut self, device: &mut Device) -> Result<Losses<'_>, DeviceError> {
        assert!(self.under_way() > 0, "no step is under way");
        let words = device.staged(self.stagings[self.finished % MOST])?;
        self.finished += 1;
        let shard = self.share.shard;
        for i in 0..self.share.shards {
            let images = i * shard..(i + 1) * shard;
            let losses = &words[self.of_shard(i, OfShard::Loss).1];
            let drawn = &words[self.of_shard(i, OfShard::T).1];
            self.losses[images.clone()].copy_from_slice(bytemuck::cast_slice(losses));
            self.drawn[images].copy_from_slice(drawn);
        }
        let norm = &words[self.of_step(OfStep::Norm).1];
        let norm = [f32::from_bits(norm[0]), f32::from_bits(norm[1])];
        Ok(Losses { losses: &self.losses, timesteps: &self.drawn, norm })
    }
}
