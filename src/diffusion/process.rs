//! q, p and the three things a network can predict, one value at a time in f64: what the kernels of
//! `ops` (`q_sample`, `mse_loss`, `p_sample`) are tested against.

use super::{Objective, Schedule, Variance};

impl Schedule {
    /// Eq. 2: q(x_t | x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t I). Returns (mean, variance).
    pub fn q_step(&self, x_prev: f64, t: usize) -> (f64, f64) {
        (self.alphas[t].sqrt() * x_prev, self.betas[t])
    }

    /// Eq. 4: q(x_t | x_0) = N(√ᾱ_t x_0, (1−ᾱ_t) I). Returns (mean, variance).
    pub fn q_mean_variance(&self, x_start: f64, t: usize) -> (f64, f64) {
        (self.sqrt_alphas_cumprod[t] * x_start, 1.0 - self.alphas_cumprod[t])
    }

    /// Eq. 4: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε.
    pub fn q_sample(&self, x_start: f64, t: usize, noise: f64) -> f64 {
        self.sqrt_alphas_cumprod[t] * x_start + self.sqrt_one_minus_alphas_cumprod[t] * noise
    }

    /// Eq. 6 and 7: q(x_{t−1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I). Returns (μ̃_t, β̃_t).
    pub fn q_posterior(&self, x_start: f64, x_t: f64, t: usize) -> (f64, f64) {
        let mean = self.posterior_mean_coef1[t] * x_start + self.posterior_mean_coef2[t] * x_t;
        (mean, self.posterior_variance[t])
    }

    /// Eq. 15: x̂_0 = (x_t − √(1−ᾱ_t) ε)/√ᾱ_t.
    pub fn predict_start_from_noise(&self, x_t: f64, t: usize, noise: f64) -> f64 {
        self.sqrt_recip_alphas_cumprod[t] * x_t - self.sqrt_recipm1_alphas_cumprod[t] * noise
    }

    /// Eq. 4 solved for ε: (x_t − √ᾱ_t x_0)/√(1−ᾱ_t).
    pub fn predict_noise_from_start(&self, x_t: f64, t: usize, x_start: f64) -> f64 {
        (x_t - self.sqrt_alphas_cumprod[t] * x_start) / self.sqrt_one_minus_alphas_cumprod[t]
    }

    /// v = √ᾱ_t ε − √(1−ᾱ_t) x_0 (Salimans & Ho 2022, section 4).
    pub fn predict_v(&self, x_start: f64, t: usize, noise: f64) -> f64 {
        self.sqrt_alphas_cumprod[t] * noise - self.sqrt_one_minus_alphas_cumprod[t] * x_start
    }

    /// x̂_0 = √ᾱ_t x_t − √(1−ᾱ_t) v (Salimans & Ho 2022, section 4).
    pub fn predict_start_from_v(&self, x_t: f64, t: usize, v: f64) -> f64 {
        self.sqrt_alphas_cumprod[t] * x_t - self.sqrt_one_minus_alphas_cumprod[t] * v
    }

    /// ε̂ = √(1−ᾱ_t) x_t + √ᾱ_t v: the other half of the rotation by which v is defined.
    pub fn predict_noise_from_v(&self, x_t: f64, t: usize, v: f64) -> f64 {
        self.sqrt_one_minus_alphas_cumprod[t] * x_t + self.sqrt_alphas_cumprod[t] * v
    }

    /// Eq. 11: μ_θ(x_t, t) = (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t; the mean where x̂_0 is not clipped.
    pub fn p_mean_from_noise(&self, x_t: f64, t: usize, noise: f64) -> f64 {
        (x_t - self.betas[t] / self.sqrt_one_minus_alphas_cumprod[t] * noise) / self.alphas[t].sqrt()
    }

    /// p_θ(x_{t−1} | x_t) = N(μ_θ, σ_t² I): the posterior of eq. 7 at the predicted x̂_0, which is clipped **before** the mean
    /// is taken, with σ_t² of section 3.2. Returns (μ_θ, σ_t²).
    pub fn p_mean_variance(&self, x_t: f64, t: usize, out: f64) -> (f64, f64) {
        let [from_xt, from_out] = self.start_coefficients(t);
        let limit = self.clip_limit();
        let x_start = (from_xt * x_t + from_out * out).clamp(-limit, limit);
        (self.q_posterior(x_start, x_t, t).0, self.p_variance(t))
    }

    /// Section 3.2: σ_t² is β_t ("fixed large") or β̃_t ("fixed small").
    pub fn p_variance(&self, t: usize) -> f64 {
        match self.config.variance {
            Variance::FixedLarge => self.betas[t],
            Variance::FixedSmall => self.posterior_variance[t],
        }
    }

    /// x̂_0 is kept in [−limit, limit]; +∞ where clipping is off.
    pub fn clip_limit(&self) -> f64 {
        if self.config.clip == 0.0 { f64::INFINITY } else { self.config.clip }
    }

    /// The factors of (x_t, network output) in x̂_0: eq. 15 for ε, nothing for x_0, a rotation for v.
    pub fn start_coefficients(&self, t: usize) -> [f64; 2] {
        match self.config.objective {
            Objective::Epsilon => [self.sqrt_recip_alphas_cumprod[t], -self.sqrt_recipm1_alphas_cumprod[t]],
            Objective::X0 => [0.0, 1.0],
            Objective::V => [self.sqrt_alphas_cumprod[t], -self.sqrt_one_minus_alphas_cumprod[t]],
        }
    }

    /// The factors of (x_t, network output) in ε̂.
    pub fn noise_coefficients(&self, t: usize) -> [f64; 2] {
        let [signal, noise] = self.q_sample_coefficients(t);
        match self.config.objective {
            Objective::Epsilon => [0.0, 1.0],
            Objective::X0 => [1.0 / noise, -signal / noise],
            Objective::V => [noise, signal],
        }
    }

    /// The factors of (x_0, ε) in x_t: √ᾱ_t and √(1−ᾱ_t) (eq. 4).
    pub fn q_sample_coefficients(&self, t: usize) -> [f64; 2] {
        [self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]]
    }

    /// The factors of (x_0, ε) in what the network is to predict: (0, 1) for ε (eq. 14), (1, 0) for x_0,
    /// (−√(1−ᾱ_t), √ᾱ_t) for v.
    pub fn target_coefficients(&self, t: usize) -> [f64; 2] {
        match self.config.objective {
            Objective::Epsilon => [0.0, 1.0],
            Objective::X0 => [1.0, 0.0],
            Objective::V => [-self.sqrt_one_minus_alphas_cumprod[t], self.sqrt_alphas_cumprod[t]],
        }
    }

    /// [`Schedule::q_sample_coefficients`] of every t, rounded to f32 at the end: `[T, 2]`.
    pub fn q_sample_table(&self) -> Vec<[f32; 2]> {
        (0..self.timesteps()).map(|t| self.q_sample_coefficients(t).map(|c| c as f32)).collect()
    }

    /// [`Schedule::target_coefficients`] of every t, rounded to f32 at the end: `[T, 2]`.
    pub fn target_table(&self) -> Vec<[f32; 2]> {
        (0..self.timesteps()).map(|t| self.target_coefficients(t).map(|c| c as f32)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::DiffusionConfig;

    const OBJECTIVES: [Objective; 3] = [Objective::Epsilon, Objective::X0, Objective::V];

    fn schedule(objective: Objective, clip: f64) -> Schedule {
        Schedule::new(&DiffusionConfig { objective, clip, ..Default::default() }).unwrap()
    }

    fn close(found: f64, expected: f64) {
        // Cancellation in x̂_0 at t = T−1 costs a factor of 1/√ᾱ = 157.
        assert!((found - expected).abs() < 1e-12, "{found:e}, expected {expected:e}");
    }

    #[test]
    fn predictions_invert_q_sample() {
        let s = schedule(Objective::Epsilon, 0.0);
        for t in [0, 1, 2, 250, 500, 998, 999] {
            for (x, noise) in [(0.3, -1.7), (-1.0, 0.2), (0.9, 3.0)] {
                let x_t = s.q_sample(x, t, noise);
                let v = s.predict_v(x, t, noise);
                close(s.predict_start_from_noise(x_t, t, noise), x);
                close(s.predict_noise_from_start(x_t, t, x), noise);
                close(s.predict_start_from_v(x_t, t, v), x);
                close(s.predict_noise_from_v(x_t, t, v), noise);
            }
        }
    }

    /// A network that hits its target exactly gives back x_0 and ε, whatever it predicts.
    #[test]
    fn coefficients_of_every_objective_recover_start_and_noise() {
        for objective in OBJECTIVES {
            let s = schedule(objective, 0.0);
            for t in [0, 1, 500, 999] {
                let (x, noise) = (0.4, -1.3);
                let mix = |[a, b]: [f64; 2], p: f64, q: f64| a * p + b * q;
                let x_t = mix(s.q_sample_coefficients(t), x, noise);
                let out = mix(s.target_coefficients(t), x, noise);
                close(x_t, s.q_sample(x, t, noise));
                close(mix(s.start_coefficients(t), x_t, out), x);
                close(mix(s.noise_coefficients(t), x_t, out), noise);
            }
        }
    }

    #[test]
    fn equation_11_is_the_posterior_mean_at_the_predicted_start() {
        let s = schedule(Objective::Epsilon, 0.0);
        for t in [0, 1, 10, 500, 999] {
            for (x_t, noise) in [(0.7, 0.1), (-2.0, 1.5)] {
                let (mean, variance) = s.p_mean_variance(x_t, t, noise);
                close(mean, s.p_mean_from_noise(x_t, t, noise));
                assert_eq!(variance, s.betas[t]);
            }
        }
    }

    /// One step of eq. 2 after eq. 4 at t−1 is eq. 4 at t; Bayes' rule on the two gives eq. 7.
    #[test]
    fn forward_steps_compose_and_the_posterior_inverts_them() {
        let s = schedule(Objective::Epsilon, 0.0);
        for t in [1, 2, 100, 999] {
            let x = 0.6;
            let (mean, variance) = s.q_mean_variance(x, t - 1);
            let (next, added) = s.q_step(mean, t);
            let (expected_mean, expected_variance) = s.q_mean_variance(x, t);
            close(next, expected_mean);
            close(s.alphas[t] * variance + added, expected_variance);
            // Gaussian conditioning: gain k = cov/var of x_t.
            let k = s.alphas[t].sqrt() * variance / expected_variance;
            let x_t = -0.8;
            let (posterior_mean, posterior_variance) = s.q_posterior(x, x_t, t);
            close(posterior_mean, mean + k * (x_t - expected_mean));
            close(posterior_variance, variance - k * k * expected_variance);
        }
    }

    #[test]
    fn the_start_is_clipped_before_the_mean() {
        let s = schedule(Objective::X0, 1.0);
        let t = 300;
        assert_eq!(s.p_mean_variance(0.5, t, 7.0).0, s.q_posterior(1.0, 0.5, t).0);
        assert_eq!(s.p_mean_variance(0.5, t, -7.0).0, s.q_posterior(-1.0, 0.5, t).0);
        assert_eq!(s.p_mean_variance(0.5, t, 0.2).0, s.q_posterior(0.2, 0.5, t).0);
        assert_eq!(schedule(Objective::X0, 0.0).p_mean_variance(0.5, t, 7.0).0, s.q_posterior(7.0, 0.5, t).0);
    }

    #[test]
    fn f32_tables_are_the_f64_ones_rounded_once() {
        let s = schedule(Objective::V, 1.0);
        let (q, target) = (s.q_sample_table(), s.target_table());
        assert_eq!((q.len(), target.len()), (1000, 1000));
        // √(1−ᾱ_0) is √β_0 = 0.01 to the last bit of f32, which an f32 schedule misses.
        assert_eq!(q[0], [0.9999f64.sqrt() as f32, 0.01]);
        assert_eq!(target[0], [-q[0][1], q[0][0]]);
    }
}
