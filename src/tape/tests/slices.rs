//! Steps that are divided among ranks.

use super::*;
use crate::collective::testing::world;
use crate::collective::{Collective, Exchange, slice_of};
use crate::ops::adam_ema::{Hyper, adam_ema, bias_correction};
use crate::ops::copy::Copy;
use crate::ops::grad_norm::{BLOCK, grad_norm};
use crate::ops::testing::random;

/// Elements of each parameter, which blocks and slices cut anywhere.
const SIZES: [usize; 5] = [3000, 21_000, 64, 33_333, 9001];
const STATE: [Region; 4] = [Region::Weights, Region::Moment1, Region::Moment2, Region::Ema];
const OWN: [Region; 3] = [Region::Moment1, Region::Moment2, Region::Ema];

/// A step whose gradients are what the host gives, in one bucket for each parameter or so; divided among ranks, or whole.
fn step(rank: usize, ranks: usize, is_divided: bool) -> Program {
    let mut tape = Tape::new();
    let [norm, hyper] = [("norm", 2), ("hyper", Hyper::LEN)].map(|(name, len)| tape.io(name, Spec::f32([len])));
    let params: Vec<Var> = SIZES.iter().enumerate().map(|(i, len)| tape.param(&format!("p{i}"), [*len])).collect();
    for (i, (param, len)) in params.into_iter().zip(SIZES).enumerate() {
        let gradient = tape.io(&format!("g{i}"), Spec::f32([len]));
        let y = tape.push1(Copy { shape: [len].into() }, &[param]);
        tape.begin(Phase::Backward);
        tape.backward(y, gradient);
    }
    tape.begin(Phase::Update);
    grad_norm(&mut tape, norm);
    adam_ema(&mut tape, true, norm, hyper);
    let buckets = Buckets { first: 1, other: 1, tail: 1 };
    let granule = if is_divided { ranks * BLOCK } else { 0 };
    let program = plan(&tape, None, Some(Reduction { buckets, granule, ..Reduction::default() }));
    if is_divided { in_slices(program, &Slices { rank, ranks, own: &OWN }) } else { program }
}

/// What a rank has of its state after some steps, its norms, and the slices of the flat buffers that it has of what it shares with nobody.
struct Outcome {
    state: [Vec<u32>; 4],
    norms: Vec<u32>,
    slices: Vec<Range<usize>>,
}

/// Runs three steps, the second of which has `bad` at one place of the gradient of the last rank.
fn three_steps(collective: &mut dyn Collective, is_divided: bool, bad: Option<f32>) -> Outcome {
    let (rank, ranks) = (collective.rank(), collective.world_size());
    let program = Arc::new(step(rank, ranks, is_divided));
    let flat = program.layout.len();
    let mut device = Device::Cpu(Cpu::new(1));
    let mut binding = Binding::default();
    for (region, bytes) in
        [(Region::Io, program.io_bytes), (Region::Arena, program.arena_bytes), (Region::Gradients, 4 * flat)]
    {
        binding = binding.with(region, device.allocate(bytes).unwrap());
    }
    let len_of = |region: Region| if is_divided && OWN.contains(&region) { flat / ranks } else { flat };
    for region in STATE {
        binding = binding.with(region, device.allocate(4 * len_of(region)).unwrap());
    }
    let mut loaded = program.load(&mut device, binding).unwrap();
    let io = binding.get(Region::Io).unwrap();
    let weights = binding.get(Region::Weights).unwrap();
    for placed in program.layout.iter() {
        device.upload(weights, placed.range.start, &random(9, placed.range.len())).unwrap();
    }
    let mut norms = Vec::new();
    for step in 0..3 {
        for (i, len) in SIZES.into_iter().enumerate() {
            let mut gradient = random(100 * step + 10 * i as u64 + rank as u64, len);
            if let Some(bad) = bad.filter(|_| (step, i, rank) == (1, 3, ranks - 1)) {
                gradient[20_000] = bad;
            }
            device.upload(io, program.io(&format!("g{i}")).offset / 4, &gradient).unwrap();
        }
        let hyper = Hyper {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.1,
            bias_correction1: bias_correction(0.9, step + 1),
            bias_correction2: bias_correction(0.99, step + 1),
            max_grad_norm: 1.0,
            ema_decay: 0.9,
        };
        device.upload(io, program.io("hyper").offset / 4, &hyper.to_array()).unwrap();
        loaded.run(&mut device, collective).unwrap();
        let mut norm = [0.0f32; 2];
        device.download(io, program.io("norm").offset / 4, &mut norm).unwrap();
        norms.extend(norm.map(f32::to_bits));
    }
    let state = STATE.map(|region| {
        let mut values = vec![0.0f32; len_of(region)];
        device.download(binding.get(region).unwrap(), 0, &mut values).unwrap();
        values.into_iter().map(f32::to_bits).collect()
    });
    let scattered = program.exchanges().filter(|(_, bucket)| bucket.exchange == Exchange::ReduceScatter);
    let slices = scattered.map(|(_, bucket)| slice_of(&bucket.range, rank, ranks)).collect();
    Outcome { state, norms, slices }
}

#[test]
fn slices_make_up_what_one_rank_would_do() {
    // Of gradients that are not finite, an update leaves everything as it was, on all ranks.
    for (ranks, bad) in [(2, None), (3, None), (4, None), (2, Some(f32::NAN)), (4, Some(f32::INFINITY))] {
        let whole = world(ranks, |collective| three_steps(collective, false, bad));
        let divided = world(ranks, |collective| three_steps(collective, true, bad));
        let (expected, len) = (&whole[0], whole[0].state[0].len());
        if bad.is_some() {
            assert_eq!(expected.norms[3], 0.0f32.to_bits(), "the second step is left out");
        }
        let mut seen = 0;
        for (rank, found) in divided.iter().enumerate() {
            assert!(found.slices.len() >= 3, "{:?}: there is more than one bucket", found.slices);
            assert_eq!(found.norms, expected.norms, "rank {rank} of {ranks}, {bad:?}");
            assert!(found.state[0][..len] == expected.state[0][..], "weights of rank {rank} of {ranks}, {bad:?}");
            for (own, all) in found.state[1..].iter().zip(&expected.state[1..]) {
                let mut own = own.iter();
                for slice in &found.slices {
                    for place in slice.clone() {
                        assert_eq!(
                            own.next().unwrap(),
                            all.get(place).unwrap_or(&0),
                            "{place} of rank {rank} of {ranks}"
                        );
                    }
                }
                assert_eq!(own.next(), None);
            }
            seen += found.slices.iter().map(Range::len).sum::<usize>();
        }
        assert_eq!(seen, len.next_multiple_of(ranks * BLOCK));
    }
}

/// What is counted of an update is counted once.
#[test]
fn an_update_in_slices_is_no_more_work() {
    let flops = |program: &Program| program.summary().flops;
    let whole = flops(&step(0, 1, false));
    assert_eq!((0..4).map(|rank| flops(&step(rank, 4, true))).sum::<u64>(), whole);
}
