//! β_t and everything that follows from it, as tables over t in f64.
//!
//! The paper's t runs 1 … T; index t here runs 0 … T−1, and is the integer that the network receives. f64 matters: in f32
//! 1 − ᾱ_0 is off by 1.7e-4 of itself.

use super::{BetaSchedule, DiffusionConfig};
use crate::config::OutOfRange;

/// The largest T: more than anyone trains with, and few enough for a hostile number to take no memory worth the name.
pub const MAX_TIMESTEPS: usize = 1_000_000;
/// The β of [`is_beta`], in words.
pub const BETA_RANGE: &str = "above 2^-54 and below 1";
/// The smallest ᾱ_T: x̂_0 is scaled by 1/√ᾱ, which must leave room in f32.
const MIN_ALPHA_CUMPROD: f64 = 1e-30;
/// The largest β of the cosine schedule (Nichol & Dhariwal 2021, section 3.2).
const COSINE_MAX_BETA: f64 = 0.999;

/// The forward process: all its tables have T entries.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Schedule {
    /// What the tables were built from.
    pub config: DiffusionConfig,
    /// β_t.
    pub betas: Vec<f64>,
    /// α_t = 1 − β_t.
    pub alphas: Vec<f64>,
    /// ᾱ_t = ∏_{s≤t} α_s (eq. 4).
    pub alphas_cumprod: Vec<f64>,
    /// ᾱ_{t−1}, with ᾱ = 1 before the first step.
    pub alphas_cumprod_prev: Vec<f64>,
    /// √ᾱ_t.
    pub sqrt_alphas_cumprod: Vec<f64>,
    /// √(1−ᾱ_t).
    pub sqrt_one_minus_alphas_cumprod: Vec<f64>,
    /// √(1/ᾱ_t).
    pub sqrt_recip_alphas_cumprod: Vec<f64>,
    /// √(1/ᾱ_t − 1).
    pub sqrt_recipm1_alphas_cumprod: Vec<f64>,
    /// β̃_t (eq. 7); 0 at t = 0.
    pub posterior_variance: Vec<f64>,
    /// ln β̃_t, with the value of t = 1 repeated at t = 0, where the logarithm is −∞.
    pub posterior_log_variance_clipped: Vec<f64>,
    /// The factor of x_0 in μ̃_t (eq. 7).
    pub posterior_mean_coef1: Vec<f64>,
    /// The factor of x_t in μ̃_t (eq. 7).
    pub posterior_mean_coef2: Vec<f64>,
}

impl Schedule {
    /// Builds the tables.
    ///
    /// # Errors
    /// [`OutOfRange`] for a config that describes no process.
    pub fn new(config: &DiffusionConfig) -> Result<Schedule, OutOfRange> {
        let betas = betas(config)?;
        let clip = config.clip as f32;
        OutOfRange::check(
            config.clip == 0.0 || (clip > 0.0 && clip.is_finite()),
            "diffusion.clip",
            config.clip,
            "0 (no clipping) or a positive number that f32 can hold",
            "predicted pixels are limited to [-clip, clip]",
        )?;
        let alphas: Vec<f64> = betas.iter().map(|beta| 1.0 - beta).collect();
        let alphas_cumprod: Vec<f64> = alphas
            .iter()
            .scan(1.0, |product, alpha| {
                *product *= alpha;
                Some(*product)
            })
            .collect();
        let last = alphas_cumprod[alphas_cumprod.len() - 1];
        OutOfRange::check(
            last >= MIN_ALPHA_CUMPROD,
            "the product of all 1 - beta",
            format!("{last:e}"),
            format!("{MIN_ALPHA_CUMPROD:e} or more"),
            "nothing of the image is left at the last step; use smaller betas or fewer timesteps",
        )?;
        let alphas_cumprod_prev: Vec<f64> =
            std::iter::once(1.0).chain(alphas_cumprod.iter().copied()).take(betas.len()).collect();

        let of_alpha_bar = |f: fn(f64) -> f64| alphas_cumprod.iter().map(|&a| f(a)).collect::<Vec<f64>>();
        let of_step = |f: fn(f64, f64, f64) -> f64| {
            let steps = betas.iter().zip(&alphas_cumprod).zip(&alphas_cumprod_prev);
            steps.map(|((&beta, &bar), &prev)| f(beta, bar, prev)).collect::<Vec<f64>>()
        };
        let posterior_variance = of_step(|beta, bar, prev| (1.0 - prev) / (1.0 - bar) * beta);
        let mut posterior_log_variance_clipped: Vec<f64> = posterior_variance.iter().map(|v| v.ln()).collect();
        posterior_log_variance_clipped[0] = posterior_log_variance_clipped.get(1).copied().unwrap_or(betas[0].ln());
        Ok(Schedule {
            config: config.clone(),
            sqrt_alphas_cumprod: of_alpha_bar(f64::sqrt),
            sqrt_one_minus_alphas_cumprod: of_alpha_bar(|a| (1.0 - a).sqrt()),
            sqrt_recip_alphas_cumprod: of_alpha_bar(|a| (1.0 / a).sqrt()),
            sqrt_recipm1_alphas_cumprod: of_alpha_bar(|a| (1.0 / a - 1.0).sqrt()),
            posterior_mean_coef1: of_step(|beta, bar, prev| prev.sqrt() * beta / (1.0 - bar)),
            posterior_mean_coef2: of_step(|beta, bar, prev| (1.0 - beta).sqrt() * (1.0 - prev) / (1.0 - bar)),
            posterior_variance,
            posterior_log_variance_clipped,
            betas,
            alphas,
            alphas_cumprod,
            alphas_cumprod_prev,
        })
    }

    /// T.
    pub fn timesteps(&self) -> usize {
        self.betas.len()
    }
}

/// Whether a step with this β adds noise and leaves some of the image, as far as f64 can tell: below 2⁻⁵⁴ 1 − β is 1, and then 1 − ᾱ_0,
/// by which eq. 7 and 11 divide, is 0.
pub fn is_beta(beta: f64) -> bool {
    beta < 1.0 && 1.0 - beta < 1.0
}

/// β_0 … β_{T−1}, each [one](is_beta).
fn betas(config: &DiffusionConfig) -> Result<Vec<f64>, OutOfRange> {
    let n = config.timesteps;
    OutOfRange::check(
        (1..=MAX_TIMESTEPS).contains(&n),
        "diffusion.timesteps",
        n,
        format!("1 to {MAX_TIMESTEPS}"),
        "it is the number of steps of the forward process",
    )?;
    let check = |key: String, beta: f64| {
        let why = "each step must add some noise (1 - beta must be less than 1 in f64) and leave some of the image";
        OutOfRange::check(is_beta(beta), &key, beta, BETA_RANGE, why)
    };
    if let Some(betas) = &config.trained_betas {
        OutOfRange::check(
            betas.len() == n,
            "diffusion.trained_betas",
            format!("{} values", betas.len()),
            format!("{n} values"),
            "there is one beta for each of diffusion.timesteps",
        )?;
        for (t, &beta) in betas.iter().enumerate() {
            check(format!("diffusion.trained_betas[{t}]"), beta)?;
        }
        return Ok(betas.clone());
    }
    if config.schedule != BetaSchedule::Cosine {
        check("diffusion.beta_start".into(), config.beta_start)?;
        check("diffusion.beta_end".into(), config.beta_end)?;
    }
    Ok(match config.schedule {
        BetaSchedule::Linear => linspace(config.beta_start, config.beta_end, n).collect(),
        BetaSchedule::ScaledLinear => {
            linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), n).map(|root| root * root).collect()
        }
        BetaSchedule::Cosine => cosine_betas(n).collect(),
    })
}

/// n values from `start` to `end`, both included; `start` alone if n = 1.
fn linspace(start: f64, end: f64, n: usize) -> impl Iterator<Item = f64> {
    let step = if n > 1 { (end - start) / (n - 1) as f64 } else { 0.0 };
    (0..n).map(move |i| if i > 0 && i == n - 1 { end } else { start + i as f64 * step })
}

/// The cosine schedule (Nichol & Dhariwal 2021, eq. 17): ᾱ(t) = f(t)/f(0) with f(t) = cos²((t/T + s)/(1 + s) · π/2),
/// s = 0.008; β_t = min(1 − ᾱ(t+1)/ᾱ(t), 0.999).
fn cosine_betas(n: usize) -> impl Iterator<Item = f64> {
    const S: f64 = 0.008;
    let f = move |t: usize| ((t as f64 / n as f64 + S) / (1.0 + S) * std::f64::consts::FRAC_PI_2).cos().powi(2);
    (0..n).map(move |t| (1.0 - f(t + 1) / f(t)).min(COSINE_MAX_BETA))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64, relative: f64) {
        assert!((found / expected - 1.0).abs() < relative, "{found:e}, expected {expected:e}");
    }

    /// Ten significant digits of the paper's process, as others compute them in f64.
    #[test]
    fn golden_values_of_the_paper() {
        let s = Schedule::new(&DiffusionConfig::default()).unwrap();
        assert_eq!(s.timesteps(), 1000);
        assert_eq!((s.betas[0], s.betas[999]), (1e-4, 0.02));
        close(s.alphas_cumprod[0], 0.9999, 1e-15);
        close(s.alphas_cumprod[500], 0.07779665837, 1e-10);
        close(s.alphas_cumprod[999], 4.035829765e-5, 2e-10);
        close(s.posterior_variance[1], 5.453187661e-5, 2e-10);
        close(s.sqrt_recip_alphas_cumprod[999], 157.4104573, 4e-10);
        // The likelihood's clipped log-variance of t = 0 is that of t = 1.
        assert_eq!(s.posterior_variance[0], 0.0);
        assert_eq!(s.posterior_log_variance_clipped[0], s.posterior_log_variance_clipped[1]);
        close(s.posterior_log_variance_clipped[0], -9.8167, 1e-5);
        // What f32 would lose: 1 − ᾱ_0 is β_0.
        close(1.0 - s.alphas_cumprod[0], 1e-4, 1e-11);
    }

    #[test]
    fn tables_agree_with_each_other() {
        for schedule in [BetaSchedule::Linear, BetaSchedule::ScaledLinear, BetaSchedule::Cosine] {
            let s = Schedule::new(&DiffusionConfig { schedule, ..Default::default() }).unwrap();
            for t in 0..s.timesteps() {
                let (bar, prev) = (s.alphas_cumprod[t], s.alphas_cumprod_prev[t]);
                assert!(bar < prev && bar > 0.0);
                close(s.alphas[t], bar / prev, 1e-15);
                close(s.sqrt_alphas_cumprod[t].powi(2) + s.sqrt_one_minus_alphas_cumprod[t].powi(2), 1.0, 1e-15);
                close(s.sqrt_recipm1_alphas_cumprod[t], s.sqrt_one_minus_alphas_cumprod[t] / bar.sqrt(), 1e-11);
                // μ̃ of the noiseless x_t = √ᾱ_t x_0 is the noiseless x_{t−1}.
                close(s.posterior_mean_coef1[t] + s.posterior_mean_coef2[t] * bar.sqrt(), prev.sqrt(), 1e-11);
                if t > 0 {
                    close(s.posterior_log_variance_clipped[t].exp(), s.posterior_variance[t], 1e-12);
                    // 1/β̃ = α_t/β_t + 1/(1 − ᾱ_{t−1}): the product of the two Gaussians of Bayes' rule.
                    close(1.0 / s.posterior_variance[t], s.alphas[t] / s.betas[t] + 1.0 / (1.0 - prev), 1e-11);
                }
            }
        }
    }

    #[test]
    fn cosine_follows_its_closed_form_until_it_is_clipped() {
        let n = 1000;
        let config = DiffusionConfig { schedule: BetaSchedule::Cosine, timesteps: n, ..Default::default() };
        let s = Schedule::new(&config).unwrap();
        let f = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
        for t in 0..n - 1 {
            close(s.alphas_cumprod[t], f((t + 1) as f64 / n as f64) / f(0.0), 1e-9);
        }
        assert_eq!(s.betas[n - 1], 0.999);
    }

    #[test]
    fn shortest_processes_and_given_betas() {
        let config = DiffusionConfig { timesteps: 1, beta_start: 0.3, ..Default::default() };
        let s = Schedule::new(&config).unwrap();
        assert_eq!((s.betas[0], s.alphas_cumprod[0]), (0.3, 0.7));
        close(s.posterior_mean_coef1[0], 1.0, 1e-15);
        assert!(s.posterior_log_variance_clipped[0].is_finite());
        let trained_betas = Some(vec![0.1, 0.5]);
        let s = Schedule::new(&DiffusionConfig { timesteps: 2, trained_betas, ..Default::default() }).unwrap();
        assert_eq!(s.alphas_cumprod, [0.9, 0.45]);
    }

    #[test]
    fn impossible_configs_name_the_key_the_value_and_the_reason() {
        let base = DiffusionConfig::default;
        for (config, key, value) in [
            (DiffusionConfig { timesteps: 0, ..base() }, "diffusion.timesteps", "0"),
            (DiffusionConfig { timesteps: 1_000_001, ..base() }, "diffusion.timesteps", "1000001"),
            (DiffusionConfig { beta_start: 0.0, ..base() }, "diffusion.beta_start", "0"),
            (DiffusionConfig { beta_start: f64::NAN, ..base() }, "diffusion.beta_start", "NaN"),
            (DiffusionConfig { beta_end: 1.0, ..base() }, "diffusion.beta_end", "1"),
            (DiffusionConfig { beta_end: -0.5, ..base() }, "diffusion.beta_end", "-0.5"),
            (DiffusionConfig { clip: -1.0, ..base() }, "diffusion.clip", "-1"),
            (DiffusionConfig { clip: f64::INFINITY, ..base() }, "diffusion.clip", "inf"),
            (
                DiffusionConfig { timesteps: 2, trained_betas: Some(vec![0.1]), ..base() },
                "diffusion.trained_betas",
                "1 values",
            ),
            (
                DiffusionConfig { timesteps: 2, trained_betas: Some(vec![0.1, 1.5]), ..base() },
                "diffusion.trained_betas[1]",
                "1.5",
            ),
        ] {
            let error = Schedule::new(&config).unwrap_err();
            assert_eq!((error.key.as_str(), error.value.as_str()), (key, value));
            let message = error.to_string();
            assert!(message.contains(key) && !error.range.is_empty() && !error.why.is_empty(), "{message}");
        }
        // 1 − 2⁻⁵⁴ lies between two f64 and is rounded to 1. Kernels clip in f32, where 1e-60 is 0, no clipping, and 1e39 is ∞.
        for (config, key) in [
            (DiffusionConfig { beta_start: 0.5f64.powi(54), ..base() }, "diffusion.beta_start"),
            (DiffusionConfig { clip: 1e-60, ..base() }, "diffusion.clip"),
            (DiffusionConfig { clip: 1e39, ..base() }, "diffusion.clip"),
        ] {
            assert_eq!(Schedule::new(&config).unwrap_err().key, key);
        }
        // The smallest β that adds noise gives finite tables.
        let config = DiffusionConfig { timesteps: 2, beta_start: 1e-16, beta_end: 1e-16, ..base() };
        let s = Schedule::new(&config).unwrap();
        for t in 0..2 {
            assert!(s.sqrt_one_minus_alphas_cumprod[t] > 0.0 && s.noise_coefficients(t).iter().all(|c| c.is_finite()));
            assert!(s.posterior_mean_coef1[t].is_finite() && s.posterior_mean_coef2[t].is_finite());
        }
        // 100 steps of β = 0.9 leave 1e-100 of the image.
        let config = DiffusionConfig { timesteps: 100, beta_start: 0.9, beta_end: 0.9, ..base() };
        assert!(Schedule::new(&config).unwrap_err().to_string().contains("smaller betas"));
        // The clipped cosine never gets there.
        Schedule::new(&DiffusionConfig { timesteps: 4000, schedule: BetaSchedule::Cosine, ..base() }).unwrap();
    }
}
