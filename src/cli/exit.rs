//! Exit codes, the same for every subcommand.

use crate::cluster::launcher::{Meaning, error_file};
use crate::collective::CollectiveError;
use crate::device::DeviceError;
use crate::tape::RunError;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How a command ends other than well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Anything that has no code of its own.
    Failed = 1,
    /// Command line or config.
    Usage = 2,
    /// Data set or image file.
    Data = 3,
    /// Checkpoint, run directory or diffusers directory.
    State = 4,
    /// Loss, gradient or sample is not finite.
    Diverged = 5,
    /// A rank is gone.
    PeerLost = 6,
    /// Too little memory, or a device that does not work.
    Device = 7,
    /// The ranks have no place to meet: a port that is taken, a store or a node that cannot be reached.
    Rendezvous = 8,
    /// Ranks hold different weights: memory or a device is at fault.
    Corrupt = 9,
    /// Stopped by a signal or a time limit after the state was saved: start again to go on (`EX_TEMPFAIL`).
    Preempted = 75,
    /// Stopped by SIGINT, with no state to go on from; as shells say it.
    Interrupted = 130,
    /// Stopped by SIGTERM, SIGUSR1 or SIGUSR2 likewise.
    Terminated = 143,
}

/// How long a process that fails may take to give back what it has.
const LEAVING: Duration = Duration::from_secs(5);

/// What Rust ends a process with that panics.
pub const PANICKED: u8 = 101;

/// The text that `--help` ends with.
pub const HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 command line or config, 3 data set or image file, 4 checkpoint or run directory, 5 training diverged, \
6 a rank or node was lost, 7 device or memory, 8 ranks cannot meet (port taken, node missing), \
9 ranks hold different weights, 75 training stopped by a signal or --max-time with its state saved, 101 a mistake of this program, \
130 and 143 stopped by SIGINT and by another signal otherwise (by a second SIGINT, or in a command that has no state)";

impl Code {
    /// All of them.
    const ALL: [Code; 12] = [
        Code::Failed,
        Code::Usage,
        Code::Data,
        Code::State,
        Code::Diverged,
        Code::PeerLost,
        Code::Device,
        Code::Rendezvous,
        Code::Corrupt,
        Code::Preempted,
        Code::Interrupted,
        Code::Terminated,
    ];
}

/// What the exit code of a rank means to its launcher. What lies in the command, the data or the state would fail again.
pub fn meaning(code: i32) -> Meaning {
    let Some(known) = Code::ALL.into_iter().find(|known| *known as i32 == code) else {
        return match code {
            0 => Meaning::Done,
            code if code == i32::from(PANICKED) => Meaning::Failed("a mistake of the program"),
            _ => Meaning::Failed("not one of this program's"),
        };
    };
    match known {
        Code::Failed => Meaning::Failed("failed"),
        Code::Usage => Meaning::Final("command line or config"),
        Code::Data => Meaning::Final("data set or image file"),
        Code::State => Meaning::Final("checkpoint or run directory"),
        Code::Diverged => Meaning::Final("training diverged"),
        Code::PeerLost => Meaning::PeerLost,
        Code::Device => Meaning::Failed("device or memory"),
        Code::Rendezvous => Meaning::Failed("ranks cannot meet"),
        Code::Corrupt => Meaning::Failed("ranks hold different weights"),
        Code::Preempted => Meaning::Left,
        Code::Interrupted => Meaning::Failed("stopped by SIGINT"),
        Code::Terminated => Meaning::Failed("stopped by SIGTERM"),
    }
}

/// Prints why this process fails, tells its launcher if it has one, and gives the exit code.
pub fn report(code: u8, message: &str) -> ExitCode {
    // Where stderr is gone (a closed pipe, a full disk) the exit code is all that can still be said.
    let _ = writeln!(io::stderr(), "ddpm-dist: {message}");
    tell_launcher(code, message);
    ExitCode::from(code)
}

/// Writes the message to where a launcher, torchrun's or our own, looks for the first cause.
pub fn tell_launcher(code: u8, message: &str) {
    if let Some(path) = error_file::path_from_environment()
        && let Err(error) = error_file::write(&path, message, code)
    {
        let _ = writeln!(io::stderr(), "ddpm-dist: cannot write {} for the launcher: {error}", path.display());
    }
}

/// A message for the user and the exit code that goes with it.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    message: String,
    is_said_elsewhere: bool,
    is_reported: bool,
}

impl Failure {
    /// A failure with its message.
    pub fn new(code: Code, message: impl Display) -> Failure {
        Failure { code, message: message.to_string(), is_said_elsewhere: false, is_reported: false }
    }

    /// The same, if another rank prints it.
    pub fn said_elsewhere(self) -> Failure {
        Failure { is_said_elsewhere: true, ..self }
    }

    /// Prints the message, unless another rank does or it has been printed, tells the launcher if there is one, and gives the exit code.
    pub fn report(self) -> ExitCode {
        let code = self.code as u8;
        if self.is_reported {
            return ExitCode::from(code);
        }
        if self.is_said_elsewhere {
            tell_launcher(code, &self.message);
            return ExitCode::from(code);
        }
        report(code, &self.message)
    }

    /// Reports it now, and ends the process with its exit code where that does not end by itself soon: what a GPU or its libraries have under
    /// way may never end, and they may wait for it when they are given back, or in what they have the system do at the exit of a process.
    pub fn leave_soon(self) -> Failure {
        let (code, is_said_elsewhere, message) = (self.code, self.is_said_elsewhere, self.message.clone());
        self.report();
        // Where the system starts no thread, the process ends by itself or by its launcher.
        let _ = std::thread::Builder::new().name("leaving".into()).spawn(move || {
            std::thread::sleep(LEAVING);
            // `_exit`: nothing that was registered for an exit runs.
            signal_hook::low_level::exit(code as i32);
        });
        Failure { code, message, is_said_elsewhere, is_reported: true }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// The exit code of a program that stopped: the others were lost, unless it is this rank's own system that refused.
pub fn code_of_run(error: &RunError) -> Code {
    match error {
        RunError::Device(DeviceError::Precision(_)) => Code::Usage,
        RunError::Device(_) => Code::Device,
        RunError::Collective(
            CollectiveError::Device(_) | CollectiveError::DeviceOf { .. } | CollectiveError::Stuck(_),
        ) => Code::Device,
        RunError::Collective(CollectiveError::Io { .. } | CollectiveError::TooLong { .. }) => Code::Failed,
        RunError::Collective(_) => Code::PeerLost,
    }
}

/// Gives an error of a room its exit code.
pub trait OrFail<T> {
    /// `code` for any error.
    fn or_fail(self, code: Code) -> Result<T, Failure>;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    fn or_fail(self, code: Code) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(code, error))
    }
}
