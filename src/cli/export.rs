//! `ddpm-dist export`

use super::exit::{Code, Failure, OrFail};
use super::source::Source;
use super::{Common, program, quoted};
use crate::checkpoint::{Want, diffusers};
use crate::device::Target;
use crate::diffusion::{DiffusionConfig, SamplerConfig, SamplerKind, SamplerTable, Schedule};
use crate::sample::ReverseStep;
use crate::train::layout_for_checkpoints;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Which weights.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Weights {
    /// The moving average
    Ema,
    /// Those that are trained
    Raw,
}

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Run directory or checkpoint
    run: PathBuf,
    /// Directory to make
    dir: PathBuf,
    /// Which weights
    #[arg(long, value_enum, default_value = "ema")]
    weights: Weights,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let console = common.console();
    let want = match arguments.weights {
        Weights::Ema => Want::Ema,
        Weights::Raw => Want::Params,
    };
    let source = Source::open(&arguments.run, want, &console)?;
    let size = source.size()?;
    let (diffusion, sampler) = source.process()?;
    let step = ReverseStep { model: &source.model, size, batch: 1, steps: 1, layout: None };
    let program = step.program(Target::default());
    let layout = layout_for_checkpoints(&program.layout).or_fail(Code::State)?;
    let values = source.flat(&layout)?;
    let process = (diffusion, sampler);
    let same = samples_alike(diffusion, sampler)?;
    diffusers::export(&arguments.dir, &source.model, size, process, &layout, &values).or_fail(Code::State)?;
    console.last(format!("{} is written", arguments.dir.display()));
    console.say(next(&arguments.dir, sampler));
    if !same {
        let SamplerConfig { steps, .. } = sampler;
        console.say(format!(
            "  note        diffusers' DDIM goes back by whole multiples of T/steps, and so does `sample` from this directory; with {steps} \
             steps that is not quite the run's own order, and images differ a little"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether the run's reverse process is the one that diffusers makes of the exported scheduler.
fn samples_alike(diffusion: &DiffusionConfig, sampler: &SamplerConfig) -> Result<bool, Failure> {
    let schedule = Schedule::new(diffusion).or_fail(Code::Usage)?;
    let table = |uniform_stride| {
        SamplerTable::new(&schedule, &SamplerConfig { uniform_stride, ..sampler.clone() }).or_fail(Code::Usage)
    };
    Ok(table(false)?.steps == table(true)?.steps)
}

/// How to sample from the directory as from the run: a pipeline's files hold neither DDIM beside DDPM, nor the number of steps, nor η.
fn next(dir: &Path, sampler: &SamplerConfig) -> String {
    let SamplerConfig { sampler, steps, eta, .. } = sampler;
    let (name, swap, argument) = match sampler {
        SamplerKind::Ddpm => ("ddpm".to_string(), "", String::new()),
        SamplerKind::Ddim => (
            format!("ddim --eta {eta}"),
            "\n              pipeline = DDIMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))",
            format!(", eta={eta}"),
        ),
    };
    format!(
        "  sample      {} sample {} --sampler {name} --steps {steps} --out samples.png\n  \
           in Python   pipeline = DDPMPipeline.from_pretrained({:?}){swap}\n              \
           pipeline(num_inference_steps={steps}{argument}).images[0]",
        program(),
        quoted(dir),
        dir.display().to_string(),
    )
}
