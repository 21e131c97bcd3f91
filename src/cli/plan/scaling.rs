//! What `plan --ranks N --interconnect …` adds: [`cluster::scaling`](crate::cluster::scaling) for a config.

use super::super::exit::{Code, Failure, OrFail};
use super::super::stdout::{grouped, table};
use crate::cluster::Interconnect;
use crate::cluster::scaling::{Bucket, Hardware, JITTER, Pace, Portion, Prediction, Work, ladder, predict};
use crate::collective::Exchange;
use crate::device::{DType, Precision};
use crate::tape::{Kind, Phase, Program, human_bytes};
use crate::train::{Config, Share};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Scaling, with --ranks")]
#[group(id = "Scaling")]
pub(super) struct Arguments {
    /// Predict the speed of the ranks over a network: nvlink+ib8x400, 8x100gbe, 100gbe, shm, loopback, or bandwidth and latency of your own,
    /// for example 25GB/s,20us
    #[arg(long, value_name = "NETWORK")]
    interconnect: Option<Interconnect>,
    /// Type of gradients between ranks [default: f32]
    #[arg(long, value_name = "TYPE", requires = "interconnect")]
    gradients: Option<Gradients>,
    /// A step of one rank with its images took MS milliseconds
    #[arg(long, value_name = "MS", requires = "interconnect", value_parser = positive, group = "speed")]
    step_ms: Option<f64>,
    /// What `bench --json` wrote of one rank, with any number of images
    #[arg(long, value_name = "FILE", requires = "interconnect", group = "speed")]
    from_bench: Option<PathBuf>,
    /// A rank computes T TFLOP/s in matrix products (3 × forward)
    #[arg(long, value_name = "T", requires = "interconnect", value_parser = positive, group = "speed")]
    tflops: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Gradients {
    F32,
    Bf16,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "expected a number above 0".to_string())
}

/// The model's answer. Times are milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Scaling {
    interconnect: String,
    gradients: Gradients,
    /// Says what is assumed and what measured.
    basis: Vec<[String; 2]>,
    images_per_rank: usize,
    buckets: Vec<BucketRow>,
    weak: Vec<Row>,
    strong: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct BucketRow {
    bytes: f64,
    /// The part of the backward pass after which it is complete.
    ready: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    ranks: usize,
    images_per_rank: usize,
    step_ms: f64,
    compute_ms: f64,
    optimiser_ms: f64,
    communication_ms: f64,
    exposed_ms: f64,
    jitter_ms: f64,
    images_per_second: f64,
    efficiency: f64,
}

/// What `bench --json` writes, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Bench {
    device: String,
    ranks: usize,
    batch: usize,
    step_ms: Spread,
    gflops: f64,
    #[serde(default)]
    per_op: Option<Vec<BenchOp>>,
}

#[derive(Debug, Deserialize)]
struct Spread {
    median: f64,
}

#[derive(Debug, Deserialize)]
struct BenchOp {
    phase: String,
    ms: f64,
}

/// What is planned, as the rest of the plan knows it.
pub(super) struct Subject<'a> {
    pub config: &'a Config,
    pub share: &'a Share,
    /// Of the last shard.
    pub program: &'a Program,
    pub forward_flops_per_image: u64,
}

impl Arguments {
    /// Refuses what says nothing without `--ranks`.
    pub(super) fn check(&self, ranks: Option<usize>) -> Result<(), Failure> {
        match (&self.interconnect, ranks) {
            (Some(network), None) => {
                let refused = format!(
                    "--interconnect {} needs --ranks N: how many ranks to plan for; none is started",
                    network.name()
                );
                Err(Failure::new(Code::Usage, refused))
            }
            _ => Ok(()),
        }
    }

    /// Whether the ranks are those of this machine.
    pub(super) fn is_host(&self) -> bool {
        self.interconnect.as_ref().is_some_and(Interconnect::is_host)
    }

    /// The model's answer, if it was asked for.
    pub(super) fn scaling(&self, subject: &Subject<'_>) -> Result<Option<Scaling>, Failure> {
        let Some(network) = &self.interconnect else { return Ok(None) };
        let gradients = self.gradients.unwrap_or(match subject.config.train.reduce {
            Precision::F32 => Gradients::F32,
            Precision::Bf16 => Gradients::Bf16,
        });
        let work = work(subject, gradients);
        let (pace, speed) = self.pace(network, &work, subject)?;
        let Share { world_size, shards, .. } = *subject.share;
        let images = subject.share.images();

        let predict = |portion| predict(&work, &pace, network, portion);
        let weak = |ranks| predict(Portion { ranks, images, shards });
        // Numbers of ranks that cannot share the batch are left out, as a run would refuse them.
        let strong = |ranks| {
            let share = Share::new(&subject.config.train, 0, ranks).ok()?;
            Some(predict(Portion { ranks, images: share.images(), shards: share.shards }))
        };
        let rows = |predictions: Vec<Prediction>| -> Vec<Row> {
            let alone = predictions.first().copied();
            predictions.iter().filter_map(|p| Some(Row::new(p, &alone?))).collect()
        };
        Ok(Some(Scaling {
            interconnect: network.name().to_string(),
            gradients,
            basis: basis(network, &work, speed, world_size),
            images_per_rank: images,
            buckets: work.buckets.iter().map(|b| BucketRow { bytes: b.bytes, ready: b.ready }).collect(),
            weak: rows(ladder(world_size).into_iter().map(weak).collect()),
            strong: rows(ladder(world_size).into_iter().filter_map(strong).collect()),
        }))
    }

    /// How fast one rank is, and how that is known.
    fn pace(&self, network: &Interconnect, work: &Work, subject: &Subject<'_>) -> Result<(Pace, String), Failure> {
        let mut hardware = if network.is_host() { Hardware::CPU } else { Hardware::H200 };
        let share = subject.share;
        let images = share.images();
        let measured = |hardware, portion, step: f64, optimiser| {
            Pace::measured(work, hardware, portion, step, optimiser).or_fail(Code::Usage)
        };
        if let Some(ms) = self.step_ms {
            let pace = measured(&hardware, (images, share.shards), 1e-3 * ms, None)?;
            return Ok((pace, format!("{ms} ms for {images} images: as given")));
        }
        if let Some(path) = &self.from_bench {
            let bench = Bench::read(path, work)?;
            if bench.device == "cpu" {
                hardware = Hardware::CPU;
            }
            let alone = Share::solo(&subject.config.train).map_or(1, |share| share.shards);
            let pace = measured(&hardware, (bench.batch, alone), 1e-3 * bench.step_ms.median, bench.optimiser())?;
            let Bench { batch, step_ms, .. } = &bench;
            return Ok((pace, format!("{:.2} ms for {batch} images: measured, {}", step_ms.median, path.display())));
        }
        let (rate, known) = match (self.tflops, hardware.rate) {
            (Some(tflops), _) => (1e12 * tflops, "as given"),
            (None, Some(rate)) => (rate, "assumed, the goal for an H200"),
            (None, None) => {
                let refused = format!(
                    "how fast a CPU rank is depends on its cores: with --interconnect {} give --from-bench FILE (of `bench --json` with \
                     one rank), --step-ms MS or --tflops T",
                    network.name()
                );
                return Err(Failure::new(Code::Usage, refused));
            }
        };
        let pace = Pace::at_rate(work, &hardware, rate);
        let ms = 1e3 * (pace.compute(images, share.shards) + pace.optimiser);
        Ok((pace, format!("{ms:.2} ms for {images} images at {} TFLOP/s: {known}", rate / 1e12)))
    }
}

impl Bench {
    fn read(path: &Path, work: &Work) -> Result<Bench, Failure> {
        let name = path.display();
        let refuse = |why: String| Failure::new(Code::Usage, format!("--from-bench {name}: {why}"));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
        let bench: Bench = serde_json::from_str(&text)
            .map_err(|error| refuse(format!("is not what `bench --json` writes: {error}")))?;
        if bench.ranks != 1 {
            let why = format!("measured {} ranks, whose step holds their sums: measure one rank alone", bench.ranks);
            return Err(refuse(why));
        }
        if bench.batch == 0 || !(bench.step_ms.median.is_finite() && bench.step_ms.median > 0.0) {
            let why = format!("batch {} and step_ms.median {} are no measurement", bench.batch, bench.step_ms.median);
            return Err(refuse(why));
        }
        // Whatever the file calls it, a model of other work is another model.
        let flops = bench.gflops * 1e6 * bench.step_ms.median / bench.batch as f64;
        if (flops / work.flops_per_image - 1.0).abs() > 0.01 {
            let why = format!(
                "measured a model of {:.2} GFLOP an image and step, and that of the config has {:.2}: bench the same config",
                flops / 1e9,
                work.flops_per_image / 1e9
            );
            return Err(refuse(why));
        }
        Ok(bench)
    }

    /// Seconds of the update, where every op was measured.
    fn optimiser(&self) -> Option<f64> {
        let rows = self.per_op.as_ref()?.iter().filter(|row| row.phase == Phase::Update.name());
        let ms: f64 = rows.map(|row| row.ms).sum();
        (ms > 0.0).then_some(1e-3 * ms)
    }
}

/// What the model wants to know of a program.
fn work(subject: &Subject<'_>, gradients: Gradients) -> Work {
    let mut work = Work {
        launches: 0.0,
        flops_per_image: 3.0 * subject.forward_flops_per_image as f64,
        optimiser_bytes: 0.0,
        is_update_divided: false,
        backward: 0.0,
        buckets: Vec::new(),
    };
    let element = match gradients {
        Gradients::F32 => DType::F32.size(),
        Gradients::Bf16 => 2,
    };
    let (mut forward, mut backward) = (0.0, 0.0);
    for instruction in &subject.program.instructions {
        match &instruction.kind {
            // For now the FLOPs of the backward pass until here.
            Kind::Start(bucket) => {
                // A sum that slices get and their gathering together move what a sum that all get does.
                let bytes = match bucket.exchange {
                    Exchange::AllReduce => (bucket.range.len() * element) as f64,
                    Exchange::ReduceScatter => (bucket.range.len() * element) as f64 / 2.0,
                    Exchange::AllGather => bucket.bytes() as f64 / 2.0,
                };
                work.is_update_divided |= bucket.exchange == Exchange::ReduceScatter;
                work.buckets.push(Bucket { bytes, ready: backward });
            }
            Kind::Wait(_) => {}
            Kind::Launch(_) => {
                work.launches += 1.0;
                match instruction.phase {
                    Phase::Forward => forward += instruction.flops() as f64,
                    Phase::Backward => backward += instruction.flops() as f64,
                    Phase::Update => work.optimiser_bytes += instruction.bytes() as f64,
                }
            }
        }
    }
    if work.is_update_divided {
        // What was counted is one rank's part.
        work.optimiser_bytes *= subject.share.world_size as f64;
    }
    work.backward = backward / (forward + backward);
    work.buckets.iter_mut().for_each(|bucket| bucket.ready /= backward);
    work
}

/// What the prediction rests on, a line or two for each of its parts.
fn basis(network: &Interconnect, work: &Work, speed: String, ranks: usize) -> Vec<[String; 2]> {
    let line = |name: &str, text: String| [name.to_string(), text];
    let gigabytes = |ranks| {
        let busbw = network.busbw(ranks) / 1e9;
        format!("{busbw:.*} GB/s at {ranks}", if busbw < 100.0 { 2 } else { 0 })
    };
    let known = [8, 64, 512].into_iter().filter(|&n| n < ranks).chain([ranks]).map(gigabytes);
    let us = |ranks| (1e6 * network.latency(ranks)).round();
    let latency = if us(2) == us(ranks) { format!("{}", us(ranks)) } else { format!("{} to {}", us(2), us(ranks)) };
    let bytes: f64 = work.buckets.iter().map(|bucket| bucket.bytes).sum();
    let covered = if network.is_host() {
        "the cores that compute also sum: nothing is covered".to_string()
    } else {
        let late = work.buckets.iter().filter(|bucket| bucket.ready > 0.99).map(|bucket| bucket.bytes).sum::<f64>();
        format!("{} of them complete only at the end of the backward pass", human_bytes(late as u64))
    };
    vec![
        line("one rank", speed),
        line("sums", format!("{} in {} buckets, from the program", human_bytes(bytes as u64), work.buckets.len())),
        line("", covered),
        line("network", known.collect::<Vec<_>>().join(", ")),
        line("", format!("{latency} µs a bucket; {}", network.origin())),
        line("jitter", format!("{} % of computing × √(2 ln ranks): assumed", 100.0 * JITTER)),
    ]
}

impl Row {
    fn new(p: &Prediction, alone: &Prediction) -> Row {
        Row {
            ranks: p.portion.ranks,
            images_per_rank: p.portion.images,
            step_ms: 1e3 * p.step(),
            compute_ms: 1e3 * p.compute,
            optimiser_ms: 1e3 * p.optimiser,
            communication_ms: 1e3 * p.communication,
            exposed_ms: 1e3 * p.exposed,
            jitter_ms: 1e3 * p.jitter,
            images_per_second: p.images_per_second(),
            efficiency: p.efficiency(alone),
        }
    }

    fn cells(&self) -> Vec<String> {
        let ms = |value: f64| format!("{value:.2}");
        vec![
            self.ranks.to_string(),
            self.images_per_rank.to_string(),
            ms(self.step_ms),
            ms(self.compute_ms),
            ms(self.optimiser_ms),
            ms(self.communication_ms),
            ms(self.exposed_ms),
            ms(self.jitter_ms),
            grouped(self.images_per_second.round() as u64),
            format!("{:.1} %", 100.0 * self.efficiency),
        ]
    }
}

impl Scaling {
    pub(super) fn to_text(&self) -> String {
        let gradients = match self.gradients {
            Gradients::F32 => "f32",
            Gradients::Bf16 => "bf16 (train.reduce)",
        };
        let mut text =
            format!("\nScaling over {}, gradients in {gradients}: predicted, not measured\n", self.interconnect);
        text += &table(&self.basis.iter().map(|line| line.to_vec()).collect::<Vec<_>>(), 2);
        let head = "ranks images/rank step compute optimiser sums exposed jitter images/s efficiency";
        let head: Vec<String> = head.split(' ').map(String::from).collect();
        let tables = [
            (format!("Weak: {} images for each rank, times in ms", self.images_per_rank), &self.weak),
            (format!("Strong: {} images for all ranks, times in ms", self.images_of_all()), &self.strong),
        ];
        for (name, rows) in tables {
            let cells = rows.iter().map(Row::cells);
            text += &format!("\n{name}\n");
            text += &table(&[head.clone()].into_iter().chain(cells).collect::<Vec<_>>(), 0);
        }
        text
    }

    /// Images of a step of the config.
    fn images_of_all(&self) -> usize {
        self.weak.last().map_or(0, |row| row.ranks * row.images_per_rank)
    }
}
