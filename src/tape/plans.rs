//! How the GPUs of several ranks compute convolutions and products: rank 0 times plans, and the others take its choice, so that all give the same bits.

use super::{Program, RunError};
use crate::collective::{Collective, CollectiveError, beside};
use crate::device::cuda::{Piece, PlanTable};
use crate::device::{Device, DeviceError};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};

/// What a rank tells the others.
#[derive(Serialize, Deserialize)]
struct Told {
    /// Whether it did what it was to do.
    is_well: bool,
    /// Its plans.
    table: PlanTable,
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
/// other libraries looks for its own, and rank 0's [`Device::take_notice`] says so. Gives false where `stop` was set. Nothing is to be done
/// on CPU cores.
///
/// # Errors
/// A rank that is lost, or what keeps this one from having plans; all ranks have told each other by then.
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
    let mine = Told { is_well: matches!(found, Ok(true)), table: device.plans().unwrap_or(PlanTable::new(card)) };
    let all = tell(collective, &mine)?;
    let [zero, ..] = &all[..] else { return Ok(true) };
    let takes = zero.is_well && !is_rank_zero;
    if let Device::Cuda(cuda) = &mut *device {
        if takes {
            cuda.prefer_plans(&zero.table);
        } else if is_rank_zero {
            strangers(&all).into_iter().for_each(|notice| cuda.notify(notice));
        }
    }
    let found = beside(collective, |called_off| match takes {
        true => find(device, pieces, [stop, called_off]),
        false => found,
    })?;
    Ok(found?)
}

fn find(device: &mut Device, pieces: &[Piece], stops: [&AtomicBool; 2]) -> Result<bool, DeviceError> {
    let goes_on = || !stops.iter().any(|stop| stop.load(Ordering::Relaxed));
    match device {
        Device::Cpu(_) => Ok(true),
        Device::Cuda(cuda) => Ok(cuda.find_plans(pieces, &goes_on)?),
    }
}

fn tell(collective: &mut dyn Collective, mine: &Told) -> Result<Vec<Told>, CollectiveError> {
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
fn strangers(all: &[Told]) -> Option<String> {
    let zero = &all.first()?.table.card;
    let others: Vec<String> = all
        .iter()
        .enumerate()
        .filter(|(_, told)| told.table.card != *zero)
        .map(|(rank, told)| format!("rank {rank} has {}", told.table.card))
        .collect();
    (!others.is_empty()).then(|| {
        format!(
            "rank 0 has {zero}, {}: what these compute differs in its last bits from what rank 0 would compute",
            others.join(", ")
        )
    })
}
