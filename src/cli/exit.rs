//! Exit codes, the same for every subcommand.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

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
    /// Ranks hold different weights: memory or a device is at fault.
    Corrupt = 8,
    /// Ranks that did not find each other.
    Meeting = 9,
    /// Stopped by a signal after the state was saved: start again to go on (`EX_TEMPFAIL`).
    Preempted = 75,
    /// Stopped by SIGINT, with no state to go on from; as shells say it.
    Interrupted = 130,
    /// Stopped by SIGTERM likewise.
    Terminated = 143,
}

/// The text that `--help` ends with.
pub const HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 command line or config, 3 data set or image file, 4 checkpoint or run directory, 5 training diverged, \
6 a rank was lost, 7 device or memory, 8 ranks hold different weights, 9 ranks did not meet, 75 training stopped by a signal with its state saved, 130 and 143 stopped by SIGINT and SIGTERM \
otherwise (by the second one, or in a command that has no state)";

/// A message for the user and the exit code that goes with it.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    message: String,
}

impl Failure {
    /// A failure with its message.
    pub fn new(code: Code, message: impl Display) -> Failure {
        Failure { code, message: message.to_string() }
    }

    /// Prints the message and gives the exit code.
    pub fn report(self) -> ExitCode {
        // Where stderr is gone (a closed pipe, a full disk) the exit code is all that can still be said.
        let _ = writeln!(io::stderr(), "ddpm-dist: {}", self.message);
        ExitCode::from(self.code as u8)
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
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
