//! `ddpm-dist bench`

mod baseline;

use self::baseline::{Baseline, Comparison, Subject, What};
use super::exit::{Code, Failure, OrFail, code_of_run};
use super::ranks::Ranks;
use super::stdout::{json, print, table};
use super::{Common, ConfigArguments, Stop};
use crate::config::to_toml;
use crate::device::Device;
use crate::diffusion::{SamplerTable, Schedule};
use crate::files::{Durability, digest};
use crate::machine::this_program;
use crate::report::{ReportError, write_atomically};
use crate::rng::{Kind, Stream};
use crate::sample::{ReverseProcess, ReverseStep, Sampler};
use crate::simd;
use crate::tape::human_bytes;
use crate::train::{BenchError, BenchOptions, Config, Timings, forward_products, percentile, time_steps};
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
    /// Measure reverse steps of `sample.batch` images in place of training steps
    #[arg(long, conflicts_with = "per_op")]
    sampling: bool,
    /// Compare with what was measured before, by this program or by benches/pytorch/train_step.py, and written to FILE
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// JSON on stdout in place of tables; with FILE, beside them in that file
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    json: Option<Option<PathBuf>>,
}

/// What was measured; `benches/pytorch/train_step.py` writes the same keys.
#[derive(Debug, Serialize)]
struct Report {
    tool: &'static str,
    version: &'static str,
    /// Training steps, or the reverse steps of sampling.
    what: What,
    model: String,
    batch: usize,
    device: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    ranks: usize,
    /// Of each rank.
    threads: usize,
    dtype: String,
    simd: &'static str,
    step_ms: Spread,
    images_per_second: f64,
    /// By the matrix products: in training, 3 × those of the forward pass.
    gflops: f64,
    /// What the GPU was measured to do at best in large matrix products, of which the above is a part.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_gflops: Option<f64>,
    /// Of the whole process; `null` where the system does not say.
    peak_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_memory_bytes: Option<u64>,
    steps: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    per_op: Option<Vec<OpRow>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<Comparison>,
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
    let what = if arguments.sampling { What::Sampling } else { What::Training };
    let baseline = arguments.compare.as_deref().map(Baseline::read).transpose()?;
    let stop = Stop::on_signals()?;
    // Dropped after the ranks, whose libraries use its memory.
    let mut device;
    let mut ranks = Ranks::join(common, &stop, None)?;
    let console = ranks.console(common);
    if what == What::Sampling && ranks.number() > 1 {
        let message = "--sampling measures one rank: ranks sample without each other";
        return Err(ranks.said_once(Failure::new(Code::Usage, message)));
    }
    if ranks.number() > 1 {
        let config = digest(to_toml(&config).or_fail(Code::Usage)?.as_bytes());
        ranks.same_everywhere(&format!("config {config}, {}", this_program().or_fail(Code::Failed)?))?;
    }
    device = ranks.training_device(common)?;
    let batch = match what {
        What::Training => config.train.batch,
        What::Sampling => config.sample.batch,
    };
    let subject = Subject { what, batch, device: device.kind().name(), dtype: config.train.precision.name().into() };
    if let Some(baseline) = &baseline {
        baseline.must_be_of(&subject)?;
    }
    let peak = device.product_peak(config.train.precision).or_fail(Code::Device)?;
    let (warmup, steps) = (u64::from(arguments.warmup), u64::from(arguments.steps));
    let bar = console.bar("measuring steps", warmup + steps);
    let measured = match what {
        What::Training => {
            let options = BenchOptions { warmup, steps, per_op: arguments.per_op, stop: stop.flag() };
            let timings = time_steps(&mut device, ranks.collective(), &config, size, options, |done| bar.set(done));
            timings.map_err(|error| match &error {
                BenchError::OutOfRange(_) => Failure::new(Code::Usage, error),
                BenchError::Device(_) => Failure::new(Code::Device, error),
                BenchError::Run(cause) => {
                    let failure = ranks.explained(code_of_run(cause), &error, cause.collective());
                    if ranks.number() > 1 { failure.leave_soon() } else { failure }
                }
            })?
        }
        What::Sampling => sampling(&mut device, &config, size, [warmup, steps], &stop, &|done| bar.set(done))?,
    };
    drop(bar);
    std::iter::from_fn(|| device.take_notice()).for_each(|text| console.alarm(text));
    if measured.steps.is_empty() {
        return Err(Failure::new(stop.code(), "stopped before a step was measured"));
    }
    if measured.not_finite > 0 {
        console.alarm(format!(
            "the loss or gradient of {} steps was not finite, and they left out the update: lower optim.lr",
            measured.not_finite
        ));
    }

    if !ranks.is_rank_zero() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut report = Report::new(&measured, arguments.config.name(), &subject, ranks.number(), &device);
    report.peak_gflops = peak.map(|peak| peak * ranks.number() as f64 / 1e9);
    report.compared = baseline.map(|baseline| baseline.compared(&report)).transpose()?;
    let image = [size[0], size[1], config.model.image_channels];
    match &arguments.json {
        Some(None) => print(&json(&report)?)?,
        Some(Some(path)) => {
            print(&report.to_text(image, warmup))?;
            write(path, &json(&report)?)?;
        }
        None => print(&report.to_text(image, warmup))?,
    }
    if measured.steps.len() < steps as usize {
        return Err(Failure::new(stop.code(), format!("stopped after {} of {steps} steps", measured.steps.len())));
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures reverse steps of `sample.batch` images with weights as they are drawn.
fn sampling(
    device: &mut Device,
    config: &Config,
    size: [usize; 2],
    [warmup, steps]: [u64; 2],
    stop: &Stop,
    done: &dyn Fn(u64),
) -> Result<Timings, Failure> {
    let schedule = Schedule::new(&config.diffusion).or_fail(Code::Usage)?;
    let table = SamplerTable::new(&schedule, &config.sample.sampler(&config.diffusion)).or_fail(Code::Usage)?;
    let (model, batch) = (&config.model, config.sample.batch);
    let step = ReverseStep { model, size, batch, steps: table.steps.len(), layout: None };
    let sampler = Sampler::new(device, &step, config.train.precision)?;
    let weights = device.allocate(sampler.layout().len() * size_of::<f32>()).or_fail(Code::Device)?;
    let mut flat = vec![0.0f32; sampler.layout().len()];
    Stream { seed: config.train.seed, kind: Kind::Init, layer: 0, sample: 0, step: 0 }.fill_normal(0, &mut flat);
    // Small, so that images stay finite.
    flat.iter_mut().for_each(|weight| *weight *= 0.02);
    device.upload(weights, 0, &flat).or_fail(Code::Device)?;
    let process = ReverseProcess { weights, table: &table };
    let times = sampler.time_steps(device, process, [warmup, steps], stop.flag(), done)?;
    Ok(Timings { steps: times, ops: vec![], step_flops: forward_products(sampler.program()), not_finite: 0 })
}

impl Report {
    fn new(timings: &Timings, model: String, subject: &Subject, ranks: usize, device: &Device) -> Report {
        let Subject { what, batch, device: kind, ref dtype } = *subject;
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
            what,
            model,
            batch,
            device: kind,
            gpu: device.gpu().map(str::to_owned),
            ranks,
            threads: device.threads(),
            dtype: dtype.clone(),
            simd: simd::level().name(),
            images_per_second: 1e3 * batch as f64 / median,
            gflops: timings.step_flops as f64 / median / 1e6,
            step_ms: Spread { median, p10: percentile(&steps, 10.0), p90: percentile(&steps, 90.0) },
            peak_memory_bytes: peak_memory(),
            gpu_memory_bytes: device.gpu_memory(),
            steps: steps.len(),
            per_op: (!rows.is_empty()).then_some(rows),
            peak_gflops: None,
            compared: None,
        }
    }

    /// `312.4 TFLOP/s (3 × forward), 39.5 % of the 790.2 TFLOP/s of large matrix products here`
    fn computation(&self) -> String {
        let rate = |gflops: f64| match gflops {
            1e4.. => format!("{:.1} TFLOP/s", gflops / 1e3),
            _ => format!("{gflops:.1} GFLOP/s"),
        };
        let counted = if self.what == What::Training { " (3 × forward)" } else { "" };
        let peak = self.peak_gflops.map_or_else(String::new, |peak| {
            format!(", {:.1} % of the {} of large matrix products here", 100.0 * self.gflops / peak, rate(peak))
        });
        format!("{}{counted}{peak}", rate(self.gflops))
    }

    fn to_text(&self, [height, width, channels]: [usize; 3], warmup: u64) -> String {
        let Report { model, batch, ranks, threads, simd, .. } = self;
        let each = if *ranks > 1 { format!("{ranks} ranks of ") } else { String::new() };
        let on = self.gpu.clone().unwrap_or_else(|| format!("{threads} CPU threads ({simd})"));
        let Spread { median, p10, p90 } = self.step_ms;
        let mut text = format!(
            "{model}: {}, batch {batch} of {height}×{width}×{channels} on {each}{on}, {}\n\n",
            self.what.name(),
            self.dtype
        );
        let row = |name: &str, value: String| vec![name.to_string(), value];
        let steps = format!("{} steps after {warmup}", self.steps);
        let summary = [
            row("step", format!("{median:.2} ms median, {p10:.2} to {p90:.2} ms (10 % to 90 %), {steps}")),
            row("images", format!("{:.2} per second", self.images_per_second)),
            row("computation", self.computation()),
            row("peak memory", self.peak_memory_bytes.map_or_else(|| "unknown".to_string(), human_bytes)),
        ];
        let of_gpu = self.gpu_memory_bytes.map(|bytes| row("GPU memory", human_bytes(bytes)));
        let compared = self.compared.as_ref().map(|compared| row("compared", compared.to_string()));
        text += &table(&summary.into_iter().chain(of_gpu).chain(compared).collect::<Vec<_>>(), 2);
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
