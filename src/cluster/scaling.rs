//! How long a step takes on many ranks, on paper.
//!
//! ```text
//! step          = compute + optimiser + exposed + jitter
//! compute       = shards·launches·launch + images·flops/rate
//! optimiser     = bytes/memory
//! communication = Σ over buckets of α + bytes/busbw·2(n−1)/n
//! exposed       = what of it comes after the end of the backward pass; buckets go one after another, each when it is complete
//! jitter        = compute·1.2 %·√(2 ln n), the wait for the slowest of n ranks
//! efficiency    = (images/step of n ranks)/(images/step of one rank), images being those of a rank
//! ```
//!
//! Pure functions over plain numbers: what a step consists of is the caller's knowledge.

use super::Interconnect;
use thiserror::Error;

/// Standard deviation of a rank's time to compute, as a part of it. Assumed: with it 35.7M parameters at 128 images per GPU come out at 96, 95
/// and 94 % on 8, 64 and 512 GPUs with 8 × 400 Gbit/s a node.
pub const JITTER: f64 = 0.012;

/// What one rank computes with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// Seconds that an instruction takes however small its work is: launch, ramp-up and tail of a kernel.
    pub launch: f64,
    /// FLOP per second in matrix products, by the convention 3 × forward; none is known of a CPU that nobody named.
    pub rate: Option<f64>,
    /// Bytes per second that the optimiser reads and writes.
    pub memory: f64,
}

impl Hardware {
    /// A goal, not a measurement: an H200 in bf16 that trains the CIFAR-10 model of the paper with 12,000 images per second at a batch of 128.
    /// Its memory carries 4.3 TB/s (measured on such a card), its convolutions are to reach 550 TFLOP/s, all products together 540, and
    /// 3.8 µs an instruction make up the rest. They also say what small batches cost: near 43 % at 8 GPUs for a global batch of 128.
    pub const H200: Hardware = Hardware { launch: 3.8e-6, rate: Some(540e12), memory: 4.3e12 };
    /// A core or a few of them: instructions cost next to nothing beside their work, memory about 10 GB/s (assumed).
    pub const CPU: Hardware = Hardware { launch: 0.0, rate: None, memory: 10e9 };
}

/// A range of the gradients that is summed as one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// Bytes that each rank adds.
    pub bytes: f64,
    /// The part of the backward pass, by time, after which it is complete: 0 to 1.
    pub ready: f64,
}

/// What a step of one rank consists of, whatever computes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Instructions of a shard.
    pub launches: f64,
    /// FLOPs of an image, forward and backward.
    pub flops_per_image: f64,
    /// Bytes that the update reads and writes.
    pub optimiser_bytes: f64,
    /// Whether the ranks divide the update among them.
    pub is_update_divided: bool,
    /// The part of computing that is the backward pass: 0 to 1.
    pub backward: f64,
    /// In the order in which they are complete.
    pub buckets: Vec<Bucket>,
}

/// What one of `ranks` ranks does in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portion {
    /// Number of ranks.
    pub ranks: usize,
    /// Images of each.
    pub images: usize,
    /// Parts in which it computes them.
    pub shards: usize,
}

/// How fast one rank computes, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Of a shard, however small.
    pub per_shard: f64,
    /// Of an image beside that.
    pub per_image: f64,
    /// Of a step's update, all of it.
    pub optimiser: f64,
}

/// A measured step that is shorter than what is assumed of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
#[error(
    "a step of {:.3} ms leaves no time for its images: the update is assumed to take {:.3} ms and {shards} shards {:.3} ms; give the \
     time of the whole step of one rank, in ms",
    1e3 * step, 1e3 * optimiser, 1e3 * launches
)]
pub struct TooShort {
    step: f64,
    optimiser: f64,
    launches: f64,
    shards: usize,
}

impl Pace {
    /// Of `work` at so many FLOP per second: per_image = flops/rate.
    pub fn at_rate(work: &Work, hardware: &Hardware, rate: f64) -> Pace {
        let per_shard = work.launches * hardware.launch;
        let optimiser = work.optimiser_bytes / hardware.memory;
        Pace { per_shard, per_image: work.flops_per_image / rate, optimiser }
    }

    /// Of a step that took one rank `step` seconds: per_image = (step − optimiser − shards·per_shard)/images. The update's part of it may be
    /// measured too.
    ///
    /// # Errors
    /// Nothing is left for the images.
    pub fn measured(
        work: &Work,
        hardware: &Hardware,
        (images, shards): (usize, usize),
        step: f64,
        optimiser: Option<f64>,
    ) -> Result<Pace, TooShort> {
        let per_shard = work.launches * hardware.launch;
        let optimiser = optimiser.unwrap_or(work.optimiser_bytes / hardware.memory);
        let launches = shards as f64 * per_shard;
        let per_image = (step - optimiser - launches) / images as f64;
        if per_image > 0.0 {
            Ok(Pace { per_shard, per_image, optimiser })
        } else {
            Err(TooShort { step, optimiser, launches, shards })
        }
    }

    /// Seconds that a rank computes before the update.
    pub fn compute(&self, images: usize, shards: usize) -> f64 {
        shards as f64 * self.per_shard + images as f64 * self.per_image
    }
}

/// Where a step's time goes, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// What each rank does.
    pub portion: Portion,
    /// Forward and backward pass.
    pub compute: f64,
    /// The update.
    pub optimiser: f64,
    /// All sums over ranks, covered or not.
    pub communication: f64,
    /// What of them the step waits for.
    pub exposed: f64,
    /// Waiting for the slowest rank.
    pub jitter: f64,
}

impl Prediction {
    /// compute + optimiser + exposed + jitter.
    pub fn step(&self) -> f64 {
        self.compute + self.optimiser + self.exposed + self.jitter
    }

    /// Images of all ranks per second.
    pub fn images_per_second(&self) -> f64 {
        (self.portion.ranks * self.portion.images) as f64 / self.step()
    }

    /// Images per second of a rank over those of a rank alone. Weak scaling: `alone` has as many images as each rank here, and this is
    /// T(1)/T(n). Strong scaling: it has all of them, and this is T(1)/(n·T(n)).
    pub fn efficiency(&self, alone: &Prediction) -> f64 {
        self.images_per_second() / self.portion.ranks as f64 / alone.images_per_second()
    }
}

/// α + bytes/busbw·2(n−1)/n: seconds of a sum of `bytes` over `ranks`; one rank has nothing to sum.
pub fn all_reduce(network: &Interconnect, ranks: usize, bytes: f64) -> f64 {
    if ranks <= 1 {
        return 0.0;
    }
    let n = ranks as f64;
    network.latency(ranks) + bytes / network.busbw(ranks) * 2.0 * (n - 1.0) / n
}

/// end_k = max(end_{k−1}, ready_k·backward) + cost_k; exposed = max(0, end_last − backward): what the step waits after a backward pass of
/// `backward` seconds for sums that go one after another, each from when its bucket is complete.
pub fn exposed(buckets: &[Bucket], backward: f64, cost: impl Fn(f64) -> f64) -> f64 {
    let end = buckets.iter().fold(0.0f64, |end, bucket| end.max(bucket.ready * backward) + cost(bucket.bytes));
    (end - backward).max(0.0)
}

/// compute·σ·√(2 ln n): how much later than the average the last of n ranks is done, their times being normal with standard deviation
/// σ·compute (asymptotically, and an upper bound for all n).
pub fn jitter(compute: f64, ranks: usize) -> f64 {
    compute * JITTER * (2.0 * (ranks.max(1) as f64).ln()).sqrt()
}

/// A step of `portion`.
pub fn predict(work: &Work, pace: &Pace, network: &Interconnect, portion: Portion) -> Prediction {
    let Portion { ranks, images, shards } = portion;
    let compute = pace.compute(images, shards);
    let cost = |bytes| all_reduce(network, ranks, bytes);
    // Sums begin in the backward pass of the last shard. On CPU cores nothing goes on beside them.
    let covering = if network.is_host() { 0.0 } else { compute / shards.max(1) as f64 * work.backward };
    let exposed = if ranks > 1 { exposed(&work.buckets, covering, cost) } else { 0.0 };
    Prediction {
        portion,
        compute,
        optimiser: if work.is_update_divided { pace.optimiser / ranks as f64 } else { pace.optimiser },
        communication: work.buckets.iter().map(|bucket| cost(bucket.bytes)).sum(),
        exposed,
        jitter: jitter(compute, ranks),
    }
}

/// The numbers of ranks of a table up to `ranks`: powers of two, and the last.
pub fn ladder(ranks: usize) -> Vec<usize> {
    let mut rungs: Vec<usize> = (0..).map(|doublings| 1usize << doublings).take_while(|&n| n < ranks).collect();
    rungs.push(ranks.max(1));
    rungs
}

#[cfg(test)]
#[path = "scaling_tests.rs"]
mod tests;
