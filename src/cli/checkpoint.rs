//! `ddpm-dist checkpoint verify`, `inspect` and `reshard`

use super::exit::{Code, Failure, OrFail};
use super::stdout::{grouped, print, print_json, table};
use super::{Common, Stop, quoted};
use crate::checkpoint::rundir::{checkpoints_of, is_run_dir};
use crate::checkpoint::write::parse_dir_name;
use crate::checkpoint::{
    CheckpointError, GROUPS, MAX_SHARDS, Manifest, Meta, ShardFile, TensorSpec, inspect, list, reshard, verify,
};
use crate::tape::human_bytes;
use serde::Serialize;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Arguments {
    /// Read every byte and compare it with the manifest: of a checkpoint, or of all checkpoints of a run
    Verify(Verify),
    /// Show what a checkpoint says of itself, without reading its tensors
    Inspect(Inspect),
    /// Write a checkpoint in another number of shards, with the same bits
    Reshard(Reshard),
}

#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// Checkpoint or run directory
    path: PathBuf,
    /// JSON in place of lines
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Inspect {
    /// Checkpoint, or run directory: its newest
    path: PathBuf,
    /// Show every tensor too
    #[arg(long)]
    tensors: bool,
    /// JSON in place of tables, tensors included
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Reshard {
    /// Checkpoint, or run directory: its newest
    path: PathBuf,
    /// Number of shards to write
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_SHARDS as i64))]
    shards: u32,
    /// Directory to make [default: CHECKPOINT-reshard-N beside the checkpoint]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    match arguments {
        Arguments::Verify(arguments) => verify_all(&arguments),
        Arguments::Inspect(arguments) => show(&arguments),
        Arguments::Reshard(arguments) => write_anew(&arguments, common),
    }
}

/// The checkpoints that a path stands for, oldest first: it is one, or holds some, or is a run that does.
fn checkpoints_at(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // One whose manifest is lost is still known by its name.
    if path.join(crate::checkpoint::manifest::MANIFEST).exists() || (path.is_dir() && parse_dir_name(name).is_some()) {
        return Ok(vec![path.to_path_buf()]);
    }
    let run = is_run_dir(path);
    let found = list(&if run { checkpoints_of(path) } else { path.to_path_buf() });
    let found: Vec<PathBuf> = match found {
        Ok(found) => found.into_iter().map(|(_, path)| path).collect(),
        // What is no directory is said below.
        Err(_) if !path.is_dir() => Vec::new(),
        Err(error) => return Err(Failure::new(Code::State, error)),
    };
    match (found.is_empty(), run) {
        (false, _) => Ok(found),
        (true, true) => Err(Failure::new(Code::State, format!("{} has no checkpoint yet", path.display()))),
        (true, false) => Err(Failure::new(
            Code::State,
            format!(
                "{} is neither a checkpoint (step-…) nor a run directory (`ddpm-dist train --run-dir`)",
                path.display()
            ),
        )),
    }
}

fn newest_at(path: &Path) -> Result<PathBuf, Failure> {
    checkpoints_at(path)?.pop().ok_or_else(|| Failure::new(Code::State, format!("{} is empty", path.display())))
}

/// What became of one checkpoint's verification.
#[derive(Debug, Serialize)]
struct Verdict {
    path: PathBuf,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shards: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    /// What is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl Verdict {
    fn new(path: PathBuf) -> Verdict {
        match verify(&path) {
            Ok(manifest) => {
                let (step, shards, bytes) = (manifest.meta.step, manifest.files.len(), manifest.bytes());
                let named = path.file_name().and_then(|name| parse_dir_name(name.to_str()?));
                // Under such a name a run would pass it over.
                let problem = named.filter(|named| *named != step);
                let problem = problem.map(|named| format!("it is of step {step}, and its name says {named}"));
                let ok = problem.is_none();
                Verdict { path, ok, step: Some(step), shards: Some(shards), bytes: Some(bytes), problem }
            }
            Err(error) => {
                Verdict { path, ok: false, step: None, shards: None, bytes: None, problem: Some(error.to_string()) }
            }
        }
    }

    fn line(&self) -> String {
        let path = self.path.display();
        match (self, &self.problem) {
            (Verdict { step: Some(step), shards: Some(shards), bytes: Some(bytes), .. }, None) => {
                format!("{path}: ok, step {step}, {}, {}\n", counted(*shards, "shard"), human_bytes(*bytes))
            }
            (_, problem) => format!("{path}: FAILED, {}\n", problem.as_deref().unwrap_or("it says nothing")),
        }
    }
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn verify_all(arguments: &Verify) -> Result<ExitCode, Failure> {
    let mut verdicts = Vec::new();
    for path in checkpoints_at(&arguments.path)? {
        let verdict = Verdict::new(path);
        if !arguments.json {
            // Each as soon as it is known: the next one may take minutes.
            print(&verdict.line())?;
        }
        verdicts.push(verdict);
    }
    if arguments.json {
        print_json(&verdicts)?;
    }
    let damaged = verdicts.iter().filter(|verdict| !verdict.ok).count();
    if damaged == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let of = counted(verdicts.len(), "checkpoint");
    Err(Failure::new(Code::State, format!("{damaged} of {of} cannot be resumed from")))
}

/// What a checkpoint says of itself.
#[derive(Debug, Serialize)]
struct Contents<'a> {
    path: &'a Path,
    bytes: u64,
    parameters: usize,
    groups: Vec<&'static str>,
    run: &'a Meta,
    files: &'a [ShardFile],
    tensors: Vec<TensorRow<'a>>,
}

/// A tensor of each group.
#[derive(Debug, Serialize)]
struct TensorRow<'a> {
    name: &'a str,
    shape: &'a [usize],
    /// First element in the flat buffers.
    begin: usize,
    elements: usize,
}

impl TensorRow<'_> {
    fn new(tensor: &TensorSpec) -> TensorRow<'_> {
        TensorRow { name: &tensor.name, shape: &tensor.shape, begin: tensor.offset, elements: tensor.len }
    }
}

fn show(arguments: &Inspect) -> Result<ExitCode, Failure> {
    let path = newest_at(&arguments.path)?;
    let manifest = inspect(&path).or_fail(Code::State)?;
    if arguments.json {
        let contents = Contents {
            path: &path,
            bytes: manifest.bytes(),
            parameters: manifest.layout.parameters(),
            groups: GROUPS.iter().map(|group| group.name()).collect(),
            run: &manifest.meta,
            files: &manifest.files,
            tensors: manifest.layout.tensors().iter().map(TensorRow::new).collect(),
        };
        print_json(&contents)?;
    } else {
        print(&text(&path, &manifest, arguments.tensors))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Keys of a config that say what a run is; the rest is in the manifest.
const TELLING: [&str; 17] = [
    "data.path",
    "data.size",
    "model.image_channels",
    "model.channels",
    "model.blocks",
    "model.attention_levels",
    "model.dropout",
    "diffusion.timesteps",
    "diffusion.schedule",
    "diffusion.objective",
    "train.steps",
    "train.batch",
    "train.shards",
    "optim.optimizer",
    "optim.lr",
    "ema.decay",
    "sample.sampler",
];

fn text(path: &Path, manifest: &Manifest, tensors: bool) -> String {
    let Manifest { meta, layout, files } = manifest;
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let number = |n: usize| grouped(n as u64);
    let mut rows = vec![
        row("step", format!("{} ({} images)", grouped(meta.step), grouped(meta.images))),
        row("seed", meta.seed.to_string()),
        row("shards", format!("{}, {}", files.len(), human_bytes(manifest.bytes()))),
        row("trained by", counted(meta.world_size, "rank")),
        row("build", meta.build.clone()),
        row("device", meta.device_kind.clone()),
    ];
    rows.extend(meta.libraries.iter().map(|(name, version)| row(name, version.clone())));
    rows.push(row("data", meta.data_fingerprint.clone()));
    rows.push(row("config", meta.config_hash.clone()));
    rows.extend(meta.extra.iter().map(|(name, value)| row(name, value.to_string())));
    let mut text = format!("{}\n{}", path.display(), table(&rows, 2));
    match meta.config_toml.as_ref().map(|text| text.parse::<toml::Table>()) {
        Some(Ok(config)) => {
            let value = |key: &str| {
                let (section, key) = key.split_once('.')?;
                config.get(section)?.get(key).map(|value| format!("{value}"))
            };
            let found = TELLING.iter().filter_map(|key| Some(row(key, value(key)?)));
            text += &format!("\n{}", table(&found.collect::<Vec<_>>(), 2));
        }
        Some(Err(_)) => text += "\n  its config cannot be read\n",
        None => text += "\n  it does not hold its config\n",
    }
    let mut rows = vec![["group", "tensors", "parameters", "bytes"].map(str::to_string).to_vec()];
    for group in GROUPS {
        let (count, parameters) = (layout.tensors().len(), layout.parameters());
        let bytes = human_bytes(4 * parameters as u64);
        rows.push(vec![group.name().to_string(), number(count), number(parameters), bytes]);
    }
    text += &format!("\n{}", table(&rows, 1));
    if tensors {
        let mut rows = vec![["tensor", "shape", "elements", "from"].map(str::to_string).to_vec()];
        for t in layout.tensors() {
            rows.push(vec![t.name.clone(), format!("{:?}", t.shape), number(t.len), number(t.offset)]);
        }
        let _ = write!(text, "\n{}", table(&rows, 2));
    }
    text
}

fn write_anew(arguments: &Reshard, common: &Common) -> Result<ExitCode, Failure> {
    let console = common.console();
    let source = newest_at(&arguments.path)?;
    let out = match &arguments.out {
        Some(out) => out.clone(),
        None => {
            // Of `.` and `..` the name is not known otherwise.
            let source = match source.file_name() {
                Some(_) => source.clone(),
                None => source.canonicalize().unwrap_or_else(|_| source.clone()),
            };
            let mut name = source.file_name().unwrap_or_default().to_os_string();
            name.push(format!("-reshard-{}", arguments.shards));
            source.with_file_name(name)
        }
    };
    let stop = Stop::on_signals()?;
    let written = reshard(&source, &out, arguments.shards as usize, stop.flag());
    match written {
        Ok(manifest) => {
            let shards = counted(manifest.files.len(), "shard");
            let (path, bytes) = (out.display(), human_bytes(manifest.bytes()));
            console
                .last(format!("{path} is written and verified: {shards}, {bytes}, bit-equal to {}", source.display()));
            console.say(format!("  look at     {} checkpoint inspect {}", super::program(), quoted(&out)));
            Ok(ExitCode::SUCCESS)
        }
        Err(CheckpointError::CalledOff) => {
            Err(Failure::new(stop.code(), format!("stopped: nothing is left of {}", out.display())))
        }
        Err(error) => Err(Failure::new(Code::State, error)),
    }
}
