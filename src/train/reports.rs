//! What a run says while it trains.

use super::{Config, Metrics};
use crate::checkpoint::RunDir;
use crate::data::{Phase, Progress};
use crate::report::{Bar, Console, JsonLines, Picture, ReportError, TensorBoard, TrainingBar};
use serde::Serialize;
use std::sync::Mutex;
use std::time::Instant;

/// Progress of opening a data set as a bar.
pub(super) struct DecodingBar<'a> {
    pub console: &'a Console,
    pub bar: Mutex<Option<(Phase, Bar)>>,
}

impl Progress for DecodingBar<'_> {
    fn update(&self, phase: Phase, done: u64, total: u64) {
        let mut bar = self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if bar.as_ref().is_none_or(|(of, _)| *of != phase) {
            *bar = Some((phase, self.console.bar(phase.name(), total)));
        }
        match &*bar {
            Some((_, shown)) if done < total => shown.set(done),
            _ => *bar = None,
        }
    }

    fn notice(&self, message: &str) {
        self.console.say(message);
    }
}

/// Images per second of training alone, since the last line of the log.
pub(super) struct Speed {
    since: Instant,
    step: u64,
}

impl Speed {
    pub fn new(step: u64) -> Speed {
        Speed { since: Instant::now(), step }
    }

    /// Leaves out the time that `work` takes.
    pub fn pause<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let before = Instant::now();
        let result = work();
        self.since += before.elapsed();
        result
    }

    fn images_per_second(&self, step: u64, batch: usize) -> f64 {
        ((step - self.step) * batch as u64) as f64 / self.since.elapsed().as_secs_f64().max(1e-9)
    }
}

/// One line of `log.jsonl`.
#[derive(Serialize)]
struct Line {
    step: u64,
    images: u64,
    loss: f64,
    loss_by_quartile_of_t: [Option<f64>; 4],
    grad_norm: f64,
    lr: f64,
    images_per_second: f64,
}

/// Where numbers and pictures go. What cannot be written is an alarm, not an error.
pub(super) struct Reports {
    log: JsonLines,
    tensorboard: Option<TensorBoard>,
}

impl Reports {
    pub fn open(config: &Config, run_dir: &RunDir, start: u64) -> Result<Reports, ReportError> {
        let log = JsonLines::resume(&run_dir.log(), start)?;
        let tensorboard = match config.log.tensorboard {
            true => Some(TensorBoard::create(&run_dir.tensorboard(), start)?),
            false => None,
        };
        Ok(Reports { log, tensorboard })
    }

    #[allow(clippy::too_many_arguments)]
    pub fn step(
        &mut self,
        console: &Console,
        bar: &mut TrainingBar,
        config: &Config,
        step: u64,
        metrics: &Metrics,
        speed: &mut Speed,
        batch: usize,
    ) {
        if !step.is_multiple_of(config.log.every) && step != config.train.steps {
            return bar.advance(step);
        }
        let images_per_second = speed.images_per_second(step, batch);
        *speed = Speed::new(step);
        bar.report(step, metrics.loss, images_per_second);
        let lr = config.optim.lr_at(step - 1);
        let line = Line {
            step,
            images: step * batch as u64,
            loss: metrics.loss,
            loss_by_quartile_of_t: metrics.quartiles,
            grad_norm: metrics.grad_norm,
            lr,
            images_per_second,
        };
        alarm(console, self.log.write(&line));
        if let Some(tensorboard) = &mut self.tensorboard {
            let mut scalars = vec![
                ("loss", metrics.loss),
                ("grad_norm", metrics.grad_norm),
                ("lr", lr),
                ("images_per_second", images_per_second),
            ];
            let tags = ["loss_by_t/0-25%", "loss_by_t/25-50%", "loss_by_t/50-75%", "loss_by_t/75-100%"];
            scalars.extend(tags.into_iter().zip(metrics.quartiles).filter_map(|(tag, loss)| Some((tag, loss?))));
            alarm(console, tensorboard.scalars(step, &scalars));
        }
    }

    pub fn picture(&mut self, console: &Console, step: u64, picture: &Picture) {
        if let Some(tensorboard) = &mut self.tensorboard {
            alarm(console, tensorboard.image("samples", step, picture));
        }
    }

    pub fn flush(&mut self, console: &Console) {
        if let Some(tensorboard) = &mut self.tensorboard {
            alarm(console, tensorboard.flush());
        }
    }
}

fn alarm(console: &Console, result: Result<(), ReportError>) {
    if let Err(error) = result {
        console.alarm(error.to_string());
    }
}
