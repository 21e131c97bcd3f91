//! Training steps of several GPUs as CUDA graphs, sums included: as they are without, and what becomes of the others when one rank fails.

use crate::machine::not_tested;
use crate::nccl::{FINE, Place, Said, WITH_KERNELS, World, last_words, tell};
use crate::steps::{config, pixels};
use ddpm_dist::collective::{Adding, Collective};
use ddpm_dist::device::cuda::{Cuda, Image};
use ddpm_dist::device::{Device, Precision, Region};
use ddpm_dist::diffusion::Schedule;
use ddpm_dist::train::{Images, Shards, Share, Trainer};
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// What a step of this test has: shards of the batch, by the environment.
const SHARDS: &str = "NCCL_GRAPH_SHARDS";
/// And that the ranks divide the optimiser's state.
const DIVIDED: &str = "NCCL_GRAPH_DIVIDED";
const SIZE: [usize; 2] = [8, 8];

/// The rank that the tests below start: it trains, and says what it is left with.
#[test]
#[ignore = "is started by the tests below"]
fn a_rank() {
    let Some((place, mut nccl)) = Place::meet() else { return };
    let mut device = Device::Cuda(Box::new(Cuda::open(0).unwrap()));
    nccl.join_gpus(&mut device).unwrap();
    assert_eq!(nccl.notice(), None);
    // As many images for each rank as for the others.
    let mut config = config(&[8, 16], 3, if place.size == 3 { 3 } else { 4 });
    config.train.reduce = if place.adding == Adding::FastInBf16 { Precision::Bf16 } else { Precision::F32 };
    config.train.shards = match std::env::var(SHARDS) {
        Ok(shards) => Shards::Fixed(shards.parse().unwrap()),
        Err(_) => Shards::Auto,
    };
    config.optim.sharded = std::env::var_os(DIVIDED).is_some();
    let share = Share::new(&config.train, nccl.rank(), nccl.world_size()).unwrap();
    let schedule = Schedule::new(&config.diffusion).unwrap();
    let mut trainer = Trainer::new(&mut device, &config, &schedule, SIZE, share).unwrap();
    let mut bits = Bits::default();
    place.work(&mut nccl, |nccl, step| {
        let all = pixels(&config, SIZE, step as u64);
        let image = all.len() / config.train.batch;
        let mine = &all[share.places().start * image..share.places().end * image];
        let found = trainer
            .step(&mut device, nccl, &config, step as u64, Images::Pixels(mine))
            .map_err(|error| error.to_string())?;
        bits.add(&found.norm);
        Ok(())
    });
    if place.steps > 0 {
        let ends = trainer.program().layout.iter().map(|placed| placed.range.end);
        let mut state = vec![0.0; ends.max().unwrap()];
        for region in [Region::Weights, Region::Ema] {
            let whole = trainer.whole(&mut device, &mut nccl, region).unwrap();
            device.download(whole, 0, &mut state).unwrap();
            bits.add(&state);
        }
        tell(&format!("bits: {:x}", bits.0));
    }
    if let Some(notice) = device.take_notice() {
        tell(&format!("notice: {notice}"));
    }
    if let Some(launches) = crate::graph::launches() {
        tell(&format!("launches: {launches}."));
    }
}

/// Depends on all bits of floats.
#[derive(Default)]
struct Bits(u64);

impl Bits {
    fn add(&mut self, floats: &[f32]) {
        for float in floats {
            self.0 = (self.0.rotate_left(5) ^ u64::from(float.to_bits())).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
}

const STEPS: usize = 4;

fn world(adding: &'static str) -> World {
    World { rank: "nccl_graph::a_rank", steps: STEPS, adding, libraries: &WITH_KERNELS, ..FINE }
}

fn has_kernels() -> bool {
    if Image::embedded().is_none() {
        not_tested("training steps of several GPUs need kernels: built without nvcc");
    }
    Image::embedded().is_some()
}

/// What a rank says after a word.
fn word<'a>(said: &'a Said, name: &str) -> &'a str {
    let found = said.out.lines().find_map(|line| Some(line.split_once(name)?.1));
    found.unwrap_or_else(|| panic!("no {name} in {}", said.out))
}

/// Runs all ranks: gives what they are left with, all the same, and how many graphs each has launched.
fn left(world: &World) -> Option<(String, Vec<String>)> {
    let all = world.run();
    let bits = word(all.first()?, "bits: ").to_string();
    for (rank, said) in all.iter().enumerate() {
        said.assert(rank, &["ended: well", "has left its communicator"]);
        assert_eq!(word(said, "bits: "), bits, "rank {rank}");
    }
    Some((bits, all.iter().map(|said| word(said, "launches: ").to_string()).collect()))
}

fn everywhere(name: &'static str, value: &'static str) -> Vec<(usize, &'static str, &'static str)> {
    (0..2).map(|rank| (rank, name, value)).collect()
}

#[test]
fn sums_in_a_graph_leave_the_bits_of_those_that_are_not() {
    if !has_kernels() {
        return;
    }
    // Where a rank has two shards, a step is two programs.
    let tree = |shards| everywhere(SHARDS, shards);
    for (adding, settings, launches) in [
        ("fast", vec![], STEPS - 1),
        ("bf16", vec![], STEPS - 1),
        ("tree", tree("2"), STEPS - 1),
        ("tree", tree("4"), 2 * (STEPS - 1)),
    ] {
        let with = |more| World { settings: [settings.clone(), more].concat(), ..world(adding) };
        let Some((expected, without)) = left(&with(everywhere("DDPM_DIST_CUDA_GRAPH", "off"))) else { return };
        assert_eq!(without, ["0.", "0."]);
        let Some((found, number)) = left(&with(vec![])) else { return };
        assert_eq!(found, expected, "{adding}, {settings:?}");
        assert_eq!(number, [format!("{launches}."), format!("{launches}.")], "{adding}, {settings:?}");
    }
}

#[test]
fn divided_state_in_a_graph_leaves_the_bits_of_whole_state() {
    if !has_kernels() {
        return;
    }
    for shards in ["2", "4"] {
        let whole = everywhere(SHARDS, shards);
        let divided = [whole.clone(), everywhere(DIVIDED, "1")].concat();
        let Some((expected, launches)) = left(&World { settings: whole, ..world("tree") }) else { return };
        assert_ne!(launches[0], "0.");
        assert_eq!(left(&World { settings: divided, ..world("tree") }), Some((expected, launches)), "{shards} shards");
    }
}

/// NCCL wants an operation captured at all ranks, or at none.
#[test]
fn where_one_rank_has_no_graph_none_has() {
    if !has_kernels() {
        return;
    }
    let Some((expected, _)) = left(&world("fast")) else { return };
    for (fault, notice) in [
        (("CUDA_SIM_FAIL", "begin"), "capture a graph"),
        (("CUDA_SIM_FAIL", "capture"), "could not be made one CUDA graph"),
        (("CUDA_SIM_FAIL", "instantiate"), "make a graph"),
        (("DDPM_DIST_CUDA_GRAPH", "off"), ""),
    ] {
        let world = World { settings: vec![(1, fault.0, fault.1)], ..world("fast") };
        let all = world.run();
        for (rank, said) in all.iter().enumerate() {
            said.assert(rank, &["ended: well", "has left its communicator", &expected, "launches: 0."]);
            // What some have captured and others not is nothing to go on with.
            assert_eq!(said.says("has aborted its communicator"), fault.0 != "DDPM_DIST_CUDA_GRAPH", "{fault:?}");
            assert_eq!(said.out.contains("notice: "), rank == 1 && !notice.is_empty(), "{fault:?}: {}", said.out);
        }
        assert!(all.get(1).is_none_or(|said| said.out.contains(notice)), "{fault:?}");
    }
}

/// The communicator is of no more use then: the ranks meet again, and have the same bits. A rank that asks for a sum is refused the first that
/// it captures.
#[test]
fn where_nccl_refuses_to_be_captured_all_ranks_go_on_without_graphs() {
    if !has_kernels() {
        return;
    }
    for (adding, refused, settings) in
        [("fast", &[1][..], vec![]), ("fast", &[0, 1], vec![]), ("tree", &[0], everywhere(SHARDS, "2"))]
    {
        let with = |more| World { settings: [settings.clone(), more].concat(), ..world(adding) };
        let Some((expected, _)) = left(&with(vec![])) else { return };
        let all = with(refused.iter().map(|&rank| (rank, "CUDA_SIM_NCCL_FAIL", "capture")).collect()).run();
        for (rank, said) in all.iter().enumerate() {
            said.assert(rank, &["ended: well", &format!("bits: {expected}"), "launches: 0."]);
            // The one that was given up, and the one after it.
            said.assert(rank, &["has aborted its communicator", "has left its communicator"]);
            let notices = usize::from(refused.contains(&rank));
            assert_eq!(said.out.matches("notice: ").count(), notices, "rank {rank}: {}", said.out);
            let why = "could not be made one CUDA graph: NCCL 2.29.2 cannot";
            assert_eq!(said.out.matches(why).count(), notices, "rank {rank}: {}", said.out);
        }
    }
}

/// The host sees nothing of a graph but what its GPU tells.
#[test]
fn gpus_that_hang_in_a_graph_tell_in_which_sum() {
    if !has_kernels() {
        return;
    }
    let settings = vec![(1, "CUDA_SIM_NCCL_FAIL", "deaf-graph")];
    let all = (World { deadline: Duration::from_secs(2), settings, ..world("fast") }).run();
    let words = "NCCL 2.29.2 cannot finish the sum of bucket 0 of step 2 within 2 s: all ranks wait for it";
    assert!(all.is_empty() || all.iter().any(|said| said.says(words)), "nobody says {words}");
    for (rank, said) in all.iter().enumerate() {
        // Whoever looks a moment later finds the other gone.
        assert!(said.says(words) || said.says("was lost"), "rank {rank}: {}", said.out);
        said.assert(rank, &["has aborted its communicator"]);
    }
}

#[test]
fn a_rank_that_is_lost_while_graphs_run_is_named() {
    if !has_kernels() {
        return;
    }
    for signal in [Signal::KILL, Signal::STOP] {
        const SHORT: Duration = Duration::from_secs(2);
        let Some(ranks) = (World { size: 3, steps: 0, deadline: SHORT, ..world("fast") }).start() else { return };
        let mut ranks = ranks.at_work();
        let start = Instant::now();
        ranks.signal(1, signal);
        for rank in [0, 2] {
            let (said, after) = last_words(&mut ranks.0[rank], start);
            let names = ["rank 1 was lost", "ranks [1] did not answer"];
            assert!(names.iter().any(|name| said.contains(name)), "rank {rank}: {said}");
            assert!(after < Duration::from_secs(5), "{after:?}");
            // Graphs go before the communicator, which is given back.
            ranks.end_of(rank).assert(rank, &["has aborted its communicator"]);
        }
    }
}
