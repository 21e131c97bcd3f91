//! Random-access permutations: where an epoch's i-th place is, without shuffling anything.

use super::{Kind, philox4x32_10};

/// Rounds of the Feistel network. Four make a pseudorandom permutation of a large domain (Luby & Rackoff 1988); small
/// domains need more.
const ROUNDS: u32 = 10;

/// Place `i` of a permutation of 0 … `n`−1 that is keyed by (seed, epoch).
///
/// A Feistel network with Philox as its round function permutes the smallest 2²ʰ ≥ n; values ≥ n are sent round again
/// (cycle walking) until one is below n, fewer than four times on average. Every (seed, epoch) gives a bijection, and any
/// place is found by itself, so that a resumed run continues with exactly the images that were next.
///
/// # Panics
/// If `i ≥ n`: no place of the permutation.
pub fn permute(seed: u64, epoch: u64, n: u64, i: u64) -> u64 {
    assert!(i < n, "place {i} of a permutation of {n}");
    if n == 1 {
        return 0;
    }
    let half = (64 - (n - 1).leading_zeros()).div_ceil(2);
    let mask = u64::MAX >> (64 - half);
    let key = [seed as u32, (seed >> 32) as u32];
    let mut value = i;
    let words = |right: u64, round: u32| {
        let counter = [right as u32, epoch as u32, (epoch >> 32) as u32, (Kind::Order as u32) << 24 | round];
        philox4x32_10(counter, key)
    };
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..ROUNDS {
            let mixed = left ^ (words(right, round)[0] as u64 & mask);
            (left, right) = (right, mixed);
        }
        value = left << half | right;
        if value < n {
            break;
        }
    }
    // A Feistel network of four bits or more only makes even permutations; half of all orders would be a little likelier.
    // Exchanging 0 and 1 or not, by one more random bit, makes both parities alike.
    if value < 2 { value ^ (words(0, ROUNDS)[0] & 1) as u64 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_n_gives_a_bijection() {
        for n in [1, 2, 3, 4, 5, 7, 16, 17, 100, 255, 256, 257, 10_000, 60_000] {
            for (seed, epoch) in [(0, 0), (1, 0), (0, 1), (u64::MAX, u64::MAX)] {
                let mut seen = vec![false; n as usize];
                for i in 0..n {
                    let place = permute(seed, epoch, n, i) as usize;
                    assert!(!std::mem::replace(&mut seen[place], true), "n {n}: {place} twice");
                }
            }
        }
    }

    #[test]
    fn large_n_stays_in_range_and_does_not_repeat() {
        for n in [u32::MAX as u64 + 2, 1 << 63, u64::MAX] {
            let places: std::collections::HashSet<u64> = (0..1000).map(|i| permute(5, 6, n, n - 1 - i)).collect();
            assert_eq!(places.len(), 1000);
            assert!(places.iter().all(|&place| place < n));
        }
    }

    #[test]
    fn seed_and_epoch_change_the_order() {
        let order = |seed, epoch| (0..10_000).map(|i| permute(seed, epoch, 10_000, i)).collect::<Vec<_>>();
        let base = order(3, 0);
        for other in [order(3, 1), order(4, 0), order(3, 1 << 32), order(3 | 1 << 32, 0)] {
            // Two independent permutations agree in one place on average (Poisson).
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} places agree");
        }
        assert_eq!(base, order(3, 0));
    }

    /// χ² of counts against a uniform expectation, in standard deviations above its mean.
    fn chi_square_z(counts: &[u64]) -> f64 {
        let expected = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        let chi: f64 = counts.iter().map(|&c| (c as f64 - expected).powi(2) / expected).sum();
        let freedom = (counts.len() - 1) as f64;
        (chi - freedom) / (2.0 * freedom).sqrt()
    }

    #[test]
    fn small_permutations_are_equally_likely() {
        // All 24 orders of four things, and all 120 of five.
        for n in [3u64, 4, 5] {
            let orders: u64 = (1..=n).product();
            let mut counts = std::collections::HashMap::new();
            for epoch in 0..400 * orders {
                let order: Vec<u64> = (0..n).map(|i| permute(11, epoch, n, i)).collect();
                *counts.entry(order).or_insert(0u64) += 1;
            }
            assert_eq!(counts.len() as u64, orders);
            let z = chi_square_z(&counts.into_values().collect::<Vec<_>>());
            assert!(z.abs() < 4.0, "n {n}: {z}");
        }
    }

    #[test]
    fn a_place_and_its_neighbour_are_uniform() {
        let n = 60;
        let mut single = vec![0u64; n as usize];
        let mut steps = vec![0u64; n as usize];
        for epoch in 0..60_000 {
            let (a, b) = (permute(1, epoch, n, 17), permute(1, epoch, n, 18));
            single[a as usize] += 1;
            steps[((b + n - a) % n) as usize] += 1;
        }
        assert_eq!(steps[0], 0);
        let (z, z_step) = (chi_square_z(&single), chi_square_z(&steps[1..]));
        assert!(z.abs() < 4.0 && z_step.abs() < 4.0, "{z} {z_step}");
    }
}
