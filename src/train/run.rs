//! A training run from start to end: status → images → state → batch → step.

use super::cards::Card;
use super::checksum::checksum;
use super::grids::Grids;
use super::ranks::{at_rank_zero, gather, lost, same_images, same_program, together};
use super::reports::{DecodingBar, Reports};
use super::resume::{check_newest_config, check_same_run};
use super::state::{Identity, layout_for_checkpoints, restore, snapshot};
use super::{Config, Metrics, Shards, Share, TrainConfig, TrainError, Trainer};
use crate::checkpoint::rundir::checkpoints_of;
use crate::checkpoint::write::dir_name;
use crate::checkpoint::{Layout, Newest, RunDir, SaveReport, Saver, Snapshot, Start, Want, load, load_newest};
use crate::cluster::{Slow, Stragglers, minority};
use crate::collective::{Collective, Timed};
use crate::config::OutOfRange;
use crate::data::{DataConfig, DataError, Dataset, ImageSize, Loader, LoaderConfig, Order};
use crate::device::{Device, Region};
use crate::diffusion::Schedule;
use crate::report::Console;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long ranks wait for each other before the first step: one of them may decode a data set meanwhile.
const OPENING: Duration = Duration::from_secs(3600);
/// What a deadline leaves for writing a checkpoint, in bytes per second, as a slow shared disk does …
const SAVED_PER_SECOND: u64 = 50_000_000;
/// … and for the rest of leaving.
const LEAVING: Duration = Duration::from_secs(2);

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
    /// When the run must have left, its state saved.
    pub deadline: Option<Instant>,
    /// Whether this is the first rank of its machine: it decodes the data set, and the others use what it has cached.
    pub first_here: bool,
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
    collective.set_patience(OPENING);
    // Refused now rather than after an hour of decoding.
    at_rank_zero(collective, || Ok(RunDir::check(options.run_dir, options.start)?))?;
    same_program(collective, config)?;
    let share = Share::new(&config.train, collective.rank(), collective.world_size())?;
    let dataset = Arc::new(open_data(config, collective, options)?);
    let [height, width, channels] = dataset.shape();
    config.model.validate(height, width)?;
    config.model.validate_work(height, width, share.shard, "train.batch")?;
    // From here on the config is complete: whoever reads it later needs no data set to know the size.
    config.data.size = Some(ImageSize { height, width });
    config.data.channels = Some(channels);

    let mut run = Run::open(config, device, collective, options, &dataset, share)?;
    let ended = run.all_steps(&dataset);
    if dataset.replaced() > 0 {
        options.console.alarm(format!("{} images were bad and others stood in for them", dataset.replaced()));
    }
    match ended {
        Ok(ended) => run.close(ended),
        Err(error) => Err(run.give_up(error)),
    }
}

/// A run between two steps, as one rank sees it.
struct Run<'a> {
    config: &'a Config,
    program: &'a str,
    device: &'a mut Device,
    collective: &'a mut dyn Collective,
    console: &'a Console,
    stop: &'a AtomicBool,
    deadline: Option<Instant>,
    root: PathBuf,
    trainer: Trainer,
    layout: Arc<Layout>,
    identity: Identity,
    grids: Option<Grids>,
    /// What rank 0 does for all.
    lead: Option<Lead>,
    stragglers: Stragglers,
    card: Card,
    /// The longest step.
    longest: Duration,
    /// Steps done.
    step: u64,
    /// Step of the newest checkpoint that is known to be whole.
    saved: Option<u64>,
    /// A checkpoint is due and waits for the one that is being written.
    save_waits: bool,
}

/// The files of a run.
struct Lead {
    run_dir: RunDir,
    saver: Saver,
    reports: Reports,
}

/// What the ranks know of each other after a step.
struct Known {
    /// One of them was asked to stop.
    stop: bool,
    /// None of them writes a checkpoint.
    idle: bool,
}

impl<'a> Run<'a> {
    /// Everything in place for the first step, or for the one after the newest checkpoint.
    fn open(
        config: &'a Config,
        device: &'a mut Device,
        collective: &'a mut dyn Collective,
        options: &Options<'a>,
        dataset: &Dataset,
        share: Share,
    ) -> Result<Run<'a>, TrainError> {
        let Options { console, stop, program, deadline, .. } = *options;
        let [height, width, channels] = dataset.shape();
        let schedule = Schedule::new(&config.diffusion)?;
        let identity = Identity::new(config, dataset.fingerprint(), device, share.world_size)?;
        let run_dir = at_rank_zero(collective, || {
            let run_dir = RunDir::open(options.run_dir, options.start)?;
            if options.start == Start::Resume {
                // Keys say more than the shapes of tensors would, so the config is compared before those are read.
                check_newest_config(config, &run_dir, &identity)?;
            }
            Ok(run_dir)
        })?;
        let trainer = Trainer::new(device, config, &schedule, [height, width], share).map_err(TrainError::from);
        let trainer = together(collective, trainer)?;
        let layout = layout_for_checkpoints(&trainer.program().layout)?;
        let newest = match options.start {
            Start::Resume => newest(options.run_dir, collective, &layout, console)?,
            Start::Fresh { .. } => None,
        };
        let saved = newest.as_ref().map(|(_, snapshot)| snapshot.meta.step);
        if let Some((path, snapshot)) = newest {
            together(collective, check_same_run(config, &path, &snapshot.meta, &identity, dataset))?;
            restore(&trainer, device, &snapshot);
            console.say(format!("resuming from {}", path.display()));
            if options.initial.is_some() {
                console.alarm("the weights to begin with are not used: this run has begun already");
            }
            let differ = "same images and noise, but last bits differ";
            if snapshot.meta.device_kind != identity.device_kind {
                let (then, now) = (&snapshot.meta.device_kind, &identity.device_kind);
                console.alarm(format!("saved on {then}, going on with {now}: {differ}"));
            }
            if snapshot.meta.world_size != share.world_size && config.train.shards == Shards::Auto {
                let (then, now) = (snapshot.meta.world_size, share.world_size);
                console.alarm(format!("saved by {}, going on with {}: {differ}", ranks(then), ranks(now)));
            }
        } else if let Some(initial) = options.initial {
            trainer.set_parameters(device, &initial(&layout).map_err(TrainError::Initial)?);
        }
        let step = saved.unwrap_or(0);
        let grids = together(collective, Grids::new(config, device, &schedule, &trainer, [height, width]))?;
        let lead = at_rank_zero(collective, || {
            let Some(run_dir) = run_dir else { return Ok(None) };
            // Nothing that is in memory can fail from here on: now an earlier run may go.
            for path in run_dir.settle()? {
                console.detail(format!("left in place, as no run makes it: {}", path.display()));
            }
            run_dir.write_config(&identity.config_toml)?;
            let saver = Saver::new(&run_dir.checkpoints(), &config.checkpoint)?;
            let (parameters, images) = (layout.parameters(), dataset.len());
            let TrainConfig { steps, batch, .. } = config.train;
            let on = if share.world_size > 1 { format!(" on {}", ranks(share.world_size)) } else { String::new() };
            console.say(format!(
                "{parameters} parameters, {images} images of {height}×{width}×{channels}, steps {step} to {steps}, batch {batch}{on}, in {}",
                run_dir.root().display(),
            ));
            let reports = Reports::open(console, config, &run_dir, step)?;
            Ok(Some(Lead { run_dir, saver, reports }))
        })?;
        collective.set_patience(config.cluster.patience());
        Ok(Run {
            config,
            program,
            device,
            collective,
            console,
            stop,
            deadline,
            root: options.run_dir.to_path_buf(),
            trainer,
            layout,
            identity,
            grids,
            lead: lead.flatten(),
            stragglers: Stragglers::new(share.world_size),
            card: Card::default(),
            longest: Duration::ZERO,
            step,
            saved,
            save_waits: false,
        })
    }

    /// Steps until all are done, or a rank is asked to stop.
    fn all_steps(&mut self, dataset: &Arc<Dataset>) -> Result<Ended, TrainError> {
        let TrainConfig { batch, steps, seed, .. } = self.config.train;
        let places = self.trainer.share().places();
        let slice = LoaderConfig { batch, offset: places.start, count: places.len(), start: self.step, depth: 3 };
        let mut loader = Loader::new(Arc::clone(dataset), Order { seed, len: dataset.len() }, slice)?;
        let mut known = self.exchange()?.1;
        while self.step < steps {
            if known.stop {
                return Ok(Ended::Stopped);
            }
            known = self.step(&mut loader)?;
            dataset.replacements().iter().for_each(|text| self.console.alarm(text));
            self.save_if_due(known.idle);
            self.draw_if_due()?;
        }
        Ok(Ended::Finished)
    }

    /// Algorithm 1, once.
    fn step(&mut self, loader: &mut Loader) -> Result<Known, TrainError> {
        let since = Instant::now();
        let pixels = loader.next()?.pixels;
        let mut timed = Timed::new(self.collective);
        let losses = self.trainer.step(self.device, &mut timed, self.config, self.step, pixels)?;
        let norm = losses.norm;
        self.card.fill(&losses);
        self.card.busy = since.elapsed().saturating_sub(timed.spent);
        self.step += 1;
        if self.collective.world_size() > 1 && self.config.cluster.compares_after(self.step) {
            let held = [Region::Weights, Region::Ema].map(|region| self.trainer.buffer(region));
            self.card.checksum = Some(checksum(self.device, &held, self.layout.elements()));
        }
        let (cards, known) = self.exchange()?;
        self.longest = self.longest.max(since.elapsed());
        self.compare(&cards)?;
        let images = cards.iter().flat_map(|card| card.losses.iter().copied().zip(card.timesteps.iter().copied()));
        let metrics = Metrics::new(images, self.config.diffusion.timesteps, norm);
        if metrics.finite {
            if let Some(lead) = &mut self.lead {
                lead.reports.step(self.config, self.step, &metrics);
            }
            return Ok(known);
        }
        let what = if metrics.loss.is_finite() { "the gradient" } else { "the loss" };
        self.wait_for_save();
        let kept = match self.saved {
            Some(step) => format!("The checkpoint of step {step} is intact"),
            None => "No checkpoint was saved before".to_string(),
        };
        Err(TrainError::Diverged { step: self.step, what, kept })
    }

    /// Tells the other ranks how this one stands, and hears how they stand.
    fn exchange(&mut self) -> Result<(Vec<Card>, Known), TrainError> {
        let report = self.lead.as_mut().and_then(|lead| lead.saver.poll());
        self.note_save(report);
        self.card.idle = self.lead.as_ref().is_none_or(|lead| !lead.saver.is_busy());
        self.card.stop = self.stop.load(Ordering::Relaxed) || self.time_is_up();
        let cards = self.card.exchange(self.collective).map_err(lost)?;
        self.card.checksum = None;
        let known = Known { stop: cards.iter().any(|card| card.stop), idle: cards.iter().all(|card| card.idle) };
        Ok((cards, known))
    }

    /// Whether there would be no time left to save after one more step.
    fn time_is_up(&self) -> bool {
        let saving = Duration::from_secs(self.layout.elements() as u64 * 16 / SAVED_PER_SECOND);
        let needed = 2 * self.longest + saving + LEAVING;
        self.deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) < needed)
    }

    /// Compares what the ranks say of themselves.
    fn compare(&mut self, cards: &[Card]) -> Result<(), TrainError> {
        let checksums: Vec<u64> = cards.iter().filter_map(|card| card.checksum).collect();
        let ranks = minority(&checksums);
        if !ranks.is_empty() {
            let rest = if ranks.len() < checksums.len() { "those of the others" } else { "each other" };
            return Err(TrainError::Corrupt { step: self.step, ranks, rest });
        }
        for Slow { rank, ratio, is_slow } in self.stragglers.note(cards.iter().map(|card| card.busy)) {
            if self.lead.is_none() {
                continue;
            }
            match is_slow {
                true => self.console.alarm(format!(
                    "step {}: rank {rank} is slow: its own work takes {ratio:.1} times as long as the typical rank's",
                    self.step
                )),
                false => {
                    self.console.all_clear(format!("step {}: rank {rank} is as fast as the others again", self.step))
                }
            }
        }
        Ok(())
    }

    /// Begins to write a checkpoint in the background if one is due and no rank still writes the one before; else it waits for that.
    fn save_if_due(&mut self, idle: bool) {
        self.save_waits |= self.config.checkpoint.is_due(self.step);
        if self.save_waits && idle {
            self.save();
        }
    }

    fn save(&mut self) {
        self.save_waits = false;
        let Run { trainer, device, lead, layout, identity, config, step, .. } = self;
        let Some(Lead { saver, .. }) = lead else { return };
        let state = snapshot(trainer, device, saver, layout, identity, config, *step);
        if let Err(refused) = saver.save(state) {
            self.console.alarm(format!("step {step} is not saved: {refused}"));
        }
    }

    /// Waits for what is being written, and then saves this step if it is not saved yet. An error is that of this step.
    fn save_now(&mut self) -> Result<(), TrainError> {
        self.wait_for_save();
        let step = self.step;
        if step > 0 && self.saved != Some(step) {
            self.save();
            if let Some(report) = self.lead.as_mut().and_then(|lead| lead.saver.wait()) {
                report.result.map_err(|source| TrainError::NotSaved { step, source })?;
            }
            self.saved = Some(step);
        }
        Ok(())
    }

    fn wait_for_save(&mut self) {
        let report = self.lead.as_mut().and_then(|lead| lead.saver.wait());
        self.note_save(report);
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
            if let Some(lead) = &mut self.lead {
                lead.reports.leave_out(since.elapsed());
            }
        }
        Ok(())
    }

    /// A grid of images from the averaged weights, to the run directory and TensorBoard. Gives its path if it was written.
    fn draw(&mut self) -> Result<Option<PathBuf>, TrainError> {
        let Some(grids) = &self.grids else { return Ok(None) };
        let weights = self.trainer.buffer(Region::Ema);
        let drawn = grids.draw(self.config, self.device, self.collective, weights, self.console, self.stop)?;
        let (Some(picture), Some(lead)) = (drawn, &mut self.lead) else { return Ok(None) };
        lead.reports.picture(self.step, &picture);
        let path = lead.run_dir.sample(self.step, "png");
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
        self.end_bar();
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
    fn give_up(mut self, error: TrainError) -> TrainError {
        self.end_bar();
        // State that is not finite, or not the same at all ranks, is worth less than the checkpoint before it.
        let is_sound = !matches!(error, TrainError::Diverged { .. } | TrainError::Corrupt { .. });
        if is_sound && self.collective.world_size() == 1 {
            match self.save_now() {
                Ok(()) if self.step > 0 => self.console.alarm(format!("step {} is saved", self.step)),
                Ok(()) => {}
                Err(not_saved) => self.console.alarm(not_saved.to_string()),
            }
        } else {
            self.wait_for_save();
        }
        self.lead.iter_mut().for_each(|lead| lead.reports.flush());
        error
    }
}

/// The newest checkpoint that verifies, as rank 0 finds it, at all ranks.
fn newest(
    root: &Path,
    collective: &mut dyn Collective,
    layout: &Arc<Layout>,
    console: &Console,
) -> Result<Option<(PathBuf, Snapshot)>, TrainError> {
    let checkpoints = checkpoints_of(root);
    let found = at_rank_zero(collective, || Ok(load_newest(&checkpoints, Some(layout), Want::All)?))?.flatten();
    let step = found.as_ref().map_or_else(Vec::new, |newest| newest.snapshot.meta.step.to_le_bytes().to_vec());
    let all = gather(collective, step)?;
    let Some(step) = all[0].as_slice().try_into().ok().map(u64::from_le_bytes) else { return Ok(None) };
    let here = match found {
        Some(Newest { path, snapshot, skipped }) => {
            skipped.iter().for_each(|s| console.alarm(format!("skipping {}: {}", s.path.display(), s.reason)));
            Ok((path, snapshot))
        }
        None => {
            let path = checkpoints.join(dir_name(step));
            load(&path, Some(layout), Want::All).map(|snapshot| (path, snapshot)).map_err(TrainError::from)
        }
    };
    together(collective, here).map(Some)
}

/// The data set; one rank of each machine is the first to open it, and may have to decode it.
fn open_data(config: &Config, collective: &mut dyn Collective, options: &Options<'_>) -> Result<Dataset, TrainError> {
    let first = options.first_here.then(|| open_data_here(config, options)).transpose();
    let dataset = match together(collective, first)? {
        Some(dataset) => Ok(dataset),
        None => open_data_here(config, options),
    };
    let dataset = together(collective, dataset)?;
    same_images(collective, &dataset.fingerprint())?;
    Ok(dataset)
}

fn open_data_here(config: &Config, options: &Options<'_>) -> Result<Dataset, TrainError> {
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

fn ranks(number: usize) -> String {
    if number == 1 { "1 rank".to_string() } else { format!("{number} ranks") }
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
