//! A training run from start to end: status → images → state → batch → step.

use super::grids::Grids;
use super::reports::{DecodingBar, Reports};
use super::state::{Identity, layout_for_checkpoints, restore, snapshot};
use super::{Config, TrainConfig, TrainError, Trainer, differences};
use crate::checkpoint::{Layout, Newest, RunDir, SaveReport, Saver, Snapshot, Start, Want, load_newest};
use crate::collective::Solo;
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
/// Whatever stands in the way, before the first step if possible. Failing to write a checkpoint, a log or a picture is no error but an
/// alarm on the console, except for the last checkpoint.
pub fn train(config: &mut Config, device: &mut Device, options: &Options<'_>) -> Result<Ended, TrainError> {
    let dataset = Arc::new(open_data(config, options)?);
    let [height, width, channels] = dataset.shape();
    config.model.validate(height, width)?;
    config.model.validate_work(height, width, config.train.batch, "train.batch")?;
    // From here on the config is complete: whoever reads it later needs no data set to know the size.
    config.data.size = Some(ImageSize { height, width });
    config.data.channels = Some(channels);

    let mut run = Run::open(config, device, options, &dataset)?;
    let TrainConfig { batch, steps, seed } = config.train;
    let slice = LoaderConfig { batch, offset: 0, count: batch, start: run.step, depth: 3 };
    let mut loader = Loader::new(Arc::clone(&dataset), Order { seed, len: dataset.len() }, slice)?;
    let ended = loop {
        if run.step >= steps {
            break Ended::Finished;
        }
        if options.stop.load(Ordering::Relaxed) {
            break Ended::Stopped;
        }
        run.step(loader.next()?.pixels)?;
        run.save_if_due();
        run.draw_if_due()?;
    };
    run.close(ended)
}

/// A run between two steps.
struct Run<'a> {
    config: &'a Config,
    device: &'a mut Device,
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
}

impl<'a> Run<'a> {
    /// Everything in place for the first step, or for the one after the newest checkpoint.
    fn open(
        config: &'a Config,
        device: &'a mut Device,
        options: &Options<'a>,
        dataset: &Dataset,
    ) -> Result<Run<'a>, TrainError> {
        let Options { console, stop, .. } = *options;
        let [height, width, channels] = dataset.shape();
        let schedule = Schedule::new(&config.diffusion)?;
        let run_dir = RunDir::open(options.run_dir, options.start)?;
        let trainer = Trainer::new(device, config, &schedule, [height, width])?;
        let layout = layout_for_checkpoints(&trainer.program().layout)?;
        let identity = Identity::new(config, dataset.fingerprint(), device)?;
        let saved = match load_newest(&run_dir.checkpoints(), Some(&layout), Want::All)? {
            Some(Newest { path, snapshot, skipped }) => {
                skipped.iter().for_each(|s| console.alarm(format!("skipping {}: {}", s.path.display(), s.reason)));
                check_same_run(config, &path, &snapshot, &identity, dataset)?;
                restore(&trainer, device, &snapshot);
                console.say(format!("resuming from {}", path.display()));
                Some(snapshot.meta.step)
            }
            None => {
                if let Some(initial) = options.initial {
                    trainer.set_parameters(device, &initial(&layout).map_err(TrainError::Initial)?);
                }
                None
            }
        };
        let step = saved.unwrap_or(0);
        run_dir.write_config(&identity.config_toml)?;
        let saver = Saver::new(&run_dir.checkpoints(), &config.checkpoint)?;
        let grids = Grids::new(config, device, &schedule, &trainer, [height, width])?;
        let (parameters, images, steps) = (layout.parameters(), dataset.len(), config.train.steps);
        console.say(format!(
            "{parameters} parameters, {images} images of {height}×{width}×{channels}, steps {step} to {steps} of {}, in {}",
            config.train.batch,
            run_dir.root().display(),
        ));
        let reports = Reports::open(console, config, &run_dir, step)?;
        Ok(Run {
            config,
            device,
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
        })
    }

    /// Algorithm 1, once.
    fn step(&mut self, pixels: &[u8]) -> Result<(), TrainError> {
        let metrics = self.trainer.step(self.device, &mut Solo, self.config, self.step, pixels)?;
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

    /// Begins to write a checkpoint in the background if one is due, and says what became of the one before.
    fn save_if_due(&mut self) {
        let report = self.saver.poll();
        self.note_save(report);
        if self.config.checkpoint.is_due(self.step) {
            self.save();
        }
    }

    fn save(&mut self) {
        let Run { trainer, device, saver, layout, identity, config, step, .. } = self;
        let state = snapshot(trainer, device, saver, layout, identity, config, *step);
        if let Err(refused) = saver.save(state) {
            self.console.alarm(format!("step {step} is not saved: {refused}"));
        }
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
        let report = self.saver.wait();
        self.note_save(report);
        let step = self.step;
        if self.saved != Some(step) {
            self.save();
            if let Some(report) = self.saver.wait() {
                report.result.map_err(|source| TrainError::NotSaved { step, source })?;
            }
        }
        self.reports.end_bar();
        let picture = match ended {
            Ended::Finished => self.draw()?,
            Ended::Stopped => None,
        };
        self.reports.flush();
        self.console.last(farewell(ended, step, self.config, &self.run_dir, picture.as_deref()));
        Ok(ended)
    }
}

fn open_data(config: &Config, options: &Options<'_>) -> Result<Dataset, TrainError> {
    let progress = DecodingBar { console: options.console, bar: Mutex::new(None) };
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

/// Refuses to go on where the result would be neither the old trajectory nor a new run.
fn check_same_run(
    config: &Config,
    checkpoint: &Path,
    snapshot: &Snapshot,
    identity: &Identity,
    dataset: &Dataset,
) -> Result<(), TrainError> {
    let meta = &snapshot.meta;
    if meta.config_hash != identity.config_hash {
        let saved = match &meta.config_toml {
            Some(toml) => crate::config::parse(toml, &checkpoint.display().to_string(), &[])?,
            None => Config::default(),
        };
        let differences = differences(&saved, config)?;
        return Err(TrainError::Contradiction { checkpoint: checkpoint.to_path_buf(), differences });
    }
    if meta.data_fingerprint != identity.data_fingerprint {
        return Err(TrainError::OtherData { checkpoint: checkpoint.to_path_buf(), data: dataset.path().to_path_buf() });
    }
    Ok(())
}

fn farewell(ended: Ended, step: u64, config: &Config, run_dir: &RunDir, picture: Option<&Path>) -> String {
    let root = run_dir.root().display();
    let mut text = match ended {
        Ended::Finished => format!("done: {step} steps. The run is in {root}"),
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
    text += &format!("\n  sample      ddpm-dist sample {root} --count 64 --seed 1 --out samples.png");
    text += &format!("\n  train on    the same command with --set train.steps={}", 2 * config.train.steps);
    if config.log.tensorboard {
        text += &format!("\n  curves      tensorboard --logdir {root}");
    }
    text
}
