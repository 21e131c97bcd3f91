//! `ddpm-dist bench`

use super::exit::{Code, Failure, OrFail, code_of_run};
use super::ranks::Ranks;
use super::stdout::{json, print, table};
use super::{Common, ConfigArguments, Stop};
use crate::config::to_toml;
use crate::device::Device;
use crate::files::{Durability, digest};
use crate::machine::this_program;
use crate::report::{ReportError, write_atomically};
use crate::simd;
use crate::tape::human_bytes;
use crate::train::{BenchError, BenchOptions, Timings, TrainConfig, percentile, time_steps};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    pub(super) config: ConfigArguments,
    /// Steps that are measured
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before the clock counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    warmup: u32,
    /// Measure every op too
    #[arg(long)]
    per_op: bool,
    /// JSON on stdout in place of tables; with FILE, beside them in that file
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    json: Option<Option<PathBuf>>,
}

/// What was measured; `benches/pytorch/train_step.py` writes the same keys.
#[derive(Debug, Serialize)]
struct Report {
    tool: &'static str,
    version: &'static str,
    model: String,
    batch: usize,
    device: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    ranks: usize,
    /// Of each rank.
    threads: usize,
    dtype: &'static str,
    simd: &'static str,
    step_ms: Spread,
    images_per_second: f64,
    /// By 3 × the matrix products of the forward pass.
    gflops: f64,
    /// Of the whole process; `null` where the system does not say.
    peak_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory_bytes: Option<u64>,
    steps: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_op: Option<Vec<OpRow>>,
}

#[derive(Debug, Serialize)]
struct Spread {
    median: f64,
    p10: f64,
    p90: f64,
}

/// The ops of one name in one phase.
#[derive(Debug, Serialize)]
struct OpRow {
    phase: &'static str,
    op: &'static str,
    count: usize,
    /// Median over steps of their time in a step.
    ms: f64,
    /// Part of the step.
    share: f64,
    /// By everything they compute.
    gflops: f64,
    /// By the bytes of their operands.
    gigabytes_per_second: f64,
}

pub(super) fn run(arguments: Arguments, common: &Common) -> Result<ExitCode, Failure> {
    let (config, size) = arguments.config.load_with_size()?;
    let stop = Stop::on_signals()?;
    let mut ranks = Ranks::join(common, &stop, None)?;
    let console = ranks.console(common);
    if ranks.number() > 1 {
        let config = digest(to_toml(&config).or_fail(Code::Usage)?.as_bytes());
        ranks.same_everywhere(&format!("config {config}, {}", this_program().or_fail(Code::Failed)?))?;
    }
    let mut device = ranks.training_device(common)?;
    let (warmup, steps) = (u64::from(arguments.warmup), u64::from(arguments.steps));

    let bar = console.bar("measuring steps", warmup + steps);
    let options = BenchOptions { warmup, steps, per_op: arguments.per_op, stop: stop.flag() };
    let timings = time_steps(&mut device, ranks.collective(), &config, size, options, |done| bar.set(done));
    let timings = timings.map_err(|error| match &error {
        BenchError::OutOfRange(_) => Failure::new(Code::Usage, error),
        BenchError::Device(_) => Failure::new(Code::Device, error),
        BenchError::Run(cause) => ranks.explained(code_of_run(cause), &error, cause.collective()),
    })?;
    drop(bar);
    device.take_notice().into_iter().for_each(|text| console.alarm(text));
    if timings.steps.is_empty() {
        return Err(Failure::new(stop.code(), "stopped before a step was measured"));
    }
    if timings.not_finite > 0 {
        console.alarm(format!(
            "the loss or gradient of {} steps was not finite, and they left out the update: lower optim.lr",
            timings.not_finite
        ));
    }

    if !ranks.is_rank_zero() {
        return Ok(ExitCode::SUCCESS);
    }
    let report = Report::new(&timings, arguments.config.name(), &config.train, ranks.number(), &device);
    let image = [size[0], size[1], config.model.image_channels];
    match &arguments.json {
        Some(None) => print(&json(&report)?)?,
        Some(Some(path)) => {
            print(&report.to_text(image, warmup))?;
            write(path, &json(&report)?)?;
        }
        None => print(&report.to_text(image, warmup))?,
    }
    if timings.steps.len() < steps as usize {
        return Err(Failure::new(stop.code(), format!("stopped after {} of {steps} steps", timings.steps.len())));
    }
    Ok(ExitCode::SUCCESS)
}

impl Report {
    fn new(timings: &Timings, model: String, config: &TrainConfig, ranks: usize, device: &Device) -> Report {
        let batch = config.batch;
        let steps = milliseconds(&timings.steps);
        let median = percentile(&steps, 50.0);
        let row = |(group, durations): &(crate::tape::OpGroup, Vec<Duration>)| {
            let ms = percentile(&milliseconds(durations), 50.0);
            // Below the clock's resolution, as for a sum over one rank, a rate would say nothing.
            let rate = |amount: u64| if ms > 1e-3 { amount as f64 / ms / 1e6 } else { 0.0 };
            OpRow {
                phase: group.phase.name(),
                op: group.name,
                count: group.instructions.len(),
                ms,
                share: ms / median,
                gflops: rate(group.flops),
                gigabytes_per_second: rate(group.bytes),
            }
        };
        let mut rows: Vec<OpRow> = timings.ops.iter().map(row).collect();
        rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Report {
            tool: "ddpm-dist",
            version: env!("CARGO_PKG_VERSION"),
            model,
            batch,
            device: device.kind().name(),
            gpu: device.gpu().map(str::to_owned),
            ranks,
            threads: device.threads(),
            dtype: config.precision.name(),
            simd: simd::level().name(),
            images_per_second: 1e3 * batch as f64 / median,
            gflops: timings.step_flops as f64 / median / 1e6,
            step_ms: Spread { median, p10: percentile(&steps, 10.0), p90: percentile(&steps, 90.0) },
            peak_memory_bytes: peak_memory(),
            gpu_memory_bytes: device.gpu_memory(),
            steps: steps.len(),
            per_op: (!rows.is_empty()).then_some(rows),
        }
    }

    fn to_text(&self, [height, width, channels]: [usize; 3], warmup: u64) -> String {
        let Report { model, batch, ranks, threads, simd, .. } = self;
        let each = if *ranks > 1 { format!("{ranks} ranks of ") } else { String::new() };
        let on = self.gpu.clone().unwrap_or_else(|| format!("{threads} CPU threads ({simd})"));
        let Spread { median, p10, p90 } = self.step_ms;
        let mut text =
            format!("{model}: batch {batch} of {height}×{width}×{channels} on {each}{on}, {}\n\n", self.dtype);
        let row = |name: &str, value: String| vec![name.to_string(), value];
        let steps = format!("{} steps after {warmup}", self.steps);
        let summary = [
            row("step", format!("{median:.2} ms median, {p10:.2} to {p90:.2} ms (10 % to 90 %), {steps}")),
            row("images", format!("{:.2} per second", self.images_per_second)),
            row("computation", format!("{:.1} GFLOP/s (3 × forward)", self.gflops)),
            row("peak memory", self.peak_memory_bytes.map_or_else(|| "unknown".to_string(), human_bytes)),
        ];
        let of_gpu = self.gpu_memory_bytes.map(|bytes| row("GPU memory", human_bytes(bytes)));
        text += &table(&summary.into_iter().chain(of_gpu).collect::<Vec<_>>(), 2);
        let Some(rows) = &self.per_op else { return text };
        let head = ["phase", "op", "count", "ms", "share", "GFLOP/s", "GB/s"].map(String::from).to_vec();
        let cells = rows.iter().map(|row| {
            vec![
                row.phase.to_string(),
                row.op.to_string(),
                row.count.to_string(),
                format!("{:.3}", row.ms),
                format!("{:.1} %", 100.0 * row.share),
                format!("{:.1}", row.gflops),
                format!("{:.1}", row.gigabytes_per_second),
            ]
        });
        text.push('\n');
        text += &table(&[head].into_iter().chain(cells).collect::<Vec<_>>(), 2);
        text
    }
}

fn milliseconds(durations: &[Duration]) -> Vec<f64> {
    durations.iter().map(|duration| 1e3 * duration.as_secs_f64()).collect()
}

/// Largest resident size of this process so far, in bytes, where the system says it (Linux).
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |source| ReportError::Io { action: "write", path: path.to_path_buf(), source };
    write_atomically(path, Durability::Kill, |file| file.write_all(text.as_bytes()).map_err(failed))
        .or_fail(Code::Failed)
}
