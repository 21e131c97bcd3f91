//! Images depend on weights, seed and their own number, and on nothing else.

use super::*;
use crate::collective::testing::world;
use crate::device::cpu::Cpu;
use crate::diffusion::{DiffusionConfig, SamplerConfig, SamplerKind, Schedule};
use crate::ops::testing::random;

fn model() -> UnetConfig {
    UnetConfig {
        image_channels: 3,
        channels: vec![8, 16],
        blocks: 1,
        attention_levels: vec![1],
        groups: 4,
        dropout: 0.3, // of training only
        ..UnetConfig::default()
    }
}

const SIZE: [usize; 2] = [12, 8];
const IMAGE: usize = 12 * 8 * 3;

fn table(sampler: SamplerKind, steps: usize, eta: f64) -> SamplerTable {
    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    SamplerTable::new(&schedule, &SamplerConfig { sampler, steps, eta, ..SamplerConfig::default() }).unwrap()
}

struct Setup {
    device: Device,
    sampler: Sampler,
    weights: BufferId,
}

impl Setup {
    /// Weights of a network that does something: random ones, scale 0.1.
    fn new(batch: usize, threads: usize) -> Setup {
        let scale = 0.1;
        Setup::with_weights(batch, threads, |len| random(3, len).iter().map(|x| scale * x).collect())
    }

    fn with_weights(batch: usize, threads: usize, weights: impl Fn(usize) -> Vec<f32>) -> Setup {
        let mut device = Device::Cpu(Cpu::new(threads));
        let step = ReverseStep { model: &model(), size: SIZE, batch, steps: 1000, layout: None };
        let sampler = Sampler::new(&mut device, &step, Precision::F32).unwrap();
        let flat = weights(sampler.layout().len());
        let weights = device.allocate(flat.len() * 4).unwrap();
        device.upload(weights, 0, &flat).unwrap();
        Setup { device, sampler, weights }
    }

    fn sample(&mut self, table: &SamplerTable, request: Request<'_>) -> Result<Vec<f32>, SampleError> {
        let process = ReverseProcess { weights: self.weights, table };
        let all = self.sampler.sample(&mut self.device, &mut Solo, process, request, |_| true)?;
        Ok(all.expect("nobody stopped it"))
    }
}

fn request(count: usize, seed: u64) -> Request<'static> {
    Request { count, seed, initial_noise: None, stages: 0 }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn an_image_does_not_depend_on_the_count() {
    let table = table(SamplerKind::Ddpm, 6, 0.0);
    for batch in [1, 4, 16] {
        let mut setup = Setup::new(batch, 2);
        let all = bits(&setup.sample(&table, request(7, 42)).unwrap());
        assert_eq!(all.len(), 7 * IMAGE);
        for i in 1..7 {
            assert_ne!(all[..IMAGE], all[i * IMAGE..][..IMAGE], "images 0 and {i} are the same");
        }
        for count in [1, 2, 6] {
            let some = bits(&setup.sample(&table, request(count, 42)).unwrap());
            assert!(some == all[..count * IMAGE], "batch {batch}, count {count}");
        }
        assert!(bits(&setup.sample(&table, request(7, 43)).unwrap()) != all, "the seed changes nothing");
    }
}

#[test]
fn an_image_does_not_depend_on_the_batch() {
    let table = table(SamplerKind::Ddpm, 6, 0.0);
    let one = bits(&Setup::new(1, 2).sample(&table, request(7, 42)).unwrap());
    for batch in [2, 4, 7, 16] {
        assert!(bits(&Setup::new(batch, 2).sample(&table, request(7, 42)).unwrap()) == one, "batch {batch}");
    }
}

#[test]
fn an_image_does_not_depend_on_threads() {
    for (sampler, eta) in [(SamplerKind::Ddpm, 0.0), (SamplerKind::Ddim, 0.5)] {
        let table = table(sampler, 5, eta);
        let one = bits(&Setup::new(4, 1).sample(&table, request(3, 1)).unwrap());
        for threads in [2, 3] {
            let more = bits(&Setup::new(4, threads).sample(&table, request(3, 1)).unwrap());
            assert!(more == one, "{sampler:?}: {threads} threads");
        }
    }
}

#[test]
fn given_noise_takes_the_place_of_drawn_noise() {
    let table = table(SamplerKind::Ddim, 5, 0.0);
    let mut setup = Setup::new(2, 2);
    let mut drawn = vec![0.0; 3 * IMAGE];
    for (i, image) in drawn.chunks_exact_mut(IMAGE).enumerate() {
        initial_noise_of(9, i).fill_normal(0, image);
    }
    let given = Request { count: 3, seed: 9, initial_noise: Some(&drawn), stages: 0 };
    let expected = setup.sample(&table, request(3, 9)).unwrap();
    assert_eq!(bits(&setup.sample(&table, given).unwrap()), bits(&expected));
    // DDIM with η = 0 draws nothing else.
    assert_eq!(bits(&setup.sample(&table, Request { seed: 10, ..given }).unwrap()), bits(&expected));
    drawn[0] += 1.0;
    let other = setup.sample(&table, Request { count: 3, seed: 9, initial_noise: Some(&drawn), stages: 0 }).unwrap();
    assert_ne!(bits(&other[..IMAGE]), bits(&expected[..IMAGE]));
    assert_eq!(bits(&other[IMAGE..]), bits(&expected[IMAGE..]));

    let short = Request { count: 3, seed: 9, initial_noise: Some(&drawn[1..]), stages: 0 };
    let error = setup.sample(&table, short).unwrap_err();
    assert!(matches!(error, SampleError::InitialNoise { found, expected, .. } if found + 1 == expected), "{error}");
}

#[test]
fn a_network_that_predicts_no_noise_leaves_the_closed_form() {
    // ε̂ = 0 makes x̂_0 = clip(x/√ᾱ), and DDIM with η = 0 goes to √ᾱ_s·x̂_0: applied step after step in f64.
    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    let table = table(SamplerKind::Ddim, 10, 0.0);
    let visited: Vec<u32> = table.steps.iter().map(|s| s.timestep).collect();
    assert_eq!(visited, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]);
    let noise: Vec<f32> = random(8, IMAGE).iter().map(|x| 0.3 * x).collect();
    let mut setup = Setup::with_weights(2, 2, |len| vec![0.0; len]);
    let found = setup.sample(&table, Request { count: 1, seed: 0, initial_noise: Some(&noise), stages: 0 }).unwrap();
    for (start, found) in noise.iter().zip(&found) {
        let mut x = f64::from(*start);
        for (i, &t) in visited.iter().enumerate() {
            let alpha = schedule.alphas_cumprod[t as usize];
            let next = visited.get(i + 1).map_or(1.0, |&t| schedule.alphas_cumprod[t as usize]);
            let x_0 = (x / alpha.sqrt()).clamp(-1.0, 1.0);
            let epsilon = 0.0;
            x = next.sqrt() * x_0 + (1.0 - next).sqrt() * epsilon;
        }
        assert!((f64::from(*found) - x).abs() < 1e-5, "{found}, expected {x}");
    }
}

#[test]
fn images_that_are_not_finite_are_named() {
    let table = table(SamplerKind::Ddpm, 4, 0.0);
    let mut setup = Setup::with_weights(2, 2, |len| vec![f32::NAN; len]);
    match setup.sample(&table, request(3, 0)).unwrap_err() {
        SampleError::NotFinite { image: 0, timestep: 750 } => {}
        e => panic!("{e}"),
    }
    // One image of several: its own noise is the cause.
    let mut noise = random(8, 3 * IMAGE);
    noise[2 * IMAGE + 5] = f32::INFINITY;
    let mut setup = Setup::new(2, 2);
    let given = Request { count: 3, seed: 0, initial_noise: Some(&noise), stages: 0 };
    match setup.sample(&table, given).unwrap_err() {
        SampleError::NotFinite { image: 2, .. } => {}
        e => panic!("{e}"),
    }
}

#[test]
fn the_observer_sees_every_step_and_can_stop() {
    let table = table(SamplerKind::Ddpm, 3, 0.0);
    let mut setup = Setup::new(2, 1);
    let mut seen = Vec::new();
    let Setup { device, sampler, weights } = &mut setup;
    let process = ReverseProcess { weights: *weights, table: &table };
    let images = sampler
        .sample(device, &mut Solo, process, request(3, 0), |at| {
            seen.push((at.done, at.of));
            true
        })
        .unwrap()
        .unwrap();
    assert_eq!(images.len(), 3 * IMAGE);
    assert_eq!(seen, [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]);
    let stopped = sampler.sample(device, &mut Solo, process, request(3, 0), |at| at.done < 2).unwrap();
    assert!(stopped.is_none());
}

#[test]
fn finished_batches_are_handed_over_in_order() {
    let table = table(SamplerKind::Ddpm, 3, 0.0);
    let mut setup = Setup::new(2, 1);
    let all = setup.sample(&table, request(5, 0)).unwrap();
    let Setup { device, sampler, weights } = &mut setup;
    let process = ReverseProcess { weights: *weights, table: &table };
    // Stopped after the step `last`: whole batches are kept, also that which the step finishes.
    for (last, expected) in [(1, 0), (2, 0), (3, 2), (4, 2), (6, 4), (8, 4), (9, 5), (100, 5)] {
        let mut kept: Vec<f32> = Vec::new();
        let go_on = |at: Progress| at.done < last;
        let finished = sampler
            .sample_batches(device, &mut Solo, process, request(5, 0), go_on, |batch| {
                kept.extend_from_slice(batch.images);
                Ok::<_, SampleError>(())
            })
            .unwrap();
        assert_eq!(finished, expected, "stopped after {last} steps");
        assert_eq!(bits(&kept), bits(&all[..expected * IMAGE]));
    }
    // Whoever keeps them may refuse.
    let refuse = |_: Finished<'_>| Err(SampleError::OutOfMemory { device: "shelf".into(), bytes: 1, what: "books" });
    let error = sampler.sample_batches(device, &mut Solo, process, request(5, 0), |_| true, refuse).unwrap_err();
    assert!(error.to_string().contains("shelf has no 1 bytes"), "{error}");
}

#[test]
fn more_images_than_memory_are_refused_and_not_tried() {
    let table = table(SamplerKind::Ddpm, 1, 0.0);
    let mut setup = Setup::new(1, 1);
    let error = setup.sample(&table, request(usize::MAX / IMAGE, 0)).unwrap_err();
    assert!(matches!(error, SampleError::OutOfMemory { .. }) && error.to_string().contains("--batch"), "{error}");
}

#[test]
fn images_are_the_same_at_any_number_of_ranks() {
    let table = table(SamplerKind::Ddpm, 4, 0.0);
    let one = bits(&Setup::new(2, 1).sample(&table, request(7, 3)).unwrap());
    for ranks in [2, 3, 5] {
        let all = world(ranks, |collective| {
            let Setup { mut device, sampler, weights } = Setup::new(2, 1);
            let process = ReverseProcess { weights, table: &table };
            sampler.sample(&mut device, collective, process, request(7, 3), |_| true).unwrap().unwrap()
        });
        assert!(all.iter().all(|images| bits(images) == one), "{ranks} ranks");
    }
}

/// Three ranks, two images each in a round: rank 1 is told to stop, in the midst of a round or with its last step.
#[test]
fn a_rank_that_stops_stops_all() {
    let table = table(SamplerKind::Ddpm, 3, 0.0);
    for (last, expected) in [(1, 0), (3, 6), (4, 6), (6, 12), (11, 18), (12, 20)] {
        let finished = world(3, |collective| {
            let Setup { mut device, sampler, weights } = Setup::new(2, 1);
            let process = ReverseProcess { weights, table: &table };
            let rank = collective.rank();
            let go_on = |at: Progress| rank != 1 || at.done < last;
            let mut kept = 0;
            let keep = |batch: Finished<'_>| {
                assert_eq!(batch.first * IMAGE, kept);
                kept += batch.images.len();
                Ok::<_, SampleError>(())
            };
            let finished = sampler.sample_batches(&mut device, collective, process, request(20, 0), go_on, keep);
            (finished.unwrap(), kept / IMAGE)
        });
        assert_eq!(finished, [(expected, expected); 3], "stopped after {last} steps");
    }
}

#[test]
fn an_image_that_is_not_finite_is_named_at_all_ranks() {
    let table = table(SamplerKind::Ddpm, 2, 0.0);
    let mut noise = random(5, 6 * IMAGE);
    noise[3 * IMAGE] = f32::NAN;
    let errors = world(3, |collective| {
        let Setup { mut device, sampler, weights } = Setup::new(2, 1);
        let process = ReverseProcess { weights, table: &table };
        let request = Request { count: 6, seed: 0, initial_noise: Some(&noise), stages: 0 };
        sampler.sample(&mut device, collective, process, request, |_| true).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, SampleError::NotFinite { image: 3, .. }), "{error}");
    }
}

#[test]
fn stages_lead_from_noise_to_the_image() {
    let table = table(SamplerKind::Ddpm, 6, 0.0);
    let staged = Request { stages: 2, ..request(3, 1) };
    let gathered = world(2, |collective| {
        let Setup { mut device, sampler, weights } = Setup::new(2, 1);
        let process = ReverseProcess { weights, table: &table };
        let mut all = vec![Vec::new(); 3];
        let keep = |batch: Finished<'_>| {
            for (all, stage) in all.iter_mut().zip(batch.stages.iter().map(Vec::as_slice).chain([batch.images])) {
                all.extend(bits(stage));
            }
            Ok::<_, SampleError>(())
        };
        sampler.sample_batches(&mut device, collective, process, staged, |_| true, keep).unwrap();
        all
    });
    assert_eq!(gathered[0], gathered[1]);
    // After 2, 4 and 6 of 6 steps.
    let [early, middle, last] = &gathered[0][..] else { panic!("three stages") };
    assert_eq!(*last, bits(&Setup::new(2, 1).sample(&table, request(3, 1)).unwrap()));
    assert!(early != middle && middle != last && early.len() == last.len() && middle.len() == last.len());
}
