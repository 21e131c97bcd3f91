//! `ddpm-dist sample`

use super::exit::{Code, Failure, OrFail, code_of_run};
use super::ranks::Ranks;
use super::source::Source;
use super::{Common, Stop};
use crate::checkpoint::Want;
use crate::diffusion::{DiffusionConfig, SamplerConfig, SamplerKind, SamplerTable, Schedule};
use crate::files::digest;
use crate::machine::this_program;
use crate::report::{
    GridOptions, ImageStream, Images, OutputFormat, ReportError, check_output, read_npy, write_images,
};
use crate::sample::{Finished, Request, ReverseProcess, ReverseStep, SampleError, Sampler, room_for};
use crate::tape::agree_on_plans;
use crate::train::{checksum, layout_for_checkpoints};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

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
    /// Images that go through the network together, a matter of speed and memory [default: sample.batch of the run, 16 for a diffusers
    /// directory]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch: Option<u16>,
    /// x_T of all images, f32 [N, H, W, C]
    #[arg(long, value_name = "FILE.npy")]
    init_noise: Option<PathBuf>,
    /// grid.png, a folder (dir/) of PNGs, .npy or .npz, or .gif (the denoising as an animation)
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let count = arguments.count as usize;
    let format = check_output(&arguments.out, count).or_fail(Code::Usage)?;
    let stop = Stop::on_signals()?;
    let mut ranks = Ranks::join(common, &stop, None)?;
    let console = ranks.console(common);
    let source = Source::open(&arguments.source, Want::Ema, &console)?;
    let size = source.size()?;
    source.model.validate(size[0], size[1]).or_fail(Code::State)?;
    let batch = arguments.batch.map_or(source.batch, usize::from);
    source.model.validate_work(size[0], size[1], batch, "--batch").or_fail(Code::Usage)?;
    let (diffusion, choice) = source.process()?;
    let table = table(&arguments, diffusion, choice.clone())?;
    let noise = match &arguments.init_noise {
        Some(path) => Some(read_noise(path, [count, size[0], size[1], source.model.image_channels])?),
        None => None,
    };

    let mut device = ranks.device(common)?;
    let batch = device.kind().sampling_batch(batch, count, ranks.number());
    let precision = source.precision_on(device.kind());
    let step = ReverseStep { model: &source.model, size, batch, steps: table.steps.len(), layout: None };
    let sampler = Sampler::new(&mut device, &step, precision)?;
    let layout = layout_for_checkpoints(sampler.layout()).or_fail(Code::State)?;
    let weights = device.allocate(layout.elements() * size_of::<f32>()).map_err(SampleError::from)?;
    device.upload(weights, 0, &source.flat(&layout)?).map_err(SampleError::from)?;
    if ranks.number() > 1 {
        // A run that trains meanwhile may show them different checkpoints, and each node its own file system.
        let step = source.step().map_or_else(String::new, |step| format!(" of step {step}"));
        let checksum = checksum(&device, &[weights], layout.elements()).map_err(SampleError::from)?;
        let process = digest(format!("{table:?} {noise:?}").as_bytes());
        ranks.same_everywhere(&format!(
            "weights{step} (checksum {checksum:016x}), {count} images of seed {} in {} steps (sampler and noise {process}), {}",
            arguments.seed,
            table.steps.len(),
            this_program().or_fail(Code::Failed)?,
        ))?;
    }
    drop(source);
    let agreed = agree_on_plans(&mut device, ranks.collective(), &sampler.pieces(), stop.flag());
    if !agreed.map_err(|error| ranks.explained(code_of_run(&error), &error, error.collective()))? {
        return Err(Failure::new(stop.code(), "stopped before the first image"));
    }

    let stages = if format == OutputFormat::Gif { FRAMES.min(table.steps.len()) - 1 } else { 0 };
    // Rank 0 writes what all have made.
    let mut output = match ranks.is_rank_zero() {
        true => Some(Output::create(&arguments.out, format, count, sampler.size(), stages)?),
        false => None,
    };
    let bar = console.bar("sampling", (count.div_ceil(batch * ranks.number()) * table.steps.len()) as u64);
    let request = Request { count, seed: arguments.seed, initial_noise: noise.as_deref(), stages };
    let finished = sampler.sample_batches(
        &mut device,
        ranks.collective(),
        ReverseProcess { weights, table: &table },
        request,
        |at| {
            bar.set(at.done as u64);
            !stop.is_set()
        },
        |batch| output.as_mut().map_or(Ok(()), |output| output.append(&batch)).map_err(Unfinished::Writing),
    );
    drop(bar);
    std::iter::from_fn(|| device.take_notice()).for_each(|text| console.alarm(text));
    let finished = finished.map_err(|unfinished| match unfinished {
        Unfinished::Sampling(error) => ranks.explained(code_of(&error), &error, error.collective()),
        Unfinished::Writing(failure) => failure,
    })?;
    if let Some(output) = output {
        output.finish(&arguments.out, finished, sampler.size())?;
    } else if finished == count {
        return Ok(ExitCode::SUCCESS);
    }
    let out = arguments.out.display();
    if finished == count {
        console.last(format!("{count} images in {out}"));
        return Ok(ExitCode::SUCCESS);
    }
    let written = match finished {
        0 => "nothing is written".to_string(),
        _ => format!("those are in {out}"),
    };
    Err(Failure::new(stop.code(), format!("stopped after {finished} of {count} images; {written}")))
}

/// The reverse process: the source's own, but for what the command line says.
fn table(
    arguments: &Arguments,
    diffusion: &DiffusionConfig,
    mut choice: SamplerConfig,
) -> Result<SamplerTable, Failure> {
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
    let schedule = Schedule::new(diffusion).or_fail(Code::State)?;
    SamplerTable::new(&schedule, &choice).or_fail(Code::Usage)
}

/// Why there are not all images.
enum Unfinished {
    Sampling(SampleError),
    Writing(Failure),
}

impl From<SampleError> for Unfinished {
    fn from(error: SampleError) -> Unfinished {
        Unfinished::Sampling(error)
    }
}

/// The exit code of a failure of sampling.
pub(super) fn code_of(error: &SampleError) -> Code {
    match error {
        SampleError::OutOfMemory { .. } => Code::Device,
        SampleError::Run(error) => code_of_run(error),
        SampleError::NotFinite { .. } => Code::Diverged,
        SampleError::InitialNoise { .. } => Code::Usage,
    }
}

impl From<SampleError> for Failure {
    fn from(error: SampleError) -> Failure {
        Failure::new(code_of(&error), error)
    }
}

fn read_noise(path: &Path, expected: [usize; 4]) -> Result<Vec<f32>, Failure> {
    let (values, shape) = read_npy(path).or_fail(Code::Data)?;
    if shape != expected {
        let message = format!("{}: an array of shape {shape:?}, expected [N, H, W, C] = {expected:?}", path.display());
        return Err(Failure::new(Code::Usage, message));
    }
    if let Some(i) = values.iter().position(|value| !value.is_finite()) {
        let [_, h, w, c] = expected;
        let place = [i / (h * w * c), i / (w * c) % h, i / c % w, i % c];
        let message = format!("{}: element {place:?} is {}, expected a finite number", path.display(), values[i]);
        return Err(Failure::new(Code::Data, message));
    }
    Ok(values)
}

/// The output is named on the command line; a full disk is another matter.
fn cannot_be_written(error: ReportError) -> Failure {
    let code = match &error {
        ReportError::NoSpace { .. } => Code::Failed,
        _ => Code::Usage,
    };
    Failure::new(code, error)
}

/// What becomes of the images.
struct Output {
    /// The stages of an animation; none for other formats.
    stages: Vec<Vec<f32>>,
    images: Kept,
}

/// Images that are finished.
enum Kept {
    /// Written as they come.
    Streamed(ImageStream),
    /// Together, for a grid or an animation.
    Whole(Vec<f32>),
}

impl Output {
    /// Finds out whether `path` can be written, and takes the memory that its form needs.
    fn create(
        path: &Path,
        format: OutputFormat,
        count: usize,
        size: [usize; 3],
        stages: usize,
    ) -> Result<Output, Failure> {
        let [height, width, channels] = size;
        let shape = [count, height, width, channels];
        let images = match ImageStream::create(path, format, shape).map_err(cannot_be_written)? {
            Some(stream) => Kept::Streamed(stream),
            None => Kept::Whole(room_for(count * height * width * channels, "the images")?),
        };
        let mut room = Vec::with_capacity(stages);
        for _ in 0..stages {
            room.push(room_for(count * height * width * channels, "the stages of the animation")?);
        }
        Ok(Output { stages: room, images })
    }

    /// Takes a finished batch.
    fn append(&mut self, batch: &Finished<'_>) -> Result<(), Failure> {
        // Within what was reserved.
        self.stages.iter_mut().zip(batch.stages).for_each(|(all, stage)| all.extend_from_slice(stage));
        match &mut self.images {
            Kept::Streamed(stream) => stream.append(batch.images).or_fail(Code::Failed),
            Kept::Whole(images) => {
                images.extend_from_slice(batch.images);
                Ok(())
            }
        }
    }

    /// Writes the `finished` first images, if there are any.
    fn finish(self, path: &Path, finished: usize, [height, width, channels]: [usize; 3]) -> Result<(), Failure> {
        match self.images {
            Kept::Streamed(stream) => stream.finish().or_fail(Code::Failed),
            Kept::Whole(_) if finished == 0 => Ok(()),
            Kept::Whole(images) => {
                let mut stages = Vec::new();
                for pixels in self.stages.iter().chain([&images]) {
                    let shape = [finished, height, width, channels];
                    stages.push(Images::new(&pixels[..images.len()], shape).or_fail(Code::Failed)?);
                }
                write_images(path, &stages, &GridOptions::default()).or_fail(Code::Failed)
            }
        }
    }
}
