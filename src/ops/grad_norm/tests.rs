use super::grad_norm;
use crate::device::Region;
use crate::ops::testing::{Planned, random};
use crate::tape::{Spec, Tape};

/// Norm and flag of parameters of the given sizes, filled by `fill(flat index)`; gaps are zero.
fn run(sizes: &[usize], threads: usize, fill: impl Fn(usize) -> f32) -> [f32; 2] {
    let mut tape = Tape::new();
    for (i, size) in sizes.iter().enumerate() {
        tape.param(&format!("p{i}"), [*size]);
    }
    let norm = tape.io("norm", Spec::f32([2]));
    grad_norm(&mut tape, norm);
    let mut planned = Planned::new(&tape, threads);
    let mut flat = vec![0.0; planned.program.layout.len()];
    for placed in planned.program.layout.iter() {
        placed.range.clone().for_each(|i| flat[i] = fill(i));
    }
    planned.set_flat(Region::Gradients, &flat);
    planned.run();
    planned.get("norm").try_into().unwrap()
}

#[test]
fn matches_f64_at_any_size_and_number_of_threads() {
    let g = random(5, 5_000_000);
    // From one block to some thousand of them, the last one short.
    for sizes in [&[1][..], &[3, 65, 1], &[4096], &[4097, 31], &[1_000_003, 77], &[4_300_001, 129]] {
        let found = run(sizes, 1, |i| g[i]);
        let mut exact = 0.0;
        let mut start = 0;
        for size in sizes {
            exact += g[start..start + size].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
            start = (start + size).next_multiple_of(64);
        }
        // Exact but for the last rounding to f32.
        assert_eq!(found, [exact.sqrt() as f32, 1.0], "{sizes:?}");
        for threads in [2, 3] {
            assert_eq!(run(sizes, threads, |i| g[i]), found, "{sizes:?}, {threads} threads");
        }
    }
}

#[test]
fn closed_forms_and_extremes() {
    assert_eq!(run(&[2], 1, |i| [3.0, 4.0][i]), [5.0, 1.0]);
    assert_eq!(run(&[100], 1, |_| 0.0), [0.0, 1.0]);
    // Squares that f32 could not hold, above and below.
    assert_eq!(run(&[4], 1, |_| 1e30), [2e30, 1.0]);
    assert_eq!(run(&[4], 1, |_| -1e-30), [2e-30, 1.0]);
    assert_eq!(run(&[4], 1, |_| f32::from_bits(1)), [2.0 * f32::from_bits(1), 1.0]);
    assert_eq!(run(&[4], 1, |_| f32::MAX), [f32::MAX, 1.0], "finite gradients have a finite norm");
}

#[test]
fn one_gradient_that_is_not_finite_clears_the_flag() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 15, 31, 32, 4095, 4096, 9_999] {
            let [norm, flag] = run(&[10_000], 2, |i| if i == place { value } else { 1.0 });
            assert_eq!(flag, 0.0, "{value} at {place}");
            assert!(!norm.is_finite());
        }
    }
    let [norm, flag] = run(&[2], 2, |i| [f32::INFINITY, f32::NEG_INFINITY][i]);
    assert_eq!((norm, flag), (f32::INFINITY, 0.0));
}
