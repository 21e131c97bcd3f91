//! `ddpm-dist export`

use super::exit::{Code, Failure, OrFail};
use super::source::Source;
use crate::checkpoint::{Want, diffusers};
use crate::report::{Console, Verbosity};
use crate::sample::reverse_step_program;
use crate::train::layout_for_checkpoints;
use std::path::PathBuf;
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

pub(super) fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let console = Console::new(Verbosity::Normal);
    let want = match arguments.weights {
        Weights::Ema => Want::Ema,
        Weights::Raw => Want::Params,
    };
    let source = Source::open(&arguments.run, want, &console)?;
    let size = source.size()?;
    let (diffusion, _) = source.process()?;
    let program = reverse_step_program(&source.model, size, 1, None);
    let layout = layout_for_checkpoints(&program.layout).or_fail(Code::State)?;
    let values = source.flat(&layout)?;
    diffusers::export(&arguments.dir, &source.model, size, diffusion, &layout, &values).or_fail(Code::State)?;
    let dir = arguments.dir.display();
    console.last(format!("{dir} is written; in Python: DDPMPipeline.from_pretrained(\"{dir}\")"));
    Ok(ExitCode::SUCCESS)
}
