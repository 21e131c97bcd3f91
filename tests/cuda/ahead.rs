//! Steps that are begun while the GPU computes the one before: the host waits for none of them, and changes nothing too early.

use crate::machine::{WITH_KERNELS, not_tested, run_cases};
use crate::steps::{config, gpu, pixels, sample, train, train_ahead};
use cudarc::driver::sys;
use ddpm_dist::collective::Solo;
use ddpm_dist::device::cuda::Image;
use ddpm_dist::device::{Device, Precision};
use ddpm_dist::diffusion::Schedule;
use ddpm_dist::sample::SampleError;
use ddpm_dist::train::{Config, Images, Shards, Share, Trainer};

const SIZE: [usize; 2] = [8, 8];

fn small(shards: usize) -> Config {
    let mut config = config(&[8, 16], 3, 4);
    config.train.precision = Precision::Bf16;
    config.train.shards = Shards::Fixed(shards);
    config
}

/// What the GPU has been told and not done, which only the machine made of software tells.
fn left() -> Option<u64> {
    // SAFETY: the driver is there; the function is one of the machine's own, of that type.
    unsafe { sys::culib().get::<unsafe extern "C" fn() -> u64>(b"cuda_sim_left\0").ok().map(|count| count()) }
}

/// On a GPU that does nothing before it is waited for.
fn on_a_busy_gpu(test: &str, body: impl Fn()) {
    match Image::embedded() {
        Some(_) => run_cases(test, &WITH_KERNELS, &[(&[("CUDA_SIM_BUSY", "1")], ())], |()| body()),
        None => not_tested(&format!("{test}: built without nvcc")),
    }
}

#[test]
fn steps_begun_ahead_leave_the_bits_of_those_that_are_waited_for() {
    on_a_busy_gpu("ahead::steps_begun_ahead_leave_the_bits_of_those_that_are_waited_for", || {
        for shards in [1, 4] {
            let config = small(shards);
            let expected = train(&mut gpu(), &config, SIZE, 5);
            assert!(train_ahead(&mut gpu(), &config, SIZE, 5, 1) == expected, "{shards} shards");
        }
    });
}

#[test]
fn the_host_does_not_wait_for_a_step_that_it_begins() {
    on_a_busy_gpu("ahead::the_host_does_not_wait_for_a_step_that_it_begins", || {
        let (config, mut device) = (small(1), gpu());
        let (schedule, share) = (Schedule::new(&config.diffusion).unwrap(), Share::solo(&config.train).unwrap());
        let mut trainer = Trainer::new(&mut device, &config, &schedule, SIZE, share).unwrap();
        device.synchronize().unwrap();
        let begin = |trainer: &mut Trainer, device: &mut Device, step| {
            trainer.begin(device, &mut Solo, &config, step, Images::Pixels(&pixels(&config, SIZE, step))).unwrap();
        };
        // One by one, while it is captured, and as a graph.
        for step in 0..4 {
            begin(&mut trainer, &mut device, step);
            let first = left().unwrap();
            assert!(first > 0, "step {step} was waited for");
            if step > 0 {
                trainer.finish(&mut device, &mut Solo).unwrap();
            }
        }
        trainer.finish(&mut device, &mut Solo).unwrap();
    });
}

#[test]
fn images_are_looked_at_now_and_then_and_not_after_every_step() {
    on_a_busy_gpu("ahead::images_are_looked_at_now_and_then_and_not_after_every_step", || {
        let (mut waited, mut steps) = (0, 0);
        let mut observe = |_| {
            waited += usize::from(left().unwrap() == 0);
            steps += 1;
            true
        };
        let images = sample(&mut gpu(), Precision::Bf16, 2, 50, 0.1, &mut observe).unwrap().unwrap();
        assert!(images.iter().all(|value| value.is_finite()));
        assert_eq!(steps, 50);
        assert!(waited <= 1, "the GPU had nothing to do after {waited} of 50 steps");
    });
}

#[test]
fn images_that_are_not_finite_are_seen_before_the_last_step() {
    on_a_busy_gpu("ahead::images_that_are_not_finite_are_seen_before_the_last_step", || {
        let mut steps = 0;
        let mut observe = |_| {
            steps += 1;
            true
        };
        let error = sample(&mut gpu(), Precision::F32, 2, 50, f32::NAN, &mut observe).unwrap_err();
        // The copy that was begun after 16 steps is looked at after 32.
        assert!(matches!(error, SampleError::NotFinite { image: 0, timestep: 680 }), "{error}");
        assert_eq!(steps, 32);
    });
}
