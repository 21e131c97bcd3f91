//! The `ddpm-dist` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ddpm_dist::cli::main()
}
