//! The end of a run, well or not.

use super::{Ended, Run};
use crate::train::TrainError;
use std::path::Path;
use std::sync::atomic::Ordering;

impl Run<'_> {
    /// Draws the last grid, and says goodbye.
    pub(super) fn close(mut self, ended: Ended) -> Result<Ended, TrainError> {
        self.end_bar();
        let picture = match ended {
            Ended::Finished => {
                let picture = self.draw()?;
                if picture.is_none() && (self.stop.load(Ordering::Relaxed) || self.time_is_up()) {
                    self.joint.say("stopped while the last grid was drawn: it is left out");
                }
                picture
            }
            Ended::Stopped => None,
        };
        if let Some(lead) = &mut self.lead {
            lead.reports.flush();
            self.console.last(farewell(&self, ended, picture.as_deref()));
        }
        Ok(ended)
    }

    fn end_bar(&mut self) {
        self.lead.iter_mut().for_each(|lead| lead.reports.end_bar());
    }

    /// Saves what can be saved of a run that cannot go on; gives back why it cannot.
    pub(super) fn give_up(mut self, error: TrainError) -> TrainError {
        self.end_bar();
        let error = match self.collective.world_size() {
            1 => self.give_up_alone(error),
            // The others do not take part in it any more.
            _ => {
                self.saver.call_off();
                error
            }
        };
        self.lead.iter_mut().for_each(|lead| lead.reports.flush());
        error
    }

    fn give_up_alone(&mut self, error: TrainError) -> TrainError {
        // State that is not finite, or not the same at all ranks, is worth less than the checkpoint before it.
        use TrainError::{Corrupt, Diverged, NotSaved};
        if matches!(error, Diverged { .. } | Corrupt { .. } | NotSaved { .. }) {
            return error;
        }
        // A GPU that cannot end what was begun does nothing more in this process, and nothing that it holds can be read.
        if self.device.synchronize().is_err() {
            return self.lost_with_device(error);
        }
        match self.save_now() {
            Ok(()) if self.step > 0 => self.console.alarm(format!("step {} is saved", self.step)),
            Ok(()) => {}
            Err(not_saved) => self.console.alarm(not_saved.to_string()),
        }
        error
    }

    fn lost_with_device(&mut self, error: TrainError) -> TrainError {
        // What is being written is the host's already.
        let report = self.saver.wait();
        self.note_save(report);
        let kept = match self.saved {
            Some(step) => format!("The checkpoint of step {step} is intact: the same command goes on from it"),
            None => "No checkpoint was saved before: the same command begins again".to_string(),
        };
        TrainError::DeviceLost { step: self.step, kept, source: Box::new(error) }
    }
}

fn farewell(run: &Run<'_>, ended: Ended, picture: Option<&Path>) -> String {
    let Run { config, program, step, .. } = run;
    let root = run.root.display();
    let mut text = match ended {
        Ended::Finished => format!("done: {step} steps. The run is in {root}"),
        Ended::Stopped if *step == 0 => {
            return "stopped before the first step; the same command begins again".to_string();
        }
        Ended::Stopped => {
            return format!(
                "stopped at step {step} of {}, state saved in {root}; the same command goes on from there",
                config.train.steps
            );
        }
    };
    if let Some(picture) = picture {
        text += &format!("\n  look at     {}", picture.display());
    }
    text += &format!("\n  sample      {program} sample {root} --count 64 --seed 1 --out samples.png");
    text += &format!("\n  train on    the same command with --set train.steps={}", 2 * config.train.steps);
    if config.log.tensorboard {
        text += &format!("\n  curves      tensorboard --logdir {root}");
    }
    text
}
