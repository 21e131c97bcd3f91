//! A training run from start to end: status → images → state → batch → step.

mod leave;
mod open;
mod step;

use self::open::open_data;
use super::accounts::Account;
use super::feed::Feed;
use super::grids::Grids;
use super::ranks::{LOOK, at_rank_zero, gather, same_program};
use super::reports::Reports;
use super::state::{Identity, copy_state};
use super::{Config, Share, TrainConfig, TrainError, Trainer};
use crate::checkpoint::{Layout, RunDir, SaveReport, Saver, Snapshot, Start};
use crate::cluster::{Stragglers, minority};
use crate::collective::{Activity, Collective};
use crate::data::{Dataset, ImageSize, Order};
use crate::device::{Device, Region};
use crate::rendezvous::Launch;
use crate::rendezvous::store::{Client, StoreError};
use crate::report::Console;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
    /// Who has started this command, and whether for the first time.
    pub launch: Option<Launch>,
    /// Where this rank notes what it is doing, for a watchdog.
    pub activity: Option<&'a Activity>,
    /// Opens a connection of its own to the store of the ranks, where there are several.
    pub connect: Option<&'a dyn Fn() -> Result<Client, StoreError>>,
    /// Where messages go.
    pub console: &'a Console,
    /// Where messages go that all ranks would say alike: silent at all but one.
    pub joint: &'a Console,
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
/// Whatever stands in the way, before the first step if possible; later, a run of one rank saves its state first, and one of several goes
/// back to its last checkpoint. Failing to write a checkpoint, a log
/// or a picture is no error but an alarm on the console, except for the last checkpoint.
pub fn train(
    config: &mut Config,
    device: &mut Device,
    collective: &mut dyn Collective,
    options: &Options<'_>,
) -> Result<Ended, TrainError> {
    collective.set_patience(config.cluster.patience());
    config.train.choose_adding(collective)?;
    let start = start(collective, options)?;
    same_program(collective, config)?;
    let share = Share::new(&config.train, collective.rank(), collective.world_size())?;
    let dataset = Arc::new(open_data(config, collective, options)?);
    let [height, width, channels] = dataset.shape();
    config.model.validate(height, width)?;
    config.model.validate_work(height, width, share.shard, "train.batch")?;
    // From here on the config is complete: whoever reads it later needs no data set to know the size.
    config.data.size = Some(ImageSize { height, width });
    config.data.channels = Some(channels);

    let mut run = Run::open(config, device, collective, options, start, &dataset, share)?;
    let ended = run.all_steps(&dataset).and_then(|ended| run.save_now().map(|()| ended));
    if dataset.replaced() > 0 {
        options.console.alarm(format!("{} images were bad and others stood in for them", dataset.replaced()));
    }
    match ended {
        Ok(ended) => run.close(ended),
        Err(error) => Err(run.give_up(error)),
    }
}

/// How the run meets what is in its directory: begun anew only once, by whoever starts this command how often.
fn start(collective: &mut dyn Collective, options: &Options<'_>) -> Result<Start, TrainError> {
    let Options { run_dir, start, launch, .. } = options;
    let is_begun = launch.as_ref().is_some_and(|l| l.is_again && RunDir::is_begun_by(run_dir, &l.name));
    // As rank 0 sees the directory.
    let start = match gather(collective, vec![u8::from(is_begun)])?[0][..] {
        [0] => *start,
        _ => Start::Resume,
    };
    // Refused now rather than after an hour of decoding.
    at_rank_zero(collective, || Ok(RunDir::check(run_dir, start)?))?;
    Ok(start)
}

/// A run between two steps, as one rank sees it.
struct Run<'a> {
    config: &'a Config,
    program: &'a str,
    device: &'a mut Device,
    collective: &'a mut dyn Collective,
    console: &'a Console,
    joint: &'a Console,
    stop: &'a AtomicBool,
    activity: Option<&'a Activity>,
    deadline: Option<Instant>,
    root: PathBuf,
    trainer: Trainer,
    layout: Arc<Layout>,
    identity: Identity,
    grids: Option<Grids>,
    saver: Saver,
    /// What rank 0 does for all.
    lead: Option<Lead>,
    stragglers: Stragglers,
    account: Account,
    /// The longest time from one step to the next.
    longest: Duration,
    /// Steps begun, of which the device may still compute the last ones.
    begun: u64,
    /// How long this rank was busy to begin each of those that are not done, and waited for images.
    beginnings: VecDeque<[Duration; 2]>,
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
    /// Steps until all are done, or a rank is asked to stop.
    fn all_steps(&mut self, dataset: &Arc<Dataset>) -> Result<Ended, TrainError> {
        let TrainConfig { batch, steps, seed, .. } = self.config.train;
        let places = self.trainer.share().places();
        let order = Order { seed, len: dataset.len() };
        let is_held = self.trainer.images().is_some();
        let mut feed = Feed::new(dataset, order, batch, places, self.step, is_held)?;
        self.account.checksum = self.checksum()?;
        let (accounts, mut known) = self.exchange()?;
        let strange = minority(&accounts.iter().filter_map(|account| account.checksum).collect::<Vec<_>>());
        if !strange.is_empty() {
            let differs = |account: &Account| account.checksum != accounts[0].checksum;
            let rank = accounts.iter().position(differs).unwrap_or(0);
            let what = format!("rank {rank} begins with other weights than rank 0");
            return Err(TrainError::Unequal { what, remedy: "give all of them the same --init" });
        }
        while self.begun < steps {
            if known.stop {
                self.finish_all_but(0)?;
                return Ok(Ended::Stopped);
            }
            let since = Instant::now();
            self.begin(&mut feed)?;
            let ahead = if self.is_due() { 0 } else { self.device.steps_ahead() };
            known = self.finish_all_but(ahead)?.unwrap_or(known);
            self.longest = self.longest.max(since.elapsed());
            dataset.replacements().iter().for_each(|text| self.console.alarm(text));
            if ahead == 0 {
                self.save_if_due(known.idle)?;
                self.draw_if_due()?;
            }
            self.device.take_notice().into_iter().for_each(|text| self.console.alarm(text));
        }
        Ok(Ended::Finished)
    }

    /// Notes what this rank does from now on, for step `step` from 1.
    fn note(&self, step: u64, phase: &'static str) {
        self.activity.iter().for_each(|activity| activity.note(step, phase));
    }

    /// Whether there would be no time left to save after one more step.
    fn time_is_up(&self) -> bool {
        let needed = self.needed_to_leave();
        self.deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) < needed)
    }

    /// Time that the steps under way and one more, saving (after the save that is under way) and leaving may take.
    fn needed_to_leave(&self) -> Duration {
        let save = Duration::from_secs(self.layout.elements() as u64 * 16 / SAVED_PER_SECOND);
        let steps = 2 + self.device.steps_ahead() as u32;
        steps * self.longest + if self.saver.is_busy() { 2 * save } else { save } + LEAVING
    }

    /// Begins to write a checkpoint in the background if one is due and no rank still writes the one before; else it waits for that.
    fn save_if_due(&mut self, idle: bool) -> Result<(), TrainError> {
        self.save_waits |= self.config.checkpoint.is_due(self.step);
        if self.save_waits && idle {
            self.save()?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.save_waits = false;
        let Run { trainer, device, collective, saver, layout, identity, config, step, .. } = self;
        let mut buffers = saver.buffers(layout);
        copy_state(trainer, device, *collective, &mut buffers)?;
        let state = Snapshot::new(identity.meta(config, *step), Arc::clone(layout), buffers);
        if let Err(refused) = saver.save(state) {
            self.joint.alarm(format!("step {step} is not saved: {refused}"));
        }
        Ok(())
    }

    /// Waits for what is being written, and then saves this step if it is not saved yet. An error is that of this step.
    fn save_now(&mut self) -> Result<(), TrainError> {
        self.finish_all_but(0)?;
        let step = self.step;
        self.note(step, "saving");
        if let Some(report) = self.wait_for_saves()? {
            self.note_save(Some(report));
        }
        // A rank may not have heard that all was well: then all save again. What is saved is the same at all ranks.
        let mut mine = vec![u8::from(self.saved != Some(step))];
        mine.extend(self.checksum()?.unwrap_or(0).to_le_bytes());
        let all = gather(self.collective, mine)?;
        if step == 0 || all.iter().all(|word| word.starts_with(&[0])) {
            return Ok(());
        }
        let checksum = |word: &Vec<u8>| word.get(1..).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        self.agree(&all.iter().filter_map(checksum).collect::<Vec<_>>())?;
        self.save()?;
        if let Some(report) = self.wait_for_saves()? {
            report.result.map_err(|source| TrainError::NotSaved { step, source })?;
        }
        self.saved = Some(step);
        Ok(())
    }

    /// Returns when no rank writes a checkpoint any more, with the report of what this one wrote.
    fn wait_for_saves(&mut self) -> Result<Option<SaveReport>, TrainError> {
        if self.collective.world_size() == 1 {
            return Ok(self.saver.wait());
        }
        let mut report = None;
        loop {
            report = self.saver.poll().or(report);
            // Not the store, but the others themselves: a rank that is lost is noticed at once.
            let busy = gather(self.collective, vec![u8::from(self.saver.is_busy())])?;
            if busy.iter().all(|busy| *busy == [0]) {
                return Ok(report);
            }
            std::thread::sleep(LOOK);
        }
    }

    fn note_save(&mut self, report: Option<SaveReport>) {
        let Some(SaveReport { step, result }) = report else { return };
        let console = self.joint;
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
        self.note(self.step, "sampling");
        let weights = self.trainer.whole(self.device, self.collective, Region::Ema)?;
        let stop = self.stop;
        let until =
            self.deadline.map(|deadline| deadline.checked_sub(self.needed_to_leave()).unwrap_or_else(Instant::now));
        let goes_on = || !stop.load(Ordering::Relaxed) && until.is_none_or(|until| Instant::now() < until);
        let drawn = grids.draw(self.config, self.device, self.collective, weights, self.joint, &goes_on)?;
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
}
