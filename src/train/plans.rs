//! How the GPUs of a run compute convolutions and products: as its checkpoint pins, else as rank 0 has found.

use super::grids::reverse_step;
use super::state::pinned;
use super::step::step_programs;
use super::{Config, Options, Share, TrainError};
use crate::checkpoint::Meta;
use crate::collective::Collective;
use crate::device::cuda::Piece;
use crate::device::{Device, DeviceKind};
use crate::report::Console;
use crate::sample::ReverseStep;
use crate::tape::{agree_on_plans, pieces};

/// Prefers the plans that the checkpoint pins from which a run goes on. Those for another card are of no use, which the resume says in its own words.
pub(super) fn take_pinned(device: &mut Device, saved: &Meta, console: &Console) {
    let Device::Cuda(cuda) = device else { return };
    match pinned(saved) {
        Ok(table) => table.iter().for_each(|table| {
            cuda.prefer_plans(table);
        }),
        Err(error) => console.alarm(format!(
            "the checkpoint's plans cannot be read, so that last bits may differ from here on: {error}"
        )),
    }
}

/// Has plans for all that a run computes, equal ones at all ranks, before its programs are loaded. What is in one rank's way ends all of them.
pub(super) fn settle_plans(
    device: &mut Device,
    collective: &mut dyn Collective,
    config: &Config,
    size: [usize; 2],
    share: &Share,
    options: &Options<'_>,
) -> Result<(), TrainError> {
    let Options { console, joint, stop, .. } = *options;
    let pieces = pieces_of_run(device, config, size, share);
    if let Device::Cuda(cuda) = &*device
        && let count @ 1.. = cuda.unknown_plans(&pieces)
    {
        joint.say(format!(
            "timing how cuDNN and cuBLASLt compute {count} convolutions and products fastest, once for this GPU"
        ));
    }
    let agreed = agree_on_plans(device, collective, &pieces, stop);
    while let Some(notice) = device.take_notice() {
        console.alarm(notice);
    }
    if agreed? { Ok(()) } else { Err(TrainError::Stopped) }
}

/// What a step asks of a GPU's libraries; nothing on CPU cores.
pub(super) fn pieces_of_steps(device: &Device, config: &Config, size: [usize; 2], share: &Share) -> Vec<Piece> {
    if device.kind() == DeviceKind::Cpu {
        return Vec::new();
    }
    pieces(&step_programs(config, size, share, device.target(config.train.precision)).0)
}

/// Those of the grids' sampler with them.
fn pieces_of_run(device: &Device, config: &Config, size: [usize; 2], share: &Share) -> Vec<Piece> {
    if device.kind() == DeviceKind::Cpu {
        return Vec::new();
    }
    let target = device.target(config.train.precision);
    let (mut programs, _) = step_programs(config, size, share, target);
    if let Some(step) = reverse_step(config, device.kind(), *share, size) {
        // Products depend on what addresses of parameters are multiples of, and so on the places that they have in training.
        let step = ReverseStep { layout: Some(&programs[0].layout), ..step };
        programs.push(step.program(target));
    }
    pieces(&programs)
}
