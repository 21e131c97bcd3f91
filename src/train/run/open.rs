//! Everything before the first step: the data set, the state of the newest checkpoint, files to write to.

use super::{Lead, Options, Run};
use crate::checkpoint::rundir::{checkpoints_of, sees_mark};
use crate::checkpoint::write::dir_name;
use crate::checkpoint::{
    Layout, Newest, RunDir, RunDirError, Saver, Snapshot, Start, Team, Want, check_room, load, load_newest,
};
use crate::cluster::Stragglers;
use crate::collective::Collective;
use crate::config::OutOfRange;
use crate::data::{DataConfig, DataError, Dataset};
use crate::device::Device;
use crate::diffusion::Schedule;
use crate::machine::host_name;
use crate::report::Console;
use crate::train::accounts::Account;
use crate::train::feed::{HoldError, held, hold};
use crate::train::grids::Grids;
use crate::train::plans::{settle_plans, take_pinned};
use crate::train::ranks::{LOOK, at_rank_zero, beside, gather, same_images, together};
use crate::train::reports::{DecodingBar, Reports};
use crate::train::resume::{check_newest_config, check_same_run};
use crate::train::shards::ranks;
use crate::train::state::{Identity, layout_for_checkpoints, restore};
use crate::train::step::layout_of_step;
use crate::train::{Config, Shards, Share, TrainConfig, TrainError, Trainer, must_fit};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a file system may keep the lock of a machine that is gone: NFS takes 90 s.
const LEASE: Duration = Duration::from_secs(120);
/// How long ranks wait for each other's part of a checkpoint at least.
const WRITING: Duration = Duration::from_secs(300);

impl<'a> Run<'a> {
    /// Everything in place for the first step, or for the one after the newest checkpoint.
    pub(super) fn open(
        config: &'a Config,
        device: &'a mut Device,
        collective: &'a mut dyn Collective,
        options: &Options<'a>,
        start: Start,
        dataset: &Dataset,
        share: Share,
    ) -> Result<Run<'a>, TrainError> {
        let Options { console, joint, stop, program, deadline, activity, .. } = *options;
        let [height, width, channels] = dataset.shape();
        let schedule = Schedule::new(&config.diffusion)?;
        let mut identity = Identity::new(config, dataset.fingerprint(), device, share.world_size)?;
        let root = options.run_dir;
        let run_dir = at_rank_zero(collective, || {
            let run_dir = open_when_free(root, start, console, stop)?;
            if matches!(start, Start::Resume) {
                // Keys say more than the shapes of tensors would, so the config is compared before those are read.
                check_newest_config(config, &run_dir, &identity)?;
            }
            Ok(run_dir)
        })?;
        same_directory(collective, root, run_dir.as_ref())?;
        let room = together(collective, must_fit::<TrainError>(device, config, [height, width], &share))?;
        let held = room.and_then(|room| held(dataset, room));
        let layout = layout_for_checkpoints(&layout_of_step(config, [height, width], &share))?;
        let newest = match start {
            Start::Resume => newest(root, collective, &layout, console)?,
            Start::Fresh { .. } => None,
        };
        if let Some((path, snapshot)) = &newest {
            together(collective, check_same_run(config, path, &snapshot.meta, &identity, dataset))?;
            take_pinned(device, &snapshot.meta, joint);
        }
        settle_plans(device, collective, config, [height, width], &share, options)?;
        let trainer = Trainer::holding(device, config, &schedule, [height, width], share, held);
        let trainer = together(collective, trainer.map_err(TrainError::from))?;
        let uploaded = hold(&trainer, device, dataset).map_err(|error| match error {
            HoldError::Data(error) => TrainError::from(error),
            HoldError::Device(error) => TrainError::from(error),
        });
        together(collective, uploaded)?;
        if held.is_some() {
            console.detail("the GPU holds all images");
        }
        let saved = newest.as_ref().map(|(_, snapshot)| snapshot.meta.step);
        if let Some((path, snapshot)) = newest {
            restore(&trainer, device, &snapshot)?;
            console.say(format!("resuming from {}", path.display()));
            if options.initial.is_some() {
                joint.alarm("the weights to begin with are not used: this run has begun already");
            }
            let differ = "same images and noise, but last bits differ";
            if let Some(change) = identity.change_since(&snapshot.meta) {
                joint.alarm(format!("{change}: {differ}"));
            }
            if snapshot.meta.world_size != share.world_size && config.train.shards == Shards::Auto {
                let (then, now) = (snapshot.meta.world_size, share.world_size);
                joint.alarm(format!("saved by {}, going on with {}: {differ}", ranks(then), ranks(now)));
            }
        } else if let Some(initial) = options.initial {
            trainer.set_parameters(device, &initial(&layout).map_err(TrainError::Initial)?)?;
        }
        let step = saved.unwrap_or(0);
        let grids = together(collective, Grids::new(config, device, &schedule, &trainer, [height, width]))?;
        identity.plans = device.plans();
        let launch = options.launch.as_ref().map(|launch| launch.name.as_str());
        let lead = at_rank_zero(collective, || {
            let Some(run_dir) = run_dir else { return Ok(None) };
            if step < config.train.steps {
                check_room(run_dir.root(), &layout, run_dir.to_be_freed())?;
            }
            // Nothing that is in memory can fail from here on: now an earlier run may go.
            for path in run_dir.settle(launch)? {
                console.detail(format!("left in place, as no run makes it: {}", path.display()));
            }
            run_dir.write_config(&identity.config_toml)?;
            let (parameters, images) = (layout.parameters(), dataset.len());
            let TrainConfig { steps, batch, .. } = config.train;
            let on = if share.world_size > 1 { format!(" on {}", ranks(share.world_size)) } else { String::new() };
            console.say(format!(
                "{parameters} parameters, {images} images of {height}×{width}×{channels}, steps {step} to {steps}, batch {batch}{on}, in {}",
                run_dir.root().display(),
            ));
            let reports = Reports::open(console, config, &run_dir, step)?;
            Ok(Some(Lead { run_dir, reports }))
        })?;
        let saver = saver(config, collective, options);
        let mut saver = together(collective, saver)?;
        saver.prepare(&layout);
        Ok(Run {
            config,
            program,
            device,
            collective,
            console,
            joint,
            stop,
            activity,
            deadline,
            root: options.run_dir.to_path_buf(),
            trainer,
            layout,
            identity,
            grids,
            saver,
            lead: lead.flatten(),
            stragglers: Stragglers::new(share.world_size),
            account: Account::default(),
            longest: Duration::ZERO,
            begun: step,
            beginnings: VecDeque::new(),
            step,
            saved,
            save_waits: false,
        })
    }
}

/// Opens the run directory. A machine that went down may be taken for the owner of its lock until a lease of the file system ends.
fn open_when_free(root: &Path, start: Start, console: &Console, stop: &AtomicBool) -> Result<RunDir, TrainError> {
    let since = Instant::now();
    let mut said = false;
    loop {
        match RunDir::open(root, start) {
            Err(RunDirError::Locked { owner, .. })
                if owner.host.as_ref().is_some_and(|host| *host != host_name()) && since.elapsed() < LEASE =>
            {
                if !said {
                    let (root, seconds) = (root.display(), LEASE.as_secs());
                    console.say(format!("{root} is in use by {owner}, on another machine: waiting {seconds} s for it"));
                    said = true;
                }
                if stop.load(Ordering::Relaxed) {
                    return Err(TrainError::Stopped);
                }
                std::thread::sleep(LOOK);
            }
            opened => return Ok(opened?),
        }
    }
}

/// Refuses ranks that do not see the run directory of rank 0.
fn same_directory(collective: &mut dyn Collective, root: &Path, run_dir: Option<&RunDir>) -> Result<(), TrainError> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let mark = together(collective, run_dir.map(RunDir::mark).transpose().map_err(TrainError::from))?;
    let nonce = mark.as_ref().map_or_else(Vec::new, |mark| mark.nonce().as_bytes().to_vec());
    let nonce = String::from_utf8_lossy(&gather(collective, nonce)?[0]).into_owned();
    let seen = sees_mark(root, &nonce, collective.rank());
    together(collective, seen.map_err(TrainError::from))
}

/// This rank's saver.
fn saver(config: &Config, collective: &dyn Collective, options: &Options<'_>) -> Result<Saver, TrainError> {
    let checkpoints = checkpoints_of(options.run_dir);
    let (rank, size) = (collective.rank(), collective.world_size());
    // A disk may be slow where ranks are not.
    let patience = config.cluster.patience().max(WRITING);
    Ok(match options.connect {
        Some(connect) if size > 1 => {
            let store = connect()?;
            Saver::with_team(&checkpoints, &config.checkpoint, Team { rank, size, store, patience })?
        }
        _ => Saver::new(&checkpoints, &config.checkpoint)?,
    })
}

/// The newest checkpoint that verifies, as rank 0 finds it, at all ranks.
fn newest(
    root: &Path,
    collective: &mut dyn Collective,
    layout: &Arc<Layout>,
    console: &Console,
) -> Result<Option<(PathBuf, Snapshot)>, TrainError> {
    let checkpoints = checkpoints_of(root);
    let is_rank_zero = collective.rank() == 0;
    let found = beside(collective, |_| match is_rank_zero {
        true => Ok(load_newest(&checkpoints, Some(layout), Want::All)?),
        false => Ok(None),
    })?;
    let step = found.as_ref().map_or_else(Vec::new, |newest| newest.snapshot.meta.step.to_le_bytes().to_vec());
    let all = gather(collective, step)?;
    let Some(step) = all[0].as_slice().try_into().ok().map(u64::from_le_bytes) else { return Ok(None) };
    let newest = beside(collective, |_| match found {
        Some(Newest { path, snapshot, skipped }) => {
            skipped.iter().for_each(|s| console.alarm(format!("skipping {}: {}", s.path.display(), s.reason)));
            Ok((path, snapshot))
        }
        None => {
            let path = checkpoints.join(dir_name(step));
            Ok((path.clone(), load(&path, Some(layout), Want::All)?))
        }
    });
    newest.map(Some)
}

/// The data set; one rank of each machine is the first to open it, and may have to decode it.
pub(super) fn open_data(
    config: &Config,
    collective: &mut dyn Collective,
    options: &Options<'_>,
) -> Result<Dataset, TrainError> {
    let Options { console, joint, stop, config_file, first_here, .. } = *options;
    let open = |called_off: &AtomicBool| {
        let progress = DecodingBar { console, bar: Mutex::new(None), stop: [stop, called_off] };
        open_data_here(config, config_file, &progress, joint)
    };
    let first = beside(collective, |called_off| first_here.then(|| open(called_off)).transpose())?;
    let dataset = beside(collective, |called_off| first.map_or_else(|| open(called_off), Ok))?;
    same_images(collective, &dataset.fingerprint())?;
    Ok(dataset)
}

fn open_data_here(
    config: &Config,
    config_file: Option<&Path>,
    progress: &DecodingBar<'_>,
    joint: &Console,
) -> Result<Dataset, TrainError> {
    // Pictures of a folder become grey or coloured as the model wants them, unless `data.channels` says otherwise.
    let channels = config.data.channels.unwrap_or(config.model.image_channels);
    let data = DataConfig { channels: Some(channels), ..config.data.clone() };
    let dataset = Dataset::open(&data, config_file, progress).map_err(|error| match error {
        DataError::Mismatch { key: "data.channels", found, .. } if config.data.channels.is_none() => {
            let why = "the images of the data set have this many";
            TrainError::OutOfRange(OutOfRange::new("model.image_channels", channels, found, why))
        }
        DataError::Stopped => TrainError::Stopped,
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
        joint.alarm(format!("{} images were skipped: {names}", dataset.skipped()));
    }
    Ok(dataset)
}
