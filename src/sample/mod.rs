//! Algorithm 2 and its relatives: images from noise.

mod config;
mod rounds;

#[cfg(test)]
mod tests;

pub use config::SampleConfig;

use crate::collective::{Collective, CollectiveError, Solo};
use crate::device::cuda::Piece;
use crate::device::{Binding, BufferId, Device, DeviceError, Element, Precision, Region, Slot, Target};
use crate::diffusion::SamplerTable;
use crate::ops::cast::ComputeCopy;
use crate::ops::p_sample::{State, StepInputs, p_sample, row};
use crate::rng::{Kind, Stream};
use crate::tape::{Loaded, ParamLayout, Program, RunError, Spec, Tape, plan};
use crate::unet::{UnetConfig, unet};
use half::bf16;
use std::sync::Arc;
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

impl SampleError {
    /// What went wrong between ranks, if that is what it is.
    pub fn collective(&self) -> Option<&CollectiveError> {
        match self {
            SampleError::Run(error) => error.collective(),
            _ => None,
        }
    }
}

impl From<DeviceError> for SampleError {
    /// The device's error with the advice that helps here: it is not the training batch that is too large.
    fn from(error: DeviceError) -> SampleError {
        match error {
            DeviceError::OutOfMemory { device, bytes } => {
                SampleError::OutOfMemory { device, bytes, what: "the network" }
            }
            other => SampleError::Run(other.into()),
        }
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

impl From<CollectiveError> for SampleError {
    fn from(error: CollectiveError) -> SampleError {
        SampleError::Run(RunError::Collective(error))
    }
}

/// Where a reverse process stands, after one of its steps.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps that this rank has done, over all its batches.
    pub done: usize,
    /// Steps that it has to do.
    pub of: usize,
}

/// A batch of images.
#[derive(Clone, Copy, Debug)]
pub struct Finished<'a> {
    /// Index of the first.
    pub first: usize,
    /// `[n, H, W, C]`.
    pub images: &'a [f32],
    /// The same images at the stages on the way that were asked for, in order.
    pub stages: &'a [Vec<f32>],
}

/// p_θ: the parameters θ, and the steps that are taken.
#[derive(Clone, Copy, Debug)]
pub struct ReverseProcess<'a> {
    /// The buffer of the parameters.
    pub weights: BufferId,
    /// The steps.
    pub table: &'a SamplerTable,
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
    /// Stages to be kept of each image on its way from noise, equally far from each other.
    pub stages: usize,
}

/// The reverse process on a device: the network and one fused step, for a fixed number of images at a time.
///
/// A last batch that is not full is padded with the images that would come next, as the program's shapes are fixed. An image depends on
/// the seed and its number alone: ops choose how they compute by the shape of one image, and cut sums over nothing that belongs to several.
pub struct Sampler {
    program: Arc<Program>,
    binding: Binding,
    io: BufferId,
    copy: Option<ComputeCopy>,
    size: [usize; 3],
    batch: usize,
    slots: Slots,
}

/// An image that is not finite after a reverse step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NotFinite {
    image: usize,
    timestep: u32,
}

/// A reverse process that is ready to run.
struct Chain<'a> {
    step: Loaded,
    table: &'a SamplerTable,
}

/// Images on their way.
struct Batch {
    /// `[N, H, W, C]`, the padding of a last batch included.
    x: Vec<f32>,
    t: Vec<u32>,
    /// Those of the batch that are wanted, at each stage.
    kept: Vec<Vec<f32>>,
}

struct Slots {
    x: Slot,
    t: Slot,
    input: Slot,
    table: Slot,
    timesteps: Slot,
    clock: Slot,
}

/// What a reverse step is planned for.
#[derive(Clone, Copy, Debug)]
pub struct ReverseStep<'a> {
    /// The network.
    pub model: &'a UnetConfig,
    /// H and W.
    pub size: [usize; 2],
    /// Images that go through the network together.
    pub batch: usize,
    /// Most steps that a reverse process takes.
    pub steps: usize,
    /// Places of the parameters; none: as the program likes.
    pub layout: Option<&'a ParamLayout>,
}

impl ReverseStep<'_> {
    /// The program of one reverse step: ε_θ(x_t, t) and x_{t−1} from it, in place.
    pub fn program(&self, target: Target) -> Program {
        let ReverseStep { model, size: [height, width], batch, steps, layout } = *self;
        let mut tape = Tape::on(target);
        let image = [batch, height, width, model.image_channels];
        let x = tape.io("x", Spec::f32(image));
        let input = tape.io("input", Spec::computed([batch, height, width, tape.padded(model.image_channels)]));
        let t = tape.io("t", Spec::u32([batch]));
        let clock = tape.io("clock", Spec::u32([4]));
        let table = tape.io("table", Spec::f32([steps, 9]));
        let timesteps = tape.io("timesteps", Spec::u32([steps]));
        let out = unet(&mut tape, model, input, t, None);
        p_sample(&mut tape, State { x, input, t, clock }, StepInputs { out, table, timesteps });
        plan(&tape, layout, None)
    }
}

impl Sampler {
    /// Plans the reverse step, to be computed in `precision`, and allocates its memory.
    ///
    /// # Errors
    /// Too little memory on the device, or what else keeps it from working.
    pub fn new(device: &mut Device, step: &ReverseStep<'_>, precision: Precision) -> Result<Sampler, SampleError> {
        let program = Arc::new(step.program(device.target(precision)));
        let io = device.allocate(program.io_bytes)?;
        let arena = device.allocate(program.arena_bytes)?;
        let mut binding = Binding::default().with(Region::Io, io).with(Region::Arena, arena);
        let copy = ComputeCopy::new(device, &program, &mut binding)?;
        let slot = |name| program.io(name);
        let slots = Slots {
            x: slot("x"),
            input: slot("input"),
            t: slot("t"),
            clock: slot("clock"),
            table: slot("table"),
            timesteps: slot("timesteps"),
        };
        let [height, width] = step.size;
        let size = [height, width, step.model.image_channels];
        Ok(Sampler { program, binding, io, copy, size, batch: step.batch, slots })
    }

    /// The reverse process on the device.
    ///
    /// # Panics
    /// If it has more steps than the sampler was planned for.
    fn load<'a>(&self, device: &mut Device, process: &ReverseProcess<'a>) -> Result<Chain<'a>, SampleError> {
        let ReverseProcess { weights, table } = *process;
        let (steps, most) = (table.steps.len(), self.slots.timesteps.len);
        assert!(steps <= most, "{steps} steps, planned for {most}");
        let rows: Vec<[f32; 9]> = table.steps.iter().map(|step| row(step, table.clip)).collect();
        let timesteps: Vec<u32> = table.steps.iter().map(|step| step.timestep).collect();
        self.upload(device, self.slots.table, rows.as_flattened())?;
        self.upload(device, self.slots.timesteps, &timesteps)?;
        let binding = self.binding.with(Region::Weights, weights);
        if let Some(copy) = &self.copy {
            copy.refresh(device, &binding)?;
        }
        Ok(Chain { step: self.program.load(device, binding)?, table })
    }

    /// What the network asks of a GPU's libraries.
    pub fn pieces(&self) -> Vec<Piece> {
        self.program.pieces()
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

    /// Makes `request.count` images `[count, H, W, C]` in the range that the data had, [−1, 1], with
    /// all ranks, each of which gets all images.
    ///
    /// `observe` is called after every reverse step and returns whether to go on. If it does not at some rank, the result is `None`.
    ///
    /// # Errors
    /// Images that are not finite, initial noise of another size, no memory for all images at once, or a rank that is lost.
    pub fn sample(
        &self,
        device: &mut Device,
        collective: &mut dyn Collective,
        process: ReverseProcess<'_>,
        request: Request<'_>,
        observe: impl FnMut(Progress) -> bool,
    ) -> Result<Option<Vec<f32>>, SampleError> {
        let mut images = room_for(request.count.saturating_mul(self.size.iter().product()), "the images")?;
        let finished = self.sample_batches(device, collective, process, request, observe, |batch| {
            images.extend_from_slice(batch.images);
            Ok::<_, SampleError>(())
        })?;
        Ok((finished == request.count).then_some(images))
    }

    /// Algorithm 2 for the images from `first` on: x_0 of them in `batch`. `tell` is called after every step, with the place of the first
    /// number that is not finite if there is one, and returns whether to go on; if it does not, what is there is not finished. Gives whether
    /// it is.
    fn make_batch(
        &self,
        device: &mut Device,
        chain: &mut Chain<'_>,
        request: &Request<'_>,
        first: usize,
        batch: &mut Batch,
        mut tell: impl FnMut(Option<NotFinite>) -> Result<bool, SampleError>,
    ) -> Result<bool, SampleError> {
        let image: usize = self.size.iter().product();
        let Request { count, seed, initial_noise, stages } = *request;
        let (Batch { x, t, kept }, Chain { step: reverse_step, table }) = (batch, chain);
        // Line 1: x_T ~ N(0, I)
        for (j, x) in x.chunks_exact_mut(image).enumerate() {
            let index = first + j;
            match initial_noise.and_then(|noise| noise.get(index * image..(index + 1) * image)) {
                Some(noise) => x.copy_from_slice(noise),
                None => initial_noise_of(seed, index).fill_normal(0, x),
            }
        }
        self.upload(device, self.slots.x, x)?;
        match self.program.target.precision {
            Precision::F32 => self.upload(device, self.slots.input, x)?,
            Precision::Bf16 => self.upload(device, self.slots.input, &self.rounded(x))?,
        }
        t.fill(table.steps.first().map_or(0, |step| step.timestep));
        self.upload(device, self.slots.t, t)?;
        self.upload(device, self.slots.clock, &[0, first as u32, seed as u32, (seed >> 32) as u32])?;
        let wanted = (count - first).min(self.batch);
        // Line 2: for t = T, …, 1
        for (i, step) in table.steps.iter().enumerate() {
            // Lines 3 and 4
            reverse_step.run(device, &mut Solo)?;
            device.download(self.io, self.slots.x.offset / size_of::<f32>(), x).map_err(SampleError::from)?;
            let images = &x[..image * wanted];
            let bad = images.iter().position(|v| !v.is_finite());
            let bad = bad.map(|bad| NotFinite { image: first + bad / image, timestep: step.timestep });
            let done = i + 1;
            for stage in (0..stages).filter(|stage| (stage + 1) * table.steps.len() / (stages + 1) == done) {
                kept[stage].clear();
                kept[stage].extend_from_slice(images); // within what was reserved
            }
            if !tell(bad)? && done < table.steps.len() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// x as the network's input, with its channels filled up.
    fn rounded(&self, x: &[f32]) -> Vec<bf16> {
        let channels = self.size[2];
        let padded = self.slots.input.len / (x.len() / channels);
        let mut input = vec![bf16::ZERO; self.slots.input.len];
        for (from, to) in x.chunks_exact(channels).zip(input.chunks_exact_mut(padded)) {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::from_f32(from));
        }
        input
    }

    fn upload<T: Element>(&self, device: &mut Device, slot: Slot, data: &[T]) -> Result<(), SampleError> {
        Ok(device.upload(self.io, slot.offset / size_of::<T>(), data)?)
    }
}

/// The stream of x_T of image `index`.
fn initial_noise_of(seed: u64, index: usize) -> Stream {
    Stream { seed, kind: Kind::Sample, layer: 0, sample: index as u32, step: 0 }
}
