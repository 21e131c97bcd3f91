//! A training step and a sampling step allocate nothing once the first ones have run.

use ddpm_dist::collective::Solo;
use ddpm_dist::device::{Device, Precision, cpu::Cpu};
use ddpm_dist::diffusion::{SamplerConfig, SamplerTable, Schedule};
use ddpm_dist::sample::{Progress, Request, ReverseProcess, ReverseStep, SampleError, Sampler};
use ddpm_dist::train::{Config, Images, Shards, Share, Trainer};
use ddpm_dist::unet::UnetConfig;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, which counts what all threads ask of it.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as for this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as for this function.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as for this function.
        unsafe { System.realloc(start, layout, size) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as for this function.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    work();
    ALLOCATIONS.load(Ordering::SeqCst) - before
}

/// One test, so that no other allocates meanwhile.
#[test]
fn steps_allocate_nothing() {
    assert!(allocations(|| drop(std::hint::black_box(Box::new(1)))) == 1, "the allocator counts");
    let model = UnetConfig {
        channels: vec![16, 24, 32],
        blocks: 1,
        attention_levels: vec![1],
        groups: 8,
        dropout: 0.1,
        ..UnetConfig::default()
    };
    let mut config = Config { model, ..Config::default() };
    config.train.batch = 4;
    config.data.flip = true;
    let size = [16, 16];
    let schedule = Schedule::new(&config.diffusion).unwrap();
    let pixels = vec![100u8; 4 * 16 * 16 * 3];
    for (threads, shards) in [(1, Shards::Auto), (2, Shards::Auto), (2, Shards::Fixed(4))] {
        config.train.shards = shards;
        let mut device = Device::Cpu(Cpu::new(threads));
        let share = Share::solo(&config.train).unwrap();
        let mut trainer = Trainer::new(&mut device, &config, &schedule, size, share).unwrap();
        let mut step = |number: u64| {
            let losses = trainer.step(&mut device, &mut Solo, &config, number, Images::Pixels(&pixels)).unwrap();
            losses.norm[1] == 1.0
        };
        for warm_up in 0..3 {
            assert!(step(warm_up));
        }
        let mut finite = true;
        let count = allocations(|| (3..8).for_each(|number| finite &= step(number)));
        assert_eq!(count, 0, "allocations in five training steps on {threads} threads, {shards} shards");
        assert!(finite);

        // The loop of a sampler, from the end of one step to the end of the next, a new batch begun in between.
        let reverse_step = ReverseStep { model: &config.model, size, batch: 2, steps: 5, layout: None };
        let sampler = Sampler::new(&mut device, &reverse_step, Precision::F32).unwrap();
        let weights = device.allocate(sampler.layout().len() * 4).unwrap();
        let choice = SamplerConfig { steps: 5, ..SamplerConfig::default() };
        let table = SamplerTable::new(&schedule, &choice).unwrap();
        let process = ReverseProcess { weights, table: &table };
        let mut counts = [0; 10];
        let request = Request { count: 3, seed: 0, initial_noise: None, stages: 1 };
        let observe = |at: Progress| {
            counts[at.done - 1] = ALLOCATIONS.load(Ordering::SeqCst);
            true
        };
        let finished = sampler
            .sample_batches(&mut device, &mut Solo, process, request, observe, |_| Ok::<_, SampleError>(()))
            .unwrap();
        assert_eq!(finished, 3);
        assert!(
            counts.iter().all(|&n| n == counts[0]),
            "allocations in sampling steps on {threads} threads: {counts:?}"
        );
    }
}
