//! The command line: one file per subcommand, which parses, calls and prints.

mod bench;
mod checkpoint;
mod doctor;
mod exit;
mod guard;
mod export;
mod launch;
mod plan;
mod ranks;
mod sample;
mod source;
mod stdout;
mod train;

use crate::cluster::StopRequest;
use crate::config::OutOfRange;
use crate::device::{Device, DeviceError, DeviceKind, Precision, Target, cpu::Cpu, cuda::Cuda};
use crate::report::{Console, Verbosity};
use crate::train::Config;
use clap::{Args, Parser, Subcommand, ValueEnum};
use exit::{Code, Failure, OrFail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Trains and samples denoising diffusion models (DDPM).
#[derive(Debug, Parser)]
#[command(version, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model; goes on from the newest checkpoint of the run directory
    Train(train::Arguments),
    /// Make images with a trained model
    Sample(sample::Arguments),
    /// Write a run as a directory that Python's diffusers loads
    Export(export::Arguments),
    /// Verify, show or reshard checkpoints
    #[command(subcommand)]
    Checkpoint(checkpoint::Arguments),
    /// Show parameters, FLOPs and memory of a config without running it
    Plan(plan::Arguments),
    /// Measure the speed of a training step
    Bench(bench::Arguments),
    /// Show what this machine offers and what to do about it
    Doctor,
}

/// Options of every subcommand.
#[derive(Debug, Args)]
struct Common {
    /// CPU threads [default: as many as the process may use, divided among the ranks that share its cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What to compute on
    #[arg(long, global = true, value_enum, default_value_t)]
    device: DeviceChoice,
    /// Say nothing but alarms and the last message
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Say more
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(flatten)]
    launch: launch::LaunchArguments,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DeviceChoice {
    /// A GPU of NVIDIA if there is one that this program can use, else CPU cores
    #[default]
    Auto,
    /// CPU cores
    Cpu,
    /// A GPU of NVIDIA; each rank of a machine takes the one of its number there
    Cuda,
}

impl Common {
    fn console(&self) -> Console {
        Console::new(Verbosity::from_flags(self.quiet, self.verbose))
    }

    /// Threads to compute with: what was asked for, or such a part of what affinity and cgroup allow.
    fn threads(&self, part: f64) -> usize {
        // Thirds add up to a whole but for rounding.
        let own = || (available_threads() as f64 * part + 1e-9) as usize;
        self.threads.map_or_else(|| own().max(1), usize::from)
    }

    /// What a plan is made for: CPU cores, unless a GPU is asked for.
    fn planned_target(&self, precision: Precision) -> Result<Target, Failure> {
        match (self.device, precision) {
            (DeviceChoice::Cuda, precision) => Ok(Target { kind: DeviceKind::Cuda, precision }),
            (_, Precision::F32) => Ok(Target::default()),
            (_, precision) => {
                let error = DeviceError::Precision(precision);
                Err(Failure::new(Code::Usage, format!("{error}, or plan for a GPU with --device cuda")))
            }
        }
    }

    /// What a rank computes on: the GPU of its number on this machine, or such a part of the cores.
    fn device(&self, local_rank: usize, part: f64) -> Result<Device, Failure> {
        let cpu = || Device::Cpu(Cpu::new(self.threads(part)));
        let choice = if self.launch.wants_gpus() { DeviceChoice::Cuda } else { self.device };
        if choice == DeviceChoice::Cpu {
            return Ok(cpu());
        }
        match Cuda::open(local_rank) {
            Ok(cuda) => {
                // The ranks of a machine have the same.
                if local_rank == 0 {
                    cuda.untested().or_fail(Code::Device)?.into_iter().for_each(|text| self.console().alarm(text));
                }
                Ok(Device::Cuda(Box::new(cuda)))
            }
            Err(error) if choice == DeviceChoice::Cuda => Err(Failure::new(Code::Device, error)),
            Err(error) => {
                if !error.is_absence() {
                    self.console().alarm(format!("computing on CPU cores: {error} (--device cpu does not ask)"));
                }
                Ok(cpu())
            }
        }
    }
}

fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A config file and what is laid over it.
#[derive(Debug, Args)]
struct ConfigArguments {
    /// Config file (TOML), for example configs/quickstart.toml
    config: PathBuf,
    /// Override a value of the config; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
}

impl ConfigArguments {
    fn load(&self) -> Result<Config, Failure> {
        crate::config::load_with(&self.config, &self.sets, Config::validate).or_fail(Code::Usage)
    }

    /// The config's name, for results: its file's without the extension.
    fn name(&self) -> String {
        self.config.file_stem().unwrap_or(self.config.as_os_str()).to_string_lossy().into_owned()
    }

    /// A value that showed to be wrong only beside the images, said with its place in the file.
    fn refused(&self, refused: OutOfRange) -> Failure {
        let refuse = |_: &Config| Err(refused.clone());
        match crate::config::load_with::<Config>(&self.config, &self.sets, refuse) {
            Err(error) => Failure::new(Code::Usage, error),
            Ok(_) => Failure::new(Code::Usage, refused),
        }
    }

    /// The config, and the image size it names, for commands that do not open the data set.
    fn load_with_size(&self) -> Result<(Config, [usize; 2]), Failure> {
        let config = self.load()?;
        let Some(size) = config.data.size else {
            let name = self.config.display();
            return Err(Failure::new(
                Code::Usage,
                format!("{name}: `data.size` is not given: add it, or --set data.size=32"),
            ));
        };
        let size = [size.height, size.width];
        let model = &config.model;
        model
            .validate(size[0], size[1])
            .and_then(|()| model.validate_work(size[0], size[1], config.train.batch, "train.batch"))
            .and_then(|()| model.validate_work(size[0], size[1], config.sample.batch, "sample.batch"))
            .map_err(|refused| self.refused(refused))?;
        Ok((config, size))
    }
}

/// Whether this run was asked to stop, by which signal, to which of its ranks. A second SIGINT ends the process at once; other signals
/// may come twice, as batch systems send them.
#[derive(Clone, Debug, Default)]
struct Stop {
    request: StopRequest,
}

impl Stop {
    fn on_signals() -> Result<Stop, Failure> {
        use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
        let stop = Stop::default();
        // Set by this signal alone: what another rank was told must not make the first one here the second.
        let interrupted = Arc::new(AtomicBool::new(false));
        // In this order: the shutdown looks at the flag before this signal sets it, and whoever sees the flag finds the signal.
        signal_hook::flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, Arc::clone(&interrupted))
            .or_fail(Code::Failed)?;
        signal_hook::flag::register(SIGINT, interrupted).or_fail(Code::Failed)?;
        for signal in [SIGINT, SIGTERM, SIGUSR1, SIGUSR2] {
            let StopRequest { flag, signal: number, user_signal } = &stop.request;
            let number = if matches!(signal, SIGUSR1 | SIGUSR2) { user_signal } else { number };
            signal_hook::flag::register_usize(signal, Arc::clone(number), signal as usize).or_fail(Code::Failed)?;
            signal_hook::flag::register(signal, Arc::clone(flag)).or_fail(Code::Failed)?;
        }
        Ok(stop)
    }

    fn flag(&self) -> &Arc<AtomicBool> {
        &self.request.flag
    }

    fn is_set(&self) -> bool {
        self.request.flag.load(Ordering::SeqCst)
    }

    /// The signal that it came by; 0: none.
    fn signal(&self) -> i32 {
        self.request.signal()
    }

    /// The exit code of a command that has no state to go on from.
    fn code(&self) -> Code {
        match self.signal() {
            signal_hook::consts::SIGINT => Code::Interrupted,
            _ => Code::Terminated,
        }
    }
}

/// This program as it was started, for commands that a user may copy: `ddpm-dist`, or `target/release/ddpm-dist` after `cargo run`.
fn program() -> String {
    let started = std::env::args_os().next().map(PathBuf::from).filter(|path| !path.as_os_str().is_empty());
    let Some(path) = started else { return "ddpm-dist".to_string() };
    // An absolute path below the current directory is shorter without it.
    let here = std::env::current_dir().ok().and_then(|here| path.strip_prefix(here).ok());
    quoted(match here {
        Some(relative) if relative.components().count() > 1 => relative,
        _ => &path,
    })
}

/// `path` as a word of a shell command.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// `path` as it will be found from anywhere.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Parses the command line, runs the command, and gives the exit code.
pub fn main() -> ExitCode {
    // Before all else, so that nothing lives on without its launcher.
    if let Err(failure) = launch::stay_with_launcher() {
        return failure.report();
    }
    launch::tell_of_panics();
    let Cli { command, common } = Cli::parse();
    // A misspelt name must not pass for the level asked for; `doctor` says it among its findings.
    if !matches!(command, Command::Doctor)
        && let Err(unknown) = crate::simd::allowed()
    {
        return Failure::new(Code::Usage, unknown).report();
    }
    match launch::launch_if_asked(&command, &common) {
        Ok(None) => {}
        Ok(Some(code)) => return code,
        Err(failure) => return failure.report(),
    }
    let result = match command {
        Command::Train(arguments) => train::run(arguments, &common),
        Command::Sample(arguments) => sample::run(arguments, &common),
        Command::Export(arguments) => export::run(arguments, &common),
        Command::Checkpoint(arguments) => checkpoint::run(arguments, &common),
        Command::Plan(arguments) => plan::run(arguments, &common),
        Command::Bench(arguments) => bench::run(arguments, &common),
        Command::Doctor => doctor::run(&common),
    };
    match result {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_words_of_a_shell() {
        for (path, word) in [
            ("runs/quickstart", "runs/quickstart"),
            ("", "''"),
            ("my run", "'my run'"),
            ("it's; rm -r *", r"'it'\''s; rm -r *'"),
            ("Größe/é", "Größe/é"),
        ] {
            assert_eq!(quoted(Path::new(path)), word);
        }
    }
}
