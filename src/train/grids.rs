//! Grids of images made while training.

use super::{Config, Share, TrainError, Trainer};
use crate::collective::Collective;
use crate::device::{BufferId, Device, DeviceKind};
use crate::diffusion::{SamplerTable, Schedule};
use crate::report::{Console, GridOptions, Images, Picture, grid};
use crate::sample::{Progress, Request, ReverseProcess, ReverseStep, SampleConfig, SampleError, Sampler};

/// The reverse process that `[sample]` describes, with its memory.
pub(super) struct Grids {
    sampler: Sampler,
    table: SamplerTable,
}

/// The reverse step of grids, whatever the number of steps and the places of the parameters; none if the config asks for no grids.
pub(super) fn reverse_step<'a>(
    config: &'a Config,
    kind: DeviceKind,
    share: Share,
    size: [usize; 2],
) -> Option<ReverseStep<'a>> {
    let SampleConfig { count, batch, .. } = config.sample;
    let batch = kind.sampling_batch(batch, count, share.world_size);
    (count > 0).then_some(ReverseStep { model: &config.model, size, batch, steps: 1, layout: None })
}

impl Grids {
    /// Nothing if the config asks for no grids.
    pub fn new(
        config: &Config,
        device: &mut Device,
        schedule: &Schedule,
        trainer: &Trainer,
        size: [usize; 2],
    ) -> Result<Option<Grids>, TrainError> {
        let section = &config.sample;
        let Some(step) = reverse_step(config, device.kind(), trainer.share(), size) else { return Ok(None) };
        let table = SamplerTable::new(schedule, &section.sampler(&config.diffusion))?;
        let step = ReverseStep { steps: table.steps.len(), layout: Some(&trainer.program().layout), ..step };
        let sampler = Sampler::new(device, &step, config.train.precision)?;
        Ok(Some(Grids { sampler, table }))
    }

    /// A grid from `weights`; nothing if it does not go on at some rank, or (with an alarm) if the images are not finite.
    pub fn draw(
        &self,
        config: &Config,
        device: &mut Device,
        collective: &mut dyn Collective,
        weights: BufferId,
        console: &Console,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Option<Picture>, TrainError> {
        let Grids { sampler, table } = self;
        let count = config.sample.count;
        let request = Request { count, seed: config.sample.seed, initial_noise: None, stages: 0 };
        let rounds = count.div_ceil(sampler.batch() * collective.world_size());
        let bar = console.bar("sampling", (rounds * table.steps.len()) as u64);
        let observe = |at: Progress| {
            bar.set(at.done as u64);
            goes_on()
        };
        match sampler.sample(device, collective, ReverseProcess { weights, table }, request, observe) {
            Ok(Some(pixels)) => {
                let [height, width, channels] = sampler.size();
                Ok(Some(grid(&Images::new(&pixels, [count, height, width, channels])?, &GridOptions::default())))
            }
            Ok(None) => Ok(None),
            // Early weights may overflow in the reverse process; that is no reason to lose the run.
            Err(error @ SampleError::NotFinite { .. }) => {
                console.alarm(format!("no grid: {error}"));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}
