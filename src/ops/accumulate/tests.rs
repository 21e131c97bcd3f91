use super::{Accumulate, accumulate};
use crate::collective::Solo;
use crate::device::{Binding, Device, Region, cpu::Cpu};
use crate::ops::linear::linear;
use crate::ops::testing::random;
use crate::tape::{Buckets, Op, Phase, Program, Reduction, Spec, Tape, plan};
use std::sync::Arc;

const SIZE: usize = 40_001;

/// A program whose one op after the "backward pass" (which the test plays) adds the sums of the shards before.
fn program(t: usize) -> Program {
    let mut tape = Tape::new();
    tape.param("w", [SIZE]);
    tape.write_gradients_to(1 + t);
    accumulate(&mut tape, t);
    plan(&tape, None, None)
}

#[test]
fn shards_are_added_along_the_tree() {
    let g: Vec<Vec<f32>> = (0..8).map(|i| random(i, SIZE).iter().map(|x| x * 10f32.powi(i as i32)).collect()).collect();
    let flat = program(0).layout.len();
    for threads in [1, 3] {
        let mut device = Device::Cpu(Cpu::new(threads));
        // Four sums of 1, 2, 4 and 8 shards.
        let buffer = device.allocate(4 * (1 + 4) * flat).unwrap();
        let arena = device.allocate(4).unwrap();
        let binding = Binding::default().with(Region::Gradients, buffer).with(Region::Arena, arena);
        for (i, g) in g.iter().enumerate() {
            let t = i.trailing_ones() as usize;
            device.upload(buffer, (1 + t) * flat, g).unwrap();
            Arc::new(program(t)).load(&mut device, binding).unwrap().run(&mut device, &mut Solo).unwrap();
        }
        let mut sum = vec![0.0; SIZE];
        device.download(buffer, 4 * flat, &mut sum).unwrap();
        for k in 0..SIZE {
            let [a, b, c, d, e, f, g, h] = std::array::from_fn(|i| g[i][k]);
            assert_eq!(sum[k], ((a + b) + (c + d)) + ((e + f) + (g + h)));
        }
        let plain = |k: usize| g.iter().map(|g| g[k]).sum::<f32>();
        assert!((0..SIZE).any(|k| sum[k] != plain(k)), "the plain order would give other bits");
    }
}

/// One parameter per bucket: the last shard adds the sums before it bucket by bucket, before each is summed over ranks.
#[test]
fn the_last_shard_adds_bucket_by_bucket() {
    let mut tape = Tape::new();
    let x = tape.io("x", Spec::f32([3, 64]));
    let mut y = x;
    for i in 0..3 {
        y = tape.scope(format!("layer{i}"), |tape| {
            let (weight, bias) = (tape.param("weight", [64, 64]), tape.param("bias", [64]));
            linear(tape, &[y], weight, bias)
        });
    }
    let dy = tape.io("dy", Spec::f32([3, 64]));
    tape.backward(y, dy);
    tape.begin(Phase::Update);
    let before = |elements: usize| Arc::new(Accumulate { sums: 2, elements }) as Arc<dyn Op>;
    let buckets = Buckets { first: 1, other: 1, tail: 1 };
    let split = plan(&tape, None, Some(Reduction { buckets, before: Some(&before), granule: 0 }));
    let plain = plan(&tape, None, None);
    let flat = plain.layout.len();
    assert_eq!(split.layout, plain.layout);

    let run = |program: &Program, gradients: usize, start: &[f32]| {
        let mut device = Device::Cpu(Cpu::new(2));
        let [io, arena, weights, buffer] = [program.io_bytes, program.arena_bytes, 4 * flat, 4 * gradients * flat]
            .map(|b| device.allocate(b).unwrap());
        let binding = Binding::default()
            .with(Region::Io, io)
            .with(Region::Arena, arena)
            .with(Region::Weights, weights)
            .with(Region::Gradients, buffer);
        device.upload(weights, 0, &random(1, flat)).unwrap();
        device.upload(buffer, flat, start).unwrap();
        for (name, seed) in [("x", 2), ("dy", 3)] {
            let slot = program.io(name);
            device.upload(io, slot.offset / 4, &random(seed, slot.len)).unwrap();
        }
        Arc::new(program.clone()).load(&mut device, binding).unwrap().run(&mut device, &mut Solo).unwrap();
        let mut gradients = vec![0.0; flat];
        device.download(buffer, 0, &mut gradients).unwrap();
        gradients
    };
    let (p_0, p_1) = (random(4, flat), random(5, flat));
    let alone = run(&plain, 1, &[]);
    let together = run(&split, 3, &[p_0.clone(), p_1.clone()].concat());
    for placed in plain.layout.iter() {
        for i in placed.range.clone() {
            assert_eq!(together[i], p_1[i] + (p_0[i] + alone[i]), "{} at {i}", placed.name);
        }
    }
    assert!(split.instructions.len() >= plain.instructions.len() + 3 * 6, "{}", split.listing());
}
