//! Which of the T timesteps a sampler visits, as diffusers chooses them (Lin et al. 2023, table 2).

use super::{SamplerConfig, Spacing};
use crate::config::OutOfRange;

/// The K timesteps in visiting order, that is falling; each in 0 … T−1.
///
/// NumPy's arithmetic is repeated to the last bit (`arange` adds multiples of the difference of its first two values;
/// `round` sends halves to the even neighbour), for a tie decides which timestep is visited. Where `arange` yields one value
/// more than K (trailing, K = 61 of 1000 for one), diffusers goes on to timestep −1; here there are always K.
pub(super) fn visited_timesteps(config: &SamplerConfig, timesteps: usize) -> Result<Vec<u32>, OutOfRange> {
    let (n, k) = (timesteps, config.steps);
    OutOfRange::check(
        (1..=n).contains(&k),
        "sample.steps",
        k,
        format!("1 to {n}"),
        "a sampler visits some of diffusion.timesteps, none of them twice",
    )?;
    let rounded = |x: f64| x.round_ties_even() as u32;
    Ok(match config.spacing {
        Spacing::Leading => {
            let ratio = n / k;
            let most = n - 1 - (k - 1) * ratio;
            OutOfRange::check(
                config.steps_offset <= most,
                "sample.steps_offset",
                config.steps_offset,
                format!("at most {most}"),
                "the first timestep visited must be below diffusion.timesteps",
            )?;
            (0..k).rev().map(|i| (i * ratio + config.steps_offset) as u32).collect()
        }
        Spacing::Trailing => {
            let start = n as f64;
            let delta = (start - start / k as f64) - start;
            (0..k).map(|i| rounded(start + i as f64 * delta) - 1).collect()
        }
        Spacing::Linspace => {
            let end = (n - 1) as f64;
            let step = if k > 1 { end / (k - 1) as f64 } else { 0.0 };
            (0..k).rev().map(|i| if i > 0 && i == k - 1 { n as u32 - 1 } else { rounded(i as f64 * step) }).collect()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(spacing: Spacing, steps: usize, timesteps: usize) -> Vec<u32> {
        visited_timesteps(&SamplerConfig { spacing, steps, ..Default::default() }, timesteps).unwrap()
    }

    #[test]
    fn known_spacings() {
        let leading = visit(Spacing::Leading, 300, 1000);
        assert_eq!((leading[0], leading[1], leading[299]), (897, 894, 0));
        assert_eq!(visit(Spacing::Leading, 4, 10), [6, 4, 2, 0]);
        assert_eq!(visit(Spacing::Trailing, 4, 10), [9, 7, 4, 1]); // 10, 7.5, 5, 2.5, halves to even
        assert_eq!(visit(Spacing::Linspace, 4, 10), [9, 6, 3, 0]);
        assert_eq!(visit(Spacing::Linspace, 1, 10), [0]);
        assert_eq!(visit(Spacing::Trailing, 1, 10), [9]);
    }

    #[test]
    fn every_step_count_visits_falling_timesteps_in_range() {
        for n in [1, 2, 7, 100, 1000] {
            for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
                for k in 1..=n {
                    let t = visit(spacing, k, n);
                    assert_eq!(t.len(), k);
                    assert!(t[0] < n as u32 && t.windows(2).all(|w| w[0] > w[1]), "{spacing:?} {k} of {n}: {t:?}");
                }
                assert_eq!(visit(spacing, n, n), (0..n as u32).rev().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn impossible_step_counts_and_offsets_are_refused() {
        for (steps, steps_offset, key) in [
            (0, 0, "sample.steps"),
            (1001, 0, "sample.steps"),
            (1000, 1, "sample.steps_offset"),
            (3, 334, "sample.steps_offset"),
        ] {
            let config = SamplerConfig { steps, steps_offset, ..Default::default() };
            let error = visited_timesteps(&config, 1000).unwrap_err();
            assert_eq!(error.key, key);
        }
        let config = SamplerConfig { steps: 50, steps_offset: 1, ..Default::default() };
        assert_eq!(visited_timesteps(&config, 1000).unwrap()[..2], [981, 961]);
    }
}
