//! Whole reverse processes: against diffusers, against closed forms, and with a network that knows the answer.

use super::*;
use serde::Deserialize;

const SPACINGS: [Spacing; 3] = [Spacing::Leading, Spacing::Trailing, Spacing::Linspace];

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
            let sampler = SamplerConfig { uniform_stride: true, ..case.sampler.clone() };
            let table = table(&case.diffusion, &sampler, clip);
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

/// With one image in the data set the true ε is known at every x_t, and is the same at all of them: after each step DDIM must be where
/// eq. 4 puts that image with that noise, and after the last one at the image.
#[test]
fn ddim_stays_on_the_path_of_the_only_image() {
    let image = [-1.0, -0.37, 0.0, 0.52, 1.0];
    for objective in [Objective::Epsilon, Objective::X0, Objective::V] {
        for (clip, spacing) in [0.0, 1.0].into_iter().flat_map(|clip| SPACINGS.map(|spacing| (clip, spacing))) {
            for steps in [1, 2, 7, 50, 61, 300, 600, 1000] {
                let config = DiffusionConfig { objective, clip, ..Default::default() };
                let schedule = Schedule::new(&config).unwrap();
                let sampler = SamplerConfig { sampler: SamplerKind::Ddim, steps, spacing, ..Default::default() };
                let table = SamplerTable::new(&schedule, &sampler).unwrap();
                let visited: Vec<usize> = table.steps.iter().map(|step| step.timestep as usize).collect();
                let mut x = vec![2.1, -0.3, 0.0, 1.1, -1.9];
                let noise_of = |x: &[f64], t: usize| -> Vec<f64> {
                    x.iter().zip(image).map(|(&x_t, x0)| schedule.predict_noise_from_start(x_t, t, x0)).collect()
                };
                let noise = noise_of(&x, visited[0]);
                let mut bounds = [0.0; 5];
                for (i, step) in table.steps.iter().enumerate() {
                    let (t, next) = (visited[i], visited.get(i + 1));
                    let [of_start, of_noise] = schedule.target_coefficients(t);
                    let out: Vec<f64> =
                        noise_of(&x, t).iter().zip(image).map(|(e, x0)| of_start * x0 + of_noise * e).collect();
                    // √(ᾱ_s/ᾱ_t) scales x_t; √(1/ᾱ_t − 1), the factor of ε, is known to ε_64/√(ᾱ_t(1−ᾱ_t)). Eight roundings
                    // a step of terms of these sizes; those of earlier steps grow no more, for √(1−ᾱ) falls.
                    let [signal, sqrt_one_minus] = schedule.q_sample_coefficients(t);
                    let scale = next.map_or(1.0, |&s| schedule.q_sample_coefficients(s)[0]) / signal;
                    for (bound, (x, e)) in bounds.iter_mut().zip(x.iter().zip(&noise)) {
                        *bound += 8.0 * f64::EPSILON * scale * (1.0 + x.abs() + e.abs() / sqrt_one_minus);
                    }
                    x = p_sample_step(step, table.clip, &x, &out, &[0.0; 5]);
                    for j in 0..5 {
                        let expected = next.map_or(image[j], |&s| schedule.q_sample(image[j], s, noise[j]));
                        let what = format!("{objective:?} {spacing:?}, {steps} steps, t = {t}");
                        assert!((x[j] - expected).abs() <= bounds[j], "{what}: {} instead of {expected}", x[j]);
                    }
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

/// For data between the two, the two variances bound the truth from both sides, and by how much is known: all states are Gaussian,
/// V_t = ᾱ_t s² + 1 − ᾱ_t is what their variance should be, and the mean of p_θ has the slope Cov(x_s, x_t)/V_t = √(ᾱ_t/ᾱ_s) V_s/V_t.
#[test]
fn algorithm_2_brackets_gaussian_data() {
    let (m, s) = (0.3, 0.5);
    let alphas_cumprod = Schedule::new(&DiffusionConfig::default()).unwrap().alphas_cumprod;
    for steps in [1000, 300, 50, 7] {
        let sampler = SamplerConfig { steps, ..Default::default() };
        // ᾱ of the states, from x_T to the image.
        let visited = spacing::visited_timesteps(&sampler, 1000).unwrap();
        let alpha_bars: Vec<f64> = visited.iter().map(|&t| alphas_cumprod[t as usize]).chain([1.0]).collect();
        let exact = |variance: Variance| {
            let (mut mean, mut var) = (0.0, 1.0);
            for pair in alpha_bars.windows(2) {
                let (bar, next) = (pair[0], pair[1]);
                let alpha = bar / next;
                let wanted = |bar: f64| bar * s * s + 1.0 - bar;
                let slope = alpha.sqrt() * wanted(next) / wanted(bar);
                let sigma2 = match variance {
                    _ if next == 1.0 => 0.0,
                    Variance::FixedLarge => 1.0 - alpha,
                    Variance::FixedSmall => (1.0 - next) / (1.0 - bar) * (1.0 - alpha),
                };
                mean = next.sqrt() * m + slope * (mean - bar.sqrt() * m);
                var = slope * slope * var + sigma2;
            }
            (mean, var)
        };
        let [small, large] = [Variance::FixedSmall, Variance::FixedLarge].map(|variance| {
            let (found, expected) = (final_moments(variance, &sampler, m, s), exact(variance));
            // 1 − ᾱ_0 is known to ε/(1 − ᾱ_0) = 2e-12, and so is the last step's slope.
            assert!((found.0 - expected.0).abs() < 4e-12, "{steps} {variance:?}: mean {found:?} {expected:?}");
            assert!((found.1 - expected.1).abs() < 4e-12, "{steps} {variance:?}: variance {found:?} {expected:?}");
            found.1
        });
        assert!(small < s * s && s * s < large, "{steps}: {small} {large}");
    }
}

/// DDIM on N(m, s²) turns the vector u_t = (√ᾱ_t s, √(1−ᾱ_t)), whose length is the standard deviation of x_t, from u_T to (s, 0), and
/// projects it at each step: x_s − √ᾱ_s m = (u_s·u_t/|u_t|²) (x_t − √ᾱ_t m). So the standard deviation is short by the cosines of the
/// angles between the states, an error of first order in the largest angle, whatever the spacing and the number of steps.
#[test]
fn ddim_ends_at_gaussian_data_for_every_number_of_steps() {
    let (m, s) = (0.3, 0.5);
    let schedule = Schedule::new(&DiffusionConfig::default()).unwrap();
    for spacing in SPACINGS {
        for steps in 1..=1000 {
            let sampler = SamplerConfig { sampler: SamplerKind::Ddim, steps, spacing, ..Default::default() };
            let visited = spacing::visited_timesteps(&sampler, 1000).unwrap();
            let states = visited.iter().map(|&t| schedule.q_sample_coefficients(t as usize));
            let angle = |[signal, noise]: [f64; 2]| noise.atan2(signal * s);
            let angles: Vec<f64> = states.map(angle).chain([0.0]).collect();
            let cosines: f64 = angles.windows(2).map(|a| (a[0] - a[1]).cos()).product();
            let [signal, noise] = schedule.q_sample_coefficients(visited[0] as usize);
            // x_T has the variance 1 and the mean 0 instead of |u_T|² and √ᾱ_T m.
            let expected = s / (signal * s).hypot(noise) * cosines;
            let (mean, var) = final_moments(Variance::FixedLarge, &sampler, m, s);
            // A step's slope is the difference of terms of the size of √(ᾱ_s/ᾱ_t), with E[ε | x_t] divided by V_t ≥ s²: eight roundings
            // of that, which the other steps, |u_s|/|u_t| ≤ 1/s together, multiply.
            let signals = visited.iter().map(|&t| schedule.q_sample_coefficients(t as usize)[0]).chain([1.0]);
            let signals: Vec<f64> = signals.collect();
            let bound = 8.0 * f64::EPSILON / (s * s * s) * signals.windows(2).map(|a| a[1] / a[0]).sum::<f64>();
            let std = var.sqrt();
            assert!((std - expected).abs() < bound, "{spacing:?} {steps}: {std} instead of {expected}");
            let expected = m - signal * m * expected;
            assert!((mean - expected).abs() < bound, "{spacing:?} {steps}: {mean} instead of {expected}");
            // 1 − ∏ cos θ_i ≤ Σ θ_i²/2 ≤ max θ_i · Σ θ_i/2, and the angles add up to at most π/2.
            let largest = angles.windows(2).map(|a| a[0] - a[1]).fold(0.0, f64::max);
            assert!(1.0 - cosines <= std::f64::consts::FRAC_PI_4 * largest, "{spacing:?} {steps}: {cosines}");
        }
    }
}

#[test]
fn noise_is_added_at_every_step_but_the_last() {
    for spacing in SPACINGS {
        for variance in [Variance::FixedLarge, Variance::FixedSmall] {
            for (sampler, eta) in [(SamplerKind::Ddpm, 0.0), (SamplerKind::Ddim, 1.0)] {
                let diffusion = DiffusionConfig { variance, ..Default::default() };
                let schedule = Schedule::new(&diffusion).unwrap();
                for steps in 1..=1000 {
                    let config = SamplerConfig { sampler, eta, spacing, steps, ..Default::default() };
                    let table = SamplerTable::new(&schedule, &config).unwrap();
                    let (last, rest) = table.steps.split_last().unwrap();
                    let what = format!("{sampler:?} {spacing:?} {variance:?}, {steps} steps");
                    assert_eq!(last.sigma, 0.0, "{what}");
                    assert!(rest.iter().all(|step| step.sigma > 0.0), "{what}");
                    // The last state is x̂_0 itself.
                    assert_eq!((last.c_x0, last.c_xt, last.c_eps), (1.0, 0.0, 0.0), "{what}");
                }
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
