//! `ddpm-dist sample`

use super::exit::{Code, Failure, OrFail};
use super::source::Source;
use super::{Common, stop_on_signals};
use crate::checkpoint::Want;
use crate::device::DeviceError;
use crate::diffusion::{SamplerKind, SamplerTable, Schedule};
use crate::report::{GridOptions, Images, OutputFormat, check_output, read_npy, write_images};
use crate::sample::{Request, SampleError, Sampler};
use crate::train::layout_for_checkpoints;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Images that go through the network together on the CPU; images do not depend on it.
const BATCH: usize = 16;
/// Stages that an animation shows.
const FRAMES: usize = 50;

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// Algorithm 2 of the paper
    Ddpm,
    /// Song, Meng, Ermon 2020
    Ddim,
}

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Run directory (its averaged weights), checkpoint, or diffusers directory
    source: PathBuf,
    /// Number of images
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Key of the random numbers: image i depends on seed and i alone
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Reverse process [default: that of the config or scheduler]
    #[arg(long, value_enum)]
    sampler: Option<Kind>,
    /// Network evaluations per image [default: those of the config or scheduler]
    #[arg(long, value_name = "K")]
    steps: Option<usize>,
    /// DDIM's η: 0 is deterministic, 1 as random as DDPM
    #[arg(long)]
    eta: Option<f64>,
    /// x_T of all images, f32 [N, H, W, C]
    #[arg(long, value_name = "FILE.npy")]
    init_noise: Option<PathBuf>,
    /// grid.png, a folder (dir/) of PNGs, .npy or .npz, or .gif (the denoising as an animation)
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let console = common.console();
    let count = arguments.count as usize;
    let format = check_output(&arguments.out, count).or_fail(Code::Usage)?;
    let stop = stop_on_signals()?;
    let source = Source::open(&arguments.source, Want::Ema, &console)?;
    let size = source.size()?;
    source.model.validate(size[0], size[1]).or_fail(Code::State)?;

    let mut choice = source.sampler.clone();
    if let Some(kind) = arguments.sampler {
        choice.sampler = match kind {
            Kind::Ddpm => SamplerKind::Ddpm,
            Kind::Ddim => SamplerKind::Ddim,
        };
    }
    choice.steps = arguments.steps.unwrap_or(choice.steps);
    choice.eta = arguments.eta.unwrap_or(choice.eta);
    if choice.sampler == SamplerKind::Ddpm && arguments.eta.is_some_and(|eta| eta != 0.0) {
        return Err(Failure::new(Code::Usage, "--eta belongs to --sampler ddim; Algorithm 2 has its own variance"));
    }
    let schedule = Schedule::new(&source.diffusion).or_fail(Code::State)?;
    let table = SamplerTable::new(&schedule, &choice).or_fail(Code::Usage)?;
    let noise = match &arguments.init_noise {
        Some(path) => Some(read_noise(path, [count, size[0], size[1], source.model.image_channels])?),
        None => None,
    };

    let mut device = common.device();
    let sampler = Sampler::new(&mut device, &source.model, size, BATCH, None).map_err(failure)?;
    let layout = layout_for_checkpoints(sampler.layout()).or_fail(Code::State)?;
    let weights = device
        .allocate(layout.elements() * size_of::<f32>())
        .map_err(|e: DeviceError| Failure::new(Code::Device, e))?;
    device.upload(weights, 0, &source.flat(&layout)?);

    let bar = console.bar("sampling", (count.div_ceil(BATCH) * table.steps.len()) as u64);
    let mut frames = Frames::new(format, count, sampler.size(), table.steps.len());
    let request = Request { count, seed: arguments.seed, initial_noise: noise.as_deref() };
    let images = sampler
        .sample(&mut device, weights, &table, request, |done, _, first, x| {
            bar.set(done as u64);
            frames.keep(done, first, x);
            !stop.load(Ordering::Relaxed)
        })
        .map_err(failure)?;
    drop(bar);
    let Some(images) = images else {
        return Err(Failure::new(Code::Preempted, "stopped; nothing is written"));
    };
    let [height, width, channels] = sampler.size();
    let shape = [count, height, width, channels];
    let mut stages = Vec::new();
    for pixels in frames.stages.iter().chain([&images]) {
        stages.push(Images::new(pixels, shape).or_fail(Code::Failed)?);
    }
    write_images(&arguments.out, &stages, &GridOptions::default()).or_fail(Code::Failed)?;
    console.last(format!("{count} images in {}", arguments.out.display()));
    Ok(ExitCode::SUCCESS)
}

fn failure(error: SampleError) -> Failure {
    Failure::new(code_of(&error), error)
}

pub(super) fn code_of(error: &SampleError) -> Code {
    match error {
        SampleError::Device(_) => Code::Device,
        SampleError::Run(_) => Code::PeerLost,
        SampleError::NotFinite { .. } => Code::Diverged,
        SampleError::InitialNoise { .. } => Code::Usage,
    }
}

fn read_noise(path: &std::path::Path, expected: [usize; 4]) -> Result<Vec<f32>, Failure> {
    let (values, shape) = read_npy(path).or_fail(Code::Data)?;
    if shape != expected {
        let message = format!("{}: an array of shape {shape:?}, expected [N, H, W, C] = {expected:?}", path.display());
        return Err(Failure::new(Code::Usage, message));
    }
    Ok(values)
}

/// The stages of an animation; none for other formats.
struct Frames {
    stages: Vec<Vec<f32>>,
    /// Reverse steps of one batch.
    steps: usize,
    image: usize,
}

impl Frames {
    fn new(format: OutputFormat, count: usize, size: [usize; 3], steps: usize) -> Frames {
        let stages = if format == OutputFormat::Gif { FRAMES.min(steps) - 1 } else { 0 };
        let image = size.iter().product();
        Frames { stages: vec![vec![0.0; count * image]; stages], steps, image }
    }

    /// Keeps the images of a batch where the number of steps done (over all batches) is that of a stage.
    fn keep(&mut self, done: usize, first: usize, x: &[f32]) {
        let (step, stages) = ((done - 1) % self.steps + 1, self.stages.len() + 1);
        for (i, stage) in self.stages.iter_mut().enumerate() {
            if step == (i + 1) * self.steps / stages {
                stage[first * self.image..][..x.len()].copy_from_slice(x);
            }
        }
    }
}
