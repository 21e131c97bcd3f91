//! Samplers as tables: every reverse process is the same affine step with other coefficients.

use super::spacing::visited_timesteps;
use super::{SamplerConfig, SamplerKind, Schedule, Variance};
use crate::config::OutOfRange;

/// The smallest variance of a step, as diffusers clips it.
const MIN_VARIANCE: f64 = 1e-20;

/// One step of a reverse process, from x_t to the next state:
///
/// ```text
/// x̂_0  = clip(x0_from_xt·x_t + x0_from_out·out)
/// ε̂    =      eps_from_xt·x_t + eps_from_out·out          (not computed again from the clipped x̂_0)
/// next = c_x0·x̂_0 + c_xt·x_t + c_eps·ε̂ + sigma·z,   z ~ N(0, I)
/// ```
///
/// so that one fused kernel runs every sampler and every objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerStep {
    /// t, the integer that the network receives.
    pub timestep: u32,
    /// Factor of x_t in x̂_0.
    pub x0_from_xt: f64,
    /// Factor of the network's output in x̂_0.
    pub x0_from_out: f64,
    /// Factor of x_t in ε̂.
    pub eps_from_xt: f64,
    /// Factor of the network's output in ε̂.
    pub eps_from_out: f64,
    /// Factor of x̂_0 in the next state.
    pub c_x0: f64,
    /// Factor of x_t in the next state.
    pub c_xt: f64,
    /// Factor of ε̂ in the next state.
    pub c_eps: f64,
    /// Standard deviation of the noise added; where it is 0, z need not be drawn.
    pub sigma: f64,
}

impl SamplerStep {
    /// The coefficients, rounded to f32 at the end, in the order of the fields: what a kernel receives.
    pub fn row(&self) -> [f32; 8] {
        [
            self.x0_from_xt,
            self.x0_from_out,
            self.eps_from_xt,
            self.eps_from_out,
            self.c_x0,
            self.c_xt,
            self.c_eps,
            self.sigma,
        ]
        .map(|c| c as f32)
    }
}

/// A whole reverse process.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerTable {
    /// The K steps in visiting order.
    pub steps: Vec<SamplerStep>,
    /// x̂_0 is kept in [−clip, clip]; +∞ where clipping is off.
    pub clip: f64,
}

impl SamplerTable {
    /// The table of a sampler over a process.
    ///
    /// # Errors
    /// [`OutOfRange`] for a number of steps, an offset or an η that this process does not allow.
    pub fn new(schedule: &Schedule, config: &SamplerConfig) -> Result<SamplerTable, OutOfRange> {
        OutOfRange::check(
            (0.0..=1.0).contains(&config.eta),
            "sample.eta",
            config.eta,
            "0 to 1",
            "0 is deterministic and 1 has all the variance of the posterior; more has no square root",
        )?;
        let timesteps = visited_timesteps(config, schedule.timesteps())?;
        let stride = (schedule.timesteps() / config.steps) as u32;
        let steps = timesteps
            .iter()
            .enumerate()
            .map(|(i, &t)| {
                let next = timesteps.get(i + 1).copied();
                match config.sampler {
                    SamplerKind::Ddpm => ddpm_step(schedule, t, next),
                    SamplerKind::Ddim if config.uniform_stride => ddim_step(schedule, config, t, t.checked_sub(stride)),
                    SamplerKind::Ddim => ddim_step(schedule, config, t, next),
                }
            })
            .collect();
        Ok(SamplerTable { steps, clip: schedule.clip_limit() })
    }
}

/// Algorithm 2, line 4, on a subset of the timesteps: the posterior of eq. 7 at x̂_0 with α_t replaced by ᾱ_t/ᾱ_next (`next` is
/// the timestep visited afterwards), plus σ_t z with the variances of section 3.2.
///
/// After the last step (`next` is none) ᾱ is 1, the mean is x̂_0 itself and z = 0, as the algorithm says. diffusers adds noise
/// there if the last timestep is not 0 (a subset by the trailing spacing, or an offset).
fn ddpm_step(schedule: &Schedule, timestep: u32, next: Option<u32>) -> SamplerStep {
    let t = timestep as usize;
    let alpha_bar = schedule.alphas_cumprod[t];
    let alpha_bar_next = next.map_or(1.0, |next| schedule.alphas_cumprod[next as usize]);
    let alpha = alpha_bar / alpha_bar_next;
    let beta = 1.0 - alpha;
    let variance = match schedule.config.variance {
        Variance::FixedLarge => beta,
        Variance::FixedSmall => ((1.0 - alpha_bar_next) / (1.0 - alpha_bar) * beta).max(MIN_VARIANCE),
    };
    SamplerStep {
        c_x0: alpha_bar_next.sqrt() * beta / (1.0 - alpha_bar),
        c_xt: alpha.sqrt() * (1.0 - alpha_bar_next) / (1.0 - alpha_bar),
        c_eps: 0.0,
        sigma: if next.is_some() { variance.sqrt() } else { 0.0 },
        ..predictions(schedule, timestep)
    }
}

/// DDIM eq. 12, with σ_t of eq. 16 (Song, Meng, Ermon 2020): √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε̂ + σ z.
///
/// s is `next`, the timestep visited afterwards, unless `uniform_stride` says otherwise. Where there is none, ᾱ_s is 1 and σ = 0: the
/// next state is x̂_0. (An imported scheduler may want ᾱ_s = ᾱ_0 there, or end above 0 with an s of its own; then σ > 0 for η > 0.)
fn ddim_step(schedule: &Schedule, config: &SamplerConfig, timestep: u32, next: Option<u32>) -> SamplerStep {
    let alpha_bar = schedule.alphas_cumprod[timestep as usize];
    let alpha_bar_next = match next {
        Some(next) => schedule.alphas_cumprod[next as usize],
        None if config.final_alpha_one => 1.0,
        None => schedule.alphas_cumprod[0],
    };
    let variance = (1.0 - alpha_bar_next) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_next);
    let sigma = config.eta * variance.sqrt();
    SamplerStep {
        c_x0: alpha_bar_next.sqrt(),
        c_xt: 0.0,
        // Rounding may leave a variance of 0 a little below it.
        c_eps: (1.0 - alpha_bar_next - sigma * sigma).max(0.0).sqrt(),
        sigma,
        ..predictions(schedule, timestep)
    }
}

/// The half of a step that depends on the objective alone.
fn predictions(schedule: &Schedule, timestep: u32) -> SamplerStep {
    let [x0_from_xt, x0_from_out] = schedule.start_coefficients(timestep as usize);
    let [eps_from_xt, eps_from_out] = schedule.noise_coefficients(timestep as usize);
    let (c_x0, c_xt, c_eps, sigma) = (0.0, 0.0, 0.0, 0.0);
    SamplerStep { timestep, x0_from_xt, x0_from_out, eps_from_xt, eps_from_out, c_x0, c_xt, c_eps, sigma }
}

/// [`SamplerStep`] in f64 on slices of equal length: what kernels are tested against.
pub fn p_sample_step(step: &SamplerStep, clip: f64, x_t: &[f64], out: &[f64], z: &[f64]) -> Vec<f64> {
    let one = |((&x_t, &out), &z): ((&f64, &f64), &f64)| {
        let x_start = (step.x0_from_xt * x_t + step.x0_from_out * out).clamp(-clip, clip);
        let noise = step.eps_from_xt * x_t + step.eps_from_out * out;
        step.c_x0 * x_start + step.c_xt * x_t + step.c_eps * noise + step.sigma * z
    };
    x_t.iter().zip(out).zip(z).map(one).collect()
}
