//! What the ranks of a run make sure of together, before its first step.

use super::resume::differences_of_ranks;
use super::{Config, TrainError};
use crate::collective::{self, Collective, CollectiveError};
use crate::config::{parse, to_toml};
use crate::machine::this_program;
use crate::tape::RunError;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// How often ranks look whether all have done what they wait for.
pub(super) const LOOK: Duration = Duration::from_millis(20);

/// What a rank says that was asked to stop.
const STOPPED: &str = "\0stopped";

/// Gives `result` if it is well at all ranks; else this rank's error, or one that tells of the other rank's.
pub(super) fn together<T>(collective: &mut dyn Collective, result: Result<T, TrainError>) -> Result<T, TrainError> {
    let mine = match &result {
        Ok(_) => String::new(),
        Err(TrainError::Stopped) => STOPPED.to_string(),
        Err(error) => error.to_string(),
    };
    let all = gather(collective, mine.into_bytes())?;
    let value = result?;
    match all.iter().position(|said| !said.is_empty()) {
        None => Ok(value),
        Some(rank) if all[rank] == STOPPED.as_bytes() => Err(TrainError::Stopped),
        Some(rank) => Err(TrainError::OtherRank { rank, message: String::from_utf8_lossy(&all[rank]).into_owned() }),
    }
}

/// Does `work` at rank 0 alone, [`beside`] the others, and goes on at all ranks if it is well there.
pub(super) fn at_rank_zero<T: Send>(
    collective: &mut dyn Collective,
    work: impl FnOnce() -> Result<T, TrainError> + Send,
) -> Result<Option<T>, TrainError> {
    let is_rank_zero = collective.rank() == 0;
    beside(collective, |_| is_rank_zero.then(work).transpose())
}

/// Does `work` while the ranks [stay in touch](collective::beside), and goes on if it is well at all of them.
pub(super) fn beside<T: Send>(
    collective: &mut dyn Collective,
    work: impl FnOnce(&AtomicBool) -> Result<T, TrainError> + Send,
) -> Result<T, TrainError> {
    let result = collective::beside(collective, work).map_err(lost)?;
    together(collective, result)
}

/// The bytes of all ranks.
pub(super) fn gather(collective: &mut dyn Collective, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, TrainError> {
    collective.all_gather(mine).map_err(lost)
}

pub(super) fn lost(error: CollectiveError) -> TrainError {
    TrainError::Run(RunError::Collective(error))
}

/// Refuses ranks that would not train the same model: of another build of this program, or with another config.
pub(super) fn same_program(collective: &mut dyn Collective, config: &Config) -> Result<(), TrainError> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let program = this_program().map_err(TrainError::Program)?;
    let all = gather(collective, format!("{program}\n{}", to_toml(config)?).into_bytes())?;
    let texts: Vec<String> = all.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let split = |text: &str| text.split_once('\n').map(|(program, toml)| (program.to_string(), toml.to_string()));
    let Some((first_program, first_toml)) = split(&texts[0]) else { return Ok(()) };
    for (rank, text) in texts.iter().enumerate().skip(1) {
        let Some((program, toml)) = split(text) else { continue };
        if program != first_program {
            let what = format!("rank 0 runs {first_program}, rank {rank} {program}");
            return Err(TrainError::Unequal {
                what,
                remedy: "start one and the same program, on machines of one kind, or set DDPM_DIST_SIMD to what all of them have",
            });
        }
        if toml != first_toml {
            let name = |rank: usize| format!("the config of rank {rank}");
            let (zero, other) = (parse(&first_toml, &name(0), &[])?, parse(&toml, &name(rank), &[])?);
            if let Some(d) = differences_of_ranks(&zero, &other)?.first() {
                let what = format!("rank 0 has `{}` = {}, rank {rank} {}", d.key, d.saved, d.now);
                let remedy = "start all ranks with one config file and the same --set";
                return Err(TrainError::Unequal { what, remedy });
            }
        }
    }
    Ok(())
}

/// Refuses ranks that see other images.
pub(super) fn same_images(collective: &mut dyn Collective, fingerprint: &str) -> Result<(), TrainError> {
    let all = gather(collective, fingerprint.as_bytes().to_vec())?;
    match all.iter().position(|theirs| *theirs != all[0]) {
        None => Ok(()),
        Some(rank) => Err(TrainError::Unequal {
            what: format!("rank {rank} sees other images than rank 0"),
            remedy: "put one copy of the data set where all nodes read it, or equal copies on each",
        }),
    }
}
