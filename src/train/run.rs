//! A training run from start to end: status → images → state → batch → step.

use super::reports::{DecodingBar, Reports, Speed};
use super::state::{Identity, layout_for_checkpoints, restore, snapshot};
use super::{Config, TrainError, Trainer, differences};
use crate::checkpoint::{Layout, RunDir, SaveReport, Saver, Snapshot, Start, Want, load_newest};
use crate::collective::Solo;
use crate::config::OutOfRange;
use crate::data::{DataConfig, DataError, Dataset, ImageSize, Loader, LoaderConfig, Order};
use crate::device::{Device, Region};
use crate::diffusion::{SamplerTable, Schedule};
use crate::report::{Console, GridOptions, Images, grid};
use crate::sample::{Request, Sampler};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

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
    let console = options.console;
    let dataset = Arc::new(open_data(config, options)?);
    let [height, width, channels] = dataset.shape();
    config.model.validate(height, width)?;
    // From here on the config is complete: whoever reads it later needs no data set to know the size.
    config.data.size = Some(ImageSize { height, width });
    config.data.channels = Some(channels);
    let config = &*config;
    let schedule = Schedule::new(&config.diffusion)?;

    let mut trainer = Trainer::new(device, config, &schedule, [height, width])?;
    let layout = layout_for_checkpoints(&trainer.program().layout)?;
    let identity = Identity::new(config, dataset.fingerprint(), device)?;
    let initial = options.initial.map(|weights| weights(&layout)).transpose().map_err(TrainError::Initial)?;
    // Only now, with nothing left to refuse: a fresh start may remove the run that is there.
    let run_dir = RunDir::open(options.run_dir, options.start)?;
    let start = match load_newest(&run_dir.checkpoints(), Some(&layout), Want::All)? {
        Some(newest) => {
            newest.skipped.iter().for_each(|s| console.alarm(format!("skipping {}: {}", s.path.display(), s.reason)));
            check_same_run(config, &newest.path, &newest.snapshot, &identity, &dataset)?;
            restore(&trainer, device, &newest.snapshot);
            console.say(format!("resuming from {}", newest.path.display()));
            newest.snapshot.meta.step
        }
        None => {
            if let Some(initial) = initial {
                trainer.set_parameters(device, &initial);
            }
            0
        }
    };
    run_dir.write_config(&identity.config_toml)?;

    let mut saver = Saver::new(&run_dir.checkpoints(), &config.checkpoint)?;
    let mut reports = Reports::open(config, &run_dir, start)?;
    let sampler = match config.sample.count {
        0 => None,
        count => {
            let batch = config.sample.batch.min(count);
            Some(Sampler::new(device, &config.model, [height, width], batch, Some(&trainer.program().layout))?)
        }
    };
    let table = SamplerTable::new(&schedule, &config.sample.sampler(&config.diffusion))?;
    let order = Order { seed: config.train.seed, len: dataset.len() };
    let batch = config.train.batch;
    let slice = LoaderConfig { batch, offset: 0, count: batch, start, depth: 3 };
    let mut loader = Loader::new(Arc::clone(&dataset), order, slice)?;
    console.say(format!(
        "{} parameters, {} images of {height}×{width}×{channels}, steps {start} to {} of {batch}, in {}",
        trainer.program().layout.parameters(),
        dataset.len(),
        config.train.steps,
        run_dir.root().display(),
    ));

    let mut bar = console.training(start, config.train.steps, batch);
    let mut speed = Speed::new(start);
    let mut step = start;
    let mut saved = (start > 0).then_some(start);
    let ended = loop {
        if step >= config.train.steps {
            break Ended::Finished;
        }
        if options.stop.load(Ordering::Relaxed) {
            break Ended::Stopped;
        }
        let images = loader.next()?;
        let metrics = trainer.step(device, &mut Solo, config, step, images.pixels)?;
        step += 1;
        if !metrics.finite {
            let what = if metrics.loss.is_finite() { "the gradient" } else { "the loss" };
            report_save(console, saver.wait(), &mut saved);
            let kept = match saved {
                Some(step) => format!("The checkpoint of step {step} is intact"),
                None => "No checkpoint was saved before".to_string(),
            };
            return Err(TrainError::Diverged { step, what, kept });
        }
        reports.step(console, &mut bar, config, step, &metrics, &mut speed, batch);
        report_save(console, saver.poll(), &mut saved);
        if config.checkpoint.is_due(step) {
            let state = snapshot(&trainer, device, &mut saver, &layout, &identity, config, step);
            if let Err(refused) = saver.save(state) {
                console.alarm(format!("step {step} is not saved: {refused}"));
            }
        }
        let due = config.sample.every > 0 && step.is_multiple_of(config.sample.every) && step < config.train.steps;
        if let (true, Some(sampler)) = (due, &sampler) {
            speed.pause(|| {
                sample_grid(config, device, &trainer, sampler, &table, options, &run_dir, step, &mut reports)
            })?;
        }
    };
    drop(bar);

    report_save(console, saver.wait(), &mut saved);
    if saved != Some(step) {
        let state = snapshot(&trainer, device, &mut saver, &layout, &identity, config, step);
        // Nothing is being written: it was waited for.
        saver.save(state).ok();
        if let Some(report) = saver.wait() {
            report.result.map_err(|source| TrainError::NotSaved { step, source })?;
        }
    }
    if let (Ended::Finished, Some(sampler)) = (ended, &sampler) {
        sample_grid(config, device, &trainer, sampler, &table, options, &run_dir, step, &mut reports)?;
    }
    reports.flush(console);
    console.last(farewell(ended, step, config, &run_dir, sampler.is_some()));
    Ok(ended)
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

fn report_save(console: &Console, report: Option<SaveReport>, saved: &mut Option<u64>) {
    let Some(SaveReport { step, result }) = report else { return };
    match result {
        Ok(done) => {
            *saved = Some(step);
            console.detail(format!("saved {} in {:.1} s", done.path.display(), done.duration.as_secs_f64()));
            done.not_removed.iter().for_each(|e| console.alarm(format!("an old checkpoint stays: {e}")));
        }
        Err(error) => console.alarm(format!("step {step} is NOT saved: {error}; training goes on and tries again")),
    }
}

/// A grid of images from the averaged weights, to the run directory and TensorBoard.
#[allow(clippy::too_many_arguments)]
fn sample_grid(
    config: &Config,
    device: &mut Device,
    trainer: &Trainer,
    sampler: &Sampler,
    table: &SamplerTable,
    options: &Options<'_>,
    run_dir: &RunDir,
    step: u64,
    reports: &mut Reports,
) -> Result<(), TrainError> {
    let console = options.console;
    let count = config.sample.count;
    let request = Request { count, seed: config.sample.seed, initial_noise: None };
    let bar = console.bar("sampling", (count.div_ceil(sampler.batch()) * table.steps.len()) as u64);
    let weights = trainer.buffer(Region::Ema);
    let observe = |done: usize, _: usize, _: usize, _: &[f32]| {
        bar.set(done as u64);
        !options.stop.load(Ordering::Relaxed)
    };
    let Some(pixels) = sampler.sample(device, weights, table, request, observe)? else { return Ok(()) };
    drop(bar);
    let [height, width, channels] = sampler.size();
    let picture = grid(&Images::new(&pixels, [count, height, width, channels])?, &GridOptions::default());
    let path = run_dir.sample(step, "png");
    match picture.write_png(&path) {
        Ok(()) => console.detail(format!("samples in {}", path.display())),
        Err(error) => console.alarm(error.to_string()),
    }
    reports.picture(console, step, &picture);
    Ok(())
}

fn farewell(ended: Ended, step: u64, config: &Config, run_dir: &RunDir, has_samples: bool) -> String {
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
    if has_samples {
        text += &format!("\n  look at     {}", run_dir.sample(step, "png").display());
    }
    text += &format!("\n  sample      ddpm-dist sample {root} --count 64 --seed 1 --out samples.png");
    text += &format!("\n  train on    the same command with --set train.steps={}", 2 * config.train.steps);
    if config.log.tensorboard {
        text += &format!("\n  curves      tensorboard --logdir {root}");
    }
    text
}
