//! A training run from start to end: status → images → state → batch → step.

use super::grids::Grids;
use super::reports::{DecodingBar, Reports};
use super::resume::{check_newest_config, check_same_run};
use super::state::{Identity, layout_for_checkpoints, restore, snapshot};
use super::{Config, TrainConfig, TrainError, Trainer};
use crate::checkpoint::{Layout, Newest, RunDir, SaveReport, Saver, Start, Want, load_newest};
use crate::collective::Collective;
use crate::config::OutOfRange;
use crate::data::{DataConfig, DataError, Dataset, ImageSize, Loader, LoaderConfig, Order};
use crate::device::{Device, Region};
use crate::diffusion::Schedule;
use crate::report::Console;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Weights to begin with as a flat buffer of a layout, or why they do not fit it.
pub type Initial<'a> = dyn Fn(&Layout) -> Result<Vec<f32>, String> + 'a;

/// How a run is started, apart from its config.
pub struct Options<'a> {
    /// Where the run lives.
    pub run_dir: &'a Path,
    /// Go on, or begin anew.
    pub start: Start,
    /// The config file, beside which relative data paths are looked up too.
    pub config_file: Option<&'a Path>,
    /// How this program is called, for the commands it shows.
    pub program: &'a str,
    /// Weights to begin with, in place of drawn ones.
    pub initial: Option<&'a Initial<'a>>,
    /// Set by a signal: save and leave.
    pub stop: &'a AtomicBool,
    /// Where messages go.
    pub console: &'a Console,
}

/// How a run ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Finished,
    /// It was asked to stop, and its state is saved.
    Stopped,
}

/// Trains as `config` says (and notes the size of the images in it) until all steps are done or `options.stop` is set.
///
/// # Errors
/// Whatever stands in the way, before the first step if possible; later, the state is saved first. Failing to write a checkpoint, a log
/// or a picture is no error but an alarm on the console, except for the last checkpoint.
pub fn train(
    config: &mut Config,
    device: &mut Device,
    collective: &mut dyn Collective,
    options: &Options<'_>,
) -> Result<Ended, TrainError> {
    // Refused now rather than after an hour of decoding.
    RunDir::check(options.run_dir, options.start)?;
    let dataset = Arc::new(open_data(config, options)?);
    let [height, width, channels] = dataset.shape();
    config.model.validate(height, width)?;
    config.model.validate_work(height, width, config.train.batch, "train.batch")?;
    // From here on the config is complete: whoever reads it later needs no data set to know the size.
    config.data.size = Some(ImageSize { height, width });
    config.data.channels = Some(channels);

    let mut run = Run::open(config, device, collective, options, &dataset)?;
    let ended = run.all_steps(&dataset);
    if dataset.replaced() > 0 {
        options.console.alarm(format!("{} images were bad and others stood in for them", dataset.replaced()));
    }
    match ended {
        Ok(ended) => run.close(ended),
        Err(error) => Err(run.give_up(error)),
    }
}

/// A run between two steps.
struct Run<'a> {
    config: &'a Config,
    program: &'a str,
    device: &'a mut Device,
    collective: &'a mut dyn Collective,
    console: &'a Console,
    stop: &'a AtomicBool,
    run_dir: RunDir,
    trainer: Trainer,
    layout: Arc<Layout>,
    identity: Identity,
    saver: Saver,
    reports: Reports,
    grids: Option<Grids>,
    /// Steps done.
    step: u64,
    /// Step of the newest checkpoint that is known to be whole.
    saved: Option<u64>,
    /// A checkpoint is due and waits for the one that is being written.
    save_waits: bool,
}

impl<'a> Run<'a> {
    /// Everything in place for the first step, or for the one after the newest checkpoint.
    fn open(
        config: &'a Config,
        device: &'a mut Device,
        collective: &'a mut dyn Collective,
        options: &Options<'a>,
        dataset: &Dataset,
    ) -> Result<Run<'a>, TrainError> {
        let Options { console, stop, program, .. } = *options;
        let [height, width, channels] = dataset.shape();
        let schedule = Schedule::new(&config.diffusion)?;
        let run_dir = RunDir::open(options.run_dir, options.start)?;
        let identity = Identity::new(config, dataset.fingerprint(), device)?;
        if options.start == Start::Resume {
            // Keys say more than the shapes of tensors would, so the config is compared before those are read.
            check_newest_config(config, &run_dir, &identity)?;
        }
        let trainer = Trainer::new(device, config, &schedule, [height, width])?;
        let layout = layout_for_checkpoints(&trainer.program().layout)?;
        let newest = match options.start {
            Start::Resume => load_newest(&run_dir.checkpoints(), Some(&layout), Want::All)?,
            Start::Fresh { .. } => None,
        };
        let saved = newest.as_ref().map(|newest| newest.snapshot.meta.step);
        if let Some(Newest { path, snapshot, skipped }) = newest {
            skipped.iter().for_each(|s| console.alarm(format!("skipping {}: {}", s.path.display(), s.reason)));
            check_same_run(config, &path, &snapshot.meta, &identity, dataset)?;
            restore(&trainer, device, &snapshot);
            console.say(format!("resuming from {}", path.display()));
            if options.initial.is_some() {
                console.alarm("the weights to begin with are not used: this run has begun already");
            }
            if snapshot.meta.device_kind != identity.device_kind {
                let (then, now) = (&snapshot.meta.device_kind, &identity.device_kind);
                console.alarm(format!(
                    "saved on {then}, going on with {now}: same images and noise, but last bits differ"
                ));
            }
        } else if let Some(initial) = options.initial {
            trainer.set_parameters(device, &initial(&layout).map_err(TrainError::Initial)?);
        }
        let step = saved.unwrap_or(0);
        let grids = Grids::new(config, device, &schedule, &trainer, [height, width])?;
        // Nothing that is in memory can fail from here on: now an earlier run may go.
        for path in run_dir.settle()? {
            console.detail(format!("left in place, as no run makes it: {}", path.display()));
        }
        run_dir.write_config(&identity.config_toml)?;
        let saver = Saver::new(&run_dir.checkpoints(), &config.checkpoint)?;
        let (parameters, images) = (layout.parameters(), dataset.len());
        let TrainConfig { steps, batch, .. } = config.train;
        console.say(format!(
            "{parameters} parameters, {images} images of {height}×{width}×{channels}, steps {step} to {steps}, batch {batch}, in {}",
            run_dir.root().display(),
        ));
        let reports = Reports::open(console, config, &run_dir, step)?;
        Ok(Run {
            config,
            program,
            device,
            collective,
            console,
            stop,
            run_dir,
            trainer,
            layout,
            identity,
            saver,
            reports,
            grids,
            step,
            saved,
            save_waits: false,
        })
    }

    /// Steps until all are done, or it is asked to stop.
    fn all_steps(&mut self, dataset: &Arc<Dataset>) -> Result<Ended, TrainError> {
        let TrainConfig { batch, steps, seed } = self.config.train;
        let slice = LoaderConfig { batch, offset: 0, count: batch, start: self.step, depth: 3 };
        let mut loader = Loader::new(Arc::clone(dataset), Order { seed, len: dataset.len() }, slice)?;
        while self.step < steps {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(Ended::Stopped);
            }
            self.step(loader.next()?.pixels)?;
            dataset.replacements().iter().for_each(|text| self.console.alarm(text));
            self.save_if_due();
            self.draw_if_due()?;
        }
        Ok(Ended::Finished)
    }

    /// Algorithm 1, once.
    fn step(&mut self, pixels: &[u8]) -> Result<(), TrainError> {
        let metrics = self.trainer.step(self.device, self.collective, self.config, self.step, pixels)?;
        self.step += 1;
        if metrics.finite {
            self.reports.step(self.config, self.step, &metrics);
            return Ok(());
        }
        let what = if metrics.loss.is_finite() { "the gradient" } else { "the loss" };
        let report = self.saver.wait();
        self.note_save(report);
        let kept = match self.saved {
            Some(step) => format!("The checkpoint of step {step} is intact"),
            None => "No checkpoint was saved before".to_string(),
        };
        Err(TrainError::Diverged { step: self.step, what, kept })
    }

    /// Begins to write a checkpoint in the background if one is due, and says what became of the one before. Where that is still being
    /// written, the new one waits for it.
    fn save_if_due(&mut self) {
        let report = self.saver.poll();
        self.note_save(report);
        self.save_waits |= self.config.checkpoint.is_due(self.step);
        if self.save_waits && !self.saver.is_busy() {
            self.save();
        }
    }

    fn save(&mut self) {
        self.save_waits = false;
        let Run { trainer, device, saver, layout, identity, config, step, .. } = self;
        let state = snapshot(trainer, device, saver, layout, identity, config, *step);
        if let Err(refused) = saver.save(state) {
            self.console.alarm(format!("step {step} is not saved: {refused}"));
        }
    }

    /// Waits for what is being written, and then saves this step if it is not saved yet. An error is that of this step.
    fn save_now(&mut self) -> Result<(), TrainError> {
        let report = self.saver.wait();
        self.note_save(report);
        let step = self.step;
        if step > 0 && self.saved != Some(step) {
            self.save();
            if let Some(report) = self.saver.wait() {
                report.result.map_err(|source| TrainError::NotSaved { step, source })?;
            }
            self.saved = Some(step);
        }
        Ok(())
    }

    fn note_save(&mut self, report: Option<SaveReport>) {
        let Some(SaveReport { step, result }) = report else { return };
        let console = self.console;
        match result {
            Ok(done) => {
                self.saved = Some(step);
                console.detail(format!("saved {} in {:.1} s", done.path.display(), done.duration.as_secs_f64()));
                done.not_removed.iter().for_each(|e| console.alarm(format!("an old checkpoint stays: {e}")));
            }
            Err(error) => console.alarm(format!("step {step} is NOT saved: {error}; training goes on and tries again")),
        }
    }

    fn draw_if_due(&mut self) -> Result<(), TrainError> {
        let every = self.config.sample.every;
        if every > 0 && self.step.is_multiple_of(every) && self.step < self.config.train.steps {
            let since = Instant::now();
            self.draw()?;
            self.reports.leave_out(since.elapsed());
        }
        Ok(())
    }

    /// A grid of images from the averaged weights, to the run directory and TensorBoard. Gives its path if it was written.
    fn draw(&mut self) -> Result<Option<PathBuf>, TrainError> {
        let Some(grids) = &self.grids else { return Ok(None) };
        let weights = self.trainer.buffer(Region::Ema);
        let Some(picture) = grids.draw(self.config, self.device, weights, self.console, self.stop)? else {
            return Ok(None);
        };
        self.reports.picture(self.step, &picture);
        let path = self.run_dir.sample(self.step, "png");
        match picture.write_png(&path) {
            Ok(()) => Ok(Some(path)),
            Err(error) => {
                self.console.alarm(error.to_string());
                Ok(None)
            }
        }
    }

    /// Saves what is not saved, draws the last grid, and says goodbye.
    fn close(mut self, ended: Ended) -> Result<Ended, TrainError> {
        self.save_now()?;
        self.reports.end_bar();
        let picture = match ended {
            Ended::Finished => {
                let picture = self.draw()?;
                if picture.is_none() && self.stop.load(Ordering::Relaxed) {
                    self.console.say("stopped while the last grid was drawn: it is left out");
                }
                picture
            }
            Ended::Stopped => None,
        };
        self.reports.flush();
        self.console.last(farewell(&self, ended, picture.as_deref()));
        Ok(ended)
    }

    /// Saves what can be saved of a run that cannot go on; gives back why it cannot.
    fn give_up(mut self, error: TrainError) -> TrainError {
        self.reports.end_bar();
        // State that is not finite is worth less than the checkpoint before it.
        if !matches!(error, TrainError::Diverged { .. }) {
            match self.save_now() {
                Ok(()) if self.step > 0 => self.console.alarm(format!("step {} is saved", self.step)),
                Ok(()) => {}
                Err(not_saved) => self.console.alarm(not_saved.to_string()),
            }
        }
        self.reports.flush();
        error
    }
}

fn open_data(config: &Config, options: &Options<'_>) -> Result<Dataset, TrainError> {
    let progress = DecodingBar { console: options.console, bar: Mutex::new(None), stop: options.stop };
    // Pictures of a folder become grey or coloured as the model wants them, unless `data.channels` says otherwise.
    let channels = config.data.channels.unwrap_or(config.model.image_channels);
    let data = DataConfig { channels: Some(channels), ..config.data.clone() };
    let dataset = Dataset::open(&data, options.config_file, &progress).map_err(|error| match error {
        DataError::Mismatch { key: "data.channels", found, .. } if config.data.channels.is_none() => {
            let why = "the images of the data set have this many";
            TrainError::OutOfRange(OutOfRange::new("model.image_channels", channels, found, why))
        }
        error => TrainError::Data(error),
    })?;
    OutOfRange::check(
        channels == config.model.image_channels,
        "model.image_channels",
        config.model.image_channels,
        format!("data.channels = {channels}"),
        "the model sees the images as they are",
    )?;
    if dataset.skipped() > 0 {
        let names = dataset.skipped_names().join(", ");
        options.console.alarm(format!("{} images were skipped: {names}", dataset.skipped()));
    }
    Ok(dataset)
}

fn farewell(run: &Run<'_>, ended: Ended, picture: Option<&Path>) -> String {
    let Run { config, program, step, .. } = run;
    let root = run.run_dir.root().display();
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
