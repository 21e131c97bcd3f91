//! The model against values computed by hand.

use super::*;

fn network(text: &str) -> Interconnect {
    text.parse().unwrap()
}

#[track_caller]
fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1e-9), "{found} is not {expected}");
}

fn bucket(bytes: f64, ready: f64) -> Bucket {
    Bucket { bytes, ready }
}

/// 1 GB in four buckets, complete after each quarter of a backward pass that is two thirds of computing.
fn work() -> Work {
    Work {
        launches: 100.0,
        flops_per_image: 30e9,
        optimiser_bytes: 4e9,
        is_update_divided: false,
        backward: 2.0 / 3.0,
        buckets: (1..=4).map(|k| bucket(0.25e9, f64::from(k) / 4.0)).collect(),
    }
}

#[test]
fn a_sum_costs_latency_and_twice_its_bytes_but_for_one_part() {
    let network = network("10GB/s,50us");
    close(all_reduce(&network, 2, 1e9), 50e-6 + 0.1);
    close(all_reduce(&network, 8, 1e9), 50e-6 + 0.175);
    close(all_reduce(&network, 512, 0.0), 50e-6);
    assert_eq!(all_reduce(&network, 1, 1e9), 0.0);
}

#[test]
fn what_the_backward_pass_does_not_cover() {
    let second = |_| 1.0;
    // No backward pass: everything is waited for.
    close(exposed(&[bucket(1.0, 0.2), bucket(1.0, 1.0)], 0.0, second), 2.0);
    // A long one: only what is complete at its end.
    close(exposed(&[bucket(1.0, 0.2), bucket(1.0, 1.0)], 100.0, second), 1.0);
    // One that is complete long before: nothing.
    assert_eq!(exposed(&[bucket(1.0, 0.2)], 100.0, second), 0.0);
    // One bucket at the end: all of it, however long.
    close(exposed(&[bucket(1.0, 1.0)], 1e6, second), 1.0);
    // One lane: of 4 s, the first begins at 1 and the others queue up behind it until 4 s after that.
    let queue = [bucket(1.0, 0.25), bucket(1.0, 0.25), bucket(1.0, 0.5), bucket(1.0, 0.5)];
    close(exposed(&queue, 4.0, second), 1.0);
    // The lane is free between the first and the second, which is complete at 3 s.
    close(exposed(&[bucket(1.0, 0.25), bucket(1.5, 0.75)], 4.0, |seconds| seconds), 0.5);
    assert_eq!(exposed(&[], 4.0, second), 0.0);
}

#[test]
fn jitter_is_none_for_one_rank_and_grows_slowly() {
    assert_eq!(jitter(1.0, 1), 0.0);
    close(jitter(10.0, 8), 0.12 * (2.0 * 8f64.ln()).sqrt());
    assert!((jitter(1.0, 8) - 0.0245).abs() < 1e-4 && (jitter(1.0, 512) - 0.0424).abs() < 1e-4);
}

/// 128 images at 30 GFLOP and 300 TFLOP/s: 12.8 ms; 100 instructions at 3.8 µs: 0.38 ms; 4 GB at 4.3 TB/s: 0.93 ms.
#[test]
fn a_step_by_hand() {
    let pace = Pace::at_rate(&work(), &Hardware::H200, 300e12);
    close(pace.compute(128, 1), 12.8e-3 + 0.38e-3);
    close(pace.compute(128, 4), 12.8e-3 + 4.0 * 0.38e-3);
    close(pace.optimiser, 4.0 / 4300.0);

    let step = |text, ranks, images| predict(&work(), &pace, &network(text), Portion { ranks, images, shards: 1 });
    let alone = step("100GB/s,0us", 1, 128);
    assert_eq!((alone.communication, alone.exposed, alone.jitter), (0.0, 0.0, 0.0));
    close(alone.step(), 13.18e-3 + 4.0 / 4300.0);
    close(alone.efficiency(&alone), 1.0);

    // 0.25 GB over 8 ranks at 100 GB/s: 4.375 ms, longer than a quarter of the backward pass of 8.79 ms: the first begins after 2.20 ms.
    let eight = step("100GB/s,0us", 8, 128);
    let backward = 13.18e-3 * 2.0 / 3.0;
    close(eight.communication, 17.5e-3);
    close(eight.exposed, backward / 4.0 + 17.5e-3 - backward);
    close(eight.efficiency(&alone), alone.step() / eight.step());
    // At 1000 GB/s each is done before the next is complete: the last is waited for.
    close(step("1000GB/s,0us", 8, 128).exposed, 0.4375e-3);
    // On CPU cores nothing is covered.
    let host = step("shm", 2, 128);
    close(host.exposed, host.communication);
    close(host.communication, 4.0 * 100e-6 + 1e9 / 2.3e9);

    // Strong: 16 images of each of 8 ranks against 128 of one.
    let strong = step("1000GB/s,0us", 8, 16);
    close(strong.efficiency(&alone), alone.step() / (8.0 * strong.step()));
}

/// Sums begin in the backward pass of the last of four shards, which covers a quarter as much.
#[test]
fn only_the_last_shard_covers_sums() {
    let pace = Pace { per_shard: 0.0, per_image: 1e-3, optimiser: 0.0 };
    let step = |shards| predict(&work(), &pace, &network("10GB/s,0us"), Portion { ranks: 8, images: 240, shards });
    // 4 sums of 43.75 ms; 160 ms of backward pass or 40 ms.
    close(step(1).exposed, 40e-3 + 175e-3 - 160e-3);
    close(step(4).exposed, 10e-3 + 175e-3 - 40e-3);
    close(step(1).compute, step(4).compute);
}

#[test]
fn more_ranks_are_never_faster_each() {
    let work = work();
    let pace = Pace::at_rate(&work, &Hardware::H200, 300e12);
    for name in Interconnect::NAMES.into_iter().chain(["25GB/s,20us"]) {
        let network = network(name);
        let step = |ranks| predict(&work, &pace, &network, Portion { ranks, images: 128, shards: 1 });
        let mut last = step(1);
        for ranks in 2..=4096 {
            let next = step(ranks);
            assert!(next.step() >= last.step() * (1.0 - 1e-12), "{name}: {ranks} ranks");
            assert!(next.exposed <= next.communication * (1.0 + 1e-12), "{name}: {ranks} ranks");
            assert!(next.efficiency(&step(1)) < 1.0);
            last = next;
        }
    }
}

#[test]
fn a_measured_step_gives_its_time_again() {
    let (work, hardware) = (work(), Hardware::H200);
    for (images, shards) in [(128, 1), (16, 4)] {
        let pace = Pace::measured(&work, &hardware, (images, shards), 20e-3, None).unwrap();
        close(pace.compute(images, shards) + pace.optimiser, 20e-3);
        let pace = Pace::measured(&work, &hardware, (images, shards), 20e-3, Some(3e-3)).unwrap();
        close(pace.compute(images, shards), 17e-3);
    }
    let error = Pace::measured(&work, &hardware, (128, 2), 1e-3, None).unwrap_err().to_string();
    assert!(error.contains("1.000 ms") && error.contains("2 shards 0.760 ms"), "{error}");
}

#[test]
fn tables_have_powers_of_two_and_the_number_asked_for() {
    assert_eq!(ladder(1), [1]);
    assert_eq!(ladder(8), [1, 2, 4, 8]);
    assert_eq!(ladder(12), [1, 2, 4, 8, 12]);
    assert_eq!(ladder(512).len(), 10);
}
