//! The same bits at any number of ranks.

use super::*;
use crate::collective::testing::world;
use crate::collective::{Collective, Exchange, Solo};
use crate::device::Device;
use crate::device::cpu::Cpu;
use crate::diffusion::Schedule;
use crate::ops::testing::pixels;
use crate::unet::UnetConfig;

const SIZE: [usize; 2] = [8, 8];

/// Everything that draws numbers or sums over the batch, switched on.
fn config(shards: Shards) -> Config {
    let model = UnetConfig {
        image_channels: 3,
        channels: vec![8, 16],
        blocks: 1,
        attention_levels: vec![1],
        groups: 4,
        dropout: 0.2,
        ..UnetConfig::default()
    };
    let mut config = Config { model, ..Config::default() };
    config.data.flip = true;
    config.train.batch = 8;
    config.train.shards = shards;
    config.optim = OptimConfig { lr: 2e-3, warmup_steps: 3, clip: 0.5, ..OptimConfig::default() };
    config.ema.decay = 0.9;
    config
}

/// Weights, moments and averages after six steps of one rank, and its losses and timesteps.
fn six_steps(config: &Config, collective: &mut dyn Collective) -> (Vec<Vec<u32>>, Vec<u32>, Vec<u32>) {
    let mut device = Device::Cpu(Cpu::new(1));
    let schedule = Schedule::new(&config.diffusion).unwrap();
    let share = Share::new(&config.train, collective.rank(), collective.world_size()).unwrap();
    let mut trainer = Trainer::new(&mut device, config, &schedule, SIZE, share).unwrap();
    let image = SIZE[0] * SIZE[1] * 3;
    let (mut losses, mut timesteps) = (Vec::new(), Vec::new());
    for step in 0..6 {
        let batch = pixels(step, config.train.batch * image);
        let places = share.places();
        let mine = &batch[places.start * image..places.end * image];
        let given = trainer.step(&mut device, collective, config, step, Images::Pixels(mine)).unwrap();
        assert_eq!(given.norm[1], 1.0);
        losses.extend(given.losses.iter().map(|loss| loss.to_bits()));
        timesteps.extend_from_slice(given.timesteps);
    }
    let parameters = trainer.program().layout.iter().map(|placed| placed.range.end).max().unwrap();
    let state = STATE.map(|region| {
        let mut flat = vec![0.0f32; parameters];
        let whole = trainer.whole(&mut device, collective, region).unwrap();
        device.download(whole, 0, &mut flat).unwrap();
        flat.iter().map(|x| x.to_bits()).collect()
    });
    (state.to_vec(), losses, timesteps)
}

#[test]
fn fixed_shards_give_the_same_bits_at_any_number_of_ranks() {
    for shards in [2, 4, 8] {
        let config = config(Shards::Fixed(shards));
        let (state, losses, timesteps) = six_steps(&config, &mut Solo);
        assert_ne!(state[0], state[3], "the average is not the weights");
        for ranks in [2, 4, 8].into_iter().filter(|ranks| shards % ranks == 0) {
            let all = world(ranks, |collective| six_steps(&config, collective));
            let images = 8 / ranks;
            for (rank, (theirs, their_losses, their_timesteps)) in all.iter().enumerate() {
                assert!(*theirs == state, "{shards} shards, rank {rank} of {ranks}");
                for step in 0..6 {
                    let [here, there] = [step * images, step * 8 + rank * images];
                    assert_eq!(their_losses[here..here + images], losses[there..there + images]);
                    assert_eq!(their_timesteps[here..here + images], timesteps[there..there + images]);
                }
            }
        }
    }
}

/// Whoever keeps and updates what: also where there are several buckets.
#[test]
fn divided_state_gives_the_same_bits() {
    let mut wide = config(Shards::Fixed(4));
    wide.model.channels = vec![32, 48];
    for (config, least) in [(config(Shards::Fixed(4)), 1), (wide, 2)] {
        let expected = six_steps(&config, &mut Solo).0;
        let mut divided = config;
        divided.optim.sharded = true;
        assert!(six_steps(&divided, &mut Solo).0 == expected, "one rank has all of it");
        for ranks in [2, 4] {
            let share = Share::new(&divided.train, 0, ranks).unwrap();
            let (programs, _) = step_programs(&divided, SIZE, &share, Default::default());
            let scatters = |program: &crate::tape::Program| {
                program.exchanges().filter(|(_, bucket)| bucket.exchange == Exchange::ReduceScatter).count()
            };
            assert!(programs.iter().map(scatters).sum::<usize>() >= least, "buckets of {ranks} ranks");
            let all = world(ranks, |collective| six_steps(&divided, collective).0);
            assert!(all.iter().all(|state| *state == expected), "{ranks} ranks");
        }
    }
}

/// With as many shards as ranks, sums are others in their last bits, and images and noise the same.
#[test]
fn automatic_shards_follow_the_number_of_ranks() {
    let config = config(Shards::Auto);
    let (alone, _, timesteps) = six_steps(&config, &mut Solo);
    let all = world(2, |collective| six_steps(&config, collective));
    assert!(all[0].0 == all[1].0 && all[0].0 != alone);
    assert_eq!((&all[0].2[..4], &all[1].2[..4]), (&timesteps[..4], &timesteps[4..8]));
    let fixed =
        six_steps(&Config { train: TrainConfig { shards: Shards::Fixed(2), ..config.train }, ..config }, &mut Solo);
    assert!(fixed.0 == all[0].0, "two ranks compute two shards");
}

/// Their gradients are the same sums: the first norm agrees but for rounding.
#[test]
fn shards_add_up_to_the_batch() {
    let norm = |shards: Shards| {
        let config = config(shards);
        let mut device = Device::Cpu(Cpu::new(2));
        let schedule = Schedule::new(&config.diffusion).unwrap();
        let share = Share::solo(&config.train).unwrap();
        let mut trainer = Trainer::new(&mut device, &config, &schedule, SIZE, share).unwrap();
        let batch = pixels(0, 8 * SIZE[0] * SIZE[1] * 3);
        let norm = trainer.step(&mut device, &mut Solo, &config, 0, Images::Pixels(&batch)).unwrap().norm[0];
        let mut gradients = vec![0.0f32; trainer.program().layout.len()];
        trainer.gradients(&device, &mut gradients).unwrap();
        (norm, gradients)
    };
    let (whole, expected) = norm(Shards::Auto);
    for shards in [2, 4, 8] {
        let (parts, gradients) = norm(Shards::Fixed(shards));
        assert!((parts / whole - 1.0).abs() < 1e-5, "{shards} shards: {parts}, in one {whole}");
        let far = gradients.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5 * whole, "{shards} shards: {far}");
    }
}
