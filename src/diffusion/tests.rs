//! Whole reverse processes: against diffusers, against closed forms, and with a network that knows the answer.

use super::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    /// (x_t, network output, z): three unit vectors, then values for the clipped steps.
    probes: Vec<[f64; 3]>,
    cases: Vec<Case>,
    digests: Vec<Digest>,
}

#[derive(Deserialize)]
struct Case {
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    timesteps: Vec<u32>,
    /// Which steps are recorded.
    kept: Vec<usize>,
    /// [step][probe] = (x̂_0, next state), without clipping.
    free: Vec<Vec<[f64; 2]>>,
    /// The same with a clip of 1.
    clipped: Vec<Vec<[f64; 2]>>,
}

#[derive(Deserialize)]
struct Digest {
    timesteps: usize,
    spacing: Spacing,
    digest: u64,
}

/// Made by tests/reference/schedulers.py.
fn fixture() -> Fixture {
    serde_json::from_str(include_str!("fixtures/schedulers.json")).unwrap()
}

fn table(diffusion: &DiffusionConfig, sampler: &SamplerConfig, clip: f64) -> SamplerTable {
    let schedule = Schedule::new(&DiffusionConfig { clip, ..diffusion.clone() }).unwrap();
    SamplerTable::new(&schedule, sampler).unwrap()
}

#[test]
fn steps_are_those_of_diffusers() {
    let fixture = fixture();
    for case in &fixture.cases {
        for (clip, probes, expected) in
            [(0.0, &fixture.probes[..3], &case.free), (1.0, &fixture.probes[3..], &case.clipped)]
        {
            let table = table(&case.diffusion, &case.sampler, clip);
            let timesteps: Vec<u32> = table.steps.iter().map(|step| step.timestep).collect();
            assert_eq!(timesteps, case.timesteps, "{:?}", case.sampler);
            for (&index, expected) in case.kept.iter().zip(expected) {
                let step = &table.steps[index];
                for (&[x_t, out, z], &[x_start, next]) in probes.iter().zip(expected) {
                    // Algorithm 2 draws no z at its last step; diffusers does where the last timestep is not 0.
                    let is_last = index + 1 == timesteps.len();
                    if case.sampler.sampler == SamplerKind::Ddpm && is_last && z != 0.0 && step.timestep != 0 {
                        continue;
                    }
                    let found = p_sample_step(step, table.clip, &[x_t], &[out], &[z])[0];
                    let found_start = (step.x0_from_xt * x_t + step.x0_from_out * out).clamp(-table.clip, table.clip);
                    for (found, expected) in [(found, next), (found_start, x_start)] {
                        // Both sides round 1 − ᾱ in f64, once or twice more or less: ε/(1 − ᾱ_0) = 2e-12.
                        let bound = 4e-12 * f64::max(1.0, expected.abs());
                        assert!(
                            (found - expected).abs() < bound,
                            "{:?} {:?} clip {clip} step {index} of x_t {x_t}, output {out}, z {z}: {found:e}, diffusers {expected:e}",
                            case.diffusion,
                            case.sampler
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn every_number_of_steps_visits_the_timesteps_of_diffusers() {
    for Digest { timesteps, spacing, digest } in fixture().digests {
        let mut found = 0u128;
        for steps in 1..=timesteps {
            let config = SamplerConfig { steps, spacing, ..Default::default() };
            for t in spacing::visited_timesteps(&config, timesteps).unwrap() {
                found = (31 * found + t as u128 + 1) % ((1 << 61) - 1);
            }
        }
        assert_eq!(found, digest as u128, "{timesteps} {spacing:?}");
    }
}

/// A step without clipping as next = a·x_t + b·out + sigma·z.
fn affine(step: &SamplerStep) -> (f64, f64) {
    let a = step.c_x0 * step.x0_from_xt + step.c_xt + step.c_eps * step.eps_from_xt;
    (a, step.c_x0 * step.x0_from_out + step.c_eps * step.eps_from_out)
}

/// Algorithm 2 over all T steps is the chain of p_θ(x_{t−1} | x_t) of section 3.2.
#[test]
fn algorithm_2_on_all_steps_is_the_chain_of_p() {
    for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
        for variance in [Variance::FixedLarge, Variance::FixedSmall] {
            let config = DiffusionConfig { objective, variance, ..Default::default() };
            let schedule = Schedule::new(&config).unwrap();
            let table = SamplerTable::new(&schedule, &SamplerConfig::default()).unwrap();
            for (step, t) in table.steps.iter().zip((0..1000).rev()) {
                assert_eq!(step.timestep, t as u32);
                let (mean, sigma2) = schedule.p_mean_variance(0.4, t, 0.9);
                let found = p_sample_step(step, table.clip, &[0.4], &[0.9], &[0.0])[0];
                assert!((found - mean).abs() < 4e-12, "{t}: {found} {mean}");
                // z = 0 at the last step, whatever σ² is.
                let expected = if t == 0 { 0.0 } else { sigma2 };
                assert!((step.sigma.powi(2) - expected).abs() < 1e-15, "{t}");
            }
        }
    }
}

/// η = 1 has the variance and the mean of Algorithm 2 with β̃ (Song et al. 2020, section 4.1).
#[test]
fn ddim_with_eta_1_is_algorithm_2_with_the_posterior_variance() {
    let diffusion = DiffusionConfig { variance: Variance::FixedSmall, ..Default::default() };
    for steps in [1000, 250, 50] {
        let ddpm = table(&diffusion, &SamplerConfig { steps, ..Default::default() }, 0.0);
        let ddim = SamplerConfig { sampler: SamplerKind::Ddim, eta: 1.0, steps, ..Default::default() };
        let ddim = table(&diffusion, &ddim, 0.0);
        for (p, i) in ddpm.steps.iter().zip(&ddim.steps) {
            let ((a, b), (c, d)) = (affine(p), affine(i));
            assert!((a - c).abs() < 1e-10 && (b - d).abs() < 1e-10, "{}: {a} {b} {c} {d}", p.timestep);
            assert!((p.sigma - i.sigma).abs() < 1e-10, "{}: {} {}", p.timestep, p.sigma, i.sigma);
        }
    }
}

/// With one image in the data set the true ε is known at every x_t, and DDIM must arrive at that image.
#[test]
fn ddim_recovers_the_only_image() {
    let image = [-1.0, -0.37, 0.0, 0.52, 1.0];
    for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
        for (steps, spacing) in
            [(1, Spacing::Trailing), (10, Spacing::Trailing), (50, Spacing::Leading), (1000, Spacing::Leading)]
        {
            for clip in [0.0, 1.0] {
                let config = DiffusionConfig { objective, clip, ..Default::default() };
                let schedule = Schedule::new(&config).unwrap();
                let sampler = SamplerConfig { sampler: SamplerKind::Ddim, steps, spacing, ..Default::default() };
                let table = SamplerTable::new(&schedule, &sampler).unwrap();
                let mut x = vec![2.1, -0.3, 0.0, 1.1, -1.9];
                for step in &table.steps {
                    let t = step.timestep as usize;
                    let [of_start, of_noise] = schedule.target_coefficients(t);
                    let out: Vec<f64> = x
                        .iter()
                        .zip(image)
                        .map(|(&x_t, x0)| of_start * x0 + of_noise * schedule.predict_noise_from_start(x_t, t, x0))
                        .collect();
                    x = p_sample_step(step, table.clip, &x, &out, &[0.0; 5]);
                }
                for (found, expected) in x.iter().zip(image) {
                    assert!((found - expected).abs() < 1e-11, "{objective:?} {steps}: {found} {expected}");
                }
            }
        }
    }
}

/// Mean and variance of what a sampler makes of x_T ~ N(0, 1) when the data are N(m, s²) and the network is the best there
/// is: E[ε | x_t] = √(1−ᾱ) (x_t − √ᾱ m)/(ᾱ s² + 1 − ᾱ), which is affine, so that every state is Gaussian.
fn final_moments(variance: Variance, sampler: &SamplerConfig, m: f64, s: f64) -> (f64, f64) {
    let schedule = Schedule::new(&DiffusionConfig { variance, clip: 0.0, ..Default::default() }).unwrap();
    let table = SamplerTable::new(&schedule, sampler).unwrap();
    table.steps.iter().fold((0.0, 1.0), |(mean, var), step| {
        let [signal, noise] = schedule.q_sample_coefficients(step.timestep as usize);
        let slope = noise / (signal * signal * s * s + noise * noise);
        let (a, b) = affine(step);
        let gain = a + b * slope;
        (gain * mean - b * slope * signal * m, gain * gain * var + step.sigma * step.sigma)
    })
}

/// Section 3.2: σ² = β_t is optimal for x_0 ~ N(0, I), σ² = β̃_t for x_0 set to one point. Both are then exact on any subset
/// of the steps.
#[test]
fn algorithm_2_is_exact_where_the_paper_says_so() {
    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    for steps in [1000, 300, 50, 7] {
        let sampler = SamplerConfig { steps, ..Default::default() };
        // All states are N(0, 1); the last step takes the mean alone, √ᾱ_t x_t, of t = 0.
        let (mean, var) = final_moments(Variance::FixedLarge, &sampler, 0.0, 1.0);
        assert_eq!(mean, 0.0);
        assert!((var - schedule.alphas_cumprod[0]).abs() < 1e-10, "{steps}: {var}");
        let (mean, var) = final_moments(Variance::FixedSmall, &sampler, 0.7, 0.0);
        assert!((mean - 0.7).abs() < 1e-10 && var < 1e-18, "{steps}: {mean} {var}");
    }
}

/// For data between the two, the two variances bound the truth from both sides, closely when T is large.
#[test]
fn algorithm_2_brackets_gaussian_data() {
    let (m, s) = (0.3, 0.5);
    let all = SamplerConfig::default();
    let (small_mean, small) = final_moments(Variance::FixedSmall, &all, m, s);
    let (large_mean, large) = final_moments(Variance::FixedLarge, &all, m, s);
    // x_T has mean 0 in place of √ᾱ_T m: what is left of that is the only error of the mean.
    assert!((small_mean - m).abs() < 1e-4 && (large_mean - m).abs() < 1e-4, "{small_mean} {large_mean}");
    assert!(small < s * s && s * s < large, "{small} {large}");
    assert!(small > 0.97 * s * s && large < 1.03 * s * s, "{small} {large}");
    // DDIM follows an ordinary differential equation to the same place with an error of first order in the step.
    let ddim = |steps| SamplerConfig { sampler: SamplerKind::Ddim, steps, ..Default::default() };
    let error = |steps| (final_moments(Variance::FixedLarge, &ddim(steps), m, s).1.sqrt() - s).abs();
    let (half, tenth) = (error(100) / error(200), error(100) / error(1000));
    assert!((1.8..2.2).contains(&half) && (8.5..11.5).contains(&tenth), "{half} {tenth}");
}

#[test]
fn noise_is_added_at_every_step_but_the_last() {
    for spacing in [Spacing::Leading, Spacing::Trailing, Spacing::Linspace] {
        for variance in [Variance::FixedLarge, Variance::FixedSmall] {
            for (sampler, eta) in [(SamplerKind::Ddpm, 0.0), (SamplerKind::Ddim, 1.0)] {
                let diffusion = DiffusionConfig { variance, ..Default::default() };
                let config = SamplerConfig { sampler, eta, spacing, steps: 30, ..Default::default() };
                let (last, rest) =
                    table(&diffusion, &config, 1.0).steps.split_last().map(|(l, r)| (*l, r.to_vec())).unwrap();
                assert_eq!(last.sigma, 0.0);
                assert!(rest.iter().all(|step| step.sigma > 0.0));
                // The last state is x̂_0 itself.
                assert_eq!((last.c_x0, last.c_xt, last.c_eps), (1.0, 0.0, 0.0));
            }
        }
    }
    let ddim = SamplerConfig { sampler: SamplerKind::Ddim, steps: 30, ..Default::default() };
    assert!(table(&DiffusionConfig::default(), &ddim, 1.0).steps.iter().all(|step| step.sigma == 0.0));
}

#[test]
fn rows_are_finite_in_f32_for_every_schedule() {
    for schedule in [BetaSchedule::Linear, BetaSchedule::ScaledLinear, BetaSchedule::Cosine] {
        for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
            for timesteps in [1, 2, 1000, 4000] {
                let diffusion = DiffusionConfig { schedule, objective, timesteps, ..Default::default() };
                for (sampler, final_alpha_one) in
                    [(SamplerKind::Ddpm, true), (SamplerKind::Ddim, true), (SamplerKind::Ddim, false)]
                {
                    let config =
                        SamplerConfig { sampler, steps: timesteps, eta: 1.0, final_alpha_one, ..Default::default() };
                    for step in table(&diffusion, &config, 0.0).steps {
                        assert!(step.row().iter().all(|c| c.is_finite()), "{diffusion:?} {step:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn eta_outside_its_range_is_refused() {
    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    for eta in [-0.1, 1.1, f64::NAN] {
        let error = SamplerTable::new(&schedule, &SamplerConfig { eta, ..Default::default() }).unwrap_err();
        assert_eq!(error.key, "sample.eta");
    }
}

/// `docs/equations.md` names files and functions that exist, the functions in the files where it says they are.
#[test]
fn the_map_of_equations_is_true() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let map = std::fs::read_to_string(root.join("docs/equations.md")).unwrap();
    let (mut files, mut functions) = (0, 0);
    for row in map.lines().filter(|line| line.starts_with("| ")) {
        let mut source = None;
        for quoted in row.split('`').skip(1).step_by(2) {
            if quoted.starts_with("src/") {
                let text = std::fs::read_to_string(root.join(quoted));
                source = Some(text.unwrap_or_else(|e| panic!("{quoted}: {e}: {row}")));
                files += 1;
            } else if !quoted.ends_with('*') {
                let source = source.as_ref().unwrap_or_else(|| panic!("{quoted} in no file: {row}"));
                assert!(source.contains(&format!("fn {quoted}(")), "no fn {quoted}: {row}");
                functions += 1;
            }
        }
        let is_equation = ["| eq.", "| Algorithm", "| section"].iter().any(|start| row.starts_with(start));
        assert!(
            !is_equation || source.is_some() || row.contains("not implemented"),
            "neither here nor left out: {row}"
        );
    }
    // Equations 1 to 17, two algorithms, and the other papers': a table that is no longer read as one is noticed.
    assert!(files > 25 && functions > 30, "{files} files, {functions} functions");
}
