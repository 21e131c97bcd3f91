//! NCCL on one GPU: a communicator of one rank, all that it begins, in CUDA graphs too. A host with one card can test no more of it before NCCL
//! 2.30, and a run of one rank never opens it.

use crate::machine::{not_tested, run_cases};
use crate::nccl::WITH_KERNELS;
use crate::values::rounded;
use ddpm_dist::device::cuda::nccl::{self, Adding, Communicator, Stage};
use ddpm_dist::device::cuda::{Cuda, CudaError, Image, Memory};
use ddpm_dist::device::{BufferId, Precision};
use std::time::{Duration, Instant};

/// Odd, so that no slice of it is a multiple of anything.
const FLOATS: usize = 100_003;
/// More than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers with all their bits, other ones each round.
fn values(round: usize) -> Vec<f32> {
    (0..FLOATS).map(|i| ((i * 37 + 11 * round) % 1000) as f32 * 0.1 + 1e-3).collect()
}

fn until_ready(gpus: &mut Communicator) {
    let start = Instant::now();
    while !gpus.is_ready().unwrap_or_else(|error| panic!("{error}")) {
        assert!(start.elapsed() < PATIENCE, "NCCL takes no other request");
        std::thread::yield_now();
    }
}

/// A GPU that adds up what it has itself.
struct Alone {
    gpus: Communicator,
    adding: Adding,
    buffer: BufferId,
    floats: Memory,
    scratch: Memory,
}

impl Alone {
    fn join(cuda: &mut Cuda, adding: Adding) -> Alone {
        let [buffer, scratch] = [4 * FLOATS, adding.scratch(FLOATS, 1)].map(|bytes| cuda.allocate(bytes).unwrap());
        let mut gpus = Communicator::join(cuda.gpu(), Communicator::new_id().unwrap(), 0, 1).unwrap();
        until_ready(&mut gpus);
        Alone { gpus, adding, buffer, floats: cuda.whole(buffer), scratch: cuda.whole(scratch) }
    }

    /// Begins a sum, and lets the GPU wait for it.
    fn sum_up(&mut self, cuda: &mut Cuda) -> Result<(), CudaError> {
        self.go_through(cuda, self.adding.stages())
    }

    /// The same by slices, which are then given to all.
    fn sum_up_by_slices(&mut self, cuda: &mut Cuda) -> Result<(), CudaError> {
        self.go_through(cuda, self.adding.stages_for_slices())?;
        self.gpus.begin_gather(self.floats)?;
        until_ready(&mut self.gpus);
        self.gpus.is_begun(self.floats)?;
        self.gpus.wait_for(self.floats)
    }

    fn go_through(&mut self, cuda: &mut Cuda, stages: &[Stage]) -> Result<(), CudaError> {
        for stage in stages {
            self.gpus.begin(*stage, cuda.gpu_mut(), self.floats, self.scratch)?;
            until_ready(&mut self.gpus);
        }
        self.gpus.is_begun(self.floats)?;
        self.gpus.wait_for(self.floats)
    }

    /// Whether `begin` leaves the sum of one rank's numbers: themselves, as far as they are kept on the way.
    fn leaves_the_sum(&mut self, cuda: &mut Cuda, round: usize, begin: impl FnOnce(&mut Alone, &mut Cuda)) {
        let mine = values(round);
        cuda.upload(self.buffer, 0, &mine).unwrap();
        begin(self, cuda);
        cuda.synchronize().unwrap();
        let mut sum = vec![0.0f32; FLOATS];
        cuda.download(self.buffer, 0, &mut sum).unwrap();
        let kept = if self.adding == Adding::FastInBf16 { Precision::Bf16 } else { Precision::F32 };
        let wrong = (0..FLOATS).find(|&i| sum[i].to_bits() != rounded(mine[i], kept).to_bits());
        assert_eq!(wrong.map(|i| (i, mine[i], sum[i])), None, "{:?}, round {round}", self.adding);
    }
}

#[test]
fn one_rank_adds_up_in_graphs_and_without() {
    const TEST: &str = "nccl_one::one_rank_adds_up_in_graphs_and_without";
    if Image::embedded().is_none() {
        return not_tested(&format!("{TEST}: built without nvcc"));
    }
    run_cases(TEST, &WITH_KERNELS, &[(&[], ())], |()| {
        if let Err(error) = nccl::version() {
            return not_tested(&format!("{TEST}: {error}"));
        }
        // Each leaves its communicator before the next one joins.
        for adding in [Adding::Fast, Adding::FastInBf16, Adding::Tree] {
            let mut cuda = Cuda::open(0).unwrap();
            let mut alone = Alone::join(&mut cuda, adding);
            for sum_up in [Alone::sum_up, Alone::sum_up_by_slices] {
                alone.leaves_the_sum(&mut cuda, 0, |alone, cuda| sum_up(alone, cuda).unwrap());

                let capture = cuda.capture().unwrap();
                sum_up(&mut alone, &mut cuda).unwrap();
                let graph = capture.end().unwrap();
                for round in 1..4 {
                    alone.leaves_the_sum(&mut cuda, round, |_, cuda| cuda.replay(&graph).unwrap());
                }
                // One that is not captured goes among them.
                alone.leaves_the_sum(&mut cuda, 4, |alone, cuda| sum_up(alone, cuda).unwrap());
                alone.leaves_the_sum(&mut cuda, 5, |_, cuda| cuda.replay(&graph).unwrap());
                drop(graph);
            }
        }
    });
}
