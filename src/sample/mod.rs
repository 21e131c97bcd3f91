//! Algorithm 2 and its relatives: images from noise.

mod config;

#[cfg(test)]
mod tests;

pub use config::SampleConfig;

use crate::collective::Solo;
use crate::device::{Binding, BufferId, Device, DeviceError, Region, Slot};
use crate::diffusion::SamplerTable;
use crate::ops::p_sample::{StepInputs, p_sample, row};
use crate::rng::{Kind, Stream};
use crate::tape::{ParamLayout, Program, RunError, Spec, Tape, plan};
use crate::unet::{UnetConfig, unet};
use thiserror::Error;

/// Why images could not be made.
#[derive(Debug, Error)]
pub enum SampleError {
    /// No memory for the network's activations, or for the images.
    #[error(
        "{device} has no {bytes} bytes of memory left for {what}; lower `sample.batch` (`ddpm-dist sample --batch`) or ask for fewer \
         images at a time"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        bytes: usize,
        /// What they were to hold.
        what: &'static str,
    },
    /// The program stopped.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The images are not numbers: the weights are not, or the network overflows.
    #[error(
        "image {image} has pixels that are not finite after timestep {timestep}; the weights are damaged or training diverged: \
         sample from an earlier checkpoint"
    )]
    NotFinite {
        /// Index of the image.
        image: usize,
        /// The reverse step that gave it.
        timestep: u32,
    },
    /// `--init-noise` has other sizes than the images.
    #[error(
        "initial noise has {found} numbers, expected {expected}: {count} images of [{height}, {width}, {channels}]"
    )]
    InitialNoise {
        /// Numbers found.
        found: usize,
        /// Numbers expected.
        expected: usize,
        /// Images asked for.
        count: usize,
        /// Height of an image.
        height: usize,
        /// Width of an image.
        width: usize,
        /// Channels of an image.
        channels: usize,
    },
}

impl From<DeviceError> for SampleError {
    /// The device's error with the advice that helps here: it is not the training batch that is too large.
    fn from(error: DeviceError) -> SampleError {
        let DeviceError::OutOfMemory { device, bytes } = error;
        SampleError::OutOfMemory { device, bytes, what: "the network" }
    }
}

/// An empty vector with room for `len` elements.
///
/// # Errors
/// There is no memory for `what`.
pub fn room_for<T>(len: usize, what: &'static str) -> Result<Vec<T>, SampleError> {
    let mut room = Vec::new();
    match room.try_reserve_exact(len) {
        Ok(()) => Ok(room),
        Err(_) => {
            let bytes = len.saturating_mul(size_of::<T>());
            Err(SampleError::OutOfMemory { device: "this machine".into(), bytes, what })
        }
    }
}

/// Where a reverse process stands, after one of its steps.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Steps done, over all batches.
    pub done: usize,
    /// Steps to do, over all batches.
    pub of: usize,
    /// Index of the batch's first image.
    pub first: usize,
    /// The batch's images so far, `[n, H, W, C]`.
    pub images: &'a [f32],
}

/// What images to make.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Number of images, from index 0 on.
    pub count: usize,
    /// Key of all random numbers; what is drawn for image i depends on (seed, i) alone.
    pub seed: u64,
    /// x_T of all images, `[count, H, W, C]`, in place of drawn noise.
    pub initial_noise: Option<&'a [f32]>,
}

/// The reverse process on a device: the network and one fused step, for a fixed number of images at a time.
///
/// A last batch that is not full is padded with the images that would come next, as the program's shapes are fixed. An image depends on
/// the seed and its number alone: ops choose how they compute by the shape of one image, and cut sums over nothing that belongs to several.
pub struct Sampler {
    program: Program,
    binding: Binding,
    io: BufferId,
    size: [usize; 3],
    batch: usize,
    slots: Slots,
}

struct Slots {
    x: Slot,
    t: Slot,
    row: Slot,
    clock: Slot,
    seed: Slot,
}

/// The program of one reverse step: ε_θ(x_t, t) and x_{t−1} from it, in place.
pub fn reverse_step_program(
    model: &UnetConfig,
    [height, width]: [usize; 2],
    batch: usize,
    layout: Option<&ParamLayout>,
) -> Program {
    let mut tape = Tape::new();
    let x = tape.io("x", Spec::f32([batch, height, width, model.image_channels]));
    let t = tape.io("t", Spec::u32([batch]));
    let row = tape.io("row", Spec::f32([9]));
    let clock = tape.io("clock", Spec::u32([4]));
    let seed = tape.io("seed", Spec::u32([2]));
    let out = unet(&mut tape, model, x, t, None);
    p_sample(&mut tape, x, StepInputs { out, row, clock, seed });
    plan(&tape, layout, None)
}

impl Sampler {
    /// Plans the reverse step for `batch` images of `size` = [H, W] and allocates its memory.
    ///
    /// # Errors
    /// Too little memory on the device.
    pub fn new(
        device: &mut Device,
        model: &UnetConfig,
        [height, width]: [usize; 2],
        batch: usize,
        layout: Option<&ParamLayout>,
    ) -> Result<Sampler, SampleError> {
        let program = reverse_step_program(model, [height, width], batch, layout);
        let io = device.allocate(program.io_bytes)?;
        let arena = device.allocate(program.arena_bytes)?;
        let binding = Binding::default().with(Region::Io, io).with(Region::Arena, arena);
        let slot = |name| program.io(name);
        let slots = Slots { x: slot("x"), t: slot("t"), row: slot("row"), clock: slot("clock"), seed: slot("seed") };
        Ok(Sampler { size: [height, width, model.image_channels], program, binding, io, batch, slots })
    }

    /// Places of the parameters that [`Sampler::sample`] reads.
    pub fn layout(&self) -> &ParamLayout {
        &self.program.layout
    }

    /// [H, W, C] of an image.
    pub fn size(&self) -> [usize; 3] {
        self.size
    }

    /// Images that go through the network together.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Makes `request.count` images `[count, H, W, C]` with the parameters in `weights`, in the range that the data had, [−1, 1].
    ///
    /// `observe` is called after every reverse step and returns whether to go on. If it does not, the result is `None`.
    ///
    /// # Errors
    /// Images that are not finite, initial noise of another size, or no memory for all images at once.
    pub fn sample(
        &self,
        device: &mut Device,
        weights: BufferId,
        table: &SamplerTable,
        request: Request<'_>,
        observe: impl FnMut(Progress<'_>) -> bool,
    ) -> Result<Option<Vec<f32>>, SampleError> {
        let mut images = room_for(request.count.saturating_mul(self.size.iter().product()), "the images")?;
        let finished = self.sample_batches(device, weights, table, request, observe, |batch| {
            images.extend_from_slice(batch);
            Ok::<_, SampleError>(())
        })?;
        Ok((finished == request.count).then_some(images))
    }

    /// As [`Sampler::sample`], but hands each batch to `keep` as soon as it is finished, in order, so that there may be more images than
    /// fit in memory. Gives the number of images finished: fewer than asked for if `observe` stopped it.
    ///
    /// # Errors
    /// Images that are not finite, initial noise of another size, and those of `keep`.
    pub fn sample_batches<E: From<SampleError>>(
        &self,
        device: &mut Device,
        weights: BufferId,
        table: &SamplerTable,
        request: Request<'_>,
        mut observe: impl FnMut(Progress<'_>) -> bool,
        mut keep: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<usize, E> {
        let [height, width, channels] = self.size;
        let image = height * width * channels;
        let Request { count, seed, initial_noise } = request;
        if let Some(noise) = initial_noise
            && noise.len() != count * image
        {
            let (found, expected) = (noise.len(), count * image);
            return Err(SampleError::InitialNoise { found, expected, count, height, width, channels }.into());
        }
        let binding = self.binding.with(Region::Weights, weights);
        let mut x = room_for(self.batch * image, "a batch")?;
        x.resize(self.batch * image, 0.0f32);
        let mut t = vec![0u32; self.batch];
        let of = count.div_ceil(self.batch) * table.steps.len();
        let mut done = 0;
        self.upload(device, self.slots.seed, &[seed as u32, (seed >> 32) as u32]);
        for first in (0..count).step_by(self.batch) {
            // Algorithm 2, line 1: x_T ~ N(0, I)
            for (j, x) in x.chunks_exact_mut(image).enumerate() {
                let index = first + j;
                match initial_noise.and_then(|noise| noise.get(index * image..(index + 1) * image)) {
                    Some(noise) => x.copy_from_slice(noise),
                    None => initial_noise_of(seed, index).fill_normal(0, x),
                }
            }
            self.upload(device, self.slots.x, &x);
            let wanted = (count - first).min(self.batch);
            // Line 2: for t = T, …, 1
            for (i, step) in table.steps.iter().enumerate() {
                t.fill(step.timestep);
                self.upload(device, self.slots.t, &t);
                self.upload(device, self.slots.clock, &[step.timestep, first as u32, 0, 0]);
                self.upload(device, self.slots.row, &row(step, table.clip));
                // Lines 3 and 4
                self.program.run(device, &binding, &mut Solo).map_err(SampleError::from)?;
                device.download(self.io, self.slots.x.offset / size_of::<f32>(), &mut x);
                let images = &x[..image * wanted];
                if let Some(bad) = images.iter().position(|v| !v.is_finite()) {
                    return Err(SampleError::NotFinite { image: first + bad / image, timestep: step.timestep }.into());
                }
                done += 1;
                let goes_on = observe(Progress { done, of, first, images });
                if i + 1 == table.steps.len() {
                    keep(images)?;
                }
                if !goes_on {
                    return Ok(first + if i + 1 == table.steps.len() { wanted } else { 0 });
                }
            }
        }
        Ok(count)
    }

    fn upload<T: crate::device::Element>(&self, device: &mut Device, slot: Slot, data: &[T]) {
        device.upload(self.io, slot.offset / size_of::<T>(), data);
    }
}

/// The stream of x_T of image `index`.
fn initial_noise_of(seed: u64, index: usize) -> Stream {
    Stream { seed, kind: Kind::Sample, layer: 0, sample: index as u32, step: 0 }
}
