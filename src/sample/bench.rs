//! How long reverse steps take.

use super::{Request, ReverseProcess, SampleError, Sampler};
use crate::collective::Solo;
use crate::device::Device;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

impl Sampler {
    /// Time of each of `steps` reverse steps of a full batch, after `warmup` others, by the device's clock; fewer if it is told to stop.
    /// `done` is called after each, warm-up included, with their number: on a GPU it has then been begun.
    ///
    /// # Errors
    /// What keeps the device from working.
    ///
    /// # Panics
    /// If the process has more steps than the sampler was planned for.
    pub fn time_steps(
        &self,
        device: &mut Device,
        process: ReverseProcess<'_>,
        [warmup, steps]: [u64; 2],
        stop: &AtomicBool,
        mut done: impl FnMut(u64),
    ) -> Result<Vec<Duration>, SampleError> {
        let request = Request { count: self.batch, seed: 0, initial_noise: None, stages: 0 };
        let mut batch = self.room_for_batch(&request)?;
        let mut chain = self.load(device, &process)?;
        self.begin_batch(device, &chain, &request, 0, &mut batch)?;
        let mut ticks = Vec::new();
        for step in 0..warmup + steps {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if step == warmup {
                ticks.push(device.tick()?);
            }
            chain.step.run(device, &mut Solo)?;
            if step >= warmup {
                ticks.push(device.tick()?);
            }
            done(step + 1);
        }
        ticks.windows(2).map(|pair| Ok(device.time_between(&pair[0], &pair[1])?)).collect()
    }
}
