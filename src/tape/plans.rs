//! How the GPUs of several ranks compute convolutions: rank 0 times plans, and the others take its choice, so that all give the same bits.

use super::{Program, RunError};
use crate::collective::{Collective, CollectiveError, beside};
use crate::device::cuda::{ConvolutionShape, PlanTable};
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

/// The convolutions of some programs, each once.
pub fn convolutions<'a>(programs: impl IntoIterator<Item = &'a Program>) -> Vec<ConvolutionShape> {
    let mut shapes = Vec::new();
    for shape in programs.into_iter().flat_map(Program::convolutions) {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes
}

/// Has a plan for each convolution at all ranks: those of rank 0, which has looked for them while the others waited. A rank with another GPU or
/// other libraries looks for its own, and rank 0's [`Device::take_notice`] says so. Gives false where `stop` was set. Nothing is to be done on CPU cores.
///
/// # Errors
/// A rank that is lost, or what keeps this one from having plans; all ranks have told each other by then.
pub fn agree_on_plans(
    device: &mut Device,
    collective: &mut dyn Collective,
    shapes: &[ConvolutionShape],
    stop: &AtomicBool,
) -> Result<bool, RunError> {
    let Some(card) = device.card().cloned() else {
        return Ok(true);
    };
    let is_rank_zero = collective.rank() == 0;
    let found = beside(collective, |called_off| match is_rank_zero {
        true => find(device, shapes, [stop, called_off]),
        false => Ok(true),
    })?;
    let mine = Told { is_well: matches!(found, Ok(true)), table: device.plans().unwrap_or(PlanTable::new(card)) };
    let all = tell(collective, &mine)?;
    let [zero, ..] = &all[..] else { return Ok(true) };
    let takes = zero.is_well && !is_rank_zero;
    if let Device::Cuda(cuda) = &mut *device {
        if takes {
            cuda.prefer_plans(&zero.table);
        } else {
            strangers(&all).into_iter().for_each(|notice| cuda.notify(notice));
        }
    }
    let found = beside(collective, |called_off| match takes {
        true => find(device, shapes, [stop, called_off]),
        false => found,
    })?;
    Ok(found?)
}

fn find(device: &mut Device, shapes: &[ConvolutionShape], stops: [&AtomicBool; 2]) -> Result<bool, DeviceError> {
    let goes_on = || !stops.iter().any(|stop| stop.load(Ordering::Relaxed));
    match device {
        Device::Cpu(_) => Ok(true),
        Device::Cuda(cuda) => Ok(cuda.find_plans(shapes, &goes_on)?),
    }
}

fn tell(collective: &mut dyn Collective, mine: &Told) -> Result<Vec<Told>, CollectiveError> {
    let failed = |source: serde_json::Error| CollectiveError::Io {
        operation: "writing the plans for convolutions".into(),
        source: source.into(),
    };
    let all = collective.all_gather(serde_json::to_vec(mine).map_err(failed)?)?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|error| CollectiveError::OutOfStep {
            rank,
            ours: "the plans for convolutions".into(),
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
