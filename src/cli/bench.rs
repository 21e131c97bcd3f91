use super::exit::Failure;
use std::process::ExitCode;
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: super::ConfigArguments,
}
pub(super) fn run(_: Arguments, _: &super::Common) -> Result<ExitCode, Failure> {
    Ok(ExitCode::SUCCESS)
}
