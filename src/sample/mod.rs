//! Algorithm 2 and its relatives: images from noise.

mod bench;
mod config;
mod error;
mod rounds;

#[cfg(test)]
mod tests;

pub use config::SampleConfig;
pub use error::{SampleError, room_for};

use crate::collective::{Collective, Solo};
use crate::device::cuda::Piece;
use crate::device::{Binding, BufferId, Device, Element, Precision, Region, Slot, StagingId, Target};
use crate::diffusion::SamplerTable;
use crate::ops::cast::ComputeCopy;
use crate::ops::p_sample::{State, StepInputs, p_sample, row};
use crate::rng::{Kind, Stream};
use crate::tape::{Loaded, ParamLayout, Program, Spec, Tape, plan};
use crate::unet::{UnetConfig, unet};
use half::bf16;
use std::sync::Arc;

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

/// Reverse steps of a device with queues from one look at the images to the next.
const LOOK: usize = 16;

/// The reverse process on a device: the network and one fused step, for a fixed number of images at a time.
///
/// A last batch that is not full is padded with the images that would come next, as the program's shapes are fixed. An image depends on
/// the seed and its number alone: ops choose how they compute by the shape of one image, and cut sums over nothing that belongs to several.
pub struct Sampler {
    program: Arc<Program>,
    binding: Binding,
    io: BufferId,
    /// As large as x.
    staging: StagingId,
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
        let staging = device.stage(slots.x.len)?;
        let [height, width] = step.size;
        let size = [height, width, step.model.image_channels];
        Ok(Sampler { program, binding, io, staging, copy, size, batch: step.batch, slots })
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

    /// A reverse step.
    pub fn program(&self) -> &Program {
        &self.program
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

    /// Line 1 of Algorithm 2 for the images from `first` on.
    fn begin_batch(
        &self,
        device: &mut Device,
        chain: &Chain<'_>,
        request: &Request<'_>,
        first: usize,
        batch: &mut Batch,
    ) -> Result<(), SampleError> {
        let image: usize = self.size.iter().product();
        let (Batch { x, t, .. }, Request { seed, initial_noise, .. }) = (batch, *request);
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
        t.fill(chain.table.steps.first().map_or(0, |step| step.timestep));
        self.upload(device, self.slots.t, t)?;
        self.upload(device, self.slots.clock, &[0, first as u32, seed as u32, (seed >> 32) as u32])
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
        let Request { count, stages, .. } = *request;
        self.begin_batch(device, chain, request, first, batch)?;
        let (Batch { x, kept, .. }, Chain { step: reverse_step, table }) = (batch, chain);
        // Line 2: for t = T, …, 1
        let mut looks = Looks { staging: self.staging, begun: None };
        for (i, step) in table.steps.iter().enumerate() {
            // Lines 3 and 4
            reverse_step.run(device, &mut Solo)?;
            let done = i + 1;
            let is_stage = |stage: &usize| (stage + 1) * table.steps.len() / (stages + 1) == done;
            let wanted = image * (count - first).min(self.batch);
            let mut bad = None;
            if done == table.steps.len() || (0..stages).any(|stage| is_stage(&stage)) || device.steps_ahead() == 0 {
                device.download(self.io, self.slots.x.offset / size_of::<f32>(), x).map_err(SampleError::from)?;
                bad = not_finite(&x[..wanted]).map(|bad| (bad, step.timestep));
            } else if done.is_multiple_of(LOOK) {
                bad = looks.look(device, wanted)?;
                looks.begin(device, self.io, self.slots.x, step.timestep)?;
            }
            for stage in (0..stages).filter(is_stage) {
                kept[stage].clear();
                kept[stage].extend_from_slice(&x[..wanted]); // within what was reserved
            }
            let bad = bad.map(|(bad, timestep)| NotFinite { image: first + bad / image, timestep });
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

/// Looks at images on their way on a device with queues: one is begun when the one before it is looked at, so that the device has always
/// something to do, and never more than the steps between two of them. A number that is not finite stays so until the last step.
struct Looks {
    staging: StagingId,
    /// The timestep after which x was to be copied.
    begun: Option<u32>,
}

impl Looks {
    fn begin(&mut self, device: &mut Device, io: BufferId, x: Slot, timestep: u32) -> Result<(), SampleError> {
        self.begun = Some(timestep);
        Ok(device.begin_download(io, x, self.staging, 0)?)
    }

    /// The first of so many numbers that was not finite then, and the timestep.
    fn look(&mut self, device: &mut Device, wanted: usize) -> Result<Option<(usize, u32)>, SampleError> {
        let Some(timestep) = self.begun.take() else { return Ok(None) };
        let words = device.staged(self.staging)?;
        Ok(not_finite(&bytemuck::cast_slice(words)[..wanted]).map(|bad| (bad, timestep)))
    }
}

fn not_finite(values: &[f32]) -> Option<usize> {
    values.iter().position(|value| !value.is_finite())
}

/// The stream of x_T of image `index`.
fn initial_noise_of(seed: u64, index: usize) -> Stream {
    Stream { seed, kind: Kind::Sample, layer: 0, sample: index as u32, step: 0 }
}
