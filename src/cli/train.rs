//! `ddpm-dist train`

use super::exit::{Code, Failure, OrFail, code_of_run};
use super::ranks::Ranks;
use super::source::Source;
use super::{Common, ConfigArguments, Stop, absolute, program};
use crate::checkpoint::{Layout, Start, Want};
use crate::cluster::requeue;
use crate::data::DataError;
use crate::machine::since_1970;
use crate::rendezvous::{Environment, Launch, OWN_STARTED};
use crate::report::Console;
use crate::train::{Config, Ended, Initial, Options, TrainError, differences, train};
use crate::unet::UnetConfig;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) config: ConfigArguments,
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
    /// Save and leave before so much time is over: minutes, hours:minutes:seconds or days-hours, as Slurm's --time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    max_time: Option<Duration>,
    /// In a job of Slurm: when the run has to leave before its end, put the job into the queue again; not after Ctrl-C, nor after `scancel`
    #[arg(long)]
    requeue: bool,
}

/// How long a rank may take to tell the others by which signal it leaves.
const TOLD: Duration = Duration::from_secs(1);

/// A time as Slurm's `--time` takes it.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || "expected minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]".to_string();
    let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (number(days)?, clock),
        None => (0, text),
    };
    let parts: Vec<u32> = clock.split(':').map(number).collect::<Result<_, _>>()?;
    let [hours, minutes, seconds] = match (text.contains('-'), &parts[..]) {
        (false, [minutes]) => [0, *minutes, 0],
        (false, [minutes, seconds]) => [0, *minutes, *seconds],
        (true, [hours]) => [*hours, 0, 0],
        (true, [hours, minutes]) => [*hours, *minutes, 0],
        (_, [hours, minutes, seconds]) => [*hours, *minutes, *seconds],
        _ => return Err(wrong()),
    };
    let [days, hours, minutes, seconds] = [days, hours, minutes, seconds].map(u64::from);
    Ok(Duration::from_secs(((24 * days + hours) * 60 + minutes) * 60 + seconds))
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let mut config = arguments.config.load()?;
    let stop = Stop::on_signals()?;
    let (asked, speaker, requeue) = (stop.clone(), common.console(), arguments.requeue);
    // Dropped after the ranks, whose libraries use its memory.
    let mut device;
    let mut ranks = Ranks::join_or(common, &stop, Some(Code::Preempted), move |size| {
        if requeue {
            come_back(&asked, size, &speaker);
        }
    })?;
    let (console, joint) = (ranks.console(common), ranks.joint(common));
    let file = &arguments.config.config;
    let run_dir = arguments
        .run_dir
        .unwrap_or_else(|| PathBuf::from("runs").join(file.file_stem().unwrap_or_else(|| "run".as_ref())));
    // The stored config must find the data from any directory, and say how large the images are.
    if let Ok(path) = config.data.locate(Some(file)) {
        config.data.path = absolute(&path);
    }
    let source = match &arguments.init {
        Some(path) => Some(open_initial(path, &config, &joint)?),
        None => None,
    };
    let initial = source.as_ref().map(|source| |layout: &Layout| source.flat(layout).map_err(|f| f.to_string()));
    let start = match arguments.fresh {
        true => Start::Fresh { overwrite: arguments.overwrite },
        false => Start::Resume,
    };
    let deadline = match arguments.max_time {
        Some(time) => Some(started + time.saturating_sub(spent_before(&ranks)?)),
        None => None,
    };
    let (connect, activity) = (ranks.connect(), ranks.activity());
    let options = Options {
        run_dir: &run_dir,
        start,
        config_file: Some(file),
        program: &program(),
        initial: initial.as_ref().map(|f| f as &Initial),
        stop: stop.flag(),
        deadline,
        first_here: ranks.is_first_here(),
        launch: Launch::detect(&Environment::of_this_process()),
        activity: activity.as_deref(),
        connect: connect.as_ref().map(|f| f as &dyn Fn() -> _),
        console: &console,
        joint: &joint,
    };
    device = ranks.training_device(common)?;
    let ended = train(&mut config, &mut device, ranks.collective(), &options);
    let has_left = match &ended {
        Ok(ended) => *ended == Ended::Stopped,
        Err(error) => code_of(error) == Code::Preempted,
    };
    if has_left && arguments.requeue && ranks.is_rank_zero() {
        come_back(&stop, ranks.number(), &console);
    }
    if ended.is_ok() {
        // Rank 0 may serve the store to the others, and batch systems end all ranks when the first leaves.
        ranks.leave_together();
    }
    match ended {
        Ok(Ended::Finished) => Ok(ExitCode::SUCCESS),
        Ok(Ended::Stopped) => Ok(ExitCode::from(Code::Preempted as u8)),
        // Said as a value of the file, with its line.
        Err(TrainError::OutOfRange(refused)) => Err(arguments.config.refused(refused)),
        // The launcher is to blame the ranks that are wrong.
        Err(error @ TrainError::Corrupt { .. }) if !is_among(&error, ranks.rank()) => {
            Err(ranks.said_once(Failure::new(Code::PeerLost, error)))
        }
        Err(error) => {
            let failure = ranks.explained(code_of(&error), &error, error.collective());
            let failure = if error.is_joint() { ranks.said_once(failure) } else { failure };
            // Before the device and the ranks are given back.
            Err(if ranks.number() > 1 { failure.leave_soon() } else { failure })
        }
    }
}

/// What is gone already of the time that this run was given: its launcher has started other ranks before.
fn spent_before(ranks: &Ranks) -> Result<Duration, Failure> {
    let now = since_1970();
    let started = match std::env::var(OWN_STARTED).ok().and_then(|seconds| seconds.parse().ok()) {
        Some(seconds) => Duration::from_secs(seconds),
        None => ranks.first_started(now)?,
    };
    Ok(now.saturating_sub(started))
}

fn is_among(error: &TrainError, rank: usize) -> bool {
    matches!(error, TrainError::Corrupt { ranks, .. } if ranks.contains(&rank))
}

/// Puts the job of Slurm that this run is, if it is one, into the queue again.
fn come_back(stop: &Stop, ranks: usize, console: &Console) {
    let Some(job) = requeue::slurm_job(&Environment::of_this_process()) else { return };
    let since = Instant::now();
    // Another rank's signal has made this one leave, and may itself still be on its way.
    while ranks > 1 && !stop.is_set() && since.elapsed() < TOLD {
        std::thread::sleep(TOLD / 50);
    }
    match requeue::requeue(&job, stop.signal()) {
        Ok(true) => console.say(format!("job {job} is in the queue again")),
        Ok(false) => console.say(format!("job {job} was told to end, and is not put into the queue again")),
        Err(error) => console
            .alarm(format!("job {job} is NOT in the queue again: {error}; its state is saved, so submit it once more")),
    }
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
        TrainError::Data(DataError::Config(_)) => Code::Usage,
        TrainError::Stopped => Code::Preempted,
        // What could be read when the run began may be read again when it begins anew.
        TrainError::Loading { source: DataError::Io { .. }, .. } | TrainError::Program(_) => Code::Failed,
        TrainError::Data(_) | TrainError::Loading { .. } => Code::Data,
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
        TrainError::Device(_) | TrainError::DeviceLost { .. } => Code::Device,
        TrainError::Run(error) => code_of_run(error),
        TrainError::OtherRank { .. } => Code::PeerLost,
        TrainError::Store(_) => Code::Rendezvous,
        TrainError::Unequal { .. } => Code::Usage,
        TrainError::Corrupt { .. } => Code::Corrupt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_slurm() {
        for (text, seconds) in [
            ("90", 5400),
            ("2:30", 150),
            ("1:02:03", 3723),
            ("2-0", 172_800),
            ("1-12:30", 131_400),
            ("0-0:0:7", 7),
            ("0:20", 20),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "1h", "-5", "1:2:3:4", "1-", "1-2:3:4:5", "4294967296", "1.5"] {
            assert!(duration(text).unwrap_err().contains("days-hours"), "{text}");
        }
    }
}
