//! One step, from its images to what all ranks know of it.
//!
//! A device with queues computes the step that was begun last while the host hears of the one before it, loads images, and begins the next:
//! results are read a step late. Where something is to be done with the state after a step, it is the last one under way.

use super::{Known, Run};
use crate::cluster::{SpeedChange, minority};
use crate::collective::Timed;
use crate::device::{BufferId, DeviceError, Region};
use crate::train::accounts::Account;
use crate::train::checksum::checksum;
use crate::train::feed::Feed;
use crate::train::ranks::lost;
use crate::train::{Config, Metrics, TrainError};
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Run<'_> {
    /// Whether something is to be done with the state after the step that was begun last.
    pub(super) fn is_due(&self) -> bool {
        let Config { train, checkpoint, sample, cluster, .. } = self.config;
        let is_saved = self.save_waits || checkpoint.is_due(self.begun);
        let is_drawn = sample.every > 0 && self.begun.is_multiple_of(sample.every);
        self.begun == train.steps || is_saved || is_drawn || cluster.compares_after(self.begun)
    }

    /// Algorithm 1, once: begun on the device.
    pub(super) fn begin(&mut self, feed: &mut Feed) -> Result<(), TrainError> {
        let (since, step) = (Instant::now(), self.begun + 1);
        self.note(step, "waiting for images");
        let images = feed.next().map_err(|source| TrainError::Loading { step, source })?;
        let loading = since.elapsed();
        self.note(step, "forward and backward");
        let mut timed = Timed::new(self.collective);
        self.trainer.begin(self.device, &mut timed, self.config, self.begun, images)?;
        self.beginnings.push_back([since.elapsed().saturating_sub(timed.spent), loading]);
        self.begun = step;
        Ok(())
    }

    /// Finishes steps until no more than so many are under way, and gives what is known after the last one, if there was any.
    pub(super) fn finish_all_but(&mut self, under_way: usize) -> Result<Option<Known>, TrainError> {
        let mut known = None;
        while self.trainer.under_way() > under_way {
            known = Some(self.finish()?);
        }
        Ok(known)
    }

    /// Hears what the first of the steps under way gave, at all ranks.
    pub(super) fn finish(&mut self) -> Result<Known, TrainError> {
        let since = Instant::now();
        let mut timed = Timed::new(self.collective);
        let losses = self.trainer.finish(self.device, &mut timed)?;
        let norm = losses.norm;
        self.account.fill(&losses);
        let [beginning, loading] = self.beginnings.pop_front().unwrap_or_default();
        self.account.loading = loading;
        let busy = beginning + since.elapsed().saturating_sub(timed.spent);
        // A GPU's own clock knows what the host takes to begin the step too; the host may have waited there for a queue that is full.
        self.account.busy = self.collective.own_time().map_or(busy, |own| own.max(loading));
        self.step += 1;
        // Also what is about to be saved.
        let to_save = self.save_waits || self.config.checkpoint.is_due(self.step);
        if to_save || self.config.cluster.compares_after(self.step) {
            self.account.checksum = self.checksum()?;
        }
        self.note(self.step, "telling the others how it stands");
        let (accounts, known) = self.exchange()?;
        self.compare(&accounts)?;
        let images =
            accounts.iter().flat_map(|account| account.losses.iter().copied().zip(account.timesteps.iter().copied()));
        let metrics = Metrics::new(images, self.config.diffusion.timesteps, norm);
        if metrics.finite {
            if let Some(lead) = &mut self.lead {
                lead.reports.step(self.config, self.step, &metrics);
            }
            return Ok(known);
        }
        let what = if metrics.loss.is_finite() { "the gradient" } else { "the loss" };
        // The state is lost in any case; what is being written may still become whole.
        let report = self.wait_for_saves()?;
        self.note_save(report);
        let kept = match self.saved {
            Some(step) => format!("The checkpoint of step {step} is intact"),
            None => "No checkpoint was saved before".to_string(),
        };
        Err(TrainError::Diverged { step: self.step, what, kept })
    }

    /// Of weights and averages as far as all ranks have all of them, where there is a rank to compare them with.
    pub(super) fn checksum(&self) -> Result<Option<u64>, DeviceError> {
        let held = [Region::Weights, Region::Ema].into_iter().filter(|region| self.trainer.has_whole(*region));
        let held: Vec<BufferId> = held.map(|region| self.trainer.buffer(region)).collect();
        let is_one_of_many = self.collective.world_size() > 1;
        is_one_of_many.then(|| checksum(self.device, &held, self.layout.elements())).transpose()
    }

    /// Tells the other ranks how this one stands, and hears how they stand.
    pub(super) fn exchange(&mut self) -> Result<(Vec<Account>, Known), TrainError> {
        let report = self.saver.poll();
        self.note_save(report);
        self.account.idle = !self.saver.is_busy();
        self.account.stop = self.stop.load(Ordering::Relaxed) || self.time_is_up();
        let accounts = self.account.exchange(self.collective).map_err(lost)?;
        self.account.checksum = None;
        let known = Known {
            stop: accounts.iter().any(|account| account.stop),
            idle: accounts.iter().all(|account| account.idle),
        };
        Ok((accounts, known))
    }

    /// Compares what the ranks say of themselves.
    pub(super) fn compare(&mut self, accounts: &[Account]) -> Result<(), TrainError> {
        let checksums: Vec<u64> = accounts.iter().filter_map(|account| account.checksum).collect();
        self.agree(&checksums)?;
        for SpeedChange { rank, ratio, is_slow } in self.stragglers.note(accounts.iter().map(|account| account.busy)) {
            match is_slow {
                true => {
                    let Account { busy, loading, .. } = &accounts[rank];
                    let loading = 100.0 * loading.as_secs_f64() / busy.as_secs_f64().max(1e-9);
                    self.joint.alarm(format!(
                        "step {}: rank {rank} is slow: its own work takes {ratio:.1} times as long as the typical rank's, {loading:.0} % of \
                         it waiting for images",
                        self.step
                    ));
                }
                false => {
                    self.joint.all_clear(format!("step {}: rank {rank} is as fast as the others again", self.step))
                }
            }
        }
        Ok(())
    }

    /// Refuses to go on where a rank holds other weights or averages than most.
    pub(super) fn agree(&self, checksums: &[u64]) -> Result<(), TrainError> {
        let ranks = minority(checksums);
        if ranks.is_empty() {
            return Ok(());
        }
        let rest = if ranks.len() < checksums.len() { "those of the others" } else { "each other" };
        Err(TrainError::Corrupt { step: self.step, ranks, rest })
    }
}
