//! `ddpm-dist plan`

mod scaling;

use super::exit::{Code, Failure};
use super::stdout::{grouped, print, print_json, table};
use super::{Common, ConfigArguments};
use crate::config::OutOfRange;
use crate::device::cpu::pool::BASE_SCRATCH;
use crate::device::cuda::WORKSPACE;
use crate::device::{DeviceKind, Precision, Region};
use crate::sample::ReverseStep;
use crate::tape::{OpGroup, Program, human_bytes, human_flops};
use crate::train::{Config, STATE, Share, forward_products, step_groups, step_programs, step_runs};
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Show the training step's program too, one instruction per line
    #[arg(long)]
    listing: bool,
    /// JSON in place of tables
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    scaling: scaling::Arguments,
}

/// What a config needs. FLOPs count a multiply-add as two; sizes are bytes.
///
/// FLOPs of forward pass and step follow the common convention: matrix products only, and the backward pass as twice the forward. Those of
/// ops, and `arithmetic`, count everything that is computed. `forward_flops` and `step_flops` are those of the whole batch, all else is one
/// rank's.
#[derive(Debug, Serialize)]
struct Plan {
    tool: &'static str,
    version: &'static str,
    model: String,
    /// [H, W, C]
    image: [usize; 3],
    batch: usize,
    ranks: usize,
    images_per_rank: usize,
    /// Parts in which a rank computes its images.
    shards_per_rank: usize,
    threads: usize,
    device: &'static str,
    precision: &'static str,
    parameters: usize,
    forward_flops_per_image: u64,
    forward_flops: u64,
    step_flops: u64,
    arithmetic: u64,
    bytes_moved: u64,
    instructions: usize,
    memory: Vec<Part>,
    memory_total: u64,
    ops: Vec<OpRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    listing: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scaling: Option<scaling::Scaling>,
}

/// A part of a training process's memory.
#[derive(Debug, Serialize)]
struct Part {
    name: &'static str,
    bytes: u64,
    /// What it holds.
    holds: String,
}

#[derive(Debug, Serialize)]
struct OpRow {
    phase: &'static str,
    op: &'static str,
    count: usize,
    flops: u64,
    bytes: u64,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let ranks = common.launch.planned_ranks();
    arguments.scaling.check(ranks)?;
    let ranks = ranks.unwrap_or(1);
    let (config, size) = arguments.config.load_with_size()?;
    let target = common.planned_target(config.train.precision)?;
    let batch = config.train.batch;
    let share =
        Share::new(&config.train, 0, ranks).map_err(|refused| not_shared(&arguments, &config, ranks, refused))?;
    let (programs, _) = step_programs(&config, size, &share, target);
    // That of the last shard: the whole step, if there is one.
    let program = &programs[programs.len() - 1];
    let forward_flops_per_image = forward_products(program) / share.shard as u64;
    let (groups, _) = step_groups(programs.iter());
    // Grids are made while training, beside everything else, by all ranks.
    let grid = config.sample.batch.min(config.sample.count.div_ceil(ranks));
    let sampler = (grid > 0).then(|| {
        let (model, steps) = (&config.model, config.diffusion.timesteps);
        ReverseStep { model, size, batch: grid, steps, layout: Some(&program.layout) }.program(target)
    });
    let threads = common.threads(if arguments.scaling.is_host() { 1.0 / ranks as f64 } else { 1.0 });
    let mut memory = memory(&programs, sampler.as_ref().map(|program| (program, grid)), threads, ranks);
    let sums = config.train.adding().scratch(program.longest_sum(), ranks);
    if target.kind == DeviceKind::Cuda && ranks > 1 && sums > 0 {
        let holds = "gradients on their way between GPUs".to_string();
        memory.push(Part { name: "sums", bytes: sums as u64, holds });
    }
    let row = |group: &OpGroup| OpRow {
        phase: group.phase.name(),
        op: group.name,
        count: group.instructions.len(),
        flops: group.flops,
        bytes: group.bytes,
    };
    let ops: Vec<OpRow> = groups.iter().map(row).collect();
    let subject = scaling::Subject { config: &config, share: &share, program, forward_flops_per_image };
    let plan = Plan {
        tool: "ddpm-dist",
        version: env!("CARGO_PKG_VERSION"),
        model: arguments.config.name(),
        image: [size[0], size[1], config.model.image_channels],
        batch,
        ranks,
        images_per_rank: share.images(),
        shards_per_rank: share.shards,
        threads,
        device: target.kind.name(),
        precision: target.precision.name(),
        parameters: program.layout.parameters(),
        forward_flops_per_image,
        forward_flops: batch as u64 * forward_flops_per_image,
        step_flops: 3 * batch as u64 * forward_flops_per_image,
        arithmetic: ops.iter().map(|op| op.flops).sum(),
        bytes_moved: step_runs(programs.iter()).map(|(runs, program)| runs * program.summary().bytes_moved).sum(),
        instructions: ops.iter().map(|op| op.count).sum(),
        memory_total: memory.iter().map(|part| part.bytes).sum(),
        memory,
        ops,
        listing: arguments.listing.then(|| listing(&programs)),
        scaling: arguments.scaling.scaling(&subject)?,
    };
    match arguments.json {
        true => print_json(&plan)?,
        false => print(&plan.to_text())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A batch that so many ranks cannot divide among them; for as many images for each of them as the config has for one, another is needed.
fn not_shared(arguments: &Arguments, config: &Config, ranks: usize, refused: OutOfRange) -> Failure {
    let batch = config.train.batch;
    let more = batch.checked_mul(ranks).filter(|_| refused.key == "train.batch");
    let refusal = arguments.config.refused(refused);
    match more {
        Some(all) => Failure::new(
            Code::Usage,
            format!("{refusal}; {batch} images for each of the {ranks} ranks are --set train.batch={all}"),
        ),
        None => refusal,
    }
}

/// All memory of a training process that grows with the config, the data set aside.
fn memory(programs: &[Program], sampler: Option<(&Program, usize)>, threads: usize, ranks: usize) -> Vec<Part> {
    let largest = |size: fn(&Program) -> usize| programs.iter().map(size).max().unwrap_or(0);
    let flat = largest(|program| program.summary().flat_bytes);
    let gradients = match programs.len() {
        1 => "of the parameters".to_string(),
        buffers => format!("of the parameters: {buffers} buffers, as shards are added along a tree"),
    };
    let part = |name, bytes: usize, holds: &str| Part { name, bytes: bytes as u64, holds: holds.to_string() };
    let mut parts = vec![
        part("weights", flat, "parameters, f32"),
        part("gradients", programs.len() * flat, &gradients),
        part("moments", 2 * flat, "Adam's averages of gradients and their squares"),
        part("ema", flat, "moving average of the parameters"),
        part("arena", largest(|program| program.arena_bytes), "activations and temporaries of a step"),
        part("io", largest(|program| program.io_bytes), "pixels, tables and results of a step"),
    ];
    let target = programs[0].target;
    match target.kind {
        DeviceKind::Cpu => {
            let floats = largest(|program| program.thread_scratch).max(BASE_SCRATCH);
            parts.push(part("scratch", threads * floats * size_of::<f32>(), "workspace of the CPU threads"));
        }
        DeviceKind::Cuda => parts.push(part("workspace", WORKSPACE, "of cuDNN and cuBLASLt")),
    }
    if target.precision == Precision::Bf16 {
        let copies = 1 + usize::from(sampler.is_some());
        parts.push(part("copies", copies * flat / 2, "parameters in bf16, for training and for the grids' sampler"));
    }
    if let Some((sampler, images)) = sampler {
        let holds = format!("arena of the grids' sampler, {images} at a time");
        parts.push(part("sampler arena", sampler.arena_bytes, &holds));
        parts.push(part("sampler io", sampler.io_bytes, "its images and tables"));
    }
    let copies: Vec<&str> = STATE.map(Region::name).to_vec();
    let share = if ranks > 1 { format!("1/{ranks} of ") } else { String::new() };
    let on_host = if target.kind == DeviceKind::Cuda { "on the host, " } else { "" };
    let holds = format!("{on_host}copy to be written: {share}{}", copies.join(", "));
    parts.push(part("checkpoint", copies.len() * flat.div_ceil(ranks), &holds));
    parts
}

/// The program of each kind of shard, one line per instruction.
fn listing(programs: &[Program]) -> Vec<String> {
    let mut lines = Vec::new();
    let last = programs.len() - 1;
    for (t, program) in programs.iter().enumerate() {
        match t {
            _ if last == 0 => {}
            _ if t == last => lines.push("the last shard".to_string()),
            _ => lines.push(format!("shards whose number, from 0 and in binary, ends in {t} ones")),
        }
        lines.extend(program.listing().lines().map(str::to_owned));
    }
    lines
}

impl Plan {
    fn to_text(&self) -> String {
        let [height, width, channels] = self.image;
        let mut text = format!("{}: images of {height}×{width}×{channels}, batch {}", self.model, self.batch);
        if self.ranks > 1 {
            let in_shards = match self.shards_per_rank {
                1 => String::new(),
                shards => format!(" in {shards} shards, one after another"),
            };
            let _ = write!(text, ": {} for each of {} ranks{in_shards}", self.images_per_rank, self.ranks);
        }
        text += "\n\n";
        let row = |name: &str, value: String| vec![name.to_string(), value];
        let of_rank = if self.ranks > 1 { "of each rank: " } else { "" };
        let summary = [
            row("parameters", grouped(self.parameters as u64)),
            row("forward", format!("{} per image", human_flops(self.forward_flops_per_image))),
            row("training step", format!("{} (3 × forward)", human_flops(self.step_flops))),
            row("", format!("{}{} with all that is not a matrix product", of_rank, human_flops(self.arithmetic))),
            row("", format!("{}{} read and written", of_rank, human_bytes(self.bytes_moved))),
            row("instructions", grouped(self.instructions as u64)),
        ];
        text += &table(&summary, 2);

        let of = if self.ranks > 1 { format!("each of {} ranks", self.ranks) } else { "training".to_string() };
        let on = match self.device {
            "cpu" => format!("{} CPU threads", self.threads),
            _ => format!("a GPU in {}", self.precision),
        };
        let _ = writeln!(text, "\nMemory of {of} on {on}, without the data set");
        let mut rows: Vec<Vec<String>> = vec![];
        for part in &self.memory {
            rows.push(vec![part.name.to_string(), right(human_bytes(part.bytes)), part.holds.clone()]);
        }
        rows.push(vec!["total".into(), right(human_bytes(self.memory_total))]);
        text += &table(&rows, 3);

        let each = if self.ranks > 1 { " of a rank" } else { "" };
        let _ = write!(text, "\nOps of a training step{each} (FLOPs: a multiply-add is two; bytes: all operands)\n");
        let mut rows = vec![["phase", "op", "count", "FLOPs", "share", "bytes"].map(String::from).to_vec()];
        for op in &self.ops {
            rows.push(vec![
                op.phase.into(),
                op.op.into(),
                op.count.to_string(),
                human_flops(op.flops),
                format!("{:.1} %", 100.0 * op.flops as f64 / self.arithmetic.max(1) as f64),
                human_bytes(op.bytes),
            ]);
        }
        text += &table(&rows, 2);

        if let Some(scaling) = &self.scaling {
            text += &scaling.to_text();
        }
        if let Some(listing) = &self.listing {
            text +=
                "\nProgram: number, lane, phase, op, part of the model, FLOPs, bytes, reads -> writes (+: in place)\n";
            for line in listing {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}

/// A size in a column whose other cells are text.
fn right(text: String) -> String {
    format!("{text:>10}")
}
