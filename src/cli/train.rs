//! `ddpm-dist train`

use super::exit::{Code, Failure, OrFail};
use super::source::Source;
use super::{Common, ConfigArguments, absolute, program, stop_on_signals};
use crate::checkpoint::{Layout, Start, Want};
use crate::collective::Solo;
use crate::report::Console;
use crate::train::{Config, Ended, Initial, Options, TrainError, differences, train};
use crate::unet::UnetConfig;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Where the run lives [default: runs/ and the config's name]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Begin anew; refuses a directory that holds a run
    #[arg(long)]
    fresh: bool,
    /// With --fresh: remove the run that is there
    #[arg(long, requires = "fresh")]
    overwrite: bool,
    /// Begin with the weights of a run, checkpoint or diffusers directory of the same model
    #[arg(long, value_name = "DIR")]
    init: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let mut config = arguments.config.load()?;
    let console = common.console();
    let stop = stop_on_signals()?;
    let file = &arguments.config.config;
    let run_dir = arguments
        .run_dir
        .unwrap_or_else(|| PathBuf::from("runs").join(file.file_stem().unwrap_or_else(|| "run".as_ref())));
    // The stored config must find the data from any directory, and say how large the images are.
    if let Ok(path) = config.data.locate(Some(file)) {
        config.data.path = absolute(&path);
    }
    let source = match &arguments.init {
        Some(path) => Some(open_initial(path, &config, &console)?),
        None => None,
    };
    let initial = source.as_ref().map(|source| |layout: &Layout| source.flat(layout).map_err(|f| f.to_string()));
    let start = match arguments.fresh {
        true => Start::Fresh { overwrite: arguments.overwrite },
        false => Start::Resume,
    };
    let options = Options {
        run_dir: &run_dir,
        start,
        config_file: Some(file),
        program: &program(),
        initial: initial.as_ref().map(|f| f as &Initial),
        stop: &stop,
        console: &console,
    };
    let ended = train(&mut config, &mut common.device(), &mut Solo, &options).map_err(|error| {
        let code = code_of(&error);
        match error {
            // Said as a value of the file, with its line.
            TrainError::OutOfRange(refused) => arguments.config.refused(refused),
            error => Failure::new(code, error),
        }
    })?;
    Ok(match ended {
        Ended::Finished => ExitCode::SUCCESS,
        Ended::Stopped => ExitCode::from(Code::Preempted as u8),
    })
}

/// The model whose weights a run begins with; it must be the config's, but for dropout.
fn open_initial(path: &Path, config: &Config, console: &Console) -> Result<Source, Failure> {
    let source = Source::open(path, Want::Ema, console)?;
    let mut theirs = config.clone();
    theirs.model = UnetConfig { dropout: config.model.dropout, ..source.model.clone() };
    if let Some(d) = differences(&theirs, config).or_fail(Code::Usage)?.first() {
        let message = format!("--init {}: {} is {} there, {} in the config", path.display(), d.key, d.saved, d.now);
        return Err(Failure::new(Code::Usage, message));
    }
    // A network alone does not say what it predicts.
    if let Ok((process, _)) = source.process()
        && process.objective != config.diffusion.objective
    {
        let (theirs, ours) = (process.objective, config.diffusion.objective);
        console.alarm(format!("--init {}: its network predicts {theirs:?}, the config's {ours:?}", path.display()));
    }
    Ok(source)
}

fn code_of(error: &TrainError) -> Code {
    match error {
        TrainError::Config(_) | TrainError::OutOfRange(_) => Code::Usage,
        TrainError::Data(crate::data::DataError::Config(_)) => Code::Usage,
        TrainError::Data(crate::data::DataError::Stopped) => Code::Preempted,
        TrainError::Data(_) => Code::Data,
        TrainError::RunDir(_)
        | TrainError::Checkpoint(_)
        | TrainError::Layout(_)
        | TrainError::Contradiction { .. }
        | TrainError::UnknownConfig { .. }
        | TrainError::OtherData { .. }
        | TrainError::Initial(_)
        | TrainError::NotSaved { .. }
        | TrainError::Report(_) => Code::State,
        TrainError::Diverged { .. } => Code::Diverged,
        TrainError::Sample(error) => super::sample::code_of(error),
        TrainError::Device(_) => Code::Device,
        TrainError::Run(_) => Code::PeerLost,
    }
}
