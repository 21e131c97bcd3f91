//! What a run says while it trains.

use super::{Config, Metrics};
use crate::checkpoint::RunDir;
use crate::data::{Phase, Progress};
use crate::report::{Bar, Console, FileAlarm, JsonLines, Picture, ReportError, TensorBoard, TrainingBar};
use serde::Serialize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Progress of opening a data set as a bar.
pub(super) struct DecodingBar<'a> {
    pub console: &'a Console,
    pub bar: Mutex<Option<(Phase, Bar)>>,
    /// One is set by a signal, one where a rank is lost.
    pub stop: [&'a AtomicBool; 2],
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

    fn stopped(&self) -> bool {
        self.stop.iter().any(|stop| stop.load(Ordering::Relaxed))
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
    console: Console,
    log: JsonLines,
    log_alarm: FileAlarm,
    tensorboard: Option<TensorBoard>,
    tensorboard_alarm: FileAlarm,
    bar: Option<TrainingBar>,
    /// When and at which step the last line was written; time spent on other things is left out.
    since: Instant,
    last: u64,
}

impl Reports {
    pub fn open(console: &Console, config: &Config, run_dir: &RunDir, start: u64) -> Result<Reports, ReportError> {
        let log = JsonLines::resume(&run_dir.log(), start)?;
        let tensorboard = match config.log.tensorboard {
            true => Some(TensorBoard::create(&run_dir.tensorboard(), start)?),
            false => None,
        };
        let bar = Some(console.training(start, config.train.steps, config.train.batch));
        Ok(Reports {
            console: console.clone(),
            log,
            log_alarm: FileAlarm::new("log.jsonl"),
            tensorboard,
            tensorboard_alarm: FileAlarm::new("the TensorBoard file"),
            bar,
            since: Instant::now(),
            last: start,
        })
    }

    /// `step` steps are done; the last one gave `metrics`.
    pub fn step(&mut self, config: &Config, step: u64, metrics: &Metrics) {
        let images = |steps: u64| steps * config.train.batch as u64;
        let images_per_second = images(step - self.last) as f64 / self.since.elapsed().as_secs_f64().max(1e-9);
        if !step.is_multiple_of(config.log.every) && step != config.train.steps {
            match &mut self.bar {
                Some(bar) if bar.is_due() => bar.report(step, metrics.loss, images_per_second),
                Some(bar) => bar.advance(step),
                None => {}
            }
            return;
        }
        (self.since, self.last) = (Instant::now(), step);
        self.bar.iter_mut().for_each(|bar| bar.report(step, metrics.loss, images_per_second));
        let Metrics { loss, quartiles, grad_norm, .. } = *metrics;
        let lr = config.optim.lr_at(step - 1);
        let line = Line {
            step,
            images: images(step),
            loss,
            loss_by_quartile_of_t: quartiles,
            grad_norm,
            lr,
            images_per_second,
        };
        self.log_alarm.note(&self.console, self.log.write(&line), false);
        if let Some(tensorboard) = &mut self.tensorboard {
            let mut scalars =
                vec![("loss", loss), ("grad_norm", grad_norm), ("lr", lr), ("images_per_second", images_per_second)];
            let tags = ["loss_by_t/0-25%", "loss_by_t/25-50%", "loss_by_t/50-75%", "loss_by_t/75-100%"];
            scalars.extend(tags.into_iter().zip(quartiles).filter_map(|(tag, loss)| Some((tag, loss?))));
            let outcome = tensorboard.scalars(step, &scalars);
            self.tensorboard_alarm.note(&self.console, outcome, tensorboard.is_behind());
        }
    }

    /// `time` was not spent on training.
    pub fn leave_out(&mut self, time: Duration) {
        self.since += time;
    }

    pub fn picture(&mut self, step: u64, picture: &Picture) {
        if let Some(tensorboard) = &mut self.tensorboard {
            let outcome = tensorboard.image("samples", step, picture);
            self.tensorboard_alarm.note(&self.console, outcome, tensorboard.is_behind());
        }
    }

    /// Takes the bar away.
    pub fn end_bar(&mut self) {
        self.bar = None;
    }

    pub fn flush(&mut self) {
        if let Some(tensorboard) = &mut self.tensorboard {
            let outcome = tensorboard.flush();
            self.tensorboard_alarm.note(&self.console, outcome, tensorboard.is_behind());
        }
    }
}
