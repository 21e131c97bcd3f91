//! How the GPUs of several ranks compute convolutions and products: rank 0 times plans, and the others take its choice, so that all give the same bits.

use super::{Program, RunError};
use crate::collective::{Collective, CollectiveError, beside};
use crate::device::cuda::{Piece, PlanTable};
use crate::device::{Device, DeviceError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};

/// How a rank's search went, as it tells the others.
#[derive(Serialize, Deserialize)]
enum Went {
    Well,
    Stopped,
    /// Why it has no plans.
    Failed(String),
}

/// What some programs ask of a GPU's libraries, each once.
pub fn pieces<'a>(programs: impl IntoIterator<Item = &'a Program>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for piece in programs.into_iter().flat_map(Program::pieces) {
        if !pieces.contains(&piece) {
            pieces.push(piece);
        }
    }
    pieces
}

/// Has a plan for each piece at all ranks: those of rank 0, which has looked for them while the others waited. A rank with another GPU or
/// other libraries looks for its own, and rank 0's [`Device::take_notice`] says so. Gives false, at all ranks, where `stop` was set at one.
/// Nothing is to be done on CPU cores.
///
/// # Errors
/// A rank that is lost, or what keeps this one from having plans; the others have [`CollectiveError::DeviceOf`] then.
pub fn agree_on_plans(
    device: &mut Device,
    collective: &mut dyn Collective,
    pieces: &[Piece],
    stop: &AtomicBool,
) -> Result<bool, RunError> {
    let Some(card) = device.card().cloned() else {
        return Ok(true);
    };
    let is_rank_zero = collective.rank() == 0;
    let found = beside(collective, |called_off| match is_rank_zero {
        true => find(device, pieces, [stop, called_off]),
        false => Ok(true),
    })?;
    let table = device.plans().unwrap_or(PlanTable::new(card));
    let Some(tables) = all_well(collective, found, table)? else { return Ok(false) };
    if let (Device::Cuda(cuda), Some(zero)) = (&mut *device, tables.first()) {
        if is_rank_zero {
            strangers(&tables).into_iter().for_each(|notice| cuda.notify(notice));
        } else {
            cuda.prefer_plans(zero);
        }
    }
    let found = beside(collective, |called_off| match is_rank_zero {
        true => Ok(true),
        false => find(device, pieces, [stop, called_off]),
    })?;
    Ok(all_well(collective, found, ())?.is_some())
}

fn find(device: &mut Device, pieces: &[Piece], stops: [&AtomicBool; 2]) -> Result<bool, DeviceError> {
    let goes_on = || !stops.iter().any(|stop| stop.load(Ordering::Relaxed));
    match device {
        Device::Cpu(_) => Ok(true),
        Device::Cuda(cuda) => Ok(cuda.find_plans(pieces, &goes_on)?),
    }
}

/// What all ranks have to tell, if all have found what they looked for; none where one was stopped.
fn all_well<T: Serialize + DeserializeOwned>(
    collective: &mut dyn Collective,
    found: Result<bool, DeviceError>,
    mine: T,
) -> Result<Option<Vec<T>>, RunError> {
    let went = match &found {
        Ok(true) => Went::Well,
        Ok(false) => Went::Stopped,
        Err(error) => Went::Failed(error.to_string()),
    };
    let all = tell(collective, &(went, mine))?;
    let mut is_stopped = !found?;
    let mut told = Vec::new();
    for (rank, (went, theirs)) in all.into_iter().enumerate() {
        match went {
            Went::Well => told.push(theirs),
            Went::Stopped => is_stopped = true,
            Went::Failed(message) => return Err(CollectiveError::DeviceOf { rank, message }.into()),
        }
    }
    Ok((!is_stopped).then_some(told))
}

fn tell<T: Serialize + DeserializeOwned>(collective: &mut dyn Collective, mine: &T) -> Result<Vec<T>, CollectiveError> {
    let failed = |source: serde_json::Error| CollectiveError::Io {
        operation: "writing the plans".into(),
        source: source.into(),
    };
    let all = collective.all_gather(serde_json::to_vec(mine).map_err(failed)?)?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|error| CollectiveError::OutOfStep {
            rank,
            ours: "the plans".into(),
            theirs: format!("something else ({error})"),
        })
    };
    all.iter().enumerate().map(read).collect()
}

/// What there is to say about ranks for which the plans of rank 0 do not hold.
fn strangers(tables: &[PlanTable]) -> Option<String> {
    let zero = &tables.first()?.card;
    let others: Vec<String> = tables
        .iter()
        .enumerate()
        .filter(|(_, table)| table.card != *zero)
        .map(|(rank, table)| format!("rank {rank} has {}", table.card))
        .collect();
    (!others.is_empty()).then(|| {
        format!(
            "rank 0 has {zero}, {}: what these compute differs in its last bits from what rank 0 would compute",
            others.join(", ")
        )
    })
}
